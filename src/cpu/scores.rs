//! What happens to a tile of scores between the matrix products: softcap, ALiBi, online softmax, and P from lse.
//!
//! Scores live in the log2 domain (`softmax_scale * log2 e` is folded into the product that makes them), so that every
//! exponential is an `exp2`. The loops here are plain; run inside `pulp::Arch::dispatch` they become the widest vector
//! instructions that the machine has. One vector lane is one query in the forward and one key in the backward, so no sum
//! or maximum crosses lanes.

use super::element::Real;
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
    pub(super) fn is_identity(&self) -> bool {
        self.softcap_log2.is_none() && self.slope_log2.is_none()
    }

    /// Whether [`Self::apply_keeping_derivative`] is needed: the scores are not linear in the products.
    pub(super) fn has_softcap(&self) -> bool {
        self.softcap_log2.is_some()
    }

    /// Turns products into scores. Lane `l` is `|l + distance|` positions away from its aligned partner.
    #[inline(always)]
    pub(super) fn apply(&self, products: &mut [A], distance: isize) {
        if let Some(softcap) = self.softcap_log2 {
            for x in products.iter_mut() {
                *x = x.tanh() * softcap;
            }
        }
        self.add_alibi(products, distance);
    }

    /// As [`Self::apply`], and keeps the softcap's derivative `1 - tanh^2` of each score.
    #[inline(always)]
    pub(super) fn apply_keeping_derivative(&self, products: &mut [A], derivative: &mut [A], distance: isize) {
        if let Some(softcap) = self.softcap_log2 {
            for (x, slope) in products.iter_mut().zip(derivative) {
                let capped = x.tanh();
                *slope = (-capped).mul_add(capped, A::ONE);
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
    pub(super) fn step(&mut self, scores: &mut [A], rows: usize) {
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
    pub(super) fn rescale(&self, o: &mut [A], head_dim: usize) {
        for (row, &rescale) in o.chunks_exact_mut(head_dim).zip(&self.rescale) {
            if rescale != A::ONE {
                for x in row {
                    *x *= rescale;
                }
            }
        }
    }

    /// Sum and lse of query `row`. A row whose scores are all minus infinity has sum 0 and lse minus infinity.
    pub(super) fn finish(&self, row: usize) -> (A, A) {
        (self.sum[row], (self.max[row] + self.sum[row].log2()) * A::LN_2)
    }
}

/// Turns scores of one query into probabilities: `exp2(score - lse)`, with lse in the log2 domain.
#[inline(always)]
pub(super) fn probabilities<A: Real>(scores: &mut [A], lse_log2: A) {
    for x in scores {
        *x = (*x - lse_log2).exp2();
    }
}

/// Turns dP of one query into dS: `p * (dp - delta)`.
#[inline(always)]
pub(super) fn score_gradients<A: Real>(dp: &mut [A], p: &[A], delta: A) {
    for (dp, &p) in dp.iter_mut().zip(p) {
        *dp = p * (*dp - delta);
    }
}
