//! Compares an answer with the reference's formulas at a sample of queries and keys. That is cheap enough for every
//! case of a grid.
//!
//! A query's row of o and dq needs only q, k, v and do. A key's row of dk and dv needs lse and o of every query that
//! sees the key. The check takes those from the GPU, since it compares them at the sampled queries. So a row of either
//! kind costs one pass over a sequence, and a lost tile shows in every row that it belongs to.
//!
//! # How far a row may be off
//!
//! A row of o is `sum of p[j] v[j]`. A kernel rounds each p to the tensors' type, and then the sum. The roundings of
//! the terms are independent, so the squares of their errors add up. The row's error is then below one step of `noise +
//! ||o||`, with `noise^2 = sum of (p[j] ||v[j]||)^2`. The same holds for dv, with do instead of v. In dq and dk the
//! terms are `ds[j] k[j]` and `ds[i] q[i]`, and `ds = softmax_scale * p * (dp - delta)` may cancel. Since o is rounded
//! before delta, each term counts with `softmax_scale * p * (|dp| + ||do|| ||o||)`.
//!
//! `attention_reference::attention` has another error model, and it needs all heads and rows on the host in f64. In this grid, with 16k
//! tokens of 2048 elements, that is 268 MB for each of more than ten tensors, and its gradients would need a second backward of every
//! peer, with do = 0 except in the sample.

use anyhow::{ensure, Context, Result};
use attention_reference::attention::{forward, Head, PLAIN};
use attention_reference::matrix::{add_scaled, dot, norm, Keys, Matrix};
use attention_reference::Precision;
use candle_core::{DType, Device, Tensor, D};
use rand::Rng;
use rand_chacha::ChaCha8Rng;
use rayon::prelude::*;

use crate::cases::{Case, Mask, Pass, Peer, Sequence};
use crate::check::spread_over;
use crate::inputs::{self, values, Inputs};
use crate::peers::{self, Answer};

/// A bound of |lse| in these cases: the logarithm of the number of keys, and a score.
const LARGEST_LSE: f64 = 15.0;

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
/// If a tensor is off by more than rounding explains.
pub fn check(case: &Case, peer: Peer, inputs: &Inputs, answer: &Answer, lse: &Tensor) -> Result<Errors> {
    let mut rng = inputs::rng(case);
    let mut all = [Distance::default(); 4];
    let mut lse_error = 0f64;
    for (sequence, head_k) in heads(case, &mut rng) {
        let group = case.num_heads / case.num_heads_k();
        let reader = Reader { case, sequence, head_k, group };
        let (k, v) = (Keys::of(reader.key_rows(&inputs.k)?), Keys::of(reader.key_rows(&inputs.v)?));
        let (dk, dv) = match &answer.grads {
            Some([_, dk, dv]) => (reader.key_rows(dk)?, reader.key_rows(dv)?),
            None => (Matrix::zeros(0, 0), Matrix::zeros(0, 0)),
        };
        let key_head = KeyHead {
            sequence,
            head_k,
            heads: (0..group).map(|member| reader.head(inputs, (&k, &v), member)).collect::<Result<_>>()?,
            answers: (0..group).map(|member| reader.answer(answer, lse, member)).collect::<Result<_>>()?,
            dk,
            dv,
        };
        let queries: Vec<(usize, usize)> = spread_over(sequence.seqlen_q, case.checked_rows, &mut rng)
            .into_iter()
            .map(|row| (row, rng.random_range(0..group)))
            .collect();
        let (errors, [o, dq]) = queries
            .par_iter()
            .map(|&(row, member)| key_head.check_query(row, member))
            .reduce(<(f64, [Distance; 2])>::default, |a, b| (worse(a.0, b.0), [a.1[0] + b.1[0], a.1[1] + b.1[1]]));
        lse_error = worse(lse_error, errors);
        let keys = if answer.grads.is_some() { case.checked_rows / 2 } else { 0 };
        let [dk, dv] = spread_over(sequence.seqlen_k, keys, &mut rng)
            .par_iter()
            .map(|&col| key_head.check_key(col))
            .reduce(<[Distance; 2]>::default, |a, b| [a[0] + b[0], a[1] + b[1]]);
        for (sum, part) in all.iter_mut().zip([o, dq, dk, dv]) {
            *sum = *sum + part;
        }
    }

    // An error of lse is the relative error of every p. This limit keeps it below the rounding of p, or at two steps of its own type.
    let precision = case.precision();
    let step = precision.half_step();
    let lse_limit = 0.5 * step + 2.0 * precision.accumulator().step(LARGEST_LSE);
    ensure!(lse_error <= lse_limit, "lse is off by up to {lse_error:.2e}, limit {lse_limit:.2e}");
    let computed = if answer.grads.is_some() { 4 } else { 1 };
    for (name, distance) in ["o", "dq", "dk", "dv"].into_iter().zip(&all).take(computed) {
        // NaN fails every comparison, so it is refused.
        ensure!(
            distance.of_noise <= steps(peer, precision) * step,
            "{name} differs from the reference: [row {}, head {}] is off by {:.2e} of its length and noise, limit {:.2e}; \
             ||got - want|| / ||want|| = {:.2e} over the sampled rows",
            distance.place.row,
            distance.place.head,
            distance.of_noise,
            steps(peer, precision) * step,
            distance.relative()
        );
    }
    let [o, dq, dk, dv] = all.map(Distance::relative);
    Ok(Errors { o, grads: answer.grads.is_some().then(|| worse(dq, worse(dk, dv))) })
}

