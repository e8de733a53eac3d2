//! Asks a device what it can do.

use candle_core::Device;

use crate::error::Result;
use crate::plan::DeviceCaps;

/// The capabilities of `device`.
///
/// # Errors
/// An error of Candle if the driver does not answer, [`Error::Environment`](crate::Error::Environment) if the limit of shared
/// memory in the environment is not a number.
pub fn caps(device: &Device) -> Result<DeviceCaps> {
    match device {
        Device::Cpu => Ok(DeviceCaps::Cpu),
        #[cfg(feature = "cuda")]
        Device::Cuda(device) => Ok(DeviceCaps::Cuda(crate::cuda::device::caps(device)?)),
        other => Ok(DeviceCaps::Other(other.location())),
    }
}
