//! Weights from files: the layouts of GPT-2 and GPT-NeoX, other names, unused tensors, saving and loading.

use std::collections::{BTreeMap, HashMap};

use anyhow::Result;
use candle_core::{DType, Device, Tensor};
use candle_fa2::layers::{
    detached_var_builder, MultiHeadAttention, MultiHeadAttentionConfig, Projections, QkvOrder, Rotary, RotaryConfig,
    WeightLayout,
};
use candle_fa2::{Attention, Mask, TensorLayout};
use candle_nn::{Init, VarBuilder, VarMap};

use super::case::{self, normal, vars, Case};
use super::close::{close, Tolerance};
use super::unfused;
use crate::common::compare;

/// A GPT-2 checkpoint has `c_attn.weight (in, out)`. Separate projections `(out, in)` with the same values, transposed, give the
/// same output.
#[test]
fn gpt2_file_equals_linear_layers() -> Result<()> {
    let (embed_dim, num_heads, device) = (48, 4, Device::Cpu);
    let normal = |shape: &[usize], seed| normal(shape, 0.2, seed, DType::F32);
    let c_attn = normal(&[embed_dim, 3 * embed_dim], "c_attn")?;
    let c_attn_bias = normal(&[3 * embed_dim], "c_attn bias")?;
    let c_proj = normal(&[embed_dim, embed_dim], "c_proj")?;
    let c_proj_bias = normal(&[embed_dim], "c_proj bias")?;
    let tensors = HashMap::from([
        ("h.3.attn.c_attn.weight", c_attn.clone()),
        ("h.3.attn.c_attn.bias", c_attn_bias.clone()),
        ("h.3.attn.c_proj.weight", c_proj.clone()),
        ("h.3.attn.c_proj.bias", c_proj_bias.clone()),
        // Buffers of the mask. Files of the Hugging Face hub contain them.
        ("h.3.attn.bias", Tensor::ones((1, 1, 8, 8), DType::U8, &device)?),
        ("h.3.attn.masked_bias", Tensor::new(-1e4f32, &device)?),
    ]);
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("model.safetensors");
    candle_core::safetensors::save(&tensors, &path)?;

    // SAFETY: only this test uses the file, and nobody changes it while it is mapped.
    let vb = unsafe { VarBuilder::from_mmaped_safetensors(&[&path], DType::F32, &device)? };
    let loaded = MultiHeadAttention::new(&MultiHeadAttentionConfig::gpt2(embed_dim, num_heads), vb.pp("h.3.attn"))?;

    let mut linear = HashMap::new();
    for (at, name) in ["q_proj", "k_proj", "v_proj"].into_iter().enumerate() {
        let weight = c_attn.narrow(1, at * embed_dim, embed_dim)?.t()?.contiguous()?;
        linear.insert(format!("{name}.weight"), weight);
        linear.insert(format!("{name}.bias"), c_attn_bias.narrow(0, at * embed_dim, embed_dim)?);
    }
    linear.insert("o_proj.weight".into(), c_proj.t()?.contiguous()?);
    linear.insert("o_proj.bias".into(), c_proj_bias);
    let config = MultiHeadAttentionConfig::new(embed_dim, num_heads).qkv_bias(true).o_bias(true).mask(Mask::Causal);
    let separate = MultiHeadAttention::new(&config, VarBuilder::from_tensors(linear.clone(), DType::F32, &device))?;

    let case = Case {
        embed_dim,
        num_heads,
        num_heads_k: num_heads,
        head_dim: 12,
        mask: Mask::Causal,
        ..Case::new("gpt2 file")
    };
    let plain = |dtype| -> Result<Tensor> {
        let weights = linear
            .iter()
            .map(|(name, weight)| Ok((name.clone(), candle_core::Var::from_tensor(&weight.to_dtype(dtype)?)?)));
        unfused::forward(&case, &weights.collect::<Result<BTreeMap<_, _>>>()?, &case.xs(dtype)?)
    };
    let want = plain(DType::F64)?;
    let tolerance = Tolerance::from(&plain(DType::F32)?, &want, DType::F32)?;
    let xs = case.xs(DType::F32)?;
    close("separate", &separate.forward(&xs)?, &want, tolerance, &case)?;
    close("loaded", &loaded.forward(&xs)?, &want, tolerance, &case)
}

