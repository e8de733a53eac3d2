//! Operators on the first GPU against the same operators on the CPU, at sizes and alignments that the list of operators does not have.

use anyhow::{ensure, Result};
use attention_reference::Precision;
use candle_core::{DType, Device, Tensor, Var};
use candle_fused_ops::{
    embedding, geglu, gelu, gelu_erf, rotary, rotary_in_place, swiglu, AdamW, AdamWConfig, ParameterGroup, RotaryOrder,
};

use crate::cuda::gpu;
use crate::errors::text;
use crate::nonfinite::{finite_gates, limits_of_gelu};
use crate::run::{bits, numbers, precision, random};

const DTYPES: [DType; 3] = [DType::F32, DType::F16, DType::BF16];

type Call<'a> = &'a dyn Fn(&[Tensor]) -> candle_core::Result<Tensor>;

/// The result of `call`, and the gradients of its inputs for a random gradient of the result. `None` for an input that `call` does not use.
pub fn run(call: Call, inputs: &[Tensor], device: &Device) -> Result<Vec<Option<Tensor>>> {
    let inputs = inputs.iter().map(|input| input.to_device(device)?.copy()).collect::<candle_core::Result<Vec<_>>>()?;
    let vars: Vec<Var> = inputs.iter().map(Var::from_tensor).collect::<candle_core::Result<_>>()?;
    let y = call(&vars.iter().map(|var| var.as_tensor().clone()).collect::<Vec<_>>())?;
    let dy = random("gradient", y.dims(), y.dtype())?.to_device(device)?;
    let grads = (&y * dy)?.to_dtype(DType::F32)?.sum_all()?.backward()?;
    Ok([Some(y)].into_iter().chain(vars.iter().map(|var| grads.get(var).cloned())).collect())
}

fn run_all(call: Call, inputs: &[Tensor], device: &Device) -> Result<Vec<Tensor>> {
    Ok(run(call, inputs, device)?.into_iter().map(|tensor| tensor.expect("a gradient")).collect())
}

/// Both round once. Before, the GPU is off by some steps of f32 at the size of the terms.
fn ensure_close(name: &str, gpu: &Tensor, cpu: &Tensor, magnitude: f64) -> Result<()> {
    let precision = precision(cpu.dtype());
    ensure!(gpu.dims() == cpu.dims() && gpu.dtype() == cpu.dtype(), "{name}: {gpu:?} and {cpu:?}");
    for (index, (gpu, cpu)) in numbers(gpu)?.into_iter().zip(numbers(cpu)?).enumerate() {
        let limit = precision.step(cpu) + 16.0 * Precision::F32.step(magnitude.max(cpu.abs()));
        ensure!((gpu - cpu).abs() <= limit, "{name}: {gpu} and {cpu} at {index}, limit {limit:.1e}");
    }
    Ok(())
}

fn compare(name: &str, call: Call, inputs: &[Tensor], gpu: &Device, magnitude: f64) -> Result<()> {
    let (on_gpu, on_cpu) = (run_all(call, inputs, gpu)?, run_all(call, inputs, &Device::Cpu)?);
    for (index, (gpu, cpu)) in on_gpu.iter().zip(&on_cpu).enumerate() {
        ensure_close(&format!("{name} {:?}, tensor {index}", cpu.dtype()), gpu, cpu, magnitude)?;
    }
    Ok(())
}

/// Fewer elements than a vector, elements after the last vector, and several blocks.
#[test]
fn activations_of_any_length() -> Result<()> {
    let Some(gpu) = gpu() else { return Ok(()) };
    for dtype in DTYPES {
        for len in [1, 7, 8, 4096, 100_003] {
            let inputs = [random("x", &[len], dtype)?, random("up", &[len], dtype)?];
            for (name, call) in [("gelu", gelu as fn(&Tensor) -> _), ("gelu_erf", gelu_erf)] {
                compare(name, &|t| call(&t[0]), &inputs[..1], &gpu, 8.0)?;
            }
            for (name, call) in [("swiglu", swiglu as fn(&Tensor, &Tensor) -> _), ("geglu", geglu)] {
                compare(name, &|t| call(&t[0], &t[1]), &inputs, &gpu, 16.0)?;
            }
        }
    }
    Ok(())
}

