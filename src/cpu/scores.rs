//! What happens to a tile of scores between the matrix products: softcap, ALiBi, online softmax, and P from lse.
//!
//! Scores live in the log2 domain (`softmax_scale * log2 e` is folded into the product that makes them), so that every
//! exponential is an `exp2`. One vector lane is one query in the forward and one key in the backward, so no sum or maximum
//! crosses lanes.
//!
//! The loops are plain; run by `pulp::Arch::dispatch` they become the widest vector instructions that the machine has.
//! Each entry point is a struct whose `call` is always inlined: a closure would be compiled without those instructions.

use std::ops::Range;

use super::element::Real;
use crate::mask::Visibility;
use crate::problem::Problem;

/// From products of queries and keys to scores in the log2 domain.
#[derive(Clone, Copy)]
pub(super) struct Scoring<A> {
    /// Factor of the product `q . k` itself.
    pub(super) product_factor: A,
    softcap_log2: Option<A>,
    slope_log2: Option<A>,
}

impl<A: Real> Scoring<A> {
    pub(super) fn new(problem: &Problem, slope: Option<f32>) -> Self {
        let log2_e = std::f64::consts::LOG2_E;
        // Under a softcap the product becomes the argument of tanh, and the cap carries log2 e.
        let product_factor = match problem.softcap {
            None => problem.softmax_scale * log2_e,
            Some(softcap) => problem.softmax_scale / softcap,
        };
        Self {
            product_factor: A::from_f64_lossy(product_factor),
            softcap_log2: problem.softcap.map(|softcap| A::from_f64_lossy(softcap * log2_e)),
            slope_log2: slope.map(|slope| A::from_f64_lossy(f64::from(slope) * log2_e)),
        }
    }

    /// Whether the products are the scores already.
    fn is_identity(&self) -> bool {
        self.softcap_log2.is_none() && self.slope_log2.is_none()
    }

    /// Turns products into scores. Lane `l` is `|l + distance|` positions away from its aligned partner.
    #[inline(always)]
    fn apply(&self, products: &mut [A], distance: isize) {
        if let Some(softcap) = self.softcap_log2 {
            for x in products.iter_mut() {
                *x = x.tanh() * softcap;
            }
        }
        self.add_alibi(products, distance);
    }

    /// As [`Self::apply`], and keeps the softcap's derivative `1 - tanh^2` of each score.
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

/// Running maximum and sum of a tile of queries, one lane each; the division by the sum is left to the end.
pub(super) struct OnlineSoftmax<A> {
    /// Largest score so far.
    max: Vec<A>,
    /// Sum so far of `exp2(score - max)`.
    sum: Vec<A>,
    /// By what the step just taken multiplies earlier sums.
    rescale: Vec<A>,
    step_max: Vec<A>,
    step_sum: Vec<A>,
}

impl<A: Real> OnlineSoftmax<A> {
    /// Room for `block_m` queries.
    pub(super) fn new(block_m: usize) -> Self {
        let zeros = || vec![A::ZERO; block_m];
        Self { max: zeros(), sum: zeros(), rescale: zeros(), step_max: zeros(), step_sum: zeros() }
    }

    /// Begins a tile of queries.
    pub(super) fn reset(&mut self) {
        self.max.fill(A::NEG_INFINITY);
        self.sum.fill(A::ZERO);
    }