/// A GPT-NeoX checkpoint has buffers and `query_key_value` in the order of heads. Separate projections with the same rows give
/// the same output. With the other order the weights load too, but the output differs.
#[test]
fn gpt_neox_file_equals_linear_layers() -> Result<()> {
    let (embed_dim, num_heads, head_dim, device) = (48, 4, 12, Device::Cpu);
    let normal = |shape: &[usize], seed| normal(shape, 0.2, seed, DType::F64);
    let weight = normal(&[3 * embed_dim, embed_dim], "query_key_value")?;
    let bias = normal(&[3 * embed_dim], "query_key_value bias")?;
    let dense = normal(&[embed_dim, embed_dim], "dense")?;
    let dense_bias = normal(&[embed_dim], "dense bias")?;
    let file = HashMap::from([
        ("attention.query_key_value.weight".to_string(), weight.clone()),
        ("attention.query_key_value.bias".to_string(), bias.clone()),
        ("attention.dense.weight".to_string(), dense.clone()),
        ("attention.dense.bias".to_string(), dense_bias.clone()),
        ("attention.bias".to_string(), Tensor::ones((1, 1, 8, 8), DType::U8, &device)?),
        ("attention.masked_bias".to_string(), Tensor::new(-1e9f32, &device)?),
        ("attention.rotary_emb.inv_freq".to_string(), Tensor::ones(2, DType::F32, &device)?),
    ]);
    let file = VarBuilder::from_tensors(file, DType::F64, &device).pp("attention");

    let mut separate = HashMap::from([("o_proj.weight".into(), dense), ("o_proj.bias".into(), dense_bias)]);
    for (at, name) in ["q_proj", "k_proj", "v_proj"].into_iter().enumerate() {
        let rows = (0..num_heads).flat_map(|head| (0..head_dim).map(move |row| (head * 3 + at) * head_dim + row));
        let rows = Tensor::from_iter(rows.map(|row| row as u32), &device)?;
        separate.insert(format!("{name}.weight"), weight.index_select(&rows, 0)?);
        separate.insert(format!("{name}.bias"), bias.index_select(&rows, 0)?);
    }
    let separate = VarBuilder::from_tensors(separate, DType::F64, &device);

    let rotary = Rotary::new(&RotaryConfig::new(4, 16), &device)?;
    let xs = normal(&[2, 9, embed_dim], "xs")?;
    let output = |config: &MultiHeadAttentionConfig, vb: &VarBuilder| -> Result<Vec<f64>> {
        Ok(MultiHeadAttention::new(config, vb.clone())?.forward(&xs)?.flatten_all()?.to_vec1()?)
    };
    let linear = MultiHeadAttentionConfig::new(embed_dim, num_heads);
    let linear = linear.qkv_bias(true).o_bias(true).mask(Mask::Causal).rotary(&rotary);
    let want = output(&linear, &separate)?;
    let far = |got: Vec<f64>| got.iter().zip(&want).map(|(got, want)| (got - want).abs()).fold(0.0, f64::max);

    let config = MultiHeadAttentionConfig::gpt_neox(embed_dim, num_heads, &rotary);
    let [right, wrong] = [QkvOrder::ByKeyHead, QkvOrder::Concatenated].map(|order| {
        let projections = Projections::Fused { qkv: "query_key_value".into(), o: "dense".into(), order };
        config.clone().projections(projections)
    });
    assert!(far(output(&config, &file)?) < 1e-12);
    assert!(far(output(&right, &file)?) < 1e-12);
    assert!(far(output(&wrong, &file)?) > 0.1);
    Ok(())
}

/// An unused tensor that the user allows has no effect. The user must give its whole name.
#[test]
fn allowed_tensors_stay_unused() -> Result<()> {
    let case = Case::new("allowed");
    let mut tensors: HashMap<String, Tensor> =
        vars(&case.build(DType::F32)?.varmap).into_iter().map(|(name, var)| (name, var.as_detached_tensor())).collect();
    let new = |tensors: &HashMap<String, Tensor>, config: &MultiHeadAttentionConfig| {
        MultiHeadAttention::new(config, VarBuilder::from_tensors(tensors.clone(), DType::F32, &Device::Cpu))
    };
    let config = case.config()?;
    let xs = case.xs(DType::F32)?;
    let want = new(&tensors, &config)?.forward(&xs)?.flatten_all()?.to_vec1::<f32>()?;
    for (name, len) in [("q_proj.bias", 64), ("q_norm.weight", 16)] {
        tensors.insert(name.into(), normal(len, 1.0, name, DType::F32)?);
    }
    let config = config.allow_unused("q_proj.bias");
    assert!(new(&tensors, &config).is_err());
    assert!(new(&tensors, &config.clone().allow_unused("q_norm")).is_err());
    let allowed = new(&tensors, &config.allow_unused("q_norm.weight"))?;
    assert_eq!(allowed.forward(&xs)?.flatten_all()?.to_vec1::<f32>()?, want);
    Ok(())
}

