//! For this crate's own tests and benches: what was planned for a call, and the mask over whole tiles.
//! Not part of the stable interface.

use candle_core::Tensor;

pub use crate::mask::{Coverage, Visibility};
pub use crate::plan::{DeviceCaps, Plan, Tile};
pub use crate::problem::{Alibi, Lengths, Problem, Sequence, Strides, MAX_HEAD_DIM};
use crate::{Attention, CuSeqlens, Result};

/// The checked problem of a padded call.
///
/// # Errors
/// As [`Attention::forward`].
pub fn problem(attention: &Attention, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Problem> {
    Problem::padded(attention, q, k, v)
}

/// The checked problem of a packed call.
///
/// # Errors
/// As [`Attention::forward_packed`].
pub fn problem_packed(
    attention: &Attention,
    (q, k, v): (&Tensor, &Tensor, &Tensor),
    cu_seqlens_q: &CuSeqlens,
    cu_seqlens_k: &CuSeqlens,
) -> Result<Problem> {
    Problem::packed(attention, (q, k, v), cu_seqlens_q, cu_seqlens_k)
}
