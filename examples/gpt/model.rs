//! GPT-2: learned positions, pre-norm blocks, GELU, and an output head that shares the token embedding.
//!
//! Parameters have GPT-2's names and layout; weights of linear layers are (inputs, outputs). Parameters are always f32. A
//! model holds a copy of them in the type that it computes in.
//!
//! Some of Candle's fused operators, such as `softmax_last_dim` and `layer_norm`, return a detached result, so no gradient
//! flows through them. `ops.rs` wraps them with hand-written gradients. `check_gradients` finds a parameter without one.

use crate::config::{AttentionKind, Config};
use crate::ops::{self, LayerNorm, Linear, Weight};
use crate::parameters::Named;
use crate::profile::{self, Part};
use crate::rng::Rng;
use anyhow::{bail, Result};
use candle_core::{DType, Device, Tensor, Var, D};
use candle_fa2::{Attention, Mask};
use std::collections::BTreeMap;

const NORM_EPSILON: f32 = 1e-5;
/// Standard deviation of GPT-2's initial weights.
const INIT_STD: f32 = 0.02;

enum Init {
    Zeros,
    Ones,
    Normal(f32),
}

/// Name, shape and initial values of every parameter of the model.
fn parameter_table(config: &Config, vocab_size: usize) -> Vec<(String, Vec<usize>, Init)> {
    let c = config.embed_dim;
    // Each block adds to the residual stream twice. This factor keeps the variance of the sum independent of the depth.
    let residual = INIT_STD / ((2 * config.num_layers) as f32).sqrt();
    let mut table = vec![
        ("wte".to_string(), vec![vocab_size, c], Init::Normal(INIT_STD)),
        ("wpe".to_string(), vec![config.context, c], Init::Normal(INIT_STD)),
        ("ln_f.weight".to_string(), vec![c], Init::Ones),
        ("ln_f.bias".to_string(), vec![c], Init::Zeros),
    ];
    for layer in 0..config.num_layers {
        let mut add =
            |name: &str, shape: &[usize], init| table.push((format!("h.{layer}.{name}"), shape.to_vec(), init));
        add("ln_1.weight", &[c], Init::Ones);
        add("ln_1.bias", &[c], Init::Zeros);
        add("attn.c_attn.weight", &[c, 3 * c], Init::Normal(INIT_STD));
        add("attn.c_attn.bias", &[3 * c], Init::Zeros);
        add("attn.c_proj.weight", &[c, c], Init::Normal(residual));
        add("attn.c_proj.bias", &[c], Init::Zeros);
        add("ln_2.weight", &[c], Init::Ones);
        add("ln_2.bias", &[c], Init::Zeros);
        add("mlp.c_fc.weight", &[c, 4 * c], Init::Normal(INIT_STD));
        add("mlp.c_fc.bias", &[4 * c], Init::Zeros);
        add("mlp.c_proj.weight", &[4 * c, c], Init::Normal(residual));
        add("mlp.c_proj.bias", &[c], Init::Zeros);
    }
    table
}

/// Name and shape of every parameter, as a checkpoint must hold them.
pub fn parameter_shapes(config: &Config, vocab_size: usize) -> BTreeMap<String, Vec<usize>> {
    parameter_table(config, vocab_size).into_iter().map(|(name, shape, _)| (name, shape)).collect()
}

/// New parameters, drawn from `rng`.
pub fn init_parameters(config: &Config, vocab_size: usize, rng: &mut Rng, device: &Device) -> Result<Named> {
    let mut parameters = Named::new();
    for (name, shape, init) in parameter_table(config, vocab_size) {
        let count = shape.iter().product();
        let values = match init {
            Init::Zeros => vec![0.0; count],
            Init::Ones => vec![1.0; count],
            Init::Normal(std) => rng.normal(count, std),
        };
        parameters.insert(name, Tensor::from_vec(values, shape, device)?);
    }
    Ok(parameters)
}

struct Block {
    ln_1: LayerNorm,
    c_attn: Linear, // q, k and v side by side
    attn_proj: Linear,
    ln_2: LayerNorm,
    c_fc: Linear,
    mlp_proj: Linear,
}

/// Builds layers from parameters, and records each weight under its name.
struct Builder<'a> {
    parameters: &'a Named,
    dtype: DType,
    weights: BTreeMap<String, Weight>,
}

impl Builder<'_> {
    fn weight(&mut self, name: String) -> Result<Weight> {
        let weight = Weight::new(&self.parameters[&name].to_dtype(self.dtype)?)?;
        self.weights.insert(name, weight.clone());
        Ok(weight)
    }

    fn norm(&mut self, name: &str) -> Result<LayerNorm> {
        let (weight, bias) = (self.weight(format!("{name}.weight"))?, self.weight(format!("{name}.bias"))?);
        Ok(LayerNorm { weight, bias, epsilon: NORM_EPSILON })
    }

    fn linear(&mut self, name: &str, before: Part) -> Result<Linear> {
        let (weight, bias) = (self.weight(format!("{name}.weight"))?, self.weight(format!("{name}.bias"))?);
        Ok(Linear { weight, bias, before })
    }
}