    /// Turns scores, one row per key with `rows` lanes, into `exp2(score - max)`, and updates maximum and sum.
    #[inline(always)]
    fn step(&mut self, scores: &mut [A], rows: usize) {
        let (max, sum, rescale) = (&mut self.max[..rows], &mut self.sum[..rows], &mut self.rescale[..rows]);
        let (step_max, step_sum) = (&mut self.step_max[..rows], &mut self.step_sum[..rows]);
        step_max.copy_from_slice(max);
        for key in scores.chunks_exact(rows) {
            for (max, &score) in step_max.iter_mut().zip(key) {
                // False for NaN, which leaves its mark in the sum instead.
                *max = if score > *max { score } else { *max };
            }
        }
        for ((rescale, max), step_max) in rescale.iter_mut().zip(max).zip(step_max.iter_mut()) {
            // With nothing but minus infinity so far, any finite reference gives exp2(-inf) = 0 instead of NaN.
            let reference = if *step_max == A::NEG_INFINITY { A::ZERO } else { *step_max };
            *rescale = (*max - reference).exp2();
            *max = *step_max;
            *step_max = reference;
        }
        step_sum.fill(A::ZERO);
        for key in scores.chunks_exact_mut(rows) {
            for ((score, &max), sum) in key.iter_mut().zip(step_max.iter()).zip(step_sum.iter_mut()) {
                let p = (*score - max).exp2();
                *score = p;
                *sum += p;
            }
        }
        for ((sum, &step_sum), &rescale) in sum.iter_mut().zip(step_sum.iter()).zip(rescale.iter()) {
            *sum = sum.mul_add(rescale, step_sum);
        }
    }

    /// Multiplies the rows of the unnormalised output, `head_dim` elements each, as the last step asks.
    #[inline(always)]
    fn rescale(&self, o: &mut [A], head_dim: usize) {
        for (row, &rescale) in o.chunks_exact_mut(head_dim).zip(&self.rescale) {
            if rescale != A::ONE {
                for x in row {
                    *x *= rescale;
                }
            }
        }
    }

    /// Maximum and sum of query `row`. Where all its scores are minus infinity, so is the maximum, and the sum is 0.
    pub(super) fn finish(&self, row: usize) -> (A, A) {
        (self.max[row], self.sum[row])
    }
}

/// Queries `rows` against keys `cols`, and how the mask lies over them.
#[derive(Clone, Copy)]
pub(super) struct TileMask<'a> {
    pub(super) rows: &'a Range<usize>,
    pub(super) cols: &'a Range<usize>,
    pub(super) sees: Visibility,
    /// Whether some pairs of the tile are hidden.
    pub(super) partial: bool,
}

impl TileMask<'_> {
    /// The keys that query `row` of the tile sees, counted from the tile's first key.
    pub(super) fn keys(&self, row: usize) -> Range<usize> {
        if self.partial {
            within(&self.sees.keys(self.rows.start + row), self.cols)
        } else {
            0..self.cols.len()
        }
    }

    /// The queries that see key `col` of the tile, counted from the tile's first query.
    pub(super) fn queries(&self, col: usize) -> Range<usize> {
        if self.partial {
            within(&self.sees.queries(self.cols.start + col), self.rows)
        } else {
            0..self.rows.len()
        }
    }

    /// The position of the tile's first query, aligned with the keys, less that of its first key.
    fn distance(&self) -> isize {
        self.rows.start as isize + self.sees.shift() - self.cols.start as isize
    }
}

/// The part of `range` inside `window`, counted from the start of `window`; empty ranges stay inside it.
fn within(range: &Range<usize>, window: &Range<usize>) -> Range<usize> {
    let start = range.start.clamp(window.start, window.end) - window.start;
    let end = range.end.clamp(window.start, window.end) - window.start;
    start..end.max(start)
}

/// Forward, between the two products: scores to unnormalised P, and the output so far rescaled to the new maximum.
pub(super) struct SoftmaxStep<'a, A> {
    pub(super) scoring: Scoring<A>,
    pub(super) mask: TileMask<'a>,
    /// S^T: one row per key, one column per query.
    pub(super) scores: &'a mut [A],
    pub(super) softmax: &'a mut OnlineSoftmax<A>,
    /// One row of `head_dim` elements per query.
    pub(super) o: &'a mut [A],
    pub(super) head_dim: usize,
}

impl<A: Real> pulp::NullaryFnOnce for SoftmaxStep<'_, A> {
    type Output = ();

    #[inline(always)]
    fn call(self) {
        let rows = self.mask.rows.len();
        if self.mask.partial || !self.scoring.is_identity() {
            for (col, scores) in self.scores.chunks_exact_mut(rows).enumerate() {
                self.scoring.apply(scores, self.mask.distance() - col as isize);
                let seen = self.mask.queries(col);
                scores[..seen.start].fill(A::NEG_INFINITY);
                scores[seen.end..].fill(A::NEG_INFINITY);
            }
        }
        self.softmax.step(self.scores, rows);
        self.softmax.rescale(self.o, self.head_dim);
    }
}

