//! The steps between the matrix products: score_mod (softcap, ALiBi), mask, online softmax, and P from lse.
//!
//! Scores are in the log2 domain: the product q k^T is scaled by `softmax_scale * log2 e`. So every exponential is an `exp2`.
//! A vector lane is one query in forward.rs, and one key in backward.rs and few_queries.rs. Only few_queries.rs and delta add up lanes
//! (`LANES`).
//!
//! The loops are plain Rust. `pulp::Arch::dispatch` runs them with the widest vector instructions of the machine. Each
//! entry point is a struct whose `call` is always inlined. A closure would be compiled without these instructions.

use std::ops::Range;

use super::element::Real;
use crate::mask::Visibility;
use crate::problem::Problem;

/// Computes scores in the log2 domain from products of queries and keys: softcap and ALiBi.
#[derive(Clone, Copy)]
pub(super) struct ScoreMod<A> {
    /// Factor of the product `q . k`: `softmax_scale * log2 e`, or with a softcap `softmax_scale / softcap`, so that the
    /// scaled product is the argument of tanh.
    pub(super) product_scale: A,
    /// `softcap * log2 e`.
    softcap_log2: Option<A>,
    /// ALiBi slope * log2 e.
    slope_log2: Option<A>,
}

impl<A: Real> ScoreMod<A> {
    pub(super) fn new(problem: &Problem, slope: Option<f32>) -> Self {
        let log2_e = std::f64::consts::LOG2_E;
        let product_scale = match problem.softcap {
            None => problem.softmax_scale * log2_e,
            Some(softcap) => problem.softmax_scale / softcap,
        };
        Self {
            product_scale: A::from_f64_lossy(product_scale),
            softcap_log2: problem.softcap.map(|softcap| A::from_f64_lossy(softcap * log2_e)),
            slope_log2: slope.map(|slope| A::from_f64_lossy(f64::from(slope) * log2_e)),
        }
    }

    /// Whether the scaled products are the scores.
    fn is_identity(&self) -> bool {
        self.softcap_log2.is_none() && self.slope_log2.is_none()
    }

    /// Turns scaled products into scores. In lane `l`, the query's aligned key and the key are `|l + distance|` apart.
    #[inline(always)]
    fn apply(&self, products: &mut [A], distance: isize) {
        if let Some(softcap) = self.softcap_log2 {
            for x in products.iter_mut() {
                *x = x.tanh() * softcap;
            }
        }
        self.add_alibi(products, distance);
    }

    /// As [`Self::apply`]. Also writes the softcap's derivative, `1 - tanh^2`, of each score.
    #[inline(always)]
    fn apply_keeping_derivative(&self, products: &mut [A], derivative: &mut [A], distance: isize) {
        if let Some(softcap) = self.softcap_log2 {
            for (x, derivative) in products.iter_mut().zip(derivative) {
                let capped = x.tanh();
                *derivative = (-capped).mul_add(capped, A::ONE);
                *x = capped * softcap;
            }
        }
        self.add_alibi(products, distance);
    }

    /// The softmax over the keys of one query: replaces each product by `exp2(score - max)`, or by 0 if the key is hidden. Returns the
    /// largest score and the sum.
    #[inline(always)]
    pub(super) fn softmax(&self, products: &mut [A], mask: &TileMask, row: usize) -> (A, A) {
        let seen = mask.keys(row);
        products[..seen.start].fill(A::ZERO);
        products[seen.end..].fill(A::ZERO);
        let scores = &mut products[seen.clone()];
        scores.iter_mut().for_each(|x| *x *= self.product_scale);
        self.apply(scores, seen.start as isize - (mask.distance() + row as isize));
        let mut lanes = [A::NEG_INFINITY; LANES];
        for scores in scores.chunks(LANES) {
            lanes.iter_mut().zip(scores).for_each(|(max, &x)| *max = larger(*max, x));
        }
        let max = lanes.into_iter().fold(A::NEG_INFINITY, larger);
        let subtracted = subtracted(max);
        let mut lanes = [A::ZERO; LANES];
        for scores in scores.chunks_mut(LANES) {
            for (sum, x) in lanes.iter_mut().zip(scores) {
                *x = (*x - subtracted).exp2();
                *sum += *x;
            }
        }
        (max, sum_of_lanes(lanes))
    }

