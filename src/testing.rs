//! For this crate's own tests and benches: what was planned for a call, and the mask over whole tiles.
//! Not part of the stable interface.

use candle_core::{CustomOp3, Tensor};

pub use crate::mask::{Coverage, Visibility};
use crate::op::FlashAttention;
pub use crate::plan::{DeviceCaps, Plan, Tile};
pub use crate::problem::{Alibi, Lengths, Problem, Sequence, Strides, MAX_HEAD_DIM};
use crate::{Attention, CuSeqlens, Mask, Result};

/// One padded call whose forward and backward are run by hand: the operator alone, without what Candle's autograd adds.
pub struct Call {
    op: FlashAttention,
    inputs: [Tensor; 3],
}

impl Call {
    /// Checks and plans the call.
    ///
    /// # Errors
    /// As [`Attention::forward`].
    pub fn new(attention: &Attention, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Self> {
        let op = attention.op(Problem::padded(attention, q, k, v)?, crate::op::Output::O, q)?;
        Ok(Self { op, inputs: [q.clone(), k.clone(), v.clone()] })
    }

    /// o.
    ///
    /// # Errors
    /// Those of the operator.
    pub fn forward(&self) -> Result<Tensor> {
        let [q, k, v] = &self.inputs;
        Ok(q.apply_op3_no_bwd(k, v, &self.op)?)
    }

    /// The gradients of those of q, k and v that are tracked, from o and its gradient. The forward must have run.
    ///
    /// # Errors
    /// Those of the operator.
    pub fn backward(&self, o: &Tensor, do_: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let [q, k, v] = &self.inputs;
        Ok(self.op.bwd(q, k, v, o, do_)?)
    }
}

/// `mask` laid over one pair of sequences.
pub fn visibility(mask: Mask, seqlen_q: usize, seqlen_k: usize) -> Visibility {
    mask.over(seqlen_q, seqlen_k)
}

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
