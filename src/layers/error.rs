//! The errors of the layers: one variant per broken rule of a configuration, of weights or of a call.

use candle_core::{DType, DeviceLocation};

use crate::mask::Mask;

/// The result of the functions of the layers.
pub type Result<T> = std::result::Result<T, Error>;

/// Why a layer was not built, or why a call was refused. A refused call changes nothing, also not the cache.
///
/// Converts into [`candle_core::Error`], so `?` works in functions that return Candle's `Result`. [`crate::Error`] converts
/// into this one, so `?` also works in functions that call the operator and the layers.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A size of a layer is 0.
    #[error("{name} is 0; a layer needs at least 1")]
    Size {
        /// Name of the size.
        name: &'static str,
    },
    /// `embed_dim` is not a multiple of `num_heads`, and `head_dim` is not set.
    #[error("embed_dim {embed_dim} is not a multiple of num_heads {num_heads}; set head_dim")]
    HeadDimUnset {
        /// Size of the layer's input.
        embed_dim: usize,
        /// Heads of q.
        num_heads: usize,
    },
    /// The weights of a layer would be too large for any memory.
    #[error("embed_dim {embed_dim}, num_heads {num_heads}, num_heads_k {num_heads_k}, head_dim {head_dim}: the weights would be larger than any memory; choose smaller sizes")]
    TooLarge {
        /// Size of the layer's input.
        embed_dim: usize,
        /// Heads of q.
        num_heads: usize,
        /// Heads of k and v.
        num_heads_k: usize,
        /// Size of each head.
        head_dim: usize,
    },
    /// The biases of q, k and v differ, but a fused projection has one bias for all three, or none.
    #[error("q_bias {q_bias}, k_bias {k_bias}, v_bias {v_bias} differ, but a fused projection has one bias for all three; use Projections::Separate")]
    FusedBias {
        /// Whether q has a bias.
        q_bias: bool,
        /// Whether k has a bias.
        k_bias: bool,
        /// Whether v has a bias.
        v_bias: bool,
    },
    /// ALiBi slopes of a layer are not one per head. A layer takes batches of any size, so it has no slopes per sequence.
    #[error("alibi_slopes: a layer takes one slope per head, shape [{num_heads}] (num_heads), got {shape:?}; for slopes per sequence use Attention")]
    AlibiShape {
        /// Heads of q.
        num_heads: usize,
        /// The shape of the slopes.
        shape: Vec<usize>,
    },
    /// The configuration of a layer has key lengths. They belong to one batch, but a layer takes many batches.
    #[error("key_lengths: a layer cannot store the lengths of one batch; remove key_lengths, and for padded batches unpad with CuSeqlens and call forward_packed")]
    KeyLengths,
    /// The `VarBuilder` of a layer has an unsupported dtype.
    #[error("weights: dtype {got:?} of the VarBuilder is not supported (supported: {supported}); build it with one of these")]
    WeightDType {
        /// The dtype of the builder.
        got: DType,
        /// The supported dtypes.
        supported: &'static str,
    },
    /// Two projections of a layer have the same name.
    #[error("projections {first} and {second} have the same name {name:?} and would share weights; give them different names, or map the names with VarBuilder::rename_f if sharing is intended")]
    ProjectionName {
        /// The role of one projection: `q`, `k`, `v`, `qkv` or `o`.
        first: &'static str,
        /// The role of the other one.
        second: &'static str,
        /// The name of both.
        name: String,
    },
    /// A weight of the configuration is missing, but there are weights with other known names.
    #[error("{missing}: not found, but the VarBuilder has {}; set the names with .projections(..), or add {allow} to ignore {}", tensors.join(", "), it_or_them(tensors))]
    OtherProjections {
        /// The weight that the configuration names.
        missing: String,
        /// The weights that the builder has.
        tensors: Vec<String>,
        /// The builder calls that ignore them, as text.
        allow: String,
    },
    /// The `VarBuilder` has biases that the configuration does not use.
    #[error("{}: the VarBuilder has {it}, but the configuration does not use {it}; add {add} to use {it}, or {allow} to ignore {it}", tensors.join(", "), it = it_or_them(tensors))]
    UnusedBiases {
        /// The biases that the builder has.
        tensors: Vec<String>,
        /// The builder calls that use them, as text.
        add: String,
        /// The builder calls that ignore them, as text.
        allow: String,
    },
    /// The `VarBuilder` has known tensors that change the result of attention, but that the layer cannot apply.
    #[error("{}: the VarBuilder has {it}, but the layer cannot apply {it}; fold scales or LoRA into the weights, apply norms or sinks yourself around Attention, or add {allow} to ignore {it}", tensors.join(", "), it = it_or_them(tensors))]
    UnusedTensors {
        /// The tensors that the builder has.
        tensors: Vec<String>,
        /// The builder calls that ignore them, as text.
        allow: String,
    },
    /// The input of a layer has another element type than its weights.
    #[error("xs: dtype {got:?} differs from the weights' {expected:?}; convert with to_dtype")]
    InputDType {
        /// The dtype of the input.
        got: DType,
        /// The dtype of the weights.
        expected: DType,
    },
    /// The input of a layer is on another device than its weights.
    #[error("xs: on device {got:?}, but the weights are on {expected:?}; move it with to_device")]
    InputDevice {
        /// The device of the input.
        got: DeviceLocation,
        /// The device of the weights.
        expected: DeviceLocation,
    },
    /// `rotary_dim` is not a number of pairs.
    #[error("rotary_dim {rotary_dim} must be even and above 0, because pairs of values are rotated")]
    RotaryDim {
        /// The value.
        rotary_dim: usize,
    },
    /// The rotary tables would be larger than their limit.
    #[error("rotary tables for max_seqlen {max_seqlen} and rotary_dim {rotary_dim} would hold more than {limit} values each; set max_seqlen to the longest sequence in use")]
    RotaryTables {
        /// Number of positions in the tables.
        max_seqlen: usize,
        /// Number of values of a head that rotate.
        rotary_dim: usize,
        /// The largest number of values.
        limit: usize,
    },
    /// `theta` of a rotary embedding is not a positive finite number.
    #[error("theta {0} of the rotary embedding must be finite and above 0; leave it out for 10000")]
    RotaryTheta(
        /// The value.
        f64,
    ),
    /// The number of frequencies of a rotary embedding is not its number of pairs.
    #[error("frequencies of the rotary embedding: got {got}, but rotary_dim {rotary_dim} has {} pairs", rotary_dim / 2)]
    RotaryFrequencies {
        /// Number of frequencies.
        got: usize,
        /// Number of values of a head that rotate.
        rotary_dim: usize,
    },
    /// A frequency of a rotary embedding is NaN or infinite.
    #[error("frequency {got} of pair {pair} of the rotary embedding is not finite")]
    RotaryFrequency {
        /// Index of the pair.
        pair: usize,
        /// The value.
        got: f64,
    },
    /// A rotary embedding rotates more values than a head has.
    #[error(
        "rotary_dim {rotary_dim} is larger than head_dim {head_dim}; build Rotary with rotary_dim {head_dim} or less"
    )]
    RotaryHeadDim {
        /// Number of values of a head that rotate.
        rotary_dim: usize,
        /// Size of each head.
        head_dim: usize,
    },
    /// A position is past the end of the rotary tables.
    #[error("positions {start}..{end} reach past the rotary tables' max_seqlen {max_seqlen}; build Rotary with at least {end}")]
    RotaryPositions {
        /// The first position.
        start: usize,
        /// The last position plus one.
        end: usize,
        /// Number of positions in the tables.
        max_seqlen: usize,
    },
    /// The rotary tables are on another device than the tensors that they rotate.
    #[error("rotary: tables on device {got:?}, but q and k are on {expected:?}; build Rotary there")]
    RotaryDevice {
        /// The device of the tables.
        got: DeviceLocation,
        /// The device of q and k.
        expected: DeviceLocation,
    },
    /// A tensor is tracked for gradients, but writes to a KV cache drop them.
    #[error("{tensor}: tracked for gradients, which the KV cache would drop; {way_out}, or train with forward")]
    TrackedDecoding {
        /// Name of the tensor.
        tensor: String,
        /// The solution.
        way_out: &'static str,
    },
    /// The mask of a layer shows later keys, but a KV cache does not hold them yet.
    #[error("mask {mask:?} shows a query later keys, which the KV cache does not hold yet; use Mask::Causal or a window with right: Some(0)")]
    DecodingMask {
        /// The mask of the layer.
        mask: Mask,
    },
    /// A KV cache grows along another axis than the tokens.
    #[error("cache of {tensor} grows along axis {axis}, but the tokens of (batch, seqlen, num_heads_k, head_dim) are on axis 1; make it with new_cache")]
    CacheAxis {
        /// k or v.
        tensor: &'static str,
        /// The axis along which it grows.
        axis: usize,
    },
    /// A KV cache of size 0, which cannot grow.
    #[error("cache of {tensor} has max_seq_len 0 and cannot grow; make it with room for 1 token or more")]
    CacheCapacity {
        /// k or v.
        tensor: &'static str,
    },
    /// The two halves of a KV cache hold different numbers of tokens.
    #[error("cache holds {k} tokens of k, but {v} of v; call .reset() and begin again")]
    CacheLengths {
        /// Tokens of k.
        k: usize,
        /// Tokens of v.
        v: usize,
    },
    /// A KV cache holds another batch, or heads of another layer.
    #[error("cache of {tensor} holds {got}, but this call adds {expected}; call .reset() or use another cache")]
    CacheMismatch {
        /// k or v.
        tensor: &'static str,
        /// Shape, dtype and device of its content.
        got: String,
        /// Shape, dtype and device of the keys or values that the call adds.
        expected: String,
    },
    /// An error of the operator.
    #[error(transparent)]
    Operator(#[from] crate::Error),
    /// An error of Candle itself.
    #[error(transparent)]
    Candle(#[from] candle_core::Error),
}

impl From<Error> for candle_core::Error {
    fn from(error: Error) -> Self {
        match error {
            Error::Operator(inner) => inner.into(),
            Error::Candle(inner) => inner,
            // Not `Error::wrap`: that appends a backtrace to the text when RUST_BACKTRACE is set.
            other => Self::Wrapped(Box::new(other)),
        }
    }
}

/// The pronoun for one or more tensors.
fn it_or_them(tensors: &[String]) -> &'static str {
    match tensors.len() {
        1 => "it",
        _ => "them",
    }
}
