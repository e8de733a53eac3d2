//! Rows with more or fewer columns.

use candle_core::{Result, Tensor};

#[cfg(feature = "cuda")]
use crate::cuda;
use crate::{check, composed};

/// The rows of `x` with `columns` columns: the first ones of `x`, and zeros if there are more.
///
/// ```text
/// y[.., c] = x[.., c] for c < width, else 0          dx[.., c] = dy[.., c] for c < columns, else 0
/// ```
///
/// `x` is `(.., width)`, in f16, bf16, f32 or f64; the result is `(.., columns)` and contiguous. Kernels that need rows of whole
/// 16 bytes get them this way, and their results lose the zeros again.
///
/// # Errors
/// If `x` has no last axis or an empty one, if its type is not a floating-point type, or if `columns` is 0.
///
/// ```
/// # use candle_core::{Device, Tensor};
/// let x = Tensor::new(&[[1f32, 2., 3.], [4., 5., 6.]], &Device::Cpu)?;
/// let wider = candle_fused_ops::resize_columns(&x, 4)?;
/// assert_eq!(wider.to_vec2::<f32>()?, [[1., 2., 3., 0.], [4., 5., 6., 0.]]);
/// assert_eq!(candle_fused_ops::resize_columns(&wider, 1)?.to_vec2::<f32>()?, [[1.], [4.]]);
/// # Ok::<(), candle_core::Error>(())
/// ```
pub fn resize_columns(x: &Tensor, columns: usize) -> Result<Tensor> {
    check::float("x", x)?;
    let width = check::last_axis("x", x)?;
    if columns == 0 {
        return Err(check::error(format!("columns: must be at least 1, got 0 for x of shape {:?}", x.dims())));
    }
    if columns == width {
        return x.contiguous();
    }
    #[cfg(feature = "cuda")]
    if let Some(device) = cuda::device_with_kernels(x) {
        return cuda::columns::resize_columns(device, x, columns);
    }
    composed::resize_columns(x, columns)
}
