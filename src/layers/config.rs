//! The configuration of a multi-head attention layer.

use candle_core::Tensor;
use candle_nn::{init, Init};

use super::error::{Error, Result};
use super::rotary::Rotary;
use crate::attention::Attention;
use crate::mask::Mask;
use crate::problem::MAX_HEAD_DIM;

/// How a checkpoint lays out the weight of a projection.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum WeightLayout {
    /// `(out, in)`, as in `candle_nn::Linear` and most checkpoints.
    #[default]
    OutIn,
    /// `(in, out)`, as in GPT-2's Conv1D. The layer uses the weight as it is, without a transpose or a copy.
    InOut,
}

impl WeightLayout {
    /// The shape of a weight that maps `in_dim` values to `out_dim`.
    pub(super) fn shape(self, in_dim: usize, out_dim: usize) -> (usize, usize) {
        match self {
            WeightLayout::OutIn => (out_dim, in_dim),
            WeightLayout::InOut => (in_dim, out_dim),
        }
    }

    /// `init` for a weight in this layout. Candle takes the second axis as the fan-in of [`Init::Kaiming`], so `InOut` swaps
    /// fan-in and fan-out.
    pub(super) fn init(self, init: Init) -> Init {
        match (self, init) {
            (WeightLayout::InOut, Init::Kaiming { dist, fan, non_linearity }) => {
                let fan = match fan {
                    init::FanInOut::FanIn => init::FanInOut::FanOut,
                    init::FanInOut::FanOut => init::FanInOut::FanIn,
                };
                Init::Kaiming { dist, fan, non_linearity }
            }
            (_, init) => init,
        }
    }
}

/// The order of the heads of q, k and v in the output of a fused projection.
///
/// A checkpoint uses one order. With the other order it loads too, but the results are wrong. Example with `num_heads = 4`
/// and `num_heads_k = 2`:
///
/// ```text
/// Concatenated   q0 q1 q2 q3 k0 k1 v0 v1
/// ByKeyHead      q0 q1 k0 v0 q2 q3 k1 v1
/// ```
///
/// With one key head (multi-query attention) both orders are the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum QkvOrder {
    /// All heads of q, then all of k, then all of v. Used by GPT-2, Phi-3, MPT.
    ///
    /// Other libraries split this output into three parts, with `chunk(3)` or `split`.
    Concatenated,
    /// For each key head: its query heads, its k, its v. Used by GPT-NeoX, BLOOM, Falcon 40B, Megatron.
    ///
    /// Other libraries view it as `(.., num_heads, 3, head_dim)`, or with grouped queries as
    /// `(.., num_heads_k, num_heads / num_heads_k + 2, head_dim)`. With grouped queries, the split copies q; k and v stay
    /// views.
    ByKeyHead,
}

