//! dq, dk and dv, one task per (key tile, batch, key head). P is recomputed from lse.
//!
//! Pipeline   for each head of the group and each query tile that sees the keys:
//!            S = q k^T, P = exp2(S - lse) | dP = do v^T, dS = P (dP - delta) | dv += P^T do | dk += dS^T q | dq += dS k
//! Scratch    k^T, v^T, dk and dv of one tile, S and dP; also q, k and do if their type is not the accumulator's type.
//! Shared     dq_accum: several tasks add to the same rows. DqSemaphores order them by key tile.
//! Layout     S has one row per query. So vector lanes are keys, and only k and v are transposed, once per task.
//! Expects    a checked `Problem`, and lse of the same inputs.

use std::ops::Range;

use super::call::Call;
use super::element::{Element, Real};
use super::forward::{tile, transpose};
use super::lse::Lse;
use super::matmul::{matmul, matmul_scores, matmul_visible, Mat, Out};
use super::parallel::{for_each_task, DqSemaphores, Shared};
use super::scores::{Dot, GradientStep, ScoreMod, TileMask};
use crate::mask::Coverage;
use crate::plan::Tile;
use crate::problem::{Sequence, Strides};
use crate::tensors::{Gradients, Inputs};

/// The output of the forward and the gradients of its outputs.
pub(super) struct Upstream<'a, G> {
    /// Output of the forward, contiguous.
    pub(super) o: &'a [G],
    /// Gradient of o.
    pub(super) do_: &'a [G],
    /// Strides of `do_`.
    pub(super) do_strides: Strides,
    /// Gradient of lse, in the order of lse. `None` if the call does not return lse.
    pub(super) dlse: Option<&'a [G]>,
}

/// Which gradients to compute: those that autograd tracks.
#[derive(Clone, Copy)]
pub(super) struct Wanted {
    pub(super) dq: bool,
    pub(super) dk: bool,
    pub(super) dv: bool,
}

/// One key tile of one key head.
struct Task {
    sequence: Sequence,
    head_k: usize,
    n_block: usize,
    cols: Range<usize>,
    /// Keys of the tile times queries that see at least one of them, for one head. This is the cost of the task.
    pairs: usize,
}

/// One query tile of a sequence.
struct QueryTile {
    rows: Range<usize>,
    /// The key tiles that these rows see.
    n_blocks: Range<usize>,
}

/// The query tiles of one sequence.
struct QueryTiles {
    /// By `m_block`.
    tiles: Vec<QueryTile>,
    /// Index of the sequence's first semaphore. Each head has one semaphore per query tile.
    first_semaphore: usize,
}

/// Buffers of one thread. All its tasks reuse them.
struct Scratch<A> {
    k: Vec<A>,
    k_transposed: Vec<A>,
    v_transposed: Vec<A>,
    q: Vec<A>,
    do_: Vec<A>,
    p: Vec<A>,
    ds: Vec<A>,
    /// Derivatives of the softcap, for the keys of one query.
    derivative: Vec<A>,
    dk: Vec<A>,
    dv: Vec<A>,
}

/// The inputs and outputs of one backward call. All its tasks share them.
struct BackwardCall<'a, T: Element, G> {
    call: &'a Call<'a>,
    inputs: Inputs<&'a [T]>,
    lse: Lse<&'a [T::Acc]>,
    /// rowsum(do * o) - dlse, in the order of lse.
    delta: Vec<T::Acc>,
    upstream: &'a Upstream<'a, G>,
    wanted: Wanted,
    dq_accum: Shared<'a, T::Acc>,
    /// One entry for each sequence.
    query_tiles: Vec<QueryTiles>,
    dq_semaphores: DqSemaphores,
}

