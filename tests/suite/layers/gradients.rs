//! Output and all gradients of the layer, compared with Candle's autograd over the same weights.

use anyhow::{ensure, Context, Result};
use candle_core::{DType, Device, Tensor, Var};
use candle_fa2::layers::{
    MultiHeadAttention, MultiHeadAttentionConfig, Projections, Rotary, RotaryConfig, WeightLayout,
};
use candle_fa2::Mask;
use candle_nn::{embedding, VarBuilder, VarMap};

use super::case::{self, normal, Case};
use super::close::close;
use super::outcome::{self, Outcome};
use super::unfused;
use crate::common::cases::{own_gpu, GPU_DTYPES};

/// The output and gradients of this crate's layer.
fn ours(case: &Case, dtype: DType) -> Result<Outcome> {
    let built = case.build(dtype)?;
    outcome::run(built.vars(), &case.xs(dtype)?, |xs| Ok(built.layer.forward(xs)?))
}

/// The output and gradients of the plain layer.
fn plain(case: &Case, dtype: DType) -> Result<Outcome> {
    let vars = case.build(dtype)?.vars();
    outcome::run(vars.clone(), &case.xs(dtype)?, |xs| unfused::forward(case, &vars, xs))
}

#[test]
fn output_and_gradients_equal_plain_autograd() -> Result<()> {
    let gpu = own_gpu();
    for case in case::all() {
        let want = plain(&case, DType::F64)?;
        for (dtype, plain_dtype) in
            [(DType::F64, DType::F32), (DType::F32, DType::F32), (DType::BF16, DType::BF16), (DType::F16, DType::F16)]
        {
            let plain = plain(&case, plain_dtype)?;
            outcome::equal(dtype, &ours(&case, dtype)?, &want, &plain, &case)?;
            if let Some(gpu) = gpu.as_ref().filter(|_| GPU_DTYPES.contains(&dtype)) {
                let case = case.on(gpu);
                outcome::equal(dtype, &ours(&case, dtype)?, &want, &plain, &case)?;
            }
        }
    }
    Ok(())
}

/// The tolerance is small enough to detect one lost key, a position off by one, and the wrong key head.
#[test]
fn tolerance_rejects_small_faults() -> Result<()> {
    let case = case::all().into_iter().find(|case| case.name == "llama").context("no case named llama")?;
    let rotation = case.rotary.context("llama rotates")?;
    let faults = [
        ("lost key", Case { mask: Mask::Window { left: Some(case.seqlen - 2), right: Some(0) }, ..case.clone() }),
        (
            "theta",
            Case { rotary: Some(super::case::Rotation { theta: rotation.theta * 1.001, ..rotation }), ..case.clone() },
        ),
        ("scale", Case { softmax_scale: Some(0.25 * 1.0001), ..case.clone() }),
    ];
    let (want, plain) = (plain(&case, DType::F64)?, plain(&case, DType::F32)?);
    for (fault, faulty) in faults {
        let got = ours(&faulty, DType::F32)?;
        for name in want.keys() {
            let tolerance = outcome::tolerance(name, DType::F32, &want, &plain)?;
            let close = close(name, &got[name], &want[name], tolerance, &case);
            ensure!(close.is_err(), "{name} passes with a wrong {fault}");
        }
    }
    Ok(())
}

/// A transposed view as input gives the results and gradients of its contiguous copy.
#[test]
fn strided_input_equals_contiguous() -> Result<()> {
    let case = Case { mask: Mask::Causal, ..Case::new("strided") };
    let built = case.build(DType::F32)?;
    let contiguous = outcome::run(built.vars(), &case.xs(DType::F32)?, |xs| Ok(built.layer.forward(xs)?))?;
    let strided = outcome::run(built.vars(), &case.xs(DType::F32)?, |xs| {
        let sequence_first = xs.transpose(0, 1)?.contiguous()?;
        Ok(built.layer.forward(&sequence_first.transpose(0, 1)?)?)
    })?;
    for (name, want) in &contiguous {
        assert_eq!(values(&strided[name])?, values(want)?, "{name}");
    }
    Ok(())
}

