//! How a [`Problem`] is computed on the host.

use super::tile::Tile;
use crate::problem::Problem;

/// S, and the tiles of q, k, v and o next to it, stay within 1 MB in f32 up to head_dim 256, half of a server core's L2.
///
/// Rates are flat around it: from 64 x 64 to 256 x 512, at head_dim 64, 128 and 256, the forward varied by 10% (one core
/// with 2 MB of L2, f32, causal). Larger tiles waste more on the diagonal, smaller ones more on the edges of products.
const FORWARD: Tile = Tile { block_m: 128, block_n: 256 };

/// The backward holds S, dP, k, v, their transposes, dk and dv at once. At head_dim 256, 256 keys cost a quarter more
/// time than 128.
const BACKWARD: Tile = Tile { block_m: 128, block_n: 128 };

/// The tiles of a call on the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CpuPlan {
    /// Tile of the forward: each task owns `block_m` queries.
    pub forward: Tile,
    /// Tile of the backward: each task owns `block_n` keys.
    pub backward: Tile,
}

impl CpuPlan {
    /// The same for every host.
    pub fn new(problem: &Problem) -> Self {
        Self { forward: FORWARD.within(problem), backward: BACKWARD.within(problem) }
    }
}
