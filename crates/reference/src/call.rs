//! A whole call: a batch of sequences with several heads, and its five results.

use rayon::prelude::*;

use crate::attention::{backward, forward, Head, Variant, Window, PLAIN};
use crate::double::Double;
use crate::matrix::{Keys, Matrix};
use crate::number::Number;
use crate::precision::{bf16, tf32, Precision};
use crate::rounding::{Errors, QueryErrors, RowError};

/// One call of the operator. Every number is exactly representable in `precision`. A batch is a list of sequences. In a
/// padded batch they have equal lengths, in a packed batch any lengths. Tensors are token-major: q
/// `(total_q, num_heads, head_dim)`, k `(total_k, num_heads_k, head_dim)`; v and `do_` with head_dim_v instead of head_dim.
#[derive(Clone, Debug)]
pub struct Input {
    pub precision: Precision,
    /// `(seqlen_q, seqlen_k)` of each sequence.
    pub lengths: Vec<(usize, usize)>,
    pub num_heads: usize,
    pub num_heads_k: usize,
    pub head_dim: usize,
    pub head_dim_v: usize,
    pub window: Window,
    pub softmax_scale: f64,
    pub softcap: Option<f64>,
    /// `(batch, num_heads)`
    pub alibi_slopes: Option<Vec<f64>>,
    pub q: Vec<f64>,
    pub k: Vec<f64>,
    pub v: Vec<f64>,
    /// The gradient of o.
    pub do_: Vec<f64>,
    /// The gradient of lse, `(total_q, num_heads)`.
    pub dlse: Vec<f64>,
    /// Whether each of the `total_q` queries is computed; see [`Self::only`]. `None`: all are.
    pub queries: Option<Vec<bool>>,
}

/// `(total, heads, width)` numbers. A row is the `width` numbers of one token and head.
#[derive(Clone, Debug, Default)]
pub struct Rows {
    /// Number of tokens of each sequence. Errors name a row by sequence and position.
    pub lengths: Vec<usize>,
    pub heads: usize,
    pub width: usize,
    pub values: Vec<f64>,
    /// The error of each row of the reference. 0 for other results.
    pub errors: Vec<RowError>,
}

#[derive(Clone, Debug)]
pub struct Output {
    pub o: Rows,
    /// Each row is one number.
    pub lse: Rows,
    pub dq: Rows,
    pub dk: Rows,
    pub dv: Rows,
}

impl Output {
    /// Each tensor with its name in errors.
    pub fn named(&self) -> [(&'static str, &Rows); 5] {
        [("o", &self.o), ("lse", &self.lse), ("dq", &self.dq), ("dk", &self.dk), ("dv", &self.dv)]
    }
}

/// The right answer, with the error model of each row. It is computed in f64. For f64 inputs it is computed in pairs of
/// f64, because plain f64 would be no better than the result that is compared with it. No result is rounded to the input
/// type.
pub fn attention(input: &Input) -> Output {
    match input.precision {
        Precision::F64 => attend::<Double>(input, &PLAIN, |x| x, true),
        _ => attend::<f64>(input, &PLAIN, |x| x, true),
    }
}

/// The same formulas in the usual arithmetic for `input.precision`: f32 (f64 for f64). o, dq, dk, dv and the operands of
/// every matrix product (q, k, v, `do_`, p, `d_raw`) are rounded to the type.
pub fn attention_plain(input: &Input) -> Output {
    attention_variant(input, &PLAIN)
}

/// [`attention_plain`] with the differences in `variant`.
pub fn attention_variant(input: &Input, variant: &Variant) -> Output {
    match input.precision {
        Precision::F64 => attend::<f64>(input, variant, |x| x, false),
        Precision::F32 => attend::<f32>(input, variant, |x| x, false),
        Precision::Tf32 => attend::<f32>(input, variant, tf32, false),
        Precision::F16 => attend::<f32>(input, variant, |x| half::f16::from_f32(x).to_f32(), false),
        Precision::Bf16 => attend::<f32>(input, variant, bf16, false),
    }
}

/// One sequence of a batch. `first_q` and `first_k` are its first rows in the tensors.
#[derive(Clone, Copy)]
struct Sequence {
    batch: usize,
    seqlen_q: usize,
    seqlen_k: usize,
    first_q: usize,
    first_k: usize,
}

impl Input {
    fn sequences(&self) -> Vec<Sequence> {
        let (mut first_q, mut first_k) = (0, 0);
        let mut sequences = Vec::new();
        for (batch, &(seqlen_q, seqlen_k)) in self.lengths.iter().enumerate() {
            sequences.push(Sequence { batch, seqlen_q, seqlen_k, first_q, first_k });
            first_q += seqlen_q;
            first_k += seqlen_k;
        }
        sequences
    }

    /// The same call of which only these of the `total_q` queries are computed. do and dlse of the others become 0, so that the gradients
    /// depend on the chosen ones only.
    pub fn only(mut self, queries: Vec<bool>) -> Self {
        for (values, width) in [(&mut self.do_, self.head_dim_v), (&mut self.dlse, 1)] {
            for (row, _) in values.chunks_mut(self.num_heads * width).zip(&queries).filter(|(_, chosen)| !**chosen) {
                row.fill(0.0);
            }
        }
        Self { queries: Some(queries), ..self }
    }

    /// Whether query `token` of all is computed.
    pub fn computes(&self, token: usize) -> bool {
        self.queries.as_ref().is_none_or(|queries| queries[token])
    }

