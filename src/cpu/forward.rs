//! o = softmax(mask(softmax_scale * q k^T)) v, one task per (query tile, batch, head).
//!
//! Pipeline   for each visible key tile, last first: S^T = k q^T | softcap, ALiBi, mask | softmax | o = o * rescale + P v
//! Scratch    q^T, S^T and o of one tile; also k and v if their type is not the accumulator's type.
//! Layout     S^T has one row per key. So vector lanes are queries, and q^T is the only transposed tile.
//! Numerics   scores, row_max_log2, row_sum and o in the accumulator's type; o is divided by row_sum once, at the end.
//! Expects    a checked `Problem`.

use std::ops::Range;

use super::call::Call;
use super::element::{Element, Real};
use super::lse::Lse;
use super::matmul::{matmul_scores, matmul_visible, Mat, Out};
use super::parallel::{for_each_task, Shared};
use super::scores::{OnlineSoftmax, ScoreMod, SoftmaxStep, TileMask};
use crate::mask::Coverage;
use crate::plan::Tile;
use crate::problem::{Sequence, MAX_HEAD_DIM};
use crate::tensors::Inputs;

/// One query tile of one head.
struct Task {
    sequence: Sequence,
    head: usize,
    rows: Range<usize>,
    /// Number of (query, key) pairs in the key tiles that the task visits. This is its cost.
    pairs: usize,
}

/// Buffers of one thread. All its tasks reuse them.
struct Scratch<A> {
    q_transposed: Vec<A>,
    k: Vec<A>,
    v: Vec<A>,
    scores: Vec<A>,
    o: Vec<A>,
    softmax: OnlineSoftmax<A>,
}

/// Computes `o`, contiguous in its layout, and `lse`, `(batch, num_heads, seqlen_q)` or `(num_heads, total_q)`.
pub(super) fn forward<T: Element, O: Element<Acc = T::Acc>>(
    call: &Call,
    inputs: Inputs<&[T]>,
    o: &mut [O],
    lse: &mut Lse<Vec<T::Acc>>,
) {
    let (problem, tile) = (call.problem, call.plan.forward);
    let (head_dim, head_dim_v) = (problem.head_dim, problem.head_dim_v);
    let tasks = tasks(call);
    let o_strides = problem.contiguous_o();
    let (o, row_max_log2, row_sum_log2) =
        (Shared::new(o), Shared::new(&mut lse.row_max_log2), Shared::new(&mut lse.row_sum_log2));
    let Tile { block_m, block_n } = tile;
    let widened = if T::IN_PLACE { 0 } else { block_n };
    let scratch = || Scratch {
        q_transposed: vec![T::Acc::ZERO; block_m * head_dim],
        k: vec![T::Acc::ZERO; widened * head_dim],
        v: vec![T::Acc::ZERO; widened * head_dim_v],
        scores: vec![T::Acc::ZERO; block_m * block_n],
        o: vec![T::Acc::ZERO; block_m * head_dim_v],
        softmax: OnlineSoftmax::new(block_m),
    };
    let multiply_adds = tasks.iter().map(|task| task.pairs).sum::<usize>().saturating_mul(head_dim + head_dim_v);
    for_each_task(tasks.len(), multiply_adds, scratch, |scratch, index| {
        let task = &tasks[index];
        let (sequence, rows) = (&task.sequence, &task.rows);
        attend(call, inputs, task, scratch);
        let visibility = problem.visibility(sequence);
        let first = problem.lse_start(sequence, task.head) + rows.start;
        // SAFETY: each (batch, head, row) belongs to one task.
        let (row_max_log2, row_sum_log2) =
            unsafe { (row_max_log2.slice(first, rows.len()), row_sum_log2.slice(first, rows.len())) };
        for (i, row) in rows.clone().enumerate() {
            let start = o_strides.start(sequence.batch, sequence.first_q + row, task.head);
            // SAFETY: as above.
            let o = unsafe { o.slice(start, head_dim_v) };
            let unscaled = &mut scratch.o[i * head_dim_v..][..head_dim_v];
            if visibility.keys(row).is_empty() {
                (row_max_log2[i], row_sum_log2[i]) = (T::Acc::NEG_INFINITY, T::Acc::ZERO);
                unscaled.fill(T::Acc::ZERO);
            } else {
                let (max, sum) = scratch.softmax.finish(i);
                (row_max_log2[i], row_sum_log2[i]) = (max, sum.log2());
                unscaled.iter_mut().for_each(|x| *x /= sum);
            }
            O::narrow(unscaled, o);
        }
    });
}

/// All tasks, the longest first. A long task that started last would leave the other threads idle.
fn tasks(call: &Call) -> Vec<Task> {
    let problem = call.problem;
    let mut tasks = Vec::new();
    for sequence in problem.sequences() {
        let visibility = problem.visibility(&sequence);
        for start in (0..sequence.seqlen_q).step_by(call.plan.forward.block_m) {
            let rows = start..(start + call.plan.forward.block_m).min(sequence.seqlen_q);
            let pairs = rows.len() * visibility.keys_of(&rows).len();
            tasks.extend((0..problem.num_heads).map(|head| Task { sequence, head, rows: rows.clone(), pairs }));
        }
    }
    tasks.sort_by_key(|task| std::cmp::Reverse(task.pairs));
    tasks
}