    #[inline(always)]
    fn add_alibi(&self, scores: &mut [A], distance: isize) {
        if let Some(slope) = self.slope_log2 {
            for (lane, x) in scores.iter_mut().enumerate() {
                let positions = (lane as isize + distance).unsigned_abs() as f64;
                *x = (-slope).mul_add(A::from_f64_lossy(positions), *x);
            }
        }
    }
}

/// The larger of a maximum and a score. The comparison is false for NaN, so the maximum skips NaN. The sum then becomes NaN.
#[inline(always)]
pub(super) fn larger<A: Real>(max: A, score: A) -> A {
    if score > max {
        score
    } else {
        max
    }
}

/// What is subtracted from scores with this maximum: 0 if all are minus infinity, because exp2(-inf - 0) is 0, and exp2(-inf + inf) would
/// be NaN.
#[inline(always)]
pub(super) fn subtracted<A: Real>(max: A) -> A {
    if max == A::NEG_INFINITY {
        A::ZERO
    } else {
        max
    }
}

/// `row_max_log2` and `row_sum` of a query tile, one lane per query. Each step updates them with the scores of one key tile.
pub(super) struct OnlineSoftmax<A> {
    /// Largest score so far.
    row_max_log2: Vec<A>,
    /// Sum so far of `exp2(score - row_max_log2)`.
    row_sum: Vec<A>,
    /// `exp2(old row_max_log2 - new row_max_log2)` of the last step: the factor of earlier sums and of the output so far.
    rescale: Vec<A>,
    /// Scratch of a step: the maximum that it subtracts.
    step_max: Vec<A>,
    /// Scratch of a step: the sum over its key tile.
    step_sum: Vec<A>,
}

impl<A: Real> OnlineSoftmax<A> {
    /// Room for `block_m` queries.
    pub(super) fn new(block_m: usize) -> Self {
        let zeros = || vec![A::ZERO; block_m];
        Self { row_max_log2: zeros(), row_sum: zeros(), rescale: zeros(), step_max: zeros(), step_sum: zeros() }
    }

    /// Begins a query tile.
    pub(super) fn reset(&mut self) {
        self.row_max_log2.fill(A::NEG_INFINITY);
        self.row_sum.fill(A::ZERO);
    }

    /// Updates `row_max_log2` and `row_sum`, and replaces each score by `exp2(score - row_max_log2)`. `scores` has one row per
    /// key, with `rows` lanes.
    #[inline(always)]
    fn step(&mut self, scores: &mut [A], rows: usize) {
        let (row_max_log2, row_sum) = (&mut self.row_max_log2[..rows], &mut self.row_sum[..rows]);
        let rescale = &mut self.rescale[..rows];
        let (step_max, step_sum) = (&mut self.step_max[..rows], &mut self.step_sum[..rows]);
        step_max.copy_from_slice(row_max_log2);
        for key in scores.chunks_exact(rows) {
            for (max, &score) in step_max.iter_mut().zip(key) {
                *max = larger(*max, score);
            }
        }
        for ((rescale, row_max_log2), step_max) in rescale.iter_mut().zip(row_max_log2).zip(step_max.iter_mut()) {
            let subtracted = subtracted(*step_max);
            *rescale = (*row_max_log2 - subtracted).exp2();
            *row_max_log2 = *step_max;
            *step_max = subtracted;
        }
        step_sum.fill(A::ZERO);
        for key in scores.chunks_exact_mut(rows) {
            for ((score, &max), sum) in key.iter_mut().zip(step_max.iter()).zip(step_sum.iter_mut()) {
                let p = (*score - max).exp2();
                *score = p;
                *sum += p;
            }
        }
        for ((row_sum, &step_sum), &rescale) in row_sum.iter_mut().zip(step_sum.iter()).zip(rescale.iter()) {
            *row_sum = row_sum.mul_add(rescale, step_sum);
        }
    }

