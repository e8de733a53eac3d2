//! Printing. `println!` and `eprintln!` panic if stdout or stderr is closed or full. These functions do not.

use anyhow::{bail, Result};
use std::fmt::Display;
use std::io::{self, ErrorKind, Write};
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

/// Prints a line about a run. If stdout fails, the run continues: stderr gets one notice, and later lines are dropped.
pub fn progress(line: impl Display) {
    static SILENT: AtomicBool = AtomicBool::new(false);
    if SILENT.load(Relaxed) {
        return;
    }
    if let Err(error) = print(line) {
        SILENT.store(true, Relaxed);
        notice(format_args!("cannot write to stdout: {error}; training continues without progress lines"));
    }
}

/// Prints the result that the user asked for.
///
/// # Errors
/// If it cannot be written to stdout.
pub fn result(text: impl Display) -> Result<()> {
    check_written(print(text))
}

/// Returns an error if a write to stdout failed. A closed pipe is not an error: its reader wants no more output.
pub fn check_written(written: io::Result<()>) -> Result<()> {
    match written {
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
