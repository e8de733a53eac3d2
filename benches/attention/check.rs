//! The answer: naive attention in f64, held against what a peer computed.
//!
//! Gradients belong to a loss that weighs the checked queries alone, so that those queries determine them fully: every
//! row of dq, dk and dv can then be compared, at the price of the checked rows.

use anyhow::{bail, Result};
use candle_core::{DType, Tensor};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rayon::prelude::*;

use crate::cases::{Case, Sequence};
use crate::inputs::{values, Inputs};
use crate::peers::Answer;

/// What the answer of a case must be, at the checked rows.
pub struct Reference<'a> {
    case: &'a Case,
    /// Of each row of q, over all sequences: whether it is checked.
    checked: Vec<bool>,
    o: Rows,
    dq: Rows,
    dk: Rows,
    dv: Rows,
}

/// Rows of `head_dim` values, in the order of [`Inputs`].
struct Rows {
    values: Vec<f64>,
    /// For each row, the largest sum of magnitudes that rounding acts on: see [`limit`].
    magnitudes: Vec<f64>,
}

impl Rows {
    fn zeros(rows: usize, head_dim: usize) -> Self {
        Self { values: vec![0.0; rows * head_dim], magnitudes: vec![0.0; rows] }
    }
}

/// How far the worst element was from its limit.
#[derive(Clone, Copy)]
pub struct Checked {
    /// Largest |got - want| of o.
    pub o_error: f64,
    /// Largest |got - want| of dq, dk and dv.
    pub grad_error: Option<f64>,
    /// Largest error as a share of what was allowed.
    pub share_of_limit: f64,
}

/// How far an element of a row may be off.
///
/// Inner products and sums run in f32 in some order: their error is a small multiple of the rounding step times the sum
/// of the magnitudes of what is added, for which 64 steps (2^-18) are room enough at 32k keys and yet below what one
/// lost key in 32k changes. Results are rounded to the tensor's type; so is the o that delta in the backward is computed
/// from, and whatever a peer rounds between its operators.
fn limit(dtype: DType, magnitude: f64, row_max: f64, backward: bool) -> f64 {
    const STEPS: f64 = 64.0;
    let step = match dtype {
        DType::F16 => 2f64.powi(-11),
        DType::BF16 => 2f64.powi(-8),
        DType::F64 => 2f64.powi(-53),
        _ => 2f64.powi(-24),
    };
    let sums = if dtype == DType::F64 { step } else { 2f64.powi(-24) };
    let rounded_o = if backward { step } else { 0.0 };
    (STEPS * sums + rounded_o) * magnitude + 2.0 * step * row_max
}

impl<'a> Reference<'a> {
    /// Which queries are checked: the first, the last and one drawn from each of equal stretches, or all of them.
    pub fn choose_rows(case: &Case) -> Vec<bool> {
        let mut rng = ChaCha8Rng::seed_from_u64(case.checked_rows as u64);
        let mut checked = Vec::new();
        for sequence in case.sequences() {
            let len = sequence.seqlen_q;
            let all = len <= case.checked_rows;
            let mut rows = vec![all; len];
            if !all {
                for stretch in 0..case.checked_rows {
                    let start = stretch * len / case.checked_rows;
                    let end = (stretch + 1) * len / case.checked_rows;
                    rows[rng.random_range(start..end)] = true;
                }
                (rows[0], rows[len - 1]) = (true, true);
            }
            checked.extend(rows);
        }
        checked
    }

    /// `do_` with the rows that are not checked set to 0.
    pub fn restrict(case: &Case, checked: &[bool], do_: &Tensor) -> Result<Tensor> {
        let mut restricted = values(do_)?;
        for (row, &checked) in restricted.chunks_exact_mut(case.num_heads * case.head_dim).zip(checked) {
            if !checked {
                row.fill(0.0);
            }
        }
        Ok(Tensor::from_vec(restricted, do_.shape(), do_.device())?.to_dtype(do_.dtype())?)
    }

