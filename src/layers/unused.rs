//! Finds tensors that the layer would ignore although they change the result.
//!
//! A `VarBuilder` cannot list its names; it can only say whether it has a given one. So the layer asks for the names that
//! known checkpoints use.

use candle_nn::VarBuilder;

use super::config::{MultiHeadAttentionConfig, NamedProjection};
use super::error::{Error, Result};

/// A name that no checkpoint has. A builder that contains it contains every name (`VarBuilder::zeros`), so the check is
/// skipped.
const NO_TENSOR: &str = "a name that no tensor has";

/// Tensors next to q's projection that change the result.
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
    // Biases that are not below their fused projection: BEiT.
    "q_bias",
    "v_bias",
];

/// Tensors below a projection that change its weight: quantization scales and LoRA.
const CHANGE_WEIGHT: [&str; 3] = ["weight_scale", "weight_scale_inv", "lora_A.weight"];

/// Known weight names of q, or of q, k and v together.
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

/// Known weight names of o.
const KNOWN_O: [&str; 7] = [
    "o_proj.weight",
    "out_proj.weight",
    "c_proj.weight",
    "dense.weight",
    "wo.weight",
    "proj.weight",
    "to_out.0.weight",
];

/// Returns an error if the layer would ignore a known tensor of `vb`.
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
    /// Checks that the configured weights exist, or that no known weights of another naming exist. Without this check a
    /// `VarMap` would create new weights.
    ///
    /// If the configured weights exist, other known names are allowed: they belong to another layer, or `rename_f` maps two
    /// names to one tensor.
    fn check_names(&self) -> Result<()> {
        let known = |names: &[&str]| self.found(names.iter().map(|name| self.next_to_q(name)));
        let (qkv, o) = (known(&KNOWN_QKV), known(&KNOWN_O));
        // The usual case. It is tested first, because some builders read a whole tensor to answer `contains_tensor`.
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

    /// Returns an error if a configured projection would ignore a bias.
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

    /// Returns an error if another known tensor changes the result.
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

    /// `name` in the same folder as the first projection. For `"self.query"`, `q_norm.weight` becomes
    /// `"self.q_norm.weight"`.
    fn next_to_q(&self, name: &str) -> String {
        let folder = self.projections.first().and_then(|projection| projection.name.rsplit_once('.'));
        folder.map_or_else(|| name.to_string(), |(folder, _)| format!("{folder}.{name}"))
    }

    /// The `names` in the builder that are not the layer's own and not allowed by the user.
    fn found(&self, names: impl Iterator<Item = String>) -> Vec<String> {
        let own = |name: &str| self.projections.iter().any(|p| name.strip_suffix(".weight") == Some(p.name));
        names.filter(|name| !own(name) && self.holds(name)).collect()
    }

    /// Whether the builder has `name` and the user did not allow it.
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
