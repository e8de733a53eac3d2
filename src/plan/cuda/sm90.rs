//! Kernels that use wgmma and TMA. They run only on Hopper.

use super::limits::{axes, inputs};
use super::schedule::Schedule;
use super::spec::{Reason, Spec};
use crate::instances::{Kernel, Pass};
use crate::problem::Problem;

/// A call with at most this many queries is decoding. A warp owns 16 rows, so all consumer warps but one have no row.
/// The best limit has not been measured. The part `decode` of the bench on a GPU has calls with one query.
const DECODING: usize = 16;

/// The largest stride in elements of 2 bytes. Strides of TMA must be below 2^40 bytes.
const MAX_STRIDE: usize = (1 << 39) - 1;

pub(super) struct Sm90;

impl Spec for Sm90 {
    fn refuses(&self, problem: &Problem, kernel: &Kernel) -> Option<Reason> {
        let (tiles, max) = (Schedule::count_tiles(problem, kernel), i32::MAX as usize);
        if tiles > max {
            return Some(Reason::Tiles { got: tiles, max });
        }
        let longest = longest_stride(problem);
        (longest > MAX_STRIDE).then_some(Reason::Stride { got: longest, max: MAX_STRIDE })
    }

    fn unsuited(&self, problem: &Problem, kernel: &Kernel) -> Option<Reason> {
        (kernel.pass == Pass::Forward && problem.max_seqlen_q() <= DECODING).then_some(Reason::Decoding)
    }
}

/// The longest stride of q, k and v. The stride of an axis with one element is never used.
fn longest_stride(problem: &Problem) -> usize {
    let axes = inputs(problem).into_iter().flat_map(|(_, strides, shape)| axes(&strides, &shape));
    axes.filter(|&(_, size)| size > 1).map(|(stride, _)| stride).max().unwrap_or(0)
}
