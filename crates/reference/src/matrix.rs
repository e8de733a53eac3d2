//! Rows of numbers, and the sums over them.

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
        let row = |token: usize| &tensor[(token * heads + head) * width..][..width];
        let values = (first..first + rows).flat_map(row).map(|&x| T::from_f64(x)).collect();
        Self { rows, width, values }
    }

    pub fn rows(&self) -> usize {
        self.rows
    }

    pub fn width(&self) -> usize {
        self.width
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
