//! Attention as its formulas read: one query at a time, every visible key, nothing tiled, nothing recomputed. It shares
//! no line with `src/`, and it is all that decides what is right.
//!
//! ```text
//! raw_ij = softmax_scale * q_i . k_j
//! s_ij   = softcap * tanh(raw_ij / softcap) - slope * |i + shift - j|        shift = seqlen_k - seqlen_q
//! lse_i  = ln sum_j exp(s_ij)                                                over the visible j
//! p_ij   = exp(s_ij - lse_i)
//! o_i    = sum_j p_ij v_j
//!
//! delta_i = do_i . o_i
//! ds_ij   = p_ij (do_i . v_j - delta_i + dlse_i)
//! draw_ij = ds_ij (1 - tanh(raw_ij / softcap)^2)
//! dq_i = softmax_scale sum_j draw_ij k_j      dk_j = softmax_scale sum_i draw_ij q_i      dv_j = sum_i p_ij do_i
//! ```
//!
//! A hidden key takes part in nothing, whatever it holds; among the visible ones infinities and NaN go through the
//! plain arithmetic above. A query that sees no key gives `o = 0`, `lse = -inf`, and no gradient.

use super::real::{Double, Real};
use super::tolerance::{rounding_step, smallest_normal};
use candle_core::DType;
use half::{bf16, f16};

/// One call of the operator, every number exactly representable in `dtype`. A batch is a list of sequences: padded
/// batches have equal lengths, packed ones need not. Tensors are token-major: q, `do_` `(total_q, num_heads,
/// head_dim)`, k, v `(total_k, num_heads_k, head_dim)`.
#[derive(Clone, Debug)]
pub struct Input {
    pub dtype: DType,
    /// `(seqlen_q, seqlen_k)` of each sequence.
    pub lengths: Vec<(usize, usize)>,
    pub num_heads: usize,
    pub num_heads_k: usize,
    pub head_dim: usize,
    /// Keys to see before and after the aligned one; `None` is all of them.
    pub window: (Option<usize>, Option<usize>),
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
}

/// `(total, heads, width)` numbers; a row is the `width` numbers of one token and head.
#[derive(Clone, Debug, Default)]
pub struct Rows {
    /// Tokens of each sequence, to name a row by sequence and position.
    pub lengths: Vec<usize>,
    pub heads: usize,
    pub width: usize,
    pub values: Vec<f64>,
    /// For each row, a bound on the largest sum of absolute terms in it, each times how much the rounding of its
    /// factors counts: what the row's error is proportional to, whatever cancels.
    pub magnitude: Vec<f64>,
    /// For each row, how far rounding the operands of its matrix products to the input type is likely to move it: half
    /// a step of each p, draw, or o (in delta), as independent errors add up. Also what a p below the smallest normal
    /// number counts: exp may return 0 for it.
    pub operand_rounding: Vec<f64>,
}

#[derive(Clone, Debug)]
pub struct Output {
    pub o: Rows,
    /// One number a row.
    pub lse: Rows,
    pub dq: Rows,
    pub dk: Rows,
    pub dv: Rows,
}

impl Output {
    /// Each tensor under the name that errors give it.
    pub fn named(&self) -> [(&'static str, &Rows); 5] {
        [("o", &self.o), ("lse", &self.lse), ("dq", &self.dq), ("dk", &self.dk), ("dv", &self.dv)]
    }
}

/// How an honest implementation may differ from another in the same precision, and how a broken one would.
#[derive(Clone, Copy)]
pub struct Variant<'a> {
    /// Keys summed from the last to the first.
    pub reversed: bool,
    /// `o = (sum exp(s - max) v) / sum exp(s - max)` instead of normalising p first: what rounds then differs.
    pub divides_last: bool,
    /// Whether (query, key), counted within their sequence, is wrongly left out.
    pub drops: &'a dyn Fn(usize, usize) -> bool,
}

pub const PLAIN: Variant<'static> = Variant { reversed: false, divides_last: false, drops: &|_, _| false };

/// What is right: in f64, and in pairs of f64 when f64 itself is to be judged. No result is rounded to the input type.
pub fn attention(input: &Input) -> Output {
    match input.dtype {
        DType::F64 => attend::<Double>(input, &PLAIN, |x| x),
        _ => attend::<f64>(input, &PLAIN, |x| x),
    }
}

/// The same formulas as anyone would run them in `input.dtype`: arithmetic in f32 (f64 for f64); o, dq, dk, dv and the
/// operands of every matrix product (q, k, v, `do_`, p, draw) rounded to the type.
pub fn attention_plain(input: &Input) -> Output {
    attention_variant(input, &PLAIN)
}