/// A second backward over the same graph gives the same bits, because the nodes of attention and rotary embedding keep their
/// tensors.
#[test]
fn second_backward_repeats_the_first() -> Result<()> {
    for case in case::all() {
        let built = case.build(DType::F32)?;
        let loss = built.layer.forward(&case.xs(DType::F32)?)?.sqr()?.sum_all()?;
        let (first, second) = (loss.backward()?, loss.backward()?);
        for (name, var) in built.vars() {
            let grads =
                [&first, &second].map(|grads| grads.get(var.as_tensor()).context("no gradient").and_then(values));
            let [first, second] = grads;
            assert_eq!(first?, second?, "{name} of {case}");
        }
    }
    Ok(())
}

/// Without tokens or without sequences, the result is empty and gradients are 0. (Candle returns no gradient of a bias then.)
#[test]
fn empty_input() -> Result<()> {
    for case in case::all() {
        for (batch, seqlen) in [(2, 0), (0, 5), (0, 0)] {
            let built = case.build(DType::F32)?;
            let xs = Var::zeros((batch, seqlen, case.embed_dim), DType::F32, &Device::Cpu)?;
            let ys = built.layer.forward(xs.as_tensor())?;
            assert_eq!(ys.dims(), [batch, seqlen, case.embed_dim]);
            let grads = ys.sum_all()?.backward()?;
            for (name, var) in built.vars() {
                let grad = grads.get(var.as_tensor()).map(values).transpose()?;
                assert!(grad.unwrap_or_default().iter().all(|&value| value == 0.0), "{name} of {case}");
            }
        }
    }
    Ok(())
}

/// A model of an embedding and three attention blocks. Every block has gradients, also the first. The model uses the layer only
/// through Candle's `Module`.
#[test]
fn every_parameter_of_a_stack_gets_a_gradient() -> Result<()> {
    let device = Device::Cpu;
    let varmap = VarMap::new();
    let vb = VarBuilder::from_varmap(&varmap, DType::F32, &device);
    let rotary = Rotary::new(&RotaryConfig::new(8, 32), &device)?;
    let grouped = MultiHeadAttentionConfig::new(32, 4).num_heads_k(2).qkv_bias(true).o_bias(true).rotary(&rotary);
    let configs = [
        grouped.clone().mask(Mask::Causal),
        grouped.clone().projections(Projections::gpt2()).weight_layout(WeightLayout::InOut).mask(Mask::Causal),
        grouped.mask(Mask::Window { left: Some(4), right: Some(0) }),
    ];
    let tokens = embedding(11, 32, vb.pp("tokens"))?;
    let blocks: Vec<Box<dyn candle_core::Module>> = configs
        .iter()
        .enumerate()
        .map(|(at, config)| Ok(Box::new(MultiHeadAttention::new(config, vb.pp(format!("blocks.{at}")))?) as _))
        .collect::<Result<_>>()?;
    case::fill(&varmap, "stack")?;

    let ids = Tensor::from_vec((0..18u32).map(|at| at * 7 % 11).collect(), (2, 9), &device)?;
    let mut xs = tokens.embeddings().index_select(&ids.flatten_all()?, 0)?.reshape((2, 9, 32))?;
    for block in &blocks {
        xs = (&xs + block.forward(&xs)?)?;
    }
    let grads = (&xs * normal(xs.shape(), 1.0, "loss", DType::F32)?)?.sum_all()?.backward()?;
    let vars = case::vars(&varmap);
    assert_eq!(vars.len(), 1 + 8 + 4 + 8);
    for (name, var) in vars {
        let grad = grads.get(var.as_tensor()).with_context(|| format!("{name} has no gradient"))?;
        let grad = values(grad)?;
        ensure!(
            grad.iter().all(|value| value.is_finite()) && grad.iter().any(|&value| value != 0.0),
            "{name}: {grad:?}"
        );
    }
    Ok(())
}

fn values(tensor: &Tensor) -> Result<Vec<f32>> {
    Ok(tensor.flatten_all()?.to_vec1()?)
}
