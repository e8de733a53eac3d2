//! The launches of a backward.

use super::launch::Launch;
use super::limits::CHUNK;
use crate::error::{Error, Result};
use crate::instances::{Kernel, Pass, KERNELS};
use crate::problem::{Lengths, Problem};

/// The kernels of a backward.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BackwardPlan {
    /// In order: delta; then dk, dv and dq_accum; then dq.
    pub launches: Vec<Launch>,
    /// The layout of the tiles of dq_accum.
    pub dq_tiles: DqTiles,
}

impl BackwardPlan {
    /// The launches of a backward whose main kernel is `kernel`. It computes dk, dv and dq_accum.
    ///
    /// # Errors
    /// [`Error::CudaSize`] if the backward is deterministic and has more thread blocks than it can number in 32 bits.
    pub(super) fn new(problem: &Problem, kernel: &'static Kernel) -> Result<Self> {
        let delta = companion(Pass::Delta, |delta| delta.dtype == problem.dtype);
        let convert = companion(Pass::Convert, |convert| {
            (convert.dtype, convert.image) == (problem.dtype, kernel.image) // each backward has its own convert kernel
        });
        // The number of threads per row is a power of two. Any number of blocks is correct, because blocks loop over the rows.
        let rows_per_block = delta.threads() / problem.head_dim.div_ceil(CHUNK).next_power_of_two().max(4);
        let (seqlen_q, seqlen_k) = (problem.max_seqlen_q(), problem.max_seqlen_k());
        let launch = |kernel, blocks: usize, heads: usize| {
            Launch::by_tile(kernel, (blocks as u32, heads as u32, problem.batch() as u32))
        };
        // One block processes all query heads of its key head, so that dk and dv are written once.
        let backward = launch(kernel, seqlen_k.div_ceil(kernel.block_n), problem.num_heads_k);
        if problem.deterministic {
            check_semaphore(&backward)?;
        }
        let launches = vec![
            launch(delta, seqlen_q.div_ceil(rows_per_block), problem.num_heads),
            backward,
            launch(convert, seqlen_q.div_ceil(kernel.block_m), problem.num_heads),
        ];
        Ok(Self { launches, dq_tiles: DqTiles::new(problem, kernel) })
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

/// The only kernel of a pass for which `is_it` is true.
fn companion(pass: Pass, is_it: impl Fn(&Kernel) -> bool) -> &'static Kernel {
    let found = KERNELS.iter().find(|kernel| kernel.pass == pass && is_it(kernel));
    found.expect("cuda/instances.def has delta, and every backward has its convert kernel")
}

/// The layout of dq_accum, the f32 accumulators of dq. Each sequence and head has whole tiles of `block_m` queries and `head_dim`
/// columns, the sizes of the backward kernel. Units are tiles, except for `elements`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DqTiles {
    /// Stride from one sequence to the next; 0 for packed tensors.
    pub batch: usize,
    /// Stride from one head to the next.
    pub head: usize,
    /// Number of tiles.
    pub count: usize,
    /// Number of f32 elements of one tile.
    pub elements: usize,
}

impl DqTiles {
    fn new(problem: &Problem, backward: &Kernel) -> Self {
        let (batch, head, count) = match &problem.lengths {
            &Lengths::Padded { batch, seqlen_q, .. } => {
                let head = seqlen_q.div_ceil(backward.block_m);
                (problem.num_heads * head, head, batch * problem.num_heads * head)
            }
            // Sequence `b` begins at tile first_q / block_m + b. For any lengths, this is not before the end of sequence `b - 1`.
            Lengths::Packed { cu_seqlens_q, .. } => {
                let head = cu_seqlens_q.total() / backward.block_m + cu_seqlens_q.batch();
                (0, head, problem.num_heads * head)
            }
        };
        Self { batch, head, count, elements: backward.block_m * backward.head_dim }
    }
}
