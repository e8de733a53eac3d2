//! Every error text of the layers.

use std::collections::HashMap;
use std::fmt::Debug;

use anyhow::Result;
use candle_core::{DType, Device, DeviceLocation, Tensor, Var};
use candle_fa2::layers::{
    Error, MultiHeadAttention, MultiHeadAttentionConfig, Projections, QkvOrder, Rotary, RotaryConfig, RotaryLayout,
    WeightLayout,
};
use candle_fa2::{Attention, CuSeqlens, KeyLengths, Mask, PaddingSide};
use candle_nn::kv_cache::KvCache;
use candle_nn::{VarBuilder, VarMap};

/// Asserts that the result is an error with this text, also after conversion to Candle's error.
fn refused<T: Debug>(result: Result<T, Error>, text: &str) {
    let error = result.expect_err(text);
    // With RUST_BACKTRACE, Candle's own errors print a backtrace after their text.
    let said = |error: String| match error.split_once("\n   0: ") {
        Some((text, _)) => text.to_string(),
        None => error,
    };
    assert_eq!(said(error.to_string()), text);
    assert_eq!(said(candle_core::Error::from(error).to_string()), text);
}

/// A function of Candle's `Result` and one of the layers' may call both rooms with `?`.
#[test]
fn question_marks_convert() -> Result<()> {
    fn by_candle(config: &MultiHeadAttentionConfig, x: &Tensor) -> candle_core::Result<Tensor> {
        let layer = MultiHeadAttention::new(config, VarBuilder::zeros(DType::F32, &Device::Cpu))?;
        Ok(Attention::new().forward(x, x, &layer.forward(x)?)?)
    }
    fn by_layers(x: &Tensor) -> candle_fa2::layers::Result<Tensor> {
        Ok(Attention::new().forward(x, x, x)?.contiguous()?)
    }
    let (config, x) = (MultiHeadAttentionConfig::new(64, 4), zeros((2, 64))?);
    let rank =
        "expected (batch, seqlen, embed_dim), got 2 axes in shape [2, 64]; reshape it, or use the packed call for \
                sequences laid end to end";
    assert_eq!(by_candle(&config, &x).expect_err("has no batch").to_string(), format!("xs: {rank}"));
    let error = by_layers(&x).expect_err("has no heads");
    assert!(matches!(error, Error::Operator(candle_fa2::Error::Rank { tensor: "q", .. })), "{error}");
    Ok(())
}

fn zeros(shape: impl Into<candle_core::Shape>) -> Result<Tensor> {
    Ok(Tensor::zeros(shape, DType::F32, &Device::Cpu)?)
}

/// Weights of 0 in any shape, untracked.
fn untracked(config: &MultiHeadAttentionConfig) -> Result<MultiHeadAttention, Error> {
    MultiHeadAttention::new(config, VarBuilder::zeros(DType::F32, &Device::Cpu))
}

