//! What the GPU is able to: by its datasheet, by a large matrix product, and by a copy in its memory.

use anyhow::{ensure, Result};
use attention_reference::matrix::{dot, norm};
use candle_core::{DType, Tensor};

use super::gpu::Gpu;
use super::report::Report;
use crate::inputs::{precision, values};

/// FLOP/s in units of 10^12 that datasheets promise for dense products of bf16 or f16 with sums in f32, by how the
/// driver calls the GPU.
///
/// Where NVIDIA's product briefs give the rate with sparsity it is halved. GeForce: appendix of the architecture's
/// whitepaper, "with FP32 accumulate".
const DATASHEETS: [(&str, f64); 17] = [
    ("NVIDIA A100", 312.0),
    ("NVIDIA A30", 165.0),
    ("NVIDIA A10", 125.0),
    ("NVIDIA A40", 149.7),
    ("NVIDIA RTX A6000", 154.8),
    ("NVIDIA GeForce RTX 3090", 71.0),
    ("NVIDIA GeForce RTX 4090", 165.2),
    ("NVIDIA L4", 121.0),
    ("NVIDIA L40", 181.0),
    ("NVIDIA L40S", 362.0),
    ("NVIDIA RTX 6000 Ada Generation", 364.2),
    ("NVIDIA H100 PCIe", 756.0),
    ("NVIDIA H100 NVL", 835.0),
    ("NVIDIA H100 80GB HBM3", 989.0),
    ("NVIDIA H200", 989.0),
    ("NVIDIA H200 NVL", 835.0),
    ("NVIDIA GH200", 989.0),
];

/// The datasheet's rate of the GPU `name`; `None` for one that is not listed, or a part of one.
pub fn datasheet(name: &str) -> Option<f64> {
    // `A100-SXM4-80GB` is an A100; `RTX 4090 Laptop GPU` is no RTX 4090, and a MIG instance is part of a GPU.
    let harmless = |word: &str| word.ends_with("GB") || word.starts_with("SXM") || word.eq_ignore_ascii_case("PCIe");
    let is_variant = |rest: &str| rest.starts_with([' ', '-']) && rest[1..].split([' ', '-']).all(harmless);
    let exact = DATASHEETS.iter().find(|(known, _)| *known == name);
    let variant = || DATASHEETS.iter().find(|(known, _)| name.strip_prefix(known).is_some_and(is_variant));
    exact.or_else(variant).map(|&(_, tflops)| tflops)
}

/// Rows and columns of the product.
pub const SIZE: usize = 8192;

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
        // The result is rounded once; the sums run in f32, whose roundings are small beside the rows' lengths.
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