/// Shows on a small case on the CPU that [`check`] accepts a right answer and rejects one that lacks a tile of keys or
/// queries.
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

    // Rows of 0 add nothing. With v = 0 in a tile of keys, o and dq are as if a kernel lost the tile. With do = 0 in a
    // tile of queries, dk and dv are. The longest sequence loses its first tile of keys, which later queries see, or
    // its last tile of queries.
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
/// Standard attention rounds after every operator. It rounds the scores three times before the exponential, and one
/// step of a score between 4 and 8 is 4 to 8 steps of its p. This limit does not show a lost tile, but it shows a wrong
/// mask or scale.
///
/// In f32 the roundings of the sums count as well, because the sums have the same type. The limit is 4e-6, and the lost tile makes
/// 0.016.
fn steps(peer: Peer, precision: Precision) -> f64 {
    match (peer, precision) {
        (_, Precision::F32 | Precision::F64) => 64.0,
        (Peer::Standard, _) => 32.0,
        _ => 4.0,
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

/// The distance of rows from the right ones.
#[derive(Clone, Copy, Default)]
struct Distance {
    /// Sums of squares over all rows: of the errors, and of the right values.
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
    /// The distance of one row. `noise` is `noise^2` of the comment at the top of this file.
    fn between(place: Place, got: &[f64], want: &[f64], noise: f64) -> Self {
        let error: f64 = got.iter().zip(want).map(|(got, want)| (got - want) * (got - want)).sum();
        // A row without terms must be 0 exactly.
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

/// The sampled sequences and key heads: the first of both, the last of both, the longest sequence, and a random one.
fn heads(case: &Case, rng: &mut ChaCha8Rng) -> Vec<(Sequence, usize)> {
    let sequences = case.sequences();
    let longest = (0..sequences.len()).max_by_key(|&index| sequences[index].seqlen_k).unwrap_or(0);
    let mut head = || rng.random_range(0..case.num_heads_k());
    let (one, other) = (head(), head());
    let any = rng.random_range(0..sequences.len());
    let chosen = [(0, 0), (sequences.len() - 1, case.num_heads_k() - 1), (longest, one), (any, other)];
    chosen.into_iter().map(|(sequence, head_k)| (sequences[sequence], head_k)).collect()
}

/// One key head of one sequence with the query heads that share it, and a peer's answer there.
struct KeyHead<'a> {
    sequence: Sequence,
    head_k: usize,
    /// The heads of the group.
    heads: Vec<Head<'a, f64>>,
    /// The results of the peer and of our forward for each of them.
    answers: Vec<HeadAnswer>,
    /// `(seqlen_k, head_dim)`; empty without a backward.
    dk: Matrix<f64>,
    /// `(seqlen_k, head_dim_v)`; empty without a backward.
    dv: Matrix<f64>,
}

struct HeadAnswer {
    /// `(seqlen_q, head_dim_v)`.
    o: Matrix<f64>,
    /// `(seqlen_q, head_dim)`; empty without a backward.
    dq: Matrix<f64>,
    lse: Vec<f64>,
}

/// Reads the rows of one key head, and of its query heads, from tensors of a case. It selects them on the device, so
/// that only these rows are copied to the host.
struct Reader<'a> {
    case: &'a Case,
    sequence: Sequence,
    head_k: usize,
    group: usize,
}

impl Reader<'_> {
    fn key_rows(&self, tensor: &Tensor) -> Result<Matrix<f64>> {
        let (first, rows, heads) = (self.sequence.first_k, self.sequence.seqlen_k, self.case.num_heads_k());
        self.rows(tensor, (first, rows), self.head_k, heads)
    }

    fn query_rows(&self, tensor: &Tensor, member: usize) -> Result<Matrix<f64>> {
        let (first, rows) = (self.sequence.first_q, self.sequence.seqlen_q);
        self.rows(tensor, (first, rows), self.head_k * self.group + member, self.case.num_heads)
    }

    fn rows(&self, tensor: &Tensor, (first, rows): (usize, usize), head: usize, heads: usize) -> Result<Matrix<f64>> {
        let head_dim = tensor.dim(D::Minus1)?;
        let tokens = tensor.elem_count() / (heads * head_dim);
        let of_head = tensor.reshape((tokens, heads, head_dim))?.narrow(0, first, rows)?.narrow(1, head, 1)?;
        Ok(Matrix::of_head(&values(&of_head.force_contiguous()?)?, (1, head_dim), 0, 0, rows))
    }

    /// The rows of our forward's lse, which is `(batch, num_heads, seqlen_q)`, or packed `(num_heads, rows)`.
    fn lse(&self, lse: &Tensor, member: usize) -> Result<Vec<f64>> {
        let (head, Sequence { first_q, seqlen_q, .. }) = (self.head_k * self.group + member, self.sequence);
        let of_head = match lse.dims() {
            &[_, _, seqlen_q] => lse.narrow(0, first_q / seqlen_q, 1)?.narrow(1, head, 1)?,
            _ => lse.narrow(0, head, 1)?.narrow(1, first_q, seqlen_q)?,
        };
        Ok(values(&of_head.force_contiguous()?)?)
    }

    fn head<'k>(
        &self,
        inputs: &Inputs,
        (k, v): (&'k Keys<f64>, &'k Keys<f64>),
        member: usize,
    ) -> Result<Head<'k, f64>> {
        Ok(Head {
            q: self.query_rows(&inputs.q, member)?,
            k,
            v,
            do_: self.query_rows(&inputs.do_, member)?,
            dlse: vec![0.0; self.sequence.seqlen_q],
            window: self.case.window(),
            softmax_scale: self.case.softmax_scale(),
            softcap: None,
            alibi_slope: None,
            round: |x| x,
        })
    }

    fn answer(&self, answer: &Answer, lse: &Tensor, member: usize) -> Result<HeadAnswer> {
        let dq = match &answer.grads {
            Some([dq, ..]) => self.query_rows(dq, member)?,
            None => Matrix::zeros(0, 0),
        };
        Ok(HeadAnswer { o: self.query_rows(&answer.o, member)?, dq, lse: self.lse(lse, member)? })
    }
}

