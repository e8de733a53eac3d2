//! The asserts: a tensor against the reference within a tolerance, and two tensors bit for bit.

use super::cases::Case;
use super::reference::{Output, Rows};
use super::tolerance::Tolerance;
use anyhow::{bail, ensure, Result};
use candle_core::{DType, Tensor};
use half::{bf16, f16};
use std::fmt::{Display, Write};

/// `got` is `want`: infinities and NaN in the same places first, then every number within its row's limit.
/// `want` is the reference, so it is not rounded to the type: a value past the type's largest is expected as infinity.
pub fn close(name: &str, got: &Rows, want: &Rows, tolerance: &Tolerance, case: &Case) -> Result<()> {
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
    let dtype = if name == "lse" { super::tolerance::accumulator(case.dtype) } else { case.dtype };
    let misplaced: Vec<usize> = (0..want.values.len())
        .filter(|&at| {
            let want = round_to(dtype, want.values[at]);
            let got = got.values[at];
            let both_finite = want.is_finite() && got.is_finite();
            let same = got == want || got.is_nan() && want.is_nan();
            !both_finite && !same
        })
        .collect();
    if let Some(&first) = misplaced.first() {
        bail!(
            "{name} differs from the reference: {} where {} belongs, at {}\ncase {case}; {}",
            got.values[first],
            want.values[first],
            coordinates(want, first),
            extent(want, &misplaced),
        );
    }
    let error = |at: usize| (got.values[at] - want.values[at]).abs();
    let limit = |at: usize| tolerance.limits[at / want.width];
    let over: Vec<usize> =
        (0..want.values.len()).filter(|&at| got.values[at].is_finite() && error(at) > limit(at)).collect();
    // The worst is what is furthest over its own row's limit, not the largest difference.
    let worst = over.iter().copied().max_by(|&a, &b| (error(a) / limit(a)).total_cmp(&(error(b) / limit(b))));
    if let Some(worst) = worst {
        bail!(
            "{name} differs from the reference: |{} - {}| = {:.1e} at {}, limit {:.1e}\ncase {case}; {}",
            short(got.values[worst]),
            short(want.values[worst]),
            error(worst),
            coordinates(want, worst),
            limit(worst),
            extent(want, &over),
        );
    }
    Ok(())
}

/// Two tensors of one shape and type hold the same bits.
pub fn same_bits(name: &str, got: &Tensor, want: &Tensor, what: &dyn std::fmt::Display) -> Result<()> {
    ensure!(
        got.dims() == want.dims() && got.dtype() == want.dtype(),
        "{name}: {:?} {:?} against {:?} {:?}\n{what}",
        got.dims(),
        got.dtype(),
        want.dims(),
        want.dtype()
    );
    let (got_bits, want_bits) = (bits(got)?, bits(want)?);
    let differing: Vec<usize> = (0..got_bits.len()).filter(|&at| got_bits[at] != want_bits[at]).collect();
    if let Some(&first) = differing.first() {
        let mut rest = first;
        let mut index = vec![0; got.rank()];
        for (axis, &len) in got.dims().iter().enumerate().rev() {
            index[axis] = rest % len;
            rest /= len;
        }
        bail!(
            "{name}: bits {:#x} against {:#x} at {index:?} of {:?}; {} of {} elements differ\n{what}",
            got_bits[first],
            want_bits[first],
            got.dims(),
            differing.len(),
            got_bits.len(),
        );
    }
    Ok(())
}

/// The same bits in each tensor of two outputs.
pub fn same_outputs(got: &Output, want: &Output, what: &impl Display) -> Result<()> {
    let pairs = got.named().into_iter().zip(want.named());
    pairs.into_iter().try_for_each(|((name, got), (_, want))| same_rows(name, &got.values, &want.values, what))
}

/// The same bits in the same order.
pub fn same_rows(name: &str, got: &[f64], want: &[f64], what: &impl Display) -> Result<()> {
    ensure!(got.len() == want.len(), "{name} has {} elements, not {}\n{what}", got.len(), want.len());
    let differ = got.iter().zip(want).filter(|(got, want)| got.to_bits() != want.to_bits()).count();
    ensure!(differ == 0, "{differ} of {} elements of {name} differ\n{what}", got.len());
    Ok(())
}

/// `x` as `dtype` stores it.
pub fn round_to(dtype: DType, x: f64) -> f64 {
    match dtype {
        DType::F64 => x,
        DType::F32 => x as f32 as f64,
        DType::F16 => f16::from_f64(x).to_f64(),
        DType::BF16 => bf16::from_f64(x).to_f64(),
        other => panic!("no rounding to {other:?}"),
    }
}

fn bits(tensor: &Tensor) -> Result<Vec<u64>> {
    let flat = tensor.flatten_all()?;
    Ok(match tensor.dtype() {
        DType::F64 => flat.to_vec1::<f64>()?.into_iter().map(f64::to_bits).collect(),
        DType::F32 => flat.to_vec1::<f32>()?.into_iter().map(|x| x.to_bits().into()).collect(),
        DType::F16 => flat.to_vec1::<f16>()?.into_iter().map(|x| x.to_bits().into()).collect(),
        DType::BF16 => flat.to_vec1::<bf16>()?.into_iter().map(|x| x.to_bits().into()).collect(),
        other => bail!("no bits of {other:?}"),
    })
}

