//! What the example asks of a GPU beyond Candle's operators, through the cudarc that Candle exports: its name, events, and
//! the memory pool that Candle allocates from.

use anyhow::Result;
use candle_core::backend::BackendDevice;
use candle_core::cuda::cudarc::driver::sys::CUmemPool_attribute::{
    self as Attribute, CU_MEMPOOL_ATTR_RELEASE_THRESHOLD, CU_MEMPOOL_ATTR_USED_MEM_CURRENT,
    CU_MEMPOOL_ATTR_USED_MEM_HIGH,
};
use candle_core::cuda::cudarc::driver::sys::{CUevent_flags, CUmemoryPool, CUresult};
use candle_core::cuda::cudarc::driver::{result, CudaEvent, DriverError};
use candle_core::CudaDevice;

/// The first GPU, set up for one thread that trains on it.
pub fn open() -> candle_core::Result<CudaDevice> {
    let device = CudaDevice::new(0)?;
    // SAFETY: events order the uses of a tensor by several streams, and its freeing behind them. All tensors of this
    // program are made, used and freed by one thread on the one stream of `device`, which is in order by itself.
    unsafe { device.disable_event_tracking() };
    // What is freed stays with the pool. Otherwise it goes back to the driver at each synchronisation, and the next step
    // maps all of its memory anew.
    MemoryPool::of(&device)
        .and_then(|pool| pool.map_or(Ok(()), |pool| pool.set(CU_MEMPOOL_ATTR_RELEASE_THRESHOLD, u64::MAX)))
        .map_err(|error| candle_core::Error::Msg(format!("its memory pool: {error}")))?;
    Ok(device)
}

pub fn name(device: &CudaDevice) -> Result<String> {
    Ok(device.cuda_stream().context().name()?)
}

/// An event, with a time, behind all work that is queued.
pub fn event(device: &CudaDevice) -> Result<CudaEvent> {
    Ok(device.cuda_stream().record_event(Some(CUevent_flags::CU_EVENT_DEFAULT))?)
}

/// The pool that Candle's allocations come from.
pub struct MemoryPool(CUmemoryPool);

impl MemoryPool {
    /// Nothing on a GPU that has no pools, as some virtual ones have none: there Candle allocates without.
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

    /// The most bytes that were in use at once since the last [`Self::reset_peak`].
    pub fn peak_bytes(&self) -> Result<u64> {
        self.get(CU_MEMPOOL_ATTR_USED_MEM_HIGH)
    }

    /// From here on, a new peak.
    pub fn reset_peak(&self) -> Result<()> {
        self.set(CU_MEMPOOL_ATTR_USED_MEM_HIGH, 0) // the driver takes no other number: the peak becomes what is in use
    }

    /// Bytes in use.
    pub fn used_bytes(&self) -> Result<u64> {
        self.get(CU_MEMPOOL_ATTR_USED_MEM_CURRENT)
    }

    fn get(&self, attribute: Attribute) -> Result<u64> {
        let mut value = 0u64;
        // SAFETY: the pool is the device's own, which outlives the process's use of it, and the attributes that are asked for
        // here are u64.
        unsafe { result::mem_pool::get_attribute(self.0, attribute, (&raw mut value).cast())? };
        Ok(value)
    }

    fn set(&self, attribute: Attribute, mut value: u64) -> Result<()> {
        // SAFETY: the pool is the device's own, and the attributes that are set here are u64.
        unsafe { result::mem_pool::set_attribute(self.0, attribute, (&raw mut value).cast())? };
        Ok(())
    }
}
