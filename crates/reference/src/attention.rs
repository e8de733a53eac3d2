//! Attention written as its formulas: one query at a time, over all visible keys, without tiles and without recomputation.
//!
//! ```text
//! raw_ij = softmax_scale * q_i . k_j
//! s_ij   = softcap * tanh(raw_ij / softcap) - slope * |i + shift - j|        shift = seqlen_k - seqlen_q
//! lse_i  = ln sum_j exp(s_ij)                                                over the visible j
//! p_ij   = exp(s_ij - lse_i)
//! o_i    = sum_j p_ij v_j
//!
//! delta_i  = do_i . o_i
//! ds_ij    = p_ij (do_i . v_j - delta_i + dlse_i)
//! d_raw_ij = ds_ij (1 - tanh(raw_ij / softcap)^2)
//! dq_i = softmax_scale sum_j d_raw_ij k_j    dk_j = softmax_scale sum_i d_raw_ij q_i    dv_j = sum_i p_ij do_i
//! ```
//!
//! A hidden key takes part in no sum, even if it is NaN or infinite. NaN and infinities in visible keys go through the
//! arithmetic above. A query that sees no key gives `o = 0`, `lse = -inf`, and no gradient.

use crate::matrix::{add_rows, add_to_rows, dot, Keys, Matrix};
use crate::number::Number;

/// How many keys a query sees before and after the aligned one. `None` means all.
pub type Window = (Option<usize>, Option<usize>);

/// One head of one sequence. The arithmetic runs in `T`.
pub struct Head<'a, T> {
    /// `(seqlen_q, head_dim)`
    pub q: Matrix<T>,
    /// `(seqlen_k, head_dim)`. Several query heads may share k and v.
    pub k: &'a Keys<T>,
    /// `(seqlen_k, head_dim_v)`
    pub v: &'a Keys<T>,
    /// The gradient of o: `(seqlen_q, head_dim_v)`.
    pub do_: Matrix<T>,
    /// The gradient of lse.
    pub dlse: Vec<T>,
    pub window: Window,
    pub softmax_scale: T,
    pub softcap: Option<T>,
    pub alibi_slope: Option<T>,
    /// Rounds a result, or an operand of a matrix product, to the type of the tensors.
    pub round: fn(T) -> T,
}

/// Differences from the plain formulas. Two of them are allowed, the third one is a mistake.
#[derive(Clone, Copy)]
pub struct Variant<'a> {
    /// Sums the keys from the last to the first.
    pub reversed: bool,
    /// `o = (sum exp(s - max) v) / sum exp(s - max)`: divides at the end, so other numbers are rounded.
    pub divides_last: bool,
    /// Whether this query wrongly skips this key. Both are counted within their sequence.
    pub drops: &'a (dyn Fn(usize, usize) -> bool + Sync),
}

pub const PLAIN: Variant<'static> = Variant { reversed: false, divides_last: false, drops: &|_, _| false };

/// Row i of the forward. `raw`, `s`, `derivative` and `p` have one number for each of `keys`.
pub struct Forward<T> {
    pub keys: Vec<usize>,
    pub raw: Vec<T>,
    pub s: Vec<T>,
    /// The derivative of `s` with respect to `raw`.
    pub derivative: Vec<T>,
    pub p: Vec<T>,
    pub o: Vec<T>,
    pub lse: T,
}

/// Row i of the backward. `d_raw` has one number for each of the forward's keys.
pub struct Backward<T> {
    pub d_raw: Vec<T>,
    pub dq: Vec<T>,
}

pub fn forward<T: Number>(head: &Head<T>, i: usize, variant: &Variant) -> Forward<T> {
    let (_, seqlen_k) = head.lengths();
    let mut keys: Vec<usize> = (0..seqlen_k).filter(|&j| head.sees(i, j) && !(variant.drops)(i, j)).collect();
    if variant.reversed {
        keys.reverse();
    }
    let mut o = vec![T::ZERO; head.v.rows.width()];
    if keys.is_empty() {
        let none = Vec::new;
        return Forward {
            keys,
            raw: none(),
            s: none(),
            derivative: none(),
            p: none(),
            o,
            lse: T::from_f64(f64::NEG_INFINITY),
        };
    }
    let products = head.k.products(&head.q[i], &keys);
    let raw: Vec<T> = products.into_iter().map(|product| head.softmax_scale * product).collect();
    let (s, derivative): (Vec<T>, Vec<T>) = keys.iter().zip(&raw).map(|(&j, &raw)| head.score(i, j, raw)).unzip();
    let max = finite_maximum(&s);
    let exp: Vec<T> = s.iter().map(|&s| (s - max).exp()).collect();
    let mut sum = T::ZERO;
    exp.iter().for_each(|&x| sum += x);
    let p: Vec<T> = exp.iter().map(|&x| x / sum).collect();
    let weights: Vec<T> = if variant.divides_last { &exp } else { &p }.iter().map(|&x| (head.round)(x)).collect();
    add_rows(&mut o, &keys, &weights, &head.v.rows);
    for x in &mut o {
        *x = (head.round)(if variant.divides_last { *x / sum } else { *x });
    }
    Forward { keys, raw, s, derivative, p, o, lse: max + sum.ln() }
}

