//! The multi-head attention layer.

use candle_core::{Tensor, D};
use candle_nn::kv_cache::{Cache, KvCache};
use candle_nn::{Module, VarBuilder};

use super::checks::{check_packed_rows, check_rank};
use super::config::{MultiHeadAttentionConfig, Projections, QkvOrder};
use super::error::{Error, Result};
use super::projection::Projection;
use super::rotary::{Rotary, RotaryRows};
use super::unused;
use crate::attention::Attention;
use crate::layout::TensorLayout;
use crate::mask::Mask;
use crate::packed::CuSeqlens;
use crate::problem::{is_float, split_qkv, FLOAT_DTYPES};

/// The axis of tokens in `(batch, seqlen, num_heads_k, head_dim)`, along which a cache grows.
const SEQLEN_AXIS: usize = 1;

/// Multi-head self-attention: projects `xs` to q, k and v, rotates q and k by their positions, computes attention, and
/// projects the output back to `embed_dim`.
///
/// ```text
/// xs (batch, seqlen, embed_dim)
///   -> q (batch, seqlen, num_heads, head_dim)       k, v (batch, seqlen, num_heads_k, head_dim)
///   -> rotary embedding of q and k, if any
///   -> o (batch, seqlen, num_heads, head_dim)       fused: no seqlen x seqlen scores are stored
///   -> result (batch, seqlen, embed_dim)
/// ```
///
/// | call | `xs` | gradients |
/// | --- | --- | --- |
/// | [`forward`](Self::forward), Candle's [`Module`] | `(batch, seqlen, embed_dim)` | `xs` and every weight and bias |
/// | [`forward_packed`](Self::forward_packed) | `(total, embed_dim)`, sequences end to end | `xs` and every weight and bias |
/// | [`forward_cached`](Self::forward_cached) | `(batch, new tokens, embed_dim)` | none: tracked input is refused |
///
/// `xs` must have the dtype and the device of the weights.
///
/// # Padded batches
///
/// The layer takes no padding mask. Use one of these calls instead:
///
/// | batch | call |
/// | --- | --- |
/// | padding on the right, [`Mask::Causal`] | [`forward`](Self::forward); ignore the results at the padding |
/// | any other padding or mask | [`CuSeqlens::from_mask`], [`unpad`](CuSeqlens::unpad), [`forward_packed`](Self::forward_packed), [`pad_to`](CuSeqlens::pad_to) |
/// | decoding | [`forward_cached`](Self::forward_cached) with prompts of one length |
///
/// In the first row no token sees the padding, because the padding comes later. In the second row `unpad` removes the
/// padding, so the positions of each sequence begin at 0, with padding on the left too:
///
/// ```
/// # use candle_core::{DType, Device, Tensor};
/// # use candle_nn::VarBuilder;
/// # use candle_fa2::{CuSeqlens, Mask};
/// # use candle_fa2::layers::{MultiHeadAttention, MultiHeadAttentionConfig};
/// # let config = MultiHeadAttentionConfig::new(64, 4).mask(Mask::Causal);
/// # let layer = MultiHeadAttention::new(&config, VarBuilder::zeros(DType::F32, &Device::Cpu))?;
/// let xs = Tensor::randn(0f32, 1f32, (2, 3, 64), &Device::Cpu)?; // (batch, seqlen, embed_dim)
/// let mask = Tensor::new(&[[0u8, 1, 1], [0, 0, 1]], &Device::Cpu)?; // 1 for a token, 0 for padding
/// let (cu_seqlens, side) = CuSeqlens::from_mask(&mask)?;
/// let packed = layer.forward_packed(&cu_seqlens.unpad(&xs, side)?, &cu_seqlens)?; // (3 tokens, embed_dim)
/// let ys = cu_seqlens.pad_to(&packed, 3, side)?; // 0 at the padding
/// assert_eq!(ys.dims(), xs.dims());
/// # Ok::<(), candle_fa2::layers::Error>(())
/// ```
///
/// # Examples
///
/// The [module's page](crate::layers) has an example of training and decoding. Weights of GPT-2 load without conversion:
///
/// ```
/// # use std::collections::HashMap;
/// # use candle_core::{DType, Device, Tensor};
/// # use candle_nn::VarBuilder;
/// use candle_fa2::layers::{MultiHeadAttention, MultiHeadAttentionConfig};
///
/// # let device = Device::Cpu;
/// # let normal = |shape: &[usize]| Tensor::randn(0f32, 0.02, shape, &device);
/// # let tensors = HashMap::from([
/// #     ("h.0.attn.c_attn.weight".to_string(), normal(&[768, 3 * 768])?),
/// #     ("h.0.attn.c_attn.bias".to_string(), normal(&[3 * 768])?),
/// #     ("h.0.attn.c_proj.weight".to_string(), normal(&[768, 768])?),
/// #     ("h.0.attn.c_proj.bias".to_string(), normal(&[768])?),
/// # ]);
/// # let vb = VarBuilder::from_tensors(tensors, DType::F32, &device);
/// // vb: VarBuilder::from_mmaped_safetensors(&["model.safetensors"], DType::F32, &device)
/// let layer = MultiHeadAttention::new(&MultiHeadAttentionConfig::gpt2(768, 12), vb.pp("h.0.attn"))?;
/// # assert_eq!(layer.forward(&normal(&[1, 4, 768])?)?.dims(), [1, 4, 768]);
/// # Ok::<(), candle_fa2::layers::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct MultiHeadAttention {
    embed_dim: usize,
    num_heads: usize,
    num_heads_k: usize,
    head_dim: usize,
    qkv: QkvProjection,
    o: Projection,
    attention: Attention,
    rotary: Option<Rotary>,
}

