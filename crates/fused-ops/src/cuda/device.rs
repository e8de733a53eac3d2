//! Reads the capabilities of a GPU from its driver.

use candle_core::cuda::cudarc::driver::sys::CUdevice_attribute;
use candle_core::cuda::cudarc::driver::sys::CUdevice_attribute_enum::{
    CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN, CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT,
};
use candle_core::cuda::WrapErr;
use candle_core::{CudaDevice, Result};

pub(super) fn multiprocessors(device: &CudaDevice) -> Result<usize> {
    attribute(device, CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)
}

/// The largest shared memory of a thread block in bytes.
pub(super) fn shared_bytes(device: &CudaDevice) -> Result<usize> {
    attribute(device, CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)
}

fn attribute(device: &CudaDevice, attribute: CUdevice_attribute) -> Result<usize> {
    Ok(device.cuda_stream().context().attribute(attribute).w()? as usize)
}
