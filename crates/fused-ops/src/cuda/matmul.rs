//! Matrix products of cuBLAS into memory that exists already. Candle's own allocate their result and cannot add to it.

use std::ffi::c_void;

use candle_core::cuda::cudarc::cublas::result::gemm_ex;
use candle_core::cuda::cudarc::cublas::sys::{cublasComputeType_t, cublasGemmAlgo_t, cublasOperation_t, cudaDataType};
use candle_core::cuda::cudarc::driver::sys::CUdeviceptr;
use candle_core::cuda::gemm_reduced_precision_f32;
use candle_core::{CudaDevice, DType, Result};

use crate::check;

/// A matrix in rows of `stride` elements.
#[derive(Clone, Copy)]
pub(super) struct Matrix {
    pub(super) address: CUdeviceptr,
    pub(super) dtype: DType,
    pub(super) stride: usize,
    /// Whether the product reads its transpose.
    pub(super) transposed: bool,
}

/// Rows and columns of a result, and the length of its sums.
#[derive(Clone, Copy)]
pub(super) struct Sizes {
    pub(super) m: usize,
    pub(super) n: usize,
    pub(super) k: usize,
}

/// `c = a b`, or `c += a b` if `adds`. Sums are in f32. a is (m, k) and b is (k, n), of one type, and c is (m, n).
///
/// # Safety
/// The addresses are of matrices of these sizes, and stay valid until the product is queued on Candle's stream.
///
/// # Errors
/// If cuBLAS refuses the product.
pub(super) unsafe fn product(
    device: &CudaDevice,
    a: Matrix,
    b: Matrix,
    c: Matrix,
    sizes: Sizes,
    adds: bool,
) -> Result<()> {
    let (alpha, beta) = (1f32, f32::from(u8::from(adds)));
    let (alpha, beta): (*const f32, *const f32) = (&alpha, &beta);
    let operation = |matrix: Matrix| match matrix.transposed {
        true => cublasOperation_t::CUBLAS_OP_T,
        false => cublasOperation_t::CUBLAS_OP_N,
    };
    let compute = match a.dtype {
        DType::F32 if gemm_reduced_precision_f32() => cublasComputeType_t::CUBLAS_COMPUTE_32F_FAST_TF32,
        _ => cublasComputeType_t::CUBLAS_COMPUTE_32F,
    };
    let Sizes { m, n, k } = sizes;
    // cuBLAS has columns where we have rows. So it computes the transpose, b^T a^T.
    // SAFETY: as the caller promises.
    let queued = unsafe {
        gemm_ex(
            *device.cublas_handle().handle(),
            operation(b),
            operation(a),
            n as i32,
            m as i32,
            k as i32,
            alpha.cast::<c_void>(),
            b.address as *const c_void,
            data_type(b.dtype),
            b.stride as i32,
            a.address as *const c_void,
            data_type(a.dtype),
            a.stride as i32,
            beta.cast::<c_void>(),
            c.address as *mut c_void,
            data_type(c.dtype),
            c.stride as i32,
            compute,
            cublasGemmAlgo_t::CUBLAS_GEMM_DEFAULT_TENSOR_OP,
        )
    };
    queued.map_err(|error| check::error(format!("matrix product of ({m}, {k}) and ({k}, {n}) failed: {error:?}")))
}

fn data_type(dtype: DType) -> cudaDataType {
    match dtype {
        DType::F16 => cudaDataType::CUDA_R_16F,
        DType::BF16 => cudaDataType::CUDA_R_16BF,
        DType::F32 => cudaDataType::CUDA_R_32F,
        other => unreachable!("device_with_kernels admits no {other:?}"),
    }
}
