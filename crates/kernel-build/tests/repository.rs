//! Tests of the repository's own table and parameters. The other tests of this crate use texts of their own.

use std::path::{Path, PathBuf};

use kernel_build::params::Structs;
use kernel_build::table::Table;
use kernel_build::{attention, describe, headers, units, Result};

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

#[test]
fn every_kernel_takes_a_struct_of_params_h() -> Result<()> {
    let table = Table::read(&root().join("cuda/instances.def"), &attention::FAMILIES)?;
    let structs = Structs::read(&root().join("cuda/params.h"))?;
    let units = units(&table);
    for kernel in units.iter().flat_map(|unit| &unit.kernels) {
        assert!(!structs.get(kernel.entry.params)?.fields.is_empty(), "{}", kernel.name);
    }
    // A family without a line would be dead code.
    for family in &attention::FAMILIES {
        assert!(units.iter().any(|unit| std::ptr::eq(unit.family, family)), "no line is a {}", family.form());
    }
    Ok(())
}

#[test]
fn every_header_of_a_family_exists() -> Result<()> {
    for family in &attention::FAMILIES {
        let found = headers::of_text(&format!("#include \"{}\"\n", family.header), &root().join("cuda"))?;
        assert!(found.contains_key(Path::new("params.h")), "{} includes {found:?}", family.header);
    }
    Ok(())
}

#[test]
fn the_description_has_all_that_a_launch_needs() -> Result<()> {
    let table = Table::read(&root().join("cuda/instances.def"), &attention::FAMILIES)?;
    let structs = Structs::read(&root().join("cuda/params.h"))?;
    let json = describe(&units(&table), &structs, &root().join("cuda"))?.to_string();
    for part in [
        "{\"flags\": [\"-std=c++17\", ",
        "\"constants\": {\"kWarpSize\": 32, \"kDqGroupRows\": 8, ",
        "\"max_tiles\": 512, \"box_cols\": 64, ",
        "\"params\": \"DeltaParams\", \"threads\": 256, \"shared_bytes\": 0, \"warps\": 8}",
        "\"sm\": 90, \"exact\": true, ",
        "\"core/tile.cuh\": \"",
        "\"TensorMap\": {\"size\": 128, ",
    ] {
        assert!(json.contains(part), "{part}");
    }
    Ok(())
}
