//! The command line.

use crate::checkpoint;
use crate::config::{name_of, AttentionKind, Config, Precision, Preset};
use crate::files::{self, RunFolder};
use crate::output;
use crate::rng::Rng;
use crate::sample::{sample, Sampling, Trained};
use crate::sizes;
use crate::time::{self, Plan};
use crate::tokenizer::Tokenizer;
use crate::train::Run;
use anyhow::{anyhow, bail, Result};
use candle_core::Device;
use clap::{Args, Parser, Subcommand, ValueEnum};
use std::path::PathBuf;

/// Trains a GPT with attention from candle-fa2
///
/// Without a command it trains a small model on the sources and documents of this repository. This takes a few
/// minutes on two cores. The result is in the next numbered folder of runs/.
#[derive(Parser)]
#[command(name = "gpt", args_conflicts_with_subcommands = true, after_help = preset_table())]
pub struct Cli {
    #[command(subcommand)]
    command: Option<Cmd>,
    #[command(flatten)]
    train: TrainArgs,
}

#[derive(Subcommand)]
enum Cmd {
    /// Train a model (the default command)
    #[command(after_help = preset_table())]
    Train(Box<TrainArgs>),
    /// Write text with a trained model
    Sample(SampleArgs),
    /// Measure a trained model's loss on held-out text
    Eval(EvalArgs),
    /// Measure how fast a model trains on this machine, with random tokens
    #[command(after_help = preset_table())]
    Time(Box<TimeArgs>),
}

#[derive(Clone, Copy, ValueEnum)]
enum DeviceKind {
    /// All cores
    Cpu,
    /// The first NVIDIA GPU (needs a build with --features cuda)
    Cuda,
}

impl DeviceKind {
    fn open(self) -> Result<Device> {
        match self {
            DeviceKind::Cpu => Ok(Device::Cpu),
            DeviceKind::Cuda => open_gpu().map_err(|error| {
                anyhow!("--device cuda found no usable GPU: {error}; build with --features cuda, or use --device cpu")
            }),
        }
    }
}

/// The first GPU, set up for training on one thread.
fn open_gpu() -> candle_core::Result<Device> {
    let gpu = Device::new_cuda(0)?;
    // SAFETY: Candle's events order the uses of a tensor on several streams, and its release after them. This program
    // allocates, uses and frees all tensors on one thread and one stream, and a stream runs its work in order.
    #[cfg(feature = "cuda")]
    unsafe {
        gpu.as_cuda_device()?.disable_event_tracking()
    };
    candle_fused_ops::pool::keep_freed_memory(&gpu)?;
    Ok(gpu)
}

#[derive(Args)]
pub struct TrainArgs {
    /// Preset that sets the defaults of the options below [default: tiny]
    #[arg(long)]
    preset: Option<Preset>,
    /// Text to train on [default: this repository's .rs, .cu, .cuh and .md files]
    #[arg(long, value_name = "FILE", value_parser = absolute)]
    data: Option<PathBuf>,
    /// Folder of the run, new or empty [default: the next of runs/0001, runs/0002, ...]
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// Continue the run in DIR from its last checkpoint
    ///
    /// Ctrl-C finishes the current step, saves a checkpoint and stops. Only one process can train in a folder; sample and
    /// eval can read the last checkpoint during training.
    ///
    /// A resumed run keeps its options. Only three can be changed: --data (the new path, if the same text has moved),
    /// --device, and --steps (the new number of steps, which also changes the learning-rate schedule).
    #[arg(long, value_name = "DIR")]
    #[arg(conflicts_with_all = ["preset", "out", "tokenizer", "attention", "dtype", "checkpoint_activations", "context"])]
    #[arg(conflicts_with_all = ["batch", "accumulation", "lr", "min_lr", "warmup", "weight_decay", "beta1", "beta2"])]
    #[arg(conflicts_with_all = ["clip", "seed", "deterministic", "eval_interval", "eval_windows", "checkpoint_interval"])]
    resume: Option<PathBuf>,
    /// Device to compute on
    #[arg(long, value_enum, default_value = "cpu")]
    device: DeviceKind,
    /// Number of optimizer steps
    #[arg(long, value_name = "N", value_parser = positive)]
    steps: Option<usize>,
    #[command(flatten)]
    recipe: RecipeArgs,
}

