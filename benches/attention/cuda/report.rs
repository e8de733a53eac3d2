//! Prints rows, writes them as CSV, and prints tables of them at the end.

use std::path::Path;

use anyhow::Result;
use candle_core::DType;
use figures::claims::{claims, Claim};
use figures::record::{Record, OUT_OF_MEMORY, UNCOUNTABLE};

use super::gpu::Cost;
use super::table::{Table, PACKED};
use crate::cases::{Case, Pass, Peer};
use crate::rows::{gib, mib, ms, significant, spread, Csv, CsvRow};
use crate::sample::Errors;
use crate::timing::Timing;

/// One pass of one case.
pub struct Row {
    pub pass: Pass,
    pub cost: Cost,
    /// The same backward through Candle's autograd.
    pub autograd: Option<Timing>,
    /// The largest relative error of the results of the pass.
    pub error: f64,
}

/// How a pass of a peer ended.
pub enum Outcome {
    Done(Done),
    /// About how many bytes it needs, if it was not even tried.
    OutOfMemory(Option<usize>),
    /// Candle's kernels cannot count the scores.
    Uncountable,
}

pub struct Done {
    /// `None` if it was not timed.
    pub cost: Option<Cost>,
    /// The largest relative error of the results of the pass; `None` if it was not checked.
    pub error: Option<f64>,
    pub peak_bytes: usize,
}

impl Done {
    /// The median time of a run. `None` if it was not timed.
    pub fn seconds(&self) -> Option<f64> {
        self.cost.as_ref().map(|cost| cost.timing.median())
    }
}

/// Everything measured so far.
pub struct Report {
    csv: Csv,
    /// By [`Summary`].
    tables: [Table; 5],
    /// The rows of this run, in the columns of benches/record.
    rows: csv::Writer<Vec<u8>>,
    /// TFLOP/s that the GPU's data sheet promises.
    data_sheet: Option<f64>,
}

/// The tables at the end, in their order.
#[derive(Clone, Copy)]
enum Summary {
    Rates,
    Bandwidths,
    Times,
    Peaks,
    Sweep,
}

impl Summary {
    const TITLES: [&str; 5] = [
        "TFLOP/s at seqlen",
        "GB/s at seqlen of the keys",
        "standard's time over ours at seqlen",
        "MiB at the peak, at seqlen",
        "MiB at the peak of one sequence of",
    ];
}

/// The name of a type in a record. f16 and f32 are called fp16 and fp32 there, as in PyTorch.
pub fn dtype_of_peers(dtype: DType) -> &'static str {
    match dtype {
        DType::F16 => "fp16",
        DType::F32 => "fp32",
        other => other.as_str(),
    }
}

fn dtype_of_case(case: &Case) -> &'static str {
    if case.tf32 {
        "tf32"
    } else {
        dtype_of_peers(case.dtype)
    }
}

/// The start of a line of a table, before the pass.
fn line(name: &str, case: &Case) -> String {
    format!("{name:<10} {:<4} d{:<7} h{:<5} {:<6}", case.precision(), case.head_dims(), case.heads(), case.mask)
}

impl Report {
    /// # Errors
    /// If `csv` cannot be created; a file that is already there is replaced.
    pub fn new(csv: Option<&Path>, data_sheet: Option<f64>) -> Result<Self> {
        let tables = Summary::TITLES.map(|title| Table::new(title, (52, 11)));
        Ok(Self { csv: Csv::create(csv)?, tables, rows: csv::Writer::from_writer(Vec::new()), data_sheet })
    }

    /// Keeps a row for the claims and writes it as CSV. Every measurement goes through here.
    pub fn keep(&mut self, row: CsvRow) -> Result<()> {
        self.rows.serialize(&row)?;
        self.csv.write(row)
    }

