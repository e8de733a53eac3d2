//! The CUDA kernels against the reference that judges the CPU path: masks with every option, every head_dim that has a
//! kernel, packed batches, long sequences, the edges of the kernels' own tiles; values and gradients.
//!
//! Needs the feature `cuda` and a GPU: without the feature the tests are ignored, without a GPU each says so and passes.

use crate::common::cases::{self, gpu_targets, Case, Target};
use anyhow::Result;

/// Runs those cases that the kernels accept, forward alone and both passes.
fn check(list: impl Fn(&Target) -> Result<Vec<Case>>) -> Result<()> {
    let targets = gpu_targets();
    if targets.is_empty() {
        eprintln!("SKIPPED: no CUDA device");
    }
    let mut checked = 0;
    for target in &targets {
        for case in list(target)? {
            if case.head_dim % 8 == 0 && case.head_dim <= 256 {
                case.check_forward()?;
                case.check()?;
                checked += 1;
            }
        }
    }
    println!("{checked} cases on the GPU");
    Ok(())
}

#[test]
#[cfg_attr(not(feature = "cuda"), ignore = "needs the feature cuda")]
fn every_mask_with_every_option() -> Result<()> {
    check(|target| Ok(cases::options(target).into_iter().map(|case| case.head_dim(40)).collect()))
}

#[test]
#[cfg_attr(not(feature = "cuda"), ignore = "needs the feature cuda")]
fn every_head_dim() -> Result<()> {
    check(|target| {
        let of = |head_dim| {
            let case = || Case::new(target).heads(4, 2).head_dim(head_dim);
            let masks = [candle_fa2::Mask::None, candle_fa2::Mask::Causal, cases::window(40, 3)];
            masks.map(|mask| case().batch(2, 150, 190).mask(mask))
        };
        Ok((1..=32).flat_map(|eighth| of(8 * eighth)).collect())
    })
}

#[test]
#[cfg_attr(not(feature = "cuda"), ignore = "needs the feature cuda")]
fn packed_batches() -> Result<()> {
    check(|target| {
        let cases = cases::packed(target).into_iter().map(|case| case.head_dim(64));
        // Candle itself fails to allocate a tensor without elements on a GPU.
        Ok(cases.filter(|case| case.sequences().iter().any(|&(q, k)| q > 0 && k > 0)).collect())
    })
}

#[test]
#[cfg_attr(not(feature = "cuda"), ignore = "needs the feature cuda")]
fn long_sequences() -> Result<()> {
    check(|target| Ok(cases::long(target)))
}

#[test]
#[cfg_attr(not(feature = "cuda"), ignore = "needs the feature cuda")]
fn edges_of_each_kernels_tiles() -> Result<()> {
    check(|target| {
        let of = |head_dim| cases::around_tiles(target, head_dim);
        Ok([32, 64, 96, 128, 192, 256].into_iter().map(of).collect::<Result<Vec<_>>>()?.concat())
    })
}
