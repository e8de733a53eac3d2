//! GPT-2: learned positions, pre-norm blocks, GELU, and an output head that shares the token embedding.
//!
//! Parameters have GPT-2's names. Weights of linear layers are (outputs, inputs), the layout of candle_nn.
//!
//! Every operator but attention is from candle-fused-ops. Some of Candle's own fused operators return a detached result, so no
//! gradient flows through them. `AdamW` refuses a step in which a parameter has none.

use crate::config::{AttentionKind, Config};
use crate::rng::Rng;
use anyhow::Result;
use candle_core::{DType, Device, Tensor, Var, D};
use candle_fa2::{Attention, Mask};
use candle_fused_ops::{
    checkpoint, embedding, layer_norm, linear, linear_add, linear_cross_entropy, mlp_add, profile, LayerNorm,
};
use candle_nn::Module;
use std::collections::{BTreeMap, HashMap};

/// Tensors by the name of their parameter.
pub type Named = HashMap<String, Tensor>;

const NORM_EPSILON: f64 = 1e-5;
/// Standard deviation of GPT-2's initial weights.
const INIT_STD: f32 = 0.02;

enum Init {
    Zeros,
    Ones,
    Normal(f32),
}

/// Name, shape and initial values of a parameter.
type Parameter = (String, Vec<usize>, Init);

/// The parameters of block `layer`, in the order in which [`block`] takes them.
fn block_table(config: &Config, layer: usize) -> [Parameter; 12] {
    let c = config.embed_dim;
    // Each block adds to the residual stream twice. This factor keeps the variance of the sum independent of the depth.
    let residual = INIT_STD / ((2 * config.num_layers) as f32).sqrt();
    [
        ("ln_1.weight", vec![c], Init::Ones),
        ("ln_1.bias", vec![c], Init::Zeros),
        ("attn.c_attn.weight", vec![3 * c, c], Init::Normal(INIT_STD)),
        ("attn.c_attn.bias", vec![3 * c], Init::Zeros),
        ("attn.c_proj.weight", vec![c, c], Init::Normal(residual)),
        ("attn.c_proj.bias", vec![c], Init::Zeros),
        ("ln_2.weight", vec![c], Init::Ones),
        ("ln_2.bias", vec![c], Init::Zeros),
        ("mlp.c_fc.weight", vec![4 * c, c], Init::Normal(INIT_STD)),
        ("mlp.c_fc.bias", vec![4 * c], Init::Zeros),
        ("mlp.c_proj.weight", vec![c, 4 * c], Init::Normal(residual)),
        ("mlp.c_proj.bias", vec![c], Init::Zeros),
    ]
    .map(|(name, shape, init)| (format!("h.{layer}.{name}"), shape, init))
}

/// All parameters of the model.
fn parameter_table(config: &Config, vocab_size: usize) -> Vec<Parameter> {
    let c = config.embed_dim;
    let mut table = vec![
        ("wte".to_string(), vec![vocab_size, c], Init::Normal(INIT_STD)),
        ("wpe".to_string(), vec![config.context, c], Init::Normal(INIT_STD)),
        ("ln_f.weight".to_string(), vec![c], Init::Ones),
        ("ln_f.bias".to_string(), vec![c], Init::Zeros),
    ];
    table.extend((0..config.num_layers).flat_map(|layer| block_table(config, layer)));
    table
}

/// Name and shape of every parameter.
pub fn parameter_shapes(config: &Config, vocab_size: usize) -> BTreeMap<String, Vec<usize>> {
    parameter_table(config, vocab_size).into_iter().map(|(name, shape, _)| (name, shape)).collect()
}

/// New parameters, drawn from `rng`.
pub fn init_parameters(config: &Config, vocab_size: usize, rng: &mut Rng, device: &Device) -> Result<Named> {
    let mut parameters = Named::new();
    for (name, shape, init) in parameter_table(config, vocab_size) {
        let tensor = match (init, &shape[..]) {
            (Init::Zeros, shape) => Tensor::zeros(shape, DType::F32, device)?,
            (Init::Ones, shape) => Tensor::ones(shape, DType::F32, device)?,
            // Layers are drawn in GPT-2's own layout, (inputs, outputs).
            (Init::Normal(std), &[outputs, inputs]) if name.starts_with("h.") => {
                Tensor::from_vec(rng.normal(inputs * outputs, std), (inputs, outputs), device)?.t()?.contiguous()?
            }
            (Init::Normal(std), shape) => Tensor::from_vec(rng.normal(shape.iter().product(), std), shape, device)?,
        };
        parameters.insert(name, tensor);
    }
    Ok(parameters)
}