#[test]
fn activations_have_their_limits_at_infinity() -> Result<()> {
    let Some(gpu) = gpu() else { return Ok(()) };
    limits_of_gelu(&gpu)?;
    finite_gates(&gpu)
}

/// Heads and parts of heads that are whole vectors, and others; all of a head, and a part.
#[test]
fn rotations_with_and_without_vectors() -> Result<()> {
    let Some(gpu) = gpu() else { return Ok(()) };
    for dtype in DTYPES {
        for (shape, pairs) in [([2, 5, 3, 64], 32), ([1, 600, 12, 128], 64), ([3, 33, 5, 80], 16), ([2, 9, 3, 20], 7)] {
            let x = random("x", &shape, dtype)?;
            let angles = random("angles", &[shape[1], pairs], DType::F32)?;
            for order in [RotaryOrder::HalfSplit, RotaryOrder::Interleaved] {
                let tables = |device: &Device| -> candle_core::Result<_> {
                    Ok((angles.cos()?.to_device(device)?, angles.sin()?.to_device(device)?))
                };
                let call = |t: &[Tensor]| {
                    let (cos, sin) = tables(t[0].device())?;
                    rotary(&t[0], &cos, &sin, order)
                };
                compare(&format!("rotary {order:?} {shape:?}"), &call, std::slice::from_ref(&x), &gpu, 8.0)?;
                // In place, in the middle of a larger tensor.
                let y = call(&[x.to_device(&gpu)?])?;
                let whole = Tensor::cat(&[&x, &x, &x], 0)?.to_device(&gpu)?;
                let (cos, sin) = tables(&gpu)?;
                let middle = whole.narrow(0, shape[0], shape[0])?;
                rotary_in_place(&middle, &cos, &sin, order)?;
                assert_eq!(bits(&[middle])?, bits(&[y])?, "in place {order:?} {shape:?} {dtype:?}");
                assert_eq!(bits(&[whole.narrow(0, 2 * shape[0], shape[0])?])?, bits(std::slice::from_ref(&x))?);
            }
        }
    }
    Ok(())
}

/// Ids of both types, rare and frequent, for one, two and three passes of the sort; with vectors and without.
#[test]
fn embeddings_sort_any_number_of_ids() -> Result<()> {
    let Some(gpu) = gpu() else { return Ok(()) };
    for dtype in DTYPES {
        for (tokens, rows, width) in [(1, 1, 8), (63, 5, 5), (20_001, 511, 40), (9_000, 512, 6), (5_000, 262_145, 8)] {
            let id = |position: usize| match position % 3 {
                0 => rows / 2, // frequent
                _ => position * position % rows,
            };
            let ids = Tensor::from_iter((0..tokens).map(|position| id(position) as u32), &Device::Cpu)?;
            let weight = random("weight", &[rows, width], dtype)?;
            let name = format!("embedding of {tokens} tokens, {rows} rows of {width}");
            for id_type in [DType::U32, DType::I64] {
                let ids = ids.to_dtype(id_type)?;
                let call = |t: &[Tensor]| embedding(&ids.to_device(t[0].device())?, &t[0]);
                // A sum of thousands of terms.
                let inputs = [weight.clone()];
                compare(&name, &call, &inputs, &gpu, tokens as f64)?;
                let once = run_all(&call, &inputs, &gpu)?;
                assert_eq!(bits(&once)?, bits(&run_all(&call, &inputs, &gpu)?)?, "{name} is deterministic");
            }
        }
    }
    Ok(())
}

/// Nobody waits for the GPU to check ids. So a bad one shows in the result.
#[test]
fn an_id_without_a_row_gives_nan() -> Result<()> {
    let Some(gpu) = gpu() else { return Ok(()) };
    let weight = Var::ones((3, 8), DType::BF16, &gpu)?;
    let y = embedding(&Tensor::new(&[1i64, 3, -1, 2], &gpu)?, &weight)?;
    let nan: Vec<bool> = numbers(&y)?.chunks(8).map(|row| row.iter().all(|x| x.is_nan())).collect();
    assert_eq!(nan, [false, true, true, false]);
    let dweight = y.backward()?.remove(&weight).expect("a gradient");
    assert_eq!(numbers(&dweight.sum(1)?)?, [0.0, 8.0, 8.0]);
    Ok(())
}