/// Names of the projections. The layer loads `NAME.weight`, and `NAME.bias` if the bias is enabled, below the prefix of the
/// `VarBuilder`. A name can contain dots (`"self.query"`).
///
/// The table lists Hugging Face checkpoints. By default there are no biases, no mask and no positions, and the layout is
/// [`WeightLayout::OutIn`]. So call all methods in the last two columns of a row:
///
/// | model | projections | order | mask and positions | also |
/// | --- | --- | --- | --- | --- |
/// | Llama, Mistral | `q_proj`, `k_proj`, `v_proj`, `o_proj` | separate | `.mask(Mask::Causal)`, `.rotary(..)` | `.num_heads_k(..)` |
/// | Qwen2 | as Llama | separate | `.mask(Mask::Causal)`, `.rotary(..)` | `.num_heads_k(..)`, `.qkv_bias(true)` |
/// | GPT-2 | `c_attn`, `c_proj` | `Concatenated` | `.mask(Mask::Causal)` | `.qkv_bias(true)`, `.o_bias(true)`, `.weight_layout(WeightLayout::InOut)` |
/// | Phi-3 mini | `qkv_proj`, `o_proj` | `Concatenated` | `.mask(Mask::Causal)`, `.rotary(..)` | |
/// | GPT-NeoX, Pythia | `query_key_value`, `dense` | `ByKeyHead` | `.mask(Mask::Causal)`, `.rotary(..)` of a part of each head | `.qkv_bias(true)`, `.o_bias(true)` |
/// | BLOOM | as GPT-NeoX | `ByKeyHead` | `.mask(Mask::Causal)`, `.alibi_slopes(..)` | `.qkv_bias(true)`, `.o_bias(true)` |
/// | Falcon 40B | as GPT-NeoX | `ByKeyHead` | `.mask(Mask::Causal)`, `.rotary(..)` | `.num_heads_k(8)` |
/// | Falcon 7B | as GPT-NeoX | either order (one key head) | `.mask(Mask::Causal)`, `.rotary(..)` | `.num_heads_k(1)` |
///
/// [`MultiHeadAttentionConfig::gpt2`] and [`MultiHeadAttentionConfig::gpt_neox`] set everything in their rows.
///
/// A model with a sliding window (Mistral 7B v0.1, Phi-3 mini) needs [`Mask::Window`] instead of [`Mask::Causal`]. For
/// sequences up to the length of the window, both masks are the same.
///
/// ```
/// # use candle_core::Device;
/// # use candle_fa2::layers::{MultiHeadAttentionConfig, Projections, QkvOrder, Rotary, RotaryConfig};
/// # use candle_fa2::Mask;
/// // Phi-3 mini (4k), for sequences up to 2047 tokens, the length of its sliding window.
/// let projections =
///     Projections::Fused { qkv: "qkv_proj".into(), o: "o_proj".into(), order: QkvOrder::Concatenated };
/// let rotary = Rotary::new(&RotaryConfig::new(96, 2047), &Device::Cpu)?;
/// let config = MultiHeadAttentionConfig::new(3072, 32).projections(projections).mask(Mask::Causal).rotary(&rotary);
/// # let _ = config;
/// # Ok::<(), candle_fa2::layers::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Projections {
    /// One projection each for q, k and v.
    Separate {
        /// `embed_dim` to `num_heads * head_dim`.
        q: String,
        /// `embed_dim` to `num_heads_k * head_dim`.
        k: String,
        /// `embed_dim` to `num_heads_k * head_dim`.
        v: String,
        /// `num_heads * head_dim` to `embed_dim`.
        o: String,
    },
    /// One projection for q, k and v.
    Fused {
        /// `embed_dim` to `(num_heads + 2 * num_heads_k) * head_dim`.
        qkv: String,
        /// `num_heads * head_dim` to `embed_dim`.
        o: String,
        /// Order of the heads in the output. The weight's shape does not show it.
        order: QkvOrder,
    },
}

impl Projections {
    /// `q_proj`, `k_proj`, `v_proj`, `o_proj`: Llama, Mistral, Qwen and many more.
    pub fn llama() -> Self {
        let [q, k, v, o] = ["q_proj", "k_proj", "v_proj", "o_proj"].map(String::from);
        Self::Separate { q, k, v, o }
    }

    /// `c_attn`, `c_proj` and [`QkvOrder::Concatenated`]: GPT-2.
    pub fn gpt2() -> Self {
        Self::Fused { qkv: "c_attn".into(), o: "c_proj".into(), order: QkvOrder::Concatenated }
    }

    /// `query_key_value`, `dense` and [`QkvOrder::ByKeyHead`]: GPT-NeoX, Pythia, BLOOM, Falcon.
    pub fn gpt_neox() -> Self {
        Self::Fused { qkv: "query_key_value".into(), o: "dense".into(), order: QkvOrder::ByKeyHead }
    }
}

/// One projection of a configuration.
pub(super) struct NamedProjection<'a> {
    /// `q`, `k`, `v`, `qkv` or `o`.
    pub(super) role: &'static str,
    pub(super) name: &'a str,
    pub(super) bias: bool,
}

