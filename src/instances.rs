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

/// The GPUs whose instructions a kernel has, oldest first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Arch {
    /// Those of compute capability 8.0, which every later GPU has too.
    Sm80,
    /// Those of 9.0, which no other GPU has.
    Sm90,
}

impl Arch {
    /// Whether a GPU of this compute capability, major and minor, has them.
    pub fn runs_on(self, compute_cap: (u32, u32)) -> bool {
        match self {
            Self::Sm80 => compute_cap >= self.compute_cap(),
            Self::Sm90 => compute_cap == self.compute_cap(),
        }
    }

    /// The oldest compute capability that has them.
    pub fn compute_cap(self) -> (u32, u32) {
        match self {
            Self::Sm80 => (8, 0),
            Self::Sm90 => (9, 0),
        }
    }
}

impl std::fmt::Display for Arch {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        let (major, minor) = self.compute_cap();
        let which = if *self == Self::Sm90 { "exactly" } else { "or newer" };
        write!(f, "compute capability {major}.{minor} {which}")
    }
}

/// How a kernel's thread blocks come by their work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Grid {
    /// One block for each tile of work, as its place in the grid says.
    Tiles,
    /// As many blocks as the GPU runs at once, which share the tiles.
    Persistent,
}

/// One CUDA kernel.
#[derive(Debug, PartialEq, Eq)]
pub struct Kernel {
    /// Its symbol.
    pub name: &'static str,
    /// Index of the image that holds it: one for each line of cuda/instances.def.
    pub image: usize,
    /// What it computes.
    pub pass: Pass,
    /// Where it runs.
    pub arch: Arch,
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
    /// Whether it applies softcap, ALiBi and a softmax_scale that is not above 0.
    pub score_mod: bool,
    /// The struct of cuda/params.h that is its one argument.
    pub params: &'static str,
    /// How its grid is made.
    pub grid: Grid,
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
