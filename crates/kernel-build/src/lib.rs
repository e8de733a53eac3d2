//! For build scripts of CUDA kernels: one line of a table adds a kernel.
//!
//! | module | what it does |
//! | --- | --- |
//! | [`table`] | parses the table: a KERNEL line for each instance of the templates, a LOCAL line for each kernel that may use local memory |
//! | [`family`] | describes the lines of one pass and architecture as a value; [`attention`] has the values of candle-fa2 |
//! | [`shared`] | has the formulas of dynamic shared memory |
//! | [`params`] | parses a header of parameter structs and shared numbers; generates the same in Rust, and assertions for both compilers |
//! | [`mod@units`] | generates a CUDA source for each line, and the table and the images as Rust |
//! | [`headers`] | finds the headers of a source, and generates one: the wgmma of every N |
//! | [`nvcc`], [`compile`] | find nvcc and the GPUs to compile for; compile the units that changed, in parallel, or hand-written sources |
//! | [`report`] | reads what ptxas reports of each kernel; warns about local memory that no LOCAL line allows, or fails |
//! | [`mod@describe`] | describes all of this as JSON, for programs without Rust |
//!
//! # Example
//! A line becomes a CUDA source and a row of Rust:
//! ```
//! use kernel_build::params::Structs;
//! use kernel_build::table::Table;
//! use kernel_build::{attention, units};
//!
//! let table = Table::parse("KERNEL(fwd, sm80, 128, 128, 64, 4, 1)  // 374 TFLOP/s", "instances.def", &attention::FAMILIES)?;
//! let header = "namespace fa2 {\nstruct FwdParams {\n    const void* q;\n};\n}\n";
//! let structs = Structs::parse(header, "params.h")?;
//!
//! let units = units(&table);
//! let kernel = &units[0].kernels[0];
//! assert_eq!(kernel.name, "fwd_sm80_f16_d128_128x64");
//! assert_eq!((kernel.threads(), kernel.shared_bytes), (128, 65536));
//! let source = units[0].source(&structs);
//! assert!(source.contains("fa2::sm80::forward<fwd_sm80_f16_d128_128x64_traits>(params);"));
//! assert!(source.contains("static_assert(offsetof(fa2::FwdParams, q) == 0"));
//! assert!(kernel_build::units::rust_table(&units).contains("params: Parameters::Fwd,"));
//! # Ok::<(), kernel_build::Error>(())
//! ```
//! The build script of candle-fa2 does this for the kernels in `cuda/`.
#![forbid(unsafe_code)]
#![deny(missing_docs)]

pub mod attention;
pub mod compile;
pub mod describe;
mod error;
pub mod family;
pub mod files;
pub mod headers;
pub mod json;
pub mod nvcc;
pub mod params;
pub mod report;
pub mod shared;
pub mod table;
pub mod units;
mod wgmma;

use std::process::ExitCode;

pub use crate::describe::describe;
pub use crate::error::{Error, Result};
pub use crate::units::units;

/// Runs a build script. Prints an error with the name of the crate, and its first line as a warning of cargo.
pub fn run(name: &str, script: impl FnOnce() -> Result<()>) -> ExitCode {
    let Err(error) = script() else { return ExitCode::SUCCESS };
    let text = error.to_string();
    println!("cargo:warning={name}: {}", text.lines().next().unwrap_or_default());
    eprintln!("{name}: {text}");
    ExitCode::FAILURE
}