/// The configuration of a [`MultiHeadAttention`](super::MultiHeadAttention): sizes, names of the weights, mask, scale,
/// rotary embedding.
///
/// ```
/// # use candle_core::Device;
/// # use candle_fa2::layers::{MultiHeadAttentionConfig, Rotary, RotaryConfig};
/// # use candle_fa2::Mask;
/// // Qwen2 0.5B: 14 query heads share 2 key heads; only q, k and v have biases.
/// let rotary = Rotary::new(&RotaryConfig::new(64, 4096).theta(1_000_000.0), &Device::Cpu)?;
/// let config = MultiHeadAttentionConfig::new(896, 14).num_heads_k(2).qkv_bias(true).mask(Mask::Causal).rotary(&rotary);
/// # let _ = config;
/// # Ok::<(), candle_fa2::layers::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct MultiHeadAttentionConfig {
    pub(super) embed_dim: usize,
    pub(super) num_heads: usize,
    num_heads_k: Option<usize>,
    head_dim: Option<usize>,
    pub(super) projections: Projections,
    pub(super) weight_layout: WeightLayout,
    pub(super) weight_init: Option<Init>,
    pub(super) q_bias: bool,
    pub(super) k_bias: bool,
    pub(super) v_bias: bool,
    pub(super) o_bias: bool,
    pub(super) attention: Attention,
    pub(super) rotary: Option<Rotary>,
    pub(super) allowed_unused: Vec<String>,
}

impl MultiHeadAttentionConfig {
    /// A layer with `num_heads` heads of size `embed_dim / num_heads` for each of q, k and v.
    ///
    /// The other defaults are Llama's names and weight layout, no biases, no mask, no rotary embedding, and the scale
    /// `1 / sqrt(head_dim)`.
    pub fn new(embed_dim: usize, num_heads: usize) -> Self {
        Self {
            embed_dim,
            num_heads,
            num_heads_k: None,
            head_dim: None,
            projections: Projections::llama(),
            weight_layout: WeightLayout::OutIn,
            weight_init: None,
            q_bias: false,
            k_bias: false,
            v_bias: false,
            o_bias: false,
            attention: Attention::new(),
            rotary: None,
            allowed_unused: Vec::new(),
        }
    }

    /// GPT-2's attention: causal, with the fused projection `c_attn` and the output projection `c_proj`.
    ///
    /// Both projections have biases and weights of shape `(in, out)`. New weights are drawn from a normal distribution with
    /// standard deviation 0.02. New biases are 0.
    pub fn gpt2(embed_dim: usize, num_heads: usize) -> Self {
        Self::new(embed_dim, num_heads)
            .projections(Projections::gpt2())
            .weight_layout(WeightLayout::InOut)
            .weight_init(Init::Randn { mean: 0.0, stdev: 0.02 })
            .qkv_bias(true)
            .o_bias(true)
            .mask(Mask::Causal)
    }

    /// GPT-NeoX's attention (Pythia): causal, with the fused projection `query_key_value` and the output projection `dense`.
    ///
    /// Both projections have biases. q and k get a rotary embedding. Published models rotate the first quarter of each head
    /// (`rotary_pct` 0.25).
    ///
    /// ```
    /// # use candle_core::Device;
    /// # use candle_fa2::layers::{MultiHeadAttentionConfig, Rotary, RotaryConfig};
    /// // Pythia 160M: 16 of 64 values of each head rotate.
    /// let rotary = Rotary::new(&RotaryConfig::new(16, 2048), &Device::Cpu)?;
    /// let config = MultiHeadAttentionConfig::gpt_neox(768, 12, &rotary);
    /// # let _ = config;
    /// # Ok::<(), candle_fa2::layers::Error>(())
    /// ```
    pub fn gpt_neox(embed_dim: usize, num_heads: usize, rotary: &Rotary) -> Self {
        Self::new(embed_dim, num_heads)
            .projections(Projections::gpt_neox())
            .qkv_bias(true)
            .o_bias(true)
            .mask(Mask::Causal)
            .rotary(rotary)
    }

