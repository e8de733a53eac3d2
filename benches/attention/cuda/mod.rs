//! Attention on an NVIDIA GPU, each case checked, then timed by CUDA events.

mod ablations;
mod ceiling;
mod gpu;
mod report;
mod standard;
mod table;

use anyhow::{bail, ensure, Context, Result};
use candle_core::DType;

use self::gpu::Gpu;
use self::report::{Report, Row};
use crate::cases::{Case, Pass, Peer};
use crate::filters;
use crate::grid::{self, Part};
use crate::inputs::Inputs;
use crate::options::{self, Options};
use crate::peers::{self, Answer};
use crate::sample::{self, Errors};

/// The chosen parts in their order, each with its chosen cases. A part without cases in the file has none.
///
/// # Errors
/// If a word of the command line chooses nothing.
fn choose(options: &Options) -> Result<Vec<(Part, Vec<Case>)>> {
    let part = |word: &str| Part::ALL.into_iter().find(|part| part.name() == word);
    let named: Vec<Part> = options.filters.iter().filter_map(|word| part(word)).collect();
    let words: Vec<String> = options.filters.iter().filter(|word| part(word).is_none()).cloned().collect();
    let mut cases = grid::cases(options.cuda.dtype)?;
    cases.extend(ablations::cases(options.cuda.dtype).into_iter().map(|case| (Part::Ablations, case)));
    let mut chosen = Vec::new();
    for part in Part::ALL.into_iter().filter(|part| named.is_empty() || named.contains(part)) {
        let of_part = cases.iter().filter(|(of, case)| *of == part && options.wants(case, &words));
        let mut cases: Vec<Case> = of_part.map(|(_, case)| case.clone()).collect();
        for case in &mut cases {
            case.tf32 = options.cuda.tf32 && case.dtype == DType::F32;
            case.passes.retain(|pass| *pass == Pass::Memory || options.cuda.passes.contains(pass));
        }
        cases.retain(|case| !case.passes.is_empty());
        let by_itself = part.has_no_cases() && (words.is_empty() || named.contains(&part));
        if by_itself || !cases.is_empty() {
            chosen.push((part, cases));
        }
    }
    let chooses = |word: &str| {
        chosen.iter().any(|(of, cases)| match part(word) {
            Some(part) => *of == part,
            None => cases.iter().any(|case| case.contains(word)),
        })
    };
    let case = options.case_of("benches/cuda.toml");
    let cases = format!("{case} with a pass of --passes {}", passes(&options.cuda.passes));
    let parts = Part::ALL.map(Part::name).join(", ");
    // In `--passes fwd bwd` the option takes only `fwd`, and `bwd` becomes a filter.
    let commas = match options.filters.iter().any(|word| options::pass(word).is_ok()) {
        true => "; --passes takes passes with a comma between them, as in --passes fwd,bwd",
        false => "",
    };
    let known = format!("the parts are {parts}; --list prints their cases{commas}");
    filters::check(&options.filters, chooses, &cases, &known)?;
    Ok(chosen)
}

/// As the option is written.
fn passes(passes: &[Pass]) -> String {
    passes.iter().map(Pass::to_string).collect::<Vec<_>>().join(",")
}

/// Prints the chosen parts and cases, and why each is there.
fn list(parts: &[(Part, Vec<Case>)]) {
    for (part, cases) in parts {
        println!("{}{}", part.name(), part.what().map_or(String::new(), |what| format!(": {what}")));
        for case in cases {
            println!("    {:<36} {:<36} {}", case.name, case.label(), case.why);
        }
    }
}

/// Checks and times the chosen cases.
///
/// # Errors
/// After the last case, if any of them gave a wrong answer or none at all.
pub fn run(options: &Options) -> Result<()> {
    ensure!(options.cuda.rep_ms > 0.0, "--rep-ms {} leaves no time to measure", options.cuda.rep_ms);
    let parts = choose(options)?;
    if options.list {
        list(&parts);
        return Ok(());
    }
    let mut gpu = match Gpu::new() {
        Ok(gpu) => gpu,
        // The tests run this without a GPU too, and must pass.
        Err(error) if !options.bench => {
            eprintln!("SKIPPED: no CUDA device: {error:#}");
            return Ok(());
        }
        Err(error) => return Err(error.context("no CUDA device; --device cpu times the CPU's cases")),
    };
    println!("{}", gpu.describe()?);
    let mut report = Report::new(options.csv.as_deref(), figures::data_sheet::tflops(&gpu.name()?))?;
    if options.bench {
        report.rules();
    }
    let mut failed = Vec::new();
    for (part, cases) in &parts {
        run_part(*part, cases, &mut gpu, options, &mut report, &mut failed);
    }
    report.summary()?;
    if !failed.is_empty() {
        bail!("{} failed: {}", failed.len(), failed.join(" "));
    }
    Ok(())
}