/// Computes the wanted ones of dq, dk and dv, contiguous in the shapes of q, k and v.
pub(super) fn backward<T: Element, G: Element<Acc = T::Acc>>(
    call: &Call,
    inputs: Inputs<&[T]>,
    lse: Lse<&[T::Acc]>,
    upstream: &Upstream<G>,
    wanted: Wanted,
) -> Gradients<Option<Vec<T>>> {
    let problem = call.problem;
    let (head_dim, head_dim_v) = (problem.head_dim, problem.head_dim_v);
    // One row for each token and head.
    let (q_rows, k_rows) = (problem.rows_q() * problem.num_heads, problem.rows_k() * problem.num_heads_k);
    let len_if = |wanted: bool, len: usize| if wanted { len } else { 0 };
    let mut dq_accum = vec![T::Acc::ZERO; len_if(wanted.dq, q_rows * head_dim)];
    let mut dk = vec![T::default(); len_if(wanted.dk, k_rows * head_dim)];
    let mut dv = vec![T::default(); len_if(wanted.dv, k_rows * head_dim_v)];

    let delta = delta::<G>(call, upstream);
    let (tasks, query_tiles) = (tasks(call), query_tiles(call));
    let dq_semaphores = dq_semaphores(&query_tiles, problem.num_heads);
    let pass = BackwardCall {
        call,
        inputs,
        lse,
        delta,
        upstream,
        wanted,
        dq_accum: Shared::new(&mut dq_accum),
        query_tiles,
        dq_semaphores,
    };
    {
        let (dk, dv) = (Shared::new(&mut dk), Shared::new(&mut dv));
        let (dk_strides, dv_strides) = (problem.contiguous_k(), problem.contiguous_v());
        let pairs: usize = tasks.iter().map(|task| task.pairs).sum();
        // For each pair of query and key: S, dk and dq take head_dim multiply-adds each, dP and dv take head_dim_v.
        let multiply_adds = pairs.saturating_mul((3 * head_dim + 2 * head_dim_v) * problem.group_size());
        let work = |scratch: &mut Scratch<T::Acc>, task: &Task| {
            pass.run(task, scratch);
            for (i, col) in task.cols.clone().enumerate() {
                let start =
                    |strides: &Strides| strides.start(task.sequence.batch, task.sequence.first_k + col, task.head_k);
                if wanted.dk {
                    // SAFETY: each (batch, key head, key) belongs to one task.
                    let dk = unsafe { dk.slice(start(&dk_strides), head_dim) };
                    T::narrow(&scratch.dk[i * head_dim..][..head_dim], dk);
                }
                if wanted.dv {
                    // SAFETY: as above.
                    let dv = unsafe { dv.slice(start(&dv_strides), head_dim_v) };
                    T::narrow(&scratch.dv[i * head_dim_v..][..head_dim_v], dv);
                }
            }
        };
        let work =
            |scratch: &mut Scratch<T::Acc>, index: usize| pass.dq_semaphores.guard(|| work(scratch, &tasks[index]));
        for_each_task(tasks.len(), multiply_adds, || pass.scratch(), work);
    }
    Gradients { dq: wanted.dq.then(|| T::from_acc(dq_accum)), dk: wanted.dk.then_some(dk), dv: wanted.dv.then_some(dv) }
}

/// delta = rowsum(do * o) - dlse, in the order of lse.
///
/// The gradient of a score is `p * (dp - rowsum(do * o))` through o, and `p * dlse` through lse. Their sum is
/// `p * (dp - delta)`.
fn delta<G: Element>(call: &Call, upstream: &Upstream<G>) -> Vec<G::Acc> {
    // Rows per task. At head_dim 64 a task reads 128 KB of f32, which takes microseconds. To take a task is one atomic addition.
    // Other numbers of rows were not measured.
    const ROWS: usize = 256;
    let (problem, head_dim_v) = (call.problem, call.problem.head_dim_v);
    let o_strides = problem.contiguous_o();
    let mut tasks = Vec::new();
    for sequence in problem.sequences() {
        for start in (0..sequence.seqlen_q).step_by(ROWS) {
            let rows = start..(start + ROWS).min(sequence.seqlen_q);
            tasks.extend((0..problem.num_heads).map(|head| (sequence, head, rows.clone())));
        }
    }
    let mut delta = vec![G::Acc::ZERO; problem.rows_q() * problem.num_heads];
    let multiply_adds = delta.len() * head_dim_v;
    let shared = Shared::new(&mut delta);
    let scratch = || (vec![G::Acc::ZERO; head_dim_v], vec![G::Acc::ZERO; head_dim_v]);
    for_each_task(tasks.len(), multiply_adds, scratch, |(wide_o, wide_do), index| {
        let (sequence, head, rows) = &tasks[index];
        let first = problem.lse_start(sequence, *head) + rows.start;
        // SAFETY: each (batch, head, row) belongs to one task.
        let delta = unsafe { shared.slice(first, rows.len()) };
        for (i, row) in rows.clone().enumerate() {
            let o_start = o_strides.start(sequence.batch, sequence.first_q + row, *head);
            let do_start = upstream.do_strides.start(sequence.batch, sequence.first_q + row, *head);
            G::widen(&upstream.o[o_start..][..head_dim_v], wide_o);
            G::widen(&upstream.do_[do_start..][..head_dim_v], wide_do);
            delta[i] = call.arch.dispatch(Dot { a: wide_o, b: wide_do });
        }
        if let Some(dlse) = upstream.dlse {
            let mut wide = [G::Acc::ZERO; ROWS];
            G::widen(&dlse[first..][..rows.len()], &mut wide[..rows.len()]);
            delta.iter_mut().zip(wide).for_each(|(delta, dlse)| *delta -= dlse);
        }
    });
    delta
}

