//! The memory pool of Candle's tensors, and how much of it is in use.

use std::ffi::c_void;

use anyhow::Result;
use candle_core::cuda::cudarc::driver::result::{device, mem_pool};
use candle_core::cuda::cudarc::driver::sys::CUmemPool_attribute_enum::{
    self as Attribute, CU_MEMPOOL_ATTR_USED_MEM_CURRENT, CU_MEMPOOL_ATTR_USED_MEM_HIGH,
};
use candle_core::cuda::cudarc::driver::sys::CUmemoryPool;
use candle_core::cuda::cudarc::driver::CudaContext;

/// The pool of a device, from which `cuMemAllocAsync` takes its memory. It lives as long as the device.
pub struct Pool(CUmemoryPool);

impl Pool {
    /// `None` if the device has no memory pools.
    pub fn of(context: &CudaContext) -> Result<Option<Self>> {
        if !context.has_async_alloc() {
            return Ok(None);
        }
        // SAFETY: the context's own device.
        Ok(Some(Self(unsafe { device::get_mem_pool(context.cu_device())? })))
    }

    /// Bytes in use. Restarts the maximum that [`Self::highest`] returns.
    pub fn watch(&self) -> Result<usize> {
        // The driver accepts only 0, and sets the maximum to the bytes in use.
        let mut zero = 0u64;
        // SAFETY: the attribute is a 64-bit count, and the pool is the device's.
        unsafe { mem_pool::set_attribute(self.0, CU_MEMPOOL_ATTR_USED_MEM_HIGH, (&raw mut zero).cast::<c_void>())? };
        self.read(CU_MEMPOOL_ATTR_USED_MEM_CURRENT)
    }

    /// The most bytes that were in use at once since [`Self::watch`].
    pub fn highest(&self) -> Result<usize> {
        self.read(CU_MEMPOOL_ATTR_USED_MEM_HIGH)
    }

    /// Returns unused memory to the driver.
    pub fn trim(&self) -> Result<()> {
        // SAFETY: the pool is the device's.
        unsafe { mem_pool::trim_to(self.0, 0)? };
        Ok(())
    }

    fn read(&self, attribute: Attribute) -> Result<usize> {
        let mut bytes = 0u64;
        // SAFETY: as in `watch`, for both attributes that are asked for.
        unsafe { mem_pool::get_attribute(self.0, attribute, (&raw mut bytes).cast::<c_void>())? };
        Ok(bytes as usize)
    }
}
