//! The launches of a backward.

use super::launch::Launch;
use crate::error::{Error, Result};
use crate::instances::{Kernel, Pass, CONVERT_COLS, DELTA_CHUNK, DELTA_MIN_LANES, DQ_GROUP_ROWS, KERNELS, WARP_SIZE};
use crate::plan::caps::CudaCaps;
use crate::problem::{Lengths, Problem};

/// The kernels of a backward.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BackwardPlan {
    /// In order: delta; then dk, dv and dq_accum; then dq.
    pub launches: Vec<Launch>,
    /// The layout of dq_accum.
    pub dq_accum: DqAccum,
    /// The query tiles of the main kernel.
    pub dq_tiles: RowBlocks,
    /// Number of semaphores of a deterministic backward: one for each query tile and part of its columns, and a counter of started blocks.
    pub semaphores: usize,
}

impl BackwardPlan {
    /// The launches of a backward whose main kernel is `kernel`. It computes dk, dv and dq_accum.
    ///
    /// # Errors
    /// [`Error::CudaSize`] if the backward is deterministic and has more thread blocks than it can number in 32 bits.
    pub(super) fn new(problem: &Problem, kernel: &'static Kernel, caps: &CudaCaps) -> Result<Self> {
        let (delta, convert) = (companion(Pass::Delta, problem), companion(Pass::Convert, problem));
        // The number of threads per row is a power of two. Any number of blocks is correct, because blocks loop over the rows.
        let threads_per_row =
            problem.head_dim_v.div_ceil(DELTA_CHUNK).next_power_of_two().clamp(DELTA_MIN_LANES, WARP_SIZE);
        let rows_per_block = delta.threads() / threads_per_row;
        let seqlen_q = problem.max_seqlen_q();
        let launch = |kernel, blocks: usize, heads: usize| {
            Launch::by_tile(kernel, (blocks as u32, heads as u32, problem.batch() as u32))
        };
        let backward = Launch::of_tiles(problem, kernel, caps.multiprocessors);
        if problem.deterministic {
            check_semaphore(&backward)?;
        }
        let launches = vec![
            launch(delta, seqlen_q.div_ceil(rows_per_block), problem.num_heads),
            backward,
            launch(convert, DqAccum::convert_blocks(problem, convert), problem.num_heads),
        ];
        let (dq_accum, dq_tiles) = (DqAccum::new(problem, kernel), RowBlocks::new(problem, kernel.block_m));
        let semaphores = dq_tiles.count * kernel.parts() + 1;
        Ok(Self { launches, dq_accum, dq_tiles, semaphores })
    }
}

/// Returns an error if a deterministic backward has too many thread blocks. It numbers them in 32 bits, over all launches of a
/// call.
fn check_semaphore(backward: &Launch) -> Result<()> {
    let (x, y, z) = backward.grid;
    let (got, max) = ([x, y, z].map(|blocks| blocks as usize).iter().product(), u32::MAX as usize);
    if got > max {
        return Err(Error::CudaSize { name: "number of thread blocks of a deterministic backward", got, max });
    }
    Ok(())
}

/// The only kernel of a pass for the problem's dtype.
fn companion(pass: Pass, problem: &Problem) -> &'static Kernel {
    let found = KERNELS.iter().find(|kernel| (kernel.pass, kernel.dtype) == (pass, problem.dtype));
    found.expect("cuda/instances.def has a line for delta, and one for convert")
}

/// The layout of dq_accum, the f32 accumulators of dq: row groups of `DQ_GROUP_ROWS` queries and `head_dim` columns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DqAccum {
    /// The row groups.
    pub groups: RowBlocks,
    /// The head_dim of the backward kernel.
    pub head_dim: usize,
}

impl DqAccum {
    fn new(problem: &Problem, backward: &Kernel) -> Self {
        Self { groups: RowBlocks::new(problem, DQ_GROUP_ROWS), head_dim: backward.head_dim }
    }

    /// Number of elements.
    pub fn elements(&self) -> usize {
        self.groups.count * DQ_GROUP_ROWS * self.head_dim
    }

    /// Thread blocks that convert one head of the longest sequence.
    fn convert_blocks(problem: &Problem, convert: &Kernel) -> usize {
        let groups = problem.max_seqlen_q().div_ceil(DQ_GROUP_ROWS);
        (groups * problem.head_dim.div_ceil(CONVERT_COLS)).div_ceil(convert.warps)
    }
}

/// How blocks of a fixed number of queries are numbered. Each head of each sequence has blocks of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RowBlocks {
    /// Stride from one sequence to the next; 0 for packed tensors.
    pub batch: usize,
    /// Stride from one head to the next.
    pub head: usize,
    /// Number of blocks.
    pub count: usize,
}

impl RowBlocks {
    /// Blocks of `rows` queries.
    fn new(problem: &Problem, rows: usize) -> Self {
        match &problem.lengths {
            &Lengths::Padded { batch, seqlen_q, .. } => {
                let head = seqlen_q.div_ceil(rows);
                Self { batch: problem.num_heads * head, head, count: batch * problem.num_heads * head }
            }
            Lengths::Packed { cu_seqlens_q, .. } => {
                let head = cu_seqlens_q.blocks(rows);
                Self { batch: 0, head, count: problem.num_heads * head }
            }
        }
    }
}
