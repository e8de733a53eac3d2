//! The error model: how far rounding may change each row of a result.
//!
//! It looks at the terms that the formulas add up in a row. [`crate::tolerance`] computes a limit from it.

use crate::attention::{Backward, Forward, Head};
use crate::matrix::{add_rows, max_abs, norm, Matrix};
use crate::number::Number;
use crate::precision::Precision;

/// The error model of one row. A row is one token and head.
#[derive(Clone, Copy, Debug, Default)]
pub struct RowError {
    /// A bound on the largest sum of absolute terms in the row. A term counts once for each rounding of its factors. The
    /// error of the row is proportional to this, even if the terms cancel.
    pub magnitude: f64,
    /// The sum over all terms of the squared error that rounding the operands causes: half a step of each p, `d_raw`, or o
    /// (in delta).
    squared_rounding: f64,
    /// The error of the row where exp returns 0 for a p below the smallest normal number.
    flushed: f64,
}

impl RowError {
    /// The likely change of the row when the operands of the matrix products are rounded to the tensors' type. The errors
    /// are independent, so their squares add up.
    pub fn operand_rounding(&self) -> f64 {
        self.squared_rounding.sqrt() + self.flushed
    }

    /// Adds a term of the row's sum. A term that is not finite adds 0.
    fn add(&mut self, magnitude: f64, squared_rounding: f64, flushed: f64) {
        let finite = |x: f64| if x.is_finite() { x } else { 0.0 };
        self.magnitude += finite(magnitude);
        self.squared_rounding += finite(squared_rounding);
        self.flushed += finite(flushed);
    }
}

/// The errors of the rows that belong to one key head.
pub struct Errors {
    precision: Precision,
    k: Matrix<f64>,
    of_k: Vec<Size>,
    of_v: Vec<Size>,
    /// The error of each row of dk, summed over the queries so far.
    pub dk: Vec<RowError>,
    /// The error of each row of dv, summed over the queries so far.
    pub dv: Vec<RowError>,
}

/// The errors of the rows of one query.
#[derive(Default)]
pub struct QueryErrors {
    pub o: RowError,
    pub lse: RowError,
    pub dq: RowError,
}

/// The Euclidean norm and the largest absolute value of a row.
struct Size {
    norm: f64,
    max: f64,
}

impl Size {
    fn of<T: Number>(row: &[T]) -> Self {
        Self { norm: norm(row), max: max_abs(row) }
    }
}

impl Errors {
    pub fn new<T: Number>(precision: Precision, k: &Matrix<T>, v: &Matrix<T>) -> Self {
        let sizes = |m: &Matrix<T>| (0..m.rows()).map(|row| Size::of(&m[row])).collect();
        let none = vec![RowError::default(); k.rows()];
        Self { precision, k: k.to_f64(), of_k: sizes(k), of_v: sizes(v), dk: none.clone(), dv: none }
    }

    /// The errors of query `i`. Adds the terms of this query to the errors of dk and dv.
    pub fn add_query<T: Number>(
        &mut self,
        head: &Head<T>,
        i: usize,
        forward: &Forward<T>,
        backward: &Backward<T>,
    ) -> QueryErrors {
        let half_step = |x: f64| 0.5 * self.precision.step(x);
        let smallest_p = self.precision.accumulator().smallest_normal();
        let scale = head.softmax_scale.to_f64().abs();
        let (lse, dlse) = (forward.lse.to_f64().abs(), head.dlse[i].to_f64().abs());
        let (q, do_, o) = (Size::of(&head.q[i]), Size::of(&head.do_[i]), Size::of(&forward.o));
        let rounded_o = head.do_[i].iter().zip(&forward.o).map(|(d, o)| half_step(o.to_f64()) * d.to_f64());
        let squared_of_delta: f64 = rounded_o.map(|x| x * x).sum();

        let mut errors = QueryErrors::default();
        let mut all_capped_p = Vec::new();
        for (n, &j) in forward.keys.iter().enumerate() {
            let (k, v) = (&self.of_k[j], &self.of_v[j]);
            let (p, d_raw) = (forward.p[n].to_f64(), backward.d_raw[n].to_f64());
            let capped_p = p * forward.derivative[n].to_f64();
            all_capped_p.push(capped_p);

            let s_size = scale * q.norm * k.norm + (forward.s[n] - forward.raw[n]).to_f64().abs();
            // Through exp, the absolute error of s - lse becomes the relative error of p.
            let p_size = p * (1.0 + s_size + lse);
            let dp_size = do_.norm * (v.norm + o.norm) + dlse;
            let d_raw_size = p_size * dp_size;
            let (of_p, of_d_raw) = (half_step(p), half_step(d_raw));
            let flushed_d_raw = smallest_p * dp_size;

            if s_size.is_finite() {
                errors.lse.magnitude = errors.lse.magnitude.max(s_size);
            }
            let squared = |x: f64| x * x;
            errors.o.add(p_size * v.max, squared(of_p * v.max), smallest_p * v.max);
            self.dv[j].add(p_size * do_.max, squared(of_p * do_.max), smallest_p * do_.max);
            let of_k = scale * k.max;
            errors.dq.add(of_k * d_raw_size, squared(of_k * of_d_raw), of_k * flushed_d_raw);
            let of_q = scale * q.max;
            let squared_of_d_raw = squared(of_d_raw) + squared(capped_p) * squared_of_delta;
            self.dk[j].add(of_q * d_raw_size, squared(of_q) * squared_of_d_raw, of_q * flushed_d_raw);
        }
        // All keys of the row have the same delta, so its error is a factor of the whole sum.
        let mut k_mean = vec![0.0; self.k.width()];
        add_rows(&mut k_mean, &forward.keys, &all_capped_p, &self.k);
        errors.dq.add(0.0, squared_of_delta * (scale * max_abs(&k_mean)).powi(2), 0.0);
        errors
    }
}
