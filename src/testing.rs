//! Access for this crate's tests and benches: problems, plans, kernels, masks. Not part of the stable interface.

use candle_core::{CustomOp3, Tensor, D};
use candle_fused_ops::resize_columns;

use crate::attention::{plan, with_copies};
pub use crate::device::caps as device_caps;
pub use crate::instances::{Arch, Grid, Kernel, Pass, DQ_GROUP_ROWS, KERNELS};
pub use crate::mask::{Coverage, Visibility};
use crate::op::FlashAttention;
use crate::output::{o_and_lse, Output};
pub use crate::plan::{
    BackwardPlan, CpuPlan, CudaCaps, CudaPlan, DeviceCaps, DqAccum, Launch, Plan, Reason, Rejection, RowBlocks,
    Schedule, Tile,
};
pub use crate::problem::{Alibi, Lengths, Problem, Sequence, Strides, MAX_HEAD_DIM};
use crate::tensors::Inputs;
use crate::{Attention, CuSeqlens, Mask, Result};

/// dq, dk and dv of a [`Call`].
pub type Grads = (Option<Tensor>, Option<Tensor>, Option<Tensor>);

/// One call whose forward and backward run directly, without Candle's autograd. If the plan copies inputs, they are copied once, at
/// the start, and o has the head_dim_v of the plan.
pub struct Call {
    op: FlashAttention,
    /// The operator of [`Attention::forward_with_lse`], for the same call.
    op_with_lse: FlashAttention,
    problem: Problem,
    inputs: [Tensor; 3],
    /// head_dim and head_dim_v before the plan's copies.
    head_dims: (usize, usize),
}

impl Call {
    /// Checks and plans a padded call.
    ///
    /// # Errors
    /// As [`Attention::forward`].
    pub fn new(attention: &Attention, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Self> {
        Self::planned(attention, Problem::padded(&attention.options, q, k, v)?, (q, k, v))
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
        Self::planned(attention, Problem::packed(&attention.options, (q, k, v), cu_seqlens_q, cu_seqlens_k)?, (q, k, v))
    }

    fn planned(attention: &Attention, problem: Problem, inputs: (&Tensor, &Tensor, &Tensor)) -> Result<Self> {
        let plan = plan(&problem, inputs.0)?;
        Self::with_plan(attention, problem, inputs, plan)
    }

    /// A call with a given `problem` and `plan`.
    ///
    /// # Errors
    /// Those of Candle, for a copy of an input.
    pub fn with_plan(
        attention: &Attention,
        problem: Problem,
        (q, k, v): (&Tensor, &Tensor, &Tensor),
        plan: Plan,
    ) -> Result<Self> {
        let head_dims = (problem.head_dim, problem.head_dim_v);
        let problem = plan.with_copies(problem);
        let Inputs { q, k, v } = with_copies(&problem, &plan, Inputs { q, k, v })?;
        let op =
            |output| FlashAttention::new(problem.clone(), plan.clone(), attention.options.alibi_slopes.clone(), output);
        let (op, op_with_lse) = (op(Output::O), op(Output::OAndLse));
        Ok(Self { op, op_with_lse, problem, inputs: [q, k, v], head_dims })
    }

    /// o.
    ///
    /// # Errors
    /// Those of the operator.
    pub fn forward(&self) -> Result<Tensor> {
        let [q, k, v] = &self.inputs;
        Ok(q.apply_op3_no_bwd(k, v, &self.op)?)
    }

    /// o in the accumulator's type, and lse.
    ///
    /// # Errors
    /// Those of the operator.
    pub fn forward_with_lse(&self) -> Result<(Tensor, Tensor)> {
        let [q, k, v] = &self.inputs;
        let both = q.apply_op3_no_bwd(k, v, &self.op_with_lse)?;
        Ok(o_and_lse(&both, self.problem.shape_of_result(), self.problem.shape_lse())?)
    }

    /// `o` of [`Self::forward`] with the head_dim of v.
    ///
    /// # Errors
    /// Those of Candle.
    pub fn narrowed(&self, o: &Tensor) -> Result<Tensor> {
        Ok(resize_columns(o, self.head_dims.1)?)
    }

    /// The gradients of the tracked inputs, from `o` of [`Self::forward`] and the gradient of [`Self::narrowed`] o. This includes the
    /// copies that autograd would make of them.
    ///
    /// # Errors
    /// Those of the operator.
    pub fn backward(&self, o: &Tensor, do_: &Tensor) -> Result<Grads> {
        let [q, k, v] = &self.inputs;
        self.narrowed_grads(self.op.bwd(q, k, v, o, &with_columns(do_, self.problem.head_dim_v)?)?)
    }

    fn narrowed_grads(&self, (dq, dk, dv): Grads) -> Result<Grads> {
        let (head_dim, head_dim_v) = self.head_dims;
        let narrowed = |grad: Option<Tensor>, columns| grad.map(|grad| resize_columns(&grad, columns)).transpose();
        Ok((narrowed(dq, head_dim)?, narrowed(dk, head_dim)?, narrowed(dv, head_dim_v)?))
    }

    /// As [`Self::backward`], from the results of [`Self::forward_with_lse`] and their gradients.
    ///
    /// # Errors
    /// Those of the operator.
    pub fn backward_with_lse(&self, (o, lse): (&Tensor, &Tensor), (do_, dlse): (&Tensor, &Tensor)) -> Result<Grads> {
        let [q, k, v] = &self.inputs;
        // The flat tensor that the operator returns, or its gradient.
        let both = |o: &Tensor, lse: &Tensor| -> candle_core::Result<Tensor> {
            Tensor::cat(&[o.to_dtype(lse.dtype())?.flatten_all()?, lse.flatten_all()?], 0)
        };
        let do_ = with_columns(do_, self.problem.head_dim_v)?;
        self.narrowed_grads(self.op_with_lse.bwd(q, k, v, &both(o, lse)?, &both(&do_, dlse)?)?)
    }
}

/// As [`resize_columns`], but a tensor that has so many columns keeps its strides.
fn with_columns(tensor: &Tensor, columns: usize) -> Result<Tensor> {
    match tensor.dim(D::Minus1)? == columns {
        true => Ok(tensor.clone()),
        false => Ok(resize_columns(tensor, columns)?),
    }
}

/// Parameters and functions to launch a kernel directly, of this crate or another one with the same parameters. Nothing here
/// checks the addresses or keeps their memory alive.
#[cfg(feature = "cuda")]
pub mod cuda {
    pub use crate::cuda::module::function;
    pub use crate::cuda::params::{
        BwdParams, ConvertParams, DeltaParams, FwdParams, RowBlocks, Shape, ShapeAddresses, Strides, NULL,
    };
}

/// `mask` for one sequence of queries and one of keys.
pub fn visibility(mask: Mask, seqlen_q: usize, seqlen_k: usize) -> Visibility {
    mask.over(seqlen_q, seqlen_k)
}

/// The checked problem of a padded call.
///
/// # Errors
/// As [`Attention::forward`].
pub fn problem(attention: &Attention, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Problem> {
    Problem::padded(&attention.options, q, k, v)
}

/// The checked problem of a padded call with q, k and v in one tensor.
///
/// # Errors
/// As [`Attention::forward_qkv`].
pub fn problem_qkv(attention: &Attention, qkv: &Tensor, num_heads_k: usize) -> Result<Problem> {
    Ok(Problem::fused(&attention.options, qkv, num_heads_k)?.0)
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
    Problem::packed(&attention.options, (q, k, v), cu_seqlens_q, cu_seqlens_k)
}
