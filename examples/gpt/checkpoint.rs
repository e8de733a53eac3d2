//! Checkpoints: everything that a run needs to continue, in one safetensors file.
//!
//! | tensor | content |
//! | --- | --- |
//! | `NAME` | the parameter NAME, f32 |
//! | `adam.m.NAME`, `adam.v.NAME` | its moments, f32 |
//! | `sha256` | the last 32 bytes of the file: the hash of all bytes before them |
//!
//! The metadata of the file is JSON: step, configuration, state of the random generator, data cursor, and hash of the text.

use crate::config::{name_of, Config};
use crate::data::Cursor;
use crate::files::{AtomicFile, CannotWrite};
use crate::learner::Learner;
use crate::model::{parameter_shapes, Named};
use crate::rng::Rng;
use crate::tokenizer::Tokenizer;
use anyhow::{anyhow, Result};
use candle_core::{Device, Tensor};
use safetensors::tensor::{Metadata, TensorInfo};
use safetensors::{Dtype, SafeTensors};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::collections::HashMap;
use std::fmt::Display;
use std::fs;
use std::io::{self, ErrorKind, Write};
use std::path::{Path, PathBuf};

pub const FILE_NAME: &str = "checkpoint.safetensors";

/// Metadata entry of files of this program. Its number changes if a new version cannot read old files.
const METADATA_KEY: &str = "candle-fa2-gpt-2";

const SHA256: &str = "sha256";
const SHA256_BYTES: usize = 32;

/// The content of a checkpoint besides tensors.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct State {
    pub step: usize,
    pub config: Config,
    pub vocab_size: usize, // rows of `wte`, with padding
    pub text_name: String,
    pub text_sha256: String,
    pub rng: Rng,
    pub cursor: Cursor,
}

pub struct Checkpoint {
    pub state: State,
    /// The tensors of [`Learner::tensors`].
    pub tensors: Named,
}

/// Writes the checkpoint of the run in `dir`. The previous one stays until this one is complete.
pub fn save(dir: &Path, state: &State, learner: &Learner) -> Result<()> {
    let tensors: Vec<(String, Tensor)> = learner.tensors()?.into_iter().collect();
    let path = dir.join(FILE_NAME);
    write(&path, &header(state, &tensors)?, &tensors).map_err(|error| match error.downcast::<io::Error>() {
        Ok(error) => CannotWrite::new(&path, error).into(),
        Err(error) => error,
    })
}

/// The header of a safetensors file: its length, then JSON with the state and the place of each tensor.
fn header(state: &State, tensors: &[(String, Tensor)]) -> Result<Vec<u8>> {
    let mut end = 0;
    let mut info = |dtype: Dtype, shape: &[usize], bytes: usize| {
        end += bytes;
        TensorInfo { dtype, shape: shape.to_vec(), data_offsets: (end - bytes, end) }
    };
    let mut infos: Vec<(String, TensorInfo)> = tensors
        .iter()
        .map(|(name, tensor)| (name.clone(), info(Dtype::F32, tensor.dims(), 4 * tensor.elem_count())))
        .collect();
    infos.push((SHA256.to_string(), info(Dtype::U8, &[SHA256_BYTES], SHA256_BYTES)));
    let metadata = HashMap::from([(METADATA_KEY.to_string(), serde_json::to_string(state)?)]);
    let mut json = serde_json::to_vec(&Metadata::new(Some(metadata), infos)?)?;
    json.resize(json.len().next_multiple_of(8), b' '); // safetensors aligns tensors to 8 bytes
    Ok([&(json.len() as u64).to_le_bytes()[..], &json].concat())
}

fn write(path: &Path, header: &[u8], tensors: &[(String, Tensor)]) -> Result<()> {
    let mut file = Hashing { file: AtomicFile::create(path)?, sha256: Sha256::new() };
    file.write_all(header)?;
    let (first_half, second_half) = tensors.split_at(tensors.len() / 2);
    write_values(&mut file, first_half)?;
    #[cfg(test)]
    {
        file.flush()?;
        crate::tests::abort_at("half-way through", path);
    }
    write_values(&mut file, second_half)?;
    let Hashing { mut file, sha256 } = file;
    file.write_all(&sha256.finalize())?;
    Ok(file.commit()?)
}

/// Writes one tensor at a time, so that memory never holds a second copy of all tensors.
fn write_values(file: &mut impl Write, tensors: &[(String, Tensor)]) -> Result<()> {
    for (_, tensor) in tensors {
        let values = tensor.flatten_all()?.to_vec1::<f32>()?;
        let mut bytes = vec![0; size_of_val(values.as_slice())];
        for (bytes, value) in bytes.chunks_exact_mut(4).zip(&values) {
            bytes.copy_from_slice(&value.to_le_bytes());
        }
        file.write_all(&bytes)?;
    }
    Ok(())
}