/// dq of query i. Adds the query's terms to `dv`, and to `dk` without the softmax scale.
pub fn backward<T: Number>(
    head: &Head<T>,
    i: usize,
    forward: &Forward<T>,
    dk: &mut Matrix<T>,
    dv: &mut Matrix<T>,
) -> Backward<T> {
    let Forward { keys, derivative, p, .. } = forward;
    let delta = dot(&head.do_[i], &forward.o);
    let dp = head.v.products(&head.do_[i], keys);
    let d_raw: Vec<T> = (0..keys.len()).map(|n| head.d_raw(i, derivative[n], p[n], dp[n], delta)).collect();
    let rounded_p: Vec<T> = p.iter().map(|&p| (head.round)(p)).collect();
    add_to_rows(dk, keys, &d_raw, &head.q[i]);
    add_to_rows(dv, keys, &rounded_p, &head.do_[i]);
    let mut dq = vec![T::ZERO; head.q.width()];
    add_rows(&mut dq, keys, &d_raw, &head.k.rows);
    dq.iter_mut().for_each(|x| *x = (head.round)(head.softmax_scale * *x));
    Backward { d_raw, dq }
}

impl<T: Number> Head<'_, T> {
    /// `(seqlen_q, seqlen_k)`
    pub fn lengths(&self) -> (usize, usize) {
        (self.q.rows(), self.k.rows.rows())
    }

    pub fn sees(&self, i: usize, j: usize) -> bool {
        visible(self.lengths(), self.window, i, j)
    }

    pub fn raw(&self, i: usize, j: usize) -> T {
        self.softmax_scale * dot(&self.q[i], &self.k.rows[j])
    }

    /// The score, and its derivative with respect to `raw`.
    pub fn score(&self, i: usize, j: usize, raw: T) -> (T, T) {
        let (capped, derivative) = self.softcap.map_or((raw, T::ONE), |cap| {
            let tanh = (raw / cap).tanh();
            (cap * tanh, T::ONE - tanh * tanh)
        });
        let (seqlen_q, seqlen_k) = self.lengths();
        let distance = (i as f64 + seqlen_k as f64 - seqlen_q as f64 - j as f64).abs();
        (self.alibi_slope.map_or(capped, |slope| capped - slope * T::from_f64(distance)), derivative)
    }

    pub fn dp(&self, i: usize, j: usize) -> T {
        dot(&self.do_[i], &self.v.rows[j])
    }

    pub fn d_raw(&self, i: usize, derivative: T, p: T, dp: T, delta: T) -> T {
        let ds = p * (dp - delta + self.dlse[i]);
        (self.round)(ds * derivative)
    }
}

/// Whether query `i` sees key `j` of a sequence.
pub fn visible((seqlen_q, seqlen_k): (usize, usize), (left, right): Window, i: usize, j: usize) -> bool {
    let aligned = i as i128 + seqlen_k as i128 - seqlen_q as i128;
    let j = j as i128;
    left.is_none_or(|left| j >= aligned - left as i128) && right.is_none_or(|right| j <= aligned + right as i128)
}

/// The largest score. NaN never compares greater, so a NaN reaches the sum through exp and not through the maximum.
/// If every score is -inf, the result is 0, because exp(-inf - -inf) would be NaN instead of exp(-inf) = 0.
fn finite_maximum<T: Number>(s: &[T]) -> T {
    let lowest = T::from_f64(f64::NEG_INFINITY);
    let max = s.iter().fold(lowest, |max, &x| if x > max { x } else { max });
    if max == lowest {
        T::ZERO
    } else {
        max
    }
}