#[test]
fn configurations() -> Result<()> {
    let config = MultiHeadAttentionConfig::new;
    refused(untracked(&config(0, 4)), "embed_dim is 0; a layer needs at least 1");
    refused(untracked(&config(64, 0)), "num_heads is 0; a layer needs at least 1");
    refused(untracked(&config(64, 4).num_heads_k(0)), "num_heads_k is 0; a layer needs at least 1");
    refused(untracked(&config(64, 4).head_dim(0)), "head_dim is 0; a layer needs at least 1");
    refused(untracked(&config(100, 3)), "embed_dim 100 is not a multiple of num_heads 3; set head_dim");
    refused(
        untracked(&config(64, 8).num_heads_k(3)),
        "num_heads 8 of q is not a multiple of num_heads_k 3 of k and v; each key head must serve the same number of query heads",
    );
    refused(
        untracked(&config(64, 4).projections(Projections::gpt2()).q_bias(true).v_bias(true)),
        "q_bias true, k_bias false, v_bias true differ, but a fused projection has one bias for all three; use \
         Projections::Separate",
    );
    let rotary = Rotary::new(&RotaryConfig::new(32, 128), &Device::Cpu)?;
    refused(
        untracked(&config(64, 4).rotary(&rotary)),
        "rotary_dim 32 is larger than head_dim 16; build Rotary with rotary_dim 16 or less",
    );
    refused(
        untracked(&config(64, 1 << 62).head_dim(512)),
        "embed_dim 64, num_heads 4611686018427387904, num_heads_k 4611686018427387904, head_dim 512: the weights would \
         be larger than any memory; choose smaller sizes",
    );
    // 2^30 * 3 * 2^30 * 1 elements fit usize, but their bytes do not.
    refused(
        untracked(&config(1 << 30, 1 << 30)),
        "embed_dim 1073741824, num_heads 1073741824, num_heads_k 1073741824, head_dim 1: the weights would be larger \
         than any memory; choose smaller sizes",
    );
    // The constructor refuses options that the operator refuses for every input.
    refused(untracked(&config(64, 4).softcap(-1.0)), "softcap -1 must be finite and above 0; leave it out for no cap");
    refused(
        untracked(&config(1 << 62, 1)),
        "head_dim 4611686018427387904 is not supported (supported: 1 to 512); choose another num_heads",
    );
    refused(
        untracked(&config(64, 4).softmax_scale(f64::NAN)),
        "softmax_scale NaN is not finite; leave it out for 1/sqrt(head_dim)",
    );
    refused(
        untracked(&config(64, 4).alibi_slopes(&zeros(3)?)),
        "alibi_slopes: a layer takes one slope per head, shape [4] (num_heads), got [3]; for slopes per sequence use Attention",
    );
    // With these slopes a layer would refuse every batch of another size.
    refused(
        untracked(&config(64, 4).alibi_slopes(&zeros((1, 4))?)),
        "alibi_slopes: a layer takes one slope per head, shape [4] (num_heads), got [1, 4]; for slopes per sequence use Attention",
    );
    let lengths = KeyLengths::new(&[3], PaddingSide::Right, &Device::Cpu)?;
    refused(
        untracked(&config(64, 4).attention(Attention::new().key_lengths(&lengths))),
        "key_lengths: a layer cannot store the lengths of one batch; remove key_lengths, and for padded batches unpad with \
         CuSeqlens and call forward_packed",
    );
    refused(
        untracked(&config(64, 4).alibi_slopes(&zeros(4)?.to_dtype(DType::F64)?)),
        "alibi_slopes: dtype F64 is not supported (supported: F32); convert with to_dtype",
    );
    Ok(())
}

/// The error names weights that are missing or have the other layout.
#[test]
fn weights() -> Result<()> {
    let varmap = VarMap::new();
    let vb = VarBuilder::from_varmap(&varmap, DType::F32, &Device::Cpu);
    MultiHeadAttention::new(&MultiHeadAttentionConfig::gpt2(64, 4), vb.clone())?;
    refused(
        MultiHeadAttention::new(&MultiHeadAttentionConfig::gpt2(64, 4).weight_layout(WeightLayout::OutIn), vb),
        "shape mismatch on c_attn.weight: [192, 64] <> [64, 192]",
    );
    refused(
        MultiHeadAttention::new(&MultiHeadAttentionConfig::new(64, 4), VarBuilder::zeros(DType::U8, &Device::Cpu)),
        "weights: dtype U8 of the VarBuilder is not supported (supported: F64, F32, F16, BF16); build it with one of these",
    );
    let none = VarBuilder::from_tensors(Default::default(), DType::F32, &Device::Cpu);
    let missing = MultiHeadAttention::new(&MultiHeadAttentionConfig::new(64, 4), none.pp("attn"));
    let text = missing.expect_err("there are no weights").to_string();
    assert!(text.starts_with("cannot find tensor attn.q_proj.weight"), "{text}");
    Ok(())
}

/// The weights of a layer of `config` below `attn`, all 0, and more tensors with these `names`. The layer never reads the
/// shapes of these tensors.
fn with(config: &MultiHeadAttentionConfig, names: &[&str]) -> Result<VarBuilder<'static>> {
    let varmap = VarMap::new();
    MultiHeadAttention::new(config, VarBuilder::from_varmap(&varmap, DType::F32, &Device::Cpu).pp("attn"))?;
    let mut tensors = HashMap::new();
    for (name, var) in super::case::vars(&varmap) {
        tensors.insert(name, var.as_detached_tensor());
    }
    for name in names {
        tensors.insert(format!("attn.{name}"), zeros(1)?);
    }
    Ok(VarBuilder::from_tensors(tensors, DType::F32, &Device::Cpu).pp("attn"))
}

