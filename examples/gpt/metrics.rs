//! metrics.csv: one row per step, in the order of the steps, without gaps.

use crate::files::write_atomically;
use anyhow::{anyhow, bail, Result};
use serde::{Deserialize, Serialize};
use std::fs::{self, File, OpenOptions};
use std::path::{Path, PathBuf};

pub const FILE_NAME: &str = "metrics.csv";

/// Losses are means in nats per token. Each number is written with the digits that give its bits back.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Row {
    /// Counts from 1.
    pub step: usize,
    /// Of the step's batch, before its update.
    pub train_loss: f32,
    /// On held-out text, after the update; empty where it was not evaluated.
    pub val_loss: Option<f32>,
    pub lr: f64,
    /// Of the gradient before clipping.
    pub grad_norm: f32,
    /// Evaluation and checkpoint left out; on a GPU the mean over the steps that were read with this one. The one column
    /// that a clock decides.
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

    /// Continues after `step`: later rows, written between the checkpoint and the end of the process, are dropped,
    /// for those steps will be taken again.
    pub fn resume(dir: &Path, step: usize) -> Result<Self> {
        let path = dir.join(FILE_NAME);
        let rows = read(&path, step)?;
        if rows.len() < step {
            bail!(
                "{} ends at step {} but the checkpoint is of step {step}; restore the file from a copy, or train afresh",
                path.display(),
                rows.len()
            );
        }
        Self::rewrite(path, rows)
    }

    /// The last row in the file may have been cut when the process ended, so rows are not appended to what is there:
    /// the file is written anew.
    fn rewrite(path: PathBuf, rows: Vec<Row>) -> Result<Self> {
        let mut table = csv::WriterBuilder::new().has_headers(false).from_writer(Vec::new());
        table.write_record(COLUMNS)?;
        for row in &rows {
            table.serialize(row)?;
        }
        write_atomically(&path, &table.into_inner().expect("a Vec takes all bytes"))?;
        let file = OpenOptions::new().append(true).open(&path);
        let file = file.map_err(|error| anyhow!("cannot append to {}: {error}", path.display()))?;
        Ok(Self { path, rows, writer: csv::WriterBuilder::new().has_headers(false).from_writer(file) })
    }

    pub fn push(&mut self, row: Row) -> Result<()> {
        self.writer.serialize(&row)?;
        self.writer.flush().map_err(|error| self.failed(error))?;
        self.rows.push(row);
        Ok(())
    }

    /// Puts the rows on the disk. A checkpoint relies on the rows before it.
    pub fn sync(&self) -> Result<()> {
        self.writer.get_ref().sync_all().map_err(|error| self.failed(error))
    }

    fn failed(&self, error: std::io::Error) -> anyhow::Error {
        anyhow!("cannot write {}: {error}", self.path.display())
    }

    pub fn rows(&self) -> &[Row] {
        &self.rows
    }
}

/// The first `limit` rows of `path`, or as many as there are.
pub fn read(path: &Path, limit: usize) -> Result<Vec<Row>> {
    let text = fs::read_to_string(path).map_err(|error| anyhow!("cannot read {}: {error}", path.display()))?;
    let mut rows: Vec<Row> = Vec::new();
    for row in csv::Reader::from_reader(text.as_bytes()).into_deserialize().take(limit) {
        let row: Row =
            row.map_err(|error| anyhow!("{} is damaged: {error}; restore it from a copy", path.display()))?;
        if row.step != rows.len() + 1 {
            bail!(
                "{} is damaged: step {} follows step {}; restore it from a copy",
                path.display(),
                row.step,
                rows.len()
            );
        }
        rows.push(row);
    }
    Ok(rows)
}
