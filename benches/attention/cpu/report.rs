//! Prints rows, writes them as CSV, and compares them with the targets.

use std::path::Path;

use anyhow::Result;

use super::machine::Gemm;
use super::targets::Target;
use crate::cases::{row_name, Case, Pass, Peer};
use crate::check::Checked;
use crate::rows::{mib, significant, spread, Csv, CsvRow};
use crate::timing::Timing;

/// One measurement.
pub struct Row {
    pub peer: Peer,
    pub pass: Pass,
    pub threads: usize,
    /// Size of its own pool, if the case asks for one.
    pub own_threads: Option<usize>,
    pub value: Value,
    pub checked: Checked,
}

impl Row {
    /// The largest error of the results of its pass: o, or dq, dk and dv.
    fn error(&self) -> Option<f64> {
        match self.pass {
            Pass::Forward => Some(self.checked.o_error),
            _ => self.checked.grad_error,
        }
    }
}

pub enum Value {
    Time {
        timing: Timing,
        /// The gemm on as many threads, in the same rounds.
        gemm: Timing,
    },
    Bytes(usize),
}

impl Value {
    /// Seconds or bytes.
    fn amount(&self) -> f64 {
        match self {
            Value::Time { timing, .. } => timing.median(),
            Value::Bytes(bytes) => *bytes as f64,
        }
    }
}

/// Everything measured so far.
pub struct Report {
    /// Name, amount, and share of the gemm rate if it is a time.
    results: Vec<(String, f64, Option<f64>)>,
    csv: Csv,
}

impl Report {
    /// # Errors
    /// If `csv` cannot be created; a file that is already there is replaced.
    pub fn new(csv: Option<&Path>) -> Result<Self> {
        Ok(Self { results: Vec::new(), csv: Csv::create(csv)? })
    }

    /// Prints the gemm rate on all threads and on one, and keeps it as CSV.
    pub fn ceiling(&mut self, timings: &[(usize, Timing)]) -> Result<()> {
        println!("gemm: a {0} x {0} x {0} f32 product", Gemm::SIZE);
        for (index, (threads, timing)) in timings.iter().enumerate() {
            let rate = Gemm::FLOP / timing.median();
            println!("    threads {threads:>3}: {:>6.1} GFLOP/s, {} ms", rate / 1e9, spread(timing));
            let threads = if index == 0 { String::new() } else { format!("_threads{threads}") };
            self.csv.write(CsvRow {
                peer: "ceiling",
                kind: format!("matmul{}{threads}", Gemm::SIZE),
                pass: "fwd",
                dtype: "f32",
                seqlen_q: Gemm::SIZE,
                seqlen_k: Gemm::SIZE,
                tflops: significant(rate / 1e12),
                ..CsvRow::default().timed(timing)
            })?;
        }
        Ok(())
    }

    /// Prints what the columns mean.
    pub fn rules(&self) {
        println!("FLOP: forward 4 * head_dim * visible pairs of query and key, per head; backward 2.5 times that.");
        println!(
            "of gemm: against that product on as many threads, timed again in the same rounds as the rows below it."
        );
        println!("Times are medians; fwd+bwd and bwd go through Candle's autograd. vs ours: a peer's time over ours.");
        println!("error: the largest one against f64, of o (fwd) or of dq, dk and dv; a wrong answer ends the run.");
        println!("waited: share of the time in which threads had no core to run on; above a few %, run again.");
    }

    /// Prints the case, its gemm rates, and its rows; keeps them for the targets.
    pub fn case(&mut self, case: &Case, rows: &[Row]) -> Result<()> {
        println!("\n{}: {}\n    {}", case.name, case.label(), case.why);
        let mut gemms: Vec<(usize, &Timing)> = Vec::new();
        for row in rows {
            match &row.value {
                Value::Time { gemm, .. } if gemms.iter().all(|&(threads, _)| threads != row.threads) => {
                    gemms.push((row.threads, gemm));
                }
                _ => {}
            }
        }
        if !gemms.is_empty() {
            println!(
                "    {:<20} {:>7} {:>23} {:>5} {:>7} {:>9} {:>8} {:>8} {:>8}",
                "", "threads", "ms (min .. max)", "runs", "waited", "GFLOP/s", "of gemm", "vs ours", "error"
            );
            for (threads, timing) in gemms {
                let rate = Gemm::FLOP / timing.median() / 1e9;
                println!(
                    "    {:<20} {threads:>7} {:>23} {:>5} {:>7} {rate:>9.1}",
                    "gemm",
                    spread(timing),
                    timing.runs(),
                    waited(timing)
                );
            }
        }
        for row in rows {
            let ours =
                |other: &&Row| other.peer == Peer::Ours && other.pass == row.pass && other.threads == row.threads;
            let ratio = rows.iter().find(ours).filter(|ours| ours.peer != row.peer);
            let ratio = ratio.map_or(String::new(), |ours| format!("{:.2}x", row.value.amount() / ours.value.amount()));
            self.row(case, row, &ratio)?;
        }
        for row in rows {
            let share = match &row.value {
                Value::Time { timing, gemm } => {
                    Some(case.flop(row.pass) / timing.median() * gemm.median() / Gemm::FLOP)
                }
                Value::Bytes(_) => None,
            };
            let name = row_name(&case.name, row.peer, row.pass, row.own_threads);
            self.results.push((name, row.value.amount(), share));
        }
        Ok(())
    }

