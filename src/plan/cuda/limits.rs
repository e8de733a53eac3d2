//! The limits of all CUDA kernels.

use candle_core::DType;

use crate::error::{Error, Result};
use crate::instances::KERNELS;
use crate::problem::{Problem, Strides};

/// The largest gridDim.y and gridDim.z (CUDA C++ Programming Guide, technical specifications per compute capability).
pub(crate) const MAX_GRID_YZ: usize = 65_535;

/// Kernels add rows, mask bounds and tiles in 32-bit integers. With this limit, a sum of three of these is below 2^31.
pub(crate) const MAX_SEQLEN: usize = 1 << 29;

/// The largest stride of rows. A copy advances by at most 32 rows at once, with a 32-bit offset (cuda/sm80/copy.cuh asserts it).
const MAX_ROW_STRIDE: usize = i32::MAX as usize / 32;

/// Returns an error for a call that no CUDA kernel supports.
pub(super) fn check(problem: &Problem, compute_cap: (u32, u32)) -> Result<()> {
    let oldest = KERNELS.iter().map(|kernel| kernel.arch.compute_cap()).min().unwrap_or_default();
    if compute_cap < oldest {
        return Err(Error::ComputeCap { got: compute_cap, oldest });
    }
    if !matches!(problem.dtype, DType::F32 | DType::F16 | DType::BF16) {
        return Err(Error::CudaDType { tensor: "q", got: problem.dtype });
    }
    for (name, got, max) in [
        ("batch", problem.batch(), MAX_SEQLEN),
        ("num_heads", problem.num_heads, MAX_GRID_YZ),
        ("rows of q", problem.rows_q(), i32::MAX as usize),
        ("rows of k", problem.rows_k(), i32::MAX as usize),
        ("seqlen_q", problem.max_seqlen_q(), MAX_SEQLEN),
        ("seqlen_k", problem.max_seqlen_k(), MAX_SEQLEN),
    ] {
        if got > max {
            return Err(Error::CudaSize { name, got, max });
        }
    }
    Ok(())
}

/// head_dim and head_dim_v as the kernels see them. Rows that are not whole 16 bytes are copied and padded with zeros, because TMA cannot
/// read them. The copies have whole 32 bytes: memory is read in pieces of 32, and TMA is slower on rows that begin in the middle of one.
pub(super) fn padded_head_dims(problem: &Problem) -> (usize, usize) {
    let whole = alignment(problem.dtype);
    let padded = |size: usize| if size.is_multiple_of(whole) { size } else { size.next_multiple_of(2 * whole) };
    (padded(problem.head_dim), padded(problem.head_dim_v))
}

/// Name, strides and shape of each input.
pub(super) fn inputs(problem: &Problem) -> [(&'static str, Strides, Vec<usize>); 3] {
    [("q", problem.q, problem.shape_q()), ("k", problem.k, problem.shape_k()), ("v", problem.v, problem.shape_v())]
}

/// The names of the inputs that a call copies first, because the kernels cannot read them in place. Views of one tensor are copied
/// together.
pub(super) fn copied(problem: &Problem) -> Vec<&'static str> {
    let unreadable = inputs(problem).into_iter().filter(|(_, strides, shape)| !readable(strides, shape, problem.dtype));
    let unreadable: Vec<_> = unreadable.map(|(name, ..)| name).collect();
    match problem.fused && !unreadable.is_empty() {
        true => vec!["q", "k", "v"],
        false => unreadable,
    }
}

/// Returns an error if the rows of a copy are too far apart too. Many wide heads of q, k and v in one tensor make them so.
pub(super) fn check_copies(problem: &Problem) -> Result<()> {
    match copied(problem).is_empty() {
        true => Ok(()),
        false => Err(Error::CudaSize { name: "stride of rows in a copy", got: problem.q.row, max: MAX_ROW_STRIDE }),
    }
}

/// Whether the kernels can read a tensor in place: its rows are whole 16 bytes, 16-byte aligned, and not too far apart.
pub(crate) fn readable(strides: &Strides, shape: &[usize], dtype: DType) -> bool {
    let whole = shape[shape.len() - 1].is_multiple_of(alignment(dtype));
    shape.contains(&0) || (whole && aligned(strides, shape, dtype) && in_reach(strides, shape))
}

/// Stride and size of the axes rows, heads and sequences. Packed tensors have one sequence.
pub(crate) fn axes(strides: &Strides, shape: &[usize]) -> [(usize, usize); 3] {
    let (row_axis, head_axis) = (shape.len() - 3, shape.len() - 2);
    let batch = if row_axis == 0 { 1 } else { shape[0] };
    [(strides.row, shape[row_axis]), (strides.head, shape[head_axis]), (strides.batch, batch)]
}

/// Number of elements in 16 bytes. Kernels read and write rows in pieces of this size.
fn alignment(dtype: DType) -> usize {
    16 / dtype.size_in_bytes()
}

/// Whether all rows of a tensor are 16-byte aligned. The kernels need this.
fn aligned(strides: &Strides, shape: &[usize], dtype: DType) -> bool {
    let multiple = alignment(dtype);
    // The stride of an axis with one element is never used.
    let steps = axes(strides, shape).into_iter().all(|(stride, size)| size <= 1 || stride.is_multiple_of(multiple));
    steps && strides.offset.is_multiple_of(multiple)
}

/// Whether the stride of rows is within the limit of the kernels.
fn in_reach(strides: &Strides, shape: &[usize]) -> bool {
    shape[shape.len() - 3] <= 1 || strides.row <= MAX_ROW_STRIDE
}
