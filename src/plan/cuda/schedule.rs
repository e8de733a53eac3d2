//! The work tiles of a persistent kernel, and their order.

use crate::instances::{Kernel, Pass, BACKWARD_SECTION, FORWARD_SECTION, MAX_SECTION_HEADS};
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

/// Number of heads in a section that should have about `section_tiles` tiles. A short last section leaves multiprocessors idle, so sections
/// of one size are better.
fn section_heads(head_tiles: usize, heads: usize, section_tiles: usize) -> usize {
    let ideal = (section_tiles as f64 / head_tiles.max(1) as f64).clamp(1.0, MAX_SECTION_HEADS as f64);
    let cost = |size: usize| {
        let missing = heads.div_ceil(size) * size - heads; // in the last section
        let ratio = size as f64 / ideal;
        ratio.max(1.0 / ratio) + missing as f64 / size as f64
    };
    let sizes = (1..=heads.min(MAX_SECTION_HEADS)).map(|size| (cost(size), size));
    sizes.min_by(|(a, _), (b, _)| a.total_cmp(b)).map_or(1, |(_, size)| size)
}

/// What the work tiles of a kernel divide: queries, or in a backward keys. A backward processes all query heads of a key head in one
/// tile, so that dk and dv are written once.
pub(super) struct Tiles {
    /// Rows of a tile.
    pub rows: usize,
    /// The longest sequence.
    pub seqlen: usize,
    /// Number of heads.
    pub heads: usize,
}

impl Tiles {
    pub(super) fn of(problem: &Problem, kernel: &Kernel) -> Self {
        match kernel.pass {
            Pass::Backward => Self {
                rows: kernel.cluster * kernel.block_n,
                seqlen: problem.max_seqlen_k(),
                heads: problem.num_heads_k,
            },
            _ => Self { rows: kernel.block_m, seqlen: problem.max_seqlen_q(), heads: problem.num_heads },
        }
    }
}

/// The number of tiles per head, and the number of heads.
fn tiles_and_heads(problem: &Problem, kernel: &Kernel) -> (usize, usize) {
    let Tiles { rows, seqlen, heads } = Tiles::of(problem, kernel);
    match &problem.lengths {
        Lengths::Padded { batch, .. } => (seqlen.div_ceil(rows), batch * heads),
        Lengths::Packed { cu_seqlens_q, cu_seqlens_k } => {
            let cu_seqlens = if kernel.pass == Pass::Backward { cu_seqlens_k } else { cu_seqlens_q };
            (if cu_seqlens.total() == 0 { 0 } else { cu_seqlens.blocks(rows) }, heads)
        }
    }
}