/// Runs one part. Cases with a wrong answer or none go to `failed`, and the others are still measured.
fn run_part(
    part: Part,
    cases: &[Case],
    gpu: &mut Gpu,
    options: &Options,
    report: &mut Report,
    failed: &mut Vec<String>,
) {
    let (bench, dtype, rep_ms) = (options.bench, options.cuda.dtype, options.cuda.rep_ms);
    let mut judge = |name: &str, result: Result<()>| {
        if let Err(error) = result {
            println!("{name} FAILED: {error:#}");
            failed.push(name.to_string());
        }
    };
    if bench {
        println!("\n{}", part.name());
    }
    match part {
        // This part only times. Other parts check the same calls.
        Part::Host if !bench => {}
        Part::Host => judge(part.name(), host(gpu, dtype, report)),
        Part::Ceiling => judge(part.name(), ceiling::measure(gpu, dtype, (bench, rep_ms), report)),
        Part::Standard => {
            for case in cases {
                judge(&case.name, standard::measure(case, gpu, bench.then_some(rep_ms), report));
            }
        }
        Part::Ablations => judge(part.name(), ablations::run(cases, gpu, options, report)),
        Part::Memory if !bench => {}
        Part::Memory => {
            let mut exhausted = Vec::new();
            for case in cases {
                judge(&case.name, standard::peak(case, gpu, &mut exhausted, report));
            }
        }
        Part::Grid | Part::Gqa | Part::Packed | Part::Sizes | Part::F16 | Part::Decode => {
            if bench {
                report.head();
            }
            for case in cases {
                judge(&case.name, measure(case, gpu, options, report));
            }
        }
    }
}

/// Checks a case, then times its passes.
fn measure(case: &Case, gpu: &mut Gpu, options: &Options, report: &mut Report) -> Result<()> {
    let inputs = Inputs::draw_on_device(case, &gpu.device)?;
    let contender = Peer::Ours.prepare(case, &inputs)?;
    let operator = contender.operator(case, &inputs.do_)?;
    let o = operator.forward()?;
    let backward = case.passes.contains(&Pass::Backward);
    let grads = backward.then(|| operator.backward(&o)).transpose()?;
    let answer = Answer { o: operator.narrowed(&o)?, grads };
    let errors = sample::check(case, Peer::Ours, &inputs, &answer, &peers::lse(case, &inputs)?)?;
    if !options.bench {
        report.checked(case, &errors);
        return Ok(());
    }
    drop(answer);

    let rep_ms = options.cuda.rep_ms;
    let Errors { o: o_error, grads: grad_error } = errors;
    for &pass in &case.passes {
        let row = match pass {
            Pass::Forward => {
                Row { cost: gpu.time(rep_ms, || contender.forward())?, autograd: None, error: o_error, pass }
            }
            Pass::Backward => {
                let cost = gpu.time(rep_ms, || operator.backward(&o))?;
                let tracked = contender.tracked_forward()?;
                let autograd = gpu.time(rep_ms, || Ok(tracked.backward()?))?;
                let error = grad_error.context("a case with a backward has checked gradients")?;
                Row { cost, autograd: Some(autograd.timing), error, pass }
            }
            other => bail!("{other} is timed in the parts standard and memory alone"),
        };
        report.row(case, &row)?;
    }
    Ok(())
}

/// The host's time for a call that gives the GPU almost nothing to do: for the first call of each pass, which loads the
/// kernels, and for later ones.
fn host(gpu: &Gpu, dtype: DType, report: &mut Report) -> Result<()> {
    let why = "one tile of one head: the GPU is done before the next call is queued";
    let case = Case { seqlen_q: Some(64), ..Case::new("host".into(), why, (1, 64), dtype) };
    let inputs = Inputs::draw_on_device(&case, &gpu.device)?;
    let contender = Peer::Ours.prepare(&case, &inputs)?;
    let (_, first_forward) = gpu.once(|| contender.forward())?;
    let operator = contender.operator(&case, &inputs.do_)?;
    let o = operator.forward()?;
    let (_, first_backward) = gpu.once(|| operator.backward(&o))?;
    report.first_calls(&case, [first_forward, first_backward])?;

    let forward = gpu.host(|| contender.forward())?;
    let backward = gpu.host(|| operator.backward(&o))?;
    let tracked = contender.tracked_forward()?;
    let autograd = gpu.host(|| Ok(tracked.backward()?))?;
    report.host(&case, [forward, backward, autograd])
}
