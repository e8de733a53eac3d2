//! A packed batch, compared with the same sequences one by one.

use anyhow::Result;
use candle_core::{DType, Device, Tensor};
use candle_fa2::CuSeqlens;

use super::case::{self, normal, Case};
use super::outcome::{self, Outcome};
use super::unfused;
use crate::common::cases::{own_gpu, GPU_DTYPES};

/// Lengths: long, empty, one token, longer than one tile.
const LENGTHS: [usize; 5] = [33, 0, 1, 70, 8];

/// Output and gradients of a packed batch equal those of the plain layer over each sequence alone. Positions begin at 0.
#[test]
fn packed_equals_separate() -> Result<()> {
    let total: usize = LENGTHS.iter().sum();
    let xs = |case: &Case, dtype| -> Result<Tensor> {
        Ok(normal((total, case.embed_dim), 1.0, "packed", dtype)?.to_device(&case.device)?)
    };
    let cu_seqlens = CuSeqlens::from_lengths(&LENGTHS, &Device::Cpu)?;
    let ours = |case: &Case, dtype| -> Result<Outcome> {
        let built = case.build(dtype)?;
        let cu_seqlens = CuSeqlens::from_lengths(&LENGTHS, &case.device)?;
        outcome::run(built.vars(), &xs(case, dtype)?, |xs| Ok(built.layer.forward_packed(xs, &cu_seqlens)?))
    };
    let gpu = own_gpu();
    for case in case::all() {
        let separate = |dtype| -> Result<Outcome> {
            let vars = case.build(dtype)?.vars();
            outcome::run(vars.clone(), &xs(&case, dtype)?, |xs| {
                let sequences = cu_seqlens.offsets().windows(2).filter(|pair| pair[0] < pair[1]).map(|pair| {
                    let (start, len) = (pair[0] as usize, (pair[1] - pair[0]) as usize);
                    Ok(unfused::forward(&case, &vars, &xs.narrow(0, start, len)?.unsqueeze(0)?)?.squeeze(0)?)
                });
                Ok(Tensor::cat(&sequences.collect::<Result<Vec<_>>>()?, 0)?)
            })
        };
        let (want, plain) = (separate(DType::F64)?, separate(DType::F32)?);
        for dtype in [DType::F64, DType::F32] {
            outcome::equal(dtype, &ours(&case, dtype)?, &want, &plain, &case)?;
        }
        if let Some(gpu) = &gpu {
            let on_gpu = case.on(gpu);
            for dtype in GPU_DTYPES {
                outcome::equal(dtype, &ours(&on_gpu, dtype)?, &want, &separate(dtype)?, &on_gpu)?;
            }
        }
    }
    Ok(())
}

/// A packed batch without tokens gives an empty result.
#[test]
fn no_tokens() -> Result<()> {
    for case in case::all() {
        for lengths in [&[][..], &[0, 0]] {
            let cu_seqlens = CuSeqlens::from_lengths(lengths, &Device::Cpu)?;
            let xs = Tensor::zeros((0, case.embed_dim), DType::F32, &Device::Cpu)?;
            let ys = case.build(DType::F32)?.layer.forward_packed(&xs, &cu_seqlens)?;
            assert_eq!(ys.dims(), [0, case.embed_dim]);
        }
    }
    Ok(())
}