/// The projections to q, k and v.
#[derive(Clone, Debug)]
enum QkvProjection {
    Separate { q: Projection, k: Projection, v: Projection },
    Fused { qkv: Projection, order: QkvOrder },
}

impl MultiHeadAttention {
    /// Loads the weights that `config` names from `vb`, or draws them if `vb` makes new variables.
    ///
    /// The layer looks below the prefix of `vb` for tensors that change the result but that `config` does not use. Examples
    /// are an unconfigured bias, norms of q and k, attention sinks, and scales of quantized weights. If it finds one, it
    /// returns an error; [`MultiHeadAttentionConfig::allow_unused`] allows it. It finds known names only, because a
    /// `VarBuilder` cannot list its names. It ignores buffers of masks and rotary embeddings (`bias`, `masked_bias`,
    /// `rotary_emb.inv_freq`), because it computes them itself.
    ///
    /// # Errors
    /// In the configuration:
    /// - sizes: [`Error::Size`], [`Error::TooLarge`], [`Error::HeadDimUnset`], [`HeadDim`](crate::Error::HeadDim),
    ///   [`HeadGroups`](crate::Error::HeadGroups), [`Error::RotaryHeadDim`];
    /// - projections: [`Error::FusedBias`], [`Error::ProjectionName`];
    /// - options of the operator: [`Error::AlibiShape`], [`Error::KeyLengths`], and those of
    ///   [`Attention::supports`] for scale, softcap and slopes.
    ///
    /// In the weights of `vb`:
    /// - [`Error::WeightDType`] if the layer does not support the dtype of `vb`;
    /// - [`Error::RotaryDevice`] if the rotary tables are on another device;
    /// - [`Error::OtherProjections`], [`Error::UnusedBiases`] or [`Error::UnusedTensors`] if `vb` has known tensors that the
    ///   layer would not use;
    /// - an error of Candle if a weight is missing or has another shape.
    pub fn new(config: &MultiHeadAttentionConfig, vb: VarBuilder) -> Result<Self> {
        let (num_heads_k, head_dim) = config.resolve()?;
        let (embed_dim, num_heads) = (config.embed_dim, config.num_heads);
        let (q_dim, k_dim) = (num_heads * head_dim, num_heads_k * head_dim);
        if !is_float(vb.dtype()) {
            return Err(Error::WeightDType { got: vb.dtype(), supported: FLOAT_DTYPES });
        }
        if let Some(rotary) = &config.rotary {
            let (got, expected) = (rotary.device().location(), vb.device().location());
            if got != expected {
                return Err(Error::RotaryDevice { got, expected });
            }
        }
        // Check the options of the operator with q and k of one token, so that a bad option fails here and not in the first forward.
        // The token has only one head in memory, and broadcasting repeats it.
        let head = Tensor::zeros((1, 1, 1, head_dim), vb.dtype(), vb.device())?;
        let q = head.broadcast_as((1, 1, num_heads, head_dim))?;
        let k = head.broadcast_as((1, 1, num_heads_k, head_dim))?;
        // The layer creates q, k and v itself, always in Bshd. So it ignores the layout options of the caller.
        let attention = config.attention.clone().layout(TensorLayout::Bshd).output_layout(TensorLayout::Bshd);
        attention.supports(&q, &k, &k)?;
        unused::check(config, &vb)?;

        let load = |name: &str, in_dim, out_dim, bias| Projection::new(config, name, in_dim, out_dim, bias, &vb);
        let (qkv, o) = match &config.projections {
            Projections::Separate { q, k, v, o } => {
                let q = load(q, embed_dim, q_dim, config.q_bias)?;
                let k = load(k, embed_dim, k_dim, config.k_bias)?;
                let v = load(v, embed_dim, k_dim, config.v_bias)?;
                (QkvProjection::Separate { q, k, v }, o)
            }
            Projections::Fused { qkv, o, order } => {
                let qkv = load(qkv, embed_dim, q_dim + 2 * k_dim, config.q_bias)?;
                // With one key head both orders are the same. Concatenated avoids a split.
                let order = if num_heads_k == 1 { QkvOrder::Concatenated } else { *order };
                (QkvProjection::Fused { qkv, order }, o)
            }
        };
        let o = load(o, q_dim, embed_dim, config.o_bias)?;
        let rotary = config.rotary.clone();
        Ok(Self { embed_dim, num_heads, num_heads_k, head_dim, qkv, o, attention, rotary })
    }

