//! The modules: names of parameters, and the same values as candle_nn's.

use anyhow::Result;
use candle_core::{DType, Device, Tensor, Var};
use candle_fused_ops::{LayerNorm, RmsNorm};
use candle_nn::{Module, VarBuilder, VarMap};

use crate::run::{numbers, random};

#[test]
fn modules_have_the_parameters_and_values_of_candle_nn() -> Result<()> {
    let (ours, theirs) = (VarMap::new(), VarMap::new());
    let builder = |map: &VarMap| VarBuilder::from_varmap(map, DType::F32, &Device::Cpu);
    let layer = LayerNorm::load(8, 1e-5, builder(&ours).pp("ln"))?;
    let rms = RmsNorm::load(8, 1e-6, builder(&ours).pp("norm"))?;
    let candle_layer = candle_nn::layer_norm(8, 1e-5, builder(&theirs).pp("ln"))?;
    let candle_rms = candle_nn::rms_norm(8, 1e-6, builder(&theirs).pp("norm"))?;
    let names = |map: &VarMap| {
        let mut names: Vec<String> = map.data().lock().expect("no panic").keys().cloned().collect();
        names.sort();
        names
    };
    assert_eq!(names(&ours), ["ln.bias", "ln.weight", "norm.weight"]);
    assert_eq!(names(&ours), names(&theirs));

    let (x, residual) = (random("x", &[3, 8], DType::F32)?, random("residual", &[3, 8], DType::F32)?);
    for (ours, theirs) in [
        (layer.forward(&x)?, candle_layer.forward(&x)?),
        (rms.forward(&x)?, candle_rms.forward(&x)?),
        (layer.forward_add(&x, &residual)?.1, candle_layer.forward(&(&x + &residual)?)?),
        (rms.forward_add(&x, &residual)?.1, candle_rms.forward(&(&x + &residual)?)?),
    ] {
        for (ours, theirs) in numbers(&ours)?.into_iter().zip(numbers(&theirs)?) {
            // Values of a norm are near 1. Candle's variance is a difference of two sums, with a few steps of error.
            assert!((ours - theirs).abs() <= 8.0 * f64::from(f32::EPSILON), "{ours} and {theirs}");
        }
    }
    Ok(())
}

/// Old checkpoints have gamma and beta.
#[test]
fn old_names_are_found() -> Result<()> {
    let tensors = ["gamma", "beta"].map(|name| (format!("ln.{name}"), random(name, &[4], DType::F32).expect("random")));
    let vb = VarBuilder::from_tensors(tensors.into_iter().collect(), DType::F32, &Device::Cpu);
    let norm = LayerNorm::load(4, 1e-5, vb.pp("ln"))?;
    assert_eq!(numbers(norm.weight())?, numbers(&random("gamma", &[4], DType::F32)?)?);
    assert_eq!(numbers(norm.bias().expect("a bias"))?, numbers(&random("beta", &[4], DType::F32)?)?);
    Ok(())
}

/// README.md says that these operators drop gradients. If Candle fixes one, this test fails, and the table must change.
#[test]
fn candle_drops_the_gradients_that_the_readme_says() -> Result<()> {
    let x = Var::from_tensor(&random("x", &[1, 2, 2, 4], DType::F32)?)?;
    let (weight, table) = (Tensor::ones(4, DType::F32, &Device::Cpu)?, Tensor::ones((2, 2), DType::F32, &Device::Cpu)?);
    for (name, result) in [
        ("layer_norm", candle_nn::ops::layer_norm(&x, &weight, &weight, 1e-5)?),
        ("LayerNorm", candle_nn::LayerNorm::new(weight.clone(), weight.clone(), 1e-5).forward(&x)?),
        ("rms_norm", candle_nn::ops::rms_norm(&x, &weight, 1e-5)?),
        ("RmsNorm", candle_nn::RmsNorm::new(weight.clone(), 1e-5).forward(&x)?),
        ("rope", candle_nn::rotary_emb::rope(&x, &table, &table)?),
        ("rope_i", candle_nn::rotary_emb::rope_i(&x, &table, &table)?),
        ("rope_thd", candle_nn::rotary_emb::rope_thd(&x, &table, &table)?),
        ("softmax_last_dim", candle_nn::ops::softmax_last_dim(&x)?),
    ] {
        assert!(!result.track_op(), "{name} keeps gradients now");
    }
    Ok(())
}
