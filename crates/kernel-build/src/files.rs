//! The files and the environment of a build script.

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

/// Writes a file, unless it already holds `text`. Then cargo does not recompile the code that includes it.
///
/// # Errors
/// If it cannot be written.
pub fn write(path: &Path, text: &str) -> Result<()> {
    if fs::read_to_string(path).is_ok_and(|now| now == text) {
        return Ok(());
    }
    fs::write(path, text).map_err(|error| Error::new(format!("cannot write {}: {error}", path.display())))
}

/// The value of an environment variable. `None` if it is unset or empty.
pub fn variable(name: &str) -> Option<String> {
    env::var(name).ok().filter(|value| !value.is_empty())
}

/// The folder in `CARGO_MANIFEST_DIR` or `OUT_DIR`, which cargo sets for a build script.
///
/// # Errors
/// If the variable is not set.
pub fn folder(name: &str) -> Result<PathBuf> {
    let path = variable(name).map(PathBuf::from);
    path.ok_or_else(|| Error::new(format!("{name} is not set; run this as a build script, for which cargo sets it")))
}
