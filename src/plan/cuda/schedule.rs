//! The work tiles of a persistent forward, and their order.

use crate::instances::Kernel;
use crate::mask::Mask;
use crate::problem::{Lengths, Problem};

/// The work tiles of a persistent forward. A tile is `block_m` queries of one head of one sequence.
///
/// Tiles are numbered by section, then by m_block from the last to the first, then by head.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Schedule {
    /// Number of tiles.
    pub tiles: usize,
    /// Number of m_blocks. If padded: of one sequence. If packed: an upper bound over all sequences together.
    pub m_blocks: usize,
    /// Number of heads in a section. Their tiles are processed together, so that their keys and values stay in L2. If padded,
    /// heads are counted over all sequences.
    pub section_heads: usize,
}

impl Schedule {
    pub(super) fn new(problem: &Problem, kernel: &Kernel, multiprocessors: usize) -> Self {
        let (m_blocks, heads) = blocks_and_heads(problem, kernel);
        let section_heads = match problem.mask {
            Mask::None => 1,
            _ => section_heads(m_blocks, heads, multiprocessors),
        };
        Self { tiles: m_blocks * heads, m_blocks, section_heads }
    }

    pub(super) fn count_tiles(problem: &Problem, kernel: &Kernel) -> usize {
        let (m_blocks, heads) = blocks_and_heads(problem, kernel);
        m_blocks * heads
    }

    /// Number of thread blocks: one per multiprocessor, fewer if there are fewer tiles, more if these blocks could not take all tiles.
    /// The average block gets at most half of `max_tiles`, because some blocks are faster than others and take more.
    pub(super) fn blocks(&self, multiprocessors: usize, max_tiles: usize) -> usize {
        self.tiles.min(multiprocessors).max(self.tiles.div_ceil(max_tiles / 2))
    }
}

/// Number of heads in a section, with a mask.
///
/// With a mask, tiles differ in cost. Taking many heads together balances the load. With too many heads, K and V no longer fit
/// in L2. A short last section leaves multiprocessors idle.
///
/// Fastest are about four tiles per multiprocessor, at most 32 heads, and sections of one size (measured on an H200 with 2 to 32
/// heads and 512 to 16k keys). The causal cases of the bench's part `grid` show whether a change is faster.
fn section_heads(m_blocks: usize, heads: usize, multiprocessors: usize) -> usize {
    const MOST: usize = 32;
    let ideal = (4.0 * multiprocessors as f64 / m_blocks.max(1) as f64).clamp(1.0, MOST as f64);
    let cost = |size: usize| {
        let missing = heads.div_ceil(size) * size - heads; // in the last section
        let ratio = size as f64 / ideal;
        ratio.max(1.0 / ratio) + missing as f64 / size as f64
    };
    let sizes = (1..=heads.min(MOST)).map(|size| (cost(size), size));
    sizes.min_by(|(a, _), (b, _)| a.total_cmp(b)).map_or(1, |(_, size)| size)
}

/// The number of m_blocks per head, and the number of heads.
fn blocks_and_heads(problem: &Problem, kernel: &Kernel) -> (usize, usize) {
    match &problem.lengths {
        &Lengths::Padded { batch, seqlen_q, .. } => (seqlen_q.div_ceil(kernel.block_m), batch * problem.num_heads),
        Lengths::Packed { cu_seqlens_q, .. } => {
            let (total, batch) = (cu_seqlens_q.total(), cu_seqlens_q.batch());
            (if total == 0 { 0 } else { total / kernel.block_m + batch }, problem.num_heads)
        }
    }
}
