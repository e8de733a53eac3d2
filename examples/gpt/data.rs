//! Reads the text, hashes it, splits it into a training part and a held-out part, and cuts it into batches.

use crate::config::Config;
use crate::files::repository;
use crate::rng::Rng;
use crate::tokenizer::Tokenizer;
use anyhow::{anyhow, bail, Result};
use candle_core::{Device, Tensor};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

/// File types of the default text: the sources and documents of this repository.
const EXTENSIONS: [&str; 4] = ["rs", "cu", "cuh", "md"];

/// The last `1 / HELD_OUT` of the tokens is held out: it is never used for training.
const HELD_OUT: usize = 10;

/// Name of a run's copy of the default text. The run keeps and uses a copy, because the repository changes.
pub const KEPT_FILE_NAME: &str = "corpus.txt";

pub struct Text {
    pub name: String,
    pub bytes: Vec<u8>,
    pub sha256: String,
}

impl Text {
    /// The file `data`, or the repository's own text.
    pub fn read(data: Option<&Path>) -> Result<Self> {
        let (name, bytes) = match data {
            Some(path) => {
                let bytes = fs::read(path).map_err(|error| {
                    anyhow!("cannot read --data {}: {error}; give the path of a readable text file", path.display())
                })?;
                (path.display().to_string(), bytes)
            }
            None => ("this repository".to_string(), read_repository(&repository())?),
        };
        if bytes.is_empty() {
            bail!("--data {name} is empty; give a file with text");
        }
        let sha256 = Sha256::digest(&bytes).iter().map(|byte| format!("{byte:02x}")).collect();
        Ok(Self { name, bytes, sha256 })
    }

    /// The text of the run in `dir`: `data` if it is given, or the copy that the run kept, or the file of its configuration.
    pub fn of_run(dir: &Path, config: &Config, data: Option<&Path>) -> Result<Self> {
        let kept = Some(dir.join(KEPT_FILE_NAME)).filter(|kept| kept.is_file());
        Self::read(data.or(kept.as_deref()).or(config.data.as_deref()))
    }

    /// Checks that a run was trained on this text, whose hash was `sha256`.
    pub fn check_is(&self, sha256: &str) -> Result<()> {
        if self.sha256 != sha256 {
            bail!(
                "{} is not the text that the run was trained on (SHA-256 {} instead of {}); name the same text with \
                 --data FILE",
                self.name,
                &self.sha256[..12],
                &sha256[..12]
            );
        }
        Ok(())
    }
}

/// All sources and documents below `root`, sorted by path and concatenated.
fn read_repository(root: &Path) -> Result<Vec<u8>> {
    if !root.join("Cargo.toml").is_file() {
        bail!(
            "there is no default text: {} holds no Cargo.toml; start in the repository, or name a text with --data FILE",
            root.display()
        );
    }
    let mut bytes = Vec::new();
    for path in repository_files(root)? {
        let read = fs::read(&path).map_err(|error| {
            anyhow!("cannot read {}: {error}; make it readable, or name a text with --data FILE", path.display())
        })?;
        bytes.extend(read);
        bytes.push(b'\n');
    }
    Ok(bytes)
}

/// The text files in `folder` and below it.
pub fn repository_files(folder: &Path) -> std::io::Result<BTreeSet<PathBuf>> {
    let mut files = BTreeSet::new();
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        let (path, name, kind) = (entry.path(), entry.file_name(), entry.file_type()?);
        // Folders without sources of this repository: those of cargo's builds and of runs, and hidden ones.
        let is_ignored = name == "target" || name == "runs" || name.as_encoded_bytes().starts_with(b".");
        let is_text = path.extension().is_some_and(|extension| EXTENSIONS.iter().any(|known| extension == *known));
        if kind.is_dir() && !is_ignored {
            files.append(&mut repository_files(&path)?);
        } else if kind.is_file() && is_text {
            files.insert(path);
        }
    }
    Ok(files)
}

/// The tokens of a text, split into training and held-out part.
pub struct Corpus {
    pub name: String,
    pub sha256: String,
    pub train: Vec<u32>,
    pub held_out: Vec<u32>,
}

impl Corpus {
    pub fn new(text: Text, tokenizer: Tokenizer, context: usize) -> Result<Self> {
        let mut train = tokenizer.encode(&text.bytes, &text.name)?;
        let total = train.len();
        let held_out = train.split_off(total - total / HELD_OUT);
        // A window has `context` tokens. Its targets are one token further, so it needs `context + 1` tokens.
        if held_out.len() <= context {
            let way_out = match (total / HELD_OUT).saturating_sub(1) {
                0 => "give a longer text".to_string(),
                longest => format!("give a longer text, or --context {longest} or less"),
            };
            bail!(
                "{} is too short for --context {context}: its held-out tenth has {} of {total} tokens and needs {}; {way_out}",
                text.name,
                held_out.len(),
                context + 1,
            );
        }
        Ok(Self { name: text.name, sha256: text.sha256, train, held_out })
    }
}

/// Windows of `tokens` that begin at `starts`, and their targets, one token further. Both are u32 (starts, context).
pub fn windows(
    tokens: &[u32],
    starts: &[usize],
    context: usize,
    device: &Device,
) -> candle_core::Result<(Tensor, Tensor)> {
    let gather = |shift: usize| {
        let values: Vec<u32> =
            starts.iter().flat_map(|&start| tokens[start + shift..start + shift + context].iter().copied()).collect();
        Tensor::from_vec(values, (starts.len(), context), device)
    };
    Ok((gather(0)?, gather(1)?))
}

/// Starts of consecutive windows in a text of `tokens` tokens. The first window begins at `first`.
pub fn window_starts(tokens: usize, context: usize, first: usize) -> Vec<usize> {
    (first..tokens - context).step_by(context).collect()
}

/// The position of the batches in the training text, for a checkpoint. It is small, because the seed of an epoch determines
/// the order of its windows.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Cursor {
    epoch_seed: u64,
    /// Number of windows of this epoch that have been used.
    used: usize,
}

/// Endless batches: each epoch cuts the training text into windows from a new random offset and shuffles them.
pub struct Batches {
    context: usize,
    tokens: usize,
    cursor: Cursor,
    order: Vec<usize>, // starts of this epoch's windows
}

impl Batches {
    pub fn new(config: &Config, corpus: &Corpus, rng: &mut Rng) -> Self {
        Self::at(config, corpus, Cursor { epoch_seed: rng.seed(), used: 0 })
    }

    /// Continues at the cursor of a checkpoint.
    pub fn at(config: &Config, corpus: &Corpus, cursor: Cursor) -> Self {
        let mut batches = Self { context: config.context, tokens: corpus.train.len(), order: Vec::new(), cursor };
        batches.shuffle();
        batches
    }

    pub fn cursor(&self) -> &Cursor {
        &self.cursor
    }

    /// Starts of the next `batch` windows. A new epoch takes its seed from `rng`.
    pub fn next(&mut self, batch: usize, rng: &mut Rng) -> Vec<usize> {
        (0..batch)
            .map(|_| {
                if self.cursor.used == self.order.len() {
                    self.cursor = Cursor { epoch_seed: rng.seed(), used: 0 };
                    self.shuffle();
                }
                self.cursor.used += 1;
                self.order[self.cursor.used - 1]
            })
            .collect()
    }

    fn shuffle(&mut self) {
        let mut rng = Rng::new(self.cursor.epoch_seed);
        let first = rng.below(self.context.min(self.tokens - self.context));
        self.order = window_starts(self.tokens, self.context, first);
        rng.shuffle(&mut self.order);
    }
}
