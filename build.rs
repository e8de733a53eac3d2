//! Makes the table that `Plan` chooses from and, with the feature `cuda`, the kernels. Both come from cuda/instances.def.
//! crates/kernel-build does the work.
//!
//! | file in OUT_DIR | content |
//! | --- | --- |
//! | instances.rs | one `Kernel` per line, element type and variant, and the numbers of cuda/params.h; the only file without the feature |
//! | params.rs | the parameter structs of cuda/params.h in Rust |
//! | generated/wgmma.cuh | the wgmma of every N, for cuda/sm90/wgmma.cuh |
//! | UNIT.cu | one per line: `extern "C"` kernels that call the templates in cuda/ |
//! | UNIT.fatbin | its machine code for each GPU to compile for, and PTX, which the driver compiles for later GPUs |
//! | images.rs | the fatbins, in the order of `Kernel::image` |
//! | kernels.csv | registers, local and shared memory of each kernel, as ptxas reports them |
//! | ablations.rs | the sources of benches/ablations, which the bench compiles for its GPU |
//!
//! Lines of sm90 are compiled for 9.0 only, without PTX, because no other GPU has their instructions. With the feature `cuda`
//! the table has these lines if 90 is among the GPUs to compile for.
//!
//! docs/environment.md lists the environment variables that it reads.

use std::process::ExitCode;

use kernel_build::compile::Compiler;
use kernel_build::files::{self, folder, write};
use kernel_build::nvcc::{self, Gpus, Nvcc};
use kernel_build::params::Structs;
use kernel_build::table::Table;
use kernel_build::units::{self, units, Unit};
use kernel_build::{attention, headers, Result};

const TABLE: &str = "cuda/instances.def";
const ARCHS: &str = "CANDLE_FA2_CUDA_ARCHS";
const SPILLS: &str = "CANDLE_FA2_SPILLS";

fn main() -> ExitCode {
    for path in ["build.rs", "cuda", "benches/ablations"] {
        println!("cargo:rerun-if-changed={path}");
    }
    for name in nvcc::VARIABLES.into_iter().chain(["CUDA_COMPUTE_CAP", ARCHS, SPILLS]) {
        println!("cargo:rerun-if-env-changed={name}");
    }
    kernel_build::run("candle-fa2", build)
}

fn build() -> Result<()> {
    let (root, out) = (folder("CARGO_MANIFEST_DIR")?, folder("OUT_DIR")?);
    let mut table = Table::parse(&files::read(&root.join(TABLE))?, TABLE, &attention::FAMILIES)?;
    let structs = Structs::read(&root.join("cuda/params.h"))?;
    let write_instances =
        |units: &[Unit]| write(&out.join("instances.rs"), &(units::rust_table(units) + &structs.rust_constants()));
    if std::env::var_os("CARGO_FEATURE_CUDA").is_none() {
        return write_instances(&units(&table));
    }
    let gpus = Gpus::find(ARCHS)?;
    for gpu in table.keep_for(&gpus) {
        println!("cargo:warning=candle-fa2 has no kernel for compute capability {gpu}; the oldest supported is 80");
    }
    let units = units(&table);
    write_instances(&units)?;
    write(&out.join("params.rs"), &structs.rust())?;
    write(&out.join("ablations.rs"), &headers::rust_sources(&root, "benches/ablations/ablations.cu", "cuda")?)?;

    let compiler = Compiler { nvcc: Nvcc::find()?, gpus, include: root.join("cuda"), out: out.clone() };
    let report = compiler.compile(&units, &structs)?;
    write(&out.join("images.rs"), &units::rust_images(&units))?;
    write(&out.join("kernels.csv"), &report.csv())?;
    for warning in report.check(&table.locals, TABLE, SPILLS)? {
        println!("cargo:warning={warning}");
    }
    Ok(())
}
