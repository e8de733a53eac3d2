//! The forward for few queries, as in decoding. It is memory-bound, so it reads each key and value once for its whole group of heads.
//!
//! Tasks      (part, key heads): a part has at most `block_n` keys of one sequence. Then (sequence, head), to merge the parts.
//! Pipeline   of a task: S = q k^T | softcap, ALiBi, mask | softmax | o = P v
//! Scratch    q and S of the heads of a task; also KEYS rows of k or v if their type is not the accumulator's type.
//! Results    o, row_max_log2 and row_sum of each part, then merged: head_dim_v + 2 numbers for each part, head and query.
//! Layout     S has a row for each head and query. A vector lane is a column of q, k or v in the products, and a key in the softmax.
//! Numerics   as forward.rs, but a score's sum has another order. The backward needs the bits of forward.rs, so the plan takes this path
//!            only if no input is tracked for gradients.
//! Expects    a checked `Problem`.

use std::array::from_fn;
use std::ops::Range;

use pulp::NullaryFnOnce;

use super::call::Call;
use super::element::{Element, Real};
use super::forward::tile;
use super::lse::Lse;
use super::parallel::{for_each_task, Shared};
use super::scores::{larger, subtracted, sum_of_lanes, Dot, ScoreMod, TileMask, LANES};
use crate::mask::Coverage;
use crate::problem::{Problem, Sequence};
use crate::tensors::Inputs;

/// A call with fewer parts divides its key heads until there are so many tasks for each thread. Heads that share a task read neighbouring
/// memory. One query of 8 heads over 4k keys takes 1.1 ms with 4 or 8, and 1.9 ms with 32 (f32, two threads of an AMD EPYC).
const TASKS_OF_THREAD: usize = 4;

/// Keys that are multiplied at once. Their sums are independent, so the processor overlaps them. Other numbers: not measured.
const KEYS: usize = 4;

/// A part of the keys of one sequence.
struct Part {
    sequence: Sequence,
    cols: Range<usize>,
    /// The first row of its results. There is one row for each head and query, in this order.
    first_row: usize,
}

/// Buffers of one thread.
struct Scratch<A> {
    q: Vec<A>,
    /// `KEYS` rows of k or v.
    widened: Vec<A>,
    scores: Vec<A>,
}

/// Computes `o`, contiguous in its layout, and `lse`, `(batch, num_heads, seqlen_q)` or `(num_heads, total_q)`.
pub(super) fn forward<T: Element, O: Element<Acc = T::Acc>>(
    call: &Call,
    inputs: Inputs<&[T]>,
    o: &mut [O],
    lse: &mut Lse<Vec<T::Acc>>,
) {
    let problem = call.problem;
    let parts = parts(call);
    let rows = parts.last().map_or(0, |last| last.first_row + rows_of(problem, &last.sequence));
    let mut partial = [rows * problem.head_dim_v, rows, rows].map(|len| vec![T::Acc::ZERO; len]);
    let [o_of_parts, max_of_parts, sum_of_parts] = partial.each_mut().map(|part| Shared::new(part));
    let tasks = TASKS_OF_THREAD * rayon::current_num_threads();
    let heads_k = (parts.len() * problem.num_heads_k / tasks).min(problem.num_heads_k).max(1); // of a task
    let tasks_of_part = problem.num_heads_k.div_ceil(heads_k);
    let most_rows = heads_k * problem.group_size() * problem.max_seqlen_q();
    let widened = if T::IN_PLACE { 0 } else { KEYS * problem.head_dim.max(problem.head_dim_v) };
    let scratch = || Scratch {
        q: vec![T::Acc::ZERO; most_rows * problem.head_dim],
        widened: vec![T::Acc::ZERO; widened],
        scores: vec![T::Acc::ZERO; most_rows * call.plan.forward.block_n],
    };
    let pairs: usize = parts.iter().map(|part| rows_of(problem, &part.sequence) * part.cols.len()).sum();
    let multiply_adds = pairs.saturating_mul(problem.head_dim + problem.head_dim_v);
    for_each_task(parts.len() * tasks_of_part, multiply_adds, scratch, |scratch, task| {
        let (part, first_head_k) = (&parts[task / tasks_of_part], task % tasks_of_part * heads_k);
        let heads_k = first_head_k..(first_head_k + heads_k).min(problem.num_heads_k);
        let group_rows = problem.group_size() * part.sequence.seqlen_q;
        let (first, rows) = (part.first_row + heads_k.start * group_rows, heads_k.len() * group_rows);
        // SAFETY: these rows belong to this task alone.
        let (o, row_max_log2, row_sum) = unsafe {
            (
                o_of_parts.slice(first * problem.head_dim_v, rows * problem.head_dim_v),
                max_of_parts.slice(first, rows),
                sum_of_parts.slice(first, rows),
            )
        };
        call.arch.dispatch(Attend { call, inputs, part, heads_k, scratch, o, row_max_log2, row_sum });
    });
    merge(call, &parts, &partial, o, lse);
}

