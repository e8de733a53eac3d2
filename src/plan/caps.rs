//! The capabilities of a device that a plan depends on, as plain data.

use candle_core::DeviceLocation;

/// The capabilities of a device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DeviceCaps {
    /// The CPU.
    Cpu,
    /// An NVIDIA GPU.
    Cuda(CudaCaps),
    /// A device without kernels in this build.
    Other(DeviceLocation),
}

/// The capabilities of an NVIDIA GPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CudaCaps {
    /// Major and minor compute capability.
    pub compute_cap: (u32, u32),
    /// Number of streaming multiprocessors.
    pub multiprocessors: usize,
    /// Shared memory that one thread block may use.
    pub shared_bytes_per_block: usize,
}
