//! Merging attention over parts of the keys: compared with the formulas in f64, and with the reference over all keys.

use crate::common::cases::{accumulator, in_layout, targets, window, Case, Lengths};
use crate::common::compare;
use crate::common::reference;
use crate::common::run::{values, Call};
use anyhow::{ensure, Context, Result};
use attention_reference::draw;
use candle_core::{DType, Device, Tensor, Var};
use candle_fa2::TensorLayout::{self, Bhsd, Bshd};
use candle_fa2::{Attention, CuSeqlens, Mask};
use rand::Rng;

/// o and lse of one row, or their gradients.
type Pair = (Vec<f64>, f64);

/// One row of each part, with the gradients of the merged o and lse.
struct Row {
    parts: Vec<Pair>,
    do_: Vec<f64>,
    dlse: f64,
}

/// The expected merge of `row`: o, lse, and the gradients of the o and lse of each part.
fn merged(row: &Row) -> (Vec<f64>, f64, Vec<Pair>) {
    let max = row.parts.iter().map(|part| part.1).fold(f64::NEG_INFINITY, f64::max);
    let none = vec![0.0; row.do_.len()];
    if max == f64::NEG_INFINITY {
        return (none.clone(), max, row.parts.iter().map(|_| (none.clone(), 0.0)).collect());
    }
    let lse = max + row.parts.iter().map(|part| (part.1 - max).exp()).sum::<f64>().ln();
    let mut o = none;
    for (part, lse_of_part) in &row.parts {
        o.iter_mut().zip(part).for_each(|(o, x)| *o += (lse_of_part - lse).exp() * x);
    }
    let grads = row.parts.iter().map(|(part, lse_of_part)| {
        let weight = (lse_of_part - lse).exp();
        let along: f64 = row.do_.iter().zip(part.iter().zip(&o)).map(|(d, (x, o))| d * (x - o)).sum();
        (row.do_.iter().map(|d| weight * d).collect(), weight * (row.dlse + along))
    });
    let grads = grads.collect();
    (o, lse, grads)
}

/// Random parts in every layout. Some rows have no keys in some parts, or in all parts.
#[test]
fn values_and_gradients_match_the_formulas() -> Result<()> {
    const WIDTH: usize = 5;
    let mut rng = draw::generator("merge");
    for (tokens, heads, batch) in [(4, 3, Some(2)), (6, 2, None)] {
        for layout in [Bshd, Bhsd] {
            for (dtype, limit) in [(DType::F64, 1e-13), (DType::F32, 1e-5)] {
                for count in [1, 2, 5] {
                    let rows: Vec<Row> = (0..batch.unwrap_or(1) * tokens * heads)
                        .map(|at| {
                            let mut numbers = |len: usize| (0..len).map(|_| rng.random_range(-2.0..2.0)).collect();
                            let (do_, dlse): (Vec<f64>, Vec<f64>) = (numbers(WIDTH), numbers(1));
                            let parts = (0..count).map(|part| {
                                let mut numbers = |len: usize| (0..len).map(|_| rng.random_range(-2.0..2.0)).collect();
                                let (o, lse): (Vec<f64>, Vec<f64>) = (numbers(WIDTH), numbers(1));
                                match at % 4 == 0 || (at % 4 == 1 && part != at % count) {
                                    true => (vec![0.0; WIDTH], f64::NEG_INFINITY),
                                    // A large range of lse, as from large scores.
                                    false => (o, lse[0] * if at % 4 == 2 { 300.0 } else { 1.0 }),
                                }
                            });
                            Row { parts: parts.collect(), do_, dlse: dlse[0] }
                        })
                        .collect();
                    check_rows(&rows, (batch, tokens, heads), layout, dtype, limit)?;
                }
            }
        }
    }
    Ok(())
}

