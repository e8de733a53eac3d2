//! Rows of numbers, and the sums over them.
//!
//! Each sum has a fixed order. Vector instructions compute many sums side by side, and never split one. So the results have
//! the same bits on every machine.

use std::ops::{Index, IndexMut};

use crate::number::Number;

/// `m[row]` is a row of `width` numbers.
#[derive(Clone, Debug)]
pub struct Matrix<T> {
    rows: usize,
    width: usize,
    values: Vec<T>,
}

impl<T: Number> Matrix<T> {
    pub fn zeros(rows: usize, width: usize) -> Self {
        Self { rows, width, values: vec![T::ZERO; rows * width] }
    }

    /// One head of a token-major tensor `(total, heads, width)`: its rows `first..first + rows`.
    pub fn of_head(tensor: &[f64], (heads, width): (usize, usize), head: usize, first: usize, rows: usize) -> Self {
        let mut values = Vec::with_capacity(rows * width);
        for token in first..first + rows {
            values.extend(tensor[(token * heads + head) * width..][..width].iter().map(|&x| T::from_f64(x)));
        }
        Self { rows, width, values }
    }

    pub fn to_f64(&self) -> Matrix<f64> {
        Matrix { rows: self.rows, width: self.width, values: self.values.iter().map(|x| x.to_f64()).collect() }
    }

    pub fn rows(&self) -> usize {
        self.rows
    }

    pub fn width(&self) -> usize {
        self.width
    }
}

/// k or v of one head, twice: as rows, and with `LANES` rows side by side. Vector instructions then compute the inner products
/// of one row with all of them.
pub struct Keys<T> {
    pub rows: Matrix<T>,
    /// `(rows / LANES, width)`, with rows / LANES rounded up. Lanes past the last row are 0.
    lanes: Vec<[T; LANES]>,
}

/// Enough independent sums to hide the latency of an addition.
const LANES: usize = 32;

impl<T: Number> Keys<T> {
    pub fn of(rows: Matrix<T>) -> Self {
        let mut lanes = vec![[T::ZERO; LANES]; rows.rows.div_ceil(LANES) * rows.width];
        for row in 0..rows.rows {
            for (column, &x) in lanes[row / LANES * rows.width..].iter_mut().zip(&rows[row]) {
                column[row % LANES] = x;
            }
        }
        Self { rows, lanes }
    }

    /// The inner product of `row` with each of the rows `chosen`, summed from the first element to the last.
    pub fn products(&self, row: &[T], chosen: &[usize]) -> Vec<T> {
        let (Some(first), Some(last)) = (chosen.iter().min(), chosen.iter().max()) else { return Vec::new() };
        let (first, last) = (first / LANES, last / LANES);
        let mut all = vec![[T::ZERO; LANES]; last - first + 1];
        multiply(&mut all, row, &self.lanes[first * self.rows.width..(last + 1) * self.rows.width]);
        chosen.iter().map(|&row| all[row / LANES - first][row % LANES]).collect()
    }
}

/// Compiles each function twice: for machines with AVX2 and FMA, and for all others. Both give the same bits, because the
/// compiler changes neither the order of a sum nor its roundings.
macro_rules! vectorised {
    ($($(#[$doc:meta])* $public:vis fn $name:ident<T: Number>($($argument:ident: $type:ty),*) $body:block)*) => {
        $($(#[$doc])*
        $public fn $name<T: Number>($($argument: $type),*) {
            #[inline(always)]
            fn body<T: Number>($($argument: $type),*) $body

            #[cfg(target_arch = "x86_64")]
            if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
                #[target_feature(enable = "avx2,fma")]
                fn wide<T: Number>($($argument: $type),*) {
                    body($($argument),*)
                }
                // SAFETY: the machine has both features.
                return unsafe { wide($($argument),*) };
            }
            body($($argument),*)
        })*
    };
}

vectorised! {
    /// The inner products of `row` with all rows of whole lanes.
    fn multiply<T: Number>(products: &mut [[T; LANES]], row: &[T], lanes: &[[T; LANES]]) {
        for (products, columns) in products.iter_mut().zip(lanes.chunks_exact(row.len())) {
            let mut sums = [T::ZERO; LANES];
            for (&x, column) in row.iter().zip(columns) {
                for (sum, &y) in sums.iter_mut().zip(column) {
                    *sum += x * y;
                }
            }
            *products = sums;
        }
    }

    /// Adds the rows `chosen` to `sums`, in this order, each times its factor.
    pub fn add_rows<T: Number>(sums: &mut [T], chosen: &[usize], factors: &[T], rows: &Matrix<T>) {
        for (&from, &factor) in chosen.iter().zip(factors) {
            add_scaled(sums, factor, &rows[from]);
        }
    }

    /// Adds `row` times its factor to each of the rows `chosen` of `sums`.
    pub fn add_to_rows<T: Number>(sums: &mut Matrix<T>, chosen: &[usize], factors: &[T], row: &[T]) {
        for (&to, &factor) in chosen.iter().zip(factors) {
            add_scaled(&mut sums[to], factor, row);
        }
    }
}

impl<T> Index<usize> for Matrix<T> {
    type Output = [T];

    fn index(&self, row: usize) -> &[T] {
        &self.values[row * self.width..][..self.width]
    }
}

impl<T> IndexMut<usize> for Matrix<T> {
    fn index_mut(&mut self, row: usize) -> &mut [T] {
        &mut self.values[row * self.width..][..self.width]
    }
}

/// The inner product, summed from the first element to the last.
pub fn dot<T: Number>(a: &[T], b: &[T]) -> T {
    let mut sum = T::ZERO;
    for (&a, &b) in a.iter().zip(b) {
        sum += a * b;
    }
    sum
}

#[inline(always)] // into the functions above, which compile it for their instructions
pub fn add_scaled<T: Number>(sums: &mut [T], factor: T, row: &[T]) {
    for (sum, &x) in sums.iter_mut().zip(row) {
        *sum += factor * x;
    }
}

/// The Euclidean norm.
pub fn norm<T: Number>(row: &[T]) -> f64 {
    row.iter().map(|x| x.to_f64().powi(2)).sum::<f64>().sqrt()
}

/// The largest absolute value. NaN is ignored.
pub fn max_abs<T: Number>(row: &[T]) -> f64 {
    row.iter().map(|x| x.to_f64().abs()).fold(0.0, f64::max)
}