/// [`attention_plain`] with a difference.
pub fn attention_variant(input: &Input, variant: &Variant) -> Output {
    match input.dtype {
        DType::F64 => attend::<f64>(input, variant, |x| x),
        DType::F32 => attend::<f32>(input, variant, |x| x),
        DType::F16 => attend::<f32>(input, variant, |x| f16::from_f32(x).to_f32()),
        DType::BF16 => attend::<f32>(input, variant, |x| bf16::from_f32(x).to_f32()),
        other => panic!("no attention in {other:?}"),
    }
}

/// Whether query `row` sees key `col` of a sequence.
pub fn visible(
    (seqlen_q, seqlen_k): (usize, usize),
    (left, right): (Option<usize>, Option<usize>),
    row: usize,
    col: usize,
) -> bool {
    let aligned = row as i128 + seqlen_k as i128 - seqlen_q as i128;
    let col = col as i128;
    left.is_none_or(|left| col >= aligned - left as i128) && right.is_none_or(|right| col <= aligned + right as i128)
}

/// The naive algorithm in `T`; `round` takes a result or an operand of a matrix product to the input type.
fn attend<T: Real>(input: &Input, variant: &Variant, round: fn(T) -> T) -> Output {
    let &Input { num_heads, num_heads_k, head_dim, .. } = input;
    let lengths_q: Vec<usize> = input.lengths.iter().map(|l| l.0).collect();
    let lengths_k: Vec<usize> = input.lengths.iter().map(|l| l.1).collect();
    let total_q = lengths_q.iter().sum::<usize>();
    let total_k = lengths_k.iter().sum::<usize>();
    let zero = T::from_f64(0.0);
    let one = T::from_f64(1.0);
    let softmax_scale = T::from_f64(input.softmax_scale);
    let softcap = input.softcap.map(T::from_f64);

    let (q, k, v, do_) = (typed::<T>(&input.q), typed::<T>(&input.k), typed::<T>(&input.v), typed::<T>(&input.do_));
    let mut o = vec![zero; total_q * num_heads * head_dim];
    let mut lse = vec![T::from_f64(f64::NEG_INFINITY); total_q * num_heads];
    let mut dq = vec![zero; o.len()];
    let mut dk = vec![zero; total_k * num_heads_k * head_dim];
    let mut dv = vec![zero; dk.len()];
    let none_q = Sizes::zeros(total_q * num_heads);
    let none_k = Sizes::zeros(total_k * num_heads_k);
    let (mut o_sizes, mut lse_sizes, mut dq_sizes) = (none_q.clone(), none_q.clone(), none_q);
    let (mut dk_sizes, mut dv_sizes) = (none_k.clone(), none_k);

    let (mut first_q, mut first_k) = (0, 0);
    for (batch, &(seqlen_q, seqlen_k)) in input.lengths.iter().enumerate() {
        for head in 0..num_heads {
            let head_k = head / (num_heads / num_heads_k);
            let slope = input.alibi_slopes.as_ref().map(|slopes| T::from_f64(slopes[batch * num_heads + head]));
            // Rows of this head's tensors. `at_k` counts rows; times head_dim it counts elements.
            let at_k = |col: usize| (first_k + col) * num_heads_k + head_k;
            let k_row = |col: usize| &k[at_k(col) * head_dim..][..head_dim];
            let v_row = |col: usize| &v[at_k(col) * head_dim..][..head_dim];
            let (k_columns, v_columns) = (columns(seqlen_k, head_dim, k_row), columns(seqlen_k, head_dim, v_row));
            let k_norms: Vec<Norms> = (0..seqlen_k).map(|col| Norms::of(k_row(col))).collect();
            let v_norms: Vec<Norms> = (0..seqlen_k).map(|col| Norms::of(v_row(col))).collect();

            for row in 0..seqlen_q {
                let mut seen: Vec<usize> = (0..seqlen_k)
                    .filter(|&col| visible((seqlen_q, seqlen_k), input.window, row, col) && !(variant.drops)(row, col))
                    .collect();
                if seen.is_empty() {
                    continue;
                }
                if variant.reversed {
                    seen.reverse();
                }
                let at_q = (first_q + row) * num_heads + head;
                let q_row = &q[at_q * head_dim..][..head_dim];
                let do_row = &do_[at_q * head_dim..][..head_dim];
                let dlse = T::from_f64(input.dlse[at_q]);
                let (q_norms, do_norms) = (Norms::of(q_row), Norms::of(do_row));

                let slope_of_cap = |raw: T| {
                    softcap.map_or(one, |cap| {
                        let t = (raw / cap).tanh();
                        one - t * t
                    })
                };
                let raw: Vec<T> =
                    products(q_row, &k_columns, seqlen_k).into_iter().map(|x| softmax_scale * x).collect();
                let s: Vec<T> = seen
                    .iter()
                    .map(|&col| {
                        let capped = softcap.map_or(raw[col], |cap| cap * (raw[col] / cap).tanh());
                        let distance = (row as f64 + seqlen_k as f64 - seqlen_q as f64 - col as f64).abs();
                        slope.map_or(capped, |slope| capped - slope * T::from_f64(distance))
                    })
                    .collect();
                // NaN never compares greater, so it reaches the sum through exp and not through the maximum.
                let max = s.iter().fold(T::from_f64(f64::NEG_INFINITY), |max, &x| if x > max { x } else { max });
                // Scores of -inf throughout: exp(-inf - -inf) would be NaN where exp(-inf) = 0 is meant.
                let max = if max.to_f64() == f64::NEG_INFINITY { zero } else { max };
                let unnormalised: Vec<T> = s.iter().map(|&x| (x - max).exp()).collect();
                let mut sum = zero;
                for &x in &unnormalised {
                    sum += x;
                }
                let p: Vec<T> = unnormalised.iter().map(|&x| x / sum).collect();
                lse[at_q] = max + sum.ln();

                let o_row = &mut o[at_q * head_dim..][..head_dim];
                for (n, &col) in seen.iter().enumerate() {
                    let weight = round(if variant.divides_last { unnormalised[n] } else { p[n] });
                    add_scaled(o_row, weight, v_row(col));
                }
                for x in o_row.iter_mut() {
                    *x = round(if variant.divides_last { *x / sum } else { *x });
                }

                let mut delta = zero;
                for (&d, &x) in do_row.iter().zip(o_row.iter()) {
                    delta += d * x;
                }
                let dp = products(do_row, &v_columns, seqlen_k);
                let dq_row = &mut dq[at_q * head_dim..][..head_dim];
                let mut draw_of = vec![zero; seen.len()];
                for (n, &col) in seen.iter().enumerate() {
                    let ds = p[n] * (dp[col] - delta + dlse);
                    let draw = round(ds * slope_of_cap(raw[col]));
                    add_scaled(dq_row, draw, k_row(col));
                    add_scaled(&mut dk[at_k(col) * head_dim..][..head_dim], draw, q_row);
                    add_scaled(&mut dv[at_k(col) * head_dim..][..head_dim], round(p[n]), do_row);
                    draw_of[n] = draw;
                }

                // From here to the end of the loop: how large the terms were, and how far rounding the operands moves
                // them.
                let step = |x: f64| rounding_step(input.dtype, x.abs());
                let scale = input.softmax_scale.abs();
                let o_norms = Norms::of(o_row);
                let delta_rounding = do_row
                    .iter()
                    .zip(o_row.iter())
                    .map(|(d, x)| (0.5 * step(x.to_f64()) * d.to_f64()).powi(2))
                    .sum::<f64>()
                    .sqrt();
                // delta enters all keys of the row alike, so that its error is one factor of this sum.
                let mut k_mean = vec![zero; head_dim];
                for (n, &col) in seen.iter().enumerate() {
                    let (weight, k_norms, v_norms) = (p[n].to_f64(), &k_norms[col], &v_norms[col]);
                    let capped_weight = p[n] * slope_of_cap(raw[col]);
                    add_scaled(&mut k_mean, capped_weight, k_row(col));
                    let of_delta = capped_weight.to_f64() * delta_rounding;
                    let of_draw = 0.5 * step(draw_of[n].to_f64());
                    let of_p = 0.5 * step(weight);
                    let s_size = scale * q_norms.norm * k_norms.norm + (s[n] - raw[col]).to_f64().abs();
                    // exp makes the absolute error of s - lse the relative error of p.
                    let s_factor = 1.0 + s_size + lse[at_q].to_f64().abs();
                    let weight_size = weight * s_factor;
                    let dp_size = do_norms.norm * (v_norms.norm + o_norms.norm) + dlse.to_f64().abs();
                    let draw_size = weight_size * dp_size;
                    if s_size.is_finite() {
                        lse_sizes.magnitude[at_q] = lse_sizes.magnitude[at_q].max(s_size);
                    }
                    let flushed = smallest_normal(input.dtype);
                    o_sizes.add(at_q, weight_size * v_norms.max, of_p * v_norms.max, flushed * v_norms.max);
                    dv_sizes.add(at_k(col), weight_size * do_norms.max, of_p * do_norms.max, flushed * do_norms.max);
                    let dq_factor = scale * k_norms.max;
                    dq_sizes.add(at_q, dq_factor * draw_size, dq_factor * of_draw, dq_factor * flushed * dp_size);
                    let dk_factor = scale * q_norms.max;
                    let of_draw = of_draw.hypot(of_delta);
                    dk_sizes.add(at_k(col), dk_factor * draw_size, dk_factor * of_draw, dk_factor * flushed * dp_size);
                }
                dq_sizes.add(at_q, 0.0, scale * delta_rounding * Norms::of(&k_mean).max, 0.0);
                for x in dq_row.iter_mut() {
                    *x = round(softmax_scale * *x);
                }
            }
        }
        first_q += seqlen_q;
        first_k += seqlen_k;
    }
    // Rounded once, after the heads that share a key have been summed.
    for x in dk.iter_mut() {
        *x = round(softmax_scale * *x);
    }
    for x in dv.iter_mut() {
        *x = round(*x);
    }

    let rows = |lengths: &Vec<usize>, heads: usize, width: usize, values: Vec<T>, sizes: Sizes| Rows {
        lengths: lengths.clone(),
        heads,
        width,
        values: values.into_iter().map(T::to_f64).collect(),
        magnitude: sizes.magnitude,
        operand_rounding: sizes
            .squared_rounding
            .iter()
            .zip(&sizes.flushed)
            .map(|(x, flushed)| x.sqrt() + flushed)
            .collect(),
    };
    Output {
        o: rows(&lengths_q, num_heads, head_dim, o, o_sizes),
        lse: rows(&lengths_q, num_heads, 1, lse, lse_sizes),
        dq: rows(&lengths_q, num_heads, head_dim, dq, dq_sizes),
        dk: rows(&lengths_k, num_heads_k, head_dim, dk, dk_sizes),
        dv: rows(&lengths_k, num_heads_k, head_dim, dv, dv_sizes),
    }
}

