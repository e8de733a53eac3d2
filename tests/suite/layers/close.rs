//! How near is near enough: the house's rule for tensors that went through a whole layer.
//!
//! ```text
//! limit = (3 * the relative error of the plain same-precision layer + 2 rounding steps of the type) * the row's scale
//! ```
//!
//! The scale of a row is its largest value, but no less than the root mean square of those of all rows: a gradient that
//! is far smaller than its neighbours is what terms of their size left when they cancelled. The plain error is the
//! largest of any row: a projection mixes all heads, so that the luck of one row in the plain layer says nothing about
//! the same row here.

use anyhow::{ensure, Result};
use candle_core::{DType, Tensor, D};

/// Any two honest implementations in one precision err alike, up to luck. The house's 2 holds for sums over keys alone;
/// here projections come before and after, and over 25 other seeds the largest error of a tensor was up to 2.6 times the
/// plain one's. Another machine's matrix product is another draw. The tests of the rule reject small faults at 3 as well.
const PLAIN_ERRORS: f64 = 3.0;
/// One step for rounding the result, one for whatever is rounded on the way to it.
const RESULT_STEPS: f64 = 2.0;

/// How far a tensor may be from the one wanted, relative to the scale of each row.
#[derive(Clone, Copy, Debug)]
pub struct Tolerance(f64);

impl Tolerance {
    /// From what the plain layer makes of a tensor whose f64 value is `want`: the plain layer in `dtype`, or in f32 for f64.
    pub fn from(plain: &Tensor, want: &Tensor, dtype: DType) -> Result<Self> {
        Self::from_plain_error(relative_error(plain, want)?, dtype)
    }

    /// From the plain layer's [`relative_error`], in `dtype`, or in f32 for f64.
    pub fn from_plain_error(error: f64, dtype: DType) -> Result<Self> {
        let errors = match dtype {
            // Rounding errors are in proportion to the step of the type, and f64 is compared with f64: both sides err.
            DType::F64 => 2.0 * PLAIN_ERRORS * error * step(DType::F64)? / step(DType::F32)?,
            _ => PLAIN_ERRORS * error,
        };
        Ok(Self(errors + RESULT_STEPS * step(dtype)?))
    }
}

/// `got` is `want`, row by row.
pub fn close(
    name: &str,
    got: &Tensor,
    want: &Tensor,
    tolerance: Tolerance,
    what: &dyn std::fmt::Display,
) -> Result<()> {
    ensure!(got.dims() == want.dims(), "{name} has shape {:?}, expected {:?}\n{what}", got.dims(), want.dims());
    let (got, want) = (rows(got)?, rows(want)?);
    let mut worst = (0.0, String::new());
    for (row, ((got, want), scale)) in got.iter().zip(&want).zip(scales(&want)).enumerate() {
        let limit = tolerance.0 * scale;
        for (col, (got, want)) in got.iter().zip(want).enumerate() {
            ensure!(
                got.is_finite() && want.is_finite(),
                "{name}: {got} where {want} belongs at row {row}, col {col}\n{what}"
            );
            let error = (got - want).abs();
            if error > limit && error / limit > worst.0 {
                worst = (
                    error / limit,
                    format!("|{got} - {want}| = {error:.1e} at row {row}, col {col}, limit {limit:.1e}"),
                );
            }
        }
    }
    ensure!(worst.0 == 0.0, "{name} differs: {}\n{what}", worst.1);
    Ok(())
}

/// The largest error of any row relative to that row's scale.
pub fn relative_error(got: &Tensor, want: &Tensor) -> Result<f64> {
    let (got, want) = (rows(got)?, rows(want)?);
    let errors = got.iter().zip(&want).zip(scales(&want)).map(|((got, want), scale)| {
        let error = got.iter().zip(want).map(|(got, want)| (got - want).abs()).fold(0.0, f64::max);
        if error > 0.0 {
            error / scale
        } else {
            0.0
        }
    });
    Ok(errors.fold(0.0, f64::max))
}

/// The scale of each row.
fn scales(rows: &[Vec<f64>]) -> Vec<f64> {
    let largest: Vec<f64> =
        rows.iter().map(|row| row.iter().fold(0.0, |largest, value| value.abs().max(largest))).collect();
    let mean_square = largest.iter().map(|value| value * value).sum::<f64>() / largest.len() as f64;
    largest.into_iter().map(|value| value.max(mean_square.sqrt())).collect()
}

/// The values along the last axis, one row after the other.
fn rows(tensor: &Tensor) -> Result<Vec<Vec<f64>>> {
    let width = tensor.dim(D::Minus1)?;
    Ok(tensor.to_dtype(DType::F64)?.reshape(((), width))?.to_vec2()?)
}

/// The distance from 1 to the next number of `dtype`.
fn step(dtype: DType) -> Result<f64> {
    Ok(match dtype {
        DType::F64 => f64::EPSILON,
        DType::F32 => f32::EPSILON.into(),
        DType::F16 => half::f16::EPSILON.into(),
        DType::BF16 => half::bf16::EPSILON.into(),
        other => anyhow::bail!("no rounding step for {other:?}"),
    })
}
