//! The gain of each of FlashAttention-2's contributions: `cargo bench --features cuda -- ablations`.
//!
//! Compares our kernels with those of benches/ablations. A variant is our kernel without one contribution, or without
//! all of them (ablations.cu describes each). Variants are not part of the crate: the bench compiles them with nvcc for
//! this GPU. It compares a variant's answer with ours, row by row, and ours with f64. Then it times one launch of each.

mod call;
mod images;

use anyhow::{bail, Context, Result};
use candle_core::DType;
use figures::record::{GRID_TOKENS, GRID_WIDTH};
use figures::{ABLATION, BY_HEADS};
use kernel_build::nvcc::Nvcc;

use self::call::Call;
use self::images::{Images, Kernel, Variant};
use super::gpu::{Cost, Gpu};
use super::report::{dtype_of_peers, Report};
use super::table::Table;
use crate::cases::{Case, Mask, Pass, Peer};
use crate::grid::CHECKED_ROWS;
use crate::inputs::Inputs;
use crate::options::Options;
use crate::peers::{self, Answer};
use crate::rows::{significant, spread, CsvRow};
use crate::sample;

/// The head_dims that ablations.cu has tiles for.
const HEAD_DIMS: [usize; 2] = [64, 128];

const SEQLENS: [usize; 3] = [1024, 4096, 16384];
const QUICK_SEQLEN: usize = 4096;

/// Cases that differ only in the number of heads, by batch and num_heads. At this seqlen a head has many tiles, and one
/// thread block computes all of them in about 20 ms.
const LONG: usize = 8192;
const HEADS: [(usize, usize); 8] = [(1, 1), (1, 2), (1, 4), (1, 8), (1, 16), (2, 16), (4, 16), (8, 16)];

/// The names of these cases start with this.
const HEADS_CASES: &str = "ablations/heads/";

/// The variant that these cases measure.
const HEADS_ONLY: &str = "heads_only";

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
                case(name, "the papers' tokens and width", (GRID_TOKENS / seqlen, GRID_WIDTH / head_dim, seqlen))
            }));
            cases.extend(HEADS.map(|(batch, num_heads)| {
                let name = format!("{HEADS_CASES}d{head_dim}/{mask}/h{}", batch * num_heads);
                let why = "many tiles, but few heads to share out among thread blocks";
                case(name, why, (batch, num_heads, LONG))
            }));
        }
    }
    cases
}

/// Checks and times ours and every variant in each of `cases`. Without nvcc it prints that and does nothing.
///
/// # Errors
/// If the kernels do not compile. After the last case, if any answer was wrong.
pub fn run(cases: &[Case], gpu: &mut Gpu, options: &Options, report: &mut Report) -> Result<()> {
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
        println!("error: ours against f64, ||got - want|| / ||want||; variants against ours, the worst of all rows.");
        println!("Tables: TFLOP/s of ours / of the variant = ratio.\n");
    }
    let mut bench = Bench { images, gpu, options, report, ratios: Vec::new(), failed: Vec::new() };
    for case in cases {
        // After a wrong case the others are still measured.
        if let Err(error) = bench.measure(case) {
            bench.fail(&case.name, &error);
        }
    }
    bench.print_ratios();
    if !bench.failed.is_empty() {
        bail!("{} answers are wrong or missing: {}", bench.failed.len(), bench.failed.join(", "));
    }
    Ok(())
}

/// Whether a case belongs to those that differ only in the number of heads. They are not part of the papers' grid.
fn is_by_heads(case: &Case) -> bool {
    case.name.starts_with(HEADS_CASES)
}

/// The rates of ours and of a variant in one case, in TFLOP/s.
struct Ratio {
    by_heads: bool,
    line: String,
    /// The seqlen, or batch x heads.
    column: usize,
    rates: [f64; 2],
}

/// One run of this part.
struct Bench<'a> {
    images: Images,
    gpu: &'a mut Gpu,
    options: &'a Options,
    report: &'a mut Report,
    ratios: Vec<Ratio>,
    /// The failures so far.
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

        let by_heads = is_by_heads(case);
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

    /// Checks and times a variant. `ours` is our rate.
    fn compare(&mut self, call: &Call, variant: &'static Variant, ours: Option<f64>) -> Result<()> {
        let case = call.case;
        let Some(kernel) = self.images.kernel(case, variant)? else { return Ok(()) };
        let (error, cost) = self.run(call, &kernel)?;
        let (Some(ours), Some(cost)) = (ours, cost) else {
            println!("checked {} {}: the worst row is off by {error:.1e}", case.name, variant.symbol());
            return Ok(());
        };
        let rate = self.record(case, variant.pass, &format!("ablation_{}", variant.name), Some(error), &cost)?;
        let by_heads = is_by_heads(case);
        self.ratios.push(Ratio {
            by_heads,
            line: format!("{:<12} {} d{:<3} {}", variant.name, variant.pass, case.head_dim, case.mask),
            column: if by_heads { case.batch * case.num_heads } else { case.seqlens().0 },
            rates: [ours, rate],
        });
        Ok(())
    }

    /// Prints the tables at the end. The lines of a variant are together.
    fn print_ratios(&mut self) {
        self.ratios.sort_by(|a, b| a.line.cmp(&b.line));
        for (by_heads, title) in [(false, "TFLOP/s and ratio, by seqlen"), (true, "TFLOP/s and ratio, by heads")] {
            let mut table = Table::new(title, (28, 21));
            for Ratio { line, column, rates: [ours, variant], .. } in
                self.ratios.iter().filter(|ratio| ratio.by_heads == by_heads)
            {
                table.add(line.clone(), *column, format!("{ours:.1} / {variant:.1} = {:.2}", ours / variant));
            }
            table.print();
        }
    }

    /// The error of the worst row of a kernel's results, and with `--bench` its time.
    fn run(&mut self, call: &Call, kernel: &Kernel) -> Result<(f64, Option<Cost>)> {
        let work = call.work(kernel, &self.images)?;
        call.launch(kernel, &work)?;
        let error = call.check(kernel, &work)?;
        let timed = || self.gpu.time(self.options.cuda.rep_ms, || call.launch(kernel, &work));
        Ok((error, self.options.bench.then(timed).transpose()?))
    }

    /// Prints and writes a time, and returns its TFLOP/s. The file has only errors against f64, so it has none of the variants.
    fn record(&mut self, case: &Case, pass: Pass, peer: &str, error: Option<f64>, cost: &Cost) -> Result<f64> {
        let Cost { timing, gauges, .. } = cost;
        let tflops = case.papers_flop(pass) / timing.median() / 1e12;
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
            kind: if is_by_heads(case) { BY_HEADS } else { ABLATION }.into(),
            pass: &pass.to_string(),
            dtype: dtype_of_peers(case.dtype),
            tflops: significant(tflops),
            sm_mhz: gauges.sm_mhz.clone(),
            watts: gauges.watts.clone(),
            err: if peer == "ours" { significant(error) } else { String::new() },
            ..CsvRow::of(case).timed(timing)
        })?;
        Ok(tflops)
    }
}
