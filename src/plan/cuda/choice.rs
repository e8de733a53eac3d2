//! Chooses the kernel of a pass. Records why each other candidate was rejected. A candidate has the type of the call, the right
//! variant and a sufficient head_dim. Kernels of plain TF32 are candidates only if the call allows it.

use std::cmp::Reverse;

use super::sm80::Sm80;
use super::sm90::Sm90;
use super::spec::{Reason, Spec};
use crate::instances::{Arch, Kernel, Pass, KERNELS};
use crate::plan::caps::CudaCaps;
use crate::problem::Problem;

/// The spec of an architecture.
fn spec(arch: Arch) -> &'static dyn Spec {
    match arch {
        Arch::Sm80 => &Sm80,
        Arch::Sm90 => &Sm90,
    }
}

/// A kernel for the pass that was not chosen.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Rejection {
    /// The kernel.
    pub kernel: &'static Kernel,
    /// Why it was not chosen.
    pub reason: Reason,
}

impl std::fmt::Display for Rejection {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        write!(f, "{} {}", self.kernel.name, self.reason)
    }
}

impl std::fmt::Debug for Rejection {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        std::fmt::Display::fmt(self, f)
    }
}

/// The choice among the kernels of one pass.
pub(super) struct Choice {
    /// `None` if all kernels were rejected.
    pub kernel: Option<&'static Kernel>,
    pub rejected: Vec<Rejection>,
}

/// Chooses among the kernels of `pass` that `allow` accepts and that can compute `problem` on this GPU.
///
/// If the call allows plain TF32, those kernels come first. Among these, the smallest sufficient head_dim wins. Ties go to the kernel
/// that suits the call, then to the newest architecture, then to the first line.
///
/// So Hopper uses a kernel of sm80 if sm90 has only larger head_dims. Nobody has measured whether those are faster there.
pub(super) fn choose(problem: &Problem, pass: Pass, caps: &CudaCaps, allow: impl Fn(&Kernel) -> bool) -> Choice {
    let score_mod = needs_score_mod(problem);
    let candidates = KERNELS.iter().filter(|kernel| {
        (kernel.pass, kernel.dtype, kernel.score_mod) == (pass, problem.dtype, score_mod)
            && (problem.tf32 || !kernel.tf32)
            && kernel.head_dim >= problem.head_dim.max(problem.head_dim_v)
            && allow(kernel)
    });
    let (mut possible, mut rejected) = (Vec::new(), Vec::new());
    for kernel in candidates {
        match refuses(problem, kernel, caps) {
            Some(reason) => rejected.push(Rejection { kernel, reason }),
            None => possible.push(kernel),
        }
    }
    let suits = |kernel: &Kernel| spec(kernel.arch).unsuited(problem, kernel).is_none();
    // For equal keys, min_by_key returns the first kernel.
    let best = |kernel: &&'static Kernel| (!kernel.tf32, kernel.head_dim, Reverse((suits(kernel), kernel.arch)));
    let chosen = possible.iter().copied().min_by_key(best);
    if let Some(chosen) = chosen {
        let others = possible.into_iter().filter(|kernel| kernel.name != chosen.name);
        rejected.extend(others.map(|kernel| Rejection { kernel, reason: worse(problem, kernel, chosen) }));
    }
    Choice { kernel: chosen, rejected }
}

/// Whether `problem` needs a kernel with score_mod: for softcap, for ALiBi, or for a scale that is not above 0.
///
/// With a scale below 0, the largest score has the smallest product q k, and kernels without score_mod only track the largest.
/// With a scale of 0, or one that f32 flushes to 0, they would compute -inf * 0.
fn needs_score_mod(problem: &Problem) -> bool {
    let softmax_scale_log2 = (problem.softmax_scale * std::f64::consts::LOG2_E) as f32;
    problem.softcap.is_some() || problem.alibi.is_some() || softmax_scale_log2 < f32::MIN_POSITIVE
}

/// Why `kernel` cannot compute `problem` on this GPU; `None` if it can.
fn refuses(problem: &Problem, kernel: &Kernel, caps: &CudaCaps) -> Option<Reason> {
    if !kernel.arch.runs_on(caps.compute_cap) {
        return Some(Reason::Instructions(kernel.arch));
    }
    if kernel.shared_bytes > caps.shared_bytes_per_block {
        return Some(Reason::SharedMemory(kernel.shared_bytes));
    }
    spec(kernel.arch).refuses(problem, kernel)
}

/// Why `chosen` is better than `kernel`, if both can compute `problem`.
fn worse(problem: &Problem, kernel: &Kernel, chosen: &Kernel) -> Reason {
    if chosen.tf32 && !kernel.tf32 {
        return Reason::ThreeProducts;
    }
    if kernel.head_dim > chosen.head_dim {
        return Reason::HeadDim;
    }
    match (spec(kernel.arch).unsuited(problem, kernel), spec(chosen.arch).unsuited(problem, chosen)) {
        (Some(reason), None) => reason,
        _ if kernel.arch < chosen.arch => Reason::OlderArch,
        _ => Reason::LaterLine,
    }
}
