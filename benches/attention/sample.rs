//! The answer: naive attention in f64 at a sample of queries and keys, cheap enough to check every case of a grid.
//!
//! A query's row of o and dq needs nothing but q, k, v and do. A key's row of dk and dv needs the softmax of every query
//! that sees the key: the lse and the o that the GPU returned, which are themselves checked at the sampled queries. So a
//! row of either kind costs one walk over a sequence, and a lost tile shows in every row that it belongs to.
//!
//! # How far a row may be off
//!
//! A row of o is `sum of p[j] v[j]`: each p is rounded to the tensors' type before the product, and so is the sum after
//! it. Roundings of different terms are independent, so their errors add up as squares do, and the row's error is below
//! one step of `noise + ||o||`, with `noise^2 = sum of (p[j] ||v[j]||)^2`. The same holds for dv with do in the place of
//! v. In dq and dk the terms are `ds[j] k[j]` and `ds[i] q[i]`, where `ds = softmax_scale * p * (dp - delta)` loses digits
//! when it cancels: each term counts with `softmax_scale * p * (|dp| + ||do|| ||o||)`, as o is rounded before delta.

use anyhow::{ensure, Context, Result};
use candle_core::{DType, Device, Tensor};
use rand::Rng;
use rand_chacha::ChaCha8Rng;
use rayon::prelude::*;

use crate::cases::{Case, Mask, Pass, Sequence};
use crate::check::{add_scaled, dot, norm};
use crate::inputs::{self, values, Inputs};
use crate::peers::{self, Answer, Peer};

/// Relative errors `||got - want|| / ||want||` over the sampled rows.
pub struct Errors {
    pub o: f64,
    /// The largest of dq, dk and dv.
    pub grads: Option<f64>,
}

/// Compares the `answer` of `peer`, and the `lse` of our forward, at a sample of the rows of `case`, the same ones in
/// every run.
///
/// # Errors
/// If a tensor is farther off than rounding can bring it.
pub fn check(case: &Case, peer: Peer, inputs: &Inputs, answer: &Answer, lse: &Tensor) -> Result<Errors> {
    let mut rng = inputs::rng(case);
    let mut all = [Distance::default(); 4];
    let mut lse_error = 0f64;
    for (sequence, head_k) in heads(case, &mut rng) {
        let head = Head::read(case, sequence, head_k, inputs, answer, lse)?;
        let group = case.num_heads / case.num_heads_k();
        let queries: Vec<(usize, usize)> = spread_over(sequence.seqlen_q, case.checked_rows, &mut rng)
            .into_iter()
            .map(|row| (row, rng.random_range(0..group)))
            .collect();
        let (errors, [o, dq]) = queries
            .par_iter()
            .map(|&(row, member)| head.check_query(row, member))
            .reduce(<(f64, [Distance; 2])>::default, |a, b| (worse(a.0, b.0), [a.1[0] + b.1[0], a.1[1] + b.1[1]]));
        lse_error = worse(lse_error, errors);
        let keys = if answer.grads.is_some() { case.checked_rows / 2 } else { 0 };
        let [dk, dv] = spread_over(sequence.seqlen_k, keys, &mut rng)
            .par_iter()
            .map(|&col| head.check_key(col))
            .reduce(<[Distance; 2]>::default, |a, b| [a[0] + b[0], a[1] + b[1]]);
        for (sum, part) in all.iter_mut().zip([o, dq, dk, dv]) {
            *sum = *sum + part;
        }
    }

    // An error of lse scales every probability by as much: by less than a probability's own rounding, then.
    let step = rounding_step(case.dtype);
    ensure!(lse_error <= 0.5 * step, "lse is off by up to {lse_error:.2e}, limit {:.2e}", 0.5 * step);
    let computed = if answer.grads.is_some() { 4 } else { 1 };
    for (name, distance) in ["o", "dq", "dk", "dv"].into_iter().zip(&all).take(computed) {
        // NaN fails every comparison, and is refused.
        ensure!(
            distance.of_noise <= steps(peer) * step,
            "{name} differs from the reference: [row {}, head {}] is off by {:.2e} of its length and noise, limit {:.2e}; \
             ||got - want|| / ||want|| = {:.2e} over the sampled rows",
            distance.place.row,
            distance.place.head,
            distance.of_noise,
            steps(peer) * step,
            distance.relative()
        );
    }
    let [o, dq, dk, dv] = all.map(Distance::relative);
    Ok(Errors { o, grads: answer.grads.is_some().then(|| worse(dq, worse(dk, dv))) })
}

