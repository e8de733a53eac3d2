//! GPU functions that Candle does not offer: the device name, and the memory pool of Candle's allocations. They use
//! the cudarc that Candle exports.

use anyhow::Result;
use candle_core::backend::BackendDevice;
use candle_core::cuda::cudarc::driver::sys::CUmemPool_attribute::{
    self as Attribute, CU_MEMPOOL_ATTR_RELEASE_THRESHOLD, CU_MEMPOOL_ATTR_USED_MEM_CURRENT,
    CU_MEMPOOL_ATTR_USED_MEM_HIGH,
};
use candle_core::cuda::cudarc::driver::sys::{CUmemoryPool, CUresult};
use candle_core::cuda::cudarc::driver::{result, DriverError};
use candle_core::CudaDevice;

/// The first GPU, set up for training on one thread.
pub fn open() -> candle_core::Result<CudaDevice> {
    let device = CudaDevice::new(0)?;
    // SAFETY: Candle's events order the uses of a tensor on several streams, and its release after them. This program
    // allocates, uses and frees all tensors on one thread and one stream, and a stream runs its work in order.
    unsafe { device.disable_event_tracking() };
    // The pool keeps freed memory. Otherwise each synchronisation returns it to the driver, and the next step must map all
    // of its memory again.
    MemoryPool::of(&device)
        .and_then(|pool| pool.map_or(Ok(()), |pool| pool.set(CU_MEMPOOL_ATTR_RELEASE_THRESHOLD, u64::MAX)))
        .map_err(|error| candle_core::Error::Msg(format!("its memory pool: {error}")))?;
    Ok(device)
}

pub fn name(device: &CudaDevice) -> Result<String> {
    Ok(device.cuda_stream().context().name()?)
}

/// The memory pool that Candle allocates from.
pub struct MemoryPool(CUmemoryPool);

impl MemoryPool {
    /// The pool of `device`. `None` if the GPU has no pools, as on some virtual GPUs; then Candle allocates without a pool.
    pub fn of(device: &CudaDevice) -> Result<Option<Self>> {
        let stream = device.cuda_stream();
        let context = stream.context();
        if !context.has_async_alloc() {
            return Ok(None);
        }
        context.bind_to_thread()?;
        // SAFETY: the device is the one that `context` was opened on.
        match unsafe { result::device::get_mem_pool(context.cu_device()) } {
            Err(DriverError(CUresult::CUDA_ERROR_NOT_SUPPORTED)) => Ok(None),
            pool => Ok(Some(Self(pool?))),
        }
    }

    /// The largest number of bytes in use at once since the last [`Self::reset_peak`].
    pub fn peak_bytes(&self) -> Result<u64> {
        self.get(CU_MEMPOOL_ATTR_USED_MEM_HIGH)
    }

    /// Sets the peak to the bytes in use now.
    pub fn reset_peak(&self) -> Result<()> {
        self.set(CU_MEMPOOL_ATTR_USED_MEM_HIGH, 0) // 0 is the only value that the driver accepts here
    }

    /// Bytes in use.
    pub fn used_bytes(&self) -> Result<u64> {
        self.get(CU_MEMPOOL_ATTR_USED_MEM_CURRENT)
    }

    fn get(&self, attribute: Attribute) -> Result<u64> {
        let mut value = 0u64;
        // SAFETY: the pool belongs to the device and outlives the process's use of it. The attributes read here are u64.
        unsafe { result::mem_pool::get_attribute(self.0, attribute, (&raw mut value).cast())? };
        Ok(value)
    }

    fn set(&self, attribute: Attribute, mut value: u64) -> Result<()> {
        // SAFETY: the pool belongs to the device. The attributes set here are u64.
        unsafe { result::mem_pool::set_attribute(self.0, attribute, (&raw mut value).cast())? };
        Ok(())
    }
}