/// Where element `at` lies: sequence, position in it, head, and dimension unless a row is one number.
fn coordinates(rows: &Rows, at: usize) -> String {
    let (batch, row, head) = place(rows, at / rows.width);
    let mut text = format!("[batch {batch}, row {row}, head {head}");
    if rows.width > 1 {
        write!(text, ", dim {}", at % rows.width).expect("writing to a String");
    }
    text + "]"
}

/// How many elements are wrong, and from which row on.
fn extent(rows: &Rows, wrong: &[usize]) -> String {
    let first = wrong.iter().map(|&at| place(rows, at / rows.width).1).min().unwrap_or(0);
    format!("{} of {} elements over, all in rows >= {first}", wrong.len(), rows.values.len())
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
    panic!("row {row} lies behind the last sequence");
}

/// Four significant digits, in powers of ten only where a reader would want them.
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
    use crate::common::cases::cpu;

    /// Two sequences of 2 and 3 tokens, two heads of 4: `value` everywhere.
    fn rows(value: f64) -> Rows {
        Rows { lengths: vec![2, 3], heads: 2, width: 4, values: vec![value; 40], ..Rows::default() }
    }

    fn case() -> Case {
        Case::new(&cpu(DType::F32)).packed(&[(2, 2), (3, 3)]).head_dim(4)
    }

    fn limits(limit: f64) -> Tolerance {
        Tolerance { limits: vec![limit; 10] }
    }

    fn text(got: &Rows, want: &Rows, tolerance: &Tolerance) -> String {
        close("o", got, want, tolerance, &case()).expect_err("these differ").to_string()
    }

    #[test]
    fn names_the_worst_element_and_where_it_lies() -> Result<()> {
        let (mut got, want) = (rows(0.4062), rows(0.4062));
        close("o", &got, &want, &limits(0.0), &case())?;
        // Token 3 is row 1 of the second sequence.
        got.values[(3 * 2 + 1) * 4 + 2] += 0.0079;
        got.values[39] += 0.002;
        assert_eq!(
            text(&got, &want, &limits(1e-3)),
            "o differs from the reference: |0.4141 - 0.4062| = 7.9e-3 at [batch 1, row 1, head 1, dim 2], limit 1.0e-3\n\
             case cpu f32 d4 full, packed, heads 2/2, seqlens [2/2 3/3]; 2 of 40 elements over, all in rows >= 1"
        );
        // Worst is what is furthest over the limit of its own row.
        let mut tolerance = limits(1e-3);
        tolerance.limits[7] = 5e-3;
        tolerance.limits[9] = 1e-4;
        assert!(text(&got, &want, &tolerance).contains("at [batch 1, row 2, head 1, dim 3], limit 1.0e-4"));
        close("o", &got, &want, &limits(1e-2), &case())
    }

    #[test]
    fn infinities_and_nan_must_be_in_place_before_numbers_count() -> Result<()> {
        let (mut got, mut want) = (rows(1.0), rows(1.0));
        want.values[5] = f64::NAN;
        want.values[6] = f64::INFINITY;
        got.values[39] = 2.0;
        assert_eq!(
            text(&got, &want, &limits(1e-3)),
            "o differs from the reference: 1 where NaN belongs, at [batch 0, row 0, head 1, dim 1]\n\
             case cpu f32 d4 full, packed, heads 2/2, seqlens [2/2 3/3]; 2 of 40 elements over, all in rows >= 0"
        );
        got.values[5] = f64::NAN;
        got.values[6] = f64::NEG_INFINITY;
        assert!(text(&got, &want, &limits(1e9)).contains("-inf where inf belongs"));
        got.values[6] = f64::INFINITY;
        assert!(text(&got, &want, &limits(1e-3)).contains("|2.000 - 1.000|"));
        got.values[39] = 1.0;
        close("o", &got, &want, &limits(0.0), &case())?;
        // NaN where a number belongs is no small difference.
        got.values[0] = f64::NAN;
        assert!(text(&got, &want, &limits(f64::INFINITY)).contains("NaN where 1 belongs"));
        Ok(())
    }

    /// The reference does not round, so what the type cannot hold is infinite there.
    #[test]
    fn numbers_past_the_type_are_infinite() -> Result<()> {
        let case = Case { dtype: DType::F16, ..case() };
        let (got, want) = (rows(f64::INFINITY), rows(70000.0));
        close("o", &got, &want, &limits(0.0), &case)?;
        assert!(close("o", &rows(65504.0), &want, &limits(1e9), &case).is_err());
        Ok(())
    }

    #[test]
    fn bits_are_bits() -> Result<()> {
        let device = candle_core::Device::Cpu;
        let zero = Tensor::new(&[[0f32, 0.0], [0.0, 0.0]], &device)?;
        let minus = Tensor::new(&[[0f32, 0.0], [0.0, -0.0]], &device)?;
        same_bits("o", &zero, &zero, &"same")?;
        let error = same_bits("o", &minus, &zero, &"case").expect_err("the sign differs");
        assert_eq!(
            error.to_string(),
            "o: bits 0x80000000 against 0x0 at [1, 1] of [2, 2]; 1 of 4 elements differ\ncase"
        );
        assert!(same_bits("o", &zero, &zero.flatten_all()?, &"shape").is_err());
        assert!(same_bits("o", &zero, &zero.to_dtype(DType::F16)?, &"type").is_err());
        Ok(())
    }
}
