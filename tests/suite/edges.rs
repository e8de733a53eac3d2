//! Sizes and values where implementations often fail: no visible key, one token, no token, scores that overflow, and
//! non-finite values.

use crate::common::cases::{precision, targets, window, Alibi, Case, Target};
use crate::common::compare;
use crate::common::nonfinite::Nonfinite;
use crate::common::reference::attention::visible;
use crate::common::reference::{Input, Precision, Rows};
use anyhow::{ensure, Result};
use candle_core::{DType, Device, Tensor, Var};
use candle_fa2::testing::{Arch, Pass};
use candle_fa2::{Attention, Mask};

/// No query, no key, one query, one key, no sequence. The result has the right shape; rows without keys have o = 0 and
/// lse = -inf.
#[test]
fn empty_and_single_sizes() -> Result<()> {
    for target in targets() {
        for mask in [Mask::None, Mask::Causal, window(2, 1), window(0, 0)] {
            for (seqlen_q, seqlen_k) in [(0, 0), (0, 5), (5, 0), (1, 0), (0, 1), (1, 1), (1, 300), (300, 1), (2, 1)] {
                for batch in [0, 1, 2] {
                    let case = Case::new(&target).batch(batch, seqlen_q, seqlen_k).heads(4, 2).head_dim(8).mask(mask);
                    if case.fits() {
                        case.check()?;
                        case.clone().head_dim_v(5).dlse().alibi(Alibi::PerHead).softcap(3.0).check()?;
                    }
                    let headless = case.heads(0, 2);
                    if headless.fits() {
                        headless.check()?;
                    }
                }
            }
        }
    }
    Ok(())
}

/// With more queries than keys, the first rows of a causal mask see no key. They fill a part of a tile, or whole tiles.
#[test]
fn rows_that_see_no_key() -> Result<()> {
    for target in targets() {
        let case = || Case::new(&target).heads(2, 1).head_dim(8);
        for case in [
            case().batch(1, 300, 40).mask(Mask::Causal),
            case().batch(2, 290, 3).mask(window(1, 0)),
            case().batch(1, 9, 300).mask(window(None, 0)),
            case().batch(1, 20, 8).mask(Mask::Causal).dlse(),
            case().packed(&[(140, 3), (4, 0), (6, 6)]).mask(Mask::Causal).dlse(),
            case().batch(1, 20, 8).head_dim_v(5).mask(Mask::Causal),
        ] {
            let input = case.draw();
            let got = case.run(&input)?;
            case.check_output(&input, &got)?;
            // Exactly 0, not approximately.
            let lengths = input.lengths.iter().flat_map(|&pair| (0..pair.0).map(move |row| (pair, row)));
            for (token, (pair, row)) in lengths.enumerate() {
                if (0..pair.1).any(|col| visible(pair, input.window, row, col)) {
                    continue;
                }
                let first = token * case.num_heads;
                let zeros = |rows: &Rows| {
                    rows.values[first * rows.width..][..case.num_heads * rows.width].iter().all(|&x| x == 0.0)
                };
                let lse = &got.lse.values[first..][..case.num_heads];
                ensure!(zeros(&got.o) && zeros(&got.dq), "token {token} sees no key, but is not 0\ncase {case}");
                ensure!(lse.iter().all(|&x| x == f64::NEG_INFINITY), "lse of token {token} is {lse:?}\ncase {case}");
            }
        }
    }
    Ok(())
}

/// Scores in the thousands. Their exp overflows in every type, and they themselves overflow in f16. Also scores far below 0,
/// whose exp underflows.
#[test]
fn scores_that_overflow_exp() -> Result<()> {
    for target in targets() {
        for gain in [30.0, 1000.0] {
            for mask in [Mask::None, Mask::Causal] {
                let case = Case::new(&target).batch(1, 40, 150).mask(mask).dlse();
                let mut input = case.draw();
                scaled(&mut input, gain);
                case.check_on(&input)?;
            }
        }
        // All scores of a row are near -100,000. Without subtracting row_max, every exp would be 0.
        let case = Case::new(&target).batch(1, 20, 20).softmax_scale(100.0);
        let mut input = case.draw();
        input.q.fill(precision(target.dtype).round(8.0));
        for x in &mut input.k {
            *x = precision(target.dtype).round(-8.0 - x.abs() / 64.0);
        }
        case.check_on(&input)?;
        // A softcap limits every score.
        let case = Case::new(&target).batch(1, 20, 20).softcap(5.0);
        let mut input = case.draw();
        scaled(&mut input, 1000.0);
        case.check_on(&input)?;
    }
    Ok(())
}