pub struct Gpt {
    wte: Weight, // (vocab_size, embed_dim)
    wpe: Weight, // (context, embed_dim)
    blocks: Vec<Block>,
    ln_f: LayerNorm,
    /// The leaf of Candle's graph. It is a variable if the model is trained.
    anchor: Tensor,
    /// All weights, by the name of the parameter.
    weights: BTreeMap<String, Weight>,
    config: Config,
}

impl Gpt {
    /// A model for training. It copies the current `parameters`.
    pub fn new(config: &Config, parameters: &Named) -> Result<Self> {
        let anchor = Var::zeros(1, DType::F32, parameters["wte"].device())?;
        Self::over(config, parameters, anchor.into_inner())
    }

    /// The same model without gradients. A forward pass keeps nothing for a backward.
    pub fn frozen(config: &Config, parameters: &Named) -> Result<Self> {
        let anchor = Tensor::zeros(1, DType::F32, parameters["wte"].device())?;
        Self::over(config, parameters, anchor)
    }

    fn over(config: &Config, parameters: &Named, anchor: Tensor) -> Result<Self> {
        let mut builder = Builder { parameters, dtype: config.precision.dtype(), weights: BTreeMap::new() };
        let mut blocks = Vec::new();
        for layer in 0..config.num_layers {
            let name = |part: &str| format!("h.{layer}.{part}");
            blocks.push(Block {
                ln_1: builder.norm(&name("ln_1"))?,
                c_attn: builder.linear(&name("attn.c_attn"), Part::Rest)?,
                attn_proj: builder.linear(&name("attn.c_proj"), Part::Attention)?,
                ln_2: builder.norm(&name("ln_2"))?,
                c_fc: builder.linear(&name("mlp.c_fc"), Part::Rest)?,
                mlp_proj: builder.linear(&name("mlp.c_proj"), Part::Rest)?,
            });
        }
        let ln_f = builder.norm("ln_f")?;
        let (wte, wpe) = (builder.weight("wte".into())?, builder.weight("wpe".into())?);
        Ok(Self { wte, wpe, blocks, ln_f, anchor, weights: builder.weights, config: config.clone() })
    }

    pub fn config(&self) -> &Config {
        &self.config
    }

    pub fn device(&self) -> &Device {
        self.anchor.device()
    }

    /// Takes the gradients accumulated since the last call, f32. A parameter that no backward reached is missing.
    pub fn take_gradients(&self) -> Named {
        let gradient = |(name, weight): (&String, &Weight)| Some((name.clone(), weight.take_gradient()?));
        self.weights.iter().filter_map(gradient).collect()
    }

    /// Mean cross-entropy in nats per token; `tokens` and `targets` are u32, (batch, seqlen).
    pub fn loss(&self, tokens: &Tensor, targets: &Tensor) -> Result<Tensor> {
        profile::phase("forward")?;
        self.loss_after(&self.hidden(tokens)?, targets)
    }

    /// [`Self::loss`] from the result of [`Self::hidden`].
    pub fn loss_after(&self, hidden: &Tensor, targets: &Tensor) -> Result<Tensor> {
        let x = ops::layer_norm(hidden, &self.ln_f)?; // (batch * seqlen, embed_dim)
        profile::phase("loss")?;
        Ok(ops::cross_entropy(&x, &self.wte, &targets.flatten_all()?)?)
    }

    /// Logits of the token after `tokens`, one for each row of `wte`, also for rows of padding.
    pub fn next_token(&self, tokens: &[u32]) -> Result<Vec<f32>> {
        let x = self.hidden(&Tensor::new(tokens, self.device())?.unsqueeze(0)?)?; // (seqlen, embed_dim)
        let last = x.narrow(0, tokens.len() - 1, 1)?; // (1, embed_dim)
        Ok(self.logits(&last)?.squeeze(0)?.to_vec1()?)
    }

    /// Logits of the next token at every position: u32 tokens (batch, seqlen) -> f32 (batch * seqlen, vocab_size).
    #[cfg(test)]
    pub fn forward(&self, tokens: &Tensor) -> Result<Tensor> {
        Ok(self.logits(&self.hidden(tokens)?)?)
    }

