//! Ours next to Candle's standard attention: time and peak memory.
//!
//! Both run the same calls: a forward, and a forward with a backward through Candle's autograd. Running out of memory
//! is a result.

use anyhow::{Context, Result};
use candle_core::Tensor;
use candle_fused_ops::pool;

use super::gpu::Gpu;
use super::report::{Done, Outcome, Report};
use crate::cases::{Case, Pass, Peer};
use crate::inputs::Inputs;
use crate::peers;
use crate::sample;

/// The most scores that Candle's kernels can index. Its element-wise kernels add the number of threads, about one for
/// each element, to an `unsigned int` index; with more elements the loop may never end. Its fused softmax has an `int`
/// index; with more elements it leaves the tensor.
const MOST_SCORES: usize = 1 << 31;

/// Runs each pass of `case` by each of its peers: checked, then timed if `rep_ms` says how long.
///
/// # Errors
/// If an answer is wrong, or a pass fails for a reason other than memory.
pub fn measure(case: &Case, gpu: &mut Gpu, rep_ms: Option<f64>, report: &mut Report) -> Result<()> {
    let inputs = Inputs::draw_on_device(case, &gpu.device)?;
    let lse = peers::lse(case, &inputs)?;
    let mut columns = Vec::new();
    for &peer in &case.peers {
        columns.push(passes(case, peer, (&inputs, &lse), gpu, rep_ms)?);
    }
    for (index, &pass) in case.passes.iter().enumerate() {
        let outcomes: Vec<(Peer, &Outcome)> =
            case.peers.iter().zip(&columns).map(|(&peer, column)| (peer, &column[index])).collect();
        report.outcomes(case, pass, &outcomes)?;
    }
    Ok(())
}

/// The outcome of each pass of `case` by one peer.
fn passes(
    case: &Case,
    peer: Peer,
    (inputs, lse): (&Inputs, &Tensor),
    gpu: &mut Gpu,
    rep_ms: Option<f64>,
) -> Result<Vec<Outcome>> {
    let mut outcomes = Vec::new();
    for &pass in &case.passes {
        let outcome = attempt(case, (peer, pass), gpu, |gpu| {
            let contender = peer.prepare(case, inputs)?;
            let upstream = if pass == Pass::Both { Some(contender.upstream(&inputs.do_)?) } else { None };
            let upstream = upstream.as_ref();
            let (result, peak_bytes) = gpu.peak_bytes(|| contender.run(upstream))?;
            let errors = sample::check(case, peer, inputs, &contender.answer(result)?, lse)
                .with_context(|| format!("{peer} {pass}"))?;
            let cost = match rep_ms {
                Some(rep_ms) => Some(gpu.time(rep_ms, || contender.run(upstream))?),
                None => None,
            };
            let error = if pass == Pass::Both { errors.grads } else { Some(errors.o) };
            Ok(Done { cost, error, peak_bytes })
        });
        outcomes.push(outcome?);
    }
    Ok(outcomes)
}

/// Peak memory of one forward and backward by each peer. A peer that ran out of memory at a shorter sequence is not
/// tried again.
///
/// # Errors
/// If a pass fails for any other reason.
pub fn peak(case: &Case, gpu: &mut Gpu, exhausted: &mut Vec<Peer>, report: &mut Report) -> Result<()> {
    let mut outcomes = Vec::new();
    for &peer in &case.peers {
        if exhausted.contains(&peer) {
            outcomes.push((peer, Outcome::OutOfMemory(None)));
            continue;
        }
        let outcome = attempt(case, (peer, Pass::Memory), gpu, |gpu| {
            let inputs = Inputs::draw_on_device(case, &gpu.device)?;
            let contender = peer.prepare(case, &inputs)?;
            let upstream = contender.upstream(&inputs.do_)?;
            drop(inputs);
            let (_, peak_bytes) = gpu.peak_bytes(|| contender.run(Some(&upstream)))?;
            Ok(Done { cost: None, error: None, peak_bytes })
        })?;
        if matches!(outcome, Outcome::OutOfMemory(_)) {
            exhausted.push(peer);
        }
        outcomes.push((peer, outcome));
    }
    let outcomes: Vec<(Peer, &Outcome)> = outcomes.iter().map(|(peer, outcome)| (*peer, outcome)).collect();
    report.outcomes(case, Pass::Memory, &outcomes)
}

/// The outcome of `run`. A call that Candle's kernels cannot index is not tried, because it may hang the GPU.
fn attempt(
    case: &Case,
    (peer, pass): (Peer, Pass),
    gpu: &mut Gpu,
    run: impl FnOnce(&mut Gpu) -> Result<Done>,
) -> Result<Outcome> {
    if peer == Peer::Standard && case.scores() > MOST_SCORES {
        let needed = peer.needed_bytes(&Case { passes: vec![pass], ..case.clone() });
        let fits = needed <= gpu.memory_bytes()?;
        return Ok(if fits { Outcome::Uncountable } else { Outcome::OutOfMemory(Some(needed)) });
    }
    match run(gpu) {
        Ok(done) => Ok(Outcome::Done(done)),
        Err(error) if pool::is_out_of_memory(&error) => {
            drop(error);
            gpu.recover()?;
            Ok(Outcome::OutOfMemory(None))
        }
        Err(error) => Err(error),
    }
}
