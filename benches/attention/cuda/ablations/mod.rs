//! What each of FlashAttention-2's contributions is worth: `cargo bench --features cuda -- ablations`.
//!
//! Ours beside the kernels of benches/ablations, which are ours with one contribution taken away, or all of them
//! (ablations.cu says which). They are no part of the crate: nvcc compiles them here, for the GPU at hand. A variant's
//! answer is held against ours, row by row, and ours against f64; then both are timed alike, the launch alone.

mod call;
mod images;

use anyhow::{bail, Context, Result};
use candle_core::DType;
use kernel_build::nvcc::Nvcc;

use self::call::Call;
use self::images::{Images, Kernel, Variant};
use super::gpu::{Cost, Gpu};
use super::report::{dtype_of_peers, flop, Report};
use crate::cases::{Case, Mask, Pass};
use crate::inputs::Inputs;
use crate::peers::{self, Answer, Peer};
use crate::rows::{significant, spread, CsvRow};
use crate::sample;

/// The head sizes that ablations.cu has tiles for.
const HEAD_DIMS: [usize; 2] = [64, 128];

/// The papers' grid: so many tokens and columns, whatever the shape.
const TOKENS: usize = 16384;
const WIDTH: usize = 2048;
const SEQLENS: [usize; 3] = [1024, 4096, 16384];
const QUICK_SEQLEN: usize = 4096;

/// Where only the number of heads differs, by batch and num_heads: long enough that a head has many tiles, short enough
/// that one thread block takes all of them in some 20 ms.
const LONG: usize = 8192;
const HEADS: [(usize, usize); 8] = [(1, 1), (1, 2), (1, 4), (1, 8), (1, 16), (2, 16), (4, 16), (8, 16)];

/// Begins the names of these cases.
const BY_HEADS: &str = "ablations/heads/";

/// The variant that they are about.
const HEADS_ONLY: &str = "heads_only";

/// Queries of each sampled head that ours is checked at.
const CHECKED_ROWS: usize = 16;

/// All cases, in tensors of `dtype`.
pub fn cases(dtype: DType) -> Vec<Case> {
    let mut cases = Vec::new();
    for head_dim in HEAD_DIMS {
        for mask in [Mask::None, Mask::Causal] {
            let case = |name, why, (batch, num_heads, seqlen)| Case {
                batch,
                seqlen_q: Some(seqlen),
                mask,
                checked_rows: CHECKED_ROWS,
                quick: seqlen == QUICK_SEQLEN,
                ..Case::new(name, why, (num_heads, head_dim), dtype)
            };
            cases.extend(SEQLENS.map(|seqlen| {
                let name = format!("ablations/d{head_dim}/{mask}/s{seqlen}");
                case(name, "the papers' tokens and width", (TOKENS / seqlen, WIDTH / head_dim, seqlen))
            }));
            cases.extend(HEADS.map(|(batch, num_heads)| {
                let name = format!("{BY_HEADS}d{head_dim}/{mask}/h{}", batch * num_heads);
                let why = "many tiles, but few heads to share out among thread blocks";
                case(name, why, (batch, num_heads, LONG))
            }));
        }
    }
    cases
}

/// Checks and times ours and every variant over `cases`; says so and does nothing where there is no nvcc.
///
/// # Errors
/// If the kernels do not compile. After the last case, if any answer was wrong.
pub fn run(cases: &[Case], gpu: &mut Gpu, options: &crate::Options, report: &mut Report) -> Result<()> {
    let nvcc = match Nvcc::find() {
        Ok(nvcc) => nvcc,
        Err(error) => {
            println!("SKIPPED: ablations compile kernels, and {error}");
            return Ok(());
        }
    };
    let images = Images::compile(&nvcc, options.cuda.dtype, cases, gpu)?;
    if options.bench {
        println!("ms and TFLOP/s of one launch: of the backward without delta, zeroing and the conversion of dq.");
        println!("error: ours against f64, ||got - want|| / ||want||; variants against ours, the worst of all rows.\n");
    }
    let mut bench = Bench {
        images,
        gpu,
        options,
        report,
        grid: Table::new("TFLOP/s, ours / variant = ratio, by seqlen"),
        by_heads: Table::new("TFLOP/s, ours / variant = ratio, by batch x heads at one seqlen"),
        failed: Vec::new(),
    };
    for case in cases {
        // One wrong case must not cost the others' numbers.
        if let Err(error) = bench.measure(case) {
            bench.fail(&case.name, &error);
        }
    }
    bench.grid.print();
    bench.by_heads.print();
    if !bench.failed.is_empty() {
        bail!("{} answers are wrong or missing: {}", bench.failed.len(), bench.failed.join(", "));
    }
    Ok(())
}

/// What a record calls a case: those by number of heads are no sample of the papers' grid.
fn kind(case: &Case) -> &'static str {
    if case.name.starts_with(BY_HEADS) {
        "ablation_heads"
    } else {
        "ablation"
    }
}

/// One run of this part.
struct Bench<'a> {
    images: Images,
    gpu: &'a mut Gpu,
    options: &'a crate::Options,
    report: &'a mut Report,
    grid: Table,
    by_heads: Table,
    /// What was wrong so far.
    failed: Vec<String>,
}

