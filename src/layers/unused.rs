//! Tensors that lie next to a layer's weights and that the layer would leave unused, so that its result is wrong.
//!
//! A `VarBuilder` cannot list its names, only say whether it holds one. So the layer asks for names that checkpoints
//! are known to use.

use candle_nn::VarBuilder;

use super::config::NamedProjection;
use super::MultiHeadAttentionConfig;
use crate::{Error, Result};

/// No checkpoint has it. A builder that holds it says yes to every name, as `VarBuilder::zeros` does.
const NO_TENSOR: &str = "a name that no tensor has";

/// Names, next to q's projection, of tensors that change the result.
const NOT_APPLIED: [&str; 18] = [
    // Norms of q and k: Qwen3, Gemma 3, OLMo 2, Cohere; Phi, Persimmon; HunYuan; MPT; StableLM 2.
    "q_norm.weight",
    "k_norm.weight",
    "q_layernorm.weight",
    "k_layernorm.weight",
    "query_layernorm.weight",
    "key_layernorm.weight",
    "q_ln.weight",
    "k_ln.weight",
    "q_layernorm.norms.0.weight",
    "k_layernorm.norms.0.weight",
    // A norm of o: BitNet; BEiT-3.
    "attn_sub_norm.weight",
    "inner_attn_ln.weight",
    // Attention sinks: gpt-oss.
    "sinks",
    // Biases of the scores by distance: T5; Swin, BEiT; BERT.
    "relative_attention_bias.weight",
    "relative_position_bias_table",
    "distance_embedding.weight",
    // Biases apart from their fused projection: BEiT.
    "q_bias",
    "v_bias",
];

/// Names, below each projection's, of tensors that change its weight: the scales of a quantised one, and LoRA.
const CHANGE_WEIGHT: [&str; 3] = ["weight_scale", "weight_scale_inv", "lora_A.weight"];

/// Weights of q, or of q, k and v, one for each known arrangement of projections.
const KNOWN_QKV: [&str; 13] = [
    "q_proj.weight",
    "c_attn.weight",
    "query_key_value.weight",
    "qkv_proj.weight",
    "Wqkv.weight",
    "wqkv.weight",
    "W_pack.weight",
    "in_proj.weight",
    "in_proj_weight",
    "qkv.weight",
    "query.weight",
    "wq.weight",
    "to_q.weight",
];

/// Weights of o.
const KNOWN_O: [&str; 7] = [
    "o_proj.weight",
    "out_proj.weight",
    "c_proj.weight",
    "dense.weight",
    "wo.weight",
    "proj.weight",
    "to_out.0.weight",
];

/// Whether `vb` holds a known tensor that the layer would ignore.
pub(super) fn check(config: &MultiHeadAttentionConfig, vb: &VarBuilder) -> Result<()> {
    if vb.contains_tensor(NO_TENSOR) {
        return Ok(());
    }
    let unused = Unused { config, vb, projections: config.named_projections() };
    unused.check_names()?;
    unused.check_biases()?;
    unused.check_others()
}

struct Unused<'a> {
    config: &'a MultiHeadAttentionConfig,
    vb: &'a VarBuilder<'a>,
    projections: Vec<NamedProjection<'a>>,
}

impl Unused<'_> {
    /// Whether the weights are there, or at least none of another model in their place: a `VarMap` would draw new ones.
    ///
    /// Other weights are no error while those of `config` are there. They belong to another layer with this prefix, or
    /// the builder renames, and holds one weight under two names.
    fn check_names(&self) -> Result<()> {
        let known = |names: &[&str]| self.found(names.iter().map(|name| self.next_to_q(name)));
        let (qkv, o) = (known(&KNOWN_QKV), known(&KNOWN_O));
        // The usual case, before the layer asks for its own weights: some builders read a tensor to say that they hold it.
        if qkv.is_empty() && o.is_empty() {
            return Ok(());
        }
        let mut weights =
            self.projections.iter().map(|projection| (projection.role, format!("{}.weight", projection.name)));
        let Some((role, missing)) = weights.find(|(_, weight)| !self.vb.contains_tensor(weight)) else {
            return Ok(());
        };
        let found = if role == "o" { o } else { qkv };
        if found.is_empty() {
            return Ok(());
        }
        let (missing, tensors) = (self.full(&missing), self.full_names(&found));
        Err(Error::OtherProjections { missing, tensors, allow: allow(&found) })
    }

    /// Whether no projection drops its bias.
    fn check_biases(&self) -> Result<()> {
        let bias = |projection: &NamedProjection| format!("{}.bias", projection.name);
        let without = self.projections.iter().filter(|projection| !projection.bias);
        let dropped: Vec<_> = without.filter(|projection| self.holds(&bias(projection))).collect();
        if dropped.is_empty() {
            return Ok(());
        }
        let names: Vec<String> = dropped.iter().map(|projection| bias(projection)).collect();
        let add = dropped.iter().map(|projection| format!(".{}_bias(true)", projection.role)).collect();
        Err(Error::UnusedBiases { tensors: self.full_names(&names), add, allow: allow(&names) })
    }

    /// Whether there is nothing else that changes the result.
    fn check_others(&self) -> Result<()> {
        let of_weights = self
            .projections
            .iter()
            .flat_map(|projection| CHANGE_WEIGHT.map(|part| format!("{}.{part}", projection.name)));
        let found = self.found(NOT_APPLIED.iter().map(|name| self.next_to_q(name)).chain(of_weights));
        if found.is_empty() {
            return Ok(());
        }
        Err(Error::UnusedTensors { tensors: self.full_names(&found), allow: allow(&found) })
    }

    /// `name` in the folder of the first projection's name: with `"self.query"`, the norm of q is `"self.q_norm"`.
    fn next_to_q(&self, name: &str) -> String {
        let folder = self.projections.first().and_then(|projection| projection.name.rsplit_once('.'));
        folder.map_or_else(|| name.to_string(), |(folder, _)| format!("{folder}.{name}"))
    }

    /// Those of `names` that the builder holds, that are not the layer's own and that the user did not allow.
    fn found(&self, names: impl Iterator<Item = String>) -> Vec<String> {
        let own = |name: &str| self.projections.iter().any(|p| name.strip_suffix(".weight") == Some(p.name));
        names.filter(|name| !own(name) && self.holds(name)).collect()
    }

    fn holds(&self, name: &str) -> bool {
        !self.config.allowed_unused.iter().any(|allowed| allowed == name) && self.vb.contains_tensor(name)
    }

    /// A name with the prefix of the builder.
    fn full(&self, name: &str) -> String {
        match self.vb.prefix() {
            prefix if prefix.is_empty() => name.to_string(),
            prefix => format!("{prefix}.{name}"),
        }
    }

    fn full_names(&self, names: &[String]) -> Vec<String> {
        names.iter().map(|name| self.full(name)).collect()
    }
}

/// The calls that allow these tensors.
fn allow(names: &[String]) -> String {
    names.iter().map(|name| format!(".allow_unused({name:?})")).collect()
}
