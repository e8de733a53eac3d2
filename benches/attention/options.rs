//! The options of the command line.

use std::path::PathBuf;

#[cfg(feature = "cuda")]
use candle_core::DType;
use clap::Parser;

use crate::cases::Case;
#[cfg(feature = "cuda")]
use crate::cases::Pass;

#[derive(Parser)]
#[command(
    name = "cargo bench --",
    about = "Times attention; benches/cases.toml and benches/cuda.toml say what and why."
)]
pub struct Options {
    /// Only cases whose name or call contains one of these; on a GPU also names of parts, which --list prints
    pub filters: Vec<String>,
    /// Only the reference case; on a GPU a few cases
    #[arg(long)]
    pub quick: bool,
    /// Also write the times as CSV to this file; an existing file is replaced
    #[arg(long, value_name = "FILE")]
    pub csv: Option<PathBuf>,
    /// Draw the rows of this run as figures into this folder; without --csv the rows are written to rows.csv there
    #[arg(long, value_name = "DIR")]
    pub plots: Option<PathBuf>,
    /// Draw the rows of these files instead, and measure nothing: runs on a GPU, benches/peers.py
    #[arg(long, value_name = "FILE", num_args = 1.., requires = "plots", conflicts_with_all = ["csv", "list", "filters"])]
    pub from: Vec<PathBuf>,
    /// Print the names of the cases, and why each is there
    #[arg(long)]
    pub list: bool,
    /// `cargo bench` passes this option; without it the bench only checks the answers
    #[arg(long, hide = true)]
    pub bench: bool,
    /// Where attention is computed
    #[cfg(feature = "cuda")]
    #[arg(long, value_name = "DEVICE", default_value = "cuda")]
    pub device: Where,
    #[cfg(feature = "cuda")]
    #[command(flatten)]
    pub cuda: CudaOptions,
}

#[cfg(feature = "cuda")]
#[derive(Clone, Copy, PartialEq, clap::ValueEnum)]
pub enum Where {
    Cpu,
    Cuda,
}

impl Options {
    /// Whether `case` runs, given the words that choose among cases.
    pub fn wants(&self, case: &Case, filters: &[String]) -> bool {
        (!self.quick || case.quick) && (filters.is_empty() || filters.iter().any(|filter| case.contains(filter)))
    }

    /// Names a case of `file` in an error: `quick case of benches/cases.toml`.
    pub fn case_of(&self, file: &str) -> String {
        format!("{}case of {file}", if self.quick { "quick " } else { "" })
    }
}

/// Options of the GPU's bench.
#[cfg(feature = "cuda")]
#[derive(clap::Args)]
pub struct CudaOptions {
    /// GPU: type of the tensors, bf16, f16 or f32; the part f16 has its own
    #[arg(long, value_name = "TYPE", default_value = "bf16", value_parser = dtype)]
    pub dtype: DType,
    /// GPU: products in plain TF32, for cases in f32
    #[arg(long)]
    pub tf32: bool,
    /// GPU: passes to time, of fwd, bwd and fwd+bwd
    #[arg(
        long,
        value_name = "PASSES",
        value_delimiter = ',',
        default_values = ["fwd", "bwd", "fwd+bwd"],
        value_parser = pass
    )]
    pub passes: Vec<Pass>,
    /// GPU: milliseconds of timing for each pass of each case
    #[arg(long, value_name = "MS", default_value_t = 100.0)]
    pub rep_ms: f64,
}

#[cfg(feature = "cuda")]
fn dtype(text: &str) -> Result<DType, String> {
    match text {
        "bf16" => Ok(DType::BF16),
        "f16" => Ok(DType::F16),
        "f32" => Ok(DType::F32),
        other => Err(format!("GPU kernels take bf16, f16 and f32, got {other}")),
    }
}

/// The pass that the option names.
#[cfg(feature = "cuda")]
pub fn pass(text: &str) -> Result<Pass, String> {
    match text {
        "fwd" => Ok(Pass::Forward),
        "bwd" => Ok(Pass::Backward),
        "fwd+bwd" => Ok(Pass::Both),
        other => Err(format!("the passes on a GPU are fwd, bwd and fwd+bwd, got {other}")),
    }
}