    /// Attention over whole sequences: `xs` and the result are `(batch, seqlen, embed_dim)`. Positions begin at 0.
    ///
    /// Gradients flow to `xs` and to every weight and bias.
    ///
    /// # Errors
    /// [`Rank`](crate::Error::Rank), [`Axis`](crate::Error::Axis), [`Error::InputDType`] or [`Error::InputDevice`] if `xs`
    /// does not fit the layer, [`Error::RotaryPositions`] if `seqlen` is longer than the rotary tables.
    pub fn forward(&self, xs: &Tensor) -> Result<Tensor> {
        self.check_input(xs, "(batch, seqlen, embed_dim)")?;
        if let (QkvProjection::Fused { qkv, order: QkvOrder::Concatenated }, None) = (&self.qkv, &self.rotary) {
            let heads = self.fused_heads(qkv, xs)?;
            return self.project_back(&self.attention.forward_qkv(&heads, self.num_heads_k)?);
        }
        let rows = self.rotary.as_ref().map(|rotary| rotary.rows(0, xs.dims()[SEQLEN_AXIS])).transpose()?;
        let (q, k, v) = self.project(xs, rows.as_ref())?;
        self.project_back(&self.attention.forward(&q, &k, &v)?)
    }

    /// Attention over packed sequences: `xs` and the result are `(total, embed_dim)`. `cu_seqlens` says where each sequence
    /// begins and ends. No sequence sees another one. Positions begin at 0 in each sequence.
    ///
    /// Gradients flow to `xs` and to every weight and bias.
    ///
    /// ```
    /// # use candle_core::{DType, Device, Tensor};
    /// # use candle_nn::{VarBuilder, VarMap};
    /// # use candle_fa2::{CuSeqlens, Mask};
    /// # use candle_fa2::layers::{MultiHeadAttention, MultiHeadAttentionConfig};
    /// # let varmap = VarMap::new();
    /// # let vb = VarBuilder::from_varmap(&varmap, DType::F32, &Device::Cpu);
    /// let layer = MultiHeadAttention::new(&MultiHeadAttentionConfig::new(64, 4).mask(Mask::Causal), vb)?;
    /// let cu_seqlens = CuSeqlens::from_lengths(&[3, 7, 2], &Device::Cpu)?;
    /// let xs = Tensor::randn(0f32, 1f32, (12, 64), &Device::Cpu)?;
    /// assert_eq!(layer.forward_packed(&xs, &cu_seqlens)?.dims(), [12, 64]);
    /// # Ok::<(), candle_fa2::layers::Error>(())
    /// ```
    ///
    /// # Errors
    /// As [`Self::forward`], and [`PackedRows`](crate::Error::PackedRows) if `cu_seqlens` does not end at `total`.
    pub fn forward_packed(&self, xs: &Tensor, cu_seqlens: &CuSeqlens) -> Result<Tensor> {
        self.check_input(xs, "(total, embed_dim)")?;
        check_packed_rows(xs, cu_seqlens)?;
        let rows = self.rotary.as_ref().map(|rotary| rotary.rows_packed(cu_seqlens)).transpose()?;
        let (q, k, v) = self.project(xs, rows.as_ref())?;
        self.project_back(&self.attention.forward_packed(&q, &k, &v, cu_seqlens, cu_seqlens)?)
    }

