//! Matrix products of tiles, through the `gemm` crate on one thread.

use std::marker::PhantomData;
use std::ops::Range;

use super::element::Real;

/// A matrix to read: element `(row, col)` lies at `row * row_stride + col * col_stride`.
#[derive(Clone, Copy)]
pub(super) struct Mat<'a, A> {
    data: &'a [A],
    row_stride: usize,
    col_stride: usize,
}

impl<'a, A: Real> Mat<'a, A> {
    /// Rows of contiguous elements, `stride` apart.
    pub(super) fn rows(data: &'a [A], stride: usize) -> Self {
        Self { data, row_stride: stride, col_stride: 1 }
    }

    /// The same elements with rows and columns exchanged.
    pub(super) fn transposed(self) -> Self {
        Self { data: self.data, row_stride: self.col_stride, col_stride: self.row_stride }
    }

    /// Whether no infinity or NaN is among its first `rows x cols` elements.
    fn all_finite(&self, rows: usize, cols: usize) -> bool {
        assert_eq!(self.col_stride, 1, "reads rows");
        // No early exit within a row: without one the loop is vectorised, and nearly every tile is finite.
        let finite = |row: &[A]| row.iter().fold(true, |all, x| all & x.finite());
        (0..rows).all(|row| finite(&self.data[row * self.row_stride..][..cols]))
    }

    /// The part from `(row, col)` on.
    fn from(self, row: usize, col: usize) -> Self {
        Self { data: &self.data[row * self.row_stride + col * self.col_stride..], ..self }
    }

    fn assert_holds(&self, rows: usize, cols: usize) {
        if rows > 0 && cols > 0 {
            let last = (rows - 1) * self.row_stride + (cols - 1) * self.col_stride;
            assert!(last < self.data.len(), "{rows} x {cols} reaches element {last} of {}", self.data.len());
        }
    }
}

/// Where a product goes: rows of contiguous elements, `row_stride` apart.
pub(super) struct Out<'a, A> {
    start: *mut A,
    len: usize,
    row_stride: usize,
    borrow: PhantomData<&'a mut [A]>,
}

impl<'a, A> Out<'a, A> {
    /// Rows that begin with `data`.
    pub(super) fn rows(data: &'a mut [A], row_stride: usize) -> Self {
        Self { start: data.as_mut_ptr(), len: data.len(), row_stride, borrow: PhantomData }
    }

    /// Rows of a block that other threads may write between.
    ///
    /// # Safety
    /// For `'a`, `start` points to `len` elements, and no one else accesses those that a product into it writes.
    pub(super) unsafe fn between(start: *mut A, len: usize, row_stride: usize) -> Self {
        Self { start, len, row_stride, borrow: PhantomData }
    }

    /// The rows from `row` on.
    fn from(&mut self, row: usize) -> Out<'_, A> {
        let skipped = row * self.row_stride;
        assert!(skipped <= self.len, "row {row} begins at {skipped} of {}", self.len);
        // SAFETY: within the elements of `self`, which stays borrowed.
        let start = unsafe { self.start.add(skipped) };
        Out { start, len: self.len - skipped, row_stride: self.row_stride, borrow: PhantomData }
    }

    fn assert_holds(&self, rows: usize, cols: usize) {
        if rows > 0 && cols > 0 {
            assert!(cols <= self.row_stride || rows == 1, "rows of {cols} overlap, {} apart", self.row_stride);
            let last = (rows - 1) * self.row_stride + cols - 1;
            assert!(last < self.len, "{rows} x {cols} reaches element {last} of {}", self.len);
        }
    }
}

/// `out = factor * lhs rhs`, or `out += factor * lhs rhs`, for `lhs` of `m x k` and `rhs` of `k x n`.
pub(super) fn matmul<A: Real>(
    out: Out<'_, A>,
    (m, n, k): (usize, usize, usize),
    add: bool,
    factor: A,
    lhs: Mat<A>,
    rhs: Mat<A>,
) {
    lhs.assert_holds(m, k);
    rhs.assert_holds(k, n);
    out.assert_holds(m, n);
    // SAFETY: all three hold their elements (asserted), and `out` is an exclusive borrow, the operands shared ones.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            out.start,
            1,
            out.row_stride as isize,
            add,
            lhs.data.as_ptr(),
            lhs.col_stride as isize,
            lhs.row_stride as isize,
            rhs.data.as_ptr(),
            rhs.col_stride as isize,
            rhs.row_stride as isize,
            A::ONE,
            factor,
            false,
            false,
            false,
            gemm::Parallelism::None,
        );
    }
}