/// The options that replace fields of the preset. `--resume` reads them from the checkpoint.
#[derive(Args)]
#[command(next_help_heading = "Recipe (the preset sets the defaults)")]
struct RecipeArgs {
    /// How text becomes tokens
    #[arg(long)]
    tokenizer: Option<Tokenizer>,
    #[command(flatten)]
    model: ModelArgs,
    /// Number of batches per step; their gradients are added
    #[arg(long, value_name = "N", value_parser = positive)]
    accumulation: Option<usize>,
    /// Highest learning rate
    #[arg(long, value_name = "RATE", value_parser = above_zero)]
    lr: Option<f64>,
    /// Learning rate of the last step [default: a tenth of --lr]
    #[arg(long, value_name = "RATE", value_parser = zero_or_above)]
    min_lr: Option<f64>,
    /// Number of steps until the highest learning rate [default: the preset's, at most a tenth of --steps]
    #[arg(long, value_name = "N")]
    warmup: Option<usize>,
    /// Decoupled weight decay, of matrices only
    #[arg(long, value_name = "RATE", value_parser = zero_or_above)]
    weight_decay: Option<f64>,
    /// Decay of the running mean of the gradient
    #[arg(long, value_name = "RATE", value_parser = below_one)]
    beta1: Option<f64>,
    /// Decay of the running mean of the squared gradient
    #[arg(long, value_name = "RATE", value_parser = below_one)]
    beta2: Option<f64>,
    /// Largest global norm of the gradient; a larger gradient is scaled down to it
    #[arg(long, value_name = "NORM", value_parser = above_zero)]
    clip: Option<f64>,
    /// Seed of all random numbers
    #[arg(long, value_name = "N")]
    seed: Option<u64>,
    /// The same bits in every run, on a GPU too; there it is slower
    #[arg(long)]
    deterministic: bool,
    /// Number of steps between evaluations; each evaluation also redraws loss.svg
    #[arg(long, value_name = "N", value_parser = positive)]
    eval_interval: Option<usize>,
    /// Number of held-out windows per evaluation
    #[arg(long, value_name = "N", value_parser = positive)]
    eval_windows: Option<usize>,
    /// Number of steps between checkpoints; Ctrl-C saves one too [default: --eval-interval]
    #[arg(long, value_name = "N", value_parser = positive)]
    checkpoint_interval: Option<usize>,
}

/// The part of the recipe that also `gpt time` has.
#[derive(Args)]
struct ModelArgs {
    /// Kind of attention: flash, another kind for comparison, or none to measure the rest of the model
    #[arg(long)]
    attention: Option<AttentionKind>,
    /// Type of the activations; weights and optimizer are always f32
    #[arg(long)]
    dtype: Option<Precision>,
    /// Compute the activations of each block again in the backward, instead of keeping them in memory
    #[arg(long)]
    checkpoint_activations: bool,
    /// Number of tokens that the model sees at once
    #[arg(long, value_name = "N", value_parser = positive)]
    context: Option<usize>,
    /// Number of text windows per batch
    #[arg(long, value_name = "N", value_parser = positive)]
    batch: Option<usize>,
}

impl ModelArgs {
    fn apply(&self, preset: Config) -> Config {
        Config {
            attention: self.attention.unwrap_or(preset.attention),
            precision: self.dtype.unwrap_or(preset.precision),
            checkpoint_activations: self.checkpoint_activations,
            context: self.context.unwrap_or(preset.context),
            batch: self.batch.unwrap_or(preset.batch),
            ..preset
        }
    }
}

