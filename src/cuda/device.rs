//! Asks the driver what a GPU can do.

use candle_core::cuda::cudarc::driver::sys::CUdevice_attribute_enum::{
    CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN, CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT,
};
use candle_core::cuda::WrapErr;
use candle_core::{CudaDevice, Result};

use crate::plan::DeviceCaps;

/// What the driver says of `device`.
pub(crate) fn caps(device: &CudaDevice) -> Result<DeviceCaps> {
    let stream = device.cuda_stream();
    let context = stream.context();
    let (major, minor) = context.compute_capability().w()?;
    Ok(DeviceCaps::Cuda {
        compute_cap: (major as u32, minor as u32),
        multiprocessors: context.attribute(CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT).w()? as usize,
        shared_bytes_per_block: context.attribute(CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN).w()? as usize,
    })
}
