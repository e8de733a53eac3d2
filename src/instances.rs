//! The table of all kernels, generated from cuda/instances.def: one row for each line, element type and variant. And the numbers that
//! kernels and plan share, generated from cuda/params.h.

use candle_core::DType;

/// The results of a kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Pass {
    /// o and lse.
    Forward,
    /// dk, dv and dq_accum.
    Backward,
    /// delta = rowsum(do * o) - dlse.
    Delta,
    /// dq from dq_accum.
    Convert,
}

/// The instruction set of a kernel. Older ones come first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Arch {
    /// Compute capability 8.0. All later GPUs have these instructions too.
    Sm80,
    /// Compute capability 9.0. No other GPU has these instructions.
    Sm90,
}

impl Arch {
    /// Whether a GPU of this compute capability, major and minor, has these instructions.
    pub fn runs_on(self, compute_cap: (u32, u32)) -> bool {
        match self {
            Self::Sm80 => compute_cap >= self.compute_cap(),
            Self::Sm90 => compute_cap == self.compute_cap(),
        }
    }

    /// The oldest compute capability with these instructions.
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

/// How the thread blocks of a kernel get their work tiles.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Grid {
    /// One block for each work tile. The position of the block in the grid determines the tile.
    Tiles,
    /// One block for each multiprocessor: fewer if there are fewer tiles, more if these could not list all tiles. Each block processes
    /// several tiles.
    Persistent {
        /// Number of tiles that one block can take. `None`: any number.
        max_tiles: Option<usize>,
    },
}

/// The struct of cuda/params.h that a kernel takes. The name of the struct is the variant's, and then `Params`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Parameters {
    Fwd,
    Sm90Fwd,
    Bwd,
    Sm90Bwd,
    Delta,
    Convert,
}

/// One CUDA kernel.
#[derive(Debug, PartialEq, Eq)]
pub struct Kernel {
    /// Its symbol.
    pub name: &'static str,
    /// Index of its image. There is one image for each line of cuda/instances.def that this build compiles.
    pub image: usize,
    /// Its results.
    pub pass: Pass,
    /// Its instruction set.
    pub arch: Arch,
    /// Element type of q, k, v and o.
    pub dtype: DType,
    /// Whether its products of f32 are one product of TF32 each, and not three.
    pub tf32: bool,
    /// The largest head_dim. Smaller ones are padded in shared memory. 0 if it has no tiles.
    pub head_dim: usize,
    /// Number of queries in a tile, 0 if it has no tiles.
    pub block_m: usize,
    /// Number of keys in a tile, 0 if it has no tiles.
    pub block_n: usize,
    /// Warps of a thread block.
    pub warps: usize,
    /// Thread blocks of a cluster, along the first axis of the grid.
    pub cluster: usize,
    /// Whether it supports softcap, ALiBi and a softmax_scale that is not above 0.
    pub score_mod: bool,
    /// Its only argument.
    pub params: Parameters,
    /// How its grid is made.
    pub grid: Grid,
    /// Dynamic shared memory of a thread block.
    pub shared_bytes: usize,
    /// Columns of a box of its tensor maps, 0 if it has none.
    pub box_cols: usize,
}

impl Kernel {
    /// Thread blocks that share the columns of a work tile. Each computes all scores.
    pub fn parts(&self) -> usize {
        self.head_dim.div_ceil(MAX_WIDTH)
    }

    /// Threads of a thread block.
    pub fn threads(&self) -> usize {
        self.warps * WARP_SIZE
    }
}

include!(concat!(env!("OUT_DIR"), "/instances.rs"));