impl Bench<'_> {
    fn fail(&mut self, what: &str, error: &anyhow::Error) {
        println!("{what} FAILED: {error:#}");
        self.failed.push(what.to_string());
    }

    /// Checks ours against f64, then checks and times ours and the variants of each pass.
    fn measure(&mut self, case: &Case) -> Result<()> {
        let inputs = Inputs::draw_on_device(case, &self.gpu.device)?;
        let operator = Peer::Ours.prepare(case, &inputs)?.operator(case, &inputs.do_)?;
        let o = operator.forward()?;
        let grads = case.passes.contains(&Pass::Backward).then(|| operator.backward(&o)).transpose()?;
        let (answer, lse) = (Answer { o, grads }, peers::lse(case, &inputs)?);
        let errors = sample::check(case, Peer::Ours, &inputs, &answer, &lse)?;
        let call = Call::new(case, &inputs, answer, lse, self.gpu)?;

        let by_heads = case.name.starts_with(BY_HEADS);
        for &pass in &case.passes {
            let ours = Kernel::ours(&call.plan, pass, call.stream.context())?;
            let (_, cost) = self.run(&call, &ours).with_context(|| format!("{pass} of ours, launched by hand"))?;
            let error = if pass == Pass::Forward { Some(errors.o) } else { errors.grads };
            let rate = cost.map(|cost| self.record(case, pass, "ours", error, &cost)).transpose()?;
            for variant in Variant::of(pass).filter(|variant| !by_heads || variant.name == HEADS_ONLY) {
                if let Err(error) = self.compare(&call, variant, rate) {
                    self.fail(&format!("{} {}", case.name, variant.symbol()), &error);
                }
            }
        }
        Ok(())
    }

    /// Checks and times a variant beside the rate of ours.
    fn compare(&mut self, call: &Call, variant: &'static Variant, ours: Option<f64>) -> Result<()> {
        let case = call.case;
        let Some(kernel) = self.images.kernel(case, variant)? else { return Ok(()) };
        let (error, cost) = self.run(call, &kernel)?;
        let (Some(ours), Some(cost)) = (ours, cost) else {
            println!("checked {} {}: the worst row is off by {error:.1e}", case.name, variant.symbol());
            return Ok(());
        };
        let rate = self.record(case, variant.pass, &format!("ablation_{}", variant.name), Some(error), &cost)?;
        let line = format!("{:<12} {} d{:<3} {}", variant.name, variant.pass, case.head_dim, case.mask);
        if case.name.starts_with(BY_HEADS) {
            self.by_heads.add(line, case.batch * case.num_heads, [ours, rate]);
        } else {
            self.grid.add(line, case.seqlens().0, [ours, rate]);
        }
        Ok(())
    }

    /// The worst row of what a kernel computes, and with `--bench` its time.
    fn run(&mut self, call: &Call, kernel: &Kernel) -> Result<(f64, Option<Cost>)> {
        let work = call.work(kernel, &self.images)?;
        call.launch(kernel, &work)?;
        let error = call.check(kernel, &work, &self.images)?;
        let timed = || self.gpu.time(self.options.cuda.rep_ms, || call.launch(kernel, &work));
        Ok((error, self.options.bench.then(timed).transpose()?))
    }

    /// Prints and writes a time, and gives back its TFLOP/s. In the file, errors are against f64: only ours has one.
    fn record(&mut self, case: &Case, pass: Pass, peer: &str, error: Option<f64>, cost: &Cost) -> Result<f64> {
        let Cost { timing, gauges, .. } = cost;
        let tflops = flop(case, pass) / timing.median() / 1e12;
        let error = error.context("a case with a backward has checked gradients")?;
        println!(
            "{:<22} {pass:<4} {peer:<20} {:>24} ms {:>4} runs {tflops:>7.1} TFLOP/s {:>5} MHz {:>5} W, error {error:.1e}",
            case.name,
            spread(timing),
            timing.runs(),
            gauges.sm_mhz,
            gauges.watts,
        );
        self.report.keep(CsvRow {
            peer,
            kind: kind(case).into(),
            dir: &pass.to_string(),
            dtype: dtype_of_peers(case.dtype),
            tflops: significant(tflops),
            sm_mhz: gauges.sm_mhz.clone(),
            watts: gauges.watts.clone(),
            err: if peer == "ours" { significant(error) } else { String::new() },
            ..CsvRow::timed(case, timing)
        })?;
        Ok(tflops)
    }
}

/// Rates of ours and of variants: a line for each variant, pass, head_dim and mask.
struct Table {
    title: &'static str,
    cells: Vec<Cell>,
}

struct Cell {
    line: String,
    column: usize,
    /// TFLOP/s of ours and of the variant.
    rates: [f64; 2],
}

impl Table {
    fn new(title: &'static str) -> Self {
        Self { title, cells: Vec::new() }
    }

    fn add(&mut self, line: String, column: usize, rates: [f64; 2]) {
        self.cells.push(Cell { line, column, rates });
    }

    fn print(&self) {
        let mut lines: Vec<&str> = self.cells.iter().map(|cell| cell.line.as_str()).collect();
        lines.sort_unstable();
        lines.dedup();
        let mut columns: Vec<usize> = self.cells.iter().map(|cell| cell.column).collect();
        columns.sort_unstable();
        columns.dedup();
        if lines.is_empty() {
            return;
        }
        let heads: String = columns.iter().map(|column| format!("{column:>22}")).collect();
        println!("\n{}\n{:<28}{heads}", self.title, "");
        for line in lines {
            let cell = |&column: &usize| {
                let cell = self.cells.iter().find(|cell| cell.line == line && cell.column == column);
                let text = cell.map(|Cell { rates: [ours, variant], .. }| {
                    format!("{ours:.1} / {variant:.1} = {:.2}", ours / variant)
                });
                format!("{:>22}", text.as_deref().unwrap_or("-"))
            };
            println!("{line:<28}{}", columns.iter().map(cell).collect::<String>());
        }
    }
}
