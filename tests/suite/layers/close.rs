//! The tolerance for results of a whole layer. The rule of the operator (crates/reference) does not fit here: its error model
//! knows the sums of attention, but not those of the projections.
//!
//! ```text
//! limit = (3 * the relative error of the plain same-precision layer + 2 rounding steps of the type) * the row's scale
//! ```
//!
//! The scale of a row is its largest value, but at least the root mean square of the largest values of all rows. If a row
//! of a gradient is far smaller than other rows, its elements are differences of large terms, with the errors of these terms.
//!
//! The error of the plain layer is the largest over all rows. A projection mixes all heads. So a small error in one row of
//! the plain layer does not predict the error of the same row here.

use anyhow::{ensure, Result};
use candle_core::{DType, Tensor, D};

use crate::common::cases::precision;

/// Factor of the plain layer's error. Two correct implementations in one precision have errors of similar size.
///
/// The operator's tests use a factor of 2, for sums over keys only. A layer also has projections: with 25 other seeds, the
/// largest error of a tensor was up to 2.6 times that of the plain layer. Another machine may add in another order, with other
/// errors. With a factor of 3, the tests of this rule still reject small faults.
const PLAIN_ERRORS: f64 = 3.0;
/// One rounding step for the result, and one for intermediate results.
const RESULT_STEPS: f64 = 2.0;

/// The largest allowed error of a tensor, relative to the scale of each row.
#[derive(Clone, Copy, Debug)]
pub struct Tolerance(f64);

impl Tolerance {
    /// From the result of the plain layer in `dtype` (in f32 for f64). `want` is the same result in f64.
    pub fn from(plain: &Tensor, want: &Tensor, dtype: DType) -> Result<Self> {
        Ok(Self::from_plain_error(relative_error(plain, want)?, dtype))
    }

    /// From the [`relative_error`] of the plain layer in `dtype` (in f32 for f64).
    pub fn from_plain_error(error: f64, dtype: DType) -> Self {
        let errors = match dtype {
            // Rounding errors are proportional to the rounding step of the type. Here both results are f64 and both have
            // errors.
            DType::F64 => 2.0 * PLAIN_ERRORS * error * step(DType::F64) / step(DType::F32),
            _ => PLAIN_ERRORS * error,
        };
        Self(errors + RESULT_STEPS * step(dtype))
    }
}

/// Checks that `got` equals `want` within the tolerance, row by row.
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
                "{name}: got {got}, expected {want} at row {row}, col {col}\n{what}"
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

/// The largest error over all rows, relative to the scale of the row.
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

/// The rows of a tensor: its elements along the last axis.
fn rows(tensor: &Tensor) -> Result<Vec<Vec<f64>>> {
    let width = tensor.dim(D::Minus1)?;
    Ok(tensor.to_dtype(DType::F64)?.reshape(((), width))?.to_vec2()?)
}

/// The rounding step of `dtype` at 1.
fn step(dtype: DType) -> f64 {
    precision(dtype).step(1.0)
}
