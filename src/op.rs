//! The Candle operator: one instance per call, carrying the lse from its forward to its backward.

use std::sync::OnceLock;

use candle_core::op::BackpropOp;
#[cfg(feature = "cuda")]
use candle_core::CudaStorage;
use candle_core::{CpuStorage, CustomOp3, Layout, Result, Shape, Storage, Tensor};

#[cfg(feature = "cuda")]
use crate::cuda;
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
    /// Written by the forward, read by every backward. Candle calls `bwd` on the instance that ran forward, and offers
    /// no other way to keep a tensor; it is never emptied, so that a second backward finds it too.
    lse: OnceLock<Tensor>,
}

impl FlashAttention {
    pub(crate) fn new(problem: Problem, plan: Plan, alibi_slopes: Option<Tensor>, output: Output) -> Self {
        Self { problem, plan, alibi_slopes, output, lse: OnceLock::new() }
    }

    fn result_shape(&self) -> Shape {
        match self.output {
            Output::O => Shape::from(self.problem.shape_q()),
            Output::OAndLse => {
                Shape::from(self.problem.rows_q() * self.problem.num_heads * (self.problem.head_dim + 1))
            }
        }
    }

    /// Puts lse where the backward finds it.
    fn keep(&self, lse: Storage) {
        let lse = Tensor::from_storage(lse, self.problem.shape_lse(), BackpropOp::none(), false);
        // An op runs forward once; a value that is already there belongs to the same inputs.
        let _ = self.lse.set(lse);
    }

    fn cpu_backward(&self, [q, k, v, result, grad, lse]: [&Tensor; 6]) -> Result<[CpuStorage; 3]> {
        // Candle hands gradients on as they come: transposed, or broadcast from a sum.
        let grad = match self.output {
            Output::O if Strides::of("do", grad.layout()).is_ok() => grad.clone(),
            _ => grad.contiguous()?,
        };
        let call = cpu::Call::new(&self.problem, &self.plan, self.alibi_slopes.as_ref())?;
        cpu::backward(&call, self.output, [q, k, v, result, &grad, lse])
    }

    #[cfg(feature = "cuda")]
    fn cuda_call(&self) -> Result<cuda::Call<'_>> {
        let Plan::Cuda(plan) = &self.plan else { unreachable!("Plan::choose gives a GPU's tensors Plan::Cuda") };
        cuda::Call::new(&self.problem, plan, self.alibi_slopes.as_ref())
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
        let call = cpu::Call::new(&self.problem, &self.plan, self.alibi_slopes.as_ref())?;
        let (result, lse) = cpu::forward(&call, self.output, [q, k, v])?;
        self.keep(Storage::Cpu(lse));
        Ok((result, self.result_shape()))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        q: &CudaStorage,
        _: &Layout,
        k: &CudaStorage,
        _: &Layout,
        v: &CudaStorage,
        _: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        let (result, lse) = cuda::forward(&self.cuda_call()?, self.output, [q, k, v])?;
        self.keep(Storage::Cuda(lse));
        Ok((result, self.result_shape()))
    }

    fn bwd(
        &self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        result: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let lse = self.lse.get().ok_or(Error::NoForward)?;
        let tensors = [q, k, v, result, grad, lse];
        let grads = match &self.plan {
            Plan::Cpu { .. } => self.cpu_backward(tensors)?.map(Storage::Cpu),
            #[cfg(feature = "cuda")]
            Plan::Cuda(_) => cuda::backward(&self.cuda_call()?, self.output, tensors)?.map(Storage::Cuda),
            #[cfg(not(feature = "cuda"))]
            Plan::Cuda(_) => unreachable!("without the feature no device has these capabilities"),
        };
        let [dq, dk, dv] = grads;
        let tensor = |input: &Tensor, storage| {
            let grad = || Tensor::from_storage(storage, input.dims(), BackpropOp::none(), false);
            input.track_op().then(grad)
        };
        Ok((tensor(q, dq), tensor(k, dk), tensor(v, dv)))
    }
}
