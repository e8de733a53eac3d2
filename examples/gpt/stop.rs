//! Ctrl-C and SIGTERM. The first signal asks training to save a checkpoint and stop. The second ends the process at once.

use crate::output::notice;
use anyhow::Result;
use std::path::PathBuf;
use std::sync::atomic::{AtomicI32, Ordering};
use std::sync::Arc;

/// The signal that asked to stop.
pub struct Stop(Arc<AtomicI32>); // 0: none yet

impl Stop {
    /// Handles SIGINT and SIGTERM from now until the process ends.
    #[cfg(unix)]
    pub fn listen() -> Result<Self> {
        use signal_hook::consts::{SIGINT, SIGTERM};

        let signal = Arc::new(AtomicI32::new(0));
        let mut signals = signal_hook::iterator::Signals::new([SIGINT, SIGTERM])?;
        let heard = signal.clone();
        // A separate thread can react while a step is running.
        std::thread::spawn(move || {
            for signal in signals.forever() {
                if heard.swap(signal, Ordering::SeqCst) != 0 {
                    signal_hook::low_level::exit(exit_code(signal).into());
                }
                notice("\nfinishing this step and saving a checkpoint; press Ctrl-C again to end at once");
            }
        });
        Ok(Self(signal))
    }

    /// On other systems a signal ends the process at once. The last saved checkpoint remains.
    #[cfg(not(unix))]
    pub fn listen() -> Result<Self> {
        Ok(Self(Arc::default()))
    }

    /// Call this when training has finished. From then on, the first signal ends the process.
    pub fn end(&self) {
        self.0.store(i32::MAX, Ordering::SeqCst);
    }

    pub fn signal(&self) -> Option<i32> {
        Some(self.0.load(Ordering::SeqCst)).filter(|&signal| signal != 0)
    }
}

/// Training was stopped by a signal. Its checkpoint is saved.
#[derive(Debug, thiserror::Error)]
#[error("stopped after step {step}; continue with: train --resume {}", dir.display())]
pub struct Stopped {
    pub signal: i32,
    pub step: usize,
    pub dir: PathBuf,
}

/// The exit code that shells use for a process ended by `signal`: 128 + signal.
pub fn exit_code(signal: i32) -> u8 {
    128 + signal as u8
}