    /// Prints what the columns mean.
    pub fn rules(&self) {
        println!(
            "FLOP: forward 4 * head_dim * heads * pairs of query and key, half if causal; backward 2.5 times that."
        );
        match self.data_sheet {
            Some(tflops) => println!("peak: {tflops:.0} TFLOP/s by the data sheet, dense, sums in f32."),
            None => println!("peak: not known for this GPU (crates/figures/src/data_sheet.rs lists GPUs)."),
        }
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
        println!(
            "MiB: the most that was allocated at once beyond what was before the pass. standard: Candle's matmul,"
        );
        println!(
            "    softmax, matmul; fwd+bwd goes through Candle's autograd for both. GB/s: q, k, v and o, each once."
        );
    }

    /// Prints the names of the columns of [`Self::row`].
    pub fn head(&self) {
        println!(
            "\n{:<34} {:<4} {:>24} {:>5} {:>8} {:>5} {:>6} {:>6} {:>6} {:>9} {:>7} {:>8}",
            "", "", "ms (min .. max)", "runs", "TFLOP/s", "peak", "GB/s", "MHz", "W", "autograd", "host", "error"
        );
    }

    /// Prints a row, and keeps it for the tables.
    pub fn row(&mut self, case: &Case, row: &Row) -> Result<()> {
        let Cost { timing, host_s, gauges } = &row.cost;
        let tflops = case.papers_flop(row.pass) / timing.median() / 1e12;
        let decodes = row.pass == Pass::Forward && case.seqlens().0 == 1;
        let gbps = decodes.then(|| case.forward_bytes() / timing.median() / 1e9);
        let autograd = row.autograd.as_ref().map(Timing::median);
        println!(
            "{:<34} {:<4} {:>24} {:>5} {tflops:>8.1} {:>5} {:>6} {:>6} {:>6} {:>9} {:>7.1} {:>8.1e}",
            case.name,
            row.pass,
            spread(timing),
            timing.runs(),
            self.of_peak(tflops),
            gbps.map_or(String::new(), |gbps| format!("{gbps:.0}")),
            gauges.sm_mhz,
            gauges.watts,
            autograd.map_or(String::new(), ms),
            host_s * 1e6,
            row.error,
        );
        match gbps {
            Some(gbps) => {
                let line = format!("{} b{}", line(&case.kind(), case), case.batch);
                self.cell(Summary::Bandwidths, line, case.seqlens().1, format!("{gbps:.0}"));
            }
            None => {
                let seqlen = if case.lengths.is_empty() { case.seqlens().0 } else { PACKED };
                let line = format!("{} {}", line(&case.kind(), case), row.pass);
                self.cell(Summary::Rates, line, seqlen, format!("{tflops:.0}"));
            }
        }
        self.keep(CsvRow {
            peer: "ours",
            pass: &row.pass.to_string(),
            dtype: dtype_of_case(case),
            tflops: significant(tflops),
            gbps: gbps.map_or(String::new(), significant),
            sm_mhz: gauges.sm_mhz.clone(),
            watts: gauges.watts.clone(),
            err: significant(row.error),
            autograd_ms: autograd.map_or(String::new(), |seconds| significant(seconds * 1e3)),
            host_us: significant(host_s * 1e6),
            ..CsvRow::of(case).timed(timing)
        })
    }

