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

/// Calls a function that is generic over the element type, with that of the call.
macro_rules! with_element_type {
    ($module:ident :: $function:ident ($call:ident, $output:ident, $tensors:ident)) => {
        match $call.problem.dtype {
            DType::F16 => $module::$function::<f16>($call, $output, $tensors),
            DType::BF16 => $module::$function::<bf16>($call, $output, $tensors),
            DType::F32 => $module::$function::<f32>($call, $output, $tensors),
            other => unreachable!("Plan accepts no {other:?} on CUDA"),
        }
    };
}

/// Queues the forward over the storages of q, k and v. Returns the result that `output` asks for, and lse.
pub(crate) fn forward(call: &Call, output: Output, inputs: Inputs<&CudaStorage>) -> Result<(CudaStorage, CudaStorage)> {
    with_element_type!(forward::forward(call, output, inputs))
}

/// Queues the backward. Returns dq, dk and dv, each contiguous in the layout of its input.
pub(crate) fn backward(call: &Call, output: Output, tensors: BackwardInputs<Tensor>) -> Result<Gradients<CudaStorage>> {
    with_element_type!(backward::separate(call, output, tensors))
}

/// Queues the backward. Returns dq, dk and dv in one contiguous tensor, one after another along its head axis.
pub(crate) fn backward_fused(call: &Call, output: Output, tensors: BackwardInputs<Tensor>) -> Result<CudaStorage> {
    with_element_type!(backward::fused(call, output, tensors))
}
