//! What the blocks of a persistent kernel count in: two `u32`, which the kernel leaves at 0 as it found them.

use std::collections::HashMap;
use std::sync::{Arc, LazyLock, PoisonError, RwLock};
use std::thread::{self, ThreadId};

use candle_core::cuda::cudarc::driver::sys::{CUdeviceptr, CUstreamCaptureStatus};
use candle_core::cuda::cudarc::driver::{CudaSlice, CudaStream, DevicePtr};
use candle_core::cuda::WrapErr;
use candle_core::Result;

use super::launch::Launcher;

/// The counters of one launch.
pub(super) enum Counters {
    /// Those of this thread's launches on the stream, which run one after the other.
    Kept(CUdeviceptr),
    /// The launch's alone.
    Own(CudaSlice<u32>),
}

/// By context, stream and thread: Candle's usual stream is another one in each thread, by the same handle.
type Key = (usize, usize, ThreadId);

/// Never freed: a launch may still be in flight. The memory keeps its stream and context alive, so that no others can come
/// to have the same addresses.
static KEPT: LazyLock<RwLock<HashMap<Key, Kept>>> = LazyLock::new(RwLock::default);

struct Kept {
    address: CUdeviceptr,
    _memory: CudaSlice<u32>,
}

/// Threads come and go: further ones allocate at each launch.
const MOST_KEPT: usize = 1024;

impl Counters {
    const LEN: usize = 2;

    /// Counters for the next launch on `stream` by this thread, 0 by the time that it runs.
    ///
    /// # Errors
    /// An error of Candle if they cannot be allocated.
    pub fn of(stream: &Arc<CudaStream>) -> Result<Self> {
        // A graph may be replayed on any stream, beside launches on this one.
        if stream.capture_status().w()? != CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE {
            return Ok(Self::Own(stream.alloc_zeros(Self::LEN).w()?));
        }
        let key = (stream.context().cu_ctx() as usize, stream.cu_stream() as usize, thread::current().id());
        let kept = KEPT.read().unwrap_or_else(PoisonError::into_inner);
        if let Some(kept) = kept.get(&key) {
            return Ok(Self::Kept(kept.address));
        }
        drop(kept);
        let memory = stream.alloc_zeros(Self::LEN).w()?;
        let mut kept = KEPT.write().unwrap_or_else(PoisonError::into_inner);
        if kept.len() >= MOST_KEPT {
            return Ok(Self::Own(memory));
        }
        let (address, order) = memory.device_ptr(stream);
        drop(order);
        kept.insert(key, Kept { address, _memory: memory });
        Ok(Self::Kept(address))
    }

    /// Their address.
    pub fn write<'a>(&'a mut self, launcher: &mut Launcher<'a>) -> CUdeviceptr {
        match self {
            // What one stream runs for one thread is in order already.
            Self::Kept(address) => *address,
            Self::Own(memory) => launcher.write(memory),
        }
    }
}