    /// Prints how a pass of each peer ended, and keeps it for the tables.
    pub fn outcomes(&mut self, case: &Case, pass: Pass, outcomes: &[(Peer, &Outcome)]) -> Result<()> {
        let ours = outcomes.iter().find_map(|(peer, outcome)| match outcome {
            Outcome::Done(done) if *peer == Peer::Ours => Some(done),
            _ => None,
        });
        for &(peer, outcome) in outcomes {
            let (shown, peak_mib) = match outcome {
                Outcome::Done(done) => (self.done(case, pass, done, ours), significant(mib(done.peak_bytes))),
                Outcome::OutOfMemory(needed) => {
                    let needed = needed.map_or(String::new(), |bytes| format!(": needs about {:.0} GiB", gib(bytes)));
                    (format!("out of memory{needed}"), OUT_OF_MEMORY.to_string())
                }
                Outcome::Uncountable => {
                    let scores = case.scores() as f64;
                    (format!("cannot: {scores:.1e} scores are more than Candle's kernels count"), UNCOUNTABLE.into())
                }
            };
            println!("{:<30} {pass:<7} {peer:<8} {shown}", case.name);
            let kind = if pass == Pass::Memory { "memory" } else { "standard" };
            let row = CsvRow {
                peer: &peer.to_string(),
                kind: kind.to_string(),
                pass: &(if pass == Pass::Forward { pass } else { Pass::Both }).to_string(),
                dtype: dtype_of_case(case),
                peak_mib: peak_mib.clone(),
                ..CsvRow::of(case)
            };
            let (seqlen, peer) = (case.seqlens().0, peer.to_string());
            match outcome {
                Outcome::Done(Done { cost: Some(cost), error, .. }) => self.keep(CsvRow {
                    tflops: significant(case.papers_flop(pass) / cost.timing.median() / 1e12),
                    sm_mhz: cost.gauges.sm_mhz.clone(),
                    watts: cost.gauges.watts.clone(),
                    err: error.map_or(String::new(), significant),
                    host_us: significant(cost.host_s * 1e6),
                    ..row.timed(&cost.timing)
                })?,
                _ => self.keep(row)?,
            }
            let peak = peak_mib.parse().map_or(peak_mib, |mib: f64| format!("{mib:.0}"));
            let passes = if pass == Pass::Memory { Pass::Both } else { pass };
            let table = if pass == Pass::Memory { Summary::Sweep } else { Summary::Peaks };
            self.cell(table, format!("{} {passes:<7} {peer}", line(kind, case)), seqlen, peak);
        }
        if let Some((ours, theirs)) = ours.zip(outcomes.iter().find(|(peer, _)| *peer == Peer::Standard)) {
            let ratio = match theirs.1 {
                Outcome::Done(theirs) => theirs.seconds().zip(ours.seconds()).map(|(a, b)| format!("{:.1}x", a / b)),
                Outcome::OutOfMemory(_) if pass != Pass::Memory => Some(OUT_OF_MEMORY.to_string()),
                _ => None,
            };
            if let Some(ratio) = ratio {
                self.cell(Summary::Times, format!("{} {pass}", line("standard", case)), case.seqlens().0, ratio);
            }
        }
        Ok(())
    }

    /// The text about one pass, with the ratios to `ours`.
    fn done(&self, case: &Case, pass: Pass, done: &Done, ours: Option<&Done>) -> String {
        let theirs = ours.filter(|ours| !std::ptr::eq(*ours, done));
        let mut text = String::new();
        if let Some(cost) = &done.cost {
            let tflops = case.papers_flop(pass) / cost.timing.median() / 1e12;
            text += &format!("{:>24} ms, {:>3} runs, {tflops:>6.1} TFLOP/s", spread(&cost.timing), cost.timing.runs());
            text += &format!(" {:>4}, ", self.of_peak(tflops));
        }
        let tokens = (case.batch * case.seqlens().0) as f64;
        let peak = done.peak_bytes as f64;
        text += &format!("{:>9.1} MiB, {:>6.0} bytes per token", mib(done.peak_bytes), peak / tokens);
        if let Some(error) = done.error {
            text += &format!(", error {error:.1e}");
        }
        if let Some(ours) = theirs {
            let time = done.seconds().zip(ours.seconds());
            text += &time.map_or(String::new(), |(theirs, ours)| format!("; {:.1}x the time", theirs / ours));
            text += &format!("; {:.1}x the memory of ours", peak / ours.peak_bytes as f64);
        }
        text
    }

    /// A rate as a share of the data sheet's.
    fn of_peak(&self, tflops: f64) -> String {
        self.data_sheet.map_or(String::new(), |peak| format!("{:.0}%", 100.0 * tflops / peak))
    }

    fn cell(&mut self, table: Summary, line: String, seqlen: usize, text: String) {
        self.tables[table as usize].add(line, seqlen, text);
    }

