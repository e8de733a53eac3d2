//! Reads the capabilities of a GPU from the driver.

use candle_core::cuda::cudarc::driver::sys::CUdevice_attribute_enum::{
    CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN, CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT,
};
use candle_core::cuda::WrapErr;
use candle_core::CudaDevice;

use crate::environment::shared_limit;
use crate::error::Result;
use crate::plan::CudaCaps;

/// The capabilities of `device`. `CANDLE_FA2_SHARED_LIMIT` limits its shared memory.
pub(crate) fn caps(device: &CudaDevice) -> Result<CudaCaps> {
    let stream = device.cuda_stream();
    let context = stream.context();
    let (major, minor) = context.compute_capability().w()?;
    let multiprocessors = context.attribute(CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT).w()? as usize;
    let shared_bytes = context.attribute(CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN).w()? as usize;
    Ok(CudaCaps {
        compute_cap: (major as u32, minor as u32),
        multiprocessors,
        shared_bytes_per_block: shared_limit()?.map_or(shared_bytes, |limit| limit.min(shared_bytes)),
    })
}
