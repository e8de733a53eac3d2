//! metrics.csv: one row per step, in order. A step is missing only if its row was lost before a resume.

use crate::files::{write_atomically, CannotWrite};
use crate::output;
use anyhow::{anyhow, bail, Result};
use serde::{Deserialize, Serialize};
use std::fs::{self, File, OpenOptions};
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
    /// Starts the file of a new run in `dir`.
    pub fn create(dir: &Path) -> Result<Self> {
        Self::rewrite(dir.join(FILE_NAME), Vec::new())
    }

    /// Continues after `step`. Drops later rows, because those steps run again. Missing rows are not an error, because
    /// training does not need them.
    pub fn resume(dir: &Path, step: usize) -> Result<Self> {
        let path = dir.join(FILE_NAME);
        let rows = match path.try_exists() {
            Ok(false) => Vec::new(),
            _ => read(&path, step).map_err(|error| {
                anyhow!(
                    "{error}; restore it from a copy, or move it away and a new file will start at step {}",
                    step + 1
                )
            })?,
        };
        let last = rows.last().map_or(0, |row| row.step);
        if last < step {
            output::notice(format_args!(
                "{} has no rows for steps {} to {step}; new rows start at step {}",
                path.display(),
                last + 1,
                step + 1
            ));
        }
        Self::rewrite(path, rows)
    }

    /// Rewrites the file, because its last row may be incomplete if the process was killed. New rows are appended to the new
    /// file.
    fn rewrite(path: PathBuf, rows: Vec<Row>) -> Result<Self> {
        let mut table = csv::WriterBuilder::new().has_headers(false).from_writer(Vec::new());
        table.write_record(COLUMNS)?;
        for row in &rows {
            table.serialize(row)?;
        }
        write_atomically(&path, &table.into_inner().expect("a Vec takes all bytes"))?;
        let file = OpenOptions::new().append(true).open(&path).map_err(|error| CannotWrite::new(&path, error))?;
        Ok(Self { path, rows, writer: csv::WriterBuilder::new().has_headers(false).from_writer(file) })
    }

    pub fn push(&mut self, row: Row) -> Result<()> {
        self.writer.serialize(&row)?;
        self.writer.flush().map_err(|error| self.failed(error))?;
        self.rows.push(row);
        Ok(())
    }

    /// Syncs the rows to the disk. Call this before a checkpoint, so that no row before it can be lost.
    pub fn sync(&self) -> Result<()> {
        self.writer.get_ref().sync_all().map_err(|error| self.failed(error))
    }

    fn failed(&self, error: std::io::Error) -> anyhow::Error {
        CannotWrite::new(&self.path, error).into()
    }

    pub fn rows(&self) -> &[Row] {
        &self.rows
    }
}

/// Reads the rows of `path` up to step `last`. Rows may be missing.
pub fn read(path: &Path, last: usize) -> Result<Vec<Row>> {
    let text = fs::read_to_string(path).map_err(|error| anyhow!("cannot read {}: {error}", path.display()))?;
    let heading = COLUMNS.join(",");
    if !heading.starts_with(text.lines().next().unwrap_or("").trim_start_matches('\u{feff}')) {
        bail!("{} is damaged: its first line is not {heading}", path.display());
    }
    // Ignore a last line without a newline, because it is incomplete.
    let whole_lines = text.rfind('\n').map_or(0, |end| end + 1);
    let mut rows: Vec<Row> = Vec::new();
    for row in csv::Reader::from_reader(&text.as_bytes()[..whole_lines]).into_deserialize() {
        let before = rows.last().map_or(0, |row| row.step);
        if before == last {
            break; // rows after `last` are not needed and may be damaged
        }
        let row: Row = row.map_err(|error| anyhow!("{} is damaged: {error}", path.display()))?;
        if row.step <= before {
            bail!("{} is damaged: step {} follows step {before}", path.display(), row.step);
        }
        if row.step > last {
            break;
        }
        let numbers = [row.train_loss, row.val_loss.unwrap_or(0.0), row.lr as f32, row.grad_norm];
        if numbers.iter().any(|number| !number.is_finite()) {
            bail!("{} is damaged: step {} has a number that is not finite", path.display(), row.step);
        }
        rows.push(row);
    }
    Ok(rows)
}
