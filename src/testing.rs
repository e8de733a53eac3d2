//! For this crate's own tests and benches: what was planned for a call, and the mask over whole tiles.
//! Not part of the stable interface.

use candle_core::{CustomOp3, Tensor};

pub use crate::instances::{Kernel, Pass, KERNELS};
pub use crate::mask::{Coverage, Visibility};
use crate::op::{FlashAttention, Output};
pub use crate::plan::{CudaPlan, DeviceCaps, Launch, Plan, Tile};
pub use crate::problem::{Alibi, Lengths, Problem, Sequence, Strides, MAX_HEAD_DIM};
use crate::{Attention, CuSeqlens, Mask, Result};

/// Registers, local and shared memory of each CUDA kernel as ptxas reported them: CSV with a header.
#[cfg(feature = "cuda")]
pub const KERNEL_REPORT: &str = include_str!(concat!(env!("OUT_DIR"), "/kernels.csv"));

/// One call whose forward and backward are run by hand: the operator alone, without what Candle's autograd adds.
pub struct Call {
    op: FlashAttention,
    inputs: [Tensor; 3],
}

impl Call {
    /// Checks and plans the call, over a padded batch.
    ///
    /// # Errors
    /// As [`Attention::forward`].
    pub fn new(attention: &Attention, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Self> {
        let op = attention.op(Problem::padded(attention, q, k, v)?, Output::O, q)?;
        Ok(Self { op, inputs: [q.clone(), k.clone(), v.clone()] })
    }

    /// As [`Self::new`], for a packed batch.
    ///
    /// # Errors
    /// As [`Attention::forward_packed`].
    pub fn packed(
        attention: &Attention,
        (q, k, v): (&Tensor, &Tensor, &Tensor),
        cu_seqlens_q: &CuSeqlens,
        cu_seqlens_k: &CuSeqlens,
    ) -> Result<Self> {
        let problem = Problem::packed(attention, (q, k, v), cu_seqlens_q, cu_seqlens_k)?;
        Ok(Self { op: attention.op(problem, Output::O, q)?, inputs: [q.clone(), k.clone(), v.clone()] })
    }

    /// Checks the call and runs it as `plan` says, which must be for the same problem.
    ///
    /// # Errors
    /// Those of the checks of shapes and strides.
    pub fn with_plan(attention: &Attention, q: &Tensor, k: &Tensor, v: &Tensor, plan: Plan) -> Result<Self> {
        let problem = Problem::padded(attention, q, k, v)?;
        let op = FlashAttention::new(problem, plan, attention.alibi_slopes.clone(), Output::O);
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