/// Computes one task: the unnormalised output in `scratch.o`, and row_max_log2 and row_sum in `scratch.softmax`.
fn attend<T: Element>(call: &Call, inputs: Inputs<&[T]>, task: &Task, scratch: &mut Scratch<T::Acc>) {
    let Inputs { q, k, v } = inputs;
    let (problem, block_n) = (call.problem, call.plan.forward.block_n);
    let (sequence, rows) = (&task.sequence, &task.rows);
    let (head_dim, head_dim_v) = (problem.head_dim, problem.head_dim_v);
    let head_k = task.head / problem.group_size();
    let score_mod = ScoreMod::new(problem, call.slope(sequence.batch, task.head));
    let visibility = problem.visibility(sequence);
    let m = rows.len();

    scratch.softmax.reset();
    scratch.o[..m * head_dim_v].fill(T::Acc::ZERO);
    let visible = visibility.keys_of(rows);
    if visible.is_empty() {
        return;
    }
    let q_start = problem.q.start(sequence.batch, sequence.first_q + rows.start, task.head);
    transpose(&q[q_start..], problem.q.row, (m, head_dim), &mut scratch.q_transposed, m);
    let q_transposed = Mat::rows(&scratch.q_transposed, m);

    // The last key tile goes first. Under a causal mask it holds the most recent keys of each query, so row_max_log2 settles
    // early.
    for n_block in (visible.start / block_n..visible.end.div_ceil(block_n)).rev() {
        let cols = (n_block * block_n).max(visible.start)..((n_block + 1) * block_n).min(visible.end);
        let coverage = visibility.coverage(rows, &cols);
        let n = cols.len();
        let k_start = problem.k.start(sequence.batch, sequence.first_k + cols.start, head_k);
        let v_start = problem.v.start(sequence.batch, sequence.first_k + cols.start, head_k);
        let k_tile = tile(&k[k_start..], problem.k.row, (n, head_dim), &mut scratch.k);
        let v_tile = tile(&v[v_start..], problem.v.row, (n, head_dim_v), &mut scratch.v);

        let scores = &mut scratch.scores[..n * m];
        matmul_scores(call.arch, scores, (n, m, head_dim), score_mod.product_scale, k_tile, q_transposed);
        let o = &mut scratch.o[..m * head_dim_v];
        let mask = TileMask { rows, cols: &cols, visibility, partial: coverage == Coverage::Partial };
        let softmax = &mut scratch.softmax;
        call.arch.dispatch(SoftmaxStep { score_mod, mask, scores, softmax, o, head_dim_v });
        let keys = |row: usize| mask.keys(row);
        let keys: Option<&dyn Fn(usize) -> Range<usize>> = mask.partial.then_some(&keys);
        let p = Mat::rows(scores, m).transposed();
        matmul_visible(Out::rows(o, head_dim_v), (m, head_dim_v, n), T::Acc::ONE, p, v_tile, keys);
    }
}

/// A tile of `rows x cols` elements in the accumulator's type. The rows of `from` are `stride` apart.
///
/// The tile is read in place if `T` is the accumulator's type. Otherwise the elements are converted into `buffer`.
pub(super) fn tile<'a, T: Element>(
    from: &'a [T],
    stride: usize,
    (rows, cols): (usize, usize),
    buffer: &'a mut [T::Acc],
) -> Mat<'a, T::Acc> {
    match T::as_acc(from) {
        Some(in_place) => Mat::rows(in_place, stride),
        None => {
            for (row, to) in buffer.chunks_exact_mut(cols).take(rows).enumerate() {
                T::widen(&from[row * stride..][..cols], to);
            }
            Mat::rows(buffer, cols)
        }
    }
}

/// Writes the transpose of `rows x cols` elements, in the accumulator's type. The rows of `to` are `to_stride` apart.
pub(super) fn transpose<T: Element>(
    from: &[T],
    stride: usize,
    (rows, cols): (usize, usize),
    to: &mut [T::Acc],
    to_stride: usize,
) {
    // One strip of rows at a time. The writes of one column are next to each other: 16 floats fill a cache line of 64 bytes.
    // Of 4 to 64 rows, 16 were fastest (f32, one thread of an AMD EPYC).
    const STRIP: usize = 16;
    let mut strip = [[T::Acc::ZERO; MAX_HEAD_DIM]; STRIP];
    for first in (0..rows).step_by(STRIP) {
        let count = STRIP.min(rows - first);
        for (i, wide) in strip[..count].iter_mut().enumerate() {
            T::widen(&from[(first + i) * stride..][..cols], &mut wide[..cols]);
        }
        for col in 0..cols {
            for (i, wide) in strip[..count].iter().enumerate() {
                to[col * to_stride + first + i] = wide[col];
            }
        }
    }
}
