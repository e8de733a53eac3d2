//! GPT-2: learned positions, pre-norm blocks, GELU, and a head that shares the token embedding.
//!
//! Parameters have GPT-2's names and layout (weights of linear layers are (inputs, outputs)). They are f32 always; a model
//! is made over a copy of them in the type it computes in.
//!
//! Several of Candle's fused operators return a detached result, through which no gradient flows: `softmax_last_dim`,
//! and `LayerNorm::forward` with a bias. This file uses their differentiable forms, and `check_gradients` sees to it.

use crate::config::{AttentionKind, Config};
use crate::parameters::Named;
use crate::profile;
use crate::rng::Rng;
use anyhow::{bail, Result};
use candle_core::backprop::GradStore;
use candle_core::{DType, Device, Tensor, Var, D};
use candle_fa2::{Attention, Mask};
use candle_nn::ops::{layer_norm_slow, softmax};
use std::collections::BTreeMap;
use std::f64::consts::PI;

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
    // Each block adds twice to the residual stream; this keeps the sum's variance independent of the depth.
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

/// Fresh parameters, drawn from `rng`.
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

struct Linear {
    weight: Tensor, // (inputs, outputs)
    bias: Tensor,   // (outputs)
}

impl Linear {
    /// The layer that gives `len` of the outputs, from `start` on.
    fn columns(&self, start: usize, len: usize) -> candle_core::Result<Self> {
        let weight = self.weight.narrow(1, start, len)?.contiguous()?; // (inputs, len)
        Ok(Self { weight, bias: self.bias.narrow(0, start, len)? })
    }

    /// (n, inputs) -> (n, outputs)
    fn forward(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        x.matmul(&self.weight)?.broadcast_add(&self.bias)
    }
}

struct LayerNorm {
    weight: Tensor, // (embed_dim)
    bias: Tensor,   // (embed_dim)
}

impl LayerNorm {
    /// (n, embed_dim) -> (n, embed_dim)
    fn forward(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        layer_norm_slow(x, &self.weight, &self.bias, NORM_EPSILON)
    }
}

struct Block {
    ln_1: LayerNorm,
    c_attn: Linear,
    attn_proj: Linear,
    ln_2: LayerNorm,
    c_fc: Linear,
    mlp_proj: Linear,
}

pub struct Gpt {
    leaves: BTreeMap<String, Var>, // the parameters that learn; their gradients come under these
    wte: Tensor,                   // (vocab_size, embed_dim)
    wpe: Tensor,                   // (context, embed_dim)
    blocks: Vec<Block>,
    ln_f: LayerNorm,
    config: Config,
}

impl Gpt {
    /// A model that learns, over `parameters` as they are now.
    pub fn new(config: &Config, parameters: &Named) -> Result<Self> {
        let dtype = config.precision.dtype();
        let leaf = |(name, tensor): (&String, &Tensor)| Ok((name.clone(), Var::from_tensor(&tensor.to_dtype(dtype)?)?));
        let leaves = parameters.iter().map(leaf).collect::<Result<BTreeMap<String, Var>>>()?;
        let model = Self::over(config, |name| Ok(leaves[name].as_tensor().clone()))?;
        Ok(Self { leaves, ..model })
    }

    /// The same model without gradients: nothing of a forward pass is kept.
    pub fn frozen(config: &Config, parameters: &Named) -> Result<Self> {
        Self::over(config, |name| Ok(parameters[name].to_dtype(config.precision.dtype())?))
    }

    fn over(config: &Config, tensor: impl Fn(&str) -> Result<Tensor>) -> Result<Self> {
        let pair = |name: &str| Ok((tensor(&format!("{name}.weight"))?, tensor(&format!("{name}.bias"))?));
        let linear = |name: &str| -> Result<_> { pair(name).map(|(weight, bias)| Linear { weight, bias }) };
        let norm = |name: &str| -> Result<_> { pair(name).map(|(weight, bias)| LayerNorm { weight, bias }) };
        let block = |layer: usize| -> Result<_> {
            Ok(Block {
                ln_1: norm(&format!("h.{layer}.ln_1"))?,
                c_attn: linear(&format!("h.{layer}.attn.c_attn"))?,
                attn_proj: linear(&format!("h.{layer}.attn.c_proj"))?,
                ln_2: norm(&format!("h.{layer}.ln_2"))?,
                c_fc: linear(&format!("h.{layer}.mlp.c_fc"))?,
                mlp_proj: linear(&format!("h.{layer}.mlp.c_proj"))?,
            })
        };
        Ok(Self {
            leaves: BTreeMap::new(),
            wte: tensor("wte")?,
            wpe: tensor("wpe")?,
            blocks: (0..config.num_layers).map(block).collect::<Result<_>>()?,
            ln_f: norm("ln_f")?,
            config: config.clone(),
        })
    }

    pub fn config(&self) -> &Config {
        &self.config
    }

    pub fn device(&self) -> &Device {
        self.wte.device()
    }

    /// What `backward` found for each parameter: f32. A parameter that it did not reach is missing.
    pub fn gradients(&self, mut store: GradStore) -> Result<Named> {
        let mut gradients = Named::new();
        for (name, leaf) in &self.leaves {
            if let Some(gradient) = store.remove(leaf) {
                // Candle's gradients remember what they were computed from, and would keep this whole pass alive.
                gradients.insert(name.clone(), gradient.detach().to_dtype(DType::F32)?);
            }
        }
        Ok(gradients)
    }