    /// Multiplies each row of the unnormalised output, of `head_dim_v` elements, by the factor of the last step.
    #[inline(always)]
    fn rescale(&self, o: &mut [A], head_dim_v: usize) {
        for (row, &rescale) in o.chunks_exact_mut(head_dim_v).zip(&self.rescale) {
            if rescale != A::ONE {
                for x in row {
                    *x *= rescale;
                }
            }
        }
    }

    /// `row_max_log2` and `row_sum` of query `row`. If all its scores are minus infinity, these are minus infinity and 0.
    pub(super) fn finish(&self, row: usize) -> (A, A) {
        (self.row_max_log2[row], self.row_sum[row])
    }
}

/// The mask over one tile: queries `rows` against keys `cols`.
#[derive(Clone, Copy)]
pub(super) struct TileMask<'a> {
    pub(super) rows: &'a Range<usize>,
    pub(super) cols: &'a Range<usize>,
    pub(super) visibility: Visibility,
    /// Whether the mask hides some pairs of the tile.
    pub(super) partial: bool,
}

impl TileMask<'_> {
    /// The keys that query `row` of the tile sees, counted from the tile's first key.
    pub(super) fn keys(&self, row: usize) -> Range<usize> {
        if self.partial {
            within(&self.visibility.keys(self.rows.start + row), self.cols)
        } else {
            0..self.cols.len()
        }
    }

    /// The queries that see key `col` of the tile, counted from the tile's first query.
    pub(super) fn queries(&self, col: usize) -> Range<usize> {
        if self.partial {
            within(&self.visibility.queries(self.cols.start + col), self.rows)
        } else {
            0..self.rows.len()
        }
    }

    /// The aligned key of the tile's first query, minus the tile's first key.
    fn distance(&self) -> isize {
        self.rows.start as isize + self.visibility.shift() - self.cols.start as isize
    }
}

/// The part of `range` inside `window`, counted from the start of `window`. An empty result also lies inside `window`.
fn within(range: &Range<usize>, window: &Range<usize>) -> Range<usize> {
    let start = range.start.clamp(window.start, window.end) - window.start;
    let end = range.end.clamp(window.start, window.end) - window.start;
    start..end.max(start)
}

/// The forward between its two products: turns scores into unnormalised P, and rescales the output so far.
pub(super) struct SoftmaxStep<'a, A> {
    pub(super) score_mod: ScoreMod<A>,
    pub(super) mask: TileMask<'a>,
    /// S^T: one row per key, one column per query.
    pub(super) scores: &'a mut [A],
    pub(super) softmax: &'a mut OnlineSoftmax<A>,
    /// One row of `head_dim_v` elements per query.
    pub(super) o: &'a mut [A],
    pub(super) head_dim_v: usize,
}

impl<A: Real> pulp::NullaryFnOnce for SoftmaxStep<'_, A> {
    type Output = ();

    #[inline(always)]
    fn call(self) {
        let rows = self.mask.rows.len();
        if self.mask.partial || !self.score_mod.is_identity() {
            for (col, scores) in self.scores.chunks_exact_mut(rows).enumerate() {
                self.score_mod.apply(scores, self.mask.distance() - col as isize);
                let seen = self.mask.queries(col);
                scores[..seen.start].fill(A::NEG_INFINITY);
                scores[seen.end..].fill(A::NEG_INFINITY);
            }
        }
        self.softmax.step(self.scores, rows);
        self.softmax.rescale(self.o, self.head_dim_v);
    }
}

/// The backward between its products: turns scores into P, and dP into dS.
pub(super) struct GradientStep<'a, A> {
    pub(super) score_mod: ScoreMod<A>,
    pub(super) mask: TileMask<'a>,
    /// S, then P: one row per query, one column per key.
    pub(super) p: &'a mut [A],
    /// dP, then dS, in the same layout.
    pub(super) ds: &'a mut [A],
    /// Scratch for one row of derivatives of the softcap.
    pub(super) derivative: &'a mut [A],
    /// Largest score of each query, in the log2 domain.
    pub(super) row_max_log2: &'a [A],
    /// log2 of the sum of `exp2(score - row_max_log2)` of each query.
    pub(super) row_sum_log2: &'a [A],
    /// delta of each query.
    pub(super) delta: &'a [A],
}

