//! The launches of a forward.

use super::launch::Launch;
use crate::instances::{Grid, Kernel};
use crate::plan::caps::CudaCaps;
use crate::problem::Problem;

/// The launches that compute o and lse with `kernel`, in order.
pub(super) fn launches(problem: &Problem, kernel: &'static Kernel, caps: &CudaCaps) -> Vec<Launch> {
    let launch = match kernel.grid {
        Grid::Tiles => {
            let blocks = problem.max_seqlen_q().div_ceil(kernel.block_m) * kernel.parts();
            Launch::by_tile(kernel, (blocks as u32, problem.num_heads as u32, problem.batch() as u32))
        }
        Grid::Persistent { max_tiles } => Launch::persistent(problem, kernel, caps.multiprocessors, max_tiles),
    };
    vec![launch]
}
