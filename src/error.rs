//! One variant per way to be wrong. Each text names the tensor, the rule, what came and the way out.

use candle_core::{DType, DeviceLocation};

use crate::layout::{PaddingSide, TensorLayout};

/// What the functions of the operator return.
pub type Result<T> = std::result::Result<T, Error>;

/// Why a call of the operator was refused. All but [`Error::Candle`] come from checks of the arguments, before attention
/// computes, queues or changes anything. The layers have errors of their own: [`layers::Error`](crate::layers::Error).
///
/// Converts into [`candle_core::Error`], so `?` works in functions that return Candle's `Result`.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A tensor has another number of axes than its layout asks for.
    #[error("{tensor}: expected {axes}, got {} axes in shape {shape:?}; {}", shape.len(), way_to_rank(axes))]
    Rank {
        /// Name of the tensor.
        tensor: &'static str,
        /// The axes that it should have.
        axes: &'static str,
        /// The shape that came.
        shape: Vec<usize>,
    },
    /// One axis disagrees with the same axis of another tensor.
    #[error("{tensor}: {axis} must be {expected} as in {other}, got {got} in shape {shape:?}")]
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
    #[error("num_heads {num_heads} of q is not a multiple of num_heads_k {num_heads_k} of k and v; each key head serves equally many query heads")]
    HeadGroups {
        /// Heads of q.
        num_heads: usize,
        /// Heads of k and v.
        num_heads_k: usize,
    },
    /// The shapes do not fit the layout of the call, but fit the other layout.
    #[error("{error}; if q is {axes}, call .layout(TensorLayout::{layout:?})")]
    SwappedAxes {
        /// The error in the layout of the call.
        error: Box<Error>,
        /// Axes of q in the other layout.
        axes: &'static str,
        /// The other layout.
        layout: TensorLayout,
    },
    /// A tensor of q, k and v in one has no head left for q.
    #[error("qkv: {heads} heads in shape {shape:?} are not num_heads + 2 * num_heads_k with num_heads_k {num_heads_k}; q's come first, then k's, then v's")]
    FusedHeads {
        /// Heads of the tensor.
        heads: usize,
        /// Heads of k, and of v.
        num_heads_k: usize,
        /// The shape that came.
        shape: Vec<usize>,
    },
    /// The head dimension is outside the supported range.
    #[error("head_dim {head_dim} is not supported (supported: 1 to {max}); choose num_heads so that it is")]
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
    /// A factor of the scores that is infinite, or makes others so, in the type that scores are computed in.
    #[error("{name} {value:e} is out of range for {dtype:?}; leave it out for {default}")]
    ScaleRange {
        /// The option.
        name: &'static str,
        /// The value that came.
        value: f64,
        /// The dtype of q.
        dtype: DType,
        /// What holds without the option.
        default: &'static str,
    },
    /// An ALiBi slope that is NaN or infinite; checked for slopes on the CPU alone.
    #[error("alibi_slopes: value {value} at index {index} is not finite; 0 stands for no bias")]
    AlibiValue {
        /// The value.
        value: f32,
        /// Its index in the flattened slopes.
        index: usize,
    },
    /// A tensor with more elements than memory can hold.
    #[error("{tensor}: shape {shape:?} has more elements than can be addressed; split the call")]
    TooLarge {
        /// Name of the tensor.
        tensor: &'static str,
        /// Its shape.
        shape: Vec<usize>,
    },
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
    #[error("cu_seqlens: {rule}, got {got}; {way_out}")]
    CuSeqlens {
        /// The rule that is broken.
        rule: &'static str,
        /// The values that break it.
        got: String,
        /// What to do.
        way_out: &'static str,
    },
    /// The two sides of a packed call hold different numbers of sequences.
    #[error(
        "cu_seqlens_k must describe as many sequences as cu_seqlens_q: {batch_q}, got {batch_k}; lengths of 0 count"
    )]
    PackedBatch {
        /// Sequences of q.
        batch_q: usize,
        /// Sequences of k and v.
        batch_k: usize,
    },
    /// The cumulative lengths end at another row than the packed tensor.
    #[error("{cu_seqlens} must end at the number of rows of {tensor}: {rows} in shape {shape:?}, got {end}")]
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
    /// A batch padded to less than its longest sequence.
    #[error("padded: seqlen must be at least the longest length {longest}, got {got} in shape {shape:?}")]
    PaddedSeqlen {
        /// The longest length.
        longest: usize,
        /// The size of axis 1.
        got: usize,
        /// The whole shape.
        shape: Vec<usize>,
    },
    /// A value of a padding mask that is neither 0 nor 1.
    #[error("mask: value {value} at row {row}, column {column} is neither 0 nor 1; 1 marks a token and 0 padding")]
    MaskValue {
        /// Index of the sequence.
        row: usize,
        /// Position in it.
        column: usize,
        /// The value that came.
        value: f64,
    },
    /// A padding mask with padding between tokens or on both sides.
    #[error("mask: the {tokens} tokens of row {row} are not one block at the start or end of its {seqlen} positions; put all padding on one side")]
    MaskHole {
        /// Index of the sequence.
        row: usize,
        /// Its number of tokens.
        tokens: usize,
        /// Positions of each sequence.
        seqlen: usize,
    },
    /// A padding mask with padding on the left in one row and on the right in another.
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
    /// Key lengths on a packed call.
    #[error("key_lengths: a packed call reads key lengths from cu_seqlens_k; remove key_lengths")]
    KeyLengthsPacked,
    /// ALiBi over one part of the keys.
    #[error("alibi_slopes: attention over one part of the keys does not know how far they are from the queries; leave the slopes out, or use forward_with_lse, whose distances count from the last key given")]
    PartialAlibi,
    /// No part to merge.
    #[error("merge: parts is empty; give at least one part")]
    MergeNothing,
    /// A part differs from the first part, or lse does not fit o.
    #[error("merge: {tensor} of part {part} is {got}, expected {expected}; all parts need the same queries, and o the result layout of this Attention")]
    MergeMismatch {
        /// Index of the part.
        part: usize,
        /// `o` or `lse`.
        tensor: &'static str,
        /// Shape, dtype and device that came.
        got: String,
        /// Shape, dtype and device that would fit.
        expected: String,
    },
    /// No kernel was built for this kind of device.
    #[error("no {dtype:?} attention kernel for {device:?} (built: CPU); move q, k and v with to_device(&Device::Cpu)")]
    NoKernel {
        /// The dtype of q.
        dtype: DType,
        /// The device of q.
        device: DeviceLocation,
    },
    /// The GPU is older than every kernel.
    #[error(
        "compute capability {}.{} of this GPU is not supported (supported: {}.{} and newer); move q, k and v with to_device(&Device::Cpu)",
        got.0, got.1, oldest.0, oldest.1
    )]
    ComputeCap {
        /// Major and minor compute capability of the GPU.
        got: (u32, u32),
        /// The oldest that a kernel runs on.
        oldest: (u32, u32),
    },
    /// The head dimension has no CUDA kernel.
    #[error(
        "head_dim {head_dim} is not supported on CUDA (supported: multiples of 8 up to {max}); pad or split the heads"
    )]
    CudaHeadDim {
        /// Size of the last axis of q.
        head_dim: usize,
        /// The largest that is supported.
        max: usize,
    },
    /// Rows of a tensor do not begin at multiples of 16 bytes, which the CUDA kernels read at once.
    #[error(
        "{tensor}: rows must begin at multiples of 8 elements on CUDA, got offset {offset} and strides {strides:?} of (batch, row, head); call .force_contiguous()"
    )]
    Alignment {
        /// Name of the tensor.
        tensor: &'static str,
        /// Where its first element lies in its storage.
        offset: usize,
        /// Its strides from one sequence, row and head to the next.
        strides: [usize; 3],
    },
    /// Rows too far apart for the CUDA kernels.
    #[error(
        "{tensor}: rows are {got} elements apart, but a CUDA kernel takes at most {max}; call .force_contiguous()"
    )]
    CudaRowStride {
        /// Name of the tensor.
        tensor: &'static str,
        /// Its stride from one row to the next.
        got: usize,
        /// The largest that is supported.
        max: usize,
    },
    /// A size that the CUDA kernels cannot count.
    #[error("{name} is {got}, but a CUDA kernel takes at most {max}; split the call")]
    CudaSize {
        /// Name of the size.
        name: &'static str,
        /// Its value.
        got: usize,
        /// The largest that is supported.
        max: usize,
    },
    /// No kernel of the table fits this GPU.
    #[error(
        "head_dim {head_dim} has no {dtype:?} {pass} kernel for compute capability {}.{} with {shared_bytes_per_block} bytes of shared memory a block ({}); use another head_dim, or move q, k and v with to_device(&Device::Cpu)",
        compute_cap.0, compute_cap.1, if rejected.is_empty() { "none was built".to_string() } else { rejected.join(", ") }
    )]
    NoInstance {
        /// What the kernel would compute: `forward` or `backward`.
        pass: &'static str,
        /// The dtype of q.
        dtype: DType,
        /// Size of the last axis of q.
        head_dim: usize,
        /// Major and minor compute capability of the GPU.
        compute_cap: (u32, u32),
        /// Shared memory that one thread block may ask for.
        shared_bytes_per_block: usize,
        /// Each kernel that was considered, and why it does not fit.
        rejected: Vec<String>,
    },
    /// An input is tracked for gradients, but no kernel of the backward fits this GPU.
    #[error("{tensor}: tracked for gradients, but {error}; for inference alone, call .detach() on the inputs")]
    NoBackward {
        /// Name of the tensor.
        tensor: &'static str,
        /// Why no kernel fits: [`Error::NoInstance`].
        error: Box<Error>,
    },
    /// The driver refused a kernel.
    #[error("{action} {kernel} failed: {cause}; {detail}")]
    Driver {
        /// `load`, `launch` or what else it was to do for the kernel.
        action: &'static str,
        /// Symbol of the kernel.
        kernel: &'static str,
        /// Name of the driver's error.
        cause: String,
        /// What was asked for.
        detail: String,
    },
    /// An environment variable of this crate holds what it cannot.
    #[error("{name} is {value:?}, expected {expected}")]
    Environment {
        /// Name of the variable.
        name: &'static str,
        /// Its value.
        value: String,
        /// What it should be.
        expected: &'static str,
    },
    /// The backward ran on an operator whose forward never did.
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

/// What to do about a tensor that does not have the axes of a description such as `(batch, seqlen_q, num_heads, head_dim)`.
fn way_to_rank(axes: &str) -> &'static str {
    // One tensor of q, k and v has no packed call.
    let of_heads = (axes.contains("num_heads") || axes.contains("embed_dim")) && !axes.contains('+');
    match axes.split(',').next() {
        Some("(batch") if of_heads => "reshape it, or use the packed call for sequences laid end to end",
        Some("(total" | "(total_q" | "(total_k" | "(num_heads" | "(num_heads_k") => {
            "reshape it, or use the padded call for sequences of one length"
        }
        _ => "reshape it",
    }
}
