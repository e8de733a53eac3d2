//! Attention, timed: on the CPU beside what Candle has without this crate, on a GPU over the papers' grid.
//!
//! ```text
//! cargo bench                          every case of benches/cases.toml, in 2 to 3 minutes on 2 cores
//! cargo bench -- --quick               the reference case alone
//! cargo bench -- causal decode         the cases whose name or call contains one of these words
//! cargo bench -- --csv FILE            rows in the columns of benches/record, too
//! cargo bench -- --plots DIR --from A.csv B.csv    draws such rows, ours and others', and measures nothing
//! cargo test --bench attention         only checks the answers
//! ```
//!
//! With the feature `cuda` the GPU takes the CPU's place, and the same options choose from the cases of benches/cuda.toml.
//! They come in parts. A word that is the name of a part runs that part, any other word chooses among the cases of the
//! parts that run; there are a few more options (`--help`):
//!
//! ```text
//! cargo bench --features cuda                              every part, in seven to eight minutes on an H100
//! cargo bench --features cuda -- --list                    the parts, their cases, and why each is there
//! cargo bench --features cuda -- --quick                   a handful of cases
//! cargo bench --features cuda -- standard memory           these two parts
//! cargo bench --features cuda -- grid d128 --dirs fwd      of the papers' grid, forward only, head_dim 128
//! cargo bench --features cuda -- --device cpu              the CPU's cases
//! ```
//!
//! ```text
//! host       time to the first call, and what a call costs the host
//! ceiling    the rate of a large matrix product, and of a copy in memory
//! grid       the grid of the papers, and head sizes between
//! gqa        query heads that share key heads
//! packed     sequences of uneven lengths end to end
//! f16        some of the grid in f16
//! decode     one query against a cache of keys, in GB/s
//! ablations  beside kernels without FlashAttention-2's contributions; needs nvcc
//! standard   beside Candle's matmul, softmax, matmul: time and peak memory
//! memory     the peak of forward and backward against the length of the sequence
//! ```
//!
//! At the end the claims of the papers are held against what was measured.
//!
//! Each answer is checked against naive attention in f64 before it is timed; a wrong one fails the run. A missed target is
//! printed and is no error: it depends on the machine.

mod cases;
mod check;
#[cfg(feature = "cuda")]
mod cuda;
mod filters;
mod grid;
mod inputs;
mod machine;
mod memory;
mod peers;
mod report;
mod rows;
mod sample;
mod timing;

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::{ensure, Context, Result};
use candle_core::{DType, Device, Tensor};
use clap::Parser;
use rayon::ThreadPool;

use crate::cases::{Case, Cases, Pass};
use crate::check::{Checked, Reference};
use crate::inputs::Inputs;
use crate::machine::Gemm;
use crate::peers::{Contender, Peer};
use crate::report::{Report, Row, Value};
use crate::timing::{in_turns, seconds, Job};

#[global_allocator]
static ALLOCATOR: memory::Counting = memory::Counting;

#[derive(Parser)]
#[command(
    name = "cargo bench --",
    about = "Times attention; benches/cases.toml and benches/cuda.toml say what and why."
)]
struct Options {
    /// Only cases whose name or call contains one of these; on a GPU also names of parts, which --list prints
    filters: Vec<String>,
    /// Only the reference case; on a GPU a handful
    #[arg(long)]
    quick: bool,
    /// Also write the times as CSV to this file, which is replaced
    #[arg(long, value_name = "FILE")]
    csv: Option<PathBuf>,
    /// Draw the rows of this run as figures into this folder; without --csv they are kept there as rows.csv
    #[arg(long, value_name = "DIR")]
    plots: Option<PathBuf>,
    /// Draw the rows of these files instead, and measure nothing: runs on a GPU, benches/peers.py
    #[arg(long, value_name = "FILE", num_args = 1.., requires = "plots", conflicts_with_all = ["csv", "list", "filters"])]
    from: Vec<PathBuf>,
    /// Print the names of the cases, and why each is there
    #[arg(long)]
    list: bool,
    /// `cargo bench` says so; without it only the answers are checked
    #[arg(long, hide = true)]
    bench: bool,
    /// Where attention is computed
    #[cfg(feature = "cuda")]
    #[arg(long, value_name = "DEVICE", default_value = "cuda")]
    device: Where,
    #[cfg(feature = "cuda")]
    #[command(flatten)]
    cuda: cuda::CudaOptions,
}

