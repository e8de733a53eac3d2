//! The launches of a backward.

use super::launch::Launch;
use super::limits::CHUNK;
use crate::error::{Error, Result};
use crate::instances::{Kernel, Pass, KERNELS};
use crate::problem::{Lengths, Problem};

/// The kernels of a backward.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BackwardPlan {
    /// In the order in which they run: delta; dk, dv and dq_accum; dq.
    pub launches: Vec<Launch>,
    /// Where the tiles of dq_accum lie.
    pub dq_tiles: DqTiles,
}

impl BackwardPlan {
    /// The launches around `kernel`, which computes dk, dv and dq_accum.
    ///
    /// # Errors
    /// [`Error::CudaSize`] if the backward is deterministic and has more thread blocks than it can number.
    pub(super) fn new(problem: &Problem, kernel: &'static Kernel) -> Result<Self> {
        let delta = companion(Pass::Delta, |delta| delta.dtype == problem.dtype);
        let convert = companion(Pass::Convert, |convert| {
            (convert.dtype, convert.image) == (problem.dtype, kernel.image) // each backward has its own
        });
        // The threads of a row are a power of two. Any number of blocks is right: they stride over the rows.
        let rows_per_block = delta.threads() / problem.head_dim.div_ceil(CHUNK).next_power_of_two().max(4);
        let (seqlen_q, seqlen_k) = (problem.max_seqlen_q(), problem.max_seqlen_k());
        let launch = |kernel, blocks: usize, heads: usize| {
            Launch::by_tile(kernel, (blocks as u32, heads as u32, problem.batch() as u32))
        };
        // One block takes all query heads of its key head, so that dk and dv are written once.
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

/// A deterministic backward numbers its thread blocks in 32 bits, over all launches of a call.
fn check_semaphore(backward: &Launch) -> Result<()> {
    let (x, y, z) = backward.grid;
    let (got, max) = ([x, y, z].map(|blocks| blocks as usize).iter().product(), u32::MAX as usize);
    if got > max {
        return Err(Error::CudaSize { name: "number of thread blocks of a deterministic backward", got, max });
    }
    Ok(())
}

/// The kernel of a pass that leaves no choice.
fn companion(pass: Pass, is_it: impl Fn(&Kernel) -> bool) -> &'static Kernel {
    let found = KERNELS.iter().find(|kernel| kernel.pass == pass && is_it(kernel));
    found.expect("cuda/instances.def has delta, and every backward brings its conversion")
}

/// dq_accum, the f32 sums of dq: tiles of `block_m` queries and `head_dim` columns of the backward's kernel, a whole number of
/// them for each sequence and head. All in tiles, except `elements`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DqTiles {
    /// From one sequence to the next; 0 for packed tensors.
    pub batch: usize,
    /// From one head to the next.
    pub head: usize,
    /// All of them.
    pub count: usize,
    /// f32 of one tile.
    pub elements: usize,
}

impl DqTiles {
    fn new(problem: &Problem, backward: &Kernel) -> Self {
        let (batch, head, count) = match &problem.lengths {
            &Lengths::Padded { batch, seqlen_q, .. } => {
                let head = seqlen_q.div_ceil(backward.block_m);
                (problem.num_heads * head, head, batch * problem.num_heads * head)
            }
            // Sequence `b` begins at tile first_q / block_m + b. That is never before the end of sequence `b - 1`, whatever
            // the lengths.
            Lengths::Packed { cu_seqlens_q, .. } => {
                let head = cu_seqlens_q.total() / backward.block_m + cu_seqlens_q.batch();
                (0, head, problem.num_heads * head)
            }
        };
        Self { batch, head, count, elements: backward.block_m * backward.head_dim }
    }
}