impl TrainArgs {
    fn run(self) -> Result<()> {
        let device = self.device.open()?;
        if let Some(dir) = self.resume {
            if dir.is_file() {
                bail!("--resume {} is a file; give the folder of the run", dir.display());
            }
            checkpoint::locate(&dir)?; // check first: do not lock a folder that holds no run
            let folder = RunFolder::open(&dir)?;
            return Run::resume(&folder, self.data, self.steps, device)?.train(&folder);
        }
        let preset = Config::preset(self.preset.unwrap_or(Preset::Tiny));
        let config = self.recipe.apply(preset, self.steps, self.data)?;
        if let Some(dir) = &self.out {
            files::check_free(dir)?;
        }
        sizes::check(&config, sizes::memory_of(&device))?;
        // Check all input before the folder is created, so that a refused run leaves no folder.
        let mut run = Run::new(config, device)?;
        let folder = match self.out {
            Some(dir) => RunFolder::create(&dir)?,
            None => RunFolder::create_next(&files::runs_folder())?,
        };
        run.train(&folder)
    }
}

impl RecipeArgs {
    fn apply(self, preset: Config, steps: Option<usize>, data: Option<PathBuf>) -> Result<Config> {
        let preset = self.model.apply(preset);
        let steps = steps.unwrap_or(preset.steps);
        let lr = self.lr.unwrap_or(preset.lr);
        let config = Config {
            data,
            tokenizer: self.tokenizer.unwrap_or(preset.tokenizer),
            steps,
            accumulation: self.accumulation.unwrap_or(preset.accumulation),
            lr,
            min_lr: self.min_lr.unwrap_or(lr / 10.0),
            warmup: self.warmup.unwrap_or(preset.warmup.min(steps / 10)),
            weight_decay: self.weight_decay.unwrap_or(preset.weight_decay),
            beta1: self.beta1.unwrap_or(preset.beta1),
            beta2: self.beta2.unwrap_or(preset.beta2),
            clip: self.clip.unwrap_or(preset.clip),
            seed: self.seed.unwrap_or(preset.seed),
            deterministic: self.deterministic,
            eval_interval: self.eval_interval.unwrap_or(preset.eval_interval),
            eval_windows: self.eval_windows.unwrap_or(preset.eval_windows),
            checkpoint_interval: self.checkpoint_interval,
            ..preset
        };
        if config.warmup >= config.steps {
            bail!("--warmup {} must be below --steps {}; lower --warmup or raise --steps", config.warmup, config.steps);
        }
        if config.min_lr > config.lr {
            bail!(
                "--min-lr {} is above --lr {}, but the learning rate falls from --lr to --min-lr; lower --min-lr",
                config.min_lr,
                config.lr
            );
        }
        Ok(config)
    }
}

#[derive(Args)]
struct TrainedArgs {
    /// Folder of a run, or its checkpoint file [default: the newest run in runs/]
    #[arg(long, value_name = "DIR")]
    checkpoint: Option<PathBuf>,
    /// Device to compute on
    #[arg(long, value_enum, default_value = "cpu")]
    device: DeviceKind,
}

impl TrainedArgs {
    fn load(&self) -> Result<Trained> {
        let path = match &self.checkpoint {
            Some(path) => path.clone(),
            None => files::newest_run(&files::runs_folder(), checkpoint::FILE_NAME)?,
        };
        Trained::load(&path, &self.device.open()?)
    }
}

#[derive(Args)]
struct SampleArgs {
    #[command(flatten)]
    trained: TrainedArgs,
    /// Text to continue
    #[arg(long, value_name = "TEXT", default_value = "\n", hide_default_value = true)]
    prompt: String,
    #[command(flatten)]
    sampling: Sampling,
    /// Seed of the random draws
    #[arg(long, value_name = "N", default_value_t = 1)]
    seed: u64,
}

