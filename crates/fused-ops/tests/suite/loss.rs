//! Edge cases of the losses: ignored rows, numbers that are not finite, bad targets and options.

use anyhow::Result;
use candle_core::{DType, Device, Tensor, Var};
use candle_fused_ops::{composed, cross_entropy, linear_cross_entropy, CrossEntropy};

use crate::errors::{text, zeros};
use crate::nonfinite::rows_with_nan;
use crate::run::{bits, numbers, random};

#[test]
fn if_all_rows_are_ignored_loss_and_gradients_are_zero() -> Result<()> {
    all_rows_ignored(&Device::Cpu)
}

pub fn all_rows_ignored(device: &Device) -> Result<()> {
    let var = |name: &str, shape: &[usize]| -> Result<_> {
        Ok(Var::from_tensor(&random(name, shape, DType::F32)?.to_device(device)?)?)
    };
    let (x, weight) = (var("x", &[4, 3])?, var("w", &[5, 3])?);
    let targets = Tensor::new(&[-100i64; 4], device)?;
    let loss = CrossEntropy::new().ignore_index(-100).z_loss(1.0);
    for value in [
        loss.forward_linear(&x, &weight, &targets)?,
        loss.forward(&x.matmul(&weight.t()?)?, &targets)?,
        composed::cross_entropy(&loss, &x.matmul(&weight.t()?)?, &targets)?,
        composed::linear_cross_entropy(&loss, &x, &weight, &targets)?,
    ] {
        assert_eq!(value.to_scalar::<f32>()?, 0.0);
        let grads = value.backward()?;
        for var in [&x, &weight] {
            assert!(numbers(grads.get(var).expect("a gradient"))?.iter().all(|&d| d == 0.0));
        }
    }
    Ok(())
}

/// Rows that are ignored change nothing: the loss is that of the other rows alone.
#[test]
fn ignored_rows_change_nothing() -> Result<()> {
    let logits = random("logits", &[4, 6], DType::F32)?;
    let all = CrossEntropy::new().ignore_index(2).forward(&logits, &Tensor::new(&[1u32, 2, 2, 0], &Device::Cpu)?)?;
    let two = Tensor::cat(&[logits.narrow(0, 0, 1)?, logits.narrow(0, 3, 1)?], 0)?;
    assert_eq!(bits(&[all])?, bits(&[cross_entropy(&two, &Tensor::new(&[1u32, 0], &Device::Cpu)?)?])?);
    Ok(())
}

#[test]
fn no_rows_are_like_ignored_rows() -> Result<()> {
    let weight = Var::ones((3, 2), DType::F32, &Device::Cpu)?;
    let none = zeros(&[0], DType::U32);
    let loss = linear_cross_entropy(&zeros(&[0, 2], DType::F32), &weight, &none)?;
    assert_eq!(loss.to_scalar::<f32>()?, 0.0);
    assert!(numbers(loss.backward()?.get(&weight).expect("a gradient"))?.iter().all(|&d| d == 0.0));
    assert_eq!(cross_entropy(&zeros(&[0, 2], DType::F32), &none)?.to_scalar::<f32>()?, 0.0);
    Ok(())
}

#[test]
fn more_axes_are_more_rows() -> Result<()> {
    let (x, weight) = (random("x", &[6, 4], DType::F32)?, random("w", &[5, 4], DType::F32)?);
    let logits = x.matmul(&weight.t()?)?;
    let targets = Tensor::new(&[0u32, 1, 2, 3, 4, 0], &Device::Cpu)?;
    let (want, wide) = (cross_entropy(&logits, &targets)?, targets.reshape((2, 3))?);
    let of_logits = cross_entropy(&logits.reshape((2, 3, 5))?, &wide)?;
    let composed = composed::cross_entropy(&CrossEntropy::new(), &logits.reshape((2, 3, 5))?, &wide)?;
    let linear = linear_cross_entropy(&x.reshape((2, 3, 4))?, &weight, &wide)?;
    assert_eq!(bits(&[of_logits])?, bits(std::slice::from_ref(&want))?);
    assert_eq!(bits(&[linear])?, bits(std::slice::from_ref(&want))?);
    // The sums have another order. The loss is near 2.
    assert!((numbers(&composed)?[0] - numbers(&want)?[0]).abs() <= 8.0 * f64::from(f32::EPSILON));

    let one_row = cross_entropy(&logits.get(2)?, &Tensor::new(2u32, &Device::Cpu)?)?;
    assert_eq!(bits(&[one_row])?, bits(&[cross_entropy(&logits.narrow(0, 2, 1)?, &targets.narrow(0, 2, 1)?)?])?);
    Ok(())
}