    /// Attention of the new tokens in `xs` over themselves and over all tokens of earlier calls with this `cache`.
    ///
    /// `xs` and the result are `(batch, new tokens, embed_dim)`, with one or more new tokens. The first new token has
    /// position `cache.current_seq_len()`.
    ///
    /// A sequence may be split into calls in any way. The results equal those of one [`Self::forward`] over the whole
    /// sequence, up to rounding.
    ///
    /// Each layer needs its own cache ([`Self::new_cache`]). `cache.reset()` begins a new sequence. A clone of a cache shares
    /// its storage, so append to only one of the two.
    ///
    /// The cache has one length for the whole batch. So all prompts of a batch need the same length, without padding.
    ///
    /// This call is for decoding only. Autograd does not track writes to a cache, so tracked input is refused. Use
    /// [`Self::detach`] after training. After an error the cache is as it was before the call.
    ///
    /// # Errors
    /// - [`Error::TrackedDecoding`] if `xs` or a weight is tracked for gradients;
    /// - [`Error::DecodingMask`] if the mask lets a query see later keys, because the cache does not hold them yet. Use
    ///   [`Mask::Causal`] or a window whose `right` is `Some(0)`;
    /// - [`Error::CacheAxis`], [`Error::CacheCapacity`], [`Error::CacheLengths`] or [`Error::CacheMismatch`] if the cache
    ///   was made for another layer, batch or layout;
    /// - the errors of [`Self::forward`]; the rotary tables must cover the length of the cache plus the new tokens.
    pub fn forward_cached(&self, xs: &Tensor, cache: &mut KvCache) -> Result<Tensor> {
        self.check_input(xs, "(batch, seqlen, embed_dim)")?;
        self.check_decoding(xs)?;
        self.check_cache(xs, cache)?;
        if xs.elem_count() == 0 {
            return Ok(xs.clone());
        }
        let seqlen = xs.dims()[SEQLEN_AXIS];
        let offset = cache.current_seq_len();
        let rows = self.rotary.as_ref().map(|rotary| rotary.rows(offset, seqlen)).transpose()?;
        let (q, k, v) = self.project(xs, rows.as_ref())?;
        // The clone shares the storage and keeps the old lengths. Nothing reads past a length, so the clone restores the cache.
        let before = cache.clone();
        self.attend_cached(&q, &k, &v, cache).inspect_err(|_| *cache = before)
    }

    /// Appends k and v to the cache, computes attention, and projects the output back.
    fn attend_cached(&self, q: &Tensor, k: &Tensor, v: &Tensor, cache: &mut KvCache) -> Result<Tensor> {
        // The cache takes only contiguous tensors. k and v are views if the projection is fused.
        let (k, v) = cache.append(&k.contiguous()?, &v.contiguous()?)?;
        self.project_back(&self.attention.forward(q, &k, &v)?)
    }

    /// The same layer with weights that are not tracked for gradients. [`Self::forward_cached`] needs it, after training or
    /// between training steps.
    ///
    /// Nothing is copied. Both layers share the storage of the weights. So if an optimizer updates the variables of a
    /// `VarMap`, the detached layer has the new values too.
    pub fn detach(&self) -> Self {
        let qkv = match &self.qkv {
            QkvProjection::Separate { q, k, v } => {
                QkvProjection::Separate { q: q.detach(), k: k.detach(), v: v.detach() }
            }
            QkvProjection::Fused { qkv, order } => QkvProjection::Fused { qkv: qkv.detach(), order: *order },
        };
        Self { qkv, o: self.o.detach(), ..self.clone() }
    }

