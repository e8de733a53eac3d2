//! Times attention: on the CPU next to Candle's own attention, on a GPU over the papers' grid.
//!
//! ```text
//! cargo bench                          every case of benches/cases.toml, in 2 to 3 minutes on 2 cores
//! cargo bench -- --quick               the reference case alone
//! cargo bench -- causal decode         the cases whose name or call contains one of these words
//! cargo bench -- --csv FILE            rows in the columns of benches/record, too
//! cargo bench -- --plots DIR --from A.csv B.csv    draws the rows of these files and measures nothing
//! cargo test --bench attention         only checks the answers
//! ```
//!
//! With the feature `cuda` the GPU takes the CPU's place, and the same options choose from the cases of
//! benches/cuda.toml. They come in parts. The name of a part runs that part. Any other word chooses among the cases of
//! the parts that run. `--help` lists more options:
//!
//! ```text
//! cargo bench --features cuda                              every part, in seven to eight minutes on an H100
//! cargo bench --features cuda -- --list                    the parts, their cases, and why each is there
//! cargo bench --features cuda -- --quick                   a handful of cases
//! cargo bench --features cuda -- standard memory           these two parts
//! cargo bench --features cuda -- grid d128 --passes fwd    of the papers' grid, forward only, head_dim 128
//! cargo bench --features cuda -- --device cpu              the CPU's cases
//! ```
//!
//! ```text
//! host       the time of the first call, and the host's time for a call
//! ceiling    the rate of a large matrix product, and of a copy in memory
//! grid       the grid of the papers, and head_dims between
//! gqa        query heads that share key heads
//! packed     sequences of uneven lengths end to end
//! sizes      head_dims without tiles of their own, 512, and v of another size than q
//! f16        some of the grid in f16
//! decode     one query against a cache of keys, in GB/s
//! ablations  next to kernels without FlashAttention-2's contributions; needs nvcc
//! standard   next to Candle's matmul, softmax, matmul: time and peak memory
//! memory     peak memory of forward and backward, by the length of the sequence
//! ```
//!
//! At the end the bench compares the claims of the papers with its own measurements.
//!
//! The bench checks each answer against naive attention in f64 before it times it. A wrong answer fails the run. A
//! missed target is printed but is no error, because it depends on the machine.

mod cases;
mod check;
mod cpu;
#[cfg(feature = "cuda")]
mod cuda;
mod filters;
mod grid;
mod inputs;
mod options;
mod peers;
mod rows;
mod sample;
mod timing;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{ensure, Context, Result};
use clap::Parser;

use crate::options::Options;

#[global_allocator]
static ALLOCATOR: cpu::memory::Counting = cpu::memory::Counting;

fn main() -> ExitCode {
    let mut options = Options::parse();
    if let (Some(plots), None) = (&options.plots, &options.csv) {
        options.csv = Some(plots.join("rows.csv"));
    }
    let result = if options.from.is_empty() { measured(&options) } else { Ok(()) };
    // If some cases failed, the others are still drawn.
    let drawn =
        if result.is_ok() || options.csv.as_ref().is_some_and(|csv| csv.is_file()) { draw(&options) } else { Ok(()) };
    match result.and(drawn) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Runs the chosen cases on the chosen device.
fn measured(options: &Options) -> Result<()> {
    if let Some(plots) = &options.plots {
        std::fs::create_dir_all(plots).with_context(|| plots.display().to_string())?;
    }
    #[cfg(feature = "cuda")]
    if options.device == options::Where::Cuda {
        return cuda::run(options);
    }
    cpu::run(options)
}

/// Draws figures, if the options ask for them.
fn draw(options: &Options) -> Result<()> {
    let Some(plots) = options.plots.as_deref().filter(|_| options.bench && !options.list) else { return Ok(()) };
    let files = if options.from.is_empty() { options.csv.as_slice() } else { &options.from };
    let read = |file: &PathBuf| std::fs::read_to_string(file).with_context(|| file.display().to_string());
    let texts = files.iter().map(read).collect::<Result<Vec<_>>>()?;
    let record = figures::record::Record::read(texts.iter().map(String::as_str))?;
    let name = |file: &PathBuf| file.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let names: Vec<String> = files.iter().map(name).collect();
    let drawn = figures::of_record(&record, &format!("From {}", names.join(", ")))?;
    ensure!(!drawn.is_empty(), "{} has no rows that a figure shows", names.join(", "));
    figures::save(plots, &drawn)?;
    for (name, _) in &drawn {
        println!("{}", plots.join(name).with_extension("svg").display());
    }
    Ok(())
}
