//! The kernels that exist, generated from cuda/instances.def; one row per line there, element type and variant.

use candle_core::DType;

/// What a kernel computes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Pass {
    /// o and lse.
    Forward,
    /// dk and dv, and the f32 sums of dq.
    Backward,
    /// delta = rowsum(do * o) - dlse.
    Delta,
    /// dq from its f32 sums, in the order of the backward of the same image.
    Convert,
}

/// One CUDA kernel.
#[derive(Debug, PartialEq, Eq)]
pub struct Kernel {
    /// Its symbol.
    pub name: &'static str,
    /// Index of the image that holds it: one for each line of cuda/instances.def, and one for delta.
    pub image: usize,
    /// What it computes.
    pub pass: Pass,
    /// The oldest compute capability that runs it.
    pub compute_cap: (u32, u32),
    /// Element type of q, k, v and o.
    pub dtype: DType,
    /// The largest head_dim it takes; smaller ones are padded in shared memory. 0 if it has no tiles.
    pub head_dim: usize,
    /// Queries of a tile, 0 if it has no tiles.
    pub block_m: usize,
    /// Keys of a tile, 0 if it has no tiles.
    pub block_n: usize,
    /// Warps of a thread block.
    pub warps: usize,
    /// Whether it applies softcap, ALiBi and factors that are not above 0.
    pub modified: bool,
    /// Dynamic shared memory of a thread block.
    pub shared_bytes: usize,
}

impl Kernel {
    /// Threads of a thread block.
    pub fn threads(&self) -> usize {
        const WARP_SIZE: usize = 32;
        self.warps * WARP_SIZE
    }
}

include!(concat!(env!("OUT_DIR"), "/instances.rs"));
