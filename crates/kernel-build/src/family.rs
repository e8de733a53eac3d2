//! The kernels of a crate as values: element types, architectures, and the templates that each line instantiates.

use crate::table::Line;

/// An element type of q, k, v and o.
#[derive(Debug, PartialEq, Eq)]
pub struct Dtype {
    /// In the names of kernels: `bf16`.
    pub name: &'static str,
    /// In CUDA: `fa2::bf16`.
    pub cuda: &'static str,
    /// The variant of Candle's `DType`: `BF16`.
    pub rust: &'static str,
    /// Size of an element.
    pub bytes: usize,
}

/// The GPUs whose instructions a family uses.
#[derive(Debug, PartialEq, Eq)]
pub struct Arch {
    /// Compute capability times ten of the oldest of them: 80 for `sm80`.
    pub sm: u32,
    /// No other GPU has these instructions, not even a newer one. The kernels are then compiled for this GPU alone (`sm_90a`) and
    /// without PTX.
    pub exact: bool,
}

impl Arch {
    /// Whether a GPU of this compute capability, times ten, runs these instructions.
    pub fn runs_on(&self, gpu: u32) -> bool {
        gpu == self.sm || (gpu > self.sm && !self.exact)
    }
}

/// How many thread blocks a launch has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Grid {
    /// One for each work tile. The position of the block in the grid determines the tile.
    Tiles,
    /// As many as the GPU runs at once. They share the work tiles.
    Persistent {
        /// Number of work tiles that one block can take, the `kMaxTiles` of its traits.
        max_tiles: usize,
    },
}

/// One of the versions of a kernel: its last template argument.
#[derive(Debug, PartialEq, Eq)]
pub struct Variant {
    /// Ends the kernel's name: empty or `_score_mod`.
    pub suffix: &'static str,
    /// The template argument.
    pub argument: &'static str,
    /// Whether it applies a score_mod: softcap, ALiBi, a scale that is not above 0.
    pub score_mod: bool,
}

/// What a kernel's function is instantiated with.
#[derive(Debug)]
pub enum Template {
    /// `function<Traits<dtype, columns .., variant>>`. The traits have `kThreads`, `kMinBlocks` and `kSharedBytes`.
    Traits(&'static str),
    /// `function<dtype>`; `threads` is the constant that holds the size of a thread block.
    Dtype {
        /// `fa2::kDeltaThreads`.
        threads: &'static str,
    },
}

/// Dynamic shared memory of a thread block, from a line's columns and the size of an element.
pub type SharedBytes = fn(&Line, usize) -> usize;

/// One kernel that a line instantiates, for each element type and variant.
#[derive(Debug)]
pub struct Entry {
    /// Its symbol: `{dtype}` and the names of columns stand for their values; the variant's suffix follows.
    pub symbol: &'static str,
    /// The variant of `Pass` in the generated table.
    pub pass: &'static str,
    /// The template function that it calls.
    pub function: &'static str,
    /// Its parameter struct, its one argument.
    pub params: &'static str,
    /// How its grid is made.
    pub grid: Grid,
    /// Its variants.
    pub variants: &'static [Variant],
    /// The formula of its dynamic shared memory, which nvcc holds against `kSharedBytes` of the traits. `None`: it has none.
    pub shared_bytes: Option<SharedBytes>,
}

/// What the lines of one pass and architecture have in common. Each line makes one unit of these kernels.
#[derive(Debug)]
pub struct Family {
    /// First argument of a line: `fwd`.
    pub pass: &'static str,
    /// Second argument of a line.
    pub arch: Arch,
    /// The other arguments, numbers. One is `warps`. They are template arguments in this order.
    pub columns: &'static [&'static str],
    /// The header that holds the templates.
    pub header: &'static str,
    /// How they are instantiated.
    pub template: Template,
    /// The element types.
    pub dtypes: &'static [Dtype],
    /// The kernels of a line.
    pub entries: &'static [Entry],
}

impl Family {
    /// How a line of this family reads.
    pub fn form(&self) -> String {
        format!("KERNEL({}, sm{}, {})", self.pass, self.arch.sm, self.columns.join(", "))
    }
}
