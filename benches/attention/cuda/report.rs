//! Rows as they are measured, as CSV, and as a table at the end.

use std::path::Path;

use anyhow::Result;
use candle_core::DType;

use super::gpu::Cost;
use crate::cases::{Case, Mask, Pass};
use crate::rows::{ms, significant, spread, Csv, CsvRow};
use crate::sample::Errors;
use crate::timing::Timing;

/// One pass of one case.
pub struct Row {
    pub pass: Pass,
    pub cost: Cost,
    /// The same backward through Candle's autograd.
    pub autograd: Option<Timing>,
    /// The largest relative error of what the pass computes.
    pub error: f64,
}

/// Everything measured so far.
pub struct Report {
    csv: Csv,
    rates: Vec<Rate>,
}

/// Stands for no seqlen, in the last column.
const PACKED: usize = usize::MAX;

/// A cell of the table at the end.
struct Rate {
    /// Its line.
    line: String,
    seqlen: usize,
    tflops: f64,
}

/// Floating-point operations as the papers count them: all pairs of query and key of a sequence, or
/// half of them under a causal mask, which is less than are visible by half of the diagonal.
fn flop(case: &Case, pass: Pass) -> f64 {
    let pairs: f64 = match case.mask {
        Mask::None | Mask::Causal => {
            let all = case.sequences().iter().map(|sequence| (sequence.seqlen_q * sequence.seqlen_k) as f64).sum();
            if case.mask == Mask::Causal {
                0.5 * all
            } else {
                all
            }
        }
        Mask::Window { .. } => case.visible_pairs() as f64,
    };
    let forward = 4.0 * case.head_dim as f64 * case.num_heads as f64 * pairs;
    if pass == Pass::Forward {
        forward
    } else {
        2.5 * forward
    }
}

/// A record calls f16 fp16, as PyTorch's users do.
fn dtype_of_peers(dtype: DType) -> &'static str {
    match dtype {
        DType::F16 => "fp16",
        other => other.as_str(),
    }
}

impl Report {
    /// # Errors
    /// If `csv` cannot be created; a file that is already there is replaced.
    pub fn new(csv: Option<&Path>) -> Result<Self> {
        Ok(Self { csv: Csv::create(csv)?, rates: Vec::new() })
    }

    /// Prints what the columns mean.
    pub fn rules(&self) {
        println!(
            "FLOP: forward 4 * head_dim * heads * pairs of query and key, half if causal; backward 2.5 times that."
        );
        println!("ms: median of CUDA events around one call, warm, L2 flushed before each; bwd is the operator's own");
        println!("    backward with its allocations. MHz, W: under that load, which may be below the GPU's best.");
        println!(
            "autograd: the same backward by Candle's autograd, in ms: it fills a gradient of ones for o, and adds"
        );
        println!("    each of dq, dk and dv to a tensor of zeros.");
        println!(
            "host: time until the call is queued, in us. error: ||got - want|| / ||want|| against f64, over a sample"
        );
        println!("    of rows of o (fwd), or the largest of dq, dk and dv (bwd); a wrong answer is not timed.");
    }

    /// Prints the names of the columns of [`Self::row`].
    pub fn head(&self) {
        println!(
            "{:<28} {:<4} {:>24} {:>5} {:>8} {:>6} {:>6} {:>9} {:>7} {:>8}",
            "", "", "ms (min .. max)", "runs", "TFLOP/s", "MHz", "W", "autograd", "host", "error"
        );
    }

    /// Prints a row, and keeps it for the table.
    pub fn row(&mut self, case: &Case, row: &Row) -> Result<()> {
        let Cost { timing, host, gauges } = &row.cost;
        let tflops = flop(case, row.pass) / timing.median() / 1e12;
        let autograd = row.autograd.as_ref().map(Timing::median);
        println!(
            "{:<28} {:<4} {:>24} {:>5} {tflops:>8.1} {:>6} {:>6} {:>9} {:>7.1} {:>8.1e}",
            case.name,
            row.pass,
            spread(timing),
            timing.runs(),
            gauges.sm_mhz,
            gauges.watts,
            autograd.map_or(String::new(), ms),
            host * 1e6,
            row.error,
        );
        let seqlen = if case.lengths.is_empty() { case.seqlens().0 } else { PACKED };
        let heads = case.heads();
        let line = format!("{:<10} d{:<3} h{heads:<5} {:<6} {}", case.kind(), case.head_dim, case.mask, row.pass);
        self.rates.push(Rate { line, seqlen, tflops });
        self.csv.write(CsvRow {
            peer: "ours",
            dir: &row.pass.to_string(),
            dtype: dtype_of_peers(case.dtype),
            tflops: significant(tflops),
            sm_mhz: gauges.sm_mhz.clone(),
            watts: gauges.watts.clone(),
            err: significant(row.error),
            autograd_ms: autograd.map_or(String::new(), |seconds| significant(seconds * 1e3)),
            host_us: significant(host * 1e6),
            ..CsvRow::timed(case, timing)
        })
    }

    /// Prints the errors of a case that is not timed.
    pub fn checked(&self, case: &Case, errors: &Errors) {
        println!("checked {}: {errors}", case.name);
    }

    /// Prints what queueing `case` takes: forward, backward, and the backward through autograd, in seconds.
    pub fn host(&mut self, case: &Case, [forward, backward, autograd]: [f64; 3]) -> Result<()> {
        let [fwd, bwd, autograd] = [forward, backward, autograd].map(|seconds| seconds * 1e6);
        println!("host, {}: forward {fwd:.1} us, backward {bwd:.1} us, by autograd {autograd:.1} us\n", case.label());
        for (pass, host_us) in [(Pass::Forward, fwd), (Pass::Backward, bwd)] {
            self.csv.write(CsvRow {
                peer: "ours",
                kind: case.name.clone(),
                dir: &pass.to_string(),
                dtype: dtype_of_peers(case.dtype),
                host_us: significant(host_us),
                ..CsvRow::of(case)
            })?;
        }
        Ok(())
    }

    /// Prints the rates as a table, a line for each call and pass and a column for each seqlen.
    pub fn summary(&self) {
        let (mut lines, mut seqlens): (Vec<&str>, Vec<usize>) = (Vec::new(), Vec::new());
        for rate in &self.rates {
            if !lines.contains(&rate.line.as_str()) {
                lines.push(&rate.line);
            }
            seqlens.push(rate.seqlen);
        }
        seqlens.sort_unstable();
        seqlens.dedup();
        if lines.is_empty() {
            return;
        }
        let name =
            |&seqlen: &usize| format!("{:>8}", if seqlen == PACKED { "packed".into() } else { seqlen.to_string() });
        println!("\n{:<34}{}", "TFLOP/s at seqlen", seqlens.iter().map(name).collect::<String>());
        for line in lines {
            let cell = |&seqlen: &usize| {
                let rate = self.rates.iter().find(|rate| rate.line == line && rate.seqlen == seqlen);
                rate.map_or(format!("{:>8}", "-"), |rate| format!("{:>8.0}", rate.tflops))
            };
            println!("{line:<34}{}", seqlens.iter().map(cell).collect::<String>());
        }
    }
}
