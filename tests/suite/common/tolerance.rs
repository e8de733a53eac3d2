//! The one rule for how far a result may be from the reference, applied row by row (a row is one token and head):
//!
//! ```text
//! limit = 2 * the plain same-precision implementation's error in that row
//!       + 2 rounding steps of the type at that row's largest value
//!       + 2 * what rounding the operands of its matrix products to the type is likely to do to that row
//!       + 4 rounding steps of the accumulator at the size that the terms of that row had before they cancelled
//! ```
//!
//! A bound over a whole tensor is set by its worst row and lets 64 lost keys pass at 8k; a row of its own does not. The
//! last two terms are for rows where the plain implementation was lucky. The tests below say what all four together
//! still catch.

use super::reference::Rows;
use candle_core::DType;

/// Any two honest implementations in one precision err alike, up to luck.
const PLAIN_ERRORS: f64 = 2.0;
/// One step for rounding the result, one for whatever is rounded on the way to it.
const RESULT_STEPS: f64 = 2.0;
/// The plain implementation rounds each p, draw and o once; another rounds them elsewhere (p before it is divided by the
/// row sum) and so draws other errors. Where `dp - delta` cancels, the plain draw can be near zero. Without this term, 284
/// of 881,422 elements of dq in bf16 on the CPU path pass the limit, by up to 16 times, and 369 of an implementation that
/// divides last; with it the worst reaches 0.6.
const OPERAND_ROUNDINGS: f64 = 2.0;
/// A row may be far smaller than its terms: `dq` of a query with one key is a difference of two equal numbers, `lse` is
/// near zero when the largest score is near `-ln(keys)`, and `exp(s - lse)` turns steps of s and lse into a factor of p.
/// Any other order of the same arithmetic then moves the row by steps of the accumulator. Without this term the CPU path
/// in f32 passes the limit in 3,132 of 881,422 elements of dq and 289 of 42,067 lse (in bf16, by up to 376 times). With
/// two steps a plain sum of 2,048 keys, taken backwards, just reaches the limit of lse.
const ACCUMULATOR_STEPS: f64 = 4.0;

/// How far each row may be from the reference.
#[derive(Clone, Debug)]
pub struct Tolerance {
    pub limits: Vec<f64>,
}

impl Tolerance {
    /// The rule for a tensor stored in `dtype`.
    pub fn from(plain: &Rows, want: &Rows, dtype: DType) -> Self {
        let rows = want.magnitude.len();
        let limits = (0..rows).map(|row| {
            let of_row = |values: &Rows| values.values[row * want.width..][..want.width].to_vec();
            let (plain, exact) = (of_row(plain), of_row(want));
            // Places that are not finite are matched before any limit is looked at.
            let error = largest(plain.iter().zip(&exact).map(|(p, w)| (p - w).abs()));
            let value = largest(exact.iter().map(|w| w.abs()));
            let magnitude = largest([want.magnitude[row], value].into_iter());
            PLAIN_ERRORS * error
                + RESULT_STEPS * rounding_step(dtype, value)
                + OPERAND_ROUNDINGS * largest([want.operand_rounding[row]].into_iter())
                + ACCUMULATOR_STEPS * rounding_step(accumulator(dtype), magnitude)
        });
        Self { limits: limits.collect() }
    }

    /// Between two results that may each be this far from the reference.
    pub fn doubled(mut self) -> Self {
        self.limits.iter_mut().for_each(|limit| *limit *= 2.0);
        self
    }
}

/// The type that lse is stored in, and everything is summed in, for inputs of `dtype`.
pub fn accumulator(dtype: DType) -> DType {
    match dtype {
        DType::F64 => DType::F64,
        _ => DType::F32,
    }
}

/// The smallest normal number of what `dtype` is summed in.
pub fn smallest_normal(dtype: DType) -> f64 {
    match accumulator(dtype) {
        DType::F64 => f64::MIN_POSITIVE,
        _ => f32::MIN_POSITIVE as f64,
    }
}

/// The distance between neighbouring numbers of `dtype` at `|x|`.
pub fn rounding_step(dtype: DType, x: f64) -> f64 {
    // (digits after the leading one, exponent of the smallest normal number)
    let (digits, smallest) = match dtype {
        DType::F64 => (52, -1022),
        DType::F32 => (23, -126),
        DType::BF16 => (7, -126),
        DType::F16 => (10, -14),
        other => panic!("no rounding step for {other:?}"),
    };
    // The exponent field of an f64; it is zero for zero and for what is smaller than any normal number.
    let exponent = ((x.to_bits() >> 52) & 0x7ff) as i32 - 1023;
    // Two factors, as one alone would be below what powi can reach.
    2f64.powi(exponent.max(smallest)) * 2f64.powi(-digits)
}