/// All tasks, in the order of their key tiles: first the first tile of every sequence and head, then the second.
///
/// Under a causal mask the most queries see the first keys, so the longest tasks start first. In this order, tasks that
/// add to the same tile of `dq_accum` are far apart.
fn tasks(call: &Call) -> Vec<Task> {
    let (problem, block_n) = (call.problem, call.plan.backward.block_n);
    let mut tasks = Vec::new();
    for sequence in problem.sequences() {
        let visibility = problem.visibility(&sequence);
        for (n_block, start) in (0..sequence.seqlen_k).step_by(block_n).enumerate() {
            let cols = start..(start + block_n).min(sequence.seqlen_k);
            let pairs = cols.len() * visibility.queries_of(&cols).len();
            let task = |head_k| Task { sequence, head_k, n_block, cols: cols.clone(), pairs };
            tasks.extend((0..problem.num_heads_k).map(task));
        }
    }
    tasks.sort_by_key(|task| task.n_block);
    tasks
}

/// The query tiles of each sequence.
fn query_tiles(call: &Call) -> Vec<QueryTiles> {
    let problem = call.problem;
    let Tile { block_m, block_n } = call.plan.backward;
    let mut first_semaphore = 0;
    let mut query_tiles = Vec::with_capacity(problem.batch());
    for sequence in problem.sequences() {
        let visibility = problem.visibility(&sequence);
        let query_tile = |start: usize| {
            let rows = start..(start + block_m).min(sequence.seqlen_q);
            let keys = visibility.keys_of(&rows);
            let n_blocks = if keys.is_empty() { 0..0 } else { keys.start / block_n..keys.end.div_ceil(block_n) };
            QueryTile { rows, n_blocks }
        };
        let tiles: Vec<_> = (0..sequence.seqlen_q).step_by(block_m).map(query_tile).collect();
        let semaphores = tiles.len() * problem.num_heads;
        query_tiles.push(QueryTiles { tiles, first_semaphore });
        first_semaphore += semaphores;
    }
    query_tiles
}

/// One semaphore for each query tile of each head. Key tiles add to it in ascending order, from the first that it sees.
fn dq_semaphores(query_tiles: &[QueryTiles], num_heads: usize) -> DqSemaphores {
    let firsts = |of: &QueryTiles| of.tiles.iter().map(|tile| tile.n_blocks.start).collect::<Vec<_>>();
    DqSemaphores::new(query_tiles.iter().flat_map(|of| firsts(of).repeat(num_heads)))
}