/// Builders with more tensors than the layer's weights. None of these tensors changes the result.
#[test]
fn builders_that_hold_more() -> Result<()> {
    let (device, dtype) = (Device::Cpu, DType::F32);
    let (llama, gpt2) = (MultiHeadAttentionConfig::new(64, 4), MultiHeadAttentionConfig::gpt2(64, 4));

    // A second model over the same variables, tracked or not. Other layers in it have common names.
    let varmap = VarMap::new();
    for _ in 0..2 {
        let vb = VarBuilder::from_varmap(&varmap, dtype, &device);
        MultiHeadAttention::new(&llama, vb.clone())?;
        candle_nn::linear(64, 64, vb.pp("dense"))?;
        candle_nn::linear(64, 64, vb.pp("proj"))?;
        MultiHeadAttention::new(&gpt2, vb.pp("inner"))?;
    }
    MultiHeadAttention::new(&llama, detached_var_builder(&varmap, dtype, &device))?;
    assert_eq!(varmap.all_vars().len(), 4 + 2 * 2 + 4);

    // In a new model the other layers may be created first.
    let vb = VarBuilder::from_varmap(&VarMap::new(), dtype, &device);
    candle_nn::linear(64, 64, vb.pp("dense"))?;
    MultiHeadAttention::new(&llama, vb.clone())?;
    // Two layers with one prefix share q, k and v. Each has its own o.
    candle_nn::linear_no_bias(64, 64, vb.pp("query"))?;
    let [q, k, v, o] = ["q_proj", "k_proj", "v_proj", "o2"].map(String::from);
    let second = llama.clone().projections(Projections::Separate { q, k, v, o });
    MultiHeadAttention::new(&second.allow_unused("o_proj.weight").allow_unused("dense.weight"), vb)?;

    // This builder has every name.
    let zeros = VarBuilder::zeros(dtype, &device);
    MultiHeadAttention::new(&llama, zeros.pp("attn"))?;
    MultiHeadAttention::new(&llama, zeros.rename_f(|name| format!("model.{name}")))?;

    // This builder has the weight of o under the name in the file and under the name of the layer.
    let renamed = detached_var_builder(&varmap, dtype, &device);
    let renamed = renamed.rename_f(|name| name.replace("o_proj", "dense").replace("q_proj", "k_proj"));
    MultiHeadAttention::new(&llama.o_bias(true), renamed)?;
    Ok(())
}

/// The names and shapes that a new layer requests from a builder.
#[test]
fn names_and_shapes_of_variables() -> Result<()> {
    let shapes = |config: &MultiHeadAttentionConfig| -> Result<Vec<(String, Vec<usize>)>> {
        let varmap = VarMap::new();
        let vb = VarBuilder::from_varmap(&varmap, DType::F32, &Device::Cpu);
        MultiHeadAttention::new(config, vb.pp("layers.0"))?;
        Ok(vars(&varmap).into_iter().map(|(name, var)| (name, var.dims().to_vec())).collect())
    };
    let named = |names: &[(&str, &[usize])]| -> Vec<(String, Vec<usize>)> {
        names.iter().map(|(name, shape)| (format!("layers.0.{name}"), shape.to_vec())).collect()
    };
    let config = MultiHeadAttentionConfig::new(40, 4).num_heads_k(2).head_dim(16);
    assert_eq!(
        shapes(&config.clone().q_bias(true))?,
        named(&[
            ("k_proj.weight", &[32, 40]),
            ("o_proj.weight", &[40, 64]),
            ("q_proj.bias", &[64]),
            ("q_proj.weight", &[64, 40]),
            ("v_proj.weight", &[32, 40]),
        ])
    );
    let [q, k, v, o] = ["self.query", "self.key", "self.value", "output.dense"].map(String::from);
    assert_eq!(
        shapes(&config.clone().projections(Projections::Separate { q, k, v, o }).o_bias(true))?,
        named(&[
            ("output.dense.bias", &[40]),
            ("output.dense.weight", &[40, 64]),
            ("self.key.weight", &[32, 40]),
            ("self.query.weight", &[64, 40]),
            ("self.value.weight", &[32, 40]),
        ])
    );
    assert_eq!(
        shapes(&config.projections(Projections::Fused {
            qkv: "qkv_proj".into(),
            o: "o_proj".into(),
            order: QkvOrder::Concatenated,
        }))?,
        named(&[("o_proj.weight", &[40, 64]), ("qkv_proj.weight", &[128, 40])])
    );
    assert_eq!(
        shapes(&MultiHeadAttentionConfig::gpt2(40, 4))?,
        named(&[
            ("c_attn.bias", &[120]),
            ("c_attn.weight", &[40, 120]),
            ("c_proj.bias", &[40]),
            ("c_proj.weight", &[40, 40]),
        ])
    );
    Ok(())
}

