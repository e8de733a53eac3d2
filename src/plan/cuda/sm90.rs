//! Persistent kernels of wgmma and TMA, which run on Hopper alone.

use super::launch::{Launch, Schedule};
use super::limits::axes;
use super::spec::{Reason, Spec};
use crate::instances::Kernel;
use crate::mask::Mask;
use crate::plan::caps::CudaCaps;
use crate::problem::{Lengths, Problem};

/// The most queries of a call that counts as decoding. Where smaller tiles stop to be faster is to be measured.
const DECODING: usize = 16;

/// Elements of 2 bytes from one row, head or sequence to the next: TMA's strides stay below 2^40 bytes.
const MAX_STRIDE: usize = (1 << 39) - 1;

/// Tiles of a block if all blocks take equally many. The list of a block (`kMaxTiles` in cuda/sm90) has twice as many places,
/// because blocks do not progress alike.
const TILES_PER_BLOCK: usize = 256;

pub(super) struct Sm90;

impl Spec for Sm90 {
    /// A block for each multiprocessor, and no more tiles for a block than its list holds.
    fn forward(&self, problem: &Problem, kernel: &'static Kernel, caps: &CudaCaps) -> Launch {
        let schedule = schedule(problem, kernel, caps.multiprocessors);
        let blocks = schedule.tiles.min(caps.multiprocessors).max(schedule.tiles.div_ceil(TILES_PER_BLOCK));
        Launch { kernel, grid: (blocks as u32, 1, 1), schedule: Some(schedule) }
    }

    fn refuses(&self, problem: &Problem, kernel: &Kernel) -> Option<Reason> {
        let (m_blocks, heads) = blocks_and_heads(problem, kernel);
        let (tiles, max) = (m_blocks * heads, i32::MAX as usize);
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

fn schedule(problem: &Problem, kernel: &Kernel, multiprocessors: usize) -> Schedule {
    let (m_blocks, heads) = blocks_and_heads(problem, kernel);
    let section_heads = match problem.mask {
        Mask::None => 1,
        _ => section_heads(m_blocks, heads, multiprocessors),
    };
    Schedule { tiles: m_blocks * heads, m_blocks, section_heads }
}

/// With a mask, tiles differ in cost. Taking many heads together balances the load. With too many, K and V no longer fit in
/// L2. A short last section leaves multiprocessors idle. Measured on an H200 with 2 to 32 heads, 512 to 16k keys: fastest are
/// some four tiles for each multiprocessor, at most 32 heads, in sections of one size.
fn section_heads(m_blocks: usize, heads: usize, multiprocessors: usize) -> usize {
    const MOST: usize = 32;
    let ideal = (4.0 * multiprocessors as f64 / m_blocks.max(1) as f64).clamp(1.0, MOST as f64);
    let cost = |size: usize| {
        let missing = heads.div_ceil(size) * size - heads; // in the last section
        let ratio = size as f64 / ideal;
        ratio.max(1.0 / ratio) + missing as f64 / size as f64
    };
    let sizes = (1..=heads.min(MOST)).map(|size| (cost(size), size));
    sizes.min_by(|(a, _), (b, _)| a.total_cmp(b)).map_or(1, |(_, size)| size)
}

/// Blocks of queries, and heads that each have so many.
fn blocks_and_heads(problem: &Problem, kernel: &Kernel) -> (usize, usize) {
    match &problem.lengths {
        &Lengths::Padded { batch, seqlen_q, .. } => (seqlen_q.div_ceil(kernel.block_m), batch * problem.num_heads),
        Lengths::Packed { cu_seqlens_q, .. } => {
            let (total, batch) = (cu_seqlens_q.total(), cu_seqlens_q.batch());
            (if total == 0 { 0 } else { total / kernel.block_m + batch }, problem.num_heads)
        }
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