    /// Attention at the rows `checked`, and the gradients for `do_`.
    pub fn new(case: &'a Case, inputs: &Inputs, checked: Vec<bool>, do_: &Tensor) -> Result<Self> {
        let (num_heads, num_heads_k, head_dim) = (case.num_heads, case.num_heads_k(), case.head_dim);
        let [q, k, v, do_] = [values(&inputs.q)?, values(&inputs.k)?, values(&inputs.v)?, values(do_)?];
        let (rows_q, rows_k) = (q.len() / head_dim, k.len() / head_dim);
        let sequences = case.sequences();
        let heads: Vec<(Sequence, usize)> =
            sequences.iter().flat_map(|&sequence| (0..num_heads_k).map(move |head_k| (sequence, head_k))).collect();
        let head = |&(sequence, head_k): &(Sequence, usize)| {
            Head::attend(case, sequence, head_k, [&q, &k, &v, &do_], &checked)
        };
        let parts: Vec<Head> = heads.par_iter().map(head).collect();

        let (mut o, mut dq) = (Rows::zeros(rows_q, head_dim), Rows::zeros(rows_q, head_dim));
        let (mut dk, mut dv) = (Rows::zeros(rows_k, head_dim), Rows::zeros(rows_k, head_dim));
        let copy = |from: &Rows, at: usize, to: &mut Rows, row: usize| {
            to.values[row * head_dim..][..head_dim].copy_from_slice(&from.values[at * head_dim..][..head_dim]);
            to.magnitudes[row] = from.magnitudes[at];
        };
        let group = num_heads / num_heads_k;
        for ((sequence, head_k), part) in heads.iter().zip(&parts) {
            for at in 0..group * sequence.seqlen_q {
                let (head, row) = (head_k * group + at / sequence.seqlen_q, at % sequence.seqlen_q);
                let to = (sequence.first_q + row) * num_heads + head;
                copy(&part.o, at, &mut o, to);
                copy(&part.dq, at, &mut dq, to);
            }
            for col in 0..sequence.seqlen_k {
                let to = (sequence.first_k + col) * num_heads_k + head_k;
                copy(&part.dk, col, &mut dk, to);
                copy(&part.dv, col, &mut dv, to);
            }
        }
        Ok(Self { case, checked, o, dq, dk, dv })
    }

    /// Compares a peer's answer.
    ///
    /// # Errors
    /// If an element is off by more than its limit: the worst one and its coordinates.
    pub fn check(&self, who: &str, answer: &Answer) -> Result<Checked> {
        let (num_heads, num_heads_k) = (self.case.num_heads, self.case.num_heads_k());
        let row_checked = |row: usize| self.checked[row / num_heads];
        let mut worst = self.compare(who, "o", &answer.o, &self.o, num_heads, &row_checked)?;
        let o_error = worst.0;
        let mut grad_error = None;
        if let Some([dq, dk, dv]) = &answer.grads {
            let every_row = |_| true;
            for (name, got, want, heads) in
                [("dq", dq, &self.dq, num_heads), ("dk", dk, &self.dk, num_heads_k), ("dv", dv, &self.dv, num_heads_k)]
            {
                let (error, share) = self.compare(who, name, got, want, heads, &every_row)?;
                grad_error = Some(error.max(grad_error.unwrap_or(0.0)));
                worst.1 = share.max(worst.1);
            }
        }
        Ok(Checked { o_error, grad_error, share_of_limit: worst.1 })
    }

    /// The largest error, and the largest share of its limit that an error takes.
    fn compare(
        &self,
        who: &str,
        name: &str,
        got: &Tensor,
        want: &Rows,
        heads: usize,
        checked: &dyn Fn(usize) -> bool,
    ) -> Result<(f64, f64)> {
        let head_dim = self.case.head_dim;
        let got = values(got)?;
        if got.len() != want.values.len() {
            bail!("{name} has {} elements where {} are right\ncase {who}", got.len(), want.values.len());
        }
        let (mut largest, mut worst, mut over, mut seen) = (0f64, None, 0, 0);
        let mut largest_share = 0f64;
        for (row, (got, want_row)) in got.chunks_exact(head_dim).zip(want.values.chunks_exact(head_dim)).enumerate() {
            if !checked(row) {
                continue;
            }
            let limit = limit(self.case.dtype, want.magnitudes[row], max_abs(want_row), name != "o");
            seen += head_dim;
            for (dim, (&got, &want)) in got.iter().zip(want_row).enumerate() {
                let error = (got - want).abs();
                // A row that nothing contributes to must be 0 exactly. NaN fails every comparison and is the worst.
                let share = if error == 0.0 { 0.0 } else { error / limit };
                let share = if share.is_nan() { f64::INFINITY } else { share };
                if share > 1.0 {
                    over += 1;
                }
                largest = largest.max(error);
                if share > largest_share || (share > 1.0 && worst.is_none()) {
                    (largest_share, worst) = (share, Some((row, dim, got, want, error, limit)));
                }
            }
        }
        if let (true, Some((row, dim, got, want, error, limit))) = (over > 0, worst) {
            let (token, head) = (row / heads, row % heads);
            let place = self.place(name, token);
            bail!(
                "{name} differs from the reference: |{got:.6e} - {want:.6e}| = {error:.2e} at [{place}, head {head}, \
                 dim {dim}], limit {limit:.2e}\ncase {who}; {over} of {seen} elements over"
            );
        }
        Ok((largest, largest_share))
    }