    /// The residual stream after all blocks: u32 tokens (batch, seqlen) -> (batch * seqlen, embed_dim).
    pub fn hidden(&self, tokens: &Tensor) -> Result<Tensor> {
        let (batch, seqlen) = tokens.dims2()?;
        let mask = match self.config.attention {
            AttentionKind::Standard | AttentionKind::StandardFused => {
                Some(causal_mask(seqlen, self.config.precision.dtype(), self.device())?)
            }
            AttentionKind::Flash | AttentionKind::None => None,
        };
        let mut x = ops::embedding(&self.anchor, tokens, &self.wte, &self.wpe)?; // (batch * seqlen, embed_dim)
        for block in &self.blocks {
            let o = self.attention(block, &ops::layer_norm(&x, &block.ln_1)?, (batch, seqlen), mask.as_ref())?;
            x = ops::linear_add(&x, &o, &block.attn_proj)?;
            x = ops::mlp_add(&x, &ops::layer_norm(&x, &block.ln_2)?, &block.c_fc, &block.mlp_proj)?;
        }
        Ok(x)
    }

    /// (n, embed_dim) -> f32 (n, vocab_size)
    fn logits(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        ops::layer_norm(x, &self.ln_f)?.matmul(&self.wte.value().t()?)?.to_dtype(DType::F32)
    }

    /// Causal self-attention: (batch * seqlen, embed_dim) -> (batch, seqlen, num_heads, head_dim).
    fn attention(
        &self,
        block: &Block,
        x: &Tensor,
        (batch, seqlen): (usize, usize),
        mask: Option<&Tensor>, // for standard attention
    ) -> Result<Tensor> {
        let num_heads = self.config.num_heads;
        // The heads of q, then the heads of k, then the heads of v.
        let qkv = ops::linear(x, &block.c_attn, (batch, seqlen, 3 * num_heads, self.config.head_dim()))?;
        let _part = profile::part(Part::Attention);
        match (self.config.attention, mask) {
            (AttentionKind::None, _) => Ok(ops::sum_of_thirds(&qkv, 2)?),
            (AttentionKind::Standard, Some(mask)) => standard_attention(&qkv, mask, |scores, mask| {
                candle_nn::ops::softmax(&scores.broadcast_add(mask)?, D::Minus1)
            }),
            (_, Some(mask)) => standard_attention(&qkv, mask, ops::softmax),
            (_, None) => Ok(Attention::new().mask(Mask::Causal).forward_qkv(&qkv, num_heads)?),
        }
    }
}

/// Standard causal attention, for comparison. It stores the scores of all queries and keys.
///
/// qkv is (batch, seqlen, 3 * num_heads, head_dim), and the result is (batch, seqlen, num_heads, head_dim). `mask` is a
/// [`causal_mask`]. `softmax` takes scores (batch, num_heads, seqlen, seqlen) and the mask.
fn standard_attention(
    qkv: &Tensor,
    mask: &Tensor,
    softmax: impl Fn(&Tensor, &Tensor) -> candle_core::Result<Tensor>,
) -> Result<Tensor> {
    let softmax_scale = 1.0 / (qkv.dim(D::Minus1)? as f64).sqrt();
    let parts = qkv.chunk(3, 2)?;
    let heads_first = |t: &Tensor| t.transpose(1, 2)?.contiguous(); // (batch, num_heads, seqlen, head_dim)
    let (q, k, v) = (heads_first(&parts[0])?, heads_first(&parts[1])?, heads_first(&parts[2])?);

    let scores = (q * softmax_scale)?.matmul(&k.t()?)?; // (batch, num_heads, seqlen, seqlen)
    let weights = softmax(&scores, mask)?;
    Ok(weights.matmul(&v)?.transpose(1, 2)?.contiguous()?)
}

/// A mask to add to scores, (seqlen, seqlen): minus infinity if the key comes after the query, else 0.
fn causal_mask(seqlen: usize, dtype: DType, device: &Device) -> candle_core::Result<Tensor> {
    let position = Tensor::arange(0u32, seqlen as u32, device)?;
    let (query, key) = (position.reshape((seqlen, 1))?, position.reshape((1, seqlen))?);
    let hidden = key.broadcast_gt(&query)?;
    let value = |number: f32| Tensor::full(number, (seqlen, seqlen), device)?.to_dtype(dtype);
    hidden.where_cond(&value(f32::NEG_INFINITY)?, &value(0.0)?)
}

/// Returns an error with the names of all parameters whose gradient is missing or all zeros.
///
/// Call it only on a new model, where a zero gradient means a broken graph. A trained model that fits its text perfectly
/// has zero gradients too.
pub fn check_gradients<'a>(names: impl IntoIterator<Item = &'a String>, gradients: &Named) -> Result<()> {
    let mut without = Vec::new();
    let mut all = 0;
    for name in names {
        let largest = match gradients.get(name) {
            Some(gradient) => gradient.abs()?.flatten_all()?.max(0)?.to_scalar::<f32>()?,
            None => 0.0,
        };
        if largest == 0.0 {
            without.push(name.as_str());
        }
        all += 1;
    }
    if !without.is_empty() {
        bail!(
            "{} of {all} parameters receive no gradient: {}; an operator on their way to the loss returns a detached result",
            without.len(),
            without.join(", ")
        );
    }
    Ok(())
}