    /// Prints that a row is missing, and why.
    pub fn left_out(&self, case: &Case, peer: Peer, why: &str) {
        println!("\n{} {peer}: not run, {why}", case.name);
    }

    fn row(&mut self, case: &Case, row: &Row, ratio: &str) -> Result<()> {
        let name = format!("{} {}", row.peer, row.pass);
        let error = row.error().map_or(String::new(), |error| format!("{error:.0e}"));
        match &row.value {
            Value::Time { timing, gemm } => {
                let threads = row.threads;
                let rate = case.flop(row.pass) / timing.median();
                let share = 100.0 * rate / (Gemm::FLOP / gemm.median());
                println!(
                    "    {name:<20} {threads:>7} {:>23} {:>5} {:>7} {:>9.1} {share:>7.0}% {ratio:>8} {error:>8}",
                    spread(timing),
                    timing.runs(),
                    waited(timing),
                    rate / 1e9,
                );
                self.time_csv(case, row, timing)
            }
            Value::Bytes(bytes) => {
                let tokens = case.sequences().iter().map(|sequence| sequence.seqlen_q).sum::<usize>();
                let (peak, per_token) = (mib(*bytes), *bytes as f64 / tokens as f64);
                let line =
                    format!("{name:<20} {peak:>9.2} MiB at the peak, {per_token:>7.0} bytes per token {ratio:>8}");
                println!("    {}", line.trim_end());
                self.csv.write(CsvRow {
                    peer: &row.peer.to_string(),
                    kind: "memory".into(),
                    pass: &Pass::Both.to_string(),
                    peak_mib: significant(peak),
                    ..CsvRow::of(case)
                })
            }
        }
    }

    fn time_csv(&mut self, case: &Case, row: &Row, timing: &Timing) -> Result<()> {
        let (peer, pass) = (row.peer.to_string(), row.pass.to_string());
        // A record has no column for threads, so they go into the kind.
        let threads = row.own_threads.map_or(String::new(), |threads| format!("_threads{threads}"));
        let bytes = (row.pass == Pass::Forward && case.seqlens().0 == 1).then(|| case.forward_bytes());
        self.csv.write(CsvRow {
            peer: &peer,
            kind: case.kind() + &threads,
            pass: &pass,
            tflops: significant(case.flop(row.pass) / timing.median() / 1e12),
            gbps: bytes.map_or(String::new(), |bytes| significant(bytes / timing.median() / 1e9)),
            err: row.error().map_or(String::new(), significant),
            ..CsvRow::of(case).timed(timing)
        })
    }

    /// Prints each target of the chosen `cases`: reached, missed by how much, or not measured.
    pub fn targets(&self, targets: &[Target], cases: &[Case]) {
        let result = |name: &String| self.results.iter().find(|(row, ..)| row == name);
        let rows: Vec<String> = cases.iter().flat_map(Case::rows).collect();
        let mut lines = Vec::new();
        for target in targets.iter().filter(|target| target.names().all(|name| rows.contains(name))) {
            let got = match (&target.ratio, &target.gemm_share) {
                (Some([above, below]), _) => {
                    result(above).zip(result(below)).map(|((_, above, _), (_, below, _))| above / below)
                }
                (None, Some(row)) => result(row).and_then(|(.., share)| *share),
                (None, None) => None,
            };
            lines.push(match got {
                Some(got) => verdict(target, got),
                None => format!("{:<70} not measured: a peer was left out", target.what),
            });
        }
        if !lines.is_empty() {
            println!("\ntargets");
            lines.iter().for_each(|line| println!("    {line}"));
        }
    }
}

/// One line on a target.
fn verdict(target: &Target, got: f64) -> String {
    let percent = target.gemm_share.is_some();
    let show = |value: f64| if percent { format!("{:.0}%", 100.0 * value) } else { format!("{value:.3}x") };
    let (bound, aim, missed_by) = match (target.at_least, target.at_most) {
        (Some(aim), _) => ("at least", aim, 1.0 - got / aim),
        (_, aim) => ("at most", aim.unwrap_or(f64::INFINITY), got / aim.unwrap_or(f64::INFINITY) - 1.0),
    };
    let reached = if missed_by <= 0.0 { "reached".to_owned() } else { format!("missed by {:.0}%", 100.0 * missed_by) };
    let stretch = target.stretch.map_or(String::new(), |stretch| {
        let reached = if target.at_least.is_some() { got >= stretch } else { got <= stretch };
        format!("; stretch {}: {}", show(stretch), if reached { "reached" } else { "not yet" })
    });
    format!("{:<70} {:>8}, {bound} {}: {reached}{stretch}", target.what, show(got), show(aim))
}

/// The share of the time in which the threads waited for a core.
fn waited(timing: &Timing) -> String {
    timing.waited.map_or(String::new(), |waited| format!("{:.0}%", 100.0 * waited))
}
