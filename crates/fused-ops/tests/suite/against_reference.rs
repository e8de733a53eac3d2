//! Values and gradients against the formulas in f64, in every type.

use anyhow::Result;
use attention_reference::draw;
use candle_core::{DType, Device, Tensor};
use rand::Rng;

use crate::close::close;
use crate::operators::{self, Numbers};
use crate::reference::{Reference, Want};
use crate::run::{numbers, precision, Case, Outcome, DTYPES};

/// Rows shorter than a vector register, widths around the 16 lanes of a sum, and enough rows for several tasks.
const SHAPES: [(usize, usize); 6] = [(1, 1), (3, 7), (5, 16), (4, 65), (2, 768), (300, 100)];

#[test]
fn values_and_gradients_match_the_formulas() -> Result<()> {
    for operator in operators::all() {
        for (rows, width) in SHAPES {
            for dtype in DTYPES {
                check(&Case::new(operator, rows, width, dtype)?)?;
            }
        }
    }
    Ok(())
}

#[test]
fn random_shapes_match_the_formulas() -> Result<()> {
    let mut random = draw::generator("random shapes");
    for operator in operators::all() {
        for dtype in DTYPES {
            for _ in 0..3 {
                check(&Case::new(operator, random.random_range(1..60), random.random_range(1..130), dtype)?)?;
            }
        }
    }
    Ok(())
}

/// The fused and the composed operator against the formula, each with the other as the second implementation.
pub fn check(case: &Case) -> Result<()> {
    let (fused, composed) = (case.fused()?, case.composed()?);
    let want = tensors_of(formula(case, &fused)?);
    let (fused, composed) = (named(fused), named(composed));
    assert_eq!((fused.len(), composed.len()), (want.len(), want.len()), "case {case}");
    for (((name, fused), (_, composed)), want) in fused.iter().zip(&composed).zip(&want) {
        assert_eq!((fused.shape(), fused.dtype()), (composed.shape(), composed.dtype()), "{name} of case {case}");
        close(name, fused, composed, want, case)?;
        close(&format!("composed {name}"), composed, fused, want, case)?;
    }
    Ok(())
}

fn formula(case: &Case, fused: &Outcome) -> Result<Reference> {
    let upstream = fused.results.iter().enumerate();
    Ok((case.operator.formula)(&Numbers {
        inputs: case.inputs.iter().map(numbers).collect::<Result<_>>()?,
        upstream: upstream.map(|(index, result)| numbers(&case.upstream(index, result)?)).collect::<Result<_>>()?,
        width: case.width,
        dtype: case.dtype,
        narrow_logits: !case.device.is_cpu(),
    }))
}

fn tensors_of(reference: Reference) -> Vec<Want> {
    reference.results.into_iter().chain(reference.gradients).collect()
}

fn named(outcome: Outcome) -> Vec<(String, Tensor)> {
    let results = outcome.results.into_iter().enumerate().map(|(i, result)| (format!("result {i}"), result));
    let gradients = outcome.gradients.into_iter().enumerate().map(|(i, gradient)| (format!("gradient {i}"), gradient));
    results.chain(gradients).collect()
}

/// The rule is no formality: it rejects one element of a row that is off by 6 rounding steps, or by a thousandth, of the largest.
#[test]
fn the_rule_rejects_small_errors() -> Result<()> {
    for operator in operators::all() {
        for dtype in [DType::F32, DType::BF16] {
            let case = Case::new(operator, 5, 40, dtype)?;
            let fused = case.fused()?;
            let want = tensors_of(formula(&case, &fused)?);
            for (((name, fused), (_, composed)), want) in named(fused).iter().zip(&named(case.composed()?)).zip(&want) {
                let mut wrong = numbers(fused)?;
                let row = &want.values[..want.width];
                let largest = row.iter().fold(0.0, |a: f64, b| a.max(b.value.abs()));
                wrong[0] =
                    want.values[0].value + f64::max(6.0 * precision(fused.dtype()).step(largest), 1e-3 * largest);
                let wrong = Tensor::from_vec(wrong, fused.shape(), &Device::Cpu)?.to_dtype(fused.dtype())?;
                assert!(close(name, &wrong, composed, want, &case).is_err(), "{name} of case {case}");
            }
        }
    }
    Ok(())
}