pub struct Gpt {
    wte: Tensor,              // (vocab_size, embed_dim)
    wpe: Tensor,              // (context, embed_dim)
    blocks: Vec<Vec<Tensor>>, // the parameters of each, as in `block_table`
    ln_f: LayerNorm,
    /// All parameters, if the model is trained.
    variables: BTreeMap<String, Var>,
    config: Config,
}

impl Gpt {
    /// A model for training. It copies `parameters`, in the type that it computes in.
    pub fn new(config: &Config, parameters: &Named) -> Result<Self> {
        let names = parameter_shapes(config, parameters["wte"].dim(0)?).into_keys();
        let variables: BTreeMap<String, Var> = names
            .map(|name| {
                let var = Var::from_tensor(&parameters[&name].to_dtype(config.precision.dtype())?)?;
                Ok((name, var))
            })
            .collect::<Result<_>>()?;
        let tracked = |name: &str| Ok(variables[name].as_tensor().clone());
        Ok(Self { variables: variables.clone(), ..Self::over(config, tracked)? })
    }

    /// The same model without gradients. A forward pass keeps nothing for a backward.
    pub fn frozen(config: &Config, parameters: &Named) -> Result<Self> {
        Self::over(config, |name| Ok(parameters[name].to_dtype(config.precision.dtype())?))
    }

    fn over(config: &Config, get: impl Fn(&str) -> Result<Tensor>) -> Result<Self> {
        let block = |layer| block_table(config, layer).iter().map(|(name, ..)| get(name)).collect();
        Ok(Self {
            wte: get("wte")?,
            wpe: get("wpe")?,
            blocks: (0..config.num_layers).map(block).collect::<Result<_>>()?,
            ln_f: LayerNorm::new(get("ln_f.weight")?, Some(get("ln_f.bias")?), NORM_EPSILON),
            variables: BTreeMap::new(),
            config: config.clone(),
        })
    }

    pub fn config(&self) -> &Config {
        &self.config
    }

    pub fn device(&self) -> &Device {
        self.wte.device()
    }

    /// All parameters, in the type that the model computes in. A frozen model has none.
    pub fn variables(&self) -> &BTreeMap<String, Var> {
        &self.variables
    }

    /// Mean cross-entropy in nats per token; `tokens` and `targets` are u32, (batch, seqlen).
    pub fn loss(&self, tokens: &Tensor, targets: &Tensor) -> Result<Tensor> {
        self.loss_after(&self.hidden(tokens)?, targets)
    }

    /// [`Self::loss`] from the result of [`Self::hidden`].
    pub fn loss_after(&self, hidden: &Tensor, targets: &Tensor) -> Result<Tensor> {
        Ok(linear_cross_entropy(&self.ln_f.forward(hidden)?, &self.wte, targets)?)
    }

    /// Logits of the token after `tokens`, one for each row of `wte`, also for rows of padding.
    pub fn next_token(&self, tokens: &[u32]) -> Result<Vec<f32>> {
        let x = self.hidden(&Tensor::new(tokens, self.device())?.unsqueeze(0)?)?; // (1, seqlen, embed_dim)
        let last = x.narrow(1, tokens.len() - 1, 1)?; // (1, 1, embed_dim)
        Ok(self.logits(&last)?.squeeze(0)?.to_vec1()?)
    }

    /// Logits of the next token at every position: u32 tokens (batch, seqlen) -> f32 (batch * seqlen, vocab_size).
    #[cfg(test)]
    pub fn forward(&self, tokens: &Tensor) -> Result<Tensor> {
        Ok(self.logits(&self.hidden(tokens)?)?)
    }

    /// The residual stream after all blocks: u32 tokens (batch, seqlen) -> (batch, seqlen, embed_dim).
    pub fn hidden(&self, tokens: &Tensor) -> Result<Tensor> {
        let (batch, seqlen) = tokens.dims2()?;
        let mask = match self.config.attention {
            AttentionKind::Standard => Some(causal_mask(seqlen, self.config.precision.dtype(), self.device())?),
            AttentionKind::Flash | AttentionKind::None => None,
        };
        let positions = Tensor::arange(0, seqlen as u32, self.device())?.broadcast_as((batch, seqlen))?;
        let mut x = (embedding(tokens, &self.wte)? + embedding(&positions, &self.wpe)?)?;
        for parameters in &self.blocks {
            let inputs: Vec<&Tensor> = [&x].into_iter().chain(parameters).collect();
            x = match self.config.checkpoint_activations {
                true => {
                    let (config, mask) = (self.config.clone(), mask.clone());
                    checkpoint(&inputs, move |inputs| block(&config, inputs, mask.as_ref()))?
                }
                false => block(&self.config, &inputs.into_iter().cloned().collect::<Vec<_>>(), mask.as_ref())?,
            };
        }
        Ok(x)
    }

