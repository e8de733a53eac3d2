//! The Candle operator. Each call has its own instance, which keeps lse from the forward to the backward.

use std::sync::OnceLock;

use candle_core::op::BackpropOp;
#[cfg(feature = "cuda")]
use candle_core::CudaStorage;
use candle_core::{CpuStorage, CustomOp1, CustomOp3, Layout, Result, Shape, Storage, Tensor};

use crate::cpu;
#[cfg(feature = "cuda")]
use crate::cuda;
use crate::error::Error;
use crate::output::Output;
use crate::plan::Plan;
use crate::problem::{split_qkv, Problem};
use crate::tensors::{BackwardInputs, Inputs};

/// One attention call as a node of Candle's graph.
#[derive(Debug)]
pub(crate) struct FlashAttention {
    problem: Problem,
    plan: Plan,
    alibi_slopes: Option<Tensor>,
    output: Output,
    /// The forward writes it, and every backward reads it. Candle calls `bwd` on the instance that ran the forward, and has no
    /// other way to keep a tensor. It stays as long as this node, so that a second backward can read it too.
    lse: OnceLock<Lse>,
}

/// The log-sum-exp of each row, in the form of the device. Its shape is [`Problem::shape_lse`].
#[derive(Debug)]
enum Lse {
    Cpu(cpu::Lse<Tensor>),
    #[cfg(feature = "cuda")]
    Cuda(Tensor),
}

impl FlashAttention {
    pub(crate) fn new(problem: Problem, plan: Plan, alibi_slopes: Option<Tensor>, output: Output) -> Self {
        Self { problem, plan, alibi_slopes, output, lse: OnceLock::new() }
    }

    fn result_shape(&self) -> Shape {
        match self.output {
            Output::O => Shape::from(self.problem.shape_of_result()),
            Output::OAndLse => {
                Shape::from(self.problem.rows_q() * self.problem.num_heads * (self.problem.head_dim_v + 1))
            }
        }
    }

    /// Keeps lse for the backward.
    fn keep(&self, lse: Lse) {
        // An instance runs its forward once. If there is already a value, it belongs to the same inputs.
        let _ = self.lse.set(lse);
    }

    fn kept(&self) -> Result<&Lse> {
        Ok(self.lse.get().ok_or(Error::NoForward)?)
    }

    /// One value per row, as an untracked tensor.
    fn lse_tensor(&self, storage: Storage) -> Tensor {
        untracked(storage, &self.problem.shape_lse())
    }

    fn cpu_call(&self) -> Result<cpu::Call<'_>> {
        let Plan::Cpu(plan) = &self.plan else { unreachable!("Plan::choose returns Plan::Cpu on the CPU") };
        cpu::Call::new(&self.problem, plan, self.alibi_slopes.as_ref())
    }

    #[cfg(feature = "cuda")]
    fn cuda_call(&self) -> Result<cuda::Call<'_>> {
        let Plan::Cuda(plan) = &self.plan else { unreachable!("Plan::choose returns Plan::Cuda on a GPU") };
        cuda::Call::new(&self.problem, plan, self.alibi_slopes.as_ref())
    }
}

impl CustomOp3 for FlashAttention {
    fn name(&self) -> &'static str {
        "flash_attention"
    }

    // The layouts are not read, because `Problem` has their strides.
    fn cpu_fwd(
        &self,
        q: &CpuStorage,
        _: &Layout,
        k: &CpuStorage,
        _: &Layout,
        v: &CpuStorage,
        _: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (result, lse) = cpu::forward(&self.cpu_call()?, self.output, Inputs { q, k, v })?;
        self.keep(Lse::Cpu(lse.map(|part| self.lse_tensor(Storage::Cpu(part)))));
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
        let (result, lse) = cuda::forward(&self.cuda_call()?, self.output, Inputs { q, k, v })?;
        self.keep(Lse::Cuda(self.lse_tensor(Storage::Cuda(lse))));
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
        let inputs = Inputs { q, k, v };
        let grads = match self.kept()? {
            Lse::Cpu(lse) => {
                let tensors = BackwardInputs { inputs, result, grad, lse };
                cpu::backward(&self.cpu_call()?, self.output, tensors)?.map(|grad| grad.map(Storage::Cpu))
            }
            #[cfg(feature = "cuda")]
            Lse::Cuda(lse) => {
                let tensors = BackwardInputs { inputs, result, grad, lse };
                cuda::backward(&self.cuda_call()?, self.output, tensors)?.map(|grad| Some(Storage::Cuda(grad)))
            }
        };
        let tensor = |input: &Tensor, grad: Option<Storage>| {
            grad.filter(|_| input.track_op()).map(|grad| untracked(grad, input.dims()))
        };
        Ok((tensor(q, grads.dq), tensor(k, grads.dk), tensor(v, grads.dv)))
    }
}

/// The operator for q, k and v in one tensor. Its gradient is one tensor too.
pub(crate) struct FusedFlashAttention(pub(crate) FlashAttention);

impl CustomOp1 for FusedFlashAttention {
    fn name(&self) -> &'static str {
        "flash_attention_qkv"
    }

    fn cpu_fwd(&self, qkv: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        self.0.cpu_fwd(qkv, layout, qkv, layout, qkv, layout)
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, qkv: &CudaStorage, layout: &Layout) -> Result<(CudaStorage, Shape)> {
        self.0.cuda_fwd(qkv, layout, qkv, layout, qkv, layout)
    }

    fn bwd(&self, qkv: &Tensor, result: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let layout = self.0.problem.layout;
        let [q, k, v] = split_qkv(qkv, self.0.problem.num_heads_k, layout)?;
        #[cfg(feature = "cuda")]
        if let Lse::Cuda(lse) = self.0.kept()? {
            let tensors = BackwardInputs { inputs: Inputs { q: &q, k: &k, v: &v }, result, grad, lse };
            let grad = cuda::backward_fused(&self.0.cuda_call()?, self.0.output, tensors)?;
            return Ok(Some(untracked(Storage::Cuda(grad), qkv.dims())));
        }
        // Views of a tracked tensor are tracked, so all three gradients exist.
        let (dq, dk, dv) = self.0.bwd(&q, &k, &v, result, grad)?;
        let grads: Vec<Tensor> = [dq, dk, dv].into_iter().flatten().collect();
        let (_, heads_axis) = layout.axes(qkv.rank());
        Ok(Some(Tensor::cat(&grads, heads_axis)?))
    }
}

/// A tensor that no gradient flows through.
fn untracked(storage: Storage, shape: &[usize]) -> Tensor {
    Tensor::from_storage(storage, shape, BackpropOp::none(), false)
}
