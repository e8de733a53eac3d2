//! Matrix products of tiles. The `gemm` crate computes them on one thread.

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
    /// A matrix with contiguous rows, `stride` elements apart.
    pub(super) fn rows(data: &'a [A], stride: usize) -> Self {
        Self { data, row_stride: stride, col_stride: 1 }
    }

    /// The same elements with rows and columns exchanged.
    pub(super) fn transposed(self) -> Self {
        Self { data: self.data, row_stride: self.col_stride, col_stride: self.row_stride }
    }

    /// The first `cols` elements of a row.
    #[inline(always)]
    pub(super) fn row(&self, row: usize, cols: usize) -> &'a [A] {
        assert_eq!(self.col_stride, 1, "rows must be contiguous");
        &self.data[row * self.row_stride..][..cols]
    }

    /// Whether the first `rows x cols` elements are all finite.
    fn all_finite(&self, rows: usize, cols: usize) -> bool {
        // The loop reads a whole row before it can stop. So the compiler can vectorise it, and nearly every tile is finite.
        let finite = |row: &[A]| row.iter().fold(true, |all, x| all & x.finite());
        (0..rows).all(|row| finite(self.row(row, cols)))
    }

    /// The part that begins at `(row, col)`.
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

/// A matrix to write: contiguous rows, `row_stride` elements apart.
pub(super) struct Out<'a, A> {
    start: *mut A,
    len: usize,
    row_stride: usize,
    borrow: PhantomData<&'a mut [A]>,
}

impl<'a, A> Out<'a, A> {
    /// A matrix whose first row begins at `data[0]`.
    pub(super) fn rows(data: &'a mut [A], row_stride: usize) -> Self {
        Self { start: data.as_mut_ptr(), len: data.len(), row_stride, borrow: PhantomData }
    }

    /// A matrix in a block of `len` elements. Other threads may write between its rows.
    ///
    /// # Safety
    /// For the lifetime `'a`, `start` points to `len` elements, and nobody else accesses the elements of the rows.
    pub(super) unsafe fn interleaved(start: *mut A, len: usize, row_stride: usize) -> Self {
        Self { start, len, row_stride, borrow: PhantomData }
    }

    /// The rows that begin with `row`.
    fn from(&mut self, row: usize) -> Out<'_, A> {
        let skipped = row * self.row_stride;
        assert!(skipped <= self.len, "row {row} begins at {skipped} of {}", self.len);
        // SAFETY: within the elements of `self`, which stays borrowed.
        let start = unsafe { self.start.add(skipped) };
        Out { start, len: self.len - skipped, row_stride: self.row_stride, borrow: PhantomData }
    }

    fn assert_holds(&self, rows: usize, cols: usize) {
        if rows > 0 && cols > 0 {
            assert!(cols <= self.row_stride || rows == 1, "rows of {cols}, {} apart, overlap", self.row_stride);
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
    // SAFETY: the asserts keep all accesses in bounds. `out` is borrowed exclusively, so it does not alias the operands.
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

/// `out += factor * lhs rhs`, where row `i` of `lhs` uses only the columns `visible(i)`.
///
/// `lhs` is 0 in all other columns. So [`matmul`] computes this as long as `rhs` is finite. But 0 times a non-finite
/// element is NaN, and hidden rows of `rhs` must have no effect. So if `rhs` has a non-finite element, each row of `lhs`
/// is multiplied on its own, with its visible rows of `rhs` alone.
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

/// `out = factor * lhs rhs`, contiguous. A score has the same bits in every tile, in the forward and in the backward.
///
/// The backward needs this: it recomputes scores and subtracts the `row_max_log2` of the forward.
/// For most products the `gemm` crate adds the terms of a sum in order, from the first to the last. For vectors, and for
/// products with `k` below 3, it uses other orders. [`ThinProduct`] computes these in the first order.
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

/// A product with `m` or `n` of 1, or with `k` of 1 or 2. See [`matmul_scores`].
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
        // Number of rows at once. Their sums are independent, so the processor overlaps them. Of 1 to 32 rows, 16 were fastest: 1.7 times
        // the speed of 8 at head_dim 64 and 128 (f32, 64 rows, one thread of an AMD EPYC).
        const ROWS: usize = 16;
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
