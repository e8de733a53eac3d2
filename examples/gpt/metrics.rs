//! metrics.csv: one row per step, in order. A step is missing only if its row was lost before a resume.

use crate::files::cannot_write;
use crate::output;
use anyhow::{anyhow, Result};
use serde::{Deserialize, Serialize};
use std::fmt::Display;
use std::fs::{self, File};
use std::path::{Path, PathBuf};

pub const FILE_NAME: &str = "metrics.csv";

/// Losses are means in nats per token. Each number is written with enough digits to restore its bits.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Row {
    /// Counts from 1.
    pub step: usize,
    /// Loss on the batch of the step, before its update.
    pub train_loss: f32,
    /// Loss on held-out text, after the update. Empty if the step was not evaluated.
    pub val_loss: Option<f32>,
    pub lr: f64,
    /// Norm of the gradient before clipping.
    pub grad_norm: f32,
    /// Without the time of evaluations and checkpoints. On a GPU it is the mean over the steps that the host waited for
    /// together. It is the only column that depends on a clock.
    pub tokens_per_s: u64,
}

const COLUMNS: [&str; 6] = ["step", "train_loss", "val_loss", "lr", "grad_norm", "tokens_per_s"];

pub struct Metrics {
    path: PathBuf,
    rows: Vec<Row>,
    writer: csv::Writer<File>,
}

impl Metrics {
    /// Opens the file of the run in `dir` after `step`, or creates it. Removes later rows, because those steps run again.
    /// Missing rows are not an error, because training does not need them.
    pub fn open(dir: &Path, step: usize) -> Result<Self> {
        let path = dir.join(FILE_NAME);
        let failed = |error| cannot_write(&path, error);
        let file = File::options().create(true).append(true).open(&path).map_err(failed)?;
        let (rows, bytes) = read(&path, step)?;
        let last = rows.last().map_or(0, |row| row.step);
        if last < step {
            output::notice(format_args!(
                "{} has no rows for steps {} to {step}; new rows start at step {}",
                path.display(),
                last + 1,
                step + 1
            ));
        }
        file.set_len(bytes).map_err(failed)?;
        let writer = csv::WriterBuilder::new().has_headers(bytes == 0).from_writer(file);
        Ok(Self { path, rows, writer })
    }

    pub fn push(&mut self, row: Row) -> Result<()> {
        self.writer.serialize(&row)?;
        self.writer.flush().map_err(|error| cannot_write(&self.path, error))?;
        self.rows.push(row);
        Ok(())
    }

    /// Syncs the rows to the disk. Call this before a checkpoint, so that no row before it can be lost.
    pub fn sync(&self) -> Result<()> {
        self.writer.get_ref().sync_all().map_err(|error| cannot_write(&self.path, error))
    }

    pub fn rows(&self) -> &[Row] {
        &self.rows
    }
}

/// Reads the rows of `path` up to step `last`, and the number of bytes that they and the heading take. Rows may be missing.
pub fn read(path: &Path, last: usize) -> Result<(Vec<Row>, u64)> {
    let damaged = |error: &dyn Display| {
        anyhow!("{} is damaged: {error}; restore it from a copy, or move it away to start a new one", path.display())
    };
    let text = fs::read_to_string(path).map_err(|error| damaged(&error))?;
    let whole_lines = text.rfind('\n').map_or(0, |end| end + 1); // a last line without a newline is incomplete
    let mut reader = csv::Reader::from_reader(&text.as_bytes()[..whole_lines]);
    let heading = reader.headers()?;
    if !heading.is_empty() && heading != COLUMNS[..] {
        return Err(damaged(&format_args!("its first line is not {}", COLUMNS.join(","))));
    }
    let mut rows: Vec<Row> = Vec::new();
    let mut bytes = reader.position().byte();
    let mut lines = reader.into_deserialize();
    // Later rows are not needed and may be damaged.
    while rows.last().is_none_or(|row| row.step < last) {
        let Some(row) = lines.next() else { break };
        let row: Row = row.map_err(|error| damaged(&error))?;
        if row.step > last {
            break;
        }
        rows.push(row);
        bytes = lines.reader().position().byte();
    }
    Ok((rows, bytes))
}
