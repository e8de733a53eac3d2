//! Shows progress: as a bar on a terminal, otherwise as plain lines.

use crate::metrics::Row;
use crate::output;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use std::time::{Duration, Instant};

/// Shortest time between two lines of progress without a terminal.
const BETWEEN_LINES: Duration = Duration::from_secs(10);

pub struct Progress {
    first: usize, // number of steps done before this process
    steps: usize,
    started: Instant,
    bar: ProgressBar, // hidden if stderr is no terminal; a drop removes it from the terminal
    last_line: Option<Instant>,
}

impl Progress {
    pub fn new(done: usize, steps: usize) -> Self {
        let style = ProgressStyle::with_template("{bar:32} {pos}/{len}  {msg}  ETA {eta}").expect("a valid template");
        let target = match cfg!(test) {
            true => ProgressDrawTarget::hidden(), // so that the output of tests stays readable on a terminal
            false => ProgressDrawTarget::stderr(),
        };
        let bar =
            ProgressBar::with_draw_target(Some(steps as u64), target).with_style(style).with_position(done as u64);
        bar.reset_eta();
        Self { first: done, steps, started: Instant::now(), bar, last_line: None }
    }

    /// Shows the progress up to the step of `row`. Call it right after that step. Prints a line if the step was evaluated, and
    /// without a terminal every few seconds.
    pub fn step(&mut self, row: &Row) {
        let Row { step, train_loss, lr, tokens_per_s, .. } = *row;
        self.bar.set_position(step as u64);
        self.bar.set_message(format!("loss {train_loss:.3}  {tokens_per_s} tokens/s"));
        let due = self.bar.is_hidden() && self.last_line.is_none_or(|at| at.elapsed() >= BETWEEN_LINES);
        if row.val_loss.is_none() && !due {
            return;
        }
        let held_out = row.val_loss.map(|loss| format!("  held-out {loss:.3}")).unwrap_or_default();
        let left_per_done = (self.steps - step) as f64 / (step - self.first) as f64; // steps
        let time_left = Duration::try_from_secs_f64(self.started.elapsed().as_secs_f64() * left_per_done);
        let eta = clock(time_left.unwrap_or(Duration::MAX));
        let line = format!(
            "step {step:>5}/{}  loss {train_loss:.3}{held_out:16}  lr {lr:.1e}  {tokens_per_s} tokens/s  ETA {eta}",
            self.steps
        );
        self.bar.suspend(|| output::progress(line));
        self.last_line = Some(Instant::now());
    }
}

/// Minutes and seconds, or hours and minutes.
pub fn clock(time: Duration) -> String {
    let seconds = time.as_secs();
    match seconds / 3600 {
        0 => format!("{}m{:02}s", seconds / 60, seconds % 60),
        hours => format!("{hours}h{:02}m", seconds % 3600 / 60),
    }
}
