//! Sums with a fixed order, and blocks of rows.
//!
//! The order of every sum depends on shapes alone. So results have the same bits for any number of threads.

use crate::number::Real;

/// Independent partial sums of a row. The compiler keeps them in vector registers, and the rounding error of a sum grows with
/// `n / LANES` instead of `n`.
const LANES: usize = 16;

/// Sum of `f(x)`.
pub(crate) fn sum<A: Real>(xs: &[A], f: impl Fn(A) -> A) -> A {
    let mut lanes = [A::ZERO; LANES];
    let (chunks, rest) = xs.as_chunks::<LANES>();
    for chunk in chunks {
        for (lane, &x) in lanes.iter_mut().zip(chunk) {
            *lane += f(x);
        }
    }
    for (lane, &x) in lanes.iter_mut().zip(rest) {
        *lane += f(x);
    }
    total(lanes)
}

/// Sum of `x * y`.
pub(crate) fn dot<A: Real>(xs: &[A], ys: &[A]) -> A {
    let mut lanes = [A::ZERO; LANES];
    let ((x_chunks, x_rest), (y_chunks, y_rest)) = (xs.as_chunks::<LANES>(), ys.as_chunks::<LANES>());
    for (x_chunk, y_chunk) in x_chunks.iter().zip(y_chunks) {
        for ((lane, &x), &y) in lanes.iter_mut().zip(x_chunk).zip(y_chunk) {
            *lane += x * y;
        }
    }
    for ((lane, &x), &y) in lanes.iter_mut().zip(x_rest).zip(y_rest) {
        *lane += x * y;
    }
    total(lanes)
}

/// Adds the lanes in pairs.
fn total<A: Real>(mut lanes: [A; LANES]) -> A {
    let mut width = LANES / 2;
    while width > 0 {
        for lane in 0..width {
            let other = lanes[lane + width];
            lanes[lane] += other;
        }
        width /= 2;
    }
    lanes[0]
}

/// The sum of few numbers, one after another. f64 costs nothing here.
pub(crate) fn sum_in_f64<A: Real>(xs: &[A]) -> f64 {
    xs.iter().map(|x| x.to_f64()).sum()
}

/// Adds each element of `from` to `to`.
pub(crate) fn add<A: Real>(to: &mut [A], from: &[A]) {
    for (to, &from) in to.iter_mut().zip(from) {
        *to += from;
    }
}

/// Rows of one task. A task has at least `MIN_ELEMENTS` elements, because handing it to a thread costs microseconds. There are at
/// most `MAX_TASKS` tasks, because each has partial sums of its own.
pub(crate) fn rows_per_task(rows: usize, width: usize) -> usize {
    const MIN_ELEMENTS: usize = 1 << 13;
    const MAX_TASKS: usize = 64;
    rows.div_ceil(MAX_TASKS).max(MIN_ELEMENTS.div_ceil(width))
}