/// Merges `rows`, which are ordered by token, then by head.
fn check_rows(
    rows: &[Row],
    (batch, tokens, heads): (Option<usize>, usize, usize),
    layout: TensorLayout,
    dtype: DType,
    limit: f64,
) -> Result<()> {
    let shape =
        |width: Option<usize>| -> Vec<usize> { batch.into_iter().chain([tokens, heads]).chain(width).collect() };
    let o_tensor = |row_of: &dyn Fn(&Row) -> Vec<f64>| -> Result<Tensor> {
        let values: Vec<f64> = rows.iter().flat_map(row_of).collect();
        let width = values.len() / rows.len();
        in_layout(&Tensor::from_vec(values, shape(Some(width)), &Device::Cpu)?.to_dtype(dtype)?, layout)
    };
    let lse_tensor = |of: &dyn Fn(&Row) -> f64| -> Result<Tensor> {
        let values: Vec<f64> = rows.iter().map(of).collect();
        let lse = Tensor::from_vec(values, shape(None), &Device::Cpu)?.to_dtype(dtype)?;
        Ok(lse.transpose(lse.rank() - 2, lse.rank() - 1)?.contiguous()?)
    };
    let mut vars = Vec::new();
    for part in 0..rows[0].parts.len() {
        let o = Var::from_tensor(&o_tensor(&|row| row.parts[part].0.clone())?)?;
        vars.push((o, Var::from_tensor(&lse_tensor(&|row| row.parts[part].1)?)?));
    }
    let parts: Vec<(Tensor, Tensor)> =
        vars.iter().map(|(o, lse)| (o.as_tensor().clone(), lse.as_tensor().clone())).collect();
    let (o, lse) = Attention::new().layout(layout).merge(&parts)?;
    ensure!(o.dtype() == dtype && lse.dtype() == dtype, "{o:?}, {lse:?}");
    let of_o = (&o * o_tensor(&|row| row.do_.clone())?)?.sum_all()?;
    let of_lse = (finite(&lse)? * lse_tensor(&|row| row.dlse)?)?.sum_all()?;
    let grads = (of_o + of_lse)?.backward()?;

    let answers: Vec<_> = rows.iter().map(merged).collect();
    let close = |name: &str, got: &Tensor, want: Vec<f64>| -> Result<()> {
        let got = values(got)?;
        ensure!(got.len() == want.len(), "{name} has {} elements instead of {}", got.len(), want.len());
        for (at, (got, want)) in got.iter().zip(&want).enumerate() {
            let same = got == want || (got - want).abs() <= limit * want.abs().max(1.0);
            ensure!(same, "{name} at {at}: {got} instead of {want}, {layout:?} {dtype:?} {} parts", vars.len());
        }
        Ok(())
    };
    let token_major = |lse: &Tensor| lse.transpose(lse.rank() - 2, lse.rank() - 1);
    close("o", &in_layout(&o, layout)?, answers.iter().flat_map(|answer| answer.0.clone()).collect())?;
    close("lse", &token_major(&lse)?, answers.iter().map(|answer| answer.1).collect())?;
    for (part, (o, lse)) in vars.iter().enumerate() {
        let grad = |var: &Var| grads.get(var).context("no gradient").cloned();
        let want = answers.iter().flat_map(|answer| answer.2[part].0.clone()).collect();
        close("do of a part", &in_layout(&grad(o)?, layout)?, want)?;
        close("dlse of a part", &token_major(&grad(lse)?)?, answers.iter().map(|answer| answer.2[part].1).collect())?;
    }
    Ok(())
}

/// A part without keys, first or last, changes no bit of the other part.
#[test]
fn an_empty_part_changes_no_bit() -> Result<()> {
    for target in targets() {
        let case = Case::new(&target).batch(2, 7, 9).heads(4, 2);
        let input = case.draw();
        let Call { attention, q, k, v } = case.call(&input)?;
        let part = attention.forward_partial(&q, &k, &v)?;
        let empty = (part.0.zeros_like()?, (part.1.zeros_like()? + f64::NEG_INFINITY)?);
        for parts in [[part.clone(), empty.clone()], [empty.clone(), part.clone()]] {
            let (o, lse) = attention.merge(&parts)?;
            compare::same_bits("o", &o, &part.0, &case)?;
            compare::same_bits("lse", &lse, &part.1, &case)?;
        }
        let (o, lse) = attention.merge(&[empty.clone(), empty.clone()])?;
        compare::same_bits("o without keys", &o, &empty.0, &case)?;
        compare::same_bits("lse without keys", &lse, &empty.1, &case)?;
    }
    Ok(())
}