    /// Prints the errors of a case that is not timed.
    pub fn checked(&self, case: &Case, errors: &Errors) {
        println!("checked {}: {errors}", case.name);
    }

    /// Prints the rates of a product of two square matrices of `size` rows, and of a copy of `bytes`.
    pub fn ceiling(
        &mut self,
        dtype: DType,
        (size, product): (usize, &Cost),
        (bytes, copy): (usize, &Cost),
    ) -> Result<()> {
        let tflops = 2.0 * (size as f64).powi(3) / product.timing.median() / 1e12;
        // The copy reads and writes each byte.
        let gbps = 2.0 * bytes as f64 / copy.timing.median() / 1e9;
        let dtype = dtype_of_peers(dtype);
        println!(
            "matmul, {dtype}, {size} x {size} x {size}: {} ms, {tflops:.0} TFLOP/s {}; copy: {gbps:.0} GB/s",
            spread(&product.timing),
            self.of_peak(tflops),
        );
        let row = |cost: &Cost| CsvRow {
            peer: "ceiling",
            pass: "fwd",
            dtype,
            sm_mhz: cost.gauges.sm_mhz.clone(),
            watts: cost.gauges.watts.clone(),
            ..CsvRow::default().timed(&cost.timing)
        };
        let (seqlen_q, seqlen_k) = (size, size);
        let kind = format!("matmul{size}");
        self.keep(CsvRow { kind, seqlen_q, seqlen_k, tflops: significant(tflops), ..row(product) })?;
        self.keep(CsvRow { kind: "memcpy".into(), gbps: significant(gbps), ..row(copy) })
    }

    /// Prints what the first forward and the first backward of the process take, in seconds.
    pub fn first_calls(&mut self, case: &Case, seconds: [f64; 2]) -> Result<()> {
        let [forward, backward] = seconds.map(|seconds| seconds * 1e3);
        println!("first call, {}: forward {forward:.1} ms, backward {backward:.1} ms", case.label());
        for (pass, ms) in [(Pass::Forward, forward), (Pass::Backward, backward)] {
            self.keep(CsvRow {
                peer: "ours",
                kind: "first_call".into(),
                pass: &pass.to_string(),
                dtype: dtype_of_case(case),
                ms: significant(ms),
                reps: Some(1),
                ..CsvRow::of(case)
            })?;
        }
        Ok(())
    }

    /// Prints what queueing `case` takes: forward, backward, and the backward through autograd, in seconds.
    pub fn host(&mut self, case: &Case, seconds: [f64; 3]) -> Result<()> {
        let [fwd, bwd, autograd] = seconds.map(|seconds| seconds * 1e6);
        println!("host, {}: forward {fwd:.1} us, backward {bwd:.1} us, by autograd {autograd:.1} us", case.label());
        for (pass, host_us) in [(Pass::Forward, fwd), (Pass::Backward, bwd)] {
            self.keep(CsvRow {
                peer: "ours",
                kind: case.name.clone(),
                pass: &pass.to_string(),
                dtype: dtype_of_case(case),
                host_us: significant(host_us),
                ..CsvRow::of(case)
            })?;
        }
        Ok(())
    }

    /// Prints the tables, a line for each call and pass and a column for each seqlen, and the papers' claims.
    pub fn summary(self) -> Result<()> {
        self.tables.iter().for_each(Table::print);
        let rows = String::from_utf8(self.rows.into_inner()?)?;
        let record = Record::read([rows.as_str()])?;
        for (i, Claim { paper, here, place, holds }) in claims(&record, self.data_sheet).into_iter().enumerate() {
            if i == 0 {
                println!("\n{:<85} {:>20}  {:<6} where", "claims", "here", "holds");
            }
            let holds = holds.map_or("-", |holds| if holds { "yes" } else { "no" });
            println!("{paper:<85} {here:>20}  {holds:<6} {place}");
        }
        Ok(())
    }
}