#[cfg(feature = "cuda")]
#[derive(Clone, Copy, PartialEq, clap::ValueEnum)]
enum Where {
    Cpu,
    Cuda,
}

impl Options {
    /// Whether `case` is to run, if `filters` are the words that choose among cases.
    fn wants(&self, case: &Case, filters: &[String]) -> bool {
        (!self.quick || case.quick) && (filters.is_empty() || filters.iter().any(|filter| case.contains(filter)))
    }

    /// What an error calls a case of `file` that may run.
    fn case_of(&self, file: &str) -> String {
        format!("{}case of {file}", if self.quick { "quick " } else { "" })
    }
}

fn main() -> ExitCode {
    let mut options = Options::parse();
    if let (Some(plots), None) = (&options.plots, &options.csv) {
        options.csv = Some(plots.join("rows.csv"));
    }
    let result = if options.from.is_empty() { measured(&options) } else { Ok(()) };
    // What failed must not cost the others their figures.
    let drawn =
        if result.is_ok() || options.csv.as_ref().is_some_and(|csv| csv.is_file()) { draw(&options) } else { Ok(()) };
    match result.and(drawn) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Runs what the options ask for, on the device that they name.
fn measured(options: &Options) -> Result<()> {
    if let Some(plots) = &options.plots {
        std::fs::create_dir_all(plots).with_context(|| plots.display().to_string())?;
    }
    #[cfg(feature = "cuda")]
    if options.device == Where::Cuda {
        return cuda::run(options);
    }
    run(options)
}

/// Draws the rows that were asked for, if any were.
fn draw(options: &Options) -> Result<()> {
    let Some(plots) = options.plots.as_deref().filter(|_| options.bench && !options.list) else { return Ok(()) };
    let files = if options.from.is_empty() { options.csv.as_slice() } else { &options.from };
    let read = |file: &PathBuf| std::fs::read_to_string(file).with_context(|| file.display().to_string());
    let texts = files.iter().map(read).collect::<Result<Vec<_>>>()?;
    let record = figures::record::Record::read(texts.iter().map(String::as_str))?;
    let name = |file: &PathBuf| file.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let names: Vec<String> = files.iter().map(name).collect();
    let drawn = figures::of_record(&record, &format!("From {}", names.join(", ")))?;
    ensure!(!drawn.is_empty(), "{} has no rows that a figure shows", names.join(", "));
    figures::save(plots, &drawn)?;
    for (name, _) in &drawn {
        println!("{}", plots.join(name).with_extension("svg").display());
    }
    Ok(())
}

/// Prints the names of `cases`, and why each is there.
fn list<'a>(cases: impl IntoIterator<Item = &'a Case>) {
    cases.into_iter().for_each(|case| println!("{:<22} {:<34} {}", case.name, case.label(), case.why));
}

