//! Measures how fast a model trains: whole optimizer steps on random tokens, without a text.
//!
//! After the warm-up, the clock is read once before and once after all timed steps. In between, steps are queued without
//! waiting.
//!
//! The number of FLOPs per token is that of the model: 6 N + 6 L d T for N parameters, L layers of width d, and a context of
//! T tokens. Causal attention sees half of the context. Without attention (`--attention none`) it is 6 N. MFU is the share
//! of the device's peak.

use crate::cli::{above_zero, positive};
use crate::config::{name_of, AttentionKind, Config};
use crate::learner::{Batch, Learner, Outcome};
use crate::model::{init_parameters, parameter_shapes};
use crate::rng::Rng;
use anyhow::{anyhow, bail, Result};
use candle_core::{Device, Tensor};
use candle_fused_ops::{pool, profile};
use clap::Args;
use serde::Serialize;
use std::fs::File;
use std::io::{Read, Write};
use std::path::Path;
use std::time::Instant;

/// How to measure.
#[derive(Args)]
pub struct Plan {
    /// Number of timed steps
    #[arg(long, value_name = "N", value_parser = positive, default_value_t = 10)]
    pub steps: usize,
    /// Number of steps before the timed steps, to warm up
    #[arg(long, value_name = "N", default_value_t = 4)]
    pub warmup: usize,
    /// Peak of the device, to compute MFU [default: the bf16 peak in the data sheet, for known GPUs]
    #[arg(long = "peak", value_name = "TFLOPS", value_parser = above_zero)]
    pub peak_tflops: Option<f64>,
    /// Print where the time of a step goes
    #[arg(long)]
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

/// Times `plan.steps` steps of the recipe `config`.
pub fn measure(config: &Config, plan: &Plan, device: &Device) -> Result<Timing> {
    let vocab_size = config.tokenizer.padded_vocab_size();
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
        Err(error) if pool::is_out_of_memory(&error) => Ok(timing),
        result => result.map(|()| timing),
    }
}

/// Runs the steps and writes the measurements into `timing`. All memory of the device is used in here.
fn run(config: &Config, plan: &Plan, vocab_size: usize, device: &Device, timing: &mut Timing) -> Result<()> {
    let mut rng = Rng::new(config.seed);
    let mut learner = Learner::new(config, &init_parameters(config, vocab_size, &mut rng, device)?)?;
    let mut draw = || {
        let tokens = (0..config.batch * config.context).map(|_| rng.below(vocab_size) as u32).collect();
        Tensor::from_vec(tokens, (config.batch, config.context), device)
    };
    // Every step has the same batches, because random numbers on the host take time.
    let batches = (0..config.accumulation).map(|_| Ok((draw()?, draw()?))).collect::<Result<Vec<Batch>>>()?;

    for step in 1..=plan.warmup {
        learner.step(step, &batches)?;
    }
    device.synchronize()?;
    let resident = pool::used_bytes(device)?;
    if plan.profile {
        profile::start(device)?;
    }
    let started = Instant::now();
    let steps = plan.warmup + 1..=plan.warmup + plan.steps;
    let outcomes = steps.map(|step| learner.step(step, &batches)).collect::<Result<Vec<_>>>()?;
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
    timing.last_loss = Outcome::read(&outcomes)?.last().map(|(train_loss, _)| *train_loss);
    timing.profile = profile::finish()?;
    Ok(())
}

/// Opens or creates `path`, the file of `--csv`. It must be empty or hold earlier measurements.
pub fn open_table(path: &Path) -> Result<csv::Writer<File>> {
    let fail = |error| anyhow!("cannot write --csv {}: {error}; name another file", path.display());
    let mut file = File::options().create(true).read(true).append(true).open(path).map_err(fail)?;
    let mut text = String::new();
    file.read_to_string(&mut text).map_err(fail)?;
    if let Some(first_line) = text.split_inclusive('\n').next() {
        let mut heading = csv::Writer::from_writer(Vec::new());
        heading.serialize(Timing::default())?;
        if !heading.into_inner()?.starts_with(first_line.as_bytes()) {
            bail!("--csv {} is not a table of measurements; name another file", path.display());
        }
        if !text.ends_with('\n') {
            file.write_all(b"\n").map_err(fail)?; // some editors drop the last line break
        }
    }
    Ok(csv::WriterBuilder::new().has_headers(text.is_empty()).from_writer(file))
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
