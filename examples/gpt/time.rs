//! Measures how fast a model trains: whole optimizer steps on random tokens, without a text.
//!
//! After the warm-up, the clock is read once before and once after all timed steps. In between, steps are queued without
//! waiting.
//!
//! The number of FLOPs per token is that of the model: 6 N + 6 L d T for N parameters, L layers of width d, and a context of
//! T tokens. Causal attention sees half of the context. Without attention (`--attention none`) it is 6 N. MFU is the share
//! of the device's peak.

use crate::config::{name_of, AttentionKind, Config};
use crate::learner::{Batch, Learner, Outcome};
use crate::model::{init_parameters, parameter_shapes};
use crate::rng::Rng;
use crate::tokenizer::Tokenizer;
use anyhow::{anyhow, bail, Result};
use candle_core::{Device, Tensor};
use candle_fused_ops::{pool, profile};
use serde::Serialize;
use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::time::Instant;

/// How to measure.
pub struct Plan {
    pub steps: usize,
    pub warmup: usize,
    pub peak_tflops: Option<f64>,
    pub profile: bool,
}

/// One measurement, a row of `--csv`.
#[derive(Default, Serialize)]
pub struct Timing {
    device: String,
    parameters: usize,
    layers: usize,
    width: usize,
    attention: String,
    precision: String,
    context: usize,
    batch: usize,
    accumulation: usize,
    steps: usize,
    /// This and the following fields are empty if the device ran out of memory.
    ms_per_step: Option<f64>,
    tokens_per_s: Option<f64>,
    model_tflops: Option<f64>,
    mfu_percent: Option<f64>,
    /// Peak of the memory in use during the timed steps.
    peak_gib: Option<f64>,
    /// Memory in use between steps: parameters, moments, batches.
    resident_gib: Option<f64>,
    last_loss: Option<f32>,
    #[serde(skip)]
    pub profile: Vec<(String, f64)>, // seconds of each operator, sums over all steps
}

/// Number of characters of the first line of `--csv` shown in an error.
const MOST_SHOWN: usize = 60;

/// Times `plan.steps` steps of the recipe `config`.
pub fn measure(config: &Config, plan: &Plan, device: &Device) -> Result<Timing> {
    let vocab_size = Tokenizer::new(config.tokenizer).padded_vocab_size();
    let mut timing = Timing {
        device: device_name(device)?,
        parameters: parameter_shapes(config, vocab_size).values().map(|shape| shape.iter().product::<usize>()).sum(),
        layers: config.num_layers,
        width: config.embed_dim,
        attention: name_of(config.attention),
        precision: name_of(config.precision),
        context: config.context,
        batch: config.batch,
        accumulation: config.accumulation,
        steps: plan.steps,
        ..Timing::default()
    };
    match run(config, plan, vocab_size, device, &mut timing) {
        Err(error) if is_out_of_memory(&error) => Ok(timing),
        result => result.map(|()| timing),
    }
}

/// Runs the steps and writes the measurements into `timing`. All memory of the device is used in here.
fn run(config: &Config, plan: &Plan, vocab_size: usize, device: &Device, timing: &mut Timing) -> Result<()> {
    let mut rng = Rng::new(config.seed);
    let mut learner = Learner::new(config, &init_parameters(config, vocab_size, &mut rng, device)?)?;
    let mut batches = || -> Result<Vec<Batch>> {
        (0..config.accumulation)
            .map(|_| {
                let mut draw = || {
                    let tokens = (0..config.batch * config.context).map(|_| rng.below(vocab_size) as u32).collect();
                    Tensor::from_vec(tokens, (config.batch, config.context), device)
                };
                Ok((draw()?, draw()?))
            })
            .collect()
    };
    // Draw all tokens first. In training a batch costs almost nothing, but random numbers on the host take time.
    let steps = (0..plan.warmup + plan.steps).map(|_| batches()).collect::<Result<Vec<_>>>()?;
    let (warmup, timed) = steps.split_at(plan.warmup);

    for (step, batches) in (1..).zip(warmup) {
        learner.step(step, batches)?;
    }
    device.synchronize()?;
    let resident = pool::used_bytes(device)?;
    if plan.profile {
        profile::start(device)?;
    }
    let started = Instant::now();
    let mut outcomes = Vec::new();
    for (step, batches) in (plan.warmup + 1..).zip(timed) {
        outcomes.push(learner.step(step, batches)?);
    }
    device.synchronize()?;
    let per_step = started.elapsed().as_secs_f64() / plan.steps as f64;

    let tokens_per_s = config.tokens_per_step() as f64 / per_step;
    let attention = match config.attention {
        AttentionKind::None => 0,
        _ => 6 * config.num_layers * config.embed_dim * config.context,
    };
    let flops_per_token = (6 * timing.parameters + attention) as f64;
    let model_tflops = flops_per_token * tokens_per_s / 1e12;
    let peak = plan.peak_tflops.or_else(|| figures::data_sheet::tflops(&timing.device));
    timing.ms_per_step = Some(per_step * 1e3);
    timing.tokens_per_s = Some(tokens_per_s);
    timing.model_tflops = Some(model_tflops);
    timing.mfu_percent = peak.map(|peak| 100.0 * model_tflops / peak);
    let gib = |bytes: u64| bytes as f64 / f64::from(1 << 30);
    timing.peak_gib = pool::peak_bytes(device)?.map(gib);
    timing.resident_gib = resident.map(gib);
    let (numbers, finite) = Outcome::read(&outcomes)?;
    finite?;
    timing.last_loss = numbers.last().map(|(train_loss, _)| *train_loss);
    timing.profile = profile::finish()?;
    Ok(())
}

