//! Reads the capabilities of a device.

use candle_core::Device;

use crate::error::Result;
use crate::plan::DeviceCaps;

/// The capabilities of `device`.
///
/// # Errors
/// - An error of Candle if the driver returns one.
/// - [`Error::Environment`](crate::Error::Environment) if `CANDLE_FA2_SHARED_LIMIT` is not a number.
pub fn caps(device: &Device) -> Result<DeviceCaps> {
    match device {
        Device::Cpu => Ok(DeviceCaps::Cpu),
        #[cfg(feature = "cuda")]
        Device::Cuda(device) => Ok(DeviceCaps::Cuda(crate::cuda::device::caps(device)?)),
        other => Ok(DeviceCaps::Other(other.location())),
    }
}
