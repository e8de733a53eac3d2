//! Attention on the CPU, each case checked, then timed next to its peers.

mod machine;
pub mod memory;
mod report;
mod targets;

use std::sync::Arc;

use anyhow::{Context, Result};
use candle_core::{DType, Device, Tensor};
use rayon::ThreadPool;

use self::machine::Gemm;
use self::report::{Report, Row, Value};
use self::targets::Cases;
use crate::cases::{Case, Pass, Peer};
use crate::check::{Checked, Reference};
use crate::inputs::Inputs;
use crate::options::Options;
use crate::peers::Contender;
use crate::rows::gib;
use crate::timing::{in_turns, on_pool, pool, seconds, Job};
use crate::{filters, grid, sample};

/// Prints the names of `cases`, and why each is there.
fn list<'a>(cases: impl IntoIterator<Item = &'a Case>) {
    cases.into_iter().for_each(|case| println!("{:<22} {:<34} {}", case.name, case.label(), case.why));
}

/// Checks and times the chosen cases on the CPU.
pub fn run(options: &Options) -> Result<()> {
    let Cases { cases, targets } = Cases::parse(include_str!("../../cases.toml"))?;
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
        // This part of the GPU's bench needs no GPU.
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

/// A peer that computes a case on one number of threads.
struct Entrant {
    peer: Peer,
    /// Size of its own pool, if the case asks for one.
    own_threads: Option<usize>,
    pool: Option<Arc<ThreadPool>>,
    contender: Arc<Contender>,
    /// The gradient of o that is timed, in the peer's layout.
    upstream: Tensor,
    checked: Checked,
    /// Seconds of the checked run, if it was a forward and a backward.
    both_s: Option<f64>,
    peak_bytes: usize,
}

/// Checks the cases of one family, then times them alternately.
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
            let both_s = backward.then(|| start.elapsed().as_secs_f64());
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
                both_s,
                peak_bytes,
            });
        }
    }
    let worst = entrants.iter().map(|entrant| entrant.checked.share_of_limit).fold(0.0, f64::max);
    println!("checked {}: the largest error is {:.0}% of its limit", case.name, 100.0 * worst);
    Ok(entrants)
}

/// The reason why a peer leaves a case out, if the case does not fit into memory.
fn too_large(peer: Peer, case: &Case) -> Option<String> {
    // Larger ones run for minutes where they fit at all.
    const MOST: usize = 16 << 30;
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

    /// The passes of `case` that it computes, in the order of the rows.
    fn passes<'a>(&'a self, case: &'a Case) -> impl Iterator<Item = Pass> + 'a {
        case.passes.iter().copied().filter(|&pass| self.peer.computes(pass))
    }

    /// A job that times `pass` once, until the last result is dropped. The inputs are ready before.
    fn job<'a>(&'a self, case: &'a Case, pass: Pass) -> Result<Job<'a>> {
        let (contender, upstream) = (&self.contender, &self.upstream);
        let (run, known_s): (Box<dyn Fn() -> Result<f64> + Send + Sync>, _) = match pass {
            Pass::Forward => (Box::new(|| seconds(|| contender.forward())), None),
            Pass::Backward => {
                let loss = contender.loss(upstream)?;
                (Box::new(move || seconds(|| Ok(loss.backward()?))), None)
            }
            Pass::Both => (Box::new(|| seconds(|| Ok(contender.loss(upstream)?.backward()?))), self.both_s),
            Pass::Operator => {
                let operator = contender.operator(case, upstream)?;
                (Box::new(move || seconds(|| operator.run())), None)
            }
            Pass::Memory => unreachable!("memory is not timed"),
        };
        Ok(Job { run: on_pool(self.pool.clone(), run), known_s, threads: self.threads() })
    }
}