/// The same logits and targets as in Candle, but far logits give no infinity.
#[test]
fn large_logits_have_a_finite_loss() -> Result<()> {
    let logits = Var::new(&[[1000f32, 0.0, -1000.0]], &Device::Cpu)?;
    let loss = cross_entropy(&logits, &Tensor::new(&[2u32], &Device::Cpu)?)?;
    assert_eq!(loss.to_scalar::<f32>()?, 2000.0);
    assert_eq!(loss.backward()?.get(&logits).expect("a gradient").to_vec2::<f32>()?, [[1.0, 0.0, -1.0]]);
    Ok(())
}

#[test]
fn minus_infinity_masks_a_class() -> Result<()> {
    masked_class(&Device::Cpu)
}

pub fn masked_class(device: &Device) -> Result<()> {
    let infinity = f32::INFINITY;
    let logits = Var::new(&[[0f32, 0.0, -infinity]], device)?;
    let target = |class: u32| Tensor::new(&[class], device);
    let loss = cross_entropy(&logits, &target(0)?)?;
    assert!((loss.to_scalar::<f32>()? - 2f32.ln()).abs() <= 4.0 * f32::EPSILON);
    let gradient = loss.backward()?.get(&logits).expect("a gradient").to_vec2::<f32>()?.remove(0);
    assert!((gradient[0] + 0.5).abs() < 1e-6 && (gradient[1] - 0.5).abs() < 1e-6 && gradient[2] == 0.0, "{gradient:?}");
    assert_eq!(cross_entropy(&logits, &target(2)?)?.to_scalar::<f32>()?, infinity);
    let capped = CrossEntropy::new().softcap(2.0).forward(&logits, &target(2)?)?.to_scalar::<f32>()?;
    assert!((capped - (2.0 + (2.0 + (-2f32).exp()).ln())).abs() <= 8.0 * f32::EPSILON, "{capped}");
    let smooth = CrossEntropy::new().label_smoothing(0.1);
    assert_eq!(smooth.forward(&logits, &target(0)?)?.to_scalar::<f32>()?, infinity);
    let all = Tensor::new(&[[-infinity; 3]], device)?;
    assert!(cross_entropy(&all, &target(0)?)?.to_scalar::<f32>()?.is_nan());
    Ok(())
}

#[test]
fn a_nonfinite_number_reaches_the_loss_and_stays_in_its_row() -> Result<()> {
    nonfinite_row_of_a_loss(&Device::Cpu)
}

/// An ignored row changes neither.
pub fn nonfinite_row_of_a_loss(device: &Device) -> Result<()> {
    for nonfinite in [f32::NAN, f32::INFINITY] {
        let logits = Var::new(&[[1f32, 2.0, 4.0], [1.0, nonfinite, 3.0], [5.0, 0.0, 1.0]], device)?;
        let loss = cross_entropy(&logits, &Tensor::new(&[0u32, 1, 1], device)?)?;
        assert!(loss.to_scalar::<f32>()?.is_nan());
        assert_eq!(rows_with_nan(loss.backward()?.get(&logits).expect("a gradient"))?, [false, true, false]);

        let ignoring = CrossEntropy::new().ignore_index(7);
        let loss = ignoring.forward(&logits, &Tensor::new(&[0u32, 7, 1], device)?)?;
        assert!(loss.to_scalar::<f32>()?.is_finite());
        assert_eq!(rows_with_nan(loss.backward()?.get(&logits).expect("a gradient"))?, [false; 3]);
    }
    Ok(())
}