    /// Row `token` of all rows, as a sequence and a row within it.
    fn place(&self, name: &str, token: usize) -> String {
        let of_keys = matches!(name, "dk" | "dv");
        for (index, sequence) in self.case.sequences().iter().enumerate() {
            let (first, len) = match of_keys {
                true => (sequence.first_k, sequence.seqlen_k),
                false => (sequence.first_q, sequence.seqlen_q),
            };
            if (first..first + len).contains(&token) {
                return format!("batch {index}, {} {}", if of_keys { "key" } else { "row" }, token - first);
            }
        }
        format!("row {token}")
    }
}

/// One key head of one sequence, with the query heads that share it.
struct Head {
    /// `(head of the group, row)`.
    o: Rows,
    dq: Rows,
    dk: Rows,
    dv: Rows,
}

impl Head {
    /// Attention as its definition has it, row by row.
    fn attend(
        case: &Case,
        sequence: Sequence,
        head_k: usize,
        [q, k, v, do_]: [&Vec<f64>; 4],
        checked: &[bool],
    ) -> Self {
        let (head_dim, num_heads_k) = (case.head_dim, case.num_heads_k());
        let group = case.num_heads / num_heads_k;
        let softmax_scale = 1.0 / (head_dim as f64).sqrt();
        let gather = |from: &[f64]| -> Vec<f64> {
            let rows = sequence.first_k..sequence.first_k + sequence.seqlen_k;
            rows.flat_map(|row| &from[(row * num_heads_k + head_k) * head_dim..][..head_dim]).copied().collect()
        };
        let (k, v) = (gather(k), gather(v));
        let span = |row: usize| row * head_dim..(row + 1) * head_dim;
        let v_norms: Vec<f64> = v.chunks_exact(head_dim).map(norm).collect();
        let (mut o, mut dq) =
            (Rows::zeros(group * sequence.seqlen_q, head_dim), Rows::zeros(group * sequence.seqlen_q, head_dim));
        let (mut dk, mut dv) = (Rows::zeros(sequence.seqlen_k, head_dim), Rows::zeros(sequence.seqlen_k, head_dim));

        for at in 0..group * sequence.seqlen_q {
            let (head, row) = (head_k * group + at / sequence.seqlen_q, at % sequence.seqlen_q);
            let keys = case.visible_keys(&sequence, row);
            if !checked[sequence.first_q + row] || keys.is_empty() {
                continue;
            }
            let start = ((sequence.first_q + row) * case.num_heads + head) * head_dim;
            let (q, do_) = (&q[start..][..head_dim], &do_[start..][..head_dim]);

            let mut p: Vec<f64> = keys.clone().map(|col| softmax_scale * dot(q, &k[span(col)])).collect();
            let max = p.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            p.iter_mut().for_each(|p| *p = (*p - max).exp());
            let sum: f64 = p.iter().sum();
            p.iter_mut().for_each(|p| *p /= sum);

            let o_row = &mut o.values[span(at)];
            for (col, &p) in keys.clone().zip(&p) {
                let v = &v[span(col)];
                add_scaled(o_row, p, v);
                o.magnitudes[at] += p * max_abs(v);
            }
            if do_.iter().all(|&weight| weight == 0.0) {
                continue;
            }
            let delta = dot(o_row, do_);
            let (do_norm, o_norm) = (norm(do_), norm(o_row));
            let dq_row = &mut dq.values[span(at)];
            for (col, &p) in keys.zip(&p) {
                let (k, v) = (&k[span(col)], &v[span(col)]);
                let ds = softmax_scale * p * (dot(do_, v) - delta);
                let ds_magnitude = softmax_scale * p * do_norm * (v_norms[col] + o_norm);
                add_scaled(dq_row, ds, k);
                dq.magnitudes[at] += ds_magnitude * max_abs(k);
                add_scaled(&mut dk.values[span(col)], ds, q);
                dk.magnitudes[col] += ds_magnitude * max_abs(q);
                add_scaled(&mut dv.values[span(col)], p, do_);
                dv.magnitudes[col] += p * max_abs(do_);
            }
        }
        Self { o, dq, dk, dv }
    }
}

pub fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

pub fn norm(a: &[f64]) -> f64 {
    dot(a, a).sqrt()
}

pub fn add_scaled(to: &mut [f64], factor: f64, from: &[f64]) {
    to.iter_mut().zip(from).for_each(|(to, from)| *to += factor * from);
}

/// The largest magnitude; NaN counts for nothing.
fn max_abs(a: &[f64]) -> f64 {
    a.iter().fold(0.0, |max, x| x.abs().max(max))
}
