//! A quick check: one small case of each kind, values and gradients, in every type. Run it first.

use crate::common::cases;
use anyhow::Result;

#[test]
fn a_case_of_each_kind_matches_the_reference() -> Result<()> {
    for target in cases::targets() {
        for case in cases::smoke(&target) {
            case.check()?;
        }
    }
    Ok(())
}