/// The composed loss in bf16 rounds its logits, as a matrix product on a GPU does. It is still the same loss.
#[test]
fn the_composed_loss_agrees_in_bf16() -> Result<()> {
    let (x, weight) = (random("x", &[40, 16], DType::BF16)?, random("w", &[30, 16], DType::BF16)?);
    let targets = Tensor::arange(0u32, 40, &Device::Cpu)?.to_dtype(DType::F64)?;
    let targets = (&targets - ((&targets / 30.0)?.floor()? * 30.0)?)?.to_dtype(DType::U32)?;
    let (vx, vw) = (Var::from_tensor(&x)?, Var::from_tensor(&weight)?);
    let run = |loss: Tensor| -> Result<[Vec<f64>; 3]> {
        let grads = loss.backward()?;
        Ok([numbers(&loss)?, numbers(grads.get(&vx).expect("dx"))?, numbers(grads.get(&vw).expect("dweight"))?])
    };
    let fused = run(linear_cross_entropy(&vx, &vw, &targets)?)?;
    let composed = run(composed::linear_cross_entropy(&CrossEntropy::new(), &vx, &vw, &targets)?)?;
    for (fused, composed) in fused.iter().zip(&composed) {
        let largest = fused.iter().fold(0.0, |a: f64, b| a.max(b.abs()));
        for (a, b) in fused.iter().zip(composed) {
            // Logits near 8 are rounded by 2^-6, so a probability changes by a share of 2^-6.
            assert!((a - b).abs() <= 2f64.powi(-6) * largest, "{a} and {b}");
        }
    }
    Ok(())
}

#[test]
fn errors_name_the_argument_the_rule_and_the_value() -> Result<()> {
    let (logits, targets) = (zeros(&[2, 5], DType::F32), zeros(&[2], DType::U32));
    let with = |ids: &[i64]| Tensor::new(ids, &Device::Cpu).expect("ids");
    for (error, expected) in [
        (
            text(cross_entropy(&logits, &zeros(&[3], DType::U32))),
            "targets: shape must be [2] as the leading axes of logits, got [3]",
        ),
        (
            text(cross_entropy(&logits, &zeros(&[2], DType::F32))),
            "targets: dtype must be U32 or I64, got F32; convert it with to_dtype",
        ),
        (
            text(cross_entropy(&logits, &with(&[0, 5]))),
            "targets: each must be a class of 0..5, got 5 at row 1; set ignore_index to leave rows out",
        ),
        (
            text(CrossEntropy::new().ignore_index(-100).forward(&logits, &with(&[-1, 0]))),
            "targets: each must be a class of 0..5 or the ignore_index -100, got -1 at row 0",
        ),
        (
            text(CrossEntropy::new().label_smoothing(1.5).forward(&logits, &targets)),
            "label_smoothing must be at most 1, got 1.5",
        ),
        (
            text(CrossEntropy::new().z_loss(f64::NAN).forward(&logits, &targets)),
            "z_loss must be finite and at least 0, got NaN",
        ),
        (
            text(CrossEntropy::new().softcap(0.0).forward(&logits, &targets)),
            "softcap must be finite and above 0, got 0; leave it out for no softcap",
        ),
        (
            text(linear_cross_entropy(&logits, &zeros(&[5, 7], DType::F32), &targets)),
            "weight: shape must be (vocab, 5) with the last axis of x, got [5, 7]",
        ),
        (
            text(linear_cross_entropy(&logits, &zeros(&[7, 5], DType::F64), &targets)),
            "weight: dtype must be F32 as x, got F64; convert one with to_dtype",
        ),
    ] {
        assert_eq!(error, expected);
    }
    Ok(())
}
