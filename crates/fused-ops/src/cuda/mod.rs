//! The operators on an NVIDIA GPU: each file named after an operator queues its kernels on Candle's stream. Nothing here waits for
//! the device, except the measurement of products in linear.rs.

pub(crate) mod activation;
pub(crate) mod adamw;
pub(crate) mod columns;
pub(crate) mod cross_entropy;
mod device;
mod early;
pub(crate) mod embedding;
mod launch;
pub(crate) mod linear;
pub(crate) mod linear_cross_entropy;
mod matmul;
mod memory;
mod module;
pub(crate) mod norm;
mod params;
pub(crate) mod rotary;
pub(crate) mod sum;

use candle_core::{CudaDevice, DType, Device, Tensor};

/// The GPU of `tensor`, if there are kernels for its type. Other tensors run the composed operators.
pub(crate) fn device_with_kernels(tensor: &Tensor) -> Option<&CudaDevice> {
    match (tensor.device(), tensor.dtype()) {
        (Device::Cuda(device), DType::F32 | DType::F16 | DType::BF16) => Some(device),
        _ => None,
    }
}