/// Tensors that change the result, but that the layer would not use.
#[test]
fn unused_weights() -> Result<()> {
    let (llama, gpt2) = (MultiHeadAttentionConfig::new(64, 4), MultiHeadAttentionConfig::gpt2(64, 4));
    let new = MultiHeadAttention::new;
    let qwen2 = llama.clone().qkv_bias(true);
    refused(
        new(&llama, with(&qwen2, &[])?),
        "attn.q_proj.bias, attn.k_proj.bias, attn.v_proj.bias: the VarBuilder has them, but the configuration does not use \
         them; add .q_bias(true).k_bias(true).v_bias(true) to use them, or \
         .allow_unused(\"q_proj.bias\").allow_unused(\"k_proj.bias\").allow_unused(\"v_proj.bias\") to ignore them",
    );
    refused(
        new(&qwen2, with(&qwen2.clone().o_bias(true), &[])?),
        "attn.o_proj.bias: the VarBuilder has it, but the configuration does not use it; add .o_bias(true) to use it, or \
         .allow_unused(\"o_proj.bias\") to ignore it",
    );
    refused(
        new(&gpt2.clone().qkv_bias(false), with(&gpt2, &[])?),
        "attn.c_attn.bias: the VarBuilder has it, but the configuration does not use it; add .qkv_bias(true) to use it, or \
         .allow_unused(\"c_attn.bias\") to ignore it",
    );
    // Without a prefix.
    let varmap = VarMap::new();
    let vb = VarBuilder::from_varmap(&varmap, DType::F32, &Device::Cpu);
    new(&llama.clone().o_bias(true), vb.clone())?;
    refused(
        new(&llama, vb),
        "o_proj.bias: the VarBuilder has it, but the configuration does not use it; add .o_bias(true) to use it, or \
         .allow_unused(\"o_proj.bias\") to ignore it",
    );

    refused(
        new(&llama, with(&llama, &["q_norm.weight", "k_norm.weight"])?),
        "attn.q_norm.weight, attn.k_norm.weight: the VarBuilder has them, but the layer cannot apply them; fold scales or \
         LoRA into the weights, apply norms or sinks yourself around Attention, or add \
         .allow_unused(\"q_norm.weight\").allow_unused(\"k_norm.weight\") to ignore them",
    );
    let [q, k, v, o] = ["self.query", "self.key", "self.value", "output.dense"].map(String::from);
    let bert = llama.clone().projections(Projections::Separate { q, k, v, o });
    for (config, name) in [
        (&llama, "sinks"),
        (&llama, "o_proj.weight_scale_inv"),
        (&gpt2, "c_attn.lora_A.weight"),
        // In the folder of q, if the name of q has one.
        (&bert, "self.distance_embedding.weight"),
    ] {
        let text = format!(
            "attn.{name}: the VarBuilder has it, but the layer cannot apply it; fold scales or LoRA into the weights, \
             apply norms or sinks yourself around Attention, or add .allow_unused({name:?}) to ignore it"
        );
        refused(new(config, with(config, &[name])?), &text);
    }
    Ok(())
}

/// Names of another model. A file does not have these names, and a `VarMap` would create new weights.
#[test]
fn other_names() -> Result<()> {
    let (llama, gpt2) = (MultiHeadAttentionConfig::new(64, 4), MultiHeadAttentionConfig::gpt2(64, 4));
    let text = "attn.c_attn.weight: not found, but the VarBuilder has attn.q_proj.weight; set the names with \
                .projections(..), or add .allow_unused(\"q_proj.weight\") to ignore it";
    refused(MultiHeadAttention::new(&gpt2, with(&llama, &[])?), text);

    let varmap = VarMap::new();
    let vb = VarBuilder::from_varmap(&varmap, DType::F32, &Device::Cpu).pp("attn");
    MultiHeadAttention::new(&llama, vb.clone())?;
    refused(MultiHeadAttention::new(&gpt2, vb.clone()), text);
    assert_eq!(varmap.all_vars().len(), 4, "a refused layer makes no variables");
    MultiHeadAttention::new(&gpt2.allow_unused("q_proj.weight"), vb.clone())?;

    let [q, k, v] = ["q_proj", "k_proj", "v_proj"].map(String::from);
    let whisper = llama.projections(Projections::Separate { q, k, v, o: "out_proj".into() });
    refused(
        MultiHeadAttention::new(&whisper, vb),
        "attn.out_proj.weight: not found, but the VarBuilder has attn.o_proj.weight, attn.c_proj.weight; set the \
         names with .projections(..), or add \
         .allow_unused(\"o_proj.weight\").allow_unused(\"c_proj.weight\") to ignore them",
    );
    Ok(())
}