/// Shows on a small case, on the CPU, that [`check`] lets a right answer pass, and none with a tile of keys or queries left out.
///
/// # Errors
/// If it does not.
pub fn prove(dtype: DType) -> Result<Errors> {
    const TILE: usize = 64;
    let case = Case {
        lengths: vec![3 * TILE, 1, 17 * TILE + 5],
        num_heads_k: Some(2),
        mask: Mask::Causal,
        passes: vec![Pass::Backward],
        checked_rows: 16,
        ..Case::new("sample".into(), "packed, shared heads, causal: everything that finds a row", (4, 32), dtype)
    };
    let right = Inputs::draw(&case, &Device::Cpu)?;
    let answer = |inputs: &Inputs| -> Result<[Tensor; 4]> {
        let operator = Peer::Ours.prepare(&case, inputs)?.operator(&case, &inputs.do_)?;
        let o = operator.forward()?;
        let [dq, dk, dv] = operator.backward(&o)?;
        Ok([o, dq, dk, dv])
    };
    let accepts = |[o, dq, dk, dv]: [Tensor; 4], lse: &Tensor| {
        check(&case, Peer::Ours, &right, &Answer { o, grads: Some([dq, dk, dv]) }, lse)
    };
    let (got, lse) = (answer(&right)?, peers::lse(&case, &right)?);
    let errors = accepts(got.clone(), &lse).context("a right answer is refused")?;

    // Rows of 0 add nothing: without v of some keys, o and dq are as if the tile were lost; without do of some queries,
    // dk and dv are. The longest sequence loses its first tile of keys, which later queries see, or its last of queries.
    let without_tile = |x: &Tensor, first: usize| -> Result<Tensor> {
        let rows = Tensor::arange(0, x.dim(0)? as u32, x.device())?;
        let kept = (rows.lt(first as u32)? + rows.ge((first + TILE) as u32)?)?.to_dtype(x.dtype())?;
        Ok(x.broadcast_mul(&kept.reshape(((), 1, 1))?)?)
    };
    let longest = case.sequences()[2];
    let Inputs { q, k, v, do_ } = &right;
    let v_without = without_tile(v, longest.first_k)?;
    let do_without = without_tile(do_, longest.first_q + longest.seqlen_q - TILE)?;
    let [o, dq, ..] = answer(&Inputs { q: q.clone(), k: k.clone(), v: v_without, do_: do_.clone() })?;
    let [.., dk, dv] = answer(&Inputs { q: q.clone(), k: k.clone(), v: v.clone(), do_: do_without })?;
    for (index, (name, wrong)) in [("o", o), ("dq", dq), ("dk", dk), ("dv", dv)].into_iter().enumerate() {
        let mut one_wrong = got.clone();
        one_wrong[index] = wrong;
        ensure!(accepts(one_wrong, &lse).is_err(), "{name} without a tile is accepted");
    }
    ensure!(accepts(got, &(lse + 0.01)?).is_err(), "an lse that is off by 0.01 is accepted");
    Ok(errors)
}

/// Steps of rounding that a row may be off by.
///
/// Ours rounds each of p, ds, o and the result once. A tile of 64 keys lost among 16k makes 8 steps of bf16, and more
/// among fewer.
///
/// Standard attention rounds after every operator: the scores three times on their way to the exponential, where a step
/// of a score between 4 and 8 is 4 to 8 steps of its p. That is too much for a lost tile to show, but not for a mask or a
/// scale that is another.
fn steps(peer: Peer) -> f64 {
    match peer {
        Peer::Standard => 32.0,
        _ => 4.0,
    }
}

/// The largest relative error of one rounding.
pub fn rounding_step(dtype: DType) -> f64 {
    match dtype {
        DType::F16 => 2f64.powi(-11),
        DType::BF16 => 2f64.powi(-8),
        other => unreachable!("no GPU kernel takes {other:?}"),
    }
}

/// The larger, or NaN if either is.
fn worse(a: f64, b: f64) -> f64 {
    if a.is_nan() || a > b {
        a
    } else {
        b
    }
}

/// How far rows are off.
#[derive(Clone, Copy, Default)]
struct Distance {
    /// Sums of squares over all rows: of the error, and of what is right.
    error: f64,
    want: f64,
    /// The largest error of a row, as a share of its length and noise, and where that row is.
    of_noise: f64,
    place: Place,
}

/// A row: its token among those of all sequences, and its head.
#[derive(Clone, Copy, Debug, Default)]
struct Place {
    row: usize,
    head: usize,
}