/// Backward, between the products: scores to P, and dP to dS.
pub(super) struct GradientStep<'a, A> {
    pub(super) scoring: Scoring<A>,
    pub(super) mask: TileMask<'a>,
    /// S, then P: one row per query, one column per key.
    pub(super) p: &'a mut [A],
    /// dP, then dS, in the same layout.
    pub(super) ds: &'a mut [A],
    /// Room for one row of derivatives, used under a softcap.
    pub(super) derivative: &'a mut [A],
    /// Largest score of each of the tile's queries, log2.
    pub(super) max: &'a [A],
    /// log2 of the sum of `exp2(score - max)` of each of the tile's queries.
    pub(super) log2_sum: &'a [A],
    /// Of the tile's queries.
    pub(super) delta: &'a [A],
}

impl<A: Real> pulp::NullaryFnOnce for GradientStep<'_, A> {
    type Output = ();

    #[inline(always)]
    fn call(self) {
        let cols = self.mask.cols.len();
        let rows = self.p.chunks_exact_mut(cols).zip(self.ds.chunks_exact_mut(cols));
        for (row, (p, ds)) in rows.enumerate() {
            let statistics = RowStatistics { max: self.max[row], log2_sum: self.log2_sum[row], delta: self.delta[row] };
            let seen = self.mask.keys(row);
            for outside in [0..seen.start, seen.end..cols] {
                p[outside.clone()].fill(A::ZERO);
                ds[outside].fill(A::ZERO);
            }
            // Lane l of the visible part is key seen.start + l of the tile.
            let distance = seen.start as isize - (self.mask.distance() + row as isize);
            let (p, ds) = (&mut p[seen.clone()], &mut ds[seen.clone()]);
            if self.scoring.softcap_log2.is_some() {
                let derivative = &mut self.derivative[..seen.len()];
                self.scoring.apply_keeping_derivative(p, derivative, distance);
                gradients(p, ds, statistics);
                ds.iter_mut().zip(derivative).for_each(|(ds, derivative)| *ds *= *derivative);
            } else {
                self.scoring.apply(p, distance);
                gradients(p, ds, statistics);
            }
        }
    }
}

/// What the backward knows of one query.
#[derive(Clone, Copy)]
struct RowStatistics<A> {
    max: A,
    log2_sum: A,
    delta: A,
}

/// Of one query: `p = exp2(score - lse)` and `ds = p * (dp - delta)`, in place of score and dp.
#[inline(always)]
fn gradients<A: Real>(p: &mut [A], ds: &mut [A], RowStatistics { max, log2_sum, delta }: RowStatistics<A>) {
    for (p, ds) in p.iter_mut().zip(ds) {
        // The maximum first: it is one of the scores, and the difference exact where p matters. Against their sum, rounded,
        // p would be off by the rounding of a large number. A product of another shape than the forward's may round a score
        // above the maximum; NaN passes the comparison.
        let above_max = *p - max;
        let above_max = if above_max > A::ZERO { A::ZERO } else { above_max };
        *p = (above_max - log2_sum).exp2();
        *ds = *p * (*ds - delta);
    }
}

/// The sum of products of two rows.
pub(super) struct Dot<'a, A> {
    pub(super) a: &'a [A],
    pub(super) b: &'a [A],
}

impl<A: Real> pulp::NullaryFnOnce for Dot<'_, A> {
    type Output = A;

    /// In several lanes, so that it can be vectorised; the lanes are added in pairs.
    #[inline(always)]
    fn call(self) -> A {
        const LANES: usize = 16;
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
        let mut width = LANES;
        while width > 1 {
            width /= 2;
            for lane in 0..width {
                lanes[lane] += lanes[lane + width];
            }
        }
        lanes[0]
    }
}
