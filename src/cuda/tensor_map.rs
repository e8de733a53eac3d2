//! Encodes tensor maps, which TMA uses to read a tensor.

use std::ffi::c_void;

use candle_core::cuda::cudarc::driver::sys::{
    self, CUdeviceptr, CUtensorMap, CUtensorMapDataType, CUtensorMapFloatOOBfill, CUtensorMapInterleave,
    CUtensorMapL2promotion, CUtensorMapSwizzle,
};
use candle_core::DType;

use super::driver::error_name;
use super::params::{FwdParams, TensorMap};
use crate::error::{Error, Result};
use crate::instances::Kernel;
use crate::plan::axes;
use crate::problem::{Problem, Strides};
use crate::tensors::Inputs;

/// The tensor maps of q, k and v. Their addresses are in `params`, and their boxes are the tiles of `kernel`.
///
/// # Errors
/// [`Error::Driver`] if the driver refuses one.
pub(super) fn of_inputs(problem: &Problem, kernel: &Kernel, params: &FwdParams) -> Result<Inputs<TensorMap>> {
    let (shape_q, shape_k) = (problem.shape_q(), problem.shape_k());
    let encode = |name, address, strides: &Strides, shape: &[usize], box_rows| {
        // A size of 0 cannot be encoded, and the address of an empty tensor may be invalid. So use a map of the first row of o.
        // It is never used.
        let (address, axes) =
            if shape.contains(&0) { (params.o, [(0, 1); 3]) } else { (address, axes(strides, shape)) };
        encode(kernel, name, address, problem.head_dim, axes, box_rows)
    };
    Ok(Inputs {
        q: encode("q", params.q, &problem.q, &shape_q, kernel.block_m)?,
        k: encode("k", params.k, &problem.k, &shape_k, kernel.block_n)?,
        v: encode("v", params.v, &problem.v, &shape_k, kernel.block_n)?,
    })
}

/// Encodes the map of a tensor `(head_dim, rows, heads, batch)`. `axes` has stride and size of the last three.
fn encode(
    kernel: &Kernel,
    name: &str,
    address: CUdeviceptr,
    head_dim: usize,
    axes: [(usize, usize); 3],
    box_rows: usize,
) -> Result<TensorMap> {
    // The width of a box must divide the kernel's head_dim. It is also the width of the swizzle.
    let (columns, swizzle) = if kernel.head_dim.is_multiple_of(64) {
        (64, CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_128B)
    } else {
        (32, CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_64B)
    };
    let data_type = match kernel.dtype {
        DType::F16 => CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
        _ => CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
    };
    let bytes_of = |elements: usize| (elements * kernel.dtype.size_in_bytes()) as u64;
    // The stride of an axis with one element is never used, but it must still be a multiple of 16.
    let strides = axes.map(|(stride, size)| bytes_of(if size == 1 { head_dim } else { stride }));
    let [rows, heads, batch] = axes.map(|(_, size)| size as u64);
    let sizes = [head_dim as u64, rows, heads, batch];
    let box_sizes = [columns, box_rows as u32, 1, 1];
    let element_strides = [1u32; 4];
    let mut map = CUtensorMap { opaque: [0; 16] };
    // SAFETY: the arrays outlive the call and have as many entries as it reads: 3 strides, and 4 of the others. The call stores
    // the address and does not read the memory.
    let encoded = unsafe {
        sys::cuTensorMapEncodeTiled(
            &mut map,
            data_type,
            sizes.len() as u32,
            address as *mut c_void,
            sizes.as_ptr(),
            strides.as_ptr(),
            box_sizes.as_ptr(),
            element_strides.as_ptr(),
            CUtensorMapInterleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
            swizzle,
            CUtensorMapL2promotion::CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
            CUtensorMapFloatOOBfill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        )
    };
    encoded.result().map_err(|error| Error::Driver {
        action: "encode a tensor map for",
        kernel: kernel.name,
        cause: error_name(error),
        detail: format!("{name} at {address:#x}, sizes {sizes:?}, strides {strides:?} bytes, box {box_sizes:?}"),
    })?;
    // Copy the words, because the alignment of a CUtensorMap depends on the version of CUDA.
    Ok(TensorMap { words: map.opaque })
}
