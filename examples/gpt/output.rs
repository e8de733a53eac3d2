//! What the program prints. `println!` and `eprintln!` panic when nobody takes the text; the functions here do not.

use anyhow::{bail, Result};
use std::fmt::Display;
use std::io::{self, ErrorKind, Write};
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

/// Prints a line about a run. If stdout does not take it, the run goes on: stderr gets one notice, and no further line is
/// printed.
pub fn progress(line: impl Display) {
    static SILENT: AtomicBool = AtomicBool::new(false);
    if SILENT.load(Relaxed) {
        return;
    }
    if let Err(error) = print(line) {
        SILENT.store(true, Relaxed);
        notice(format_args!("stdout takes no more text ({error}); training goes on and prints nothing further"));
    }
}

/// Prints what the user started the program for.
///
/// # Errors
/// If stdout does not take it.
pub fn result(text: impl Display) -> Result<()> {
    taken(print(text))
}

/// Judges how a write to stdout went. A closed pipe is no error: its reader has seen what it wanted.
pub fn taken(written: io::Result<()>) -> Result<()> {
    match written {
        Err(error) if error.kind() != ErrorKind::BrokenPipe => {
            bail!("stdout does not take the result: {error}; make room there, or send it elsewhere")
        }
        _ => Ok(()),
    }
}

/// Prints a line on stderr. If that fails, there is no other place to say so.
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