    /// (batch, seqlen, embed_dim) -> f32 (batch * seqlen, vocab_size)
    fn logits(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        self.ln_f.forward(x)?.flatten_to(1)?.matmul(&self.wte.t()?)?.to_dtype(DType::F32)
    }
}

/// A transformer block: x (batch, seqlen, embed_dim) and the parameters of `block_table` -> (batch, seqlen, embed_dim).
fn block(config: &Config, inputs: &[Tensor], mask: Option<&Tensor>) -> candle_core::Result<Tensor> {
    let [x, ln_1, ln_1_bias, c_attn, c_attn_bias, c_proj, c_proj_bias, ln_2, ln_2_bias, fc, fc_bias, proj, proj_bias] =
        inputs
    else {
        unreachable!("x and 12 parameters")
    };
    let Config { num_heads, embed_dim, .. } = *config;
    let (heads, head_dim) = (3 * num_heads, config.head_dim());
    let h = layer_norm(x, ln_1, Some(ln_1_bias), NORM_EPSILON)?;
    // (batch, seqlen, 3 * num_heads, head_dim): the heads of q, then the heads of k, then the heads of v.
    let qkv = linear(&h, &c_attn.reshape((heads, head_dim, embed_dim))?, &c_attn_bias.reshape((heads, head_dim))?)?;
    let o = attention(config, &qkv, mask)?; // (batch, seqlen, num_heads, head_dim)
    if config.attention != AttentionKind::Flash {
        profile::mark("attention")?; // flash attention makes its own
    }
    let x = linear_add(&o, &c_proj.reshape((embed_dim, num_heads, head_dim))?, c_proj_bias, x)?;
    let h = layer_norm(&x, ln_2, Some(ln_2_bias), NORM_EPSILON)?;
    mlp_add(&h, [fc, fc_bias], [proj, proj_bias], &x)
}

/// Causal self-attention: (batch, seqlen, 3 * num_heads, head_dim) -> (batch, seqlen, num_heads, head_dim).
fn attention(config: &Config, qkv: &Tensor, mask: Option<&Tensor>) -> candle_core::Result<Tensor> {
    match (config.attention, mask) {
        (AttentionKind::None, _) => {
            let parts = qkv.chunk(3, 2)?;
            (&parts[0] + &parts[1])? + &parts[2]
        }
        (_, Some(mask)) => standard_attention(qkv, mask),
        (_, None) => {
            let attention = Attention::new().mask(Mask::Causal).deterministic(config.deterministic);
            Ok(attention.forward_qkv(qkv, config.num_heads)?)
        }
    }
}

/// Standard causal attention, for comparison. It stores the scores of all queries and keys.
///
/// qkv is (batch, seqlen, 3 * num_heads, head_dim), and the result is (batch, seqlen, num_heads, head_dim). `mask` is a
/// [`causal_mask`].
fn standard_attention(qkv: &Tensor, mask: &Tensor) -> candle_core::Result<Tensor> {
    let softmax_scale = 1.0 / (qkv.dim(D::Minus1)? as f64).sqrt();
    let parts = qkv.chunk(3, 2)?;
    let heads_first = |t: &Tensor| t.transpose(1, 2)?.contiguous(); // (batch, num_heads, seqlen, head_dim)
    let (q, k, v) = (heads_first(&parts[0])?, heads_first(&parts[1])?, heads_first(&parts[2])?);

    let scores = (q * softmax_scale)?.matmul(&k.t()?)?; // (batch, num_heads, seqlen, seqlen)
    let weights = candle_nn::ops::softmax(&scores.broadcast_add(mask)?, D::Minus1)?;
    weights.matmul(&v)?.transpose(1, 2)?.contiguous()
}

/// A mask to add to scores, (seqlen, seqlen): minus infinity if the key comes after the query, else 0.
fn causal_mask(seqlen: usize, dtype: DType, device: &Device) -> candle_core::Result<Tensor> {
    let position = Tensor::arange(0u32, seqlen as u32, device)?;
    let (query, key) = (position.reshape((seqlen, 1))?, position.reshape((1, seqlen))?);
    let hidden = key.broadcast_gt(&query)?;
    let value = |number: f32| Tensor::full(number, (seqlen, seqlen), device)?.to_dtype(dtype);
    hidden.where_cond(&value(f32::NEG_INFINITY)?, &value(0.0)?)
}
