//! Names of driver errors.

use candle_core::cuda::cudarc::driver::DriverError;

/// The driver's name of an error, for example `CUDA_ERROR_INVALID_VALUE`.
pub(super) fn error_name(error: DriverError) -> String {
    match error.error_name() {
        Ok(name) => name.to_string_lossy().into_owned(),
        Err(_) => format!("{:?}", error.0),
    }
}
