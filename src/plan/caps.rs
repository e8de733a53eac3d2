//! What a plan needs to know about a device, as plain data.

use candle_core::DeviceLocation;

/// The capabilities of a device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DeviceCaps {
    /// The host.
    Cpu,
    /// An NVIDIA GPU.
    Cuda(CudaCaps),
    /// A device that no kernel of this build runs on.
    Other(DeviceLocation),
}

/// The capabilities of an NVIDIA GPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CudaCaps {
    /// Major and minor compute capability.
    pub compute_cap: (u32, u32),
    /// Streaming multiprocessors.
    pub multiprocessors: usize,
    /// Shared memory that one thread block may ask for.
    pub shared_bytes_per_block: usize,
}
