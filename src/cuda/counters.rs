//! The tile counter of a persistent kernel: two `u32`. The kernel expects zeros and resets them to zero.

use std::collections::HashMap;
use std::sync::{Arc, LazyLock, PoisonError, RwLock};
use std::thread::{self, ThreadId};

use candle_core::cuda::cudarc::driver::sys::{CUdeviceptr, CUstreamCaptureStatus};
use candle_core::cuda::cudarc::driver::{CudaSlice, CudaStream, DevicePtr};
use candle_core::cuda::WrapErr;
use candle_core::Result;

use super::launch::Launcher;
use super::params::{Schedule, NULL};
use crate::plan::Launch;

/// The counters of one launch.
pub(super) enum Counters {
    /// Shared by all launches of this thread on this stream. They run in order.
    Kept(CUdeviceptr),
    /// Used only by this launch.
    Own(CudaSlice<u32>),
}

/// Context, stream and thread. The thread is needed because Candle's default stream is a different stream in each thread, with
/// the same handle.
type Key = (usize, usize, ThreadId);

/// Never freed, because a launch may still be running. The memory keeps its stream and context alive, so no other stream or
/// context can get the same address.
static KEPT: LazyLock<RwLock<HashMap<Key, Kept>>> = LazyLock::new(RwLock::default);

struct Kept {
    address: CUdeviceptr,
    _memory: CudaSlice<u32>,
}

/// Limit of kept counters, because threads may be created without end. Beyond it, each launch allocates its own counters.
const MOST_KEPT: usize = 1024;

impl Counters {
    const LEN: usize = 2;

    /// Counters for `launch` on `stream` by this thread, if it needs some. They are 0 when the launch runs.
    ///
    /// # Errors
    /// An error of Candle if they cannot be allocated.
    pub fn of(launch: &Launch, stream: &Arc<CudaStream>) -> Result<Option<Self>> {
        launch.counts_tiles().then(|| Self::for_next(stream)).transpose()
    }

    fn for_next(stream: &Arc<CudaStream>) -> Result<Self> {
        // A graph may be replayed on another stream, at the same time as launches on this one.
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

    /// The schedule of a persistent kernel, with the address of its counters if it has some.
    pub fn schedule<'a>(launch: &Launch, counters: &'a mut Option<Self>, launcher: &mut Launcher<'a>) -> Schedule {
        let schedule = launch.schedule.as_ref().expect("a kernel with tensor maps has a persistent grid");
        Schedule::new(schedule, counters.as_mut().map_or(NULL, |counters| counters.write(launcher)))
    }

    /// The address of the counters.
    fn write<'a>(&'a mut self, launcher: &mut Launcher<'a>) -> CUdeviceptr {
        match self {
            // Launches of one thread on one stream are already in order.
            Self::Kept(address) => *address,
            Self::Own(memory) => launcher.write(memory),
        }
    }
}
