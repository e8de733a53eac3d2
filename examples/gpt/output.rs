//! Printing. `println!` and `eprintln!` panic if stdout or stderr is closed or full. These functions do not.

use anyhow::{bail, Result};
use std::fmt::Display;
use std::io::{self, ErrorKind, Write};

/// Prints a line about a run. If stdout is closed or full, the run continues without it.
pub fn progress(line: impl Display) {
    let _ = print(line);
}

/// Prints the result that the user asked for.
///
/// # Errors
/// If it cannot be written to stdout. A closed pipe is not an error: its reader wants no more output.
pub fn result(text: impl Display) -> Result<()> {
    match print(text) {
        Err(error) if error.kind() != ErrorKind::BrokenPipe => {
            bail!("cannot write the result to stdout: {error}; make room there, or redirect stdout")
        }
        _ => Ok(()),
    }
}

/// Prints a line on stderr. A failure is ignored: there is no other place to report it.
pub fn notice(line: impl Display) {
    let _ = writeln!(io::stderr(), "{line}");
}

fn print(text: impl Display) -> io::Result<()> {
    #[cfg(not(test))]
    let mut stdout = io::stdout();
    #[cfg(test)]
    let mut stdout = crate::tests::stdout()?;
    writeln!(stdout, "{text}")?;
    stdout.flush()
}
