//! Attention on an NVIDIA GPU: queues the launches of a [`CudaPlan`](crate::plan::CudaPlan) on Candle's stream. This module
//! makes no choices and never waits for the device.

mod backward;
mod call;
mod counters;
pub(crate) mod device;
mod driver;
mod forward;
mod launch;
mod memory;
pub(crate) mod module;
pub(crate) mod params;
mod tensor_map;

use candle_core::{CudaStorage, DType, Result, Tensor};
use half::{bf16, f16};

pub(crate) use self::call::Call;
use crate::output::Output;
use crate::tensors::{BackwardInputs, Gradients, Inputs};

/// Queues the forward over the storages of q, k and v. Returns the result that `output` asks for, and lse.
pub(crate) fn forward(call: &Call, output: Output, inputs: Inputs<&CudaStorage>) -> Result<(CudaStorage, CudaStorage)> {
    match call.problem.dtype {
        DType::F16 => forward::forward::<f16>(call, output, inputs),
        DType::BF16 => forward::forward::<bf16>(call, output, inputs),
        DType::F32 => forward::forward::<f32>(call, output, inputs),
        other => unreachable!("Plan accepts no {other:?} on CUDA"),
    }
}

/// Queues the backward. Returns dq, dk and dv, each contiguous in the layout of its input.
pub(crate) fn backward(call: &Call, output: Output, tensors: BackwardInputs<Tensor>) -> Result<Gradients<CudaStorage>> {
    match call.problem.dtype {
        DType::F16 => backward::separate::<f16>(call, output, tensors),
        DType::BF16 => backward::separate::<bf16>(call, output, tensors),
        DType::F32 => backward::separate::<f32>(call, output, tensors),
        other => unreachable!("Plan accepts no {other:?} on CUDA"),
    }
}

/// Queues the backward. Returns dq, dk and dv in one contiguous tensor, one after another along its head axis.
pub(crate) fn backward_fused(call: &Call, output: Output, tensors: BackwardInputs<Tensor>) -> Result<CudaStorage> {
    match call.problem.dtype {
        DType::F16 => backward::fused::<f16>(call, output, tensors),
        DType::BF16 => backward::fused::<bf16>(call, output, tensors),
        DType::F32 => backward::fused::<f32>(call, output, tensors),
        other => unreachable!("Plan accepts no {other:?} on CUDA"),
    }
}
