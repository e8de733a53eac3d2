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
//! of similar size. The two steps are for rounding the result and an intermediate result. The third term is for rows in which the
//! other implementation has a small error by chance: four operations round on the way of a term to the result. The last one is for
//! GPUs, which replace numbers below the normal ones by zero, also if they are factors of a result.

use anyhow::Result;
use attention_reference::{Rows, Tolerance};
use candle_core::{DType, Device, Tensor};

use crate::reference::{Sum, Want};
use crate::run::{numbers, precision};

/// Compares `got` with `want`. `other` is the result of the other implementation.
///
/// First, infinities and NaN must be at the same places. Then every number must be within the limit of its row. The error names the
/// element with the largest share of its limit.
pub fn close(name: &str, got: &Tensor, other: &Tensor, want: &Want, case: &dyn std::fmt::Display) -> Result<()> {
    let precision = precision(got.dtype());
    let limit = |(want, other): (&[Sum], &[f64])| {
        let largest = |values: &mut dyn Iterator<Item = f64>| values.fold(0.0, |a: f64, b| a.max(b.abs()));
        let value = largest(&mut want.iter().map(|want| want.value));
        let magnitude = largest(&mut want.iter().map(|want| want.magnitude));
        let error = largest(&mut other.iter().zip(want).map(|(other, want)| other - want.value));
        2.0 * error
            + 2.0 * precision.step(value)
            + 4.0 * precision.accumulator().step(magnitude)
            + 16.0 * f64::from(f32::MIN_POSITIVE)
    };
    let limits = want.values.chunks(want.width).zip(numbers(other)?.chunks(want.width)).map(limit).collect();
    // For attention a row is a token of a head. Here all rows are of one sequence and one head.
    let rows = |values: Vec<f64>| {
        let lengths = vec![values.len() / want.width];
        Rows { lengths, heads: 1, width: want.width, values, ..Rows::default() }
    };
    let wanted = rows(want.values.iter().map(|want| want.value).collect());
    attention_reference::close(name, &rows(numbers(got)?), &wanted, &Tolerance { precision, limits }, case)?;
    Ok(())
}

/// The largest difference, in units of the largest value.
pub fn relative(got: &Tensor, want: &Tensor) -> Result<f64> {
    let largest = |tensor: &Tensor| tensor.abs()?.flatten_all()?.max(0)?.to_scalar::<f64>();
    let [got, want] = [got, want].map(|tensor| tensor.to_device(&Device::Cpu)?.to_dtype(DType::F64));
    let (got, want) = (got?, want?);
    Ok(largest(&(got - &want)?)? / largest(&want)?)
}
