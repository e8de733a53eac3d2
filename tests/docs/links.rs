//! Tests that the links of the documents lead to files and headings, and that the files that they name exist.

use std::path::{Component, Path, PathBuf};

use anyhow::{ensure, Result};

use super::{documents, read, root, update};

/// Every relative link names a file or folder, from the folder of its document. A `#heading` is one of the target's headings.
#[test]
fn links_lead_somewhere() -> Result<()> {
    if update() {
        return Ok(()); // another test is writing documents and figures
    }
    for document in documents()? {
        let text = read_document(&document)?;
        for target in text.split("](").skip(1).filter_map(|rest| rest.split_once(')')).map(|(target, _)| target) {
            if target.starts_with("http") {
                continue;
            }
            let (file, heading) = target.split_once('#').unwrap_or((target, ""));
            let path = if file.is_empty() { document.clone() } else { relative_to(&document, file) };
            ensure!(root().join(&path).exists(), "{} links to {target}, which does not exist", document.display());
            if !heading.is_empty() {
                let headings = anchors(&read_document(&path)?);
                ensure!(
                    headings.iter().any(|anchor| anchor == heading),
                    "{} links to {target}, but {} has no such heading",
                    document.display(),
                    path.display()
                );
            }
        }
    }
    Ok(())
}

/// A file that a document names in code exists. docs/log and the changelog may name removed files, because they describe the past.
#[test]
fn named_files_exist() -> Result<()> {
    if update() {
        return Ok(()); // another test is writing documents
    }
    let folders = ["examples/", "benches/", "tests/", "cuda/", "crates/", "docs/", "src/", ".ci/"];
    for document in documents()?.iter().filter(|path| !path.starts_with("docs/log") && !path.ends_with("CHANGELOG.md"))
    {
        let text = read_document(document)?;
        let names = text.split('`').filter(|code| folders.iter().any(|folder| code.starts_with(folder)));
        for name in names.filter_map(|code| code.split(' ').next()) {
            // A pattern such as `src/layers/*` names its folder.
            let file = name.split('*').next().unwrap_or_default();
            ensure!(root().join(file).exists(), "{} names {name}, which does not exist", document.display());
        }
    }
    Ok(())
}

fn read_document(path: &Path) -> Result<String> {
    read(&path.to_string_lossy())
}

/// Turns `file`, a path from the folder of `document`, into a path from the root.
fn relative_to(document: &Path, file: &str) -> PathBuf {
    let mut path = document.parent().map(Path::to_path_buf).unwrap_or_default();
    for part in Path::new(file).components() {
        match part {
            Component::ParentDir => drop(path.pop()),
            part => path.push(part),
        }
    }
    path
}

/// The anchors that a repository page gives the headings of a document: lower case, words joined by hyphens.
fn anchors(text: &str) -> Vec<String> {
    let headings = text.lines().filter(|line| line.starts_with('#')).map(|line| line.trim_start_matches('#').trim());
    let anchor = |heading: &str| -> String {
        let kept =
            heading.to_lowercase().chars().filter(|c| c.is_alphanumeric() || " -_".contains(*c)).collect::<String>();
        kept.replace(' ', "-")
    };
    headings.map(anchor).collect()
}
