//! Tests that docs/environment.md lists every environment variable of this crate, and no other.

use std::collections::BTreeSet;
use std::path::Path;

use anyhow::{ensure, Result};

use super::{files, read};

const PREFIX: &str = "CANDLE_FA2_";

/// Compares the first column of the document's tables with the names in the repository's code.
#[test]
fn environment_variables_are_all_listed() -> Result<()> {
    let text = read("docs/environment.md")?;
    let first_cells = text.lines().filter_map(|line| line.strip_prefix("| `")?.split('`').next());
    let listed: BTreeSet<String> = first_cells.filter(|name| name.starts_with(PREFIX)).map(String::from).collect();

    let mut used = BTreeSet::new();
    let code = |path: &Path| {
        let extension = path.extension().unwrap_or_default().to_string_lossy();
        ["rs", "py", "sh", "yml", "def", "cuh", "h", ""].contains(&&*extension) && !path.ends_with("__pycache__")
    };
    let mut sources = vec!["build.rs".into(), "justfile".into()];
    for folder in ["src", "cuda", "crates", "tests", "benches", "examples", ".ci", ".github"] {
        if super::root().join(folder).exists() {
            sources.extend(files(folder, &code)?);
        }
    }
    for source in sources {
        used.extend(names(&read(&source.to_string_lossy())?));
    }
    let (unlisted, unused): (Vec<_>, Vec<_>) = (used.difference(&listed).collect(), listed.difference(&used).collect());
    ensure!(unlisted.is_empty(), "docs/environment.md must list every variable; add {unlisted:?}");
    ensure!(unused.is_empty(), "docs/environment.md lists {unused:?}, which no code uses; remove them");
    Ok(())
}

/// The variables in a text.
fn names(text: &str) -> impl Iterator<Item = String> + '_ {
    let end = |rest: &str| rest.find(|c: char| !(c.is_ascii_uppercase() || c.is_ascii_digit() || c == '_'));
    let rests = text.split(PREFIX).skip(1);
    rests.map(move |rest| format!("{PREFIX}{}", &rest[..end(rest).unwrap_or(rest.len())])).filter(|name| name != PREFIX)
}
