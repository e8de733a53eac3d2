//! Gradients against finite differences, in f64.

use anyhow::{ensure, Result};
use candle_core::{DType, Device, Tensor};

use crate::operators;
use crate::run::{numbers, Case};

/// Distance of the two points of a difference. The error of the difference is about STEP^2 times the third derivative, plus
/// 2^-53 / STEP times the loss: both near 1e-10 here.
const STEP: f64 = 1e-5;
/// A wrong factor or a lost term changes a gradient by far more.
const LIMIT: f64 = 1e-7;

#[test]
fn gradients_match_finite_differences() -> Result<()> {
    for operator in operators::all() {
        let case = Case::new(operator, 3, 5, DType::F64)?;
        let gradients = case.fused()?.gradients;
        for (index, gradient) in gradients.iter().enumerate() {
            let gradient = numbers(gradient)?;
            let scale = gradient.iter().fold(1.0, |a: f64, b| a.max(b.abs()));
            for (element, gradient) in gradient.iter().enumerate() {
                let loss = |change: f64| -> Result<f64> {
                    let mut inputs = case.inputs.clone();
                    let mut moved = numbers(&inputs[index])?;
                    moved[element] += change;
                    inputs[index] = Tensor::from_vec(moved, inputs[index].shape(), &Device::Cpu)?;
                    Ok(case.loss(&(operator.fused)(&inputs)?)?.to_scalar()?)
                };
                let difference = (loss(STEP)? - loss(-STEP)?) / (2.0 * STEP);
                ensure!(
                    (gradient - difference).abs() <= LIMIT * scale,
                    "gradient of input {index}, element {element}: {gradient}, but the loss changes by {difference}\n\
                     case {case}"
                );
            }
        }
    }
    Ok(())
}
