//! The Candle operator: one instance per call, carrying the lse from its forward to its backward.

use std::sync::OnceLock;

use candle_core::op::BackpropOp;
#[cfg(feature = "cuda")]
use candle_core::CudaStorage;
use candle_core::{CpuStorage, CustomOp1, CustomOp3, Layout, Result, Shape, Storage, Tensor};

#[cfg(feature = "cuda")]
use crate::cuda;
use crate::plan::Plan;
use crate::problem::{split_qkv, Problem, Strides};
use crate::{cpu, Error};

/// What the operator returns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Output {
    /// o in its layout, in the type of q.
    O,
    /// o and then lse, flat, both in the accumulator's type.
    OAndLse,
}

/// o in the accumulator's type, and lse, cut from the flat result of [`Output::OAndLse`]: views that stay in its graph.
pub(crate) fn o_and_lse(both: &Tensor, [shape_q, shape_lse]: [Vec<usize>; 2]) -> Result<(Tensor, Tensor)> {
    let (o_len, lse_len) = (shape_q.iter().product(), shape_lse.iter().product());
    let o = both.narrow(0, 0, o_len)?.reshape(shape_q)?;
    let lse = both.narrow(0, o_len, lse_len)?.reshape(shape_lse)?;
    Ok((o, lse))
}

/// One attention call as a node of Candle's graph.
pub(crate) struct FlashAttention {
    problem: Problem,
    plan: Plan,
    alibi_slopes: Option<Tensor>,
    output: Output,
    /// lse, written by the forward, read by every backward: on the CPU in two parts, on a GPU as one tensor. Candle calls
    /// `bwd` on the instance that ran forward, and offers no other way to keep a tensor; it is never emptied, so that a
    /// second backward finds it too.
    lse: OnceLock<Vec<Tensor>>,
}

impl FlashAttention {
    pub(crate) fn new(problem: Problem, plan: Plan, alibi_slopes: Option<Tensor>, output: Output) -> Self {
        Self { problem, plan, alibi_slopes, output, lse: OnceLock::new() }
    }

    fn result_shape(&self) -> Shape {
        match self.output {
            Output::O => Shape::from(self.problem.shape_o()),
            Output::OAndLse => {
                Shape::from(self.problem.rows_q() * self.problem.num_heads * (self.problem.head_dim + 1))
            }
        }
    }

    /// Puts lse where the backward finds it.
    fn keep(&self, parts: impl IntoIterator<Item = Storage>) {
        let tensor = |part| Tensor::from_storage(part, self.problem.shape_lse(), BackpropOp::none(), false);
        // An op runs forward once; a value that is already there belongs to the same inputs.
        let _ = self.lse.set(parts.into_iter().map(tensor).collect());
    }

    fn cpu_backward(&self, [q, k, v, result, grad]: [&Tensor; 5], lse: &[Tensor]) -> Result<[Option<CpuStorage>; 3]> {
        // Candle hands gradients on as they come: transposed, or broadcast from a sum.
        let grad = match self.output {
            Output::O if Strides::of("do", grad.layout(), self.problem.output_layout).is_ok() => grad.clone(),
            _ => grad.contiguous()?,
        };
        let [max, log2_sum] = lse else { unreachable!("the forward on the CPU keeps two parts") };
        let execution = cpu::Execution::new(&self.problem, &self.plan, self.alibi_slopes.as_ref())?;
        cpu::backward(&execution, self.output, [q, k, v, result, &grad, max, log2_sum])
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
        let execution = cpu::Execution::new(&self.problem, &self.plan, self.alibi_slopes.as_ref())?;
        let (result, lse) = cpu::forward(&execution, self.output, [q, k, v])?;
        self.keep(lse.map(Storage::Cpu));
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
        self.keep([Storage::Cuda(lse)]);
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
        let [dq, dk, dv] = match &self.plan {
            Plan::Cpu { .. } => {
                let grads = self.cpu_backward([q, k, v, result, grad], lse)?;
                grads.map(|grad| grad.map(Storage::Cpu))
            }
            #[cfg(feature = "cuda")]
            Plan::Cuda(_) => {
                let tensors = [q, k, v, result, grad, &lse[0]];
                let grads = cuda::backward(&self.cuda_call()?, self.output, cuda::Places::Separate, tensors)?;
                let mut grads = grads.into_iter().map(Storage::Cuda);
                std::array::from_fn(|_| grads.next())
            }
            #[cfg(not(feature = "cuda"))]
            Plan::Cuda(_) => unreachable!("without the feature no device has these capabilities"),
        };
        let tensor = |input: &Tensor, grad: Option<Storage>| {
            grad.filter(|_| input.track_op()).map(|grad| untracked(grad, input.dims()))
        };
        Ok((tensor(q, dq), tensor(k, dk), tensor(v, dv)))
    }
}

/// The same call with q, k and v in one tensor: its gradient comes in one piece.
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
        if let Plan::Cuda(_) = self.0.plan {
            let lse = self.0.lse.get().ok_or(Error::NoForward)?;
            let tensors = [&q, &k, &v, result, grad, &lse[0]];
            let grads = cuda::backward(&self.0.cuda_call()?, self.0.output, cuda::Places::Fused, tensors)?;
            return Ok(grads.into_iter().next().map(|grads| untracked(Storage::Cuda(grads), qkv.dims())));
        }
        // Views of a tracked tensor are tracked, so that all three come back.
        let (dq, dk, dv) = self.0.bwd(&q, &k, &v, result, grad)?;
        let grads: Vec<Tensor> = [dq, dk, dv].into_iter().flatten().collect();
        let (_, heads_axis) = layout.axes(qkv.rank());
        Ok(Some(Tensor::cat(&grads, heads_axis)?))
    }
}

/// A gradient; none flows through it.
fn untracked(grad: Storage, shape: &[usize]) -> Tensor {
    Tensor::from_storage(grad, shape, BackpropOp::none(), false)
}
