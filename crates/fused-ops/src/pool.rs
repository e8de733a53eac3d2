//! The memory pool of a GPU, which Candle allocates from.
//!
//! Other devices have no pool. Some virtual GPUs have none either.

use candle_core::{Device, Result};

/// Lets the pool keep the memory that tensors free. By default each synchronisation returns it to the driver, and the next step of a
/// training must map all of its memory again.
///
/// # Errors
/// If the driver refuses.
pub fn keep_freed_memory(device: &Device) -> Result<()> {
    #[cfg(feature = "cuda")]
    if let Some(pool) = cuda::Pool::of(device)? {
        return pool.keep_freed_memory();
    }
    let _ = device;
    Ok(())
}

/// Returns the memory that no tensor uses to the driver. Work that uses it must have run: synchronize first.
///
/// # Errors
/// If the driver refuses.
pub fn release_freed_memory(device: &Device) -> Result<()> {
    #[cfg(feature = "cuda")]
    if let Some(pool) = cuda::Pool::of(device)? {
        return pool.release_freed_memory();
    }
    let _ = device;
    Ok(())
}

/// Bytes in use now. `None` without a pool. [`peak_bytes`] measures from this call on.
///
/// # Errors
/// If the driver refuses.
pub fn used_bytes(device: &Device) -> Result<Option<u64>> {
    #[cfg(feature = "cuda")]
    if let Some(pool) = cuda::Pool::of(device)? {
        return pool.reset_peak().and_then(|()| pool.used_bytes()).map(Some);
    }
    let _ = device;
    Ok(None)
}

/// The largest number of bytes in use at once since the last [`used_bytes`]. `None` without a pool.
///
/// # Errors
/// If the driver refuses.
pub fn peak_bytes(device: &Device) -> Result<Option<u64>> {
    #[cfg(feature = "cuda")]
    if let Some(pool) = cuda::Pool::of(device)? {
        return pool.peak_bytes().map(Some);
    }
    let _ = device;
    Ok(None)
}

/// Whether `error`, of Candle or around one of Candle's, says that a GPU has no memory left.
///
/// Candle has no error of its own for this, and boxes those of the driver and of cuBLAS in several ways. So this looks for their names in
/// the text.
pub fn is_out_of_memory(error: &impl std::fmt::Debug) -> bool {
    let text = format!("{error:?}");
    ["CUDA_ERROR_OUT_OF_MEMORY", "CUBLAS_STATUS_ALLOC_FAILED"].iter().any(|name| text.contains(name))
}

#[cfg(feature = "cuda")]
mod cuda {
    use candle_core::cuda::cudarc::driver::result::{device, mem_pool};
    use candle_core::cuda::cudarc::driver::sys::CUmemPool_attribute_enum::{
        self as Attribute, CU_MEMPOOL_ATTR_RELEASE_THRESHOLD, CU_MEMPOOL_ATTR_USED_MEM_CURRENT,
        CU_MEMPOOL_ATTR_USED_MEM_HIGH,
    };
    use candle_core::cuda::cudarc::driver::sys::{CUmemoryPool, CUresult};
    use candle_core::cuda::cudarc::driver::DriverError;
    use candle_core::cuda::WrapErr;
    use candle_core::{Device, Result};

    pub(super) struct Pool(CUmemoryPool);

    impl Pool {
        pub(super) fn of(device: &Device) -> Result<Option<Self>> {
            let Device::Cuda(device) = device else { return Ok(None) };
            let stream = device.cuda_stream();
            let context = stream.context();
            if !context.has_async_alloc() {
                return Ok(None); // Candle allocates without a pool
            }
            context.bind_to_thread().w()?;
            // SAFETY: the device is the one that `context` was opened on.
            match unsafe { device::get_mem_pool(context.cu_device()) } {
                Err(DriverError(CUresult::CUDA_ERROR_NOT_SUPPORTED)) => Ok(None),
                pool => Ok(Some(Self(pool.w()?))),
            }
        }

        pub(super) fn keep_freed_memory(&self) -> Result<()> {
            self.set(CU_MEMPOOL_ATTR_RELEASE_THRESHOLD, u64::MAX)
        }

        pub(super) fn release_freed_memory(&self) -> Result<()> {
            // SAFETY: the pool is the device's.
            unsafe { mem_pool::trim_to(self.0, 0) }.w()
        }

        pub(super) fn reset_peak(&self) -> Result<()> {
            self.set(CU_MEMPOOL_ATTR_USED_MEM_HIGH, 0) // 0 is the only value that the driver accepts here
        }

        pub(super) fn used_bytes(&self) -> Result<u64> {
            self.get(CU_MEMPOOL_ATTR_USED_MEM_CURRENT)
        }

        pub(super) fn peak_bytes(&self) -> Result<u64> {
            self.get(CU_MEMPOOL_ATTR_USED_MEM_HIGH)
        }

        fn get(&self, attribute: Attribute) -> Result<u64> {
            let mut value = 0u64;
            // SAFETY: the pool belongs to the device and outlives the process's use of it. The attributes read here are u64.
            unsafe { mem_pool::get_attribute(self.0, attribute, (&raw mut value).cast()) }.w()?;
            Ok(value)
        }

        fn set(&self, attribute: Attribute, mut value: u64) -> Result<()> {
            // SAFETY: as in `get`.
            unsafe { mem_pool::set_attribute(self.0, attribute, (&raw mut value).cast()) }.w()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Error;

    #[test]
    fn an_error_of_the_driver_is_found_under_others() {
        let driver = Error::Msg("DriverError(CUDA_ERROR_OUT_OF_MEMORY, \"out of memory\")".into());
        assert!(is_out_of_memory(&driver.context("step 3")));
        assert!(!is_out_of_memory(&Error::Msg("CUDA_ERROR_ILLEGAL_ADDRESS".into())));
    }
}
