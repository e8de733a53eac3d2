//! The rule for how far a result may be from the reference. Each row (one token and head) has its own limit:
//!
//! ```text
//! limit = 2 * the error of the plain same-precision implementation in this row
//!       + 2 rounding steps of the type at the largest value of this row
//!       + 2 * the likely change of this row when the operands of the matrix products are rounded to the type
//!       + 4 rounding steps of the accumulator at the size of the terms of this row before they cancel
//! ```
//!
//! A limit for a whole tensor depends on its worst row. At 8k it would accept 64 lost keys. A limit for each row does not.
//! The last two terms are for rows in which the plain implementation has a small error by chance. The suite of candle-fa2
//! tests that the limit still rejects lost keys.

use crate::call::{attention_plain, Input, Output, Rows};
use crate::precision::Precision;

/// Two correct implementations in one precision have errors of similar size.
const PLAIN_ERRORS: f64 = 2.0;
/// One step for rounding the result, one for rounding intermediate results.
const RESULT_STEPS: f64 = 2.0;
/// The plain implementation rounds each p, `d_raw` and o once. Another implementation rounds at other places (p before the
/// division by the row sum), so it has other errors. Where `dp - delta` cancels, the plain `d_raw` can be near zero. Without
/// this term, 284 of 881,422 elements of dq in bf16 on the CPU path exceed the limit, by up to 16 times, and 369 of an
/// implementation that divides last. With this term the worst element has 0.6 of the limit.
const OPERAND_ROUNDINGS: f64 = 2.0;
/// A row may be far smaller than its terms. `dq` of a query with one key is a difference of two equal numbers. `lse` is
/// near zero when the largest score is near `-ln(keys)`. `exp(s - lse)` turns steps of s and lse into a factor of p. Then
/// another order of the same operations changes the row by steps of the accumulator. Without this term the CPU path in
/// f32 exceeds the limit in 3,132 of 881,422 elements of dq and 289 of 42,067 lse (in bf16, by up to 376 times). With two
/// steps, a plain sum of 2,048 keys in reverse order just reaches the limit of lse.
const ACCUMULATOR_STEPS: f64 = 4.0;

/// The limit of a row that the reference did not compute.
pub const NOT_COMPARED: f64 = f64::NAN;

/// How far each row of a tensor may be from the reference.
#[derive(Clone, Debug)]
pub struct Tolerance {
    /// The type that the tensor is stored in.
    pub precision: Precision,
    pub limits: Vec<f64>,
}

/// The tolerance of each tensor, in the order of [`Output::named`]. `want` is the reference's answer to `input`. o and
/// lse of a query that was not computed are [`NOT_COMPARED`].
pub fn tolerances(input: &Input, want: &Output) -> [Tolerance; 5] {
    let plain = attention_plain(input);
    let [o, lse, dq, dk, dv] = [
        (&plain.o, &want.o, input.precision),
        (&plain.lse, &want.lse, input.precision.accumulator()),
        (&plain.dq, &want.dq, input.precision),
        (&plain.dk, &want.dk, input.precision),
        (&plain.dv, &want.dv, input.precision),
    ]
    .map(|(plain, want, precision)| Tolerance::from(plain, want, precision));
    let computed = |mut tolerance: Tolerance| {
        for (row, limit) in tolerance.limits.iter_mut().enumerate() {
            if !input.computes(row / input.num_heads) {
                *limit = NOT_COMPARED;
            }
        }
        tolerance
    };
    [computed(o), computed(lse), dq, dk, dv]
}

impl Tolerance {
    /// The rule for a tensor stored in `precision`.
    pub fn from(plain: &Rows, want: &Rows, precision: Precision) -> Self {
        let limit = |((plain, want), error): ((&[f64], &[f64]), &crate::rounding::RowError)| {
            let largest = |size: f64, x: f64| size.max(finite(x).abs());
            let difference = plain.iter().zip(want).map(|(p, w)| p - w).fold(0.0, largest);
            let value = want.iter().copied().fold(0.0, largest);
            let magnitude = finite(error.magnitude).max(value);
            PLAIN_ERRORS * difference
                + RESULT_STEPS * precision.step(value)
                + OPERAND_ROUNDINGS * finite(error.operand_rounding())
                + ACCUMULATOR_STEPS * precision.accumulator().step(magnitude)
        };
        let rows = plain.values.chunks_exact(want.width).zip(want.values.chunks_exact(want.width));
        Self { precision, limits: rows.zip(&want.errors).map(limit).collect() }
    }

    /// The tolerance between two results that may each be this far from the reference.
    pub fn doubled(self) -> Self {
        self.scaled(2.0)
    }

    /// `factor` times each limit.
    pub fn scaled(mut self, factor: f64) -> Self {
        self.limits.iter_mut().for_each(|limit| *limit *= factor);
        self
    }
}

/// 0 for a number that is not finite. Such numbers are compared before the limits, so they add nothing to a limit.
fn finite(x: f64) -> f64 {
    if x.is_finite() {
        x
    } else {
        0.0
    }
}
