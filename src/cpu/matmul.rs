//! Matrix products of tiles, through the `gemm` crate on one thread.

use std::ops::Range;

use super::element::Real;

/// A matrix to read: element `(row, col)` lies at `row * rows + col * cols`.
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
#[derive(Clone, Copy)]
pub(super) struct Out<A> {
    start: *mut A,
    row_stride: usize,
}

impl<A> Out<A> {
    /// # Safety
    /// Until the last product into it is done, `start` points to rows of the products' size that nothing else accesses.
    pub(super) unsafe fn new(start: *mut A, row_stride: usize) -> Self {
        Self { start, row_stride }
    }

    /// Rows that fill `data`.
    pub(super) fn rows(data: &mut [A], row_stride: usize) -> Self {
        Self { start: data.as_mut_ptr(), row_stride }
    }
}

/// `out = factor * lhs rhs`, or `out += factor * lhs rhs`, for `lhs` of `m x k` and `rhs` of `k x n`.
pub(super) fn matmul<A: Real>(
    out: Out<A>,
    (m, n, k): (usize, usize, usize),
    add: bool,
    factor: A,
    lhs: Mat<A>,
    rhs: Mat<A>,
) {
    lhs.assert_holds(m, k);
    rhs.assert_holds(k, n);
    // SAFETY: both operands hold their elements (asserted), `out` holds the result by its own contract, and a shared
    // borrow of the operands excludes that `out` overlaps them.
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
    out: Out<A>,
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
                // SAFETY: row `row` of `out`, which holds `m` rows.
                let out = unsafe { Out::new(out.start.add(row * out.row_stride), out.row_stride) };
                if !seen.is_empty() {
                    let size = (1, n, seen.len());
                    matmul(out, size, true, factor, lhs.from(row, seen.start), rhs.from(seen.start, 0));
                }
            }
        }
        _ => matmul(out, (m, n, k), true, factor, lhs, rhs),
    }
}
