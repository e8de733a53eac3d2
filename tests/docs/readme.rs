//! Tests that README.md has the versions and the repository of Cargo.toml, and that its examples hide no line.

use anyhow::{ensure, Context, Result};

use super::{read, update};

#[test]
fn readme_names_the_versions_of_cargo_toml() -> Result<()> {
    if update() {
        return Ok(()); // another test is writing documents
    }
    let manifest: toml::Table = read("Cargo.toml")?.parse()?;
    // A value may come from the workspace.
    let tables = [manifest.get("package"), manifest["workspace"].get("package")];
    let text = |name: &str| {
        tables.into_iter().flatten().find_map(|table| table.get(name)?.as_str()).with_context(|| name.to_string())
    };
    let candle = manifest["dependencies"]["candle-core"].as_str().context("candle-core")?;
    let readme = read("README.md")?;
    for sentence in [
        format!("cargo add {} --git {}", text("name")?, text("repository")?),
        format!("Rust {}", text("rust-version")?),
        format!("Candle {candle}"),
    ] {
        ensure!(readme.contains(&sentence), "README.md must contain {sentence:?}, because Cargo.toml says so");
    }
    Ok(())
}

/// A line `# use ..` is hidden in the crate's documentation, but visible on the repository page.
#[test]
fn readme_hides_no_line_of_its_examples() -> Result<()> {
    if update() {
        return Ok(()); // another test is writing documents
    }
    let readme = read("README.md")?;
    for block in readme.split("```rust").skip(1).filter_map(|rest| rest.split("```").next()) {
        ensure!(!block.lines().any(|line| line == "#" || line.starts_with("# ")), "README.md hides a line of\n{block}");
    }
    Ok(())
}