/// The lse of a large score has a large rounding error, but P has none. With one visible key, o is exactly v, and dv is
/// exactly the sum of do.
#[test]
fn one_key_of_any_score() -> Result<()> {
    let device = Device::Cpu;
    for (dtype, gains) in [(DType::F32, &[1e4, 1e7, 1e8, 1e20, 1e30][..]), (DType::F64, &[1e7, 1e18, 1e150])] {
        for &gain in gains {
            // Shapes for each kind of product: vectors, small matrices, whole tiles.
            for (seqlen_q, head_dim) in [(2, 2), (1, 64), (129, 64)] {
                let var = |seqlen: usize, value: f64| -> Result<Var> {
                    let x = Tensor::full(value, (1, seqlen, 1, head_dim), &device)?.to_dtype(dtype)?;
                    Ok(Var::from_tensor(&x)?)
                };
                let (q, k, v) = (var(seqlen_q, gain)?, var(1, 0.7)?, var(1, 3.0)?);
                let o = Attention::new().forward(&q, &k, &v)?;
                let grads = o.sum_all()?.backward()?;
                let all = |x: &Tensor| -> Result<Vec<f64>> { Ok(x.to_dtype(DType::F64)?.flatten_all()?.to_vec1()?) };
                let dv = grads.get(&v).ok_or_else(|| anyhow::anyhow!("v has no gradient"))?;
                ensure!(all(&o)?.iter().all(|&x| x == 3.0), "{dtype:?} gain {gain:e}: o is {:?}", all(&o)?);
                ensure!(
                    all(dv)?.iter().all(|&x| x == seqlen_q as f64),
                    "{dtype:?} gain {gain:e}: dv is {:?}",
                    all(dv)?
                );
            }
        }
    }
    Ok(())
}

/// Scores with a large range, so that most keys have almost no weight. The error of the backward is at most that of a plain
/// softmax in the same type.
#[test]
fn gradients_at_wide_scores() -> Result<()> {
    for target in targets().into_iter().filter(|target| matches!(target.dtype, DType::F32 | DType::F64)) {
        for gain in [300.0, 3e4, 3e6] {
            for seqlen in [129, 300] {
                let case = Case::new(&target).batch(1, seqlen, seqlen).head_dim(64).mask(Mask::Causal);
                let mut input = case.draw();
                scaled(&mut input, gain);
                case.check_on(&input)?;
            }
        }
    }
    Ok(())
}

/// Multiplies q by `gain` and rounds it to the type again.
fn scaled(input: &mut Input, gain: f64) {
    input.q.iter_mut().for_each(|x| *x = input.precision.round(*x * gain));
}

/// Scores that grow or fall along the keys. So row_max changes in every tile, or in none after the first.
#[test]
fn scores_that_rise_and_fall_along_the_keys() -> Result<()> {
    for target in targets() {
        for direction in [1.0, -1.0] {
            let case = Case::new(&target).batch(1, 5, 600).heads(1, 1).head_dim(4).softmax_scale(direction);
            let mut input = case.draw();
            input.q.fill(1.0);
            for (at, x) in input.k.iter_mut().enumerate() {
                *x = precision(target.dtype).round((at / case.head_dim) as f64 / 16.0);
            }
            case.check_on(&input)?;
        }
    }
    Ok(())
}

/// With a scale of 0 all weights are equal, and the gradients of q and k are 0.
#[test]
fn scale_of_zero() -> Result<()> {
    for target in targets() {
        Case::new(&target).batch(1, 9, 140).softmax_scale(0.0).mask(Mask::Causal).dlse().check()?;
    }
    Ok(())
}

/// ALiBi slopes of 0 and below 0: there is no bias, or it grows with the distance.
#[test]
fn slopes_of_any_sign() -> Result<()> {
    for target in targets() {
        for slope in [0.0, -0.25, 4.0] {
            let case = Case::new(&target).batch(1, 30, 150).alibi(Alibi::PerHead).mask(window(None, 3));
            let mut input = case.draw();
            input.alibi_slopes = Some(vec![slope; case.num_heads]);
            case.check_on(&input)?;
        }
    }
    Ok(())
}

/// With equal scores and equal values, o is exactly v, for any number of keys.
#[test]
fn one_key_repeated() -> Result<()> {
    for target in targets() {
        let case = Case::new(&target).batch(1, 3, 130).heads(1, 1).head_dim(8);
        let mut input = case.draw();
        for tensor in [&mut input.k, &mut input.v] {
            let first = tensor[..8].to_vec();
            tensor.chunks_mut(8).for_each(|row| row.copy_from_slice(&first));
        }
        case.check_on(&input)?;
    }
    Ok(())
}

/// Non-finite values. Each replaces one element of an input.
const NONFINITE: [f64; 3] = [f64::NAN, f64::INFINITY, f64::NEG_INFINITY];

