//! The work tiles of a persistent kernel, and their order.

use crate::instances::{Kernel, Pass};
use crate::mask::Mask;
use crate::problem::{Lengths, Problem};

/// The work tiles of a persistent kernel. A tile is a block of queries (forward) or of keys (backward) of one head of one sequence. The
/// thread blocks of a cluster take a tile together.
///
/// Tiles are numbered by section, then by block along the sequence, then by head.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Schedule {
    /// Number of tiles.
    pub tiles: usize,
    /// Number of tiles of a head. If padded: in one sequence. If packed: an upper bound over all sequences together.
    pub head_tiles: usize,
    /// Number of heads in a section. Their tiles are processed together, so that what they read and write stays in L2. If padded,
    /// heads are counted over all sequences.
    pub section_heads: usize,
}

impl Schedule {
    pub(super) fn new(problem: &Problem, kernel: &Kernel, multiprocessors: usize) -> Self {
        let (head_tiles, heads) = tiles_and_heads(problem, kernel);
        let takers = takers(kernel, multiprocessors);
        let section_heads = match (kernel.pass, &problem.mask) {
            (Pass::Forward, Mask::None) => 1,
            (Pass::Forward, _) => section_heads(head_tiles, heads, FORWARD_SECTION * takers),
            _ => section_heads(head_tiles, heads, BACKWARD_SECTION * takers),
        };
        Self { tiles: head_tiles * heads, head_tiles, section_heads }
    }

    pub(super) fn count_tiles(problem: &Problem, kernel: &Kernel) -> usize {
        let (head_tiles, heads) = tiles_and_heads(problem, kernel);
        head_tiles * heads
    }

    /// Number of thread blocks: one per multiprocessor, fewer if there are fewer tiles, more if these blocks could not take all tiles.
    /// The average block gets at most half of `max_tiles`, because some blocks are faster than others and take more.
    pub(super) fn blocks(&self, kernel: &Kernel, multiprocessors: usize, max_tiles: Option<usize>) -> usize {
        let least = max_tiles.map_or(0, |max_tiles| self.tiles.div_ceil(max_tiles / 2));
        kernel.cluster * self.tiles.min(takers(kernel, multiprocessors)).max(least)
    }
}

/// Thread blocks, or clusters, that run at the same time. Each of them takes tiles.
fn takers(kernel: &Kernel, multiprocessors: usize) -> usize {
    (multiprocessors / kernel.cluster).max(1)
}

/// Tiles of a section for each taker, where a mask makes tiles differ in cost: many heads together balance the load. On an H200 with 2 to
/// 32 heads and 512 to 16k keys, four were fastest. The causal cases of the bench's part `grid` show whether a change is faster.
const FORWARD_SECTION: usize = 4;

/// The same for the backward, with any mask. There, each head more also adds its dq_accum to what should stay in L2: with four, head_dim
/// 128 and 256 lost 2 to 3% on an H200.
const BACKWARD_SECTION: usize = 1;

/// Number of heads in a section that should have about `section_tiles` tiles. A short last section leaves multiprocessors idle, so
/// sections of one size are better. At most 32 heads, because of L2: on an H200, sections of 132 heads with 512 tokens took 20% longer. Numbers
/// between them were not measured.
fn section_heads(head_tiles: usize, heads: usize, section_tiles: usize) -> usize {
    const MOST: usize = 32;
    let ideal = (section_tiles as f64 / head_tiles.max(1) as f64).clamp(1.0, MOST as f64);
    let cost = |size: usize| {
        let missing = heads.div_ceil(size) * size - heads; // in the last section
        let ratio = size as f64 / ideal;
        ratio.max(1.0 / ratio) + missing as f64 / size as f64
    };
    let sizes = (1..=heads.min(MOST)).map(|size| (cost(size), size));
    sizes.min_by(|(a, _), (b, _)| a.total_cmp(b)).map_or(1, |(_, size)| size)
}

/// The number of tiles per head, and the number of heads.
fn tiles_and_heads(problem: &Problem, kernel: &Kernel) -> (usize, usize) {
    let backward = kernel.pass == Pass::Backward;
    let (rows, heads) = if backward {
        (kernel.cluster * kernel.block_n, problem.num_heads_k)
    } else {
        (kernel.block_m, problem.num_heads)
    };
    match &problem.lengths {
        &Lengths::Padded { batch, seqlen_q, seqlen_k, .. } => {
            let seqlen = if backward { seqlen_k } else { seqlen_q };
            (seqlen.div_ceil(rows), batch * heads)
        }
        Lengths::Packed { cu_seqlens_q, cu_seqlens_k } => {
            let cu_seqlens = if backward { cu_seqlens_k } else { cu_seqlens_q };
            (if cu_seqlens.total() == 0 { 0 } else { cu_seqlens.blocks(rows) }, heads)
        }
    }
}
