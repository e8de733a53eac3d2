//! Compares the answer of a peer with the reference.
//!
//! The loss sums over the checked queries only. So the reference needs only those rows to compute the full gradients,
//! and every row of dq, dk and dv is compared.

use anyhow::Result;
use attention_reference::{Closeness, Input, Output, Rows, Tolerance};
use candle_core::Tensor;
use rand::Rng;
use rand_chacha::ChaCha8Rng;

use crate::cases::Case;
use crate::inputs::{self, values, Inputs};
use crate::peers::Answer;

/// The share of the rule's limits that a peer may use. No error of a peer over benches/cases.toml takes more than 21%
/// of the rule's limit (EPYC, 2 cores). With half of it, o shows each single key that is lost among 32k; the whole
/// limit would let some of them pass (16 keys tried, f32, head_dim 64, 128 and 256).
const SHARE_OF_THE_RULE: f64 = 0.5;

/// The right answer of a case at the checked queries, and its limits.
pub struct Reference {
    want: Output,
    tolerances: [Tolerance; 5],
    /// The gradient of o: 0 for the queries that are not checked.
    pub do_: Tensor,
}

/// How near a peer's answer is.
#[derive(Clone, Copy)]
pub struct Checked {
    /// The largest |got - want| of o.
    pub o_error: f64,
    /// The largest |got - want| of dq, dk and dv.
    pub grad_error: Option<f64>,
    /// The largest error as a share of its row's limit.
    pub share_of_limit: f64,
}

impl Reference {
    pub fn new(case: &Case, inputs: &Inputs) -> Result<Self> {
        let queries = checked_queries(case);
        let input = Input {
            precision: case.precision(),
            lengths: case.sequences().iter().map(|sequence| (sequence.seqlen_q, sequence.seqlen_k)).collect(),
            num_heads: case.num_heads,
            num_heads_k: case.num_heads_k(),
            head_dim: case.head_dim,
            head_dim_v: case.head_dim_v(),
            window: case.window(),
            softmax_scale: case.softmax_scale(),
            softcap: None,
            alibi_slopes: None,
            q: values(&inputs.q)?,
            k: values(&inputs.k)?,
            v: values(&inputs.v)?,
            do_: values(&inputs.do_)?,
            dlse: vec![0.0; queries.len() * case.num_heads],
            queries: None,
        };
        let input = input.only(queries);
        let restricted = Tensor::from_slice(&input.do_, inputs.do_.shape(), inputs.do_.device())?;
        let want = attention_reference::attention(&input);
        let tolerances =
            attention_reference::tolerances(&input, &want).map(|tolerance| tolerance.scaled(SHARE_OF_THE_RULE));
        Ok(Self { want, tolerances, do_: restricted.to_dtype(case.dtype)? })
    }

    /// Compares a peer's answer.
    ///
    /// # Errors
    /// If an element is off by more than its limit: the worst one and its coordinates.
    pub fn check(&self, who: &str, answer: &Answer) -> Result<Checked> {
        let Output { o, dq, dk, dv, .. } = &self.want;
        let [of_o, _, of_dq, of_dk, of_dv] = &self.tolerances;
        let close = |name: &str, got: &Tensor, want: &Rows, tolerance: &Tolerance| -> Result<Closeness> {
            let got = Rows { values: values(got)?, errors: Vec::new(), ..want.clone() };
            attention_reference::close(name, &got, want, tolerance, &who)
        };
        let o = close("o", &answer.o, o, of_o)?;
        let Some([got_dq, got_dk, got_dv]) = &answer.grads else {
            return Ok(Checked { o_error: o.error, grad_error: None, share_of_limit: o.share_of_limit });
        };
        let grads = [close("dq", got_dq, dq, of_dq)?, close("dk", got_dk, dk, of_dk)?, close("dv", got_dv, dv, of_dv)?];
        Ok(Checked {
            o_error: o.error,
            grad_error: Some(grads.iter().map(|grad| grad.error).fold(0.0, f64::max)),
            share_of_limit: grads.iter().map(|grad| grad.share_of_limit).fold(o.share_of_limit, f64::max),
        })
    }
}

/// Whether each query of all sequences is checked.
fn checked_queries(case: &Case) -> Vec<bool> {
    let mut rng = inputs::rng(case);
    let mut checked = Vec::new();
    for sequence in case.sequences() {
        let mut rows = vec![false; sequence.seqlen_q];
        spread_over(sequence.seqlen_q, case.checked_rows, &mut rng).into_iter().for_each(|row| rows[row] = true);
        checked.extend(rows);
    }
    checked
}

/// `count` of `0..len`, or all of them: the first, the last, and one drawn from each of the equal stretches between.
pub fn spread_over(len: usize, count: usize, rng: &mut ChaCha8Rng) -> Vec<usize> {
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