/// Two projections with one name would load the same weight if their shapes agree.
#[test]
fn same_names() {
    let separate = |names: [&str; 4]| {
        let [q, k, v, o] = names.map(String::from);
        untracked(&MultiHeadAttentionConfig::new(64, 4).projections(Projections::Separate { q, k, v, o }))
    };
    let text = |first, second, name| {
        format!(
            "projections {first} and {second} have the same name {name:?} and would share weights; give them different \
             names, or map the names with VarBuilder::rename_f if sharing is intended"
        )
    };
    refused(separate(["q_proj", "k_proj", "k_proj", "o_proj"]), &text("k", "v", "k_proj"));
    refused(separate(["q_proj", "k_proj", "v_proj", "q_proj"]), &text("q", "o", "q_proj"));
    let fused = Projections::Fused { qkv: "proj".into(), o: "proj".into(), order: QkvOrder::Concatenated };
    refused(untracked(&MultiHeadAttentionConfig::new(64, 4).projections(fused)), &text("qkv", "o", "proj"));
}

#[test]
fn rotary() -> Result<()> {
    let new = |config: RotaryConfig| Rotary::new(&config, &Device::Cpu);
    refused(
        new(RotaryConfig::new(63, 8)),
        "rotary_dim 63 must be even and above 0, because pairs of values are rotated",
    );
    refused(new(RotaryConfig::new(0, 8)), "rotary_dim 0 must be even and above 0, because pairs of values are rotated");
    // A max_seqlen that means "no limit", one position more than the limit, and a huge rotary_dim without positions.
    for (rotary_dim, max_seqlen) in [(64, usize::MAX / 2), (64, (1 << 23) + 1), (usize::MAX - 1, 0)] {
        let text = format!(
            "rotary tables for max_seqlen {max_seqlen} and rotary_dim {rotary_dim} would hold more than 268435456 values \
             each; set max_seqlen to the longest sequence in use"
        );
        refused(new(RotaryConfig::new(rotary_dim, max_seqlen)), &text);
    }
    refused(
        new(RotaryConfig::new(8, 8).theta(0.0)),
        "theta 0 of the rotary embedding must be finite and above 0; leave it out for 10000",
    );
    refused(
        new(RotaryConfig::new(8, 8).theta(f64::INFINITY)),
        "theta inf of the rotary embedding must be finite and above 0; leave it out for 10000",
    );
    refused(
        new(RotaryConfig::new(8, 8).frequencies(vec![1.0, 0.5])),
        "frequencies of the rotary embedding: got 2, but rotary_dim 8 has 4 pairs",
    );
    refused(
        new(RotaryConfig::new(4, 8).frequencies(vec![1.0, f64::NAN])),
        "frequency NaN of pair 1 of the rotary embedding is not finite",
    );
    let rotary = new(RotaryConfig::new(8, 16).layout(RotaryLayout::Interleaved))?;
    refused(
        rotary.apply(&zeros((2, 3, 8))?, 0),
        "xs: expected (batch, seqlen, num_heads, head_dim), got 3 axes in shape [2, 3, 8]; reshape it, or use the packed call for sequences laid end to end",
    );
    refused(
        rotary.apply(&zeros((1, 3, 2, 6))?, 0),
        "rotary_dim 8 is larger than head_dim 6; build Rotary with rotary_dim 6 or less",
    );
    refused(
        rotary.apply(&zeros((1, 3, 2, 8))?, 14),
        "positions 14..17 reach past the rotary tables' max_seqlen 16; build Rotary with at least 17",
    );
    refused(
        rotary.apply(&zeros((1, 3, 2, 8))?.to_dtype(DType::U32)?, 0),
        "xs: dtype U32 is not supported (supported: F64, F32, F16, BF16); convert with to_dtype",
    );
    let cu_seqlens = CuSeqlens::from_lengths(&[2, 17], &Device::Cpu)?;
    refused(
        rotary.apply_packed(&zeros((19, 2, 8))?, &cu_seqlens),
        "positions 0..17 reach past the rotary tables' max_seqlen 16; build Rotary with at least 17",
    );
    refused(
        rotary.apply_packed(&zeros((20, 2, 8))?, &cu_seqlens),
        "cu_seqlens must end at the number of rows of xs: 20 in shape [20, 2, 8], got 19; make the lengths with CuSeqlens::from_lengths from this batch",
    );
    refused(
        rotary.apply_packed(&zeros((19, 8))?, &cu_seqlens),
        "xs: expected (total, num_heads, head_dim), got 2 axes in shape [19, 8]; reshape it, or use the padded call for sequences of one length",
    );
    Ok(())
}