#[derive(Args)]
struct EvalArgs {
    #[command(flatten)]
    trained: TrainedArgs,
    /// Text to evaluate on, as a whole [default: the held-out part of the training text]
    #[arg(long, value_name = "FILE")]
    data: Option<PathBuf>,
}

#[derive(Args)]
struct TimeArgs {
    /// Preset that sets the defaults of the recipe, except for --accumulation
    #[arg(long, default_value = "tiny")]
    preset: Preset,
    /// Device to compute on
    #[arg(long, value_enum, default_value = "cpu")]
    device: DeviceKind,
    #[command(flatten)]
    model: ModelArgs,
    /// Number of batches per step
    #[arg(long, value_name = "N", value_parser = positive, default_value_t = 1)]
    accumulation: usize,
    #[command(flatten)]
    plan: Plan,
    /// Append the result as a row to this file
    #[arg(long, value_name = "FILE")]
    csv: Option<PathBuf>,
}

impl TimeArgs {
    fn run(self) -> Result<()> {
        let config = Config { accumulation: self.accumulation, ..self.model.apply(Config::preset(self.preset)) };
        let device = self.device.open()?;
        sizes::check(&config, sizes::memory_of(&device))?;
        let table = self.csv.as_deref().map(time::open_table).transpose()?;
        let timing = time::measure(&config, &self.plan, &device)?;
        let printed = output::result(&timing);
        // Write the row even if the result cannot be printed.
        if let Some(mut table) = table {
            table.serialize(&timing)?;
            table.flush()?;
        }
        printed
    }
}

impl Cli {
    pub fn run(self) -> Result<()> {
        match self.command {
            None => self.train.run(),
            Some(Cmd::Train(args)) => args.run(),
            Some(Cmd::Time(args)) => args.run(),
            Some(Cmd::Sample(args)) => {
                let model = args.trained.load()?.model;
                output::result(sample(&model, &args.prompt, &args.sampling, &mut Rng::new(args.seed))?)
            }
            Some(Cmd::Eval(args)) => output::result(args.trained.load()?.evaluate(args.data.as_deref())?),
        }
    }
}

/// A table of the presets, for `--help`.
fn preset_table() -> String {
    let mut table =
        "Presets:\n           layers  heads  width  context  batch  accumulation      lr   steps".to_string();
    for &preset in Preset::value_variants() {
        let name = name_of(preset);
        let Config { num_layers, num_heads, embed_dim, context, batch, accumulation, lr, steps, .. } =
            Config::preset(preset);
        table += &format!("\n  {name:8} {num_layers:>6} {num_heads:>6} {embed_dim:>6} {context:>8} {batch:>6}");
        table += &format!(" {accumulation:>13} {lr:>7} {steps:>7}");
    }
    table
}

/// An absolute path. A run stores this path of its text, because it may be resumed from another folder.
fn absolute(path: &str) -> Result<PathBuf, String> {
    std::path::absolute(path).map_err(|error| error.to_string())
}

pub fn positive(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(0) | Err(_) => Err("a whole number from 1 is needed".to_string()),
        Ok(number) => Ok(number),
    }
}

fn number(text: &str, rule: &str, fits: impl Fn(f64) -> bool) -> Result<f64, String> {
    text.parse().ok().filter(|&number: &f64| number.is_finite() && fits(number)).ok_or_else(|| rule.to_string())
}

pub fn above_zero(text: &str) -> Result<f64, String> {
    number(text, "a finite number above 0 is needed", |number| number > 0.0)
}

pub fn zero_or_above(text: &str) -> Result<f64, String> {
    number(text, "a finite number, 0 or above, is needed", |number| number >= 0.0)
}

fn below_one(text: &str) -> Result<f64, String> {
    number(text, "a number from 0 to below 1 is needed", |number| (0.0..1.0).contains(&number))
}
