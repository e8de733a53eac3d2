//! Kernels of wgmma and TMA, which run on Hopper alone.

use super::limits::axes;
use super::schedule::Schedule;
use super::spec::{Reason, Spec};
use crate::instances::Kernel;
use crate::problem::Problem;

/// The most queries of a call that counts as decoding. How many queries favor the larger tiles is to be measured.
const DECODING: usize = 16;

/// Elements of 2 bytes from one row, head or sequence to the next: TMA's strides stay below 2^40 bytes.
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

    fn unsuited(&self, problem: &Problem) -> Option<Reason> {
        (problem.max_seqlen_q() <= DECODING).then_some(Reason::Decoding)
    }
}

/// The longest stride of q, k and v. The stride of an axis of one element is never used.
fn longest_stride(problem: &Problem) -> usize {
    let (shape_q, shape_k) = (problem.shape_q(), problem.shape_k());
    let axes = [(problem.q, &shape_q), (problem.k, &shape_k), (problem.v, &shape_k)]
        .into_iter()
        .flat_map(|(strides, shape)| axes(&strides, shape));
    axes.filter(|&(_, size)| size > 1).map(|(stride, _)| stride).max().unwrap_or(0)
}