/// All parts. Those of a sequence follow each other.
fn parts(call: &Call) -> Vec<Part> {
    let problem = call.problem;
    let mut parts = Vec::new();
    let mut first_row = 0;
    for sequence in problem.sequences().filter(|sequence| sequence.seqlen_q > 0) {
        let visible = problem.visibility(&sequence).keys_of(&(0..sequence.seqlen_q));
        for start in visible.clone().step_by(call.plan.forward.block_n) {
            let cols = start..(start + call.plan.forward.block_n).min(visible.end);
            parts.push(Part { sequence, cols, first_row });
            first_row += rows_of(problem, &sequence);
        }
    }
    parts
}

/// Rows of one part: one for each head and query.
fn rows_of(problem: &Problem, sequence: &Sequence) -> usize {
    problem.num_heads * sequence.seqlen_q
}

/// Computes some heads of one part.
struct Attend<'a, T: Element> {
    call: &'a Call<'a>,
    inputs: Inputs<&'a [T]>,
    part: &'a Part,
    heads_k: Range<usize>,
    scratch: &'a mut Scratch<T::Acc>,
    /// Not divided by row_sum yet. The caller has filled it with zeros.
    o: &'a mut [T::Acc],
    row_max_log2: &'a mut [T::Acc],
    row_sum: &'a mut [T::Acc],
}

impl<T: Element> NullaryFnOnce for Attend<'_, T> {
    type Output = ();

    #[inline(always)]
    fn call(mut self) {
        self.widen_queries();
        self.scores();
        self.softmax();
        self.values();
    }
}