impl KeyHead<'_> {
    /// The error of lse, and the distances of o and dq, at query `i` of head `member` of the group.
    fn check_query(&self, i: usize, member: usize) -> (f64, [Distance; 2]) {
        let (head, got) = (&self.heads[member], &self.answers[member]);
        let place = Place { row: self.sequence.first_q + i, head: self.head_k * self.heads.len() + member };
        let want = forward(head, i, &PLAIN);
        let o_noise = want.keys.iter().zip(&want.p).map(|(&j, p)| (p * norm(&head.v.rows[j])).powi(2)).sum();
        let o_distance = Distance::between(place, &got.o[i], &want.o, o_noise);
        let lse_error = (got.lse[i] - want.lse).abs();
        if got.dq.rows() == 0 {
            return (lse_error, [o_distance, Distance::default()]);
        }
        let (mut dq, mut dq_noise) = (vec![0.0; head.q.width()], 0.0);
        let delta = Delta::new(head, i, &want.o);
        for (n, &j) in want.keys.iter().enumerate() {
            let term = Term::new(head, (i, j), (want.derivative[n], want.p[n]), &delta);
            let k = &head.k.rows[j];
            add_scaled(&mut dq, term.ds, k);
            dq_noise += term.noise * dot(k, k);
        }
        (lse_error, [o_distance, Distance::between(place, &got.dq[i], &dq, dq_noise)])
    }

    /// The distances of dk and dv at key `j`.
    fn check_key(&self, j: usize) -> [Distance; 2] {
        let (mut dk, mut dk_noise) = (vec![0.0; self.dk.width()], 0.0);
        let (mut dv, mut dv_noise) = (vec![0.0; self.dv.width()], 0.0);
        for i in (0..self.sequence.seqlen_q).filter(|&i| self.heads[0].sees(i, j)) {
            for (head, got) in self.heads.iter().zip(&self.answers) {
                let raw = head.raw(i, j);
                let (s, derivative) = head.score(i, j, raw);
                let p = (s - got.lse[i]).exp();
                add_scaled(&mut dv, p, &head.do_[i]);
                dv_noise += p * p * dot(&head.do_[i], &head.do_[i]);
                let term = Term::new(head, (i, j), (derivative, p), &Delta::new(head, i, &got.o[i]));
                add_scaled(&mut dk, term.ds, &head.q[i]);
                dk_noise += term.noise * dot(&head.q[i], &head.q[i]);
            }
        }
        let place = Place { row: self.sequence.first_k + j, head: self.head_k };
        [Distance::between(place, &self.dk[j], &dk, dk_noise), Distance::between(place, &self.dv[j], &dv, dv_noise)]
    }
}

/// delta of a query, and the size that its error is proportional to.
struct Delta {
    value: f64,
    size: f64,
}

impl Delta {
    fn new(head: &Head<f64>, i: usize, o: &[f64]) -> Self {
        Self { value: dot(&head.do_[i], o), size: norm(&head.do_[i]) * norm(o) }
    }
}

/// The factor of one term of dq or dk, and the square of what rounding may do to it.
struct Term {
    ds: f64,
    noise: f64,
}

impl Term {
    /// The term of query `i` and key `j`.
    fn new(head: &Head<f64>, (i, j): (usize, usize), (derivative, p): (f64, f64), delta: &Delta) -> Self {
        let dp = head.dp(i, j);
        let size = head.softmax_scale * p * (dp.abs() + delta.size);
        Self { ds: head.softmax_scale * head.d_raw(i, derivative, p, dp, delta.value), noise: size * size }
    }
}
