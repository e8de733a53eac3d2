//! Finite differences in f64 check the gradients of the reference, which all other tests use, and of the operator itself.

use crate::common::cases::{self, cpu, window, Alibi, Case};
use crate::common::reference::{self, Input, Output};
use anyhow::{ensure, Result};
use candle_core::DType;
use candle_fa2::Mask;

/// Step of the differences. With four points, the error of a difference is about `STEP^4 = 1e-12` for a smooth loss. Rounding
/// of the loss, `1e-16 * loss / STEP`, adds about `1e-12`.
const STEP: f64 = 1e-3;
/// A hundred times this error, relative to the largest derivative.
const LIMIT: f64 = 1e-10;

/// The loss `sum do * o + sum dlse * lse`, over the rows that see a key.
fn loss(input: &Input, output: &Output) -> f64 {
    let o: f64 = input.do_.iter().zip(&output.o.values).map(|(d, o)| d * o).sum();
    let lse = input.dlse.iter().zip(&output.lse.values).filter(|(_, lse)| lse.is_finite());
    o + lse.map(|(d, lse)| d * lse).sum::<f64>()
}

/// The derivative of the loss with respect to every element of q, k and v, from differences of `forward`.
fn differences(input: &Input, forward: &dyn Fn(&Input) -> Result<Output>) -> Result<[Vec<f64>; 3]> {
    let tensors: [fn(&mut Input) -> &mut Vec<f64>; 3] = [|i| &mut i.q, |i| &mut i.k, |i| &mut i.v];
    let mut derivatives = [Vec::new(), Vec::new(), Vec::new()];
    for (tensor, derivatives) in tensors.into_iter().zip(&mut derivatives) {
        let len = tensor(&mut input.clone()).len();
        for at in 0..len {
            let moved = |steps: f64| -> Result<f64> {
                let mut input = input.clone();
                tensor(&mut input)[at] += steps * STEP;
                Ok(loss(&input, &forward(&input)?))
            };
            let near = moved(1.0)? - moved(-1.0)?;
            let far = moved(2.0)? - moved(-2.0)?;
            derivatives.push((8.0 * near - far) / (12.0 * STEP));
        }
    }
    Ok(derivatives)
}

/// Checks that `backward` agrees with the differences of `forward` on `case`.
fn check(
    case: &Case,
    forward: &dyn Fn(&Input) -> Result<Output>,
    backward: &dyn Fn(&Input) -> Result<Output>,
) -> Result<()> {
    let input = case.draw();
    let output = backward(&input)?;
    let derivatives = differences(&input, forward)?;
    let gradients = [("dq", &output.dq), ("dk", &output.dk), ("dv", &output.dv)];
    for ((name, gradient), derivative) in gradients.into_iter().zip(&derivatives) {
        ensure!(gradient.values.len() == derivative.len(), "{name} has another length\ncase {case}");
        let largest = derivative.iter().fold(1.0, |max: f64, x| max.max(x.abs()));
        for (at, (got, want)) in gradient.values.iter().zip(derivative).enumerate() {
            ensure!(
                (got - want).abs() <= LIMIT * largest,
                "{name}[{at}] is {got}, the difference is {want}\ncase {case}"
            );
        }
    }
    Ok(())
}

/// Every mask and option on a few tokens.
fn small_cases() -> Vec<Case> {
    let case = || Case::new(&cpu(DType::F64)).batch(1, 4, 5).heads(2, 1).head_dim(3);
    vec![
        case(),
        case().mask(Mask::Causal).dlse(),
        case().batch(2, 5, 3).mask(Mask::Causal).dlse(),
        case().batch(1, 6, 4).mask(window(1, 0)),
        case().mask(window(1, 2)).softcap(0.7),
        case().softcap(1.3).dlse(),
        case().alibi(Alibi::PerHead).mask(Mask::Causal),
        case().batch(2, 3, 4).alibi(Alibi::PerBatchAndHead).softcap(0.9).softmax_scale(1.4).dlse(),
        case().softmax_scale(-0.8),
        case().packed(&[(3, 2), (0, 2), (2, 4)]).mask(Mask::Causal).dlse(),
        case().head_dim_v(2).mask(Mask::Causal).softcap(0.9).dlse(),
        case().packed(&[(3, 2), (2, 4)]).head_dim_v(5).alibi(Alibi::PerHead).dlse(),
    ]
}

/// The gradients of the reference are the derivatives of its values.
#[test]
fn reference_backward_is_the_derivative_of_its_forward() -> Result<()> {
    for case in small_cases() {
        let reference = |input: &Input| Ok(reference::attention(input));
        check(&case, &reference, &reference)?;
    }
    Ok(())
}

/// The gradients of the operator are the derivatives of its values. This test does not use the reference.
#[test]
fn operator_backward_is_the_derivative_of_its_forward() -> Result<()> {
    for case in small_cases() {
        check(&case, &|input| case.run_forward(input), &|input| case.run(input))?;
    }
    Ok(())
}

/// Every smoke case in f64 on the CPU, along one random direction. At these sizes, differences of every element would take too
/// long.
#[test]
fn operator_backward_matches_a_random_direction() -> Result<()> {
    for case in cases::smoke(&cpu(DType::F64)) {
        let input = case.draw();
        // Another random input of the same shape is a random direction.
        let direction = Case { dlse: !case.dlse, ..case.clone() }.draw();
        let along = |steps: f64| -> Result<f64> {
            let mut moved = input.clone();
            let add = |to: &mut Vec<f64>, by: &[f64]| to.iter_mut().zip(by).for_each(|(x, d)| *x += steps * STEP * d);
            add(&mut moved.q, &direction.q);
            add(&mut moved.k, &direction.k);
            add(&mut moved.v, &direction.v);
            Ok(loss(&moved, &case.run_forward(&moved)?))
        };
        let derivative = (8.0 * (along(1.0)? - along(-1.0)?) - (along(2.0)? - along(-2.0)?)) / (12.0 * STEP);
        let output = case.run(&input)?;
        let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
        let sums = [
            dot(&output.dq.values, &direction.q),
            dot(&output.dk.values, &direction.k),
            dot(&output.dv.values, &direction.v),
        ];
        // The direction changes hundreds of elements at once, so its higher derivatives are larger than those of one element.
        let limit = 1e3 * LIMIT * sums.iter().fold(1.0, |max: f64, x| max.max(x.abs()));
        let got: f64 = sums.iter().sum();
        ensure!(
            (got - derivative).abs() <= limit,
            "{got} along the direction, the difference is {derivative}\ncase {case}"
        );
    }
    Ok(())
}
