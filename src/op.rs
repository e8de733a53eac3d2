//! The Candle operator: one instance per call, carrying the lse from its forward to its backward.

use std::sync::OnceLock;

use candle_core::op::BackpropOp;
use candle_core::{CpuStorage, CustomOp3, Layout, Result, Shape, Storage, Tensor};

use crate::plan::Plan;
use crate::problem::{Problem, Strides};
use crate::{cpu, Error};

/// What the operator returns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Output {
    /// o, in the shape and type of q.
    O,
    /// o and then lse, flat, both in the accumulator's type.
    OAndLse,
}

/// One attention call as a node of Candle's graph.
pub(crate) struct FlashAttention {
    problem: Problem,
    plan: Plan,
    alibi_slopes: Option<Tensor>,
    output: Output,
    /// The two parts of lse, written by the forward, read by every backward. Candle calls `bwd` on the instance that ran
    /// forward, and offers no other way to keep a tensor; it is never emptied, so that a second backward finds it too.
    lse: OnceLock<[Tensor; 2]>,
}

impl FlashAttention {
    pub(crate) fn new(problem: Problem, plan: Plan, alibi_slopes: Option<Tensor>, output: Output) -> Self {
        Self { problem, plan, alibi_slopes, output, lse: OnceLock::new() }
    }
}

impl CustomOp3 for FlashAttention {
    fn name(&self) -> &'static str {
        "flash_attention"
    }

    // The layouts are those that `Problem` was made from.
    fn cpu_fwd(
        &self,
        q: &CpuStorage,
        _: &Layout,
        k: &CpuStorage,
        _: &Layout,
        v: &CpuStorage,
        _: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let execution = cpu::Execution::new(&self.problem, &self.plan, self.alibi_slopes.as_ref())?;
        let (result, lse) = cpu::forward(&execution, self.output, [q, k, v])?;
        let shape = match self.output {
            Output::O => Shape::from(self.problem.shape_q()),
            Output::OAndLse => {
                Shape::from(self.problem.rows_q() * self.problem.num_heads * (self.problem.head_dim + 1))
            }
        };
        let lse = lse
            .map(|part| Tensor::from_storage(Storage::Cpu(part), self.problem.shape_lse(), BackpropOp::none(), false));
        // An op runs forward once; a value that is already there belongs to the same inputs.
        let _ = self.lse.set(lse);
        Ok((result, shape))
    }

    fn bwd(
        &self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        result: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let [max, log2_sum] = self.lse.get().ok_or(Error::NoForward)?;
        // Candle hands gradients on as they come: transposed, or broadcast from a sum.
        let grad = match self.output {
            Output::O if Strides::of("do", grad.layout()).is_ok() => grad.clone(),
            _ => grad.contiguous()?,
        };
        let execution = cpu::Execution::new(&self.problem, &self.plan, self.alibi_slopes.as_ref())?;
        let [dq, dk, dv] = cpu::backward(&execution, self.output, [q, k, v, result, &grad, max, log2_sum])?;
        let tensor = |input: &Tensor, grad: Option<CpuStorage>| {
            grad.map(|grad| Tensor::from_storage(Storage::Cpu(grad), input.dims(), BackpropOp::none(), false))
        };
        Ok((tensor(q, dq), tensor(k, dk), tensor(v, dv)))
    }
}