    /// Number of heads of k and v. `num_heads` must be a multiple of it. 1 is multi-query attention.
    pub fn num_heads_k(mut self, num_heads_k: usize) -> Self {
        self.num_heads_k = Some(num_heads_k);
        self
    }

    /// Size of each head, if it is not `embed_dim / num_heads`.
    pub fn head_dim(mut self, head_dim: usize) -> Self {
        self.head_dim = Some(head_dim);
        self
    }

    /// Names of the projections. For a fused projection also the order of the heads.
    pub fn projections(mut self, projections: Projections) -> Self {
        self.projections = projections;
        self
    }

    /// Layout of the weights.
    pub fn weight_layout(mut self, weight_layout: WeightLayout) -> Self {
        self.weight_layout = weight_layout;
        self
    }

    /// Distribution of new weights. New biases are then 0. By default weights and biases are drawn as in
    /// `candle_nn::linear`. Loaded weights are not affected.
    pub fn weight_init(mut self, weight_init: Init) -> Self {
        self.weight_init = Some(weight_init);
        self
    }

    /// Whether the projections of q, k and v have biases. If the `VarBuilder` has a bias that is not enabled here,
    /// [`MultiHeadAttention::new`](super::MultiHeadAttention::new) returns an error.
    pub fn qkv_bias(self, bias: bool) -> Self {
        self.q_bias(bias).k_bias(bias).v_bias(bias)
    }

    /// Whether the projection of q has a bias.
    pub fn q_bias(mut self, bias: bool) -> Self {
        self.q_bias = bias;
        self
    }

    /// Whether the projection of k has a bias. (In Whisper q and v have biases, but k has none.)
    pub fn k_bias(mut self, bias: bool) -> Self {
        self.k_bias = bias;
        self
    }

    /// Whether the projection of v has a bias.
    pub fn v_bias(mut self, bias: bool) -> Self {
        self.v_bias = bias;
        self
    }

    /// Whether the projection of the output has a bias.
    pub fn o_bias(mut self, bias: bool) -> Self {
        self.o_bias = bias;
        self
    }

    /// Replaces all options of the operator. The next four methods set one option each.
    ///
    /// The layer ignores [`Attention::layout`] and [`Attention::output_layout`], because it creates q, k and v itself.
    /// It refuses [`Attention::key_lengths`] ([`Error::KeyLengths`]). For padded batches see
    /// [`MultiHeadAttention`](super::MultiHeadAttention#padded-batches).
    pub fn attention(mut self, attention: Attention) -> Self {
        self.attention = attention;
        self
    }

    /// [`Attention::mask`].
    pub fn mask(mut self, mask: Mask) -> Self {
        self.attention = self.attention.mask(mask);
        self
    }

    /// [`Attention::softmax_scale`].
    pub fn softmax_scale(mut self, softmax_scale: f64) -> Self {
        self.attention = self.attention.softmax_scale(softmax_scale);
        self
    }

    /// [`Attention::softcap`].
    pub fn softcap(mut self, softcap: f64) -> Self {
        self.attention = self.attention.softcap(softcap);
        self
    }

    /// [`Attention::alibi_slopes`], of shape `(num_heads)` only, because a layer takes batches of any size.
    pub fn alibi_slopes(mut self, slopes: &Tensor) -> Self {
        self.attention = self.attention.alibi_slopes(slopes);
        self
    }

    /// Rotates q and k by their positions. The tables of `rotary` are shared, not copied.
    pub fn rotary(mut self, rotary: &Rotary) -> Self {
        self.rotary = Some(rotary.clone());
        self
    }

    /// Allows the tensor `name` in the checkpoint although the layer does not use it. Without this,
    /// [`MultiHeadAttention::new`](super::MultiHeadAttention::new) returns an error. `name` is relative to the prefix of the
    /// `VarBuilder`, for example `"q_proj.bias"`.
    ///
    /// The result then differs from the trained model, unless the tensor has no effect. A bias of 0 has no effect, and
    /// neither has a weight of another layer with the same prefix.
    pub fn allow_unused(mut self, name: impl Into<String>) -> Self {
        self.allowed_unused.push(name.into());
        self
    }

