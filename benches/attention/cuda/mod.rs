//! Attention on an NVIDIA GPU: the papers' grid, each case checked, then timed by CUDA events.

mod gpu;
mod report;

use anyhow::{bail, ensure, Context, Result};
use candle_core::DType;
use clap::Args;

use self::gpu::Gpu;
use self::report::{Report, Row};
use crate::cases::{Case, Pass};
use crate::grid;
use crate::inputs::Inputs;
use crate::peers::{self, Answer, Peer};
use crate::sample::{self, Errors};

/// What only the GPU's part takes.
#[derive(Args)]
pub struct CudaOptions {
    /// GPU: type of the tensors, bf16 or f16
    #[arg(long, value_name = "TYPE", default_value = "bf16", value_parser = dtype)]
    dtype: DType,
    /// GPU: passes to time, fwd and bwd
    #[arg(long, value_name = "PASSES", value_delimiter = ',', default_values = ["fwd", "bwd"], value_parser = pass)]
    dirs: Vec<Pass>,
    /// GPU: milliseconds to time each pass of each case for
    #[arg(long, value_name = "MS", default_value_t = 100.0)]
    rep_ms: f64,
}

fn dtype(text: &str) -> Result<DType, String> {
    match text {
        "bf16" => Ok(DType::BF16),
        "f16" => Ok(DType::F16),
        other => Err(format!("{other} has no GPU kernels; bf16 and f16 have")),
    }
}

fn pass(text: &str) -> Result<Pass, String> {
    match text {
        "fwd" => Ok(Pass::Forward),
        "bwd" => Ok(Pass::Backward),
        other => Err(format!("{other} is not timed by itself on a GPU; fwd and bwd are")),
    }
}

/// The chosen cases, in the order of `benches/cuda.toml`.
fn cases(options: &crate::Options) -> Result<Vec<Case>> {
    let mut cases = grid::cases(options.cuda.dtype)?;
    cases.retain(|case| options.wants(case));
    ensure!(!cases.is_empty(), "no case of benches/cuda.toml contains {:?}; --list prints them", options.filters);
    for case in &mut cases {
        case.passes.retain(|pass| options.cuda.dirs.contains(pass));
    }
    Ok(cases)
}

/// Checks and times the chosen cases.
///
/// # Errors
/// After the last case, if any of them gave a wrong answer or none at all.
pub fn run(options: &crate::Options) -> Result<()> {
    let cases = cases(options)?;
    if options.list {
        crate::list(&cases);
        return Ok(());
    }
    let mut gpu = match Gpu::new() {
        Ok(gpu) => gpu,
        // As the tests do, which may run anywhere.
        Err(error) if !options.bench => {
            eprintln!("SKIPPED: no CUDA device: {error:#}");
            return Ok(());
        }
        Err(error) => return Err(error.context("no CUDA device; --device cpu times the CPU's cases")),
    };
    println!("{}", gpu.describe()?);
    let mut report = Report::new(options.csv.as_deref())?;
    if options.bench {
        report.rules();
        host_time(&gpu, options.cuda.dtype, &mut report)?;
        report.head();
    }
    let mut failed = Vec::new();
    for case in &cases {
        // One wrong case must not cost the others' numbers.
        if let Err(error) = measure(case, &mut gpu, options, &mut report) {
            println!("{} FAILED: {error:#}", case.name);
            failed.push(case.name.as_str());
        }
    }
    report.summary();
    if !failed.is_empty() {
        bail!("{} of {} cases failed: {}", failed.len(), cases.len(), failed.join(" "));
    }
    Ok(())
}

/// Checks a case, then times its passes.
fn measure(case: &Case, gpu: &mut Gpu, options: &crate::Options, report: &mut Report) -> Result<()> {
    let inputs = Inputs::draw_on_device(case, &gpu.device)?;
    let contender = Peer::Ours.prepare(case, &inputs)?;
    let operator = contender.operator(case, &inputs.do_)?;
    let o = operator.forward()?;
    let backward = case.passes.contains(&Pass::Backward);
    let grads = backward.then(|| operator.backward(&o)).transpose()?;
    let answer = Answer { o, grads };
    let errors = sample::check(case, &inputs, &answer, &peers::lse(case, &inputs)?)?;
    if !options.bench {
        report.checked(case, &errors);
        return Ok(());
    }
    let Answer { o, grads } = answer;
    drop(grads);

    let rep_ms = options.cuda.rep_ms;
    let Errors { o: o_error, grads: grad_error } = errors;
    for &pass in &case.passes {
        let row = match pass {
            Pass::Forward => {
                Row { cost: gpu.time(rep_ms, || contender.forward())?, autograd: None, error: o_error, pass }
            }
            _ => {
                let cost = gpu.time(rep_ms, || operator.backward(&o))?;
                let tracked = contender.tracked_forward()?;
                let autograd = gpu.time(rep_ms, || Ok(tracked.backward()?))?;
                let error = grad_error.context("a case with a backward has checked gradients")?;
                Row { cost, autograd: Some(autograd.timing), error, pass }
            }
        };
        report.row(case, &row)?;
    }
    Ok(())
}

/// What a call costs the host, where the GPU has next to nothing to do.
fn host_time(gpu: &Gpu, dtype: DType, report: &mut Report) -> Result<()> {
    let why = "one tile of one head: the GPU is done before the next call is queued";
    let case = Case { seqlen_q: Some(64), ..Case::new("host".into(), why, (1, 64), dtype) };
    let inputs = Inputs::draw_on_device(&case, &gpu.device)?;
    let contender = Peer::Ours.prepare(&case, &inputs)?;
    let operator = contender.operator(&case, &inputs.do_)?;
    let o = operator.forward()?;
    let forward = gpu.host(|| contender.forward())?;
    let backward = gpu.host(|| operator.backward(&o))?;
    let tracked = contender.tracked_forward()?;
    let autograd = gpu.host(|| Ok(tracked.backward()?))?;
    report.host(&case, [forward, backward, autograd])
}
