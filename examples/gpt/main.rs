//! Trains a GPT with attention from candle-fa2, and samples text from it. Every file is short enough to read in one sitting.
//!
//! ```text
//! cargo run --release --example gpt                               train the tiny model on this repository
//! cargo run --release --example gpt -- train --data book.txt      train on your own text
//! cargo run --release --example gpt -- sample --prompt "fn "      sample text from the newest run
//! cargo run --release --example gpt -- eval                       measure its loss on held-out text
//! cargo run --release --example gpt -- train --resume runs/0001   resume after Ctrl-C or a crash
//! cargo run --release --example gpt -- time --preset 124m         measure how fast a preset trains here
//!
//! cargo run --release --features cuda --example gpt -- train --preset 124m --device cuda --dtype bf16 --batch 16 \
//!     --accumulation 1 --steps 300 --eval-interval 50 --data book.txt         GPT-2 small on an NVIDIA GPU
//! ```
//!
//! | file | content |
//! | --- | --- |
//! | `config.rs` | the configuration of a run, and the presets |
//! | `model.rs` | GPT-2, with the attention call |
//! | `train.rs`, `learner.rs` | the training loop; one training step |
//! | `data.rs`, `tokenizer.rs` | text to batches |
//! | `sample.rs` | sampling from a trained model, and its loss on a text |
//! | `checkpoint.rs`, `files.rs` | checkpoints; the folder of a run and its lock |
//! | `stop.rs` | Ctrl-C and SIGTERM |
//! | `metrics.rs`, `plot.rs`, `progress.rs`, `output.rs` | metrics, loss curve, progress, printing |
//! | `time.rs` | speed, and the time of each operator in a step |
//! | `sizes.rs` | a lower bound of the memory that a recipe needs |
//! | `rng.rs` | all random numbers |
//! | `cli.rs` | the command line |

mod checkpoint;
mod cli;
mod config;
mod data;
mod files;
mod learner;
mod metrics;
mod model;
mod output;
mod plot;
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
    if let Some(usage) = error.downcast_ref::<clap::Error>() {
        let _ = usage.print(); // help is an error of clap too, and goes to stdout
        return usage.exit_code() as u8;
    }
    output::notice(format_args!("error: {error:#}"));
    1
}

/// Runs the program with a command line.
fn run(args: impl IntoIterator<Item = OsString>) -> Result<()> {
    cli::Cli::try_parse_from(args)?.run()
}