    /// An empty cache for [`Self::forward_cached`], with room for `max_seqlen` tokens.
    ///
    /// A full cache grows by `max_seqlen` tokens, and Candle then copies all of it. `max_seqlen` must be at least 1: a cache
    /// of size 0 cannot grow, and `forward_cached` refuses it.
    pub fn new_cache(&self, max_seqlen: usize) -> KvCache {
        KvCache::new(SEQLEN_AXIS, max_seqlen)
    }

    /// Size of the last axis of input and result.
    pub fn embed_dim(&self) -> usize {
        self.embed_dim
    }

    /// Number of query heads.
    pub fn num_heads(&self) -> usize {
        self.num_heads
    }

    /// Number of key and value heads.
    pub fn num_heads_k(&self) -> usize {
        self.num_heads_k
    }

    /// Size of each head.
    pub fn head_dim(&self) -> usize {
        self.head_dim
    }

    /// `(.., embed_dim)` to q `(.., num_heads, head_dim)` and k, v `(.., num_heads_k, head_dim)`. q and k are rotated.
    fn project(&self, xs: &Tensor, rows: Option<&RotaryRows>) -> Result<(Tensor, Tensor, Tensor)> {
        let (num_heads, num_heads_k) = (self.num_heads, self.num_heads_k);
        let (q, k, v) = match &self.qkv {
            QkvProjection::Separate { q, k, v } => (
                self.split_heads(&q.forward(xs)?, num_heads)?,
                self.split_heads(&k.forward(xs)?, num_heads_k)?,
                self.split_heads(&v.forward(xs)?, num_heads_k)?,
            ),
            QkvProjection::Fused { qkv, order: QkvOrder::Concatenated } => {
                split_qkv(&self.fused_heads(qkv, xs)?, num_heads_k, TensorLayout::Bshd)?.into()
            }
            QkvProjection::Fused { qkv, order: QkvOrder::ByKeyHead } => {
                self.split_by_key_head(&self.fused_heads(qkv, xs)?)?
            }
        };
        match (&self.rotary, rows) {
            (Some(rotary), Some(rows)) => Ok((rotary.rotate(&q, rows)?, rotary.rotate(&k, rows)?, v)),
            _ => Ok((q, k, v)),
        }
    }

    /// `(.., embed_dim)` to `(.., num_heads + 2 * num_heads_k, head_dim)`.
    fn fused_heads(&self, projection: &Projection, xs: &Tensor) -> Result<Tensor> {
        self.split_heads(&projection.forward(xs)?, self.num_heads + 2 * self.num_heads_k)
    }

    /// q, k and v from `(.., num_heads + 2 * num_heads_k, head_dim)` in the order [`QkvOrder::ByKeyHead`].
    ///
    /// k and v are views. q is a view if each key head has one query head. Otherwise q is copied, because its heads are not
    /// evenly spaced.
    fn split_by_key_head(&self, heads: &Tensor) -> Result<(Tensor, Tensor, Tensor)> {
        let group_size = self.num_heads / self.num_heads_k;
        let mut shape = heads.dims().to_vec();
        // (.., num_heads + 2 * num_heads_k, head_dim) -> (.., num_heads_k, group_size + 2, head_dim)
        shape.splice(shape.len() - 2..shape.len() - 1, [self.num_heads_k, group_size + 2]);
        let groups = heads.reshape(shape)?;
        let one = |at| groups.narrow(D::Minus2, at, 1)?.squeeze(D::Minus2);
        let q = match group_size {
            1 => one(0)?,
            _ => groups.narrow(D::Minus2, 0, group_size)?.flatten(D::Minus(3), D::Minus2)?,
        };
        Ok((q, one(group_size)?, one(group_size + 1)?))
    }

    /// `(.., heads * head_dim)` to `(.., heads, head_dim)`, a view.
    fn split_heads(&self, xs: &Tensor, heads: usize) -> Result<Tensor> {
        let mut shape = xs.dims().to_vec();
        shape.pop();
        shape.extend([heads, self.head_dim]);
        Ok(xs.reshape(shape)?)
    }

    /// o `(.., num_heads, head_dim)` to `(.., embed_dim)`.
    fn project_back(&self, o: &Tensor) -> Result<Tensor> {
        self.o.forward(&o.flatten_from(D::Minus2)?)
    }

