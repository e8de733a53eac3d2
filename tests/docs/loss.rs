//! The loss curves of two runs of the GPT example.

use anyhow::{ensure, Context, Result};
use figures::curves::{self, Curve};
use serde::Deserialize;

/// The columns of a run's metrics.csv that are drawn.
#[derive(Deserialize)]
struct Step {
    step: usize,
    train_loss: f64,
    val_loss: Option<f64>,
}

const GREY: (u8, u8, u8) = (150, 150, 150);
const ORANGE: (u8, u8, u8) = (232, 113, 26);

/// Training and held-out loss of two runs, each with its name and the text of its metrics.csv.
///
/// # Errors
/// If a text is not a metrics.csv, or has no steps.
pub fn figure(runs: [(&str, &str); 2], source: &str) -> Result<String> {
    let mut drawn = Vec::new();
    // The first line is wide, so that both show where the second covers it.
    for ((name, text), (colour, width)) in runs.into_iter().zip([(GREY, 5), (ORANGE, 2)]) {
        let steps = csv::Reader::from_reader(text.as_bytes()).into_deserialize().collect::<Result<Vec<Step>, _>>();
        let steps = steps.with_context(|| format!("the run {name}"))?;
        ensure!(!steps.is_empty(), "the run {name} has no steps");
        let train: Vec<_> = steps.iter().map(|step| (step.step as f64, step.train_loss)).collect();
        let held_out: Vec<_> = steps.iter().filter_map(|step| Some((step.step as f64, step.val_loss?))).collect();
        let end = held_out.last().map_or(String::new(), |(_, loss)| format!(", held-out {loss:.3} at the end"));
        drawn.push(Curve {
            label: Some(format!("{name}{end}")),
            colour,
            width: Some(width),
            radius: None,
            points: curves::thin(&train),
        });
        drawn.push(Curve { label: None, colour, width: None, radius: Some(3 + width as i32 / 2), points: held_out });
    }
    curves::svg(&format!("Loss by step, nats per token. {source}"), &drawn)
}