impl<T: Element, G: Element<Acc = T::Acc>> BackwardCall<'_, T, G> {
    fn scratch(&self) -> Scratch<T::Acc> {
        let (tile, problem) = (self.call.plan.backward, self.call.problem);
        let Tile { block_m, block_n } = tile;
        let zeros = |len: usize| vec![T::Acc::ZERO; len];
        let (head_dim, head_dim_v) = (problem.head_dim, problem.head_dim_v);
        Scratch {
            k: zeros(if T::IN_PLACE { 0 } else { block_n * head_dim }),
            k_transposed: zeros(block_n * head_dim),
            v_transposed: zeros(block_n * head_dim_v),
            q: zeros(if T::IN_PLACE { 0 } else { block_m * head_dim }),
            do_: zeros(if G::IN_PLACE { 0 } else { block_m * head_dim_v }),
            p: zeros(block_m * block_n),
            ds: zeros(block_m * block_n),
            derivative: zeros(block_n),
            dk: zeros(block_n * head_dim),
            dv: zeros(block_n * head_dim_v),
        }
    }

    /// Computes one task: adds to `dq_accum`, and leaves dk and dv of the task's keys in `scratch`.
    fn run(&self, task: &Task, scratch: &mut Scratch<T::Acc>) {
        let problem = self.call.problem;
        let (sequence, cols) = (&task.sequence, &task.cols);
        let (n, head_dim, head_dim_v) = (cols.len(), problem.head_dim, problem.head_dim_v);
        scratch.dk[..n * head_dim].fill(T::Acc::ZERO);
        scratch.dv[..n * head_dim_v].fill(T::Acc::ZERO);
        let k = &self.inputs.k[problem.k.start(sequence.batch, sequence.first_k + cols.start, task.head_k)..];
        let v = &self.inputs.v[problem.v.start(sequence.batch, sequence.first_k + cols.start, task.head_k)..];
        transpose(k, problem.k.row, (n, head_dim), &mut scratch.k_transposed, n);
        transpose(v, problem.v.row, (n, head_dim_v), &mut scratch.v_transposed, n);
        let mut k_buffer = std::mem::take(&mut scratch.k);
        let k_tile = tile(k, problem.k.row, (n, head_dim), &mut k_buffer);

        let QueryTiles { tiles, first_semaphore } = &self.query_tiles[sequence.batch];
        let group = problem.group_size();
        for head in task.head_k * group..(task.head_k + 1) * group {
            for (m_block, QueryTile { rows, n_blocks }) in tiles.iter().enumerate() {
                if n_blocks.contains(&task.n_block) {
                    let semaphore = first_semaphore + head * tiles.len() + m_block;
                    self.step(task, head, rows, semaphore, k_tile, scratch);
                }
            }
        }
        scratch.k = k_buffer;
    }

    /// One query tile against the task's keys.
    fn step(
        &self,
        task: &Task,
        head: usize,
        rows: &Range<usize>,
        semaphore: usize,
        k: Mat<T::Acc>,
        scratch: &mut Scratch<T::Acc>,
    ) {
        let problem = self.call.problem;
        let (sequence, cols) = (&task.sequence, &task.cols);
        let (m, n, head_dim, head_dim_v) = (rows.len(), cols.len(), problem.head_dim, problem.head_dim_v);
        let visibility = problem.visibility(sequence);
        let partial = visibility.coverage(rows, cols) != Coverage::Full;
        let score_mod = ScoreMod::<T::Acc>::new(problem, self.call.slope(sequence.batch, head));
        let softmax_scale = T::Acc::from_f64_lossy(problem.softmax_scale);
        let strides = &self.upstream.do_strides;

        let q_start = problem.q.start(sequence.batch, sequence.first_q + rows.start, head);
        let do_start = strides.start(sequence.batch, sequence.first_q + rows.start, head);
        let q = tile(&self.inputs.q[q_start..], problem.q.row, (m, head_dim), &mut scratch.q);
        let do_ = tile(&self.upstream.do_[do_start..], strides.row, (m, head_dim_v), &mut scratch.do_);
        let first_lse = problem.lse_start(sequence, head) + rows.start;
        let [row_max_log2, row_sum_log2, delta] =
            [self.lse.row_max_log2, self.lse.row_sum_log2, &self.delta].map(|rows| &rows[first_lse..][..m]);

        let (p, ds) = (&mut scratch.p[..m * n], &mut scratch.ds[..m * n]);
        let k_transposed = Mat::rows(&scratch.k_transposed, n);
        let v_transposed = Mat::rows(&scratch.v_transposed, n);
        matmul_scores(self.call.arch, p, (m, n, head_dim), score_mod.product_scale, q, k_transposed);
        // dv needs only P.
        if self.wanted.dq || self.wanted.dk {
            matmul(Out::rows(ds, n), (m, n, head_dim_v), false, T::Acc::ONE, do_, v_transposed);
        }
        let mask = TileMask { rows, cols, visibility, partial };
        let derivative = &mut scratch.derivative;
        self.call.arch.dispatch(GradientStep { score_mod, mask, p, ds, derivative, row_max_log2, row_sum_log2, delta });
        let (p, ds) = (Mat::rows(p, n), Mat::rows(ds, n));
        let (queries, keys) = (|col: usize| mask.queries(col), |row: usize| mask.keys(row));
        type Visible<'a> = Option<&'a dyn Fn(usize) -> Range<usize>>;
        let (queries, keys): (Visible, Visible) = (partial.then_some(&queries), partial.then_some(&keys));
        if self.wanted.dv {
            let dv = Out::rows(&mut scratch.dv, head_dim_v);
            matmul_visible(dv, (n, head_dim_v, m), T::Acc::ONE, p.transposed(), do_, queries);
        }
        if self.wanted.dk {
            let dk = Out::rows(&mut scratch.dk, head_dim);
            matmul_visible(dk, (n, head_dim, m), softmax_scale, ds.transposed(), q, queries);
        }
        if !self.wanted.dq {
            return;
        }

        let dq_strides = problem.contiguous_q();
        let dq_start = dq_strides.start(sequence.batch, sequence.first_q + rows.start, head);
        let dq_span = (m - 1) * dq_strides.row + head_dim;
        self.dq_semaphores.in_order(semaphore, task.n_block, || {
            // SAFETY: the semaphore gives this task alone access to these rows of this head.
            let dq = unsafe { Out::interleaved(self.dq_accum.block(dq_start, dq_span), dq_span, dq_strides.row) };
            matmul_visible(dq, (m, head_dim, n), softmax_scale, ds, k, keys);
        });
    }
}
