//! The kernels of a crate as values: element types, architectures, and the templates that a line instantiates.

use crate::table::Line;

/// An element type of q, k, v and o.
#[derive(Debug, PartialEq, Eq)]
pub struct Dtype {
    /// Its name in the names of kernels: `bf16`.
    pub name: &'static str,
    /// Its name in CUDA: `fa2::bf16`.
    pub cuda: &'static str,
    /// Its variant of Candle's `DType`: `BF16`.
    pub rust: &'static str,
    /// Size of an element in bytes.
    pub bytes: usize,
    /// Whether its products are one product of TF32.
    pub tf32: bool,
}

/// The instruction set of a family.
#[derive(Debug, PartialEq, Eq)]
pub struct Arch {
    /// Compute capability times ten of the oldest GPU with these instructions: 80 for `sm80`.
    pub sm: u32,
    /// True if newer GPUs do not have these instructions. The kernels are then compiled for this GPU only (`sm_90a`), without PTX.
    pub exact: bool,
}

impl Arch {
    /// Whether a GPU runs these instructions. `gpu` is its compute capability times ten.
    pub fn runs_on(&self, gpu: u32) -> bool {
        gpu == self.sm || (gpu > self.sm && !self.exact)
    }
}

/// How many thread blocks a launch has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Grid {
    /// One for each work tile. The position of the block in the grid determines the tile.
    Tiles,
    /// One for each multiprocessor, or more if these could not list all work tiles. They share the work tiles.
    Persistent {
        /// Number of work tiles that one block can take, the `kMaxTiles` of its traits. `None`: any number.
        max_tiles: Option<usize>,
    },
}

/// A version of a kernel, selected by its last template argument.
#[derive(Debug, PartialEq, Eq)]
pub struct Variant {
    /// The end of the kernel's name: empty or `_score_mod`.
    pub suffix: &'static str,
    /// The template argument.
    pub argument: &'static str,
    /// Whether it applies a score_mod: softcap, ALiBi, or a scale that is not above 0.
    pub score_mod: bool,
}

/// The template arguments of a kernel's function.
#[derive(Debug)]
pub enum Template {
    /// `function<Traits<dtype, columns .., variant>>`. The traits have `kThreads`, `kMinBlocks` and `kSharedBytes`.
    Traits(&'static str),
    /// `function<dtype>`.
    Dtype {
        /// The constant that holds the number of threads in a thread block: `fa2::kDeltaThreads`.
        threads: &'static str,
    },
}

/// Computes the dynamic shared memory of a thread block from a line's columns and the size of an element.
pub type SharedBytes = fn(&Line, usize) -> usize;

/// Computes the columns of a box of the tensor maps from a line's columns.
pub type BoxCols = fn(&Line) -> usize;

/// One kernel that a line instantiates, for each element type and variant.
#[derive(Debug)]
pub struct Entry {
    /// The pattern of its symbol. `{dtype}` and the names of columns stand for their values. The variant's suffix follows.
    pub symbol: &'static str,
    /// The variant of `Pass` in the generated table.
    pub pass: &'static str,
    /// The template function that it calls.
    pub function: &'static str,
    /// The struct that is its only argument. Its name ends in `Params`; the generated table has a variant of `Parameters` for it.
    pub params: &'static str,
    /// The number of its thread blocks.
    pub grid: Grid,
    /// Its variants.
    pub variants: &'static [Variant],
    /// The formula of its dynamic shared memory. nvcc compares the result with `kSharedBytes` of the traits. `None` if it uses no
    /// dynamic shared memory.
    pub shared_bytes: Option<SharedBytes>,
    /// The formula of the columns of a box of its tensor maps. nvcc compares the result with the panels of `TileQ` and `TileK` of the
    /// traits. `None` if it has no tensor maps.
    pub box_cols: Option<BoxCols>,
}

/// The lines of one pass and architecture. Each line makes one unit of these kernels.
#[derive(Debug)]
pub struct Family {
    /// First argument of a line: `fwd`.
    pub pass: &'static str,
    /// Second argument of a line.
    pub arch: Arch,
    /// The names of the other arguments, which are numbers. One name is `warps`. They are template arguments in this order.
    pub columns: &'static [&'static str],
    /// The columns that are 0 or 1. All others are above 0.
    pub flags: &'static [&'static str],
    /// The header with the templates.
    pub header: &'static str,
    /// How the templates are instantiated.
    pub template: Template,
    /// The element types.
    pub dtypes: &'static [Dtype],
    /// The kernels of a line.
    pub entries: &'static [Entry],
}

impl Family {
    /// The form of a line of this family.
    pub fn form(&self) -> String {
        format!("KERNEL({}, sm{}, {})", self.pass, self.arch.sm, self.columns.join(", "))
    }
}