/// The checkpoint file of `path`, which is the folder of a run or the file itself.
pub fn locate(path: &Path) -> Result<PathBuf> {
    let no_run = |reason: &dyn Display| {
        anyhow!("there is no run in {}: {reason}; give the folder of a run, such as runs/0001", path.display())
    };
    let file = match fs::metadata(path) {
        Ok(found) if found.is_dir() => path.join(FILE_NAME),
        Ok(_) => return Ok(path.to_owned()),
        Err(error) if error.kind() == ErrorKind::NotFound => return Err(no_run(&"no such folder")),
        Err(error) => return Err(no_run(&error)),
    };
    match fs::metadata(&file) {
        Ok(_) => Ok(file),
        Err(error) if error.kind() == ErrorKind::NotFound => Err(no_run(&format_args!("it holds no {FILE_NAME}"))),
        Err(error) => Err(no_run(&error)),
    }
}

/// Reads the checkpoint `file`. Checks the hash of all its bytes first.
pub fn load(file: &Path, device: &Device) -> Result<Checkpoint> {
    let bytes = fs::read(file).map_err(|error| anyhow!("cannot read {}: {error}", file.display()))?;
    let refuse = |reason| unusable(file, reason);
    let damaged = |error| refuse(format!("it is incomplete, damaged or not a safetensors file ({error})"));

    let (_, metadata) = SafeTensors::read_metadata(&bytes).map_err(damaged)?;
    let state = metadata.metadata().as_ref().and_then(|entries| entries.get(METADATA_KEY)).ok_or_else(|| {
        refuse(format!("it is a safetensors file of another program (no {METADATA_KEY} in its metadata)"))
    })?;
    let (body, sha256) = bytes.split_at(bytes.len() - SHA256_BYTES);
    if Sha256::digest(body).as_slice() != sha256 {
        return Err(refuse("its bytes are not those that were written (SHA-256 differs)".to_string()));
    }
    let state: State = serde_json::from_str(state)
        .map_err(|error| refuse(format!("another version of this program wrote it ({error})")))?;
    state.check().map_err(refuse)?;

    let tensors = SafeTensors::deserialize(&bytes).map_err(damaged)?;
    let Config { num_layers, .. } = state.config;
    if num_layers > tensors.len() {
        return Err(refuse(format!("num_layers is {num_layers}, but the file has only {} tensors", tensors.len())));
    }
    let read = |name: &str, shape: &[usize]| -> Result<Tensor> {
        let view = tensors
            .tensor(name)
            .ok()
            .filter(|view| view.dtype() == Dtype::F32 && view.shape() == shape)
            .ok_or_else(|| refuse(format!("it has no f32 tensor {name} of shape {shape:?}")))?;
        let values: Vec<f32> =
            view.data().chunks_exact(4).map(|bytes| f32::from_le_bytes(bytes.try_into().unwrap())).collect();
        Ok(Tensor::from_vec(values, shape, device)?)
    };
    let mut all = Named::new();
    for (name, shape) in parameter_shapes(&state.config, state.vocab_size) {
        for name in [name.clone(), format!("adam.m.{name}"), format!("adam.v.{name}")] {
            let tensor = read(&name, &shape)?;
            all.insert(name, tensor);
        }
    }
    Ok(Checkpoint { state, tensors: all })
}

/// The error of a checkpoint `file` that cannot be used.
pub fn unusable(file: &Path, reason: String) -> anyhow::Error {
    anyhow!("{} cannot be used: {reason}; restore it from a copy or start a new run", file.display())
}

impl State {
    /// Checks all fields and reports the first invalid one. `Batches::at` checks the cursor, because that check needs the text.
    fn check(&self) -> Result<(), String> {
        self.config.check()?;
        let Self { step, vocab_size, text_sha256, config, .. } = self;
        if *step > config.steps {
            return Err(format!("step is {step}, but must be at most {}, the steps of the run", config.steps));
        }
        let tokens = Tokenizer::new(config.tokenizer).vocab_size();
        if *vocab_size < tokens {
            return Err(format!(
                "vocab_size is {vocab_size}, but must be at least {tokens} for the tokenizer {}",
                name_of(config.tokenizer)
            ));
        }
        if text_sha256.len() != 2 * SHA256_BYTES || !text_sha256.bytes().all(|byte| byte.is_ascii_hexdigit()) {
            return Err(format!("text_sha256 is {text_sha256:?}, but must be {} hexadecimal digits", 2 * SHA256_BYTES));
        }
        Ok(())
    }
}

/// A writer that also hashes the bytes.
struct Hashing {
    file: AtomicFile,
    sha256: Sha256,
}

impl Write for Hashing {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.file.write(bytes)?;
        self.sha256.update(&bytes[..written]);
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}