/// If all scores of a part are minus infinity, its o is NaN and its lse is minus infinity. Such a part does not change the
/// other parts.
#[test]
fn a_part_of_infinite_scores_changes_nothing() -> Result<()> {
    for target in targets() {
        let case = Case::new(&target).batch(1, 3, 4).heads(2, 2);
        let input = case.draw();
        let Call { attention, q, k, v } = case.call(&input)?;
        let part = attention.forward_partial(&q, &k, &v)?;
        let infinite = Var::from_tensor(&(part.0.zeros_like()? + f64::NAN)?)?;
        let none = Var::from_tensor(&(part.1.zeros_like()? + f64::NEG_INFINITY)?)?;
        let parts = [part.clone(), (infinite.as_tensor().clone(), none.as_tensor().clone())];
        let (o, lse) = attention.merge(&parts)?;
        compare::same_bits("o", &o, &part.0, &case)?;
        compare::same_bits("lse", &lse, &part.1, &case)?;
        let grads = (o.sum_all()? + lse.sum_all()?)?.backward()?;
        for (name, var) in [("o", &infinite), ("lse", &none), ("q", &q), ("k", &k), ("v", &v)] {
            let grad = values(grads.get(var).context("no gradient")?)?;
            ensure!(grad.iter().all(|x| x.is_finite()), "gradient of {name}: {grad:?}\ncase {case}");
        }
        // A row of NaN stays NaN.
        let nan = (part.0.clone(), (part.1.clone() + f64::NAN)?);
        let (o, lse) = attention.merge(&[nan.clone(), (nan.0.clone(), none.as_tensor().clone())])?;
        for x in [o, lse] {
            let x = values(&x)?;
            ensure!(x.iter().all(|x| x.is_nan()), "{x:?}\ncase {case}");
        }
    }
    Ok(())
}

/// A process without queries, possible in ring attention, merges empty tensors.
#[test]
fn parts_without_rows() -> Result<()> {
    let q = Tensor::zeros((0, 2, 8), DType::BF16, &Device::Cpu)?;
    let lengths = CuSeqlens::from_lengths(&[0, 0], &Device::Cpu)?;
    let part = Attention::new().forward_packed_partial(&q, &q, &q, &lengths, &lengths)?;
    let (o, lse) = Attention::new().merge(&[part.clone(), part])?;
    assert_eq!((o.dims(), lse.dims()), (&[0, 2, 8][..], &[2, 0][..]));
    assert_eq!((o.dtype(), lse.dtype()), (DType::F32, DType::F32));
    Ok(())
}

/// The o of a part, rounded to the type of q, is the o of `forward`.
#[test]
fn a_part_is_not_rounded() -> Result<()> {
    for target in targets() {
        for case in [
            Case::new(&target).batch(2, 70, 90).heads(4, 2).head_dim(64).mask(Mask::Causal),
            Case::new(&target).batch(1, 7, 9).head_dim(40).softcap(2.0).layouts(Bhsd, Bhsd),
            Case::new(&target).packed(&[(30, 40), (0, 3), (5, 2)]).head_dim(96),
            Case::new(&target).packed(&[(30, 40), (0, 3), (5, 2)]).head_dim(40).head_dim_v(24),
        ] {
            let input = case.draw();
            let Call { attention, q, k, v } = case.call(&input)?;
            let (o, _) = match case.lengths {
                Lengths::Padded { .. } => attention.forward_partial(&q, &k, &v)?,
                Lengths::Packed(_) => {
                    let (cu_seqlens_q, cu_seqlens_k) = case.cu_seqlens()?;
                    attention.forward_packed_partial(&q, &k, &v, &cu_seqlens_q, &cu_seqlens_k)?
                }
            };
            assert_eq!(o.dtype(), accumulator(case.dtype), "{case}");
            let rounded = o.to_dtype(case.dtype)?;
            compare::same_bits("o, rounded", &rounded, &case.forward(&attention, &q, &k, &v)?, &case)?;
            if matches!(case.dtype, DType::F16 | DType::BF16) {
                let differ = o.ne(&rounded.to_dtype(o.dtype())?)?.to_dtype(DType::F32)?.mean_all()?;
                assert!(differ.to_scalar::<f32>()? > 0.8, "{case}: o is rounded already");
            }
        }
    }
    Ok(())
}