/// What [`Rows`] tells about each row besides its values.
#[derive(Clone)]
struct Sizes {
    magnitude: Vec<f64>,
    squared_rounding: Vec<f64>,
    flushed: Vec<f64>,
}

impl Sizes {
    fn zeros(rows: usize) -> Self {
        let zeros = vec![0.0; rows];
        Self { magnitude: zeros.clone(), squared_rounding: zeros.clone(), flushed: zeros }
    }

    /// One more term of a row's sum: its size, the error of its operands, and what is lost if p is flushed to zero.
    /// Terms that are not finite say nothing about the others.
    fn add(&mut self, row: usize, magnitude: f64, rounding: f64, flushed: f64) {
        let add = |to: &mut f64, x: f64| *to += if x.is_finite() { x } else { 0.0 };
        add(&mut self.magnitude[row], magnitude);
        add(&mut self.squared_rounding[row], rounding * rounding);
        add(&mut self.flushed[row], flushed);
    }
}

/// The Euclidean norm and the largest absolute value of a vector.
struct Norms {
    norm: f64,
    max: f64,
}

impl Norms {
    fn of<T: Real>(vector: &[T]) -> Self {
        let absolute = vector.iter().map(|x| x.to_f64().abs());
        Self { norm: absolute.clone().map(|x| x * x).sum::<f64>().sqrt(), max: absolute.fold(0.0, f64::max) }
    }
}

