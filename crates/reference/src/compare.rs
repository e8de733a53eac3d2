//! Compares a result with the reference. First, infinities and NaN must be at the same places. Then every number must be
//! within the limit of its row.

use std::fmt::{Display, Write};

use anyhow::{bail, ensure, Result};

use crate::call::Rows;
use crate::tolerance::Tolerance;

/// The errors of a result that passed.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Closeness {
    /// The largest |got - want|.
    pub error: f64,
    /// The largest error as a share of its row's limit.
    pub share_of_limit: f64,
}

/// Compares the tensor `name` of `case`. `want` is the reference, which is not rounded to the type. Where it is above the
/// largest number of the type, the result must be infinite. Rows with the limit
/// [`NOT_COMPARED`](crate::tolerance::NOT_COMPARED) are skipped.
///
/// # Errors
/// If the error of an element is above its limit. The error names the worst element and its coordinates.
pub fn close(name: &str, got: &Rows, want: &Rows, tolerance: &Tolerance, case: &dyn Display) -> Result<Closeness> {
    ensure!(
        got.values.len() == want.values.len() && got.width == want.width && got.heads == want.heads,
        "{name} has {} values in {} heads of width {}, the reference {} in {} of {}\ncase {case}",
        got.values.len(),
        got.heads,
        got.width,
        want.values.len(),
        want.heads,
        want.width,
    );
    assert_eq!(tolerance.limits.len() * want.width, want.values.len(), "each row of {name} has one limit");
    let (mut misplaced, mut over, mut largest) = (Vec::new(), Vec::new(), Closeness::default());
    // The worst element is the one with the largest share of its own row's limit, not the one with the largest error.
    let mut worst = 0;
    let overflow = tolerance.precision.overflow();
    for (row, &limit) in tolerance.limits.iter().enumerate().filter(|(_, limit)| !limit.is_nan()) {
        for at in row * want.width..(row + 1) * want.width {
            let (got, want) = (got.values[at], want.values[at]);
            if !in_place(got, want, overflow) {
                misplaced.push(at);
            } else if got.is_finite() {
                let error = (got - want).abs();
                // A row without terms may have the limit 0.
                let share = if error == 0.0 { 0.0 } else { error / limit };
                if error > limit {
                    over.push(at);
                }
                if share > largest.share_of_limit {
                    (largest.share_of_limit, worst) = (share, at);
                }
                largest.error = largest.error.max(error);
            }
        }
    }
    if let Some(&first) = misplaced.first() {
        bail!(
            "{name} differs from the reference: {} instead of {} at {}\ncase {case}; {}",
            got.values[first],
            want.values[first],
            coordinates(want, first),
            extent(want, &misplaced, "not in place"),
        );
    }
    if !over.is_empty() {
        bail!(
            "{name} differs from the reference: |{} - {}| = {:.1e} at {}, limit {:.1e}\ncase {case}; {}",
            short(got.values[worst]),
            short(want.values[worst]),
            (got.values[worst] - want.values[worst]).abs(),
            coordinates(want, worst),
            tolerance.limits[worst / want.width],
            extent(want, &over, "over"),
        );
    }
    Ok(largest)
}

/// Whether both are finite, or the same infinity, or NaN. From `overflow` on, `want` is an infinity in the type of `got`.
fn in_place(got: f64, want: f64, overflow: f64) -> bool {
    let want = if want.abs() >= overflow { f64::INFINITY.copysign(want) } else { want };
    got.is_finite() && want.is_finite() || got == want || got.is_nan() && want.is_nan()
}

/// The coordinates of element `at`: sequence, position in it, head, and the dimension if a row has several numbers.
fn coordinates(rows: &Rows, at: usize) -> String {
    let (batch, row, head) = place(rows, at / rows.width);
    let mut text = format!("[batch {batch}, row {row}, head {head}");
    if rows.width > 1 {
        write!(text, ", dim {}", at % rows.width).expect("writing to a String");
    }
    text + "]"
}

/// How many elements are wrong and in what way, and the first row with a wrong element.
fn extent(rows: &Rows, wrong: &[usize], what: &str) -> String {
    let first = wrong.iter().map(|&at| place(rows, at / rows.width).1).min().unwrap_or(0);
    format!("{} of {} elements {what}, all in rows >= {first}", wrong.len(), rows.values.len())
}

/// `(sequence, position in it, head)` of a row.
fn place(rows: &Rows, row: usize) -> (usize, usize, usize) {
    let (mut token, head) = (row / rows.heads, row % rows.heads);
    for (batch, &len) in rows.lengths.iter().enumerate() {
        if token < len {
            return (batch, token, head);
        }
        token -= len;
    }
    panic!("row {row} is past the last sequence");
}

