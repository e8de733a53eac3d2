//! The rates that the GPU reaches in a large matrix product, and in a copy in its memory.

use anyhow::{ensure, Result};
use attention_reference::matrix::{dot, norm};
use candle_core::{DType, Tensor};

use super::gpu::Gpu;
use super::report::Report;
use crate::cases::precision;
use crate::inputs::values;

/// Rows and columns of the product.
const SIZE: usize = 8192;

/// Checks the product by Candle's matmul, then times it and the copy.
///
/// # Errors
/// If a sampled element is not the product's.
pub fn measure(gpu: &mut Gpu, dtype: DType, (bench, rep_ms): (bool, f64), report: &mut Report) -> Result<()> {
    let matrix = || Tensor::randn(0f32, 1f32, (SIZE, SIZE), &gpu.device)?.to_dtype(dtype);
    let (lhs, rhs) = (matrix()?, matrix()?);
    let product = lhs.matmul(&rhs)?;
    for index in 0..8 {
        let (row, col) = (index * (SIZE - 1) / 7, (index * 37) % SIZE);
        let lhs = values(&lhs.narrow(0, row, 1)?)?;
        let rhs = values(&rhs.narrow(1, col, 1)?.force_contiguous()?)?;
        let got = values(&product.narrow(0, row, 1)?)?[col];
        let want = dot(&lhs, &rhs);
        // The result is rounded once. The sums run in f32, so their error is small relative to the norms of the rows.
        let limit = precision(dtype).half_step() * want.abs() + 1e-5 * norm(&lhs) * norm(&rhs);
        ensure!((got - want).abs() <= limit, "matmul: {got} where {want} is right, at [row {row}, col {col}]");
    }
    drop(product);
    if !bench {
        println!("checked matmul{SIZE}");
        return Ok(());
    }
    let product = gpu.time(rep_ms, || Ok(lhs.matmul(&rhs)?))?;
    drop((lhs, rhs));
    let source = Tensor::zeros(COPIED_BYTES / dtype.size_in_bytes(), dtype, &gpu.device)?;
    let copy = gpu.time(rep_ms, || Ok(source.copy()?))?;
    report.ceiling(dtype, (SIZE, &product), (COPIED_BYTES, &copy))
}

/// Far more than any L2 cache.
const COPIED_BYTES: usize = 1 << 30;
