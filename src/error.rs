//! One variant per way to be wrong. Each text names the tensor, the rule, what came and the way out.

use candle_core::{DType, DeviceLocation};

/// What the functions of this crate return.
pub type Result<T> = std::result::Result<T, Error>;

/// Why a call was refused. Nothing has been computed, queued or changed when one of these is returned.
///
/// Converts into [`candle_core::Error`], so `?` works in functions that return Candle's `Result`.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A tensor has another number of axes than its layout asks for.
    #[error("{tensor}: expected {} axes {axes}, got {} in shape {shape:?}", axis_count(axes), shape.len())]
    Rank {
        /// Name of the tensor.
        tensor: &'static str,
        /// The axes that it should have.
        axes: &'static str,
        /// The shape that came.
        shape: Vec<usize>,
    },
    /// One axis disagrees with the same axis of another tensor.
    #[error("{tensor}: {axis} is {got}, but {other} has {expected}; shape {shape:?}")]
    Axis {
        /// Name of the tensor.
        tensor: &'static str,
        /// Name of the axis.
        axis: &'static str,
        /// Its size.
        got: usize,
        /// The tensor it is compared with.
        other: &'static str,
        /// The size that would fit.
        expected: usize,
        /// The whole shape of `tensor`.
        shape: Vec<usize>,
    },
    /// An element type without a kernel.
    #[error("{tensor}: dtype {got:?} is not supported (supported: {supported}); convert with to_dtype")]
    DType {
        /// Name of the tensor.
        tensor: &'static str,
        /// Its dtype.
        got: DType,
        /// The dtypes that would do.
        supported: &'static str,
    },
    /// Tensors of one call have different element types.
    #[error("{tensor}: dtype {got:?} differs from q's {expected:?}; convert one with to_dtype")]
    DTypeMismatch {
        /// Name of the tensor.
        tensor: &'static str,
        /// Its dtype.
        got: DType,
        /// The dtype of q.
        expected: DType,
    },
    /// Tensors of one call live on different devices.
    #[error("{tensor}: on device {got:?}, but q is on {expected:?}; move one with to_device")]
    Device {
        /// Name of the tensor.
        tensor: &'static str,
        /// Its device.
        got: DeviceLocation,
        /// The device of q.
        expected: DeviceLocation,
    },
    /// The query heads cannot be shared out evenly over the key heads.
    #[error("num_heads {num_heads} of q is not a multiple of num_heads_k {num_heads_k} of k and v")]
    HeadGroups {
        /// Heads of q.
        num_heads: usize,
        /// Heads of k and v.
        num_heads_k: usize,
    },
    /// The head dimension is outside the supported range.
    #[error("head_dim {head_dim} is not supported (supported: 1 to {max}); split or pad the heads")]
    HeadDim {
        /// Size of the last axis of q.
        head_dim: usize,
        /// The largest that is supported.
        max: usize,
    },
    /// The last axis of a tensor has gaps.
    #[error("{tensor}: last axis must be contiguous, got stride {} in shape {shape:?} with strides {strides:?}; call .contiguous()", strides.last().copied().unwrap_or(0))]
    LastAxis {
        /// Name of the tensor.
        tensor: &'static str,
        /// Its shape.
        shape: Vec<usize>,
        /// Its strides in elements.
        strides: Vec<usize>,
    },
    /// `softmax_scale` is NaN or infinite.
    #[error("softmax_scale {0} is not finite; leave it out for 1/sqrt(head_dim)")]
    SoftmaxScale(
        /// The value that came.
        f64,
    ),
    /// `softcap` is not a positive finite number.
    #[error("softcap {0} must be finite and above 0; leave it out for no cap")]
    Softcap(
        /// The value that came.
        f64,
    ),
    /// ALiBi slopes of a shape that fits neither the heads nor batch and heads.
    #[error("alibi_slopes: expected shape [{num_heads}] (num_heads) or [{batch}, {num_heads}] (batch, num_heads), got {shape:?}")]
    AlibiShape {
        /// Heads of q.
        num_heads: usize,
        /// Sequences in the call.
        batch: usize,
        /// The shape that came.
        shape: Vec<usize>,
    },
    /// A tensor is tracked for gradients where none is offered.
    #[error("{tensor}: tracked for gradients, but {operation} gives it none; call .detach() if that is what you want")]
    Tracked {
        /// Name of the tensor.
        tensor: &'static str,
        /// The operation that would drop the gradient.
        operation: &'static str,
    },
    /// Cumulative lengths that do not describe a packed batch.
    #[error("{name}: {rule}, got {got}")]
    CuSeqlens {
        /// Name of the value.
        name: &'static str,
        /// The rule that is broken.
        rule: &'static str,
        /// The values that break it.
        got: String,
    },
    /// The two sides of a packed call hold different numbers of sequences.
    #[error("cu_seqlens_k holds {batch_k} sequences, but cu_seqlens_q holds {batch_q}")]
    PackedBatch {
        /// Sequences of q.
        batch_q: usize,
        /// Sequences of k and v.
        batch_k: usize,
    },
    /// The cumulative lengths end at another row than the packed tensor.
    #[error("{cu_seqlens} ends at {end}, but {tensor} has {rows} rows in shape {shape:?}")]
    PackedRows {
        /// Name of the lengths.
        cu_seqlens: &'static str,
        /// Their last entry.
        end: usize,
        /// Name of the tensor.
        tensor: &'static str,
        /// Its number of rows.
        rows: usize,
        /// Its shape.
        shape: Vec<usize>,
    },
    /// No kernel was built for this kind of device.
    #[error("no {dtype:?} attention kernel for {device:?} (built: CPU); move q, k and v with to_device(&Device::Cpu)")]
    NoKernel {
        /// The dtype of q.
        dtype: DType,
        /// The device of q.
        device: DeviceLocation,
    },
    /// The backward ran on an operator whose forward never did.
    #[error("flash_attention: backward found no lse, the forward of this operator did not run")]
    NoForward,
    /// An error of Candle itself.
    #[error(transparent)]
    Candle(#[from] candle_core::Error),
}

impl From<Error> for candle_core::Error {
    fn from(error: Error) -> Self {
        match error {
            Error::Candle(inner) => inner,
            // Not `Error::wrap`: that appends a backtrace to the text when RUST_BACKTRACE is set.
            other => Self::Wrapped(Box::new(other)),
        }
    }
}

/// Counts the axes in a description such as `(batch, seqlen, num_heads, head_dim)`.
fn axis_count(axes: &str) -> usize {
    axes.split(',').count()
}
