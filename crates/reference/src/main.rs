//! `cargo run --release -p attention-reference -- fixtures DIR HEAD_DIM..` writes inputs, answers and limits in bf16 into
//! DIR, for the kernels of each head_dim. benches/tune.py reads them.

use std::path::Path;
use std::process::ExitCode;

use anyhow::{ensure, Context, Result};
use attention_reference::{fixtures, Precision};

const USAGE: &str = "usage: attention-reference fixtures DIR HEAD_DIM..";

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match run(&arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &[String]) -> Result<()> {
    let [command, folder, head_dims @ ..] = arguments else { anyhow::bail!(USAGE) };
    ensure!(command == "fixtures", "there is no command {command:?}; {USAGE}");
    let mut chosen = Vec::new();
    for text in head_dims {
        let head_dim: usize = text.parse().with_context(|| format!("head_dim {text:?}; {USAGE}"))?;
        ensure!(head_dim > 8, "head_dim must be above 8, because one case is 8 less, got {head_dim}");
        chosen.push(head_dim);
    }
    ensure!(!chosen.is_empty(), "expected a head_dim after {folder}; {USAGE}");
    let of_kernel = |&head_dim: &usize| fixtures::of_kernel(Precision::Bf16, head_dim);
    let all: Vec<fixtures::Fixture> = chosen.iter().flat_map(of_kernel).collect();
    fixtures::write(Path::new(folder), &all)?;
    println!("{}: {} cases for head_dim {chosen:?}", Path::new(folder).join("fixtures.json").display(), all.len());
    Ok(())
}
