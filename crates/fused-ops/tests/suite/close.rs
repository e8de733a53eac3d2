//! The rule for how far a result may be from the reference. Each row has its own limit:
//!
//! ```text
//! limit = 2 * the error of another implementation in the same precision in this row
//!       + 2 rounding steps of the type at the largest value of this row
//!       + 4 rounding steps of the accumulator at the size of the terms of this row before they cancel
//!       + 16 times the smallest normal number of f32
//! ```
//!
//! The other implementation is the composed operator for the fused one, and the reverse. Two correct implementations have errors
//! of similar size. The two steps are for rounding the result and an intermediate result. The last term is for rows in which the
//! other implementation has a small error by chance: four operations round on the way of a term to the result. A GPU replaces
//! numbers below the normal ones by zero, also factors of a result; the last term is for that.

use anyhow::{ensure, Result};
use candle_core::Tensor;

use crate::reference::Want;
use crate::run::{numbers, precision};

/// Compares `got` with `want`. `other` is the result of the other implementation.
pub fn close(name: &str, got: &Tensor, other: &Tensor, want: &Want, case: &dyn std::fmt::Display) -> Result<()> {
    let precision = precision(got.dtype());
    let (got, other) = (numbers(got)?, numbers(other)?);
    ensure!(got.len() == want.values.len(), "{name} has {} values, not {}\ncase {case}", got.len(), want.values.len());
    for (row, want) in want.values.chunks(want.width).enumerate() {
        let start = row * want.len();
        let (got, other) = (&got[start..start + want.len()], &other[start..start + want.len()]);
        let largest = |values: &mut dyn Iterator<Item = f64>| values.fold(0.0, |a: f64, b| a.max(b.abs()));
        let value = largest(&mut want.iter().map(|want| want.value));
        let magnitude = largest(&mut want.iter().map(|want| want.magnitude));
        let error = largest(&mut other.iter().zip(want).map(|(other, want)| other - want.value));
        let limit = 2.0 * error
            + 2.0 * precision.step(value)
            + 4.0 * precision.accumulator().step(magnitude)
            + 16.0 * f64::from(f32::MIN_POSITIVE);
        for (column, (got, want)) in got.iter().zip(want).enumerate() {
            ensure!(
                (got - want.value).abs() <= limit,
                "{name} differs from the reference: |{got} - {}| = {:.1e} at [row {row}, column {column}], limit \
                 {limit:.1e}\ncase {case}",
                want.value,
                (got - want.value).abs(),
            );
        }
    }
    Ok(())
}
