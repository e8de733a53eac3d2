//! Tests of the tolerance rule: it rejects implementations that lose keys and accepts correct ones.

use super::cases::{self, cpu_targets, Case, Target};
use super::compare;
use anyhow::{ensure, Result};
use attention_reference as reference;
use attention_reference::attention::{Variant, PLAIN};
use candle_fa2::{testing, Mask};

const ALL: [&str; 5] = ["o", "lse", "dq", "dk", "dv"];

/// The smallest key tile that any kernel has.
fn smallest_key_tile() -> usize {
    let tiles = testing::KERNELS.iter().map(|kernel| kernel.block_n).filter(|&block_n| block_n > 0);
    tiles.min().expect("some kernels have tiles")
}

/// Checks that the rule rejects a same-precision implementation with the fault `drops`, for every tensor in `tensors`.
fn rejects(case: &Case, tensors: &[&str], drops: &(dyn Fn(usize, usize) -> bool + Sync)) -> Result<()> {
    let input = case.draw();
    let want = reference::attention(&input);
    let broken = reference::attention_variant(&input, &Variant { drops, ..PLAIN });
    let tolerances = reference::tolerances(&input, &want);
    for (((name, broken), (_, want)), tolerance) in broken.named().into_iter().zip(want.named()).zip(&tolerances) {
        let caught = compare::close(name, broken, want, tolerance, case).is_err();
        ensure!(caught || !tensors.contains(&name), "{name} passes with lost keys\ncase {case}");
    }
    Ok(())
}

/// One key tile is dropped from as many queries, the last ones, at the longest length of the suite.
#[test]
fn rejects_one_lost_key_tile_at_the_longest_seqlen() -> Result<()> {
    let tile = smallest_key_tile();
    for target in cpu_targets() {
        for case in cases::long(&target) {
            let (seqlen_q, seqlen_k) = case.sequences()[0];
            let first = (seqlen_k / 2).next_multiple_of(tile);
            let drops = |row: usize, col: usize| row + tile >= seqlen_q && (first..first + tile).contains(&col);
            // With a window, these queries see only the last keys.
            let last = |row: usize, col: usize| row + tile >= seqlen_q && col + tile >= seqlen_k;
            let windowed = matches!(case.mask, Mask::Window { .. });
            rejects(&case, &ALL, if windowed { &last } else { &drops })?;
        }
    }
    Ok(())
}

/// The same with 8k keys, for the tensors whose rows are sums over the keys.
#[test]
fn rejects_one_lost_key_tile_at_8k_keys() -> Result<()> {
    let tile = smallest_key_tile();
    for target in cpu_targets() {
        let case = Case::new(&target).heads(1, 1).batch(1, 2, 8192).mask(Mask::Causal);
        rejects(&case, &["o", "lse", "dq"], &|_, col| (4096..4096 + tile).contains(&col))?;
    }
    Ok(())
}

/// One key is dropped from the last eighth of the queries: the first key, a middle one, or the last.
#[test]
fn rejects_one_lost_key_at_short_seqlens() -> Result<()> {
    for target in cpu_targets() {
        for seqlen in [2, 5, 16, 48] {
            // The small scale gives every key a weight near 1 / seqlen. With a much smaller weight, the loss of a key
            // would be below the rounding of bf16, and no rule could detect it.
            let case = Case::new(&target).heads(1, 1).batch(1, seqlen, seqlen).softmax_scale(0.05);
            let losing = (seqlen / 8).max(1);
            for lost in [0, seqlen / 2, seqlen - 1] {
                rejects(&case, &ALL, &|row, col| row + losing >= seqlen && col == lost)?;
            }
        }
    }
    Ok(())
}

/// Correct implementations may sum in another order. They may also divide by row_sum at the end, and so round other numbers.
#[test]
fn accepts_correct_implementations() -> Result<()> {
    for target in cpu_targets() {
        for case in many_cases(&target) {
            let input = case.draw();
            let want = reference::attention(&input);
            let tolerances = reference::tolerances(&input, &want);
            for (reversed, divides_last) in [(true, false), (false, true), (true, true)] {
                let got = reference::attention_variant(&input, &Variant { reversed, divides_last, ..PLAIN });
                for (((name, got), (_, want)), tolerance) in got.named().into_iter().zip(want.named()).zip(&tolerances)
                {
                    compare::close(name, got, want, tolerance, &case)?;
                }
            }
        }
    }
    Ok(())
}

fn many_cases(target: &Target) -> Vec<Case> {
    [
        cases::smoke(target),
        cases::options(target),
        cases::head_dims(target),
        cases::head_dims_v(target),
        cases::packed(target),
    ]
    .concat()
}