/// `out += factor * lhs rhs`, where row `i` of `lhs` counts only in the columns `visible(i)`.
///
/// Elements outside are 0 in `lhs`, so this is [`matmul`] as long as `rhs` is finite. Where it is not, 0 times a hidden
/// infinity would be NaN, and hidden rows must stay without effect: then each row is multiplied by itself.
pub(super) fn matmul_visible<A: Real>(
    mut out: Out<'_, A>,
    (m, n, k): (usize, usize, usize),
    factor: A,
    lhs: Mat<A>,
    rhs: Mat<A>,
    visible: Option<&dyn Fn(usize) -> Range<usize>>,
) {
    match visible {
        Some(visible) if !rhs.all_finite(k, n) => {
            for row in 0..m {
                let seen = visible(row);
                if !seen.is_empty() {
                    let size = (1, n, seen.len());
                    matmul(out.from(row), size, true, factor, lhs.from(row, seen.start), rhs.from(seen.start, 0));
                }
            }
        }
        _ => matmul(out, (m, n, k), true, factor, lhs, rhs),
    }
}

/// `out = factor * lhs rhs`, dense, for scores: the same bits for a pair of rows in whatever tile, forward and backward.
///
/// The backward subtracts the forward's maximum from scores of its own. The `gemm` crate sums over `k` one after the other
/// in tiles, and in other orders in products that are vectors or have hardly any depth; those are done here, in its order.
pub(super) fn matmul_scores<A: Real>(
    arch: pulp::Arch,
    out: &mut [A],
    (m, n, k): (usize, usize, usize),
    factor: A,
    lhs: Mat<A>,
    rhs: Mat<A>,
) {
    if m > 1 && n > 1 && k > 2 {
        matmul(Out::rows(out, n), (m, n, k), false, factor, lhs, rhs);
    } else {
        arch.dispatch(ThinProduct { out, size: (m, n, k), factor, lhs, rhs });
    }
}

/// A product with one row, one column, or little depth.
struct ThinProduct<'a, A> {
    out: &'a mut [A],
    size: (usize, usize, usize),
    factor: A,
    lhs: Mat<'a, A>,
    rhs: Mat<'a, A>,
}

impl<A: Real> pulp::NullaryFnOnce for ThinProduct<'_, A> {
    type Output = ();

    #[inline(always)]
    fn call(self) {
        let Self { out, size: (m, n, k), factor, lhs, rhs } = self;
        // Rows at once: their sums do not wait for each other.
        const ROWS: usize = 8;
        if n == 1 {
            for (first, out) in (0..m).step_by(ROWS).zip(out[..m].chunks_mut(ROWS)) {
                let mut sums = [A::ZERO; ROWS];
                for depth in 0..k {
                    let x = rhs.data[depth * rhs.row_stride];
                    for (i, sum) in sums[..out.len()].iter_mut().enumerate() {
                        *sum = lhs.data[(first + i) * lhs.row_stride + depth * lhs.col_stride].mul_add(x, *sum);
                    }
                }
                out.iter_mut().zip(sums).for_each(|(out, sum)| *out = factor * sum);
            }
            return;
        }
        for (row, out) in out[..m * n].chunks_exact_mut(n).enumerate() {
            out.fill(A::ZERO);
            for depth in 0..k {
                let x = lhs.data[row * lhs.row_stride + depth * lhs.col_stride];
                let from = &rhs.data[depth * rhs.row_stride..];
                for (col, out) in out.iter_mut().enumerate() {
                    *out = x.mul_add(from[col * rhs.col_stride], *out);
                }
            }
            out.iter_mut().for_each(|out| *out = factor * *out);
        }
    }
}
