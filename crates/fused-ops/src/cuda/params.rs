//! The parameters of kernels.
#![allow(missing_docs)] // cuda/params.h documents the structs

use candle_core::cuda::cudarc::driver::sys::CUdeviceptr;
use candle_core::cuda::cudarc::driver::DeviceRepr;

// The structs, with their layout asserted: generated from cuda/params.h, on which nvcc asserts the same.
include!(concat!(env!("OUT_DIR"), "/params.rs"));

macro_rules! params {
    ($($name:ident)*) => {$(
        // SAFETY: `#[repr(C)]`, integers and floats only, laid out as the kernels' struct of the same name.
        unsafe impl DeviceRepr for $name {}
    )*};
}
params!(NormForwardParams NormBackwardParams NormFinishParams CrossEntropyParams CrossEntropyMeanParams ScaleParams);
params!(ActivationForwardParams ActivationBackwardParams RotaryParams EmbeddingForwardParams EmbeddingSortParams);
params!(EmbeddingSumParams AdamWTensor AdamWBlock AdamWParams GlobalNormParams);

/// The null pointer: a tensor that the call does not have.
pub(super) const NULL: CUdeviceptr = 0;
