//! The plan of a [`Problem`] on the CPU.

use super::tile::Tile;
use crate::problem::Problem;

/// S and the tiles of q, k, v and o need at most 1 MB in f32 up to head_dim 256. That is half of the L2 of a server core.
///
/// Other sizes have a similar speed. From 64 x 64 to 256 x 512, at head_dim 64, 128 and 256, the forward varied by 10%
/// (f32, causal, one core of a Sapphire Rapids Xeon with 2 MB of L2, 2026-11-22). Larger tiles waste more work on the diagonal, and
/// smaller ones more on the edges of products.
const FORWARD: Tile = Tile { block_m: 128, block_n: 256 };

/// The backward has S, dP, k, v, their transposes, dk and dv in memory at once. At head_dim 256, tiles of 256 keys need a quarter
/// more time than tiles of 128 keys, on the same core.
const BACKWARD: Tile = Tile { block_m: 128, block_n: 128 };

/// The keys of a part, in a forward of few queries. The parts do not depend on the number of threads, so neither do the bits.
///
/// 128 to 512 have a similar speed; with 1024, 32k keys take a fifth longer (8 and 32 heads of 128 over 8, two threads of an AMD EPYC).
const KEYS_OF_PART: usize = 256;

/// At most so many queries a sequence, with any number of heads. With 4, both forwards take the same time at 4k keys, and this one half of
/// it at 32k. With 16 at 4k keys it takes two to three times as long. Measured as above.
const FEW_QUERIES: usize = 4;

/// The tiles of a call on the CPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CpuPlan {
    /// Tile of the forward: each task owns `block_m` queries, or with `few_queries` `block_n` keys.
    pub forward: Tile,
    /// Whether the forward is the one for few queries, which reads each key once for its whole group of heads. It needs inputs that are
    /// not tracked for gradients.
    pub few_queries: bool,
    /// Tile of the backward: each task owns `block_n` keys.
    pub backward: Tile,
}

impl CpuPlan {
    /// The plan of `problem`. It is the same on every CPU.
    pub fn new(problem: &Problem) -> Self {
        let few_queries = problem.tracked.is_none() && problem.max_seqlen_q() <= FEW_QUERIES;
        let forward = if few_queries { Tile { block_n: KEYS_OF_PART, ..FORWARD } } else { FORWARD };
        Self { forward: forward.within(problem), few_queries, backward: BACKWARD.within(problem) }
    }
}
