//! The error type of this crate: a text for the person who runs the build.

use std::fmt::{self, Display, Formatter};

/// A text that names the rule, the values that broke it and the way out. It begins with file and line if the error has one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Error(String);

/// A result with this crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// An error with this text.
    pub fn new(text: impl Into<String>) -> Self {
        Self(text.into())
    }

    /// An error about one line of a file, numbered from 1.
    pub(crate) fn at(file: &str, line: usize, text: impl Display) -> Self {
        Self(format!("{file}:{line}: {text}"))
    }
}

impl Display for Error {
    fn fmt(&self, f: &mut Formatter) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Error {}
