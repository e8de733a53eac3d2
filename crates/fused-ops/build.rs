//! With the feature `cuda`, compiles the kernels in cuda/. crates/kernel-build does the work.
//!
//! | file in OUT_DIR | content |
//! | --- | --- |
//! | params.rs | the parameter structs and the numbers of cuda/params.h in Rust |
//! | FILE.cu | a file of cuda/, with assertions on the layout of the structs |
//! | FILE.fatbin | its machine code for each GPU to compile for, and PTX, which the driver compiles for later GPUs |
//! | images.rs | the fatbins by the names of their files |
//!
//! It reads the environment variables that the build of candle-fa2 reads, except `CANDLE_FA2_SPILLS`, because local memory is only a
//! warning here. docs/environment.md of the repository lists them.

use std::process::ExitCode;

use kernel_build::compile::Compiler;
use kernel_build::family::Arch;
use kernel_build::files::{folder, write};
use kernel_build::nvcc::{self, Gpus, Nvcc};
use kernel_build::params::Structs;
use kernel_build::Result;

/// The files of cuda/ with kernels.
const FILES: [&str; 8] = ["activation", "adamw", "columns", "cross_entropy", "embedding", "norm", "rotary", "sum"];
const ARCHS: &str = "CANDLE_FA2_CUDA_ARCHS";
/// Ampere and later.
const SM80: Arch = Arch { sm: 80, exact: false };

fn main() -> ExitCode {
    for path in ["build.rs", "cuda"] {
        println!("cargo:rerun-if-changed={path}");
    }
    for name in nvcc::VARIABLES.into_iter().chain(["CUDA_COMPUTE_CAP", ARCHS]) {
        println!("cargo:rerun-if-env-changed={name}");
    }
    match std::env::var_os("CARGO_FEATURE_CUDA") {
        None => ExitCode::SUCCESS,
        Some(_) => kernel_build::run("candle-fused-ops", build),
    }
}

fn build() -> Result<()> {
    let (root, out) = (folder("CARGO_MANIFEST_DIR")?, folder("OUT_DIR")?);
    let structs = Structs::read(&root.join("cuda/params.h"))?;
    write(&out.join("params.rs"), &(structs.rust() + &structs.rust_constants()))?;

    let compiler =
        Compiler { nvcc: Nvcc::find()?, gpus: Gpus::find(ARCHS)?, include: root.join("cuda"), out: out.clone() };
    let usages = compiler.compile_files(&FILES, &SM80, &structs)?;
    for ((kernel, gpu), usage) in usages.iter().filter(|(_, usage)| usage.stack_bytes > 0) {
        println!("cargo:warning=candle-fused-ops: {kernel} on {gpu} has {usage}");
    }
    let images: String =
        FILES.iter().map(|file| format!("    ({file:?}, include_bytes!(\"{file}.fatbin\")),\n")).collect();
    write(&out.join("images.rs"), &format!("static IMAGES: [(&str, &[u8]); {}] = [\n{images}];\n", FILES.len()))
}
