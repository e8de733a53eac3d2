//! The papers' claims next to the newest record of each GPU.

use std::collections::HashMap;

use anyhow::Result;
use figures::claims::{claims, spread, Claim};

use super::records::Machine;
use super::tables::head;

/// Section 4.2 of the FlashAttention-2 paper: GPT training is 2.8 times as fast as without FlashAttention, at 72% of the peak.
const TRAINING_OVER_STANDARD: f64 = 2.8;
const TRAINING_SHARE: f64 = 0.72;

/// A line for each claim that the records of kernels and of training have rows for.
pub fn table(gpu: &Machine, training: &Machine) -> Result<String> {
    let peak = gpu.peak()?;
    let mut all = claims(&gpu.record, Some(peak));
    all.extend(of_training(training, peak)?);
    let line = |Claim { paper, here, place, holds }: &Claim| {
        let holds = holds.map_or("-", |holds| if holds { "yes" } else { "no" });
        format!("| {paper} | {here} | {holds} | {place} |\n")
    };
    let lines: String = all.iter().map(line).collect();
    Ok(if lines.is_empty() { lines } else { head(&["the paper", "here", "holds", "where"]) + &lines })
}

/// The claims about training. Their rows are in a file of their own.
fn of_training(gpu: &Machine, peak: f64) -> Result<Vec<Claim>> {
    type Row = HashMap<String, String>;
    let rows = gpu.rows("gpt", &["parameters", "attention", "context", "batch", "tokens_per_s", "model_tflops"])?;
    let number = |row: &Row, column: &str| row[column].parse::<f64>().ok();
    let flash = || rows.iter().filter(|row| row["attention"] == "flash");
    let ratio = |row: &Row| {
        let alike = |other: &&Row| {
            other["attention"] == "standard"
                && ["parameters", "context", "batch"].iter().all(|column| other[*column] == row[*column])
        };
        let standard = rows.iter().filter(alike).filter_map(|row| number(row, "tokens_per_s")).reduce(f64::max)?;
        Some(number(row, "tokens_per_s")? / standard)
    };
    let faster = spread(&flash().filter_map(ratio).collect::<Vec<_>>()).map(|(mean, here)| Claim {
        paper: format!("GPT training {TRAINING_OVER_STANDARD} times as fast as without it"),
        here,
        place: "over Candle's standard attention, tokens/s".to_string(),
        holds: Some(mean >= TRAINING_OVER_STANDARD),
    });
    let fastest = flash().filter_map(|row| number(row, "model_tflops")).reduce(f64::max).map(|rate| Claim {
        paper: format!("GPT training at up to 225 TFLOP/s, {:.0}% of an A100's peak", 100.0 * TRAINING_SHARE),
        here: format!("{:.0}%", 100.0 * rate / peak),
        place: format!("{rate:.0} of {peak:.0} TFLOP/s"),
        holds: Some(rate >= TRAINING_SHARE * peak),
    });
    Ok([faster, fastest].into_iter().flatten().collect())
}