/// The open file of `--csv`.
pub struct Table {
    path: PathBuf,
    file: File,
    /// What comes before the new row: the heading of an empty file, or the end of a line that an editor has left open.
    start: String,
}

impl Table {
    /// Opens or creates the file `path`. It must be empty or hold earlier measurements.
    pub fn open(path: &Path) -> Result<Self> {
        let fail = |error| anyhow!("cannot write --csv {}: {error}; name another file", path.display());
        let mut file = OpenOptions::new().create(true).read(true).append(true).open(path).map_err(fail)?;
        let mut found = Vec::new();
        if file.metadata().map_err(fail)?.is_file() {
            file.read_to_end(&mut found).map_err(fail)?;
        }
        let found = String::from_utf8_lossy(&found);
        let all = csv_of(&Timing::default())?;
        let heading = all.lines().next().unwrap_or_default();
        let start = match found.lines().next() {
            None => format!("{heading}\n"),
            Some(line) if line != heading => bail!(
                "--csv {} is not a table of measurements: its first line is {:?}, but must be {heading:?}; name another \
                 file",
                path.display(),
                line.chars().take(MOST_SHOWN).collect::<String>()
            ),
            Some(_) if found.ends_with('\n') => String::new(),
            Some(_) => "\n".to_string(),
        };
        Ok(Self { path: path.to_owned(), file, start })
    }

    /// Appends the row of `timing`.
    pub fn append(mut self, timing: &Timing) -> Result<()> {
        let all = csv_of(timing)?;
        let row = all.lines().nth(1).unwrap_or_default();
        let written = self.file.write_all(format!("{}{row}\n", self.start).as_bytes());
        written.map_err(|error| anyhow!("cannot write --csv {}: {error}", self.path.display()))
    }
}

/// Two lines: the names of the fields of `timing`, and their values.
fn csv_of(timing: &Timing) -> Result<String> {
    let mut rows = csv::Writer::from_writer(Vec::new());
    rows.serialize(timing)?;
    Ok(String::from_utf8(rows.into_inner().expect("a Vec takes all bytes"))?)
}

impl std::fmt::Display for Timing {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        let accumulated = if self.accumulation == 1 { String::new() } else { format!("{} x ", self.accumulation) };
        write!(
            f,
            "{:.1} M parameters, {} attention, {}, {accumulated}{} x {} tokens on {}: ",
            self.parameters as f64 / 1e6,
            self.attention,
            self.precision,
            self.batch,
            self.context,
            self.device
        )?;
        let (Some(ms), Some(tokens_per_s), Some(tflops)) = (self.ms_per_step, self.tokens_per_s, self.model_tflops)
        else {
            return write!(f, "out of memory");
        };
        write!(f, "{ms:.1} ms per step, {tokens_per_s:.0} tokens/s, {tflops:.2} model TFLOP/s")?;
        if let Some(mfu) = self.mfu_percent {
            write!(f, ", MFU {mfu:.1}%")?;
        }
        if let (Some(peak), Some(resident)) = (self.peak_gib, self.resident_gib) {
            write!(f, ", peak memory {peak:.2} GiB ({resident:.2} between steps)")?;
        }
        write!(f, ", loss {:.3}", self.last_loss.unwrap_or(f32::NAN))?;
        let whole: f64 = self.profile.iter().map(|(_, seconds)| seconds).sum();
        for (name, seconds) in &self.profile {
            let (ms, share) = (1e3 * seconds / self.steps as f64, 100.0 * seconds / whole);
            write!(f, "\n  {name:30} {ms:9.2} ms {share:5.1}%")?;
        }
        Ok(())
    }
}

fn device_name(device: &Device) -> Result<String> {
    match device {
        #[cfg(feature = "cuda")]
        Device::Cuda(device) => Ok(device.cuda_stream().context().name()?),
        _ => Ok("CPU".to_string()),
    }
}

/// Whether the device ran out of memory. Candle has no error variant for this, so search the names of the driver and cuBLAS.
fn is_out_of_memory(error: &anyhow::Error) -> bool {
    let text = format!("{error:?}");
    ["CUDA_ERROR_OUT_OF_MEMORY", "CUBLAS_STATUS_ALLOC_FAILED"].iter().any(|words| text.contains(words))
}