    /// An output of the right shape, with the results of queries that see no key.
    fn empty_output(&self) -> Output {
        let lengths_q: Vec<usize> = self.lengths.iter().map(|l| l.0).collect();
        let lengths_k: Vec<usize> = self.lengths.iter().map(|l| l.1).collect();
        let rows = |lengths: &Vec<usize>, heads: usize, width: usize, value: f64| {
            let rows = lengths.iter().sum::<usize>() * heads;
            let errors = vec![RowError::default(); rows];
            Rows { lengths: lengths.clone(), heads, width, values: vec![value; rows * width], errors }
        };
        let of_q = |width: usize, value: f64| rows(&lengths_q, self.num_heads, width, value);
        let of_k = |width: usize| rows(&lengths_k, self.num_heads_k, width, 0.0);
        Output {
            o: of_q(self.head_dim_v, 0.0),
            lse: of_q(1, f64::NEG_INFINITY),
            dq: of_q(self.head_dim, 0.0),
            dk: of_k(self.head_dim),
            dv: of_k(self.head_dim_v),
        }
    }
}

impl Rows {
    fn set<T: Number>(&mut self, token: usize, head: usize, values: &[T], error: RowError) {
        let row = token * self.heads + head;
        for (to, from) in self.values[row * self.width..].iter_mut().zip(values) {
            *to = from.to_f64();
        }
        self.errors[row] = error;
    }
}

/// Computes every head of every sequence, in `T`. `models_errors`: with the error model of each row.
fn attend<T: Number>(input: &Input, variant: &Variant, round: fn(T) -> T, models_errors: bool) -> Output {
    let sequences = input.sequences();
    let heads: Vec<(Sequence, usize)> =
        sequences.iter().flat_map(|&sequence| (0..input.num_heads_k).map(move |head_k| (sequence, head_k))).collect();
    let computed: Vec<KeyHead<T>> = heads
        .par_iter()
        .map(|&(sequence, head_k)| attend_key_head(input, sequence, head_k, variant, round, models_errors))
        .collect();

    let mut output = input.empty_output();
    for ((sequence, head_k), key_head) in heads.into_iter().zip(computed) {
        for Query { token, head, o, lse, dq, errors } in key_head.queries {
            output.o.set(token, head, &o, errors.o);
            output.lse.set(token, head, &[lse], errors.lse);
            output.dq.set(token, head, &dq, errors.dq);
        }
        for j in 0..sequence.seqlen_k {
            let token = sequence.first_k + j;
            let of_row = |errors: &Errors| (errors.dk[j], errors.dv[j]);
            let (dk_error, dv_error) = key_head.errors.as_ref().map(of_row).unwrap_or_default();
            output.dk.set(token, head_k, &key_head.dk[j], dk_error);
            output.dv.set(token, head_k, &key_head.dv[j], dv_error);
        }
    }
    output
}

/// The results of one key head of one sequence, and of the query heads that share it.
struct KeyHead<T> {
    queries: Vec<Query<T>>,
    dk: Matrix<T>,
    dv: Matrix<T>,
    errors: Option<Errors>,
}

/// The results of one query of one head.
struct Query<T> {
    token: usize,
    head: usize,
    o: Vec<T>,
    lse: T,
    dq: Vec<T>,
    errors: QueryErrors,
}

/// Computes one key head of one sequence, with the query heads that share it.
fn attend_key_head<T: Number>(
    input: &Input,
    Sequence { batch, seqlen_q, seqlen_k, first_q, first_k }: Sequence,
    head_k: usize,
    variant: &Variant,
    round: fn(T) -> T,
    models_errors: bool,
) -> KeyHead<T> {
    let &Input { num_heads, num_heads_k, head_dim, head_dim_v, .. } = input;
    let of_q = |tensor: &[f64], width: usize, head: usize| {
        Matrix::of_head(tensor, (num_heads, width), head, first_q, seqlen_q)
    };
    let of_k = |tensor: &[f64], width: usize| {
        Keys::of(Matrix::of_head(tensor, (num_heads_k, width), head_k, first_k, seqlen_k))
    };
    let (k, v) = (of_k(&input.k, head_dim), of_k(&input.v, head_dim_v));
    let (mut dk, mut dv) = (Matrix::zeros(seqlen_k, head_dim), Matrix::zeros(seqlen_k, head_dim_v));
    let mut errors = models_errors.then(|| Errors::new(input.precision, &k.rows, &v.rows));
    let mut queries = Vec::new();

    let group = num_heads / num_heads_k;
    for head in head_k * group..(head_k + 1) * group {
        let of_head = Head {
            q: of_q(&input.q, head_dim, head),
            k: &k,
            v: &v,
            do_: of_q(&input.do_, head_dim_v, head),
            dlse: (0..seqlen_q).map(|i| T::from_f64(input.dlse[(first_q + i) * num_heads + head])).collect(),
            window: input.window,
            softmax_scale: T::from_f64(input.softmax_scale),
            softcap: input.softcap.map(T::from_f64),
            alibi_slope: input.alibi_slopes.as_ref().map(|slopes| T::from_f64(slopes[batch * num_heads + head])),
            round,
        };
        for i in (0..seqlen_q).filter(|i| input.computes(first_q + i)) {
            let forward = forward(&of_head, i, variant);
            let backward = backward(&of_head, i, &forward, &mut dk, &mut dv);
            let errors = errors
                .as_mut()
                .map_or_else(QueryErrors::default, |errors| errors.add_query(&of_head, i, &forward, &backward));
            let token = first_q + i;
            queries.push(Query { token, head, o: forward.o, lse: forward.lse, dq: backward.dq, errors });
        }
    }
    // Round once, after the sum over the heads that share the key.
    let softmax_scale = T::from_f64(input.softmax_scale);
    for j in 0..seqlen_k {
        dk[j].iter_mut().for_each(|x| *x = round(softmax_scale * *x));
        dv[j].iter_mut().for_each(|x| *x = round(*x));
    }
    KeyHead { queries, dk, dv, errors }
}
