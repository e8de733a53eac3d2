//! One error type: a text for whoever runs the build.

use std::fmt::{self, Display, Formatter};

/// Names the rule, the values that came and the way out, with file and line where there is one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Error(String);

/// A result with this crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// An error of this text.
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
