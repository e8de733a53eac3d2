//! Cases of layers: sizes, names, biases, mask, rotary embedding. The name of a case is the seed of its weights.

use std::collections::BTreeMap;
use std::fmt;

use anyhow::Result;
use attention_reference::{draw, Precision};
use candle_core::{DType, Device, Tensor, Var};
use candle_fa2::layers::{
    MultiHeadAttention, MultiHeadAttentionConfig, Projections, QkvOrder, Rotary, RotaryConfig, RotaryLayout,
    WeightLayout,
};
use candle_fa2::Mask;
use candle_nn::{VarBuilder, VarMap};

/// Number of positions in the rotary tables of every case.
pub const MAX_SEQLEN: usize = 160;

/// One layer and the shape of its input.
#[derive(Clone, Debug)]
pub struct Case {
    pub name: &'static str,
    pub device: Device,
    pub batch: usize,
    pub seqlen: usize,
    pub embed_dim: usize,
    pub num_heads: usize,
    pub num_heads_k: usize,
    pub head_dim: usize,
    /// The order of a fused projection: GPT-2's or GPT-NeoX's, with the names of that model.
    pub fused: Option<QkvOrder>,
    pub weight_layout: WeightLayout,
    /// Biases of q, k, v and o.
    pub biases: [bool; 4],
    pub mask: Mask,
    pub softmax_scale: Option<f64>,
    pub softcap: Option<f64>,
    /// ALiBi slopes, one per head.
    pub alibi_slopes: Option<&'static [f32]>,
    pub rotary: Option<Rotation>,
}

/// The rotary embedding of a case.
#[derive(Clone, Copy, Debug)]
pub struct Rotation {
    pub rotary_dim: usize,
    pub theta: f64,
    pub layout: RotaryLayout,
}

/// One layer with its weights, in one dtype.
pub struct Built {
    pub varmap: VarMap,
    pub layer: MultiHeadAttention,
}

impl Case {
    /// 4 heads of 16 over 70 tokens (a key tile and a part of one), separate projections without biases.
    pub fn new(name: &'static str) -> Self {
        Self {
            name,
            device: Device::Cpu,
            batch: 2,
            seqlen: 70,
            embed_dim: 64,
            num_heads: 4,
            num_heads_k: 4,
            head_dim: 16,
            fused: None,
            weight_layout: WeightLayout::OutIn,
            biases: [false; 4],
            mask: Mask::None,
            softmax_scale: None,
            softcap: None,
            alibi_slopes: None,
            rotary: None,
        }
    }

    pub fn config(&self) -> Result<MultiHeadAttentionConfig> {
        let [q_bias, k_bias, v_bias, o_bias] = self.biases;
        let projections = match self.fused {
            None => Projections::llama(),
            Some(QkvOrder::Concatenated) => Projections::gpt2(),
            Some(QkvOrder::ByKeyHead) => Projections::gpt_neox(),
        };
        let mut config = MultiHeadAttentionConfig::new(self.embed_dim, self.num_heads)
            .num_heads_k(self.num_heads_k)
            .head_dim(self.head_dim)
            .projections(projections)
            .weight_layout(self.weight_layout)
            .q_bias(q_bias)
            .k_bias(k_bias)
            .v_bias(v_bias)
            .o_bias(o_bias)
            .mask(self.mask);
        if let Some(softmax_scale) = self.softmax_scale {
            config = config.softmax_scale(softmax_scale);
        }
        if let Some(softcap) = self.softcap {
            config = config.softcap(softcap);
        }
        if let Some(slopes) = self.alibi_slopes {
            config = config.alibi_slopes(&Tensor::new(slopes, &self.device)?);
        }
        if let Some(rotation) = self.rotary {
            let rotary =
                RotaryConfig::new(rotation.rotary_dim, MAX_SEQLEN).theta(rotation.theta).layout(rotation.layout);
            config = config.rotary(&Rotary::new(&rotary, &self.device)?);
        }
        Ok(config)
    }

    /// The layer with the weights of this case as variables of `dtype`. Every dtype has the same values.
    pub fn build(&self, dtype: DType) -> Result<Built> {
        let varmap = VarMap::new();
        let layer = MultiHeadAttention::new(&self.config()?, VarBuilder::from_varmap(&varmap, dtype, &self.device))?;
        fill(&varmap, self.name)?;
        Ok(Built { varmap, layer })
    }

    /// The input, `(batch, seqlen, embed_dim)`.
    pub fn xs(&self, dtype: DType) -> Result<Tensor> {
        let xs = normal((self.batch, self.seqlen, self.embed_dim), 1.0, &format!("{} xs", self.name), dtype)?;
        Ok(xs.to_device(&self.device)?)
    }

