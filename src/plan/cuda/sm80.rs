//! Kernels of mma.sync, which run on every GPU from Ampere on.

use super::launch::Launch;
use super::spec::Spec;
use crate::instances::Kernel;
use crate::plan::caps::CudaCaps;
use crate::problem::Problem;

pub(super) struct Sm80;

impl Spec for Sm80 {
    /// A block for each tile of queries.
    fn forward(&self, problem: &Problem, kernel: &'static Kernel, _: &CudaCaps) -> Launch {
        let m_blocks = problem.max_seqlen_q().div_ceil(kernel.block_m);
        Launch::by_tile(kernel, (m_blocks as u32, problem.num_heads as u32, problem.batch() as u32))
    }
}