/// New weights have the configured standard deviation in both layouts. The fan-in is the size of the input.
#[test]
fn new_weights_are_drawn_by_fan_in() -> Result<()> {
    let deviation = |config: MultiHeadAttentionConfig, name: &str| -> Result<f64> {
        let varmap = VarMap::new();
        MultiHeadAttention::new(&config, VarBuilder::from_varmap(&varmap, DType::F64, &Device::Cpu))?;
        let values = vars(&varmap)[name].flatten_all()?.to_vec1::<f64>()?;
        Ok((values.iter().map(|value| value * value).sum::<f64>() / values.len() as f64).sqrt())
    };
    // With 64 x 1024 values, the standard deviation of the sample is within 2% of the true one. 2% is seven times the standard
    // error.
    let near = |got: f64, want: f64| (got / want - 1.0).abs() < 0.02;
    for layout in [WeightLayout::OutIn, WeightLayout::InOut] {
        let config = MultiHeadAttentionConfig::new(64, 16).head_dim(64).weight_layout(layout).qkv_bias(true);
        let kaiming = deviation(config.clone(), "q_proj.weight")?;
        assert!(near(kaiming, (2.0 / 64.0f64).sqrt()), "{layout:?} {kaiming}");
        assert!(deviation(config.clone(), "q_proj.bias")? > 0.0);
        let normal = config.weight_init(Init::Randn { mean: 0.0, stdev: 0.02 });
        let drawn = deviation(normal.clone(), "q_proj.weight")?;
        assert!(near(drawn, 0.02), "{layout:?} {drawn}");
        assert_eq!(deviation(normal, "q_proj.bias")?, 0.0);
    }
    Ok(())
}

/// Setting all options with one [`Attention`] equals setting them one by one.
#[test]
fn options_at_once_equal_options_one_by_one() -> Result<()> {
    let slopes = Tensor::new(&[0.5f32, 0.25, 0.125, 0.0625], &Device::Cpu)?;
    let attention = Attention::new().mask(Mask::Causal).softmax_scale(0.5).softcap(3.0).alibi_slopes(&slopes);
    let at_once = MultiHeadAttentionConfig::new(64, 4).softcap(1.0).attention(attention);
    let one_by_one = MultiHeadAttentionConfig::new(64, 4);
    let one_by_one = one_by_one.mask(Mask::Causal).softmax_scale(0.5).softcap(3.0).alibi_slopes(&slopes);
    let varmap = VarMap::new();
    let xs = normal((2, 9, 64), 1.0, "options", DType::F32)?;
    let output = |config: &MultiHeadAttentionConfig| -> Result<Vec<f32>> {
        let layer = MultiHeadAttention::new(config, VarBuilder::from_varmap(&varmap, DType::F32, &Device::Cpu))?;
        Ok(layer.forward(&xs)?.flatten_all()?.to_vec1()?)
    };
    assert_eq!(output(&at_once)?, output(&one_by_one)?);
    assert_ne!(output(&at_once)?, output(&MultiHeadAttentionConfig::new(64, 4).softcap(1.0))?);
    Ok(())
}

/// A layer that loads the saved variables of another gives the same bits.
#[test]
fn saves_and_loads_through_varmap() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("layer.safetensors");
    for case in case::all() {
        let saved = case.build(DType::F32)?;
        saved.varmap.save(&path)?;
        let mut loaded = Case { name: "other weights", ..case.clone() }.build(DType::F32)?;
        let xs = case.xs(DType::F32)?;
        let output =
            |layer: &MultiHeadAttention| -> Result<Vec<f32>> { Ok(layer.forward(&xs)?.flatten_all()?.to_vec1()?) };
        let want = output(&saved.layer)?;
        assert_ne!(output(&loaded.layer)?, want, "{case}");
        loaded.varmap.load(&path)?;
        assert_eq!(output(&loaded.layer)?, want, "{case}");
    }
    Ok(())
}

/// The layer sets the layouts of its tensors itself and ignores the layouts in the options of attention.
#[test]
fn the_layout_of_the_options_is_ignored() -> Result<()> {
    let varmap = VarMap::new();
    let vb = || VarBuilder::from_varmap(&varmap, DType::F32, &Device::Cpu);
    let attention = Attention::new().mask(Mask::Causal);
    let plain = MultiHeadAttentionConfig::new(64, 4).attention(attention.clone());
    let other = plain.clone().attention(attention.layout(TensorLayout::Bhsd));
    let xs = Tensor::randn(0f32, 1f32, (2, 5, 64), &Device::Cpu)?;
    let (plain, other) = (MultiHeadAttention::new(&plain, vb())?, MultiHeadAttention::new(&other, vb())?);
    compare::same_bits("ys", &other.forward(&xs)?, &plain.forward(&xs)?, &"layouts")?;
    Ok(())
}