#[test]
fn inputs() -> Result<()> {
    let rotary = Rotary::new(&RotaryConfig::new(16, 8), &Device::Cpu)?;
    let layer = untracked(&MultiHeadAttentionConfig::new(64, 4).mask(Mask::Causal).rotary(&rotary))?;
    refused(layer.forward(&zeros((5, 64))?), "xs: expected (batch, seqlen, embed_dim), got 2 axes in shape [5, 64]; reshape it, or use the packed call for sequences laid end to end");
    refused(
        layer.forward(&zeros((2, 5, 63))?),
        "xs: embed_dim must be 64 as in the layer, got 63 in shape [2, 5, 63]; give both the same embed_dim",
    );
    refused(
        layer.forward(&zeros((2, 5, 64))?.to_dtype(DType::F16)?),
        "xs: dtype F16 differs from the weights' F32; convert with to_dtype",
    );
    let too_long = "positions 0..9 reach past the rotary tables' max_seqlen 8; build Rotary with at least 9";
    refused(layer.forward(&zeros((2, 9, 64))?), too_long);
    let cu_seqlens = CuSeqlens::from_lengths(&[3, 9], &Device::Cpu)?;
    refused(layer.forward_packed(&zeros((12, 64))?, &cu_seqlens), too_long);
    refused(
        layer.forward_packed(&zeros((11, 64))?, &cu_seqlens),
        "cu_seqlens must end at the number of rows of xs: 11 in shape [11, 64], got 12; make the lengths with CuSeqlens::from_lengths from this batch",
    );
    refused(
        layer.forward_packed(&zeros((1, 12, 64))?, &cu_seqlens),
        "xs: expected (total, embed_dim), got 3 axes in shape [1, 12, 64]; reshape it, or use the padded call for sequences of one length",
    );
    // Candle's `Module` returns the same text.
    let module: &dyn candle_core::Module = &layer;
    let text = module.forward(&zeros((2, 5, 63))?).expect_err("63 is not 64").to_string();
    assert_eq!(
        text,
        "xs: embed_dim must be 64 as in the layer, got 63 in shape [2, 5, 63]; give both the same embed_dim"
    );
    Ok(())
}

/// Texts of errors that need a second device.
#[test]
fn devices() {
    let (got, expected) = (DeviceLocation::Cpu, DeviceLocation::Cuda { gpu_id: 1 });
    refused::<()>(
        Err(Error::InputDevice { got, expected }),
        "xs: on device Cpu, but the weights are on Cuda { gpu_id: 1 }; move it with to_device",
    );
    refused::<()>(
        Err(Error::RotaryDevice { got, expected }),
        "rotary: tables on device Cpu, but q and k are on Cuda { gpu_id: 1 }; build Rotary there",
    );
}

/// Tracked tensors, whose gradients a cache would drop.
#[test]
fn decoding_while_training() -> Result<()> {
    let varmap = VarMap::new();
    let vb = VarBuilder::from_varmap(&varmap, DType::F32, &Device::Cpu);
    let config = MultiHeadAttentionConfig::gpt2(64, 4);
    let layer = MultiHeadAttention::new(&config, vb.pp("h.0.attn"))?;
    let mut cache = layer.new_cache(8);
    let xs = zeros((1, 3, 64))?;
    refused(
        layer.forward_cached(&xs, &mut cache),
        "h.0.attn.c_attn.weight: tracked for gradients, which the KV cache would drop; decode with the layer that \
         .detach() returns, or train with forward",
    );
    let var = Var::from_tensor(&xs)?;
    let text = "xs: tracked for gradients, which the KV cache would drop; call .detach() on it, or train with forward";
    refused(layer.detach().forward_cached(var.as_tensor(), &mut cache), text);
    // A tensor computed from a variable.
    refused(layer.detach().forward_cached(&(var.as_tensor() * 2.0)?, &mut cache), text);
    assert_eq!(cache.current_seq_len(), 0);

    // Only a bias is tracked.
    let mut tensors = HashMap::new();
    for (name, var) in super::case::vars(&varmap) {
        let bias = name.ends_with("c_proj.bias");
        tensors.insert(name, if bias { var.as_tensor().clone() } else { var.as_detached_tensor() });
    }
    let vb = VarBuilder::from_tensors(tensors, DType::F32, &Device::Cpu);
    refused(
        MultiHeadAttention::new(&config, vb.pp("h.0.attn"))?.forward_cached(&xs, &mut cache),
        "h.0.attn.c_proj.bias: tracked for gradients, which the KV cache would drop; decode with the layer that \
         .detach() returns, or train with forward",
    );
    Ok(())
}

