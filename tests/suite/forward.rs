//! o and lse of untracked inputs, compared with the reference.

use crate::common::cases::{self, targets, Case, Target};
use anyhow::Result;

fn check(list: fn(&Target) -> Vec<Case>) -> Result<()> {
    for target in targets() {
        for case in list(&target).into_iter().filter(Case::fits) {
            case.check_forward()?;
        }
    }
    Ok(())
}

#[test]
fn every_mask_with_every_option() -> Result<()> {
    check(cases::options)
}

#[test]
fn every_kind_of_head_dim() -> Result<()> {
    check(cases::head_dims)
}

#[test]
fn another_head_dim_of_v() -> Result<()> {
    check(cases::head_dims_v)
}

#[test]
fn packed_batches() -> Result<()> {
    check(cases::packed)
}

#[test]
fn long_sequences() -> Result<()> {
    check(cases::long)
}

/// Lengths one row before, at, and one row after the edges of the tiles.
#[test]
fn tile_edges() -> Result<()> {
    for target in targets() {
        for case in cases::around_tiles(&target, 16)? {
            case.check_forward()?;
        }
    }
    Ok(())
}