impl std::fmt::Display for Errors {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        write!(f, "error of o {:.1e}", self.o)?;
        self.grads.map_or(Ok(()), |error| write!(f, ", of dq, dk and dv {error:.1e}"))
    }
}

impl Distance {
    /// Of one row; `noise` is the square that the head of this file has.
    fn between(place: Place, got: &[f64], want: &[f64], noise: f64) -> Self {
        let error: f64 = got.iter().zip(want).map(|(got, want)| (got - want) * (got - want)).sum();
        // A row that nothing adds to must be 0 exactly.
        let of_noise = if error == 0.0 { 0.0 } else { error.sqrt() / (norm(want) + noise.sqrt()) };
        Self { error, want: dot(want, want), of_noise, place }
    }

    fn relative(self) -> f64 {
        (self.error / self.want).sqrt()
    }
}

impl std::ops::Add for Distance {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        let of_noise = worse(self.of_noise, other.of_noise);
        let place = if of_noise.to_bits() == self.of_noise.to_bits() { self.place } else { other.place };
        Self { error: self.error + other.error, want: self.want + other.want, of_noise, place }
    }
}

/// Sequences and key heads to look at: the first of both, the last of both, the longest sequence, and one by chance.
fn heads(case: &Case, rng: &mut ChaCha8Rng) -> Vec<(Sequence, usize)> {
    let sequences = case.sequences();
    let longest = (0..sequences.len()).max_by_key(|&index| sequences[index].seqlen_k).unwrap_or(0);
    let mut head = || rng.random_range(0..case.num_heads_k());
    let (one, other) = (head(), head());
    let any = rng.random_range(0..sequences.len());
    let chosen = [(0, 0), (sequences.len() - 1, case.num_heads_k() - 1), (longest, one), (any, other)];
    chosen.into_iter().map(|(sequence, head_k)| (sequences[sequence], head_k)).collect()
}

/// The first, the last and one drawn from each of equal stretches between, `count` of `0..len` in all, or all of them.
fn spread_over(len: usize, count: usize, rng: &mut ChaCha8Rng) -> Vec<usize> {
    if len <= count {
        return (0..len).collect();
    }
    let mut row = |stretch: usize| match stretch {
        0 => 0,
        _ if stretch == count - 1 => len - 1,
        _ => rng.random_range(stretch * len / count..(stretch + 1) * len / count),
    };
    (0..count).map(&mut row).collect()
}

/// One key head of one sequence, with the query heads that share it, in f64 on the host.
struct Head<'a> {
    case: &'a Case,
    sequence: Sequence,
    head_k: usize,
    group: usize,
    /// `(seqlen_q, group, head_dim)`.
    q: Vec<f64>,
    do_: Vec<f64>,
    o: Vec<f64>,
    dq: Vec<f64>,
    /// `(group, seqlen_q)`.
    lse: Vec<f64>,
    /// `(seqlen_k, head_dim)`.
    k: Vec<f64>,
    v: Vec<f64>,
    dk: Vec<f64>,
    dv: Vec<f64>,
}

impl<'a> Head<'a> {
    /// Gathers the head on the device, so that only its own elements travel.
    fn read(
        case: &'a Case,
        sequence: Sequence,
        head_k: usize,
        inputs: &Inputs,
        answer: &Answer,
        lse: &Tensor,
    ) -> Result<Self> {
        let group = case.num_heads / case.num_heads_k();
        type Span = (usize, usize);
        let read = |tensor: &Tensor, (first, rows): Span, (head, heads): Span, num_heads: usize| -> Result<Vec<f64>> {
            let tokens = tensor.elem_count() / (num_heads * case.head_dim);
            let tensor = tensor.reshape((tokens, num_heads, case.head_dim))?;
            Ok(values(&tensor.narrow(0, first, rows)?.narrow(1, head, heads)?.force_contiguous()?)?)
        };
        let of_q = |tensor: &Tensor| {
            read(tensor, (sequence.first_q, sequence.seqlen_q), (head_k * group, group), case.num_heads)
        };
        let of_k =
            |tensor: &Tensor| read(tensor, (sequence.first_k, sequence.seqlen_k), (head_k, 1), case.num_heads_k());
        let lse = match lse.dims() {
            &[_, _, seqlen_q] => lse.narrow(0, sequence.first_q / seqlen_q, 1)?.narrow(1, head_k * group, group)?,
            _ => lse.narrow(0, head_k * group, group)?.narrow(1, sequence.first_q, sequence.seqlen_q)?,
        };
        let [dq, dk, dv] = match &answer.grads {
            Some([dq, dk, dv]) => [of_q(dq)?, of_k(dk)?, of_k(dv)?],
            None => Default::default(),
        };
        Ok(Self {
            case,
            sequence,
            head_k,
            group,
            q: of_q(&inputs.q)?,
            do_: of_q(&inputs.do_)?,
            o: of_q(&answer.o)?,
            dq,
            lse: values(&lse.force_contiguous()?)?,
            k: of_k(&inputs.k)?,
            v: of_k(&inputs.v)?,
            dk,
            dv,
        })
    }

