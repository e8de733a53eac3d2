//! Everything that the tasks of a call read besides its tensors.

use candle_core::{Result, Tensor};

use crate::plan::CpuPlan;
use crate::problem::{Alibi, Problem};

/// A [`Problem`] and everything else that the CPU needs to compute it.
pub(crate) struct Call<'a> {
    pub(super) problem: &'a Problem,
    pub(super) plan: &'a CpuPlan,
    /// ALiBi slopes, `(num_heads)` or `(batch, num_heads)`; empty without ALiBi.
    slopes: Vec<f32>,
    /// The widest vector instructions of this machine.
    pub(super) arch: pulp::Arch,
}

impl<'a> Call<'a> {
    pub(crate) fn new(problem: &'a Problem, plan: &'a CpuPlan, alibi_slopes: Option<&Tensor>) -> Result<Self> {
        let slopes = match alibi_slopes {
            Some(slopes) => slopes.flatten_all()?.to_vec1()?,
            None => Vec::new(),
        };
        Ok(Self { problem, plan, slopes, arch: pulp::Arch::new() })
    }

    /// The ALiBi slope of one head.
    pub(super) fn slope(&self, batch: usize, head: usize) -> Option<f32> {
        self.problem.alibi.map(|alibi| match alibi {
            Alibi::PerHead => self.slopes[head],
            Alibi::PerBatchAndHead => self.slopes[batch * self.problem.num_heads + head],
        })
    }
}