impl<T: Element> Attend<'_, T> {
    /// The query head of a row.
    fn head(&self, row: usize) -> usize {
        self.heads_k.start * self.call.problem.group_size() + row / self.part.sequence.seqlen_q
    }

    #[inline(always)]
    fn widen_queries(&mut self) {
        let (problem, sequence) = (self.call.problem, &self.part.sequence);
        for row in 0..self.row_sum.len() {
            let query = row % sequence.seqlen_q;
            let start = problem.q.start(sequence.batch, sequence.first_q + query, self.head(row));
            let to = &mut self.scratch.q[row * problem.head_dim..][..problem.head_dim];
            T::widen(&self.inputs.q[start..][..problem.head_dim], to);
        }
    }

    /// S = q k^T. Keys are in the outer loop, because the key heads of a token often lie next to each other.
    #[inline(always)]
    fn scores(&mut self) {
        let (problem, sequence, cols) = (self.call.problem, &self.part.sequence, &self.part.cols);
        let (head_dim, group_rows) = (problem.head_dim, problem.group_size() * sequence.seqlen_q);
        let Scratch { q, widened, scores } = &mut *self.scratch;
        for keys in blocks(0..cols.len(), KEYS) {
            for (group, head_k) in self.heads_k.clone().enumerate() {
                let start = problem.k.start(sequence.batch, sequence.first_k + cols.start + keys.start, head_k);
                let k = tile(&self.inputs.k[start..], problem.k.row, (keys.len(), head_dim), widened);
                for row in group * group_rows..(group + 1) * group_rows {
                    let q = &q[row * head_dim..][..head_dim];
                    let scores = &mut scores[row * cols.len() + keys.start..];
                    if keys.len() == KEYS {
                        let scores: &mut [_; KEYS] = scores.first_chunk_mut().unwrap();
                        *scores = dot_products(q, from_fn(|key| k.row(key, head_dim)));
                    } else {
                        scores[0] = Dot { a: q, b: k.row(0, head_dim) }.call();
                    }
                }
            }
        }
    }

    /// Replaces S by P.
    #[inline(always)]
    fn softmax(&mut self) {
        let (problem, sequence) = (self.call.problem, &self.part.sequence);
        let queries = 0..sequence.seqlen_q;
        let mask = mask_of(problem, self.part, &queries);
        for row in 0..self.row_sum.len() {
            let score_mod = ScoreMod::new(problem, self.call.slope(sequence.batch, self.head(row)));
            let scores = &mut self.scratch.scores[row * mask.cols.len()..][..mask.cols.len()];
            (self.row_max_log2[row], self.row_sum[row]) = score_mod.softmax(scores, &mask, row % sequence.seqlen_q);
        }
    }

    /// o += P v.
    #[inline(always)]
    fn values(&mut self) {
        let (problem, sequence, cols) = (self.call.problem, &self.part.sequence, &self.part.cols);
        let (head_dim_v, group_rows) = (problem.head_dim_v, problem.group_size() * sequence.seqlen_q);
        let queries = 0..sequence.seqlen_q;
        let mask = mask_of(problem, self.part, &queries);
        // 0 times a value that is not finite would be NaN, and hidden keys must have no effect. So where a key is hidden from some
        // queries only, each query is multiplied with each key alone.
        let most_keys = if mask.partial { 1 } else { KEYS };
        let Scratch { widened, scores, .. } = &mut *self.scratch;
        for keys in blocks(0..cols.len(), most_keys) {
            for (group, head_k) in self.heads_k.clone().enumerate() {
                let start = problem.v.start(sequence.batch, sequence.first_k + cols.start + keys.start, head_k);
                let v = tile(&self.inputs.v[start..], problem.v.row, (keys.len(), head_dim_v), widened);
                for row in group * group_rows..(group + 1) * group_rows {
                    let p = &scores[row * cols.len()..][keys.clone()];
                    let o = &mut self.o[row * head_dim_v..][..head_dim_v];
                    if let Ok(p) = <[_; KEYS]>::try_from(p) {
                        add_values(p, from_fn(|key| v.row(key, head_dim_v)), o);
                    } else if mask.keys(row % sequence.seqlen_q).contains(&keys.start) {
                        add_values([p[0]], [v.row(0, head_dim_v)], o);
                    }
                }
            }
        }
    }
}

/// The mask over one part. `queries` are all queries of its sequence.
fn mask_of<'a>(problem: &Problem, part: &'a Part, queries: &'a Range<usize>) -> TileMask<'a> {
    let visibility = problem.visibility(&part.sequence);
    TileMask {
        rows: queries,
        cols: &part.cols,
        visibility,
        partial: visibility.coverage(queries, &part.cols) == Coverage::Partial,
    }
}

/// The products of a row of q and `KEYS` keys.
#[inline(always)]
fn dot_products<A: Real>(q: &[A], k: [&[A]; KEYS]) -> [A; KEYS] {
    let (q, q_rest) = q.as_chunks::<LANES>();
    let [(k0, rest0), (k1, rest1), (k2, rest2), (k3, rest3)] = k.map(|key| key.as_chunks::<LANES>());
    // Four arrays, not one of four arrays: the compiler keeps these in registers (docs/log/cpu.md).
    let mut sums0 = [A::ZERO; LANES];
    let mut sums1 = [A::ZERO; LANES];
    let mut sums2 = [A::ZERO; LANES];
    let mut sums3 = [A::ZERO; LANES];
    for ((((q, k0), k1), k2), k3) in q.iter().zip(k0).zip(k1).zip(k2).zip(k3) {
        for lane in 0..LANES {
            sums0[lane] = q[lane].mul_add(k0[lane], sums0[lane]);
        }
        for lane in 0..LANES {
            sums1[lane] = q[lane].mul_add(k1[lane], sums1[lane]);
        }
        for lane in 0..LANES {
            sums2[lane] = q[lane].mul_add(k2[lane], sums2[lane]);
        }
        for lane in 0..LANES {
            sums3[lane] = q[lane].mul_add(k3[lane], sums3[lane]);
        }
    }
    let sum = |sums, rest: &[A]| q_rest.iter().zip(rest).fold(sum_of_lanes(sums), |sum, (q, &k)| q.mul_add(k, sum));
    [sum(sums0, rest0), sum(sums1, rest1), sum(sums2, rest2), sum(sums3, rest3)]
}