fn typed<T: Real>(values: &[f64]) -> Vec<T> {
    values.iter().map(|&x| T::from_f64(x)).collect()
}

/// `(seqlen_k, head_dim)` rows as `(head_dim, seqlen_k)`.
fn columns<'a, T: Real + 'a>(seqlen_k: usize, head_dim: usize, row: impl Fn(usize) -> &'a [T]) -> Vec<T> {
    (0..head_dim).flat_map(|dim| (0..seqlen_k).map(move |col| (dim, col))).map(|(dim, col)| row(col)[dim]).collect()
}

/// `vector . row` for each of the `seqlen_k` rows that `columns` holds, dimension after dimension. The loop runs over
/// the rows inside, which the compiler can vectorise without changing the order of any sum.
fn products<T: Real>(vector: &[T], columns: &[T], seqlen_k: usize) -> Vec<T> {
    let mut sums = vec![T::from_f64(0.0); seqlen_k];
    for (dim, &x) in vector.iter().enumerate() {
        add_scaled(&mut sums, x, &columns[dim * seqlen_k..][..seqlen_k]);
    }
    sums
}

fn add_scaled<T: Real>(sums: &mut [T], factor: T, row: &[T]) {
    for (sum, &x) in sums.iter_mut().zip(row) {
        *sum += factor * x;
    }
}