fn largest(values: impl Iterator<Item = f64>) -> f64 {
    values.filter(|x| x.is_finite()).fold(0.0, f64::max)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::common::cases::{self, cpu_targets, Case, Target};
    use crate::common::compare;
    use crate::common::reference::{self, Variant, PLAIN};
    use anyhow::{ensure, Result};
    use candle_fa2::Mask;

    /// The smallest key tile that any kernel has.
    const TILE: usize = 32;
    const ALL: [&str; 5] = ["o", "lse", "dq", "dk", "dv"];

    /// A same-precision implementation with the fault `drops` fails on every tensor named.
    fn rejects(case: &Case, tensors: &[&str], drops: &dyn Fn(usize, usize) -> bool) -> Result<()> {
        let input = case.draw();
        let want = reference::attention(&input);
        let broken = reference::attention_variant(&input, &Variant { drops, ..PLAIN });
        let tolerances = case.tolerances(&input, &want);
        for (((name, broken), (_, want)), tolerance) in broken.named().into_iter().zip(want.named()).zip(&tolerances) {
            let caught = compare::close(name, broken, want, tolerance, case).is_err();
            ensure!(caught || !tensors.contains(&name), "{name} passes with lost keys\ncase {case}");
        }
        Ok(())
    }

    /// One key tile dropped from the last query tile, at the longest length that the suite compares.
    #[test]
    fn rejects_one_lost_key_tile_at_the_longest_seqlen() -> Result<()> {
        for target in cpu_targets() {
            for case in cases::long(&target) {
                let (seqlen_q, seqlen_k) = case.sequences()[0];
                let first = (seqlen_k / 2).next_multiple_of(TILE);
                let drops = |row: usize, col: usize| row + TILE >= seqlen_q && (first..first + TILE).contains(&col);
                // A window shows the last query tile only the last keys.
                let last = |row: usize, col: usize| row + TILE >= seqlen_q && col + TILE >= seqlen_k;
                let windowed = matches!(case.mask, Mask::Window { .. });
                rejects(&case, &ALL, if windowed { &last } else { &drops })?;
            }
        }
        Ok(())
    }

    /// The same at 8k keys, for the tensors whose rows sum over the keys.
    #[test]
    fn rejects_one_lost_key_tile_at_8k_keys() -> Result<()> {
        for target in cpu_targets() {
            let case = Case::new(&target).heads(1, 1).batch(1, 2, 8192).mask(Mask::Causal);
            rejects(&case, &["o", "lse", "dq"], &|_, col| (4096..4096 + TILE).contains(&col))?;
        }
        Ok(())
    }

    /// One key dropped, wherever it lies, from the last eighth of the queries: from a single one up to 15.
    #[test]
    fn rejects_one_lost_key_at_short_seqlens() -> Result<()> {
        for target in cpu_targets() {
            for seqlen in [2, 5, 16, 48] {
                // Weights near 1 / seqlen: a key that hardly counts is below the rounding of bf16, and no rule could
                // miss it.
                let case = Case::new(&target).heads(1, 1).batch(1, seqlen, seqlen).softmax_scale(0.05);
                let losing = (seqlen / 8).max(1);
                for lost in [0, seqlen / 2, seqlen - 1] {
                    rejects(&case, &ALL, &|row, col| row + losing >= seqlen && col == lost)?;
                }
            }
        }
        Ok(())
    }

    /// Implementations that sum in another order, or divide by the row sum at the end and so round other numbers, are
    /// honest.
    #[test]
    fn accepts_honest_implementations() -> Result<()> {
        for target in cpu_targets() {
            for case in honest_cases(&target) {
                let input = case.draw();
                let want = reference::attention(&input);
                let tolerances = case.tolerances(&input, &want);
                for (reversed, divides_last) in [(true, false), (false, true), (true, true)] {
                    let got = reference::attention_variant(&input, &Variant { reversed, divides_last, ..PLAIN });
                    for (((name, got), (_, want)), tolerance) in
                        got.named().into_iter().zip(want.named()).zip(&tolerances)
                    {
                        compare::close(name, got, want, tolerance, &case)?;
                    }
                }
            }
        }
        Ok(())
    }

    fn honest_cases(target: &Target) -> Vec<Case> {
        [cases::smoke(target), cases::options(target), cases::head_dims(target), cases::packed(target)].concat()
    }

    #[test]
    fn rounding_steps_are_those_of_each_type() {
        for (dtype, epsilon) in [
            (DType::F64, f64::EPSILON),
            (DType::F32, f32::EPSILON as f64),
            (DType::F16, 9.765625e-4),
            (DType::BF16, 7.8125e-3),
        ] {
            assert_eq!(rounding_step(dtype, 1.0), epsilon);
            assert_eq!(rounding_step(dtype, 1.99), epsilon);
            assert_eq!(rounding_step(dtype, 2.0), 2.0 * epsilon);
            assert_eq!(rounding_step(dtype, 0.75), epsilon / 2.0);
        }
        assert_eq!(rounding_step(DType::F16, 0.0), 2f64.powi(-24));
        assert_eq!(rounding_step(DType::F16, 1e-9), 2f64.powi(-24));
        assert_eq!(rounding_step(DType::F64, f64::MIN_POSITIVE), f64::from_bits(1));
        assert_eq!(rounding_step(DType::F32, 1e-300), f32::from_bits(1) as f64);
    }
}
