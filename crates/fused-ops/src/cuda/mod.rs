//! The operators on an NVIDIA GPU: each file named after an operator queues its kernels on Candle's stream. Nothing here waits for
//! the device.

#![allow(dead_code)] // until the first operator uses them

mod launch;
mod memory;
mod module;
mod params;

use candle_core::{CudaDevice, DType, Tensor};

/// The GPU of `tensor`, if there are kernels for its type. Other tensors run the composed operators.
pub(crate) fn device_with_kernels(tensor: &Tensor) -> Option<&CudaDevice> {
    match (tensor.device(), tensor.dtype()) {
        (candle_core::Device::Cuda(device), DType::F32 | DType::F16 | DType::BF16) => Some(device),
        _ => None,
    }
}