#[test]
fn decoding_masks() -> Result<()> {
    let xs = zeros((1, 3, 64))?;
    let decode = |mask| {
        let layer = untracked(&MultiHeadAttentionConfig::new(64, 4).mask(mask))?;
        layer.forward_cached(&xs, &mut layer.new_cache(8))
    };
    refused(
        decode(Mask::None),
        "mask None shows a query later keys, which the KV cache does not hold yet; use Mask::Causal or a window with \
         right: Some(0)",
    );
    refused(
        decode(Mask::Window { left: Some(4), right: Some(1) }),
        "mask Window { left: Some(4), right: Some(1) } shows a query later keys, which the KV cache does not hold yet; \
         use Mask::Causal or a window with right: Some(0)",
    );
    for mask in [Mask::Causal, Mask::Window { left: Some(0), right: Some(0) }] {
        decode(mask)?;
    }
    Ok(())
}

#[test]
fn caches() -> Result<()> {
    let rotary = Rotary::new(&RotaryConfig::new(16, 8), &Device::Cpu)?;
    let config = MultiHeadAttentionConfig::new(64, 4).num_heads_k(2).mask(Mask::Causal).rotary(&rotary);
    let layer = untracked(&config)?;
    let xs = zeros((2, 3, 64))?;
    refused(
        layer.forward_cached(&xs, &mut KvCache::new(2, 8)),
        "cache of k grows along axis 2, but the tokens of (batch, seqlen, num_heads_k, head_dim) are on axis 1; make it \
         with new_cache",
    );
    for mut cache in [layer.new_cache(0), KvCache::new(1, 0)] {
        refused(
            layer.forward_cached(&xs, &mut cache),
            "cache of k has max_seq_len 0 and cannot grow; make it with room for 1 token or more",
        );
    }
    let mut cache = layer.new_cache(4);
    layer.forward_cached(&xs, &mut cache)?;
    refused(
        layer.forward_cached(&zeros((1, 1, 64))?, &mut cache),
        "cache of k holds (2, 3, 2, 16) F32 on Cpu, but this call adds (1, .., 2, 16) F32 on Cpu; call .reset() or use \
         another cache",
    );
    let other = untracked(&MultiHeadAttentionConfig::new(64, 4).mask(Mask::Causal))?;
    refused(
        other.forward_cached(&xs, &mut cache),
        "cache of k holds (2, 3, 2, 16) F32 on Cpu, but this call adds (2, .., 4, 16) F32 on Cpu; call .reset() or use \
         another cache",
    );
    let wide = VarBuilder::zeros(DType::F64, &Device::Cpu);
    let wide = MultiHeadAttention::new(&config, wide)?;
    refused(
        wide.forward_cached(&xs.to_dtype(DType::F64)?, &mut cache),
        "cache of k holds (2, 3, 2, 16) F32 on Cpu, but this call adds (2, .., 2, 16) F64 on Cpu; call .reset() or use \
         another cache",
    );
    refused(
        layer.forward_cached(&zeros((2, 6, 64))?, &mut cache),
        "positions 3..9 reach past the rotary tables' max_seqlen 8; build Rotary with at least 9",
    );
    let mut uneven = cache.clone();
    uneven.v_cache_mut().append(&zeros((2, 1, 2, 16))?)?;
    refused(
        layer.forward_cached(&xs, &mut uneven),
        "cache holds 3 tokens of k, but 4 of v; call .reset() and begin again",
    );
    let mut other_axis = layer.new_cache(4);
    *other_axis.v_cache_mut() = candle_nn::kv_cache::Cache::new(3, 4);
    refused(
        layer.forward_cached(&xs, &mut other_axis),
        "cache of v grows along axis 3, but the tokens of (batch, seqlen, num_heads_k, head_dim) are on axis 1; make it \
         with new_cache",
    );
    Ok(())
}
