//! Checkpoints: everything that a run needs to continue, in one safetensors file.
//!
//! The tensors are the state of `AdamW`: the f32 weights of each parameter under its name, and its moments. The metadata is JSON:
//! step, configuration, state of the random generator, data cursor, and hash of the text.

use crate::config::Config;
use crate::data::Cursor;
use crate::files::cannot_write;
use crate::model::Named;
use crate::rng::Rng;
use anyhow::{anyhow, bail, Result};
use candle_core::Device;
use candle_fused_ops::AdamW;
use safetensors::SafeTensors;
use serde::{Deserialize, Serialize};
use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};

pub const FILE_NAME: &str = "checkpoint.safetensors";

/// Metadata entry of files of this program. Its number changes if a new version cannot read old files.
const METADATA_KEY: &str = "candle-fa2-gpt-3";

/// The content of a checkpoint besides tensors.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct State {
    pub step: usize,
    pub config: Config,
    pub text_sha256: String,
    pub rng: Rng,
    pub cursor: Cursor,
}

pub struct Checkpoint {
    pub state: State,
    /// The state of the optimizer, with the weights.
    pub tensors: Named,
}

/// Writes the checkpoint of the run in `dir`. The previous one stays until this one is complete.
pub fn save(dir: &Path, state: &State, optimizer: &AdamW) -> Result<()> {
    let path = dir.join(FILE_NAME);
    let metadata = HashMap::from([(METADATA_KEY.to_string(), serde_json::to_string(state)?)]);
    #[cfg(test)]
    crate::tests::abort_at("before", &path);
    optimizer.save(&path, metadata).map_err(|error| cannot_write(&path, error))?;
    #[cfg(test)]
    crate::tests::abort_at("after", &path);
    Ok(())
}

/// The checkpoint file of `path`, which is the folder of a run or the file itself.
pub fn locate(path: &Path) -> Result<PathBuf> {
    let file = if path.is_file() { path.to_owned() } else { path.join(FILE_NAME) };
    if !file.is_file() {
        bail!("there is no run in {}: no {FILE_NAME}; give the folder of a run, such as runs/0001", path.display());
    }
    Ok(file)
}

/// Reads the checkpoint `file`.
pub fn load(file: &Path, device: &Device) -> Result<Checkpoint> {
    let refuse = |reason: String| {
        anyhow!("{} cannot be used: {reason}; restore it from a copy or start a new run", file.display())
    };
    let bytes = fs::read(file).map_err(|error| anyhow!("cannot read {}: {error}", file.display()))?;
    let (_, header) = SafeTensors::read_metadata(&bytes)
        .map_err(|error| refuse(format!("it is incomplete, damaged or not a safetensors file ({error})")))?;
    let entries = header.metadata().as_ref();
    let state = entries
        .and_then(|entries| entries.get(METADATA_KEY))
        .ok_or_else(|| refuse(format!("another program or version wrote it (no {METADATA_KEY} in its metadata)")))?;
    Ok(Checkpoint {
        state: serde_json::from_str(state).map_err(|error| refuse(format!("its metadata is damaged ({error})")))?,
        tensors: candle_core::safetensors::load_buffer(&bytes, device)?,
    })
}
