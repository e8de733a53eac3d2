//! Encodes tensor maps, which TMA uses to read a tensor.

use std::ffi::c_void;

use candle_core::cuda::cudarc::driver::sys::{
    self, CUdeviceptr, CUtensorMap, CUtensorMapDataType, CUtensorMapFloatOOBfill, CUtensorMapInterleave,
    CUtensorMapL2promotion, CUtensorMapSwizzle,
};
use candle_core::DType;

use super::driver::error_name;
use super::params::TensorMap;
use crate::error::{Error, Result};
use crate::instances::Kernel;
use crate::plan::axes;
use crate::problem::{Problem, Strides};
use crate::tensors::Inputs;

/// Encodes the tensor maps of one launch.
pub(super) struct TensorMaps<'a> {
    pub problem: &'a Problem,
    /// The boxes are its tiles.
    pub kernel: &'a Kernel,
    /// A tensor that is not empty. A size of 0 cannot be encoded, and the address of an empty tensor may be invalid. So the map of
    /// an empty tensor is that of the first row here; it is never used.
    pub not_empty: CUdeviceptr,
}

impl TensorMaps<'_> {
    /// The maps of q, k and v at these addresses.
    ///
    /// # Errors
    /// [`Error::Driver`] if the driver refuses one.
    pub fn of_inputs(&self, addresses: Inputs<CUdeviceptr>) -> Result<Inputs<TensorMap>> {
        let Self { problem, kernel, .. } = *self;
        Ok(Inputs {
            q: self.of("q", addresses.q, &problem.q, &problem.shape_q(), kernel.block_m)?,
            k: self.of("k", addresses.k, &problem.k, &problem.shape_k(), kernel.block_n)?,
            v: self.of("v", addresses.v, &problem.v, &problem.shape_v(), kernel.block_n)?,
        })
    }

    /// The map of one tensor, with boxes of `box_rows` rows.
    ///
    /// # Errors
    /// [`Error::Driver`] if the driver refuses it.
    pub fn of(
        &self,
        name: &str,
        address: CUdeviceptr,
        strides: &Strides,
        shape: &[usize],
        box_rows: usize,
    ) -> Result<TensorMap> {
        let head_dim = shape[shape.len() - 1];
        let (address, axes) =
            if shape.contains(&0) { (self.not_empty, [(0, 1); 3]) } else { (address, axes(strides, shape)) };
        encode(self.kernel, name, address, head_dim, axes, box_rows)
    }
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
    let data_type = match kernel.dtype {
        DType::F16 => CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
        _ => CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
    };
    let bytes_of = |elements: usize| (elements * kernel.dtype.size_in_bytes()) as u64;
    // A box is as wide as a panel of the kernel's tiles, and so is its swizzle.
    let swizzle = match bytes_of(kernel.box_cols) {
        128 => CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_128B,
        _ => CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_64B,
    };
    // The stride of an axis with one element is never used, but it must still be a multiple of 16.
    let strides = axes.map(|(stride, size)| bytes_of(if size == 1 { head_dim } else { stride }));
    let [rows, heads, batch] = axes.map(|(_, size)| size as u64);
    let sizes = [head_dim as u64, rows, heads, batch];
    let box_sizes = [kernel.box_cols as u32, box_rows as u32, 1, 1];
    let element_strides = [1u32; 4];
    // L2 then fetches 256 bytes of memory at once: a row of head_dim 128. Smaller promotions were not measured.
    let promotion = CUtensorMapL2promotion::CU_TENSOR_MAP_L2_PROMOTION_L2_256B;
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
            promotion,
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
