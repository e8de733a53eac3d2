//! Tests that the documents agree with the code and the records: links, tables, figures, environment variables, versions.
//!
//! `CANDLE_FA2_UPDATE=1 cargo test --test docs` (`just tables`) rewrites the generated parts.

mod ablations;
mod claims;
mod environment;
mod generated;
mod import_graph;
mod links;
mod loss;
mod readme;
mod records;
mod shapes;
mod tables;

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

/// Whether to rewrite the generated parts instead of comparing them: `CANDLE_FA2_UPDATE=1`.
fn update() -> bool {
    std::env::var_os("CANDLE_FA2_UPDATE").is_some()
}

/// Reads a file of the repository.
fn read(file: &str) -> Result<String> {
    fs::read_to_string(root().join(file)).with_context(|| file.to_string())
}

/// The files in `folder` and its folders that `wanted` accepts, as sorted paths from the root.
fn files(folder: &str, wanted: &dyn Fn(&Path) -> bool) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    let mut folders = vec![root().join(folder)];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).with_context(|| folder.display().to_string())? {
            let path = entry?.path();
            if path.is_dir() {
                folders.push(path);
            } else if wanted(&path) {
                found.push(path.strip_prefix(root())?.to_path_buf());
            }
        }
    }
    found.sort();
    Ok(found)
}

/// Every document, as paths from the root.
fn documents() -> Result<Vec<PathBuf>> {
    let markdown = |path: &Path| path.extension().is_some_and(|extension| extension == "md");
    let mut documents = files("docs", &markdown)?;
    documents.extend(["README.md", "CHANGELOG.md"].map(PathBuf::from));
    documents.extend(files("crates", &|path| path.ends_with("README.md"))?);
    Ok(documents)
}
