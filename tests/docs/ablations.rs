//! Tests that the ablations have the tiles of our kernels, so that nothing else differs.

use anyhow::{ensure, Context, Result};
use kernel_build::attention::FAMILIES;
use kernel_build::table::Table;

use super::read;

/// The head_dims that benches/ablations/ablations.cu has tiles for.
const HEAD_DIMS: [usize; 2] = [64, 128];

/// Compares the template arguments with the first line of the table for each pass and head_dim.
#[test]
fn ablations_have_the_tiles_of_the_table() -> Result<()> {
    let table = Table::parse(&read("cuda/instances.def")?, "cuda/instances.def", &FAMILIES)?;
    let ablations = read("benches/ablations/ablations.cu")?;
    for (pass, traits) in [("fwd", "FwdTraits"), ("bwd", "BwdTraits")] {
        for head_dim in HEAD_DIMS {
            let is_it = |family: &kernel_build::family::Family| family.pass == pass && family.arch.sm == 80;
            let line = table.lines.iter().find(|line| is_it(line.family) && line.get("head_dim") == head_dim);
            let line = line.with_context(|| format!("the table has no {pass} sm80 for head_dim {head_dim}"))?;
            let numbers: Vec<String> = line.values().iter().map(usize::to_string).collect();
            let want = format!("sm80::{traits}<ABLATION_TYPE, {}, NoScoreMod>;", numbers.join(", "));
            ensure!(
                ablations.contains(&want),
                "benches/ablations/ablations.cu must have the tile of the table: {want}"
            );
        }
    }
    Ok(())
}