    fn softmax_scale(&self) -> f64 {
        1.0 / (self.case.head_dim as f64).sqrt()
    }

    fn row_q<'b>(&self, of: &'b [f64], row: usize, member: usize) -> &'b [f64] {
        &of[(row * self.group + member) * self.case.head_dim..][..self.case.head_dim]
    }

    fn row_k<'b>(&self, of: &'b [f64], col: usize) -> &'b [f64] {
        &of[col * self.case.head_dim..][..self.case.head_dim]
    }

    /// The error of lse, and the distances of o and dq, at query `row` of head `member` of the group.
    fn check_query(&self, row: usize, member: usize) -> (f64, [Distance; 2]) {
        let keys = self.case.visible_keys(&self.sequence, row);
        let (q, do_) = (self.row_q(&self.q, row, member), self.row_q(&self.do_, row, member));
        let mut p: Vec<f64> = keys.clone().map(|col| self.softmax_scale() * dot(q, self.row_k(&self.k, col))).collect();
        let max = p.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let lse = max + p.iter().map(|s| (s - max).exp()).sum::<f64>().ln();
        p.iter_mut().for_each(|p| *p = (*p - lse).exp());

        let (mut o, mut o_noise) = (vec![0.0; q.len()], 0.0);
        for (col, &p) in keys.clone().zip(&p) {
            let v = self.row_k(&self.v, col);
            add_scaled(&mut o, p, v);
            o_noise += p * p * dot(v, v);
        }
        let place = Place { row: self.sequence.first_q + row, head: self.head_k * self.group + member };
        let o_distance = Distance::between(place, self.row_q(&self.o, row, member), &o, o_noise);
        let lse_error = (self.lse[member * self.sequence.seqlen_q + row] - lse).abs();
        if self.dq.is_empty() {
            return (lse_error, [o_distance, Distance::default()]);
        }

        let (delta, delta_noise) = (dot(&o, do_), norm(do_) * norm(&o));
        let (mut dq, mut dq_noise) = (vec![0.0; q.len()], 0.0);
        for (col, &p) in keys.zip(&p) {
            let (k, dp) = (self.row_k(&self.k, col), dot(do_, self.row_k(&self.v, col)));
            let factor = self.softmax_scale() * p;
            add_scaled(&mut dq, factor * (dp - delta), k);
            dq_noise += (factor * (dp.abs() + delta_noise)).powi(2) * dot(k, k);
        }
        (lse_error, [o_distance, Distance::between(place, self.row_q(&self.dq, row, member), &dq, dq_noise)])
    }

    /// The distances of dk and dv at key `col`.
    fn check_key(&self, col: usize) -> [Distance; 2] {
        let (k, v) = (self.row_k(&self.k, col), self.row_k(&self.v, col));
        let (mut dk, mut dk_noise) = (vec![0.0; k.len()], 0.0);
        let (mut dv, mut dv_noise) = (vec![0.0; v.len()], 0.0);
        let sees = |row: &usize| self.case.visible_keys(&self.sequence, *row).contains(&col);
        for row in (0..self.sequence.seqlen_q).filter(sees) {
            for member in 0..self.group {
                let [q, do_, o] = [&self.q, &self.do_, &self.o].map(|of| self.row_q(of, row, member));
                let lse = self.lse[member * self.sequence.seqlen_q + row];
                let p = (self.softmax_scale() * dot(q, k) - lse).exp();
                add_scaled(&mut dv, p, do_);
                dv_noise += p * p * dot(do_, do_);
                let (dp, delta, delta_noise) = (dot(do_, v), dot(do_, o), norm(do_) * norm(o));
                let factor = self.softmax_scale() * p;
                add_scaled(&mut dk, factor * (dp - delta), q);
                dk_noise += (factor * (dp.abs() + delta_noise)).powi(2) * dot(q, q);
            }
        }
        let place = Place { row: self.sequence.first_k + col, head: self.head_k };
        [
            Distance::between(place, self.row_k(&self.dk, col), &dk, dk_noise),
            Distance::between(place, self.row_k(&self.dv, col), &dv, dv_noise),
        ]
    }
}