/// Checks and times the chosen cases on the CPU.
fn run(options: &Options) -> Result<()> {
    let Cases { cases, targets } = Cases::parse(include_str!("../cases.toml"))?;
    let cases: Vec<Case> = cases.into_iter().filter(|case| options.wants(case, &[])).collect();
    let names: Vec<&str> = cases.iter().map(|case| case.name.as_str()).collect();
    let known = format!("there are {}; --list says what each is", names.join(", "));
    let chooses = |word: &str| cases.iter().any(|case| case.contains(word));
    filters::check(&options.filters, chooses, &options.case_of("benches/cases.toml"), &known)?;
    let cases: Vec<Case> = cases.into_iter().filter(|case| options.wants(case, &options.filters)).collect();
    if options.list {
        list(&cases);
        return Ok(());
    }
    println!("{}", machine::describe());
    if !options.bench {
        // Of what times a GPU, the part that needs none.
        for dtype in [DType::BF16, DType::F16] {
            let cases = grid::cases(dtype)?.len();
            let errors = sample::prove(dtype).with_context(|| format!("check of benches/cuda.toml in {dtype:?}"))?;
            println!("benches/cuda.toml in {dtype:?}: {cases} cases; their check refuses wrong answers ({errors})");
        }
    }
    let mut report = Report::new(options.csv.as_deref())?;
    let gemm = Gemm::new()?;
    if options.bench {
        let jobs = [gemm.job(None), gemm.job(pool(Some(1))?)];
        let threads = jobs.each_ref().map(|job| job.threads);
        let timings: Vec<_> = threads.into_iter().zip(in_turns(&jobs)?).collect();
        report.ceiling(&timings)?;
        report.rules();
    }
    for family in cases.chunk_by(|a, b| a.family() == b.family()) {
        measure(family, &gemm, options.bench, &mut report)?;
    }
    if options.bench {
        report.targets(&targets, &cases);
    }
    Ok(())
}

/// A peer at work on a case, on one number of threads.
struct Entrant {
    peer: Peer,
    /// Size of its own pool, where the case asks for one.
    own_threads: Option<usize>,
    pool: Option<Arc<ThreadPool>>,
    contender: Arc<Contender>,
    /// The gradient of o that is timed, in the peer's layout.
    upstream: Tensor,
    checked: Checked,
    /// Seconds of the run that was checked, if that was a forward and a backward.
    both: Option<f64>,
    peak_bytes: usize,
}

/// Checks the cases of one family, then times them in turns.
fn measure(family: &[Case], gemm: &Gemm, timed: bool, report: &mut Report) -> Result<()> {
    let mut entrants = Vec::new();
    for case in family {
        entrants.push(enter(case, report)?);
    }
    if !timed {
        return Ok(());
    }

    // First the gemm on each number of threads, then every timed pass in the order of the rows.
    let (mut threads, mut jobs, mut passes) = (Vec::new(), Vec::new(), Vec::new());
    for (case, entrants) in family.iter().zip(&entrants) {
        for entrant in entrants {
            let timed = entrant.passes(case).filter(|&pass| pass != Pass::Memory);
            for pass in timed {
                passes.push(entrant.job(case, pass)?);
                if !threads.contains(&entrant.threads()) {
                    threads.push(entrant.threads());
                    jobs.push(gemm.job(entrant.pool.clone()));
                }
            }
        }
    }
    jobs.extend(passes);
    let timings = in_turns(&jobs)?;
    drop(jobs);

    let (gemms, passes) = timings.split_at(threads.len());
    let mut passes = passes.iter().cloned();
    for (case, entrants) in family.iter().zip(&entrants) {
        let mut rows = Vec::new();
        for entrant in entrants {
            let gemm = threads.iter().zip(gemms).find(|(&threads, _)| threads == entrant.threads());
            for pass in entrant.passes(case) {
                let value = match (pass, gemm) {
                    (Pass::Memory, _) | (_, None) => Value::Bytes(entrant.peak_bytes),
                    (_, Some((_, gemm))) => {
                        let timing = passes.next().expect("one timing for each job");
                        Value::Time { timing, gemm: gemm.clone() }
                    }
                };
                let Entrant { peer, own_threads, checked, .. } = *entrant;
                rows.push(Row { peer, pass, threads: entrant.threads(), own_threads, value, checked });
            }
        }
        report.case(case, &rows)?;
    }
    Ok(())
}

