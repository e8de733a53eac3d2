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
    /// No larger than the longest sequences ask for, so that small calls use small buffers; at least 1 x 1.
    pub(super) fn within(self, problem: &Problem) -> Self {
        let cut = |block: usize, longest: usize| block.min(longest.max(1));
        Self { block_m: cut(self.block_m, problem.max_seqlen_q()), block_n: cut(self.block_n, problem.max_seqlen_k()) }
    }
}
