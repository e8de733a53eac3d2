//! Layers on a GPU, compared with the CPU: cuBLASLt's epilogues, its transposed operands, and the composed ways around both.

use anyhow::{ensure, Result};
use candle_core::{DType, Device, Tensor};
use candle_fused_ops::{linear, linear_add, linear_gelu, mlp_add};

use crate::close::relative;
use crate::cuda::gpu;
use crate::cuda_against_cpu::run;
use crate::run::{precision, random};

type Call = fn(&[Tensor]) -> candle_core::Result<Tensor>;

/// Inputs, and what to call with them. The shapes are for `rows`, `inputs`, `hidden` and `outputs`.
const CALLS: [(&str, Call); 4] = [
    ("linear", |t| linear(&t[0], &t[1], &t[2])),
    ("linear_add", |t| linear_add(&t[0], &t[1], &t[2], &t[5])),
    ("linear_gelu", |t| linear_gelu(&t[0], &t[1], &t[2])),
    ("mlp_add", |t| mlp_add(&t[0], [&t[1], &t[2]], [&t[3], &t[4]], &t[5])),
];

#[test]
fn layers_on_a_gpu_agree_with_those_on_the_cpu() -> Result<()> {
    let Some(gpu) = gpu() else { return Ok(()) };
    // The sizes of a GPT, small ones, and some that tensor cores do not take: those are composed.
    for [rows, inputs, hidden, outputs] in [[1024, 768, 3072, 768], [5, 48, 80, 24], [1, 8, 8, 8], [5, 9, 11, 7]] {
        for dtype in [DType::F32, DType::F16, DType::BF16] {
            for (name, call) in CALLS {
                let outputs = if name == "linear_add" { hidden } else { outputs };
                let shapes: [&[usize]; 6] =
                    [&[rows, inputs], &[hidden, inputs], &[hidden], &[outputs, hidden], &[outputs], &[rows, outputs]];
                let tensors = shapes.iter().enumerate().map(|(index, shape)| {
                    // Weights that keep the size of their inputs.
                    let scale = if shape.len() == 2 && index % 2 == 1 && index < 5 {
                        1.0 / (shape[1] as f64).sqrt()
                    } else {
                        1.0
                    };
                    Ok((random(&format!("{name} {index}"), shape, dtype)? * scale)?)
                });
                let tensors = tensors.collect::<Result<Vec<Tensor>>>()?;
                let (got, want) = (run(&call, &tensors, &gpu)?, run(&call, &tensors, &Device::Cpu)?);
                // Two roundings of the result and of what is between, and the hardware's tanh.
                let limit = 8.0 * precision(dtype).step(1.0)
                    + if name.contains("linear_gelu") || name == "mlp_add" { 2e-3 } else { 1e-6 };
                let mut errors = Vec::new();
                for (index, (got, want)) in got.iter().zip(&want).enumerate() {
                    let (Some(got), Some(want)) = (got, want) else {
                        ensure!(got.is_none() && want.is_none(), "gradient {index} of {name}: only one device has it");
                        continue;
                    };
                    ensure!((got.dtype(), got.dims()) == (want.dtype(), want.dims()), "{name}: tensor {index}");
                    errors.push(relative(got, want)?);
                }
                let worst = errors.iter().fold(0.0, |a: f64, &b| if b.is_nan() { b } else { a.max(b) });
                println!("{name:12} {dtype:?} {rows} x {inputs} {hidden} {outputs}: largest error {worst:.1e}, limit {limit:.1e}");
                ensure!(worst <= limit, "{name} {dtype:?} {rows} x {inputs} {hidden} {outputs}: {errors:?}");
            }
        }
    }
    Ok(())
}