/// Accesses the elements of one tensor of an input.
type Values = fn(&mut Input) -> &mut Vec<f64>;

/// The tensors in which an element is replaced.
const TENSORS: [(&str, Values); 5] =
    [("q", |i| &mut i.q), ("k", |i| &mut i.k), ("v", |i| &mut i.v), ("do", |i| &mut i.do_), ("dlse", |i| &mut i.dlse)];

fn masks_and_lengths(target: &Target) -> Vec<Case> {
    let case = || Case::new(target).heads(2, 1).head_dim(8);
    vec![
        case().batch(1, 6, 6),
        case().batch(1, 12, 12).mask(Mask::Causal),
        case().batch(1, 9, 14).mask(window(2, 1)),
        case().batch(1, 140, 290).mask(Mask::Causal),
        case().batch(1, 7, 7).mask(Mask::Causal).softcap(2.0),
        case().batch(1, 8, 8).mask(Mask::Causal).alibi(Alibi::PerHead).dlse(),
        case().packed(&[(5, 8), (7, 7)]).mask(Mask::Causal),
        case().batch(1, 7, 9).head_dim_v(3).mask(Mask::Causal).dlse(),
    ]
}

/// One NaN or infinity in q, k, v, do or dlse. The results are non-finite exactly where the reference is, and every other
/// element is right. Gradients on a GPU may have more NaN; see `Nonfinite`.
#[test]
fn one_value_that_is_not_a_number() -> Result<()> {
    for target in targets() {
        for case in masks_and_lengths(&target) {
            for (name, tensor) in TENSORS.into_iter().filter(|(name, _)| case.dlse || *name != "dlse") {
                for nonfinite in NONFINITE {
                    for part in [0, 1, 2, 3] {
                        let mut input = case.draw();
                        let values = tensor(&mut input);
                        let at = part * (values.len() - 1) / 3;
                        values[at] = nonfinite;
                        case.check_on(&input).map_err(|error| error.context(format!("{nonfinite} in {name}[{at}]")))?;
                    }
                }
            }
        }
    }
    Ok(())
}

/// Keys that no query sees may hold any values.
#[test]
fn hidden_keys_do_not_leak() -> Result<()> {
    for target in targets() {
        for nonfinite in NONFINITE {
            // The window ends before the last keys and begins after the first.
            for (mask, lengths, hidden) in
                [(window(2, 0), (4, 200), 0..150), (window(0, 0), (3, 9), 0..6), (window(5, 2), (140, 300), 0..120)]
            {
                let case = Case::new(&target).batch(1, lengths.0, lengths.1).heads(1, 1).head_dim(8).mask(mask);
                let clean = case.draw();
                let mut input = clean.clone();
                for col in hidden {
                    input.k[col * 8..][..8].fill(nonfinite);
                    input.v[col * 8..][..8].fill(nonfinite);
                }
                let got = case.run(&input)?;
                case.check_hidden(&clean, &input, &got)
                    .map_err(|error| error.context(format!("hidden keys of {nonfinite}")))?;
            }
        }
    }
    Ok(())
}

/// A key whose score is -inf has a weight of exactly 0, so its infinite value gives NaN. A weight that underflows keeps the infinity.
#[test]
fn infinite_values_under_small_weights() -> Result<()> {
    for target in targets().into_iter().filter(|target| !target.device.is_cpu() || target.dtype == DType::F64) {
        for score in [f64::NEG_INFINITY, -40.0] {
            let case = Case::new(&target).batch(1, 3, 9).heads(1, 1).head_dim(8).softmax_scale(1.0);
            let mut input = case.draw();
            input.q.fill(1.0);
            // q k is 8 times this number. exp(-320) is 0 in f32, but not in f64.
            input.k[4 * 8..][..8].fill(score);
            input.v[4 * 8..][..8].fill(f64::INFINITY);
            case.check_on(&input).map_err(|error| error.context(format!("scores of {score}")))?;
        }
    }
    Ok(())
}