    /// All projections, in the order of their use.
    fn projections(&self) -> Vec<&Projection> {
        match &self.qkv {
            QkvProjection::Separate { q, k, v } => vec![q, k, v, &self.o],
            QkvProjection::Fused { qkv, .. } => vec![qkv, &self.o],
        }
    }

    /// Returns an error unless `xs` has these axes, `embed_dim` values in the last one, and the dtype and device of the weights.
    fn check_input(&self, xs: &Tensor, axes: &'static str) -> Result<()> {
        check_rank(xs, axes)?;
        let shape = xs.dims().to_vec();
        let (embed_dim, expected) = (shape[shape.len() - 1], self.embed_dim);
        if embed_dim != expected {
            let (axis, other) = ("embed_dim", "the layer");
            return Err(crate::Error::Axis { tensor: "xs", axis, got: embed_dim, other, expected, shape }.into());
        }
        let weight = self.o.weight();
        if xs.dtype() != weight.dtype() {
            return Err(Error::InputDType { got: xs.dtype(), expected: weight.dtype() });
        }
        let (got, expected) = (xs.device().location(), weight.device().location());
        if got != expected {
            return Err(Error::InputDevice { got, expected });
        }
        Ok(())
    }

    /// Returns an error if a weight or `xs` is tracked, or if the mask shows later keys.
    fn check_decoding(&self, xs: &Tensor) -> Result<()> {
        if let Some(tensor) = self.projections().into_iter().find_map(Projection::tracked) {
            return Err(Error::TrackedDecoding { tensor, way_out: "decode with the layer that .detach() returns" });
        }
        if xs.track_op() {
            return Err(Error::TrackedDecoding { tensor: "xs".into(), way_out: "call .detach() on it" });
        }
        match self.attention.options.mask {
            Mask::Causal | Mask::Window { right: Some(0), .. } => Ok(()),
            mask => Err(Error::DecodingMask { mask }),
        }
    }

    /// Returns an error unless the cache fits this layer and the batch of `xs`.
    fn check_cache(&self, xs: &Tensor, cache: &KvCache) -> Result<()> {
        let (k, v) = (cache.k_cache(), cache.v_cache());
        for (tensor, side) in [("k", k), ("v", v)] {
            if side.dim() != SEQLEN_AXIS {
                return Err(Error::CacheAxis { tensor, axis: side.dim() });
            }
            // Such a cache would try to grow by 0 tokens forever.
            if side.max_seq_len() == 0 {
                return Err(Error::CacheCapacity { tensor });
            }
            let expected = (xs.dims()[0], self.num_heads_k, self.head_dim);
            match side.all_data() {
                Some(data) if !matches_cache(data, xs, expected) => {
                    return Err(Error::CacheMismatch {
                        tensor,
                        got: describe(data, cached_shape(data, side)),
                        expected: describe(xs, format!("({}, .., {}, {})", expected.0, expected.1, expected.2)),
                    });
                }
                _ => {}
            }
        }
        let (k, v) = (k.current_seq_len(), v.current_seq_len());
        if k != v {
            return Err(Error::CacheLengths { k, v });
        }
        Ok(())
    }
}

impl Module for MultiHeadAttention {
    fn forward(&self, xs: &Tensor) -> candle_core::Result<Tensor> {
        Ok(self.forward(xs)?)
    }
}

/// Whether cached `data` is `(batch, .., num_heads_k, head_dim)` as `expected`, with the dtype and the device of `xs`.
fn matches_cache(data: &Tensor, xs: &Tensor, expected: (usize, usize, usize)) -> bool {
    let shape = matches!(*data.dims(), [batch, _, heads, head_dim] if (batch, heads, head_dim) == expected);
    shape && data.dtype() == xs.dtype() && data.device().location() == xs.device().location()
}

/// The shape of the filled part of a cache.
fn cached_shape(data: &Tensor, cache: &Cache) -> String {
    let sizes = data.dims().iter().enumerate();
    let sizes = sizes.map(|(axis, &size)| if axis == cache.dim() { cache.current_seq_len() } else { size });
    let sizes: Vec<String> = sizes.map(|size| size.to_string()).collect();
    format!("({})", sizes.join(", "))
}

/// `shape` with the dtype and device of `tensor`, for an error text.
fn describe(tensor: &Tensor, shape: String) -> String {
    format!("{shape} {:?} on {:?}", tensor.dtype(), tensor.device().location())
}
