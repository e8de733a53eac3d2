//! The size of a tile of scores.

use crate::problem::Problem;

/// Size of one tile of scores.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Tile {
    /// Queries.
    pub block_m: usize,
    /// Keys.
    pub block_n: usize,
}

impl Tile {
    /// The tile, limited to the longest sequences of `problem`, so that small calls use small buffers. At least 1 x 1.
    pub(super) fn within(self, problem: &Problem) -> Self {
        let cut = |block: usize, longest: usize| block.min(longest.max(1));
        Self { block_m: cut(self.block_m, problem.max_seqlen_q()), block_n: cut(self.block_n, problem.max_seqlen_k()) }
    }
}