/// Adds the products of K elements of P and K rows of v to a row of o.
#[inline(always)]
fn add_values<A: Real, const K: usize>(p: [A; K], v: [&[A]; K], o: &mut [A]) {
    let v = v.map(|key| &key[..o.len()]);
    for (col, o) in o.iter_mut().enumerate() {
        let mut sum = *o; // `*o` in its place would be written after each key
        for key in 0..K {
            sum = p[key].mul_add(v[key][col], sum);
        }
        *o = sum;
    }
}

/// `range` in blocks of `size`, and the rest one by one.
fn blocks(range: Range<usize>, size: usize) -> impl Iterator<Item = Range<usize>> {
    let whole = range.start + range.len() / size * size;
    (range.start..whole)
        .step_by(size)
        .map(move |start| start..start + size)
        .chain((whole..range.end).map(|one| one..one + 1))
}

/// Merges the parts of each sequence into o and lse. The caller has filled o with zeros.
fn merge<T: Real, O: Element<Acc = T>>(
    call: &Call,
    parts: &[Part],
    partial: &[Vec<T>; 3],
    o: &mut [O],
    lse: &mut Lse<Vec<T>>,
) {
    let (problem, [o_of_parts, max_of_parts, sum_of_parts]) = (call.problem, partial);
    let head_dim_v = problem.head_dim_v;
    // Rows that see no key belong to no part, or see none of the keys of a part.
    lse.row_max_log2.fill(T::NEG_INFINITY);
    lse.row_sum_log2.fill(T::ZERO);
    let sequences: Vec<&[Part]> = parts.chunk_by(|a, b| a.sequence.batch == b.sequence.batch).collect();
    let o_strides = problem.contiguous_o();
    let (o, row_max_log2, row_sum_log2) =
        (Shared::new(o), Shared::new(&mut lse.row_max_log2), Shared::new(&mut lse.row_sum_log2));
    let multiply_adds = o_of_parts.len();
    for_each_task(
        sequences.len() * problem.num_heads,
        multiply_adds,
        || vec![T::ZERO; head_dim_v],
        |sum_of_o, task| {
            let (parts, head) = (sequences[task / problem.num_heads], task % problem.num_heads);
            let sequence = &parts[0].sequence;
            let visibility = problem.visibility(sequence);
            for query in (0..sequence.seqlen_q).filter(|&query| !visibility.keys(query).is_empty()) {
                let rows = || parts.iter().map(|part| part.first_row + head * sequence.seqlen_q + query);
                let max = rows().map(|row| max_of_parts[row]).fold(T::NEG_INFINITY, larger);
                let subtracted = subtracted(max);
                let mut sum = T::ZERO;
                sum_of_o.fill(T::ZERO);
                for row in rows() {
                    let rescale = (max_of_parts[row] - subtracted).exp2();
                    sum = sum_of_parts[row].mul_add(rescale, sum);
                    for (sum, &part) in sum_of_o.iter_mut().zip(&o_of_parts[row * head_dim_v..]) {
                        *sum = part.mul_add(rescale, *sum);
                    }
                }
                sum_of_o.iter_mut().for_each(|x| *x /= sum);
                let row = problem.lse_start(sequence, head) + query;
                let start = o_strides.start(sequence.batch, sequence.first_q + query, head);
                // SAFETY: each (sequence, head, query) belongs to one task.
                unsafe {
                    row_max_log2.slice(row, 1)[0] = max;
                    row_sum_log2.slice(row, 1)[0] = sum.log2();
                    O::narrow(sum_of_o, o.slice(start, head_dim_v));
                }
            }
        },
    );
}
