//! A GPT that trains with candle-fa2, from text to sample, each file to be read in one sitting.
//!
//! ```text
//! cargo run --release --example gpt                               train the tiny model on this repository
//! cargo run --release --example gpt -- train --data book.txt      ... on a text of yours
//! cargo run --release --example gpt -- sample --prompt "fn "      let the newest run write
//! cargo run --release --example gpt -- eval                       its loss on held-out text
//! cargo run --release --example gpt -- train --resume runs/0001   resume after Ctrl-C or a crash
//! cargo run --release --example gpt -- time --preset 124m         how fast a preset trains here, without a text
//!
//! cargo run --release --features cuda --example gpt -- train --preset 124m --device cuda --dtype bf16 --batch 16 \
//!     --accumulation 1 --steps 300 --eval-interval 50 --data book.txt         GPT-2 small on an NVIDIA GPU
//! ```
//!
//! | file | what it holds |
//! | --- | --- |
//! | `config.rs` | a run as a recipe, and the presets |
//! | `model.rs` | GPT-2, with the attention call in plain sight |
//! | `ops.rs` | what the model is made of besides attention, with gradients by hand |
//! | `train.rs`, `learner.rs` | the loop, and one step of it |
//! | `parameters.rs`, `optimizer.rs` | all parameters at once; AdamW, schedule, clipping |
//! | `data.rs`, `tokenizer.rs` | text to batches |
//! | `sample.rs` | a trained model's text and loss |
//! | `checkpoint.rs`, `files.rs` | checkpoints; the run's folder, its lock, atomic writes |
//! | `stop.rs` | Ctrl-C and SIGTERM |
//! | `metrics.rs`, `plot.rs`, `progress.rs`, `output.rs` | metrics, loss curve, progress, printing |
//! | `time.rs`, `profile.rs` | speed, and where the time goes |
//! | `gpu.rs`, `blas.rs` | what is asked of a GPU beyond Candle's operators |
//! | `sizes.rs` | how much memory a recipe needs at least |
//! | `rng.rs` | all randomness |
//! | `cli.rs` | options |

#[cfg(feature = "cuda")]
mod blas;
mod checkpoint;
mod cli;
mod config;
mod data;
mod files;
#[cfg(feature = "cuda")]
mod gpu;
mod learner;
mod metrics;
mod model;
mod ops;
mod optimizer;
mod output;
mod parameters;
mod plot;
mod profile;
mod progress;
mod rng;
mod sample;
mod sizes;
mod stop;
#[cfg(test)]
mod tests;
mod time;
mod tokenizer;
mod train;

use anyhow::Result;
use clap::Parser;
use std::ffi::OsString;
use std::process::ExitCode;
use stop::Stopped;

fn main() -> ExitCode {
    exit_code(run(std::env::args_os())).into()
}

/// Prints the error, if there is one, and returns the exit code.
fn exit_code(result: Result<()>) -> u8 {
    let Err(error) = result else { return 0 };
    if let Some(stopped) = error.downcast_ref::<Stopped>() {
        output::notice(stopped);
        return stop::exit_code(stopped.signal);
    }
    let error = match error.downcast::<clap::Error>() {
        // Help arrives as an error too; clap prints it on stdout.
        Ok(usage) => match output::check_written(usage.print()) {
            Err(error) if !usage.use_stderr() => error,
            _ => return usage.exit_code() as u8,
        },
        Err(error) => error,
    };
    output::notice(format_args!("error: {error:#}"));
    1
}

/// The whole program, given its command line.
fn run(args: impl IntoIterator<Item = OsString>) -> Result<()> {
    cli::Cli::try_parse_from(args)?.run()
}