/// The keys are split into parts. With these masks, some rows have no key in some parts. The merged values and gradients equal
/// those over all keys.
#[test]
fn parts_of_the_keys_make_the_whole() -> Result<()> {
    for target in targets() {
        let case = || Case::new(&target).heads(4, 2).head_dim(32).dlse();
        for (case, cuts) in [
            (case().batch(2, 12, 20), &[7, 8][..]),
            (case().batch(2, 12, 20).mask(Mask::Causal), &[5, 11, 17]),
            (case().batch(1, 30, 30).mask(Mask::Causal), &[10, 20]),
            (case().batch(1, 30, 30).mask(window(14, 3)).layouts(Bhsd, Bshd), &[18, 24]),
            (case().batch(1, 150, 300).heads(1, 1).mask(Mask::Causal), &[128]),
            (case().batch(1, 9, 4).mask(Mask::Causal), &[1, 2, 3]), // some rows see no key
            (case().batch(2, 12, 20).head_dim_v(24).mask(Mask::Causal), &[5, 11, 17]),
        ] {
            check_parts(&case, cuts)?;
        }
    }
    Ok(())
}

fn check_parts(case: &Case, cuts: &[usize]) -> Result<()> {
    let input = case.draw();
    let Call { attention, q, k, v } = case.call(&input)?;
    let &Lengths::Padded { seqlen_k, .. } = &case.lengths else { unreachable!("the cases are padded") };
    let keys_axis = if case.layouts.0 == Bshd { 1 } else { 2 };
    let ends = cuts.iter().copied().chain([seqlen_k]);
    let mut parts = Vec::new();
    for (start, end) in [0].into_iter().chain(cuts.iter().copied()).zip(ends) {
        // The mask aligns the last query with the last key of the part. That is `seqlen_k - end` keys before the last key of all.
        let after = seqlen_k - end;
        let mask = match case.mask {
            Mask::None => Mask::None,
            Mask::Causal => window(None, after),
            Mask::Window { left: Some(left), right: Some(right) } => window(left - after, right + after),
            mask => unreachable!("no case has {mask:?}"),
        };
        let part = |x: &Var| x.narrow(keys_axis, start, end - start);
        parts.push(attention.clone().mask(mask).forward_partial(&q, &part(&k)?, &part(&v)?)?);
    }
    let (o, lse) = attention.merge(&parts)?;
    let o = o.to_dtype(case.dtype)?;
    let grads = case.loss(&input, &o, &finite(&lse)?)?.backward()?;
    let grad = |var: &Var| grads.get(var).context("no gradient");
    let got = reference::Output {
        o: case.output_rows(&o)?,
        lse: case.lse_rows(&lse)?,
        dq: case.input_rows(grad(&q)?, true)?,
        dk: case.input_rows(grad(&k)?, false)?,
        dv: case.input_rows(grad(&v)?, false)?,
    };
    let want = reference::attention(&input);
    for (((name, got), (_, want)), tolerance) in
        got.named().into_iter().zip(want.named()).zip(reference::tolerances(&input, &want))
    {
        // The tolerance grows, because each part rounds its gradients and the gradient of its o.
        compare::close(name, got, want, &tolerance.doubled().doubled(), case)?;
    }
    Ok(())
}

/// lse with 0 in rows that see no key. Their lse is -inf, and its product with a gradient of 0 would be NaN.
fn finite(lse: &Tensor) -> Result<Tensor> {
    Ok(lse.ge(f64::MIN)?.where_cond(lse, &lse.zeros_like()?)?)
}
