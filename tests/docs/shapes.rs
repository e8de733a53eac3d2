//! The shapes of the kernels, from the generated table.

use candle_core::DType;
use candle_fa2::testing::{Arch, Kernel, Pass, KERNELS};

use super::tables::head;

/// One kernel for each line of cuda/instances.def. Its other kernels, of f16 or with a score_mod, have the same shape.
fn lines(arch: Arch, (dtype, tf32): (DType, bool), pass: Pass) -> impl Iterator<Item = &'static Kernel> {
    let of_line = |kernel: &Kernel| (kernel.arch, kernel.pass, kernel.dtype, kernel.tf32, kernel.score_mod);
    KERNELS.iter().filter(move |kernel| of_line(kernel) == (arch, pass, dtype, tf32, false))
}

fn kib(kernel: &Kernel) -> String {
    format!("{} KiB", kernel.shared_bytes as f64 / 1024.0)
}

const PASSES: [(Pass, &str); 2] = [(Pass::Forward, "forward"), (Pass::Backward, "backward")];

/// Both passes on Hopper. One warpgroup of a block is the producer, the others are consumers.
pub fn hopper() -> String {
    const WARPS_OF_A_WARPGROUP: usize = 4;
    let mut table = head(&["pass", "head_dim up to", "block_m x block_n", "consumer warpgroups", "shared memory"]);
    for (pass, name) in PASSES {
        let line = |kernel: &Kernel| {
            let &Kernel { head_dim, block_m, block_n, .. } = kernel;
            let consumers = kernel.warps / WARPS_OF_A_WARPGROUP - 1;
            format!("| {name} | {head_dim} | {block_m} x {block_n} | {consumers} | {} |\n", kib(kernel))
        };
        table += &lines(Arch::Sm90, (DType::BF16, false), pass).map(line).collect::<String>();
    }
    table
}

/// Both passes on mma.sync, for f16 and bf16, for f32, or for plain TF32.
pub fn sm80(dtype: DType, tf32: bool) -> String {
    let mut table = head(&["pass", "head_dim up to", "block_m x block_n", "warps", "shared memory"]);
    for (pass, name) in PASSES {
        let line = |kernel: &Kernel| {
            let &Kernel { head_dim, block_m, block_n, warps, .. } = kernel;
            format!("| {name} | {head_dim} | {block_m} x {block_n} | {warps} | {} |\n", kib(kernel))
        };
        table += &lines(Arch::Sm80, (dtype, tf32), pass).map(line).collect::<String>();
    }
    table
}
