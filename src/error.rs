//! The errors of the operator: one variant per broken rule. Each text names the tensor, the rule, the value and the solution.
//! `Driver` and `Candle` repeat what the driver or Candle says.

use candle_core::{DType, DeviceLocation};

use crate::layout::{PaddingSide, TensorLayout};

/// The result of the functions of the operator.
pub type Result<T> = std::result::Result<T, Error>;

/// Why a call of the operator was refused.
///
/// All variants are from checks before attention computes, queues or changes anything, except [`Error::Candle`], [`Error::Driver`]
/// and [`Error::NoForward`]. The layers have their own errors: [`layers::Error`](crate::layers::Error).
///
/// Converts into [`candle_core::Error`], so `?` works in functions that return Candle's `Result`.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A tensor has the wrong number of axes for its layout.
    #[error("{tensor}: expected {axes}, got {} axes in shape {shape:?}; {}", shape.len(), way_to_rank(axes))]
    Rank {
        /// Name of the tensor.
        tensor: &'static str,
        /// The axes that it should have.
        axes: &'static str,
        /// Its shape.
        shape: Vec<usize>,
    },
    /// An axis has another size than the same axis of another tensor.
    #[error(
        "{tensor}: {axis} must be {expected} as in {other}, got {got} in shape {shape:?}; give both the same {axis}"
    )]
    Axis {
        /// Name of the tensor.
        tensor: &'static str,
        /// Name of the axis.
        axis: &'static str,
        /// Its size.
        got: usize,
        /// The other tensor.
        other: &'static str,
        /// The size of its axis.
        expected: usize,
        /// The whole shape of `tensor`.
        shape: Vec<usize>,
    },
    /// An unsupported element type.
    #[error("{tensor}: dtype {got:?} is not supported (supported: {supported}); convert with to_dtype")]
    DType {
        /// Name of the tensor.
        tensor: &'static str,
        /// Its dtype.
        got: DType,
        /// The supported dtypes.
        supported: &'static str,
    },
    /// An element type without CUDA kernels.
    #[error("{tensor}: dtype {got:?} is not supported on CUDA (supported: F32, F16, BF16); convert q, k and v with to_dtype(DType::F32), or move them with to_device(&Device::Cpu)")]
    CudaDType {
        /// Name of the tensor.
        tensor: &'static str,
        /// Its dtype.
        got: DType,
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
    /// Tensors of one call are on different devices.
    #[error("{tensor}: on device {got:?}, but q is on {expected:?}; move one with to_device")]
    Device {
        /// Name of the tensor.
        tensor: &'static str,
        /// Its device.
        got: DeviceLocation,
        /// The device of q.
        expected: DeviceLocation,
    },
    /// The number of query heads is not a multiple of the number of key heads.
    #[error("num_heads {num_heads} of q is not a multiple of num_heads_k {num_heads_k} of k and v; each key head must serve the same number of query heads")]
    HeadGroups {
        /// Heads of q.
        num_heads: usize,
        /// Heads of k and v.
        num_heads_k: usize,
    },
    /// The shapes do not fit the layout of the call, but they fit the other layout.
    #[error("{error}; if q is {axes}, call .layout(TensorLayout::{layout:?})")]
    SwappedAxes {
        /// The error in the layout of the call.
        error: Box<Error>,
        /// Axes of q in the other layout.
        axes: &'static str,
        /// The other layout.
        layout: TensorLayout,
    },
    /// A fused tensor of q, k and v has no head for q.
    #[error("qkv: {heads} heads in shape {shape:?} are not num_heads + 2 * num_heads_k with num_heads_k {num_heads_k}; the heads of q come first, then k, then v")]
    FusedHeads {
        /// Heads of the tensor.
        heads: usize,
        /// Heads of k, and of v.
        num_heads_k: usize,
        /// Its shape.
        shape: Vec<usize>,
    },
    /// The head dimension is outside the supported range.
    #[error("{name} {head_dim} is not supported (supported: 1 to {max}); choose another num_heads")]
    HeadDim {
        /// `head_dim` of q and k, or `head_dim_v` of v.
        name: &'static str,
        /// Its value, the size of the last axis.
        head_dim: usize,
        /// The largest that is supported.
        max: usize,
    },
    /// The last axis of a tensor is not contiguous.
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
        /// The value.
        f64,
    ),
    /// `softcap` is not a positive finite number.
    #[error("softcap {0} must be finite and above 0; leave it out for no cap")]
    Softcap(
        /// The value.
        f64,
    ),
    /// `softmax_scale` or `softcap` is out of range in the type of the scores, or makes a derived factor infinite there.
    #[error("{name} {value:e} is out of range for {dtype:?}; leave it out for {default}")]
    ScaleRange {
        /// The option.
        name: &'static str,
        /// The value.
        value: f64,
        /// The dtype of q.
        dtype: DType,
        /// The default, without the option.
        default: &'static str,
    },
    /// An ALiBi slope is NaN or infinite. Only slopes on the CPU are checked.
    #[error("alibi_slopes: value {value} at index {index} is not finite; use 0 for no bias")]
    AlibiValue {
        /// The value.
        value: f32,
        /// Its index in the flattened slopes.
        index: usize,
    },
    /// A tensor has more elements than memory can hold.
    #[error("{tensor}: shape {shape:?} has more elements than can be addressed; split the call")]
    TooLarge {
        /// Name of the tensor.
        tensor: &'static str,
        /// Its shape.
        shape: Vec<usize>,
    },
    /// The shape of ALiBi slopes is neither (num_heads) nor (batch, num_heads).
    #[error("alibi_slopes: expected shape [{num_heads}] (num_heads) or [{batch}, {num_heads}] (batch, num_heads), got {shape:?}")]
    AlibiShape {
        /// Heads of q.
        num_heads: usize,
        /// Sequences in the call.
        batch: usize,
        /// Its shape.
        shape: Vec<usize>,
    },
    /// A tensor is tracked for gradients, but the operation computes no gradient for it.
    #[error(
        "{tensor}: tracked for gradients, but {operation} computes no gradient for it; call .detach() if you need none"
    )]
    Tracked {
        /// Name of the tensor.
        tensor: &'static str,
        /// The operation that would drop the gradient.
        operation: &'static str,
    },
    /// Cumulative lengths do not describe a packed batch.
    #[error("cu_seqlens: {rule}, got {got}; {way_out}")]
    CuSeqlens {
        /// The broken rule.
        rule: &'static str,
        /// The values that break it.
        got: String,
        /// The solution.
        way_out: &'static str,
    },
    /// q and k of a packed call have different numbers of sequences.
    #[error(
        "cu_seqlens_k must describe as many sequences as cu_seqlens_q: {batch_q}, got {batch_k}; a length of 0 counts as a sequence"
    )]
    PackedBatch {
        /// Sequences of q.
        batch_q: usize,
        /// Sequences of k and v.
        batch_k: usize,
    },
    /// The cumulative lengths end at another row than the packed tensor.
    #[error("{cu_seqlens} must end at the number of rows of {tensor}: {rows} in shape {shape:?}, got {end}; make the lengths with CuSeqlens::from_lengths from this batch")]
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
    /// The padded length is below the longest sequence.
    #[error("padded: seqlen must be at least the longest length {longest}, got {got} in shape {shape:?}; use the seqlen of the batch that these lengths describe")]
    PaddedSeqlen {
        /// The longest length.
        longest: usize,
        /// The size of axis 1.
        got: usize,
        /// The whole shape.
        shape: Vec<usize>,
    },
    /// A value of a padding mask is neither 0 nor 1.
    #[error("mask: value {value} at row {row}, column {column} is neither 0 nor 1; 1 marks a token and 0 padding")]
    MaskValue {
        /// Index of the sequence.
        row: usize,
        /// Position in it.
        column: usize,
        /// The value.
        value: f64,
    },
    /// A row of a padding mask has padding between tokens or on both sides.
    #[error("mask: the {tokens} tokens of row {row} are not one block at the start or end of its {seqlen} positions; put all padding on one side")]
    MaskHole {
        /// Index of the sequence.
        row: usize,
        /// Its number of tokens.
        tokens: usize,
        /// Positions of each sequence.
        seqlen: usize,
    },
    /// A padding mask has padding on the left in one row and on the right in another row.
    #[error("mask: the padding of row {row} is on the {side}, but that of row {other} is on the {of_other}; pad all rows on one side")]
    MaskSides {
        /// Index of the sequence.
        row: usize,
        /// The side of its padding.
        side: PaddingSide,
        /// Index of an earlier sequence padded on the other side.
        other: usize,
        /// Its padding side.
        of_other: PaddingSide,
    },
    /// The number of key lengths is not the number of sequences.
    #[error("key_lengths: got {got} lengths for a batch of {batch}; give one per sequence")]
    KeyLengthsBatch {
        /// Number of lengths.
        got: usize,
        /// Number of sequences.
        batch: usize,
    },
    /// A key length is larger than `seqlen_k`.
    #[error(
        "key_lengths: length {length} of sequence {sequence} is larger than seqlen_k {seqlen_k}; do not count padding"
    )]
    KeyLength {
        /// Index of the sequence.
        sequence: usize,
        /// Its length.
        length: usize,
        /// The largest allowed length.
        seqlen_k: usize,
    },
    /// A right-padded sequence has fewer valid keys than queries, and a mask or ALiBi needs positions. The last query may
    /// be padding.
    #[error("key_lengths: sequence {sequence} has {length} keys but {seqlen_q} queries, and the mask or ALiBi aligns the last query with the last valid key; if the queries are padded too, use Mask::Causal without key_lengths, or CuSeqlens::from_mask and forward_packed")]
    KeyLengthAlignment {
        /// Index of the sequence.
        sequence: usize,
        /// Its number of valid keys.
        length: usize,
        /// Queries of each sequence.
        seqlen_q: usize,
    },
    /// Key lengths in a packed call.
    #[error("key_lengths: a packed call reads key lengths from cu_seqlens_k; remove key_lengths")]
    KeyLengthsPacked,
    /// ALiBi slopes in a call over one part of the keys.
    #[error("alibi_slopes: attention over one part of the keys does not know how far they are from the queries; leave the slopes out, or use forward_with_lse, which counts distances from the last key of the call")]
    PartialAlibi,
    /// There are no parts to merge.
    #[error("merge: parts is empty; give at least one part")]
    MergeNothing,
    /// A part differs from the first part, or lse does not fit o.
    #[error("merge: {tensor} of part {part} is {got}, expected {expected}; all parts need the same queries, and o must have the result layout of this Attention")]
    MergeMismatch {
        /// Index of the part.
        part: usize,
        /// `o` or `lse`.
        tensor: &'static str,
        /// Its shape, dtype and device.
        got: String,
        /// The expected shape, dtype and device.
        expected: String,
    },
    /// TF32 for a type other than f32.
    #[error(
        "tf32: q, k and v must be F32, got {0:?}; leave the option out, or convert them with to_dtype(DType::F32)"
    )]
    Tf32(
        /// The dtype of q, k and v.
        DType,
    ),
    /// This build has no kernel for this kind of device.
    #[error("no {dtype:?} attention kernel for {device:?} (built: CPU); move q, k and v with to_device(&Device::Cpu)")]
    NoKernel {
        /// The dtype of q.
        dtype: DType,
        /// The device of q.
        device: DeviceLocation,
    },
    /// The GPU is older than all kernels support.
    #[error(
        "compute capability {}.{} of this GPU is not supported (supported: {}.{} and newer); move q, k and v with to_device(&Device::Cpu)",
        got.0, got.1, oldest.0, oldest.1
    )]
    ComputeCap {
        /// Major and minor compute capability of the GPU.
        got: (u32, u32),
        /// The oldest compute capability that a kernel runs on.
        oldest: (u32, u32),
    },
    /// A size is too large for the CUDA kernels.
    #[error("{name} is {got}, but a CUDA kernel takes at most {max}; split the call")]
    CudaSize {
        /// Name of the size.
        name: &'static str,
        /// Its value.
        got: usize,
        /// The largest that is supported.
        max: usize,
    },
    /// No kernel for this head_dim and dtype runs on this GPU.
    #[error(
        "head_dim {head_dim} has no {dtype:?} {pass} kernel for compute capability {}.{} with {shared_bytes_per_block} bytes of shared memory per block ({}); use another head_dim, or move q, k and v with to_device(&Device::Cpu)",
        compute_cap.0, compute_cap.1, if rejected.is_empty() { "none was built".to_string() } else { rejected.join(", ") }
    )]
    NoInstance {
        /// The pass without a kernel: `forward` or `backward`.
        pass: &'static str,
        /// The dtype of q.
        dtype: DType,
        /// The larger of head_dim and head_dim_v, rounded up to whole 16 bytes.
        head_dim: usize,
        /// Major and minor compute capability of the GPU.
        compute_cap: (u32, u32),
        /// Shared memory that one thread block may use.
        shared_bytes_per_block: usize,
        /// Each rejected kernel, and the reason.
        rejected: Vec<String>,
    },
    /// An input is tracked for gradients, but no backward kernel runs on this GPU.
    #[error("{tensor}: tracked for gradients, but {error}; for inference, call .detach() on the inputs")]
    NoBackward {
        /// Name of the tensor.
        tensor: &'static str,
        /// The reason: [`Error::NoInstance`].
        error: Box<Error>,
    },
    /// The driver refused a kernel.
    #[error("{action} {kernel} failed: {cause}; {detail}")]
    Driver {
        /// The failed action, for example `load` or `launch`.
        action: &'static str,
        /// Symbol of the kernel.
        kernel: &'static str,
        /// Name of the driver's error.
        cause: String,
        /// Details of the action.
        detail: String,
    },
    /// An environment variable of this crate has an invalid value.
    #[error("{name} is {value:?}, expected {expected}; correct it or unset it")]
    Environment {
        /// Name of the variable.
        name: &'static str,
        /// Its value.
        value: String,
        /// A description of valid values.
        expected: &'static str,
    },
    /// The backward of an operator ran without its forward.
    #[error("flash_attention: backward found no lse; run the forward of this operator first")]
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

/// The solution for a tensor with the wrong number of axes. `axes` describes the expected axes, for example
/// `(batch, seqlen_q, num_heads, head_dim)`.
fn way_to_rank(axes: &str) -> &'static str {
    // A fused tensor of q, k and v has no packed call, and neither has a tensor with any other axes after the sequences.
    let has_packed_call = axes.split(',').count() > 2 && !axes.contains('+') && !axes.contains("..");
    match axes.split(',').next() {
        Some("(batch") if has_packed_call => "reshape it, or use the packed call for sequences laid end to end",
        Some("(total" | "(total_q" | "(total_k" | "(num_heads" | "(num_heads_k") => {
            "reshape it, or use the padded call for sequences of one length"
        }
        _ => "reshape it",
    }
}