    /// The same layer on `device`.
    pub fn on(&self, device: &Device) -> Self {
        Self { device: device.clone(), ..self.clone() }
    }
}

impl fmt::Display for Case {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "{self:?}")
    }
}

impl Built {
    /// The weights and biases by name.
    pub fn vars(&self) -> BTreeMap<String, Var> {
        vars(&self.varmap)
    }
}

/// The variables of a map, sorted by name.
pub fn vars(varmap: &VarMap) -> BTreeMap<String, Var> {
    varmap.data().lock().expect("no test panics while it holds the map").clone().into_iter().collect()
}

/// Sets every variable to normally distributed values, scaled so that outputs are near 1. The seed is `seed` and the name.
pub fn fill(varmap: &VarMap, seed: &str) -> Result<()> {
    for (name, var) in vars(varmap) {
        let deviation = if var.rank() == 2 { (var.elem_count() as f64).powf(-0.25) } else { 0.5 };
        let values = normal(var.shape(), deviation, &format!("{seed} {name}"), var.dtype())?;
        var.set(&values.to_device(var.device())?)?;
    }
    Ok(())
}

/// Normally distributed values; the seed is a text. They are rounded to bf16, so that every dtype holds the same values.
pub fn normal(shape: impl Into<candle_core::Shape>, deviation: f64, seed: &str, dtype: DType) -> Result<Tensor> {
    let shape = shape.into();
    let values = draw::normal(&mut draw::generator(seed), Precision::F64, shape.elem_count());
    let values = (Tensor::from_vec(values, shape, &Device::Cpu)? * deviation)?;
    Ok(values.to_dtype(DType::BF16)?.to_dtype(dtype)?)
}

/// Every option at least once, and the combinations that models use.
pub fn all() -> Vec<Case> {
    let causal = |name| Case { mask: Mask::Causal, ..Case::new(name) };
    let rotation = Rotation { rotary_dim: 16, theta: 10_000.0, layout: RotaryLayout::HalfSplit };
    let interleaved = Rotation { layout: RotaryLayout::Interleaved, ..rotation };
    let window = |left, right| Mask::Window { left, right };
    let (concatenated, by_key_head) = (Some(QkvOrder::Concatenated), Some(QkvOrder::ByKeyHead));
    vec![
        Case::new("plain"),
        causal("causal"),
        Case { num_heads_k: 2, rotary: Some(rotation), ..causal("llama") },
        Case { num_heads_k: 2, biases: [true, true, true, false], rotary: Some(rotation), ..causal("qwen2") },
        Case { biases: [true, false, true, true], ..Case::new("whisper") },
        Case {
            num_heads_k: 1,
            rotary: Some(interleaved),
            mask: window(Some(5), Some(0)),
            ..Case::new("multi-query window")
        },
        Case { fused: concatenated, weight_layout: WeightLayout::InOut, biases: [true; 4], ..causal("gpt2") },
        Case { fused: concatenated, num_heads_k: 1, biases: [true; 4], ..causal("starcoder") },
        Case {
            fused: by_key_head,
            biases: [true; 4],
            rotary: Some(Rotation { rotary_dim: 4, ..rotation }),
            ..causal("gpt-neox")
        },
        Case {
            fused: by_key_head,
            biases: [true; 4],
            alibi_slopes: Some(&[0.5, 0.25, 0.125, 0.0625]),
            ..causal("bloom")
        },
        Case { fused: by_key_head, num_heads: 6, num_heads_k: 2, rotary: Some(rotation), ..causal("falcon 40b") },
        Case { fused: by_key_head, num_heads_k: 2, biases: [true; 4], ..Case::new("by key head, grouped") },
        Case { fused: by_key_head, num_heads_k: 1, rotary: Some(rotation), ..causal("falcon 7b") },
        Case { fused: by_key_head, num_heads_k: 1, ..causal("by key head, multi-query") },
        Case {
            fused: concatenated,
            num_heads_k: 2,
            rotary: Some(Rotation { rotary_dim: 8, theta: 500.0, ..rotation }),
            mask: window(Some(20), Some(3)),
            ..Case::new("fused, grouped, part of each head rotated")
        },
        Case {
            head_dim: 24,
            num_heads: 3,
            num_heads_k: 3,
            softmax_scale: Some(0.3),
            softcap: Some(2.0),
            rotary: Some(Rotation { rotary_dim: 20, ..interleaved }),
            biases: [true; 4],
            ..causal("gemma2")
        },
        Case { alibi_slopes: Some(&[0.5, 0.25, 0.125, 0.0625]), ..causal("slopes") },
        Case { weight_layout: WeightLayout::InOut, batch: 1, ..causal("separate, weights (in, out)") },
    ]
}
