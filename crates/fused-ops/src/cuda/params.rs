//! The parameters of kernels, and the numbers that they share with the host.
#![allow(missing_docs)] // cuda/params.h documents them

use candle_core::cuda::cudarc::driver::sys::CUdeviceptr;
use candle_core::cuda::cudarc::driver::DeviceRepr;

// The numbers, and the structs with their layout asserted: generated from cuda/params.h, on which nvcc asserts the same.
include!(concat!(env!("OUT_DIR"), "/params.rs"));

macro_rules! params {
    ($($name:ident)*) => {$(
        // SAFETY: `#[repr(C)]`, integers and floats only, laid out as the kernels' struct of the same name.
        unsafe impl DeviceRepr for $name {}
    )*};
}
params!(NormForwardParams NormBackwardParams NormFinishParams CrossEntropyParams CrossEntropyMeanParams ScaleParams);
params!(ActivationForwardParams ActivationBackwardParams RotaryParams EmbeddingForwardParams EmbeddingSortParams);
params!(EmbeddingSumParams ColumnsParams SumParams AdamWTensor AdamWBlock AdamWParams GlobalNormParams);

/// The null pointer: a tensor that the call does not have.
pub(super) const NULL: CUdeviceptr = 0;
