//! Finds the headers that a source includes, directly or through other headers.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};

use crate::{files, wgmma, Error, Result};

/// Texts of files by path. The paths are relative to a folder.
pub type Sources = BTreeMap<PathBuf, String>;

/// A header that this crate generates.
#[derive(Debug)]
pub struct Generated {
    /// The name that a source includes.
    pub name: &'static str,
    /// Makes the text.
    pub text: fn() -> String,
}

/// All headers that this crate generates.
pub static GENERATED: [Generated; 1] = [Generated { name: "generated/wgmma.cuh", text: wgmma::header }];

/// Writes the generated headers into a folder. nvcc finds them there if the folder is one of its `-I`.
///
/// # Errors
/// If a file cannot be written.
pub fn write_generated(folder: &Path) -> Result<()> {
    for Generated { name, text } in &GENERATED {
        let path = folder.join(name);
        let parent = path.parent().unwrap_or(folder);
        fs::create_dir_all(parent)
            .map_err(|error| Error::new(format!("cannot create {}: {error}", parent.display())))?;
        files::write(&path, &text())?;
    }
    Ok(())
}

/// The headers under `include` that a source text includes as `#include "name"`, by their paths there. Generated headers
/// count as if they were there. Headers that are not found belong to the compiler.
///
/// # Errors
/// If `include` is not a folder.
pub fn of_text(source: &str, include: &Path) -> Result<Sources> {
    let include = canonical(include)?;
    let mut found = Sources::new();
    collect(source, &include, &include, &mut found);
    Ok(relative(found, &include))
}

/// A source file and the headers that it includes, from its own folder or from `include`, by their paths under `root`.
///
/// # Errors
/// If a path does not exist.
pub fn of_file(root: &Path, source: &str, include: &str) -> Result<Sources> {
    let (root, include) = (canonical(root)?, canonical(&root.join(include))?);
    let path = canonical(&root.join(source))?;
    let text = files::read(&path)?;
    let mut found = Sources::new();
    collect(&text, path.parent().unwrap_or(&root), &include, &mut found);
    found.insert(path, text);
    Ok(relative(found, &root))
}

/// Rust that embeds the sources of [`of_file`]: `SOURCES`, pairs of path and text.
///
/// # Errors
/// As [`of_file`].
pub fn rust_sources(root: &Path, source: &str, include: &str) -> Result<String> {
    let sources = of_file(root, source, include)?;
    let mut text = format!("pub static SOURCES: [(&str, &str); {}] = [\n", sources.len());
    for (path, source) in &sources {
        let _ = match canonical(&root.join(path)) {
            Ok(file) => writeln!(text, "    ({path:?}, include_str!({file:?})),"),
            Err(_) => writeln!(text, "    ({path:?}, {source:?}),"), // generated
        };
    }
    Ok(text + "];\n")
}

fn collect(source: &str, folder: &Path, include: &Path, found: &mut Sources) {
    let names = source.lines().filter_map(|line| line.strip_prefix("#include \"")?.split('"').next());
    for name in names {
        let paths = [folder.join(name), include.join(name)];
        let Some(path) = paths.iter().find_map(|path| path.canonicalize().ok()) else {
            if let Some(generated) = GENERATED.iter().find(|generated| generated.name == name) {
                found.insert(include.join(name), (generated.text)());
            }
            continue;
        };
        if let (false, Ok(text)) = (found.contains_key(&path), fs::read_to_string(&path)) {
            found.insert(path.clone(), text.clone());
            collect(&text, path.parent().unwrap_or(folder), include, found);
        }
    }
}

fn relative(sources: Sources, root: &Path) -> Sources {
    let relative = |path: PathBuf| path.strip_prefix(root).map(Path::to_path_buf).unwrap_or(path);
    sources.into_iter().map(|(path, text)| (relative(path), text)).collect()
}

fn canonical(path: &Path) -> Result<PathBuf> {
    path.canonicalize().map_err(|error| Error::new(format!("cannot read {}: {error}", path.display())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_are_found_through_headers() -> Result<()> {
        let folder = tempfile::tempdir().expect("a folder for the test");
        let write = |path: &str, text: &str| {
            let path = folder.path().join(path);
            fs::create_dir_all(path.parent().expect("it lies in a folder")).expect("writable");
            fs::write(path, text).expect("writable");
        };
        write("cuda/sm90/fwd.cuh", "#include \"generated/wgmma.cuh\"\n");
        write("cuda/sm80/fwd.cuh", "#include \"../core/mask.cuh\"\n#include \"copy.cuh\"\n#include <cstdint>\n");
        write("cuda/sm80/copy.cuh", "#include \"fwd.cuh\"\n"); // a circle; #pragma once allows it
        write("cuda/core/mask.cuh", "");
        write("cuda/other.cuh", "");
        write("bench/one.cu", "#include \"two.cuh\"\n#include \"core/mask.cuh\"\n#include \"compiler's.h\"\n");
        write("bench/two.cuh", "");
        let names = |sources: &Sources| sources.keys().map(|path| path.display().to_string()).collect::<Vec<_>>();
        let found = of_text("#include \"sm80/fwd.cuh\"\n", &folder.path().join("cuda"))?;
        assert_eq!(names(&found), ["core/mask.cuh", "sm80/copy.cuh", "sm80/fwd.cuh"]);
        let found = of_text("#include \"sm90/fwd.cuh\"\n", &folder.path().join("cuda"))?;
        assert_eq!(names(&found), ["generated/wgmma.cuh", "sm90/fwd.cuh"]);
        let rust = rust_sources(folder.path(), "cuda/sm90/fwd.cuh", "cuda")?;
        assert!(rust.contains("    (\"cuda/generated/wgmma.cuh\", \"// The wgmma of every N. "), "{rust}");
        let found = of_file(folder.path(), "bench/one.cu", "cuda")?;
        assert_eq!(names(&found), ["bench/one.cu", "bench/two.cuh", "cuda/core/mask.cuh"]);
        let rust = rust_sources(folder.path(), "bench/one.cu", "cuda")?;
        assert!(
            rust.starts_with("pub static SOURCES: [(&str, &str); 3] = [\n    (\"bench/one.cu\", include_str!(\""),
            "{rust}"
        );
        Ok(())
    }
}