/// Prepares every peer of a case and checks its answer, on every number of threads.
fn enter(case: &Case, report: &Report) -> Result<Vec<Entrant>> {
    let inputs = Inputs::draw(case, &Device::Cpu)?;
    let reference = Reference::new(case, &inputs)?;
    let mut entrants = Vec::new();
    for &peer in &case.peers {
        if let Some(why) = too_large(peer, case) {
            report.left_out(case, peer, &why);
            continue;
        }
        let contender = Arc::new(peer.prepare(case, &inputs)?);
        let backward = case.has_backward() && peer.computes(Pass::Both);
        let checked_upstream = if backward { Some(contender.upstream(&reference.do_)?) } else { None };
        for own_threads in case.pools() {
            let pool = pool(own_threads)?;
            let start = std::time::Instant::now();
            let run = on_pool(pool.clone(), || contender.run(checked_upstream.as_ref()));
            let (result, peak_bytes) = memory::peak_bytes(run);
            let both = backward.then(|| start.elapsed().as_secs_f64());
            let checked =
                reference.check(&format!("{} ({}): {peer}", case.name, case.label()), &contender.answer(result?)?)?;
            let upstream = contender.upstream(&inputs.do_)?;
            entrants.push(Entrant {
                peer,
                own_threads,
                pool,
                contender: contender.clone(),
                upstream,
                checked,
                both,
                peak_bytes,
            });
        }
    }
    let worst = entrants.iter().map(|entrant| entrant.checked.share_of_limit).fold(0.0, f64::max);
    println!("checked {}: the largest error is {:.0}% of its limit", case.name, 100.0 * worst);
    Ok(entrants)
}

/// Why a peer has to leave a case out, if it would not fit.
fn too_large(peer: Peer, case: &Case) -> Option<String> {
    // Larger ones run for minutes where they fit at all.
    const MOST: usize = 16 << 30;
    let gib = |bytes: usize| bytes as f64 / f64::from(1 << 30);
    let needed = peer.needed_bytes(case);
    let available = memory::available_bytes().unwrap_or(MOST).min(MOST);
    (needed > available).then(|| {
        format!("needs about {:.1} GiB for its scores, {:.1} GiB are free to take", gib(needed), gib(available))
    })
}

impl Entrant {
    fn threads(&self) -> usize {
        self.own_threads.unwrap_or_else(rayon::current_num_threads)
    }

    /// What of `case` it computes, in the order of the rows.
    fn passes<'a>(&'a self, case: &'a Case) -> impl Iterator<Item = Pass> + 'a {
        case.passes.iter().copied().filter(|&pass| self.peer.computes(pass))
    }

    /// Times `pass` once: from handles to inputs until the last result is dropped.
    fn job<'a>(&'a self, case: &'a Case, pass: Pass) -> Result<Job<'a>> {
        let (contender, upstream) = (&self.contender, &self.upstream);
        let (run, known): (Box<dyn Fn() -> Result<f64> + Send + Sync>, _) = match pass {
            Pass::Forward => (Box::new(|| seconds(|| contender.forward())), None),
            Pass::Backward => {
                let loss = contender.loss(upstream)?;
                (Box::new(move || seconds(|| Ok(loss.backward()?))), None)
            }
            Pass::Both => (Box::new(|| seconds(|| Ok(contender.loss(upstream)?.backward()?))), self.both),
            Pass::Operator => {
                let operator = contender.operator(case, upstream)?;
                (Box::new(move || seconds(|| operator.run())), None)
            }
            Pass::Memory => unreachable!("memory is not timed"),
        };
        Ok(Job { run: on_pool(self.pool.clone(), run), known, threads: self.threads() })
    }
}

/// A pool of that many threads; without a number, none of its own.
fn pool(threads: Option<usize>) -> Result<Option<Arc<ThreadPool>>> {
    let build = |threads| rayon::ThreadPoolBuilder::new().num_threads(threads).build().map(Arc::new);
    Ok(threads.map(build).transpose()?)
}

/// `run` on the threads of `pool`, or on those that a user gets.
fn on_pool<'a, R: Send>(
    pool: Option<Arc<ThreadPool>>,
    run: impl Fn() -> R + Send + Sync + 'a,
) -> Box<dyn Fn() -> R + 'a> {
    Box::new(move || match &pool {
        Some(pool) => pool.install(&run),
        None => run(),
    })
}