impl<A: Real> pulp::NullaryFnOnce for GradientStep<'_, A> {
    type Output = ();

    #[inline(always)]
    fn call(self) {
        let cols = self.mask.cols.len();
        let rows = self.p.chunks_exact_mut(cols).zip(self.ds.chunks_exact_mut(cols));
        for (row, (p, ds)) in rows.enumerate() {
            let statistics = RowStatistics {
                row_max_log2: self.row_max_log2[row],
                row_sum_log2: self.row_sum_log2[row],
                delta: self.delta[row],
            };
            let seen = self.mask.keys(row);
            for outside in [0..seen.start, seen.end..cols] {
                p[outside.clone()].fill(A::ZERO);
                ds[outside].fill(A::ZERO);
            }
            // Lane l of the visible part is the tile's key seen.start + l.
            let distance = seen.start as isize - (self.mask.distance() + row as isize);
            let (p, ds) = (&mut p[seen.clone()], &mut ds[seen.clone()]);
            if self.score_mod.softcap_log2.is_some() {
                let derivative = &mut self.derivative[..seen.len()];
                self.score_mod.apply_keeping_derivative(p, derivative, distance);
                gradients(p, ds, statistics);
                ds.iter_mut().zip(derivative).for_each(|(ds, derivative)| *ds *= *derivative);
            } else {
                self.score_mod.apply(p, distance);
                gradients(p, ds, statistics);
            }
        }
    }
}

/// Row statistics of one query, and its delta.
#[derive(Clone, Copy)]
struct RowStatistics<A> {
    row_max_log2: A,
    row_sum_log2: A,
    delta: A,
}

/// For one query, replaces score by `p = exp2(score - lse)` and dp by `ds = p * (dp - delta)`.
#[inline(always)]
fn gradients<A: Real>(
    p: &mut [A],
    ds: &mut [A],
    RowStatistics { row_max_log2, row_sum_log2, delta }: RowStatistics<A>,
) {
    for (p, ds) in p.iter_mut().zip(ds) {
        // row_max_log2 is one of the scores, so `score - row_max_log2` is exact where p matters. `row_max_log2 + row_sum_log2`
        // would be rounded, and with large scores p would inherit a large error.
        // If the backward's product has another shape, a score can round to a value above row_max_log2. So the difference is
        // limited to 0. The comparison is false for NaN, so NaN stays.
        let above_max = *p - row_max_log2;
        let above_max = if above_max > A::ZERO { A::ZERO } else { above_max };
        *p = (above_max - row_sum_log2).exp2();
        *ds = *p * (*ds - delta);
    }
}

/// The partial sums of a sum that crosses vector lanes.
pub(super) const LANES: usize = 16;

/// The dot product of two rows.
pub(super) struct Dot<'a, A> {
    pub(super) a: &'a [A],
    pub(super) b: &'a [A],
}

impl<A: Real> pulp::NullaryFnOnce for Dot<'_, A> {
    type Output = A;

    /// The sum is split into lanes so that the compiler can vectorise it. At the end the lanes are added in pairs. Of 4 to 64 lanes, 8 and
    /// 16 were fastest, and equal within 16% (f32, head_dim 64 to 256, one thread of an AMD EPYC).
    #[inline(always)]
    fn call(self) -> A {
        let mut lanes = [A::ZERO; LANES];
        let (a, b) = (self.a.chunks_exact(LANES), self.b.chunks_exact(LANES));
        let (a_rest, b_rest) = (a.remainder(), b.remainder());
        for (a, b) in a.zip(b) {
            for lane in 0..LANES {
                lanes[lane] = a[lane].mul_add(b[lane], lanes[lane]);
            }
        }
        for ((lane, &a), &b) in lanes.iter_mut().zip(a_rest).zip(b_rest) {
            *lane = a.mul_add(b, *lane);
        }
        sum_of_lanes(lanes)
    }
}

/// The sum of the lanes, in pairs.
#[inline(always)]
pub(super) fn sum_of_lanes<A: Real>(mut lanes: [A; LANES]) -> A {
    let mut width = LANES;
    while width > 1 {
        width /= 2;
        for lane in 0..width {
            lanes[lane] += lanes[lane + width];
        }
    }
    lanes[0]
}