/// Parameters of all types at once, lengths around the chunk of a block, clipped and not; saved on the GPU and resumed there.
#[test]
fn steps_of_adamw() -> Result<()> {
    let Some(gpu) = gpu() else { return Ok(()) };
    const LENGTHS: [usize; 6] = [1, 7, 100, (1 << 14) - 1, 1 << 14, 3 * (1 << 14) + 13];
    let config = AdamWConfig { max_norm: Some(2.0), ..AdamWConfig::default() };
    let start = |device: &Device| -> Result<(Vec<Var>, AdamW)> {
        let (mut vars, mut groups) = (Vec::new(), Vec::new());
        for (index, len) in LENGTHS.into_iter().enumerate() {
            let name = format!("p{index}");
            let var = Var::from_tensor(&random(&name, &[len], DTYPES[index % 3])?.to_device(device)?)?;
            groups.push(ParameterGroup {
                parameters: vec![(name, var.clone())],
                weight_decay: if index % 2 == 0 { 0.1 } else { 0.0 },
            });
            vars.push(var);
        }
        Ok((vars, AdamW::new(groups, config)?))
    };
    let step = |vars: &[Var], optimizer: &mut AdamW, step: usize| -> Result<Tensor> {
        let mut loss = Tensor::zeros((), DType::F32, vars[0].device())?;
        for (index, var) in vars.iter().enumerate() {
            let gradient = random(&format!("gradient {step} {index}"), var.dims(), DType::BF16)?;
            let gradient = (gradient.to_dtype(var.dtype())? * (0.004 * step as f64))?; // on the CPU for both devices
            loss = (loss + (var.as_tensor() * gradient.to_device(var.device())?)?.to_dtype(DType::F32)?.sum_all()?)?;
        }
        Ok(optimizer.step(&loss.backward()?, 1e-2)?)
    };
    let ((on_gpu, mut gpu_optimizer), (on_cpu, mut cpu_optimizer)) = (start(&gpu)?, start(&Device::Cpu)?);
    for index in 1..=6 {
        let norms = [step(&on_gpu, &mut gpu_optimizer, index)?, step(&on_cpu, &mut cpu_optimizer, index)?];
        ensure_close("norm", &norms[0], &norms[1], 0.0)?;
    }
    let (gpu_state, cpu_state) = (gpu_optimizer.state()?, cpu_optimizer.state()?);
    assert_eq!(gpu_state.len(), cpu_state.len());
    for (name, cpu) in &cpu_state {
        ensure_close(name, &gpu_state[name].to_dtype(DType::F32)?, &cpu.to_dtype(DType::F32)?, 1.0)?;
    }
    for (index, var) in on_gpu.iter().enumerate() {
        let weights = &gpu_state[&format!("p{index}")];
        assert_eq!(bits(&[weights.to_dtype(var.dtype())?])?, bits(&[var.copy()?])?, "p{index} is the rounded weight");
    }

    let folder = tempfile::tempdir()?;
    let file = folder.path().join("optimizer.safetensors");
    gpu_optimizer.save(&file, Default::default())?;
    let (resumed, mut optimizer) = start(&gpu)?;
    optimizer.load(&file)?;
    for index in 7..=9 {
        let norms = [step(&on_gpu, &mut gpu_optimizer, index)?, step(&resumed, &mut optimizer, index)?];
        assert_eq!(bits(&norms[..1])?, bits(&norms[1..])?);
    }
    let tensors = |vars: &[Var]| bits(&vars.iter().map(|var| var.as_tensor().clone()).collect::<Vec<_>>());
    assert_eq!(tensors(&on_gpu)?, tensors(&resumed)?);
    Ok(())
}

/// A parameter without a gradient is an error, and nothing has changed.
#[test]
fn adamw_checks_gradients_first() -> Result<()> {
    let Some(gpu) = gpu() else { return Ok(()) };
    let vars = [Var::ones(3, DType::F32, &gpu)?, Var::ones(3, DType::F32, &gpu)?];
    let parameters = vec![("a".to_string(), vars[0].clone()), ("b".to_string(), vars[1].clone())];
    let mut optimizer = AdamW::new([ParameterGroup { parameters, weight_decay: 0.0 }], AdamWConfig::default())?;
    let error = text(optimizer.step(&vars[0].sum_all()?.backward()?, 1.0));
    assert!(error.starts_with("1 of 2 parameters have no gradient: b"), "{error}");
    assert_eq!(numbers(&vars[0])?, [1.0; 3]);
    Ok(())
}
