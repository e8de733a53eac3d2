//! Everything that the tasks of a call read besides its tensors.

use candle_core::{Result, Tensor};

use crate::plan::{CpuPlan, Tile};
use crate::problem::{Alibi, Problem};

/// A [`Problem`] and everything else that the CPU needs to compute it.
pub(crate) struct Call<'a> {
    pub(super) problem: &'a Problem,
    pub(super) forward: Tile,
    /// Whether the forward is that of `few_queries`.
    pub(super) few_queries: bool,
    pub(super) backward: Tile,
    /// ALiBi slopes, `(num_heads)` or `(batch, num_heads)`; empty without ALiBi.
    slopes: Vec<f32>,
    /// The widest vector instructions of this machine.
    pub(super) arch: pulp::Arch,
}

impl<'a> Call<'a> {
    pub(crate) fn new(problem: &'a Problem, plan: &CpuPlan, alibi_slopes: Option<&Tensor>) -> Result<Self> {
        let &CpuPlan { forward, backward, few_queries } = plan;
        let slopes = match alibi_slopes {
            Some(slopes) => slopes.flatten_all()?.to_vec1()?,
            None => Vec::new(),
        };
        Ok(Self { problem, forward, few_queries, backward, slopes, arch: pulp::Arch::new() })
    }

    /// The ALiBi slope of one head.
    pub(super) fn slope(&self, batch: usize, head: usize) -> Option<f32> {
        self.problem.alibi.map(|alibi| match alibi {
            Alibi::PerHead => self.slopes[head],
            Alibi::PerBatchAndHead => self.slopes[batch * self.problem.num_heads + head],
        })
    }
}