    /// The projections in the order of their use; o comes last.
    pub(super) fn named_projections(&self) -> Vec<NamedProjection<'_>> {
        let named = |role, name, bias| NamedProjection { role, name, bias };
        match &self.projections {
            Projections::Separate { q, k, v, o } => vec![
                named("q", q, self.q_bias),
                named("k", k, self.k_bias),
                named("v", v, self.v_bias),
                named("o", o, self.o_bias),
            ],
            Projections::Fused { qkv, o, .. } => vec![named("qkv", qkv, self.q_bias), named("o", o, self.o_bias)],
        }
    }

    /// Returns an error if two projections have the same name.
    fn check_names(&self) -> Result<()> {
        let projections = self.named_projections();
        for (at, second) in projections.iter().enumerate() {
            if let Some(first) = projections[..at].iter().find(|first| first.name == second.name) {
                let (first, second, name) = (first.role, second.role, first.name.to_string());
                return Err(Error::ProjectionName { first, second, name });
            }
        }
        Ok(())
    }

    /// Checks the configuration. Returns `(num_heads_k, head_dim)`, with defaults for sizes that were not set.
    pub(super) fn resolve(&self) -> Result<(usize, usize)> {
        let (embed_dim, num_heads) = (self.embed_dim, self.num_heads);
        let num_heads_k = self.num_heads_k.unwrap_or(num_heads);
        for (name, size) in [("embed_dim", embed_dim), ("num_heads", num_heads), ("num_heads_k", num_heads_k)] {
            if size == 0 {
                return Err(Error::Size { name });
            }
        }
        if !num_heads.is_multiple_of(num_heads_k) {
            return Err(crate::Error::HeadGroups { num_heads, num_heads_k }.into());
        }
        let head_dim = match self.head_dim {
            Some(0) => return Err(Error::Size { name: "head_dim" }),
            Some(head_dim) => head_dim,
            None if !embed_dim.is_multiple_of(num_heads) => return Err(Error::HeadDimUnset { embed_dim, num_heads }),
            None => embed_dim / num_heads,
        };
        if head_dim > MAX_HEAD_DIM {
            return Err(crate::Error::HeadDim { name: "head_dim", head_dim, max: MAX_HEAD_DIM }.into());
        }
        // The fused projection has the largest weight. In f64, the widest type, it must not exceed isize::MAX bytes, the
        // largest allocation.
        let heads = num_heads_k.checked_mul(2).and_then(|heads_k| heads_k.checked_add(num_heads));
        let elements = heads.and_then(|heads| heads.checked_mul(head_dim)?.checked_mul(embed_dim));
        if elements.is_none_or(|elements| elements > isize::MAX as usize / size_of::<f64>()) {
            return Err(Error::TooLarge { embed_dim, num_heads, num_heads_k, head_dim });
        }
        let biases = (self.q_bias, self.k_bias, self.v_bias);
        if matches!(self.projections, Projections::Fused { .. })
            && !matches!(biases, (true, true, true) | (false, false, false))
        {
            return Err(Error::FusedBias { q_bias: self.q_bias, k_bias: self.k_bias, v_bias: self.v_bias });
        }
        self.check_names()?;
        if self.attention.options.key_lengths.is_some() {
            return Err(Error::KeyLengths);
        }
        match &self.attention.options.alibi_slopes {
            Some(slopes) if slopes.dims() != [num_heads] => {
                return Err(Error::AlibiShape { num_heads, shape: slopes.dims().to_vec() });
            }
            _ => {}
        }
        match self.rotary.as_ref().map(Rotary::rotary_dim) {
            Some(rotary_dim) if rotary_dim > head_dim => Err(Error::RotaryHeadDim { rotary_dim, head_dim }),
            _ => Ok((num_heads_k, head_dim)),
        }
    }
}
