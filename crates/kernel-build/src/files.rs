//! Files, and the environment of a build script.

use std::path::{Path, PathBuf};
use std::{env, fs};

use crate::{Error, Result};

/// The text of a file.
///
/// # Errors
/// If it cannot be read.
pub fn read(path: &Path) -> Result<String> {
    fs::read_to_string(path).map_err(|error| Error::new(format!("cannot read {}: {error}", path.display())))
}

/// Writes a file unless it holds `text` already: cargo compiles what includes it again only if it changed.
///
/// # Errors
/// If it cannot be written.
pub fn write(path: &Path, text: &str) -> Result<()> {
    if fs::read_to_string(path).is_ok_and(|now| now == text) {
        return Ok(());
    }
    fs::write(path, text).map_err(|error| Error::new(format!("cannot write {}: {error}", path.display())))
}

/// An environment variable that is set and not empty.
pub fn variable(name: &str) -> Option<String> {
    env::var(name).ok().filter(|value| !value.is_empty())
}

/// A folder that cargo names to a build script: `CARGO_MANIFEST_DIR` or `OUT_DIR`.
///
/// # Errors
/// If the variable is not set.
pub fn folder(name: &str) -> Result<PathBuf> {
    let path = variable(name).map(PathBuf::from);
    path.ok_or_else(|| Error::new(format!("{name} is not set; cargo sets it for a build script")))
}