/// A non-finite value in one sequence and one group of heads. All rows of other sequences and groups keep their bits, in o, lse
/// and all gradients.
///
/// On a GPU with the forward of sm80. The packed forward of sm90 loads whole tiles, so the last tiles of a sequence may have rows of q
/// and of v of the next one. If these are not finite, the sequence computes its rows again from its own queries and keys. They are
/// right, but with other roundings.
#[test]
fn other_sequences_and_heads_keep_their_bits() -> Result<()> {
    for target in targets() {
        for head_dim in [8, 64, 128, 256] {
            let case = || Case { deterministic: true, ..Case::new(&target).heads(4, 2).head_dim(head_dim) };
            for case in [
                case().packed(&[(9, 40), (70, 130), (33, 7)]).mask(Mask::Causal),
                case().batch(3, 37, 50).head_dim_v(24).mask(window(9, 4)).dlse(),
            ] {
                let run = |input: &Input| match case.device.is_cpu() {
                    true => case.run(input),
                    false => {
                        Ok(case.run_with(input, |kernel| kernel.pass == Pass::Backward || kernel.arch == Arch::Sm80)?.1)
                    }
                };
                let clean = case.draw();
                let want = run(&clean)?;
                for (name, tensor) in TENSORS.into_iter().filter(|(name, _)| case.dlse || *name != "dlse") {
                    let mut input = clean.clone();
                    let values = tensor(&mut input);
                    let at = values.len() / 2;
                    values[at] = if name == "k" { f64::INFINITY } else { f64::NAN };
                    let nonfinite = Nonfinite::of(&input);
                    let got = run(&input)?;
                    case.check_output(&input, &got)?;
                    for ((output, got), (_, want)) in got.named().into_iter().zip(want.named()) {
                        let reached = nonfinite.reaches(got);
                        ensure!(reached.contains(&true) && reached.contains(&false), "{name} reaches all of {output}");
                        let others = |rows: &Rows| -> Vec<f64> {
                            let kept = rows.values.chunks(rows.width).zip(&reached).filter(|(_, reached)| !**reached);
                            kept.flat_map(|(row, _)| row.to_vec()).collect()
                        };
                        let what = format!("with {name}[{at}] not finite\ncase {case}");
                        compare::same_rows(output, &others(got), &others(want), &what)?;
                    }
                }
            }
        }
    }
    Ok(())
}

/// Whole rows of a non-finite value. A query of NaN makes its own row NaN, and the gradients of the keys that it sees. A key
/// of -inf has the effect of a hidden key.
#[test]
fn rows_that_are_not_numbers() -> Result<()> {
    for target in targets() {
        for case in masks_and_lengths(&target) {
            for (name, tensor) in TENSORS.into_iter().filter(|(name, _)| case.dlse || *name != "dlse") {
                for nonfinite in NONFINITE {
                    let mut input = case.draw();
                    let width = match name {
                        "q" | "k" => case.head_dim,
                        "v" | "do" => case.head_dim_v,
                        _ => 1,
                    };
                    let values = tensor(&mut input);
                    let row = values.len() / width / 2;
                    values[row * width..][..width].fill(nonfinite);
                    case.check_on(&input)
                        .map_err(|error| error.context(format!("{nonfinite} in row {row} of {name}")))?;
                }
            }
        }
    }
    Ok(())
}

/// All visible scores of a query are -inf: o is NaN, and lse is -inf.
#[test]
fn visible_scores_of_minus_infinity() -> Result<()> {
    for target in targets() {
        let case = Case::new(&target).batch(1, 4, 4).heads(1, 1).head_dim(2).mask(Mask::Causal);
        let mut input = case.draw();
        input.q.fill(1.0);
        // The first two keys have scores of -inf. The third and fourth query also see finite scores.
        let two_rows = 2 * case.head_dim;
        input.k[..two_rows].fill(f64::NEG_INFINITY);
        let got = case.run(&input)?;
        case.check_output(&input, &got)?;
        ensure!(got.lse.values[..2].iter().all(|&x| x == f64::NEG_INFINITY), "lse {:?}", got.lse.values);
        ensure!(got.o.values[..two_rows].iter().all(|x| x.is_nan()), "o {:?}", got.o.values);
        ensure!(got.o.values[two_rows..].iter().all(|x| x.is_finite()), "o {:?}", got.o.values);
    }
    Ok(())
}

/// Values near the limits of f16. S, P and the gradients are computed in f32, which holds them.
#[test]
fn numbers_near_the_ends_of_f16() -> Result<()> {
    for target in targets().into_iter().filter(|target| target.dtype == DType::F16) {
        // Scores of 60,000 * 60,000 fit f32 but not f16. An o of 60,000 fits f16.
        let case = Case::new(&target).batch(1, 6, 9).softmax_scale(1e-9);
        let mut input = case.draw();
        for tensor in [&mut input.q, &mut input.k, &mut input.v] {
            tensor.iter_mut().for_each(|x| *x = Precision::F16.round(x.clamp(-2.0, 2.0) * 30000.0));
        }
        input.do_.iter_mut().for_each(|x| *x = Precision::F16.round(*x / 1e4));
        case.check_on(&input)?;
        // Subnormal numbers.
        let case = Case::new(&target).batch(1, 6, 9);
        let mut input = case.draw();
        for tensor in [&mut input.q, &mut input.v, &mut input.do_] {
            tensor.iter_mut().for_each(|x| *x = Precision::F16.round(*x * 1e-6));
        }
        case.check_on(&input)?;
    }
    Ok(())
}