/// Four significant digits. Very small and very large numbers have a power of ten.
fn short(x: f64) -> String {
    match x.abs() {
        0.0 => "0".to_string(),
        size @ 1e-3..1e5 => format!("{x:.*}", (3 - size.log10().floor() as i32).max(0) as usize),
        _ => format!("{x:.3e}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::precision::Precision;
    use crate::tolerance::NOT_COMPARED;

    /// Two sequences of 2 and 3 tokens with two heads of width 4. Every number is `value`.
    fn rows(value: f64) -> Rows {
        Rows { lengths: vec![2, 3], heads: 2, width: 4, values: vec![value; 40], ..Rows::default() }
    }

    fn limits(limit: f64) -> Tolerance {
        Tolerance { precision: Precision::F32, limits: vec![limit; 10] }
    }

    fn text(got: &Rows, want: &Rows, tolerance: &Tolerance) -> String {
        close("o", got, want, tolerance, &"of two sequences").expect_err("these differ").to_string()
    }

    #[test]
    fn names_the_worst_element_and_where_it_lies() -> Result<()> {
        let (mut got, want) = (rows(0.4062), rows(0.4062));
        close("o", &got, &want, &limits(0.0), &"")?;
        // Token 3 is row 1 of the second sequence.
        got.values[(3 * 2 + 1) * 4 + 2] += 0.0079;
        got.values[39] += 0.002;
        assert_eq!(
            text(&got, &want, &limits(1e-3)),
            "o differs from the reference: |0.4141 - 0.4062| = 7.9e-3 at [batch 1, row 1, head 1, dim 2], limit 1.0e-3\n\
             case of two sequences; 2 of 40 elements over, all in rows >= 1"
        );
        // The worst element has the largest share of its own row's limit.
        let mut tolerance = limits(1e-3);
        tolerance.limits[7] = 5e-3;
        tolerance.limits[9] = 1e-4;
        assert!(text(&got, &want, &tolerance).contains("at [batch 1, row 2, head 1, dim 3], limit 1.0e-4"));
        let closeness = close("o", &got, &want, &limits(1e-2), &"")?;
        assert!((closeness.error - 0.0079).abs() < 1e-12 && (closeness.share_of_limit - 0.79).abs() < 1e-10);
        Ok(())
    }

    #[test]
    fn rows_without_a_limit_are_not_compared() -> Result<()> {
        let (mut got, want) = (rows(1.0), rows(1.0));
        (got.values[4], got.values[5]) = (f64::NAN, 3.0);
        let mut tolerance = limits(0.0);
        assert!(close("o", &got, &want, &tolerance, &"").is_err());
        tolerance.limits[1] = NOT_COMPARED;
        assert_eq!(close("o", &got, &want, &tolerance, &"")?, Closeness::default());
        Ok(())
    }

    #[test]
    fn infinities_and_nan_must_be_in_place_before_numbers_count() -> Result<()> {
        let (mut got, mut want) = (rows(1.0), rows(1.0));
        want.values[5] = f64::NAN;
        want.values[6] = f64::INFINITY;
        got.values[39] = 2.0;
        assert_eq!(
            text(&got, &want, &limits(1e-3)),
            "o differs from the reference: 1 instead of NaN at [batch 0, row 0, head 1, dim 1]\n\
             case of two sequences; 2 of 40 elements not in place, all in rows >= 0"
        );
        got.values[5] = f64::NAN;
        got.values[6] = f64::NEG_INFINITY;
        assert!(text(&got, &want, &limits(1e9)).contains("-inf instead of inf"));
        got.values[6] = f64::INFINITY;
        assert!(text(&got, &want, &limits(1e-3)).contains("|2.000 - 1.000|"));
        got.values[39] = 1.0;
        close("o", &got, &want, &limits(0.0), &"")?;
        // NaN instead of a number is an error under any limit.
        got.values[0] = f64::NAN;
        assert!(text(&got, &want, &limits(f64::INFINITY)).contains("NaN instead of 1"));
        Ok(())
    }

    /// The reference does not round. Where its number is too large for the type, the result must be infinite.
    #[test]
    fn numbers_past_the_type_are_infinite() -> Result<()> {
        let f16 = |limit: f64| Tolerance { precision: Precision::F16, ..limits(limit) };
        let (got, want) = (rows(f64::INFINITY), rows(70000.0));
        close("o", &got, &want, &f16(0.0), &"")?;
        assert!(close("o", &rows(65504.0), &want, &f16(1e9), &"").is_err());
        Ok(())
    }
}
