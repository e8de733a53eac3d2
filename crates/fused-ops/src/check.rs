//! The checks of arguments. Each error is one sentence: the argument, the rule, the value, the way out.

use candle_core::{DType, Device, Error, Result, Tensor};

pub(crate) fn error(text: String) -> Error {
    // Not `candle_core::bail!`: it appends a backtrace to the text when RUST_BACKTRACE is set.
    Error::Msg(text)
}

/// `tensor` has a type that the operators compute with.
pub(crate) fn float(name: &str, tensor: &Tensor) -> Result<()> {
    match tensor.dtype() {
        DType::F16 | DType::BF16 | DType::F32 | DType::F64 => Ok(()),
        other => {
            Err(error(format!("{name}: dtype must be F16, BF16, F32 or F64, got {other:?}; convert it with to_dtype")))
        }
    }
}

/// `tensor` has a type of ids.
pub(crate) fn ids(name: &str, tensor: &Tensor) -> Result<()> {
    match tensor.dtype() {
        DType::U32 | DType::I64 => Ok(()),
        other => Err(error(format!("{name}: dtype must be U32 or I64, got {other:?}; convert it with to_dtype"))),
    }
}

/// `tensor` has the type and the device of `other`.
pub(crate) fn same(name: &str, tensor: &Tensor, other_name: &str, other: &Tensor) -> Result<()> {
    same_device(name, tensor, other_name, other.device())?;
    match (tensor.dtype(), other.dtype()) {
        (got, expected) if got == expected => Ok(()),
        (got, expected) => Err(error(format!(
            "{name}: dtype must be {expected:?} as {other_name}, got {got:?}; convert one with to_dtype"
        ))),
    }
}

/// `tensor` is on `device`. Two devices that were opened on one GPU have a stream each, so they are as different as two GPUs.
pub(crate) fn same_device(name: &str, tensor: &Tensor, other_name: &str, device: &Device) -> Result<()> {
    if tensor.device().same_device(device) {
        return Ok(());
    }
    let (got, expected) = (tensor.device().location(), device.location());
    let got = if got == expected { "another device on it".to_string() } else { format!("{got:?}") };
    Err(error(format!(
        "{name}: must be on the device of {other_name}, {expected:?}, got {got}; move one with to_device"
    )))
}

/// `tensor` has the shape `expected`. `reason` says where that shape comes from.
pub(crate) fn shape(name: &str, tensor: &Tensor, expected: &[usize], reason: &str) -> Result<()> {
    match tensor.dims() == expected {
        true => Ok(()),
        false => Err(error(format!("{name}: shape must be {expected:?} {reason}, got {:?}", tensor.dims()))),
    }
}

/// The size of the last axis of `tensor`. There is one, and it is not empty.
pub(crate) fn last_axis(name: &str, tensor: &Tensor) -> Result<usize> {
    match tensor.dims().last() {
        Some(&size) if size > 0 => Ok(size),
        _ => Err(error(format!("{name}: must have a last axis that is not empty, got shape {:?}", tensor.dims()))),
    }
}

/// `value` is finite and not negative.
pub(crate) fn not_negative(name: &str, value: f64) -> Result<()> {
    match value.is_finite() && value >= 0.0 {
        true => Ok(()),
        false => Err(error(format!("{name} must be finite and at least 0, got {value}"))),
    }
}