    /// Mean cross-entropy in nats per token; `tokens` and `targets` are u32, (batch, seqlen).
    pub fn loss(&self, tokens: &Tensor, targets: &Tensor) -> Result<Tensor> {
        profile::phase("forward")?;
        let logits = self.forward(tokens)?;
        profile::phase("loss")?;
        Ok(candle_nn::loss::cross_entropy(&logits, &targets.flatten_all()?)?)
    }

    /// Logits of the token that follows `tokens`, as many as the vocabulary has.
    pub fn next_token(&self, tokens: &[u32]) -> Result<Vec<f32>> {
        let x = self.hidden(&Tensor::new(tokens, self.device())?.unsqueeze(0)?)?; // (seqlen, embed_dim)
        let last = x.narrow(0, tokens.len() - 1, 1)?; // (1, embed_dim)
        Ok(self.logits(&last)?.squeeze(0)?.to_vec1()?)
    }

    /// Logits of the next token at every position: u32 tokens (batch, seqlen) -> f32 (batch * seqlen, vocab_size).
    pub fn forward(&self, tokens: &Tensor) -> Result<Tensor> {
        Ok(self.logits(&self.hidden(tokens)?)?)
    }

    /// The residual stream after all blocks: u32 tokens (batch, seqlen) -> (batch * seqlen, embed_dim).
    fn hidden(&self, tokens: &Tensor) -> Result<Tensor> {
        let (batch, seqlen) = tokens.dims2()?;
        let embedded = self.wte.index_select(&tokens.flatten_all()?, 0)?; // (batch * seqlen, embed_dim)
        let positions = self.wpe.narrow(0, 0, seqlen)?; // (seqlen, embed_dim)
        let x = embedded.reshape((batch, seqlen, self.config.embed_dim))?.broadcast_add(&positions)?;
        let mut x = x.reshape((batch * seqlen, self.config.embed_dim))?;

        for block in &self.blocks {
            x = (&x + self.attention(block, &block.ln_1.forward(&x)?, batch, seqlen)?)?;
            x = (&x + Self::mlp(block, &block.ln_2.forward(&x)?)?)?;
        }
        Ok(x)
    }

    /// (n, embed_dim) -> f32 (n, vocab_size)
    fn logits(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        let head = self.wte.t()?; // (embed_dim, vocab_size)
        self.ln_f.forward(x)?.matmul(&head)?.to_dtype(DType::F32)
    }

    /// Causal self-attention: (batch * seqlen, embed_dim) -> (batch * seqlen, embed_dim).
    fn attention(&self, block: &Block, x: &Tensor, batch: usize, seqlen: usize) -> Result<Tensor> {
        let Config { num_heads, embed_dim, .. } = self.config;
        // q, k and v from a third of c_attn's columns each. Views into one product would be cut as easily, but the gradient
        // of a view is padded to the whole with zeros and added: three times three activations.
        let heads = |third: usize| -> candle_core::Result<Tensor> {
            let projected = block.c_attn.columns(third * embed_dim, embed_dim)?.forward(x)?; // (batch * seqlen, embed_dim)
            projected.reshape((batch, seqlen, num_heads, self.config.head_dim()))
        };
        let (q, k, v) = (heads(0)?, heads(1)?, heads(2)?);
        let o = match self.config.attention {
            AttentionKind::Flash => Attention::new().mask(Mask::Causal).forward(&q, &k, &v)?,
            AttentionKind::Standard => standard_attention(&q, &k, &v)?,
            AttentionKind::None => ((q + k)? + v)?,
        };
        Ok(block.attn_proj.forward(&o.reshape((batch * seqlen, embed_dim))?)?)
    }

    /// (n, embed_dim) -> (n, 4 * embed_dim) -> (n, embed_dim)
    fn mlp(block: &Block, x: &Tensor) -> Result<Tensor> {
        Ok(block.mlp_proj.forward(&gelu(&block.c_fc.forward(x)?)?)?)
    }
}

/// GPT-2's GELU, x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x^3))), of any shape.
///
/// Candle's `gelu` is the same function, but its gradient computes tanh and two powers anew; here the gradient takes the
/// tanh that is there. A step of the tiny model needs 98 ms instead of 147 (one core, 512 tokens).
fn gelu(x: &Tensor) -> candle_core::Result<Tensor> {
    let slope = (2.0 / PI).sqrt();
    let inner = (x * x.sqr()?.affine(0.044715 * slope, slope)?)?;
    x * inner.tanh()?.affine(0.5, 0.5)?
}

/// Causal attention as the formula says it, for comparison: the scores of all queries and keys are stored.
/// q, k, v and the result are (batch, seqlen, num_heads, head_dim).
fn standard_attention(q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor> {
    let (_, seqlen, _, head_dim) = q.dims4()?;
    let softmax_scale = 1.0 / (head_dim as f64).sqrt();
    let heads_first = |t: &Tensor| t.transpose(1, 2)?.contiguous(); // (batch, num_heads, seqlen, head_dim)
    let (q, k, v) = (heads_first(q)?, heads_first(k)?, heads_first(v)?);

    let scores = (q.matmul(&k.t()?)? * softmax_scale)?; // (batch, num_heads, seqlen, seqlen)
    let hidden: Vec<f32> = (0..seqlen * seqlen)
        .map(|at| if at % seqlen > at / seqlen { f32::NEG_INFINITY } else { 0.0 }) // key > query
        .collect();
    let mask = Tensor::from_vec(hidden, (seqlen, seqlen), q.device())?.to_dtype(q.dtype())?;
    let weights = softmax(&scores.broadcast_add(&mask)?, D::Minus1)?;
    Ok(weights.matmul(&v)?.transpose(1, 2)?.contiguous()?)
}

/// Fails with the names of all parameters that `gradients` has nothing for, or nothing but zeros.
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
