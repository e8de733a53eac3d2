//! The rotary embedding, compared with its formula, pair by pair.

use anyhow::{Context, Result};
use candle_core::{DType, Device, Tensor, Var};
use candle_fa2::layers::{Rotary, RotaryConfig, RotaryLayout};
use candle_fa2::CuSeqlens;

use super::case::normal;
use super::close::{close, Tolerance};
use crate::common::cases::own_gpu;

const HEAD_DIM: usize = 12;
const MAX_SEQLEN: usize = 64;
const LAYOUTS: [RotaryLayout; 2] = [RotaryLayout::HalfSplit, RotaryLayout::Interleaved];

/// Rotates one head at one position, in f64. cos and sin are rounded to f32 as in the tables. With `sign` -1 it rotates back.
fn rotate(head: &[f64], position: usize, rotary_dim: usize, theta: f64, layout: RotaryLayout, sign: f64) -> Vec<f64> {
    let mut rotated = head.to_vec();
    for pair in 0..rotary_dim / 2 {
        let (first, second) = match layout {
            RotaryLayout::HalfSplit => (pair, pair + rotary_dim / 2),
            RotaryLayout::Interleaved => (2 * pair, 2 * pair + 1),
        };
        let angle = position as f64 * (-(2.0 * pair as f64) / rotary_dim as f64 * theta.ln()).exp();
        let (cos, sin) = (f64::from(angle.cos() as f32), sign * f64::from(angle.sin() as f32));
        rotated[first] = head[first] * cos - head[second] * sin;
        rotated[second] = head[first] * sin + head[second] * cos;
    }
    rotated
}

/// Rotates `xs (batch, seqlen, num_heads, head_dim)` token by token.
fn rotated(
    xs: &Tensor,
    offset: usize,
    rotary_dim: usize,
    theta: f64,
    layout: RotaryLayout,
    sign: f64,
) -> Result<Tensor> {
    let (_, seqlen, num_heads, head_dim) = xs.dims4()?;
    let heads: Vec<Vec<f64>> = xs.to_dtype(DType::F64)?.reshape(((), head_dim))?.to_vec2()?;
    let position = |row: usize| offset + row / num_heads % seqlen;
    let values = heads.iter().enumerate();
    let values: Vec<f64> =
        values.flat_map(|(row, head)| rotate(head, position(row), rotary_dim, theta, layout, sign)).collect();
    Ok(Tensor::from_vec(values, xs.shape(), xs.device())?)
}

/// Values at any offset and dtype, and the gradient. The embedding is a rotation, so its backward rotates the gradient back.
#[test]
fn values_and_gradients_equal_the_formula() -> Result<()> {
    let devices: Vec<Device> = [Some(Device::Cpu), own_gpu()].into_iter().flatten().collect();
    for (device, layout) in devices.iter().flat_map(|device| LAYOUTS.map(|layout| (device, layout))) {
        for (rotary_dim, theta) in [(HEAD_DIM, 10_000.0), (8, 500.0), (2, 10.0)] {
            let config = RotaryConfig::new(rotary_dim, MAX_SEQLEN).theta(theta).layout(layout);
            let rotary = Rotary::new(&config, device)?;
            assert_eq!((rotary.rotary_dim(), rotary.max_seqlen(), rotary.layout()), (rotary_dim, MAX_SEQLEN, layout));
            for (offset, seqlen) in [(0, 7), (57, 7), (63, 1), (0, 64)] {
                for dtype in [DType::F64, DType::F32, DType::BF16, DType::F16] {
                    let what = format!("{layout:?} rotary_dim {rotary_dim} offset {offset} seqlen {seqlen} {dtype:?}");
                    let xs = normal((2, seqlen, 3, HEAD_DIM), 1.0, &what, dtype)?;
                    let xs = Var::from_tensor(&xs.to_device(device)?)?;
                    let weights = normal(xs.shape(), 1.0, "loss", dtype)?.to_device(device)?;
                    let got = rotary.apply(xs.as_tensor(), offset)?;
                    let grads = (&got * &weights)?.sum_all()?.backward()?;
                    let grad = grads.get(xs.as_tensor()).context("xs has no gradient")?;

                    let want = rotated(xs.as_tensor(), offset, rotary_dim, theta, layout, 1.0)?;
                    let want_grad = rotated(&weights, offset, rotary_dim, theta, layout, -1.0)?;
                    // Two products, one sum, one rounding to the type. The tolerance allows two rounding steps without
                    // the error of a plain layer.
                    let tolerance = Tolerance::from(&want, &want, dtype)?;
                    assert_eq!(got.dtype(), dtype);
                    close("rotated", &got, &want, tolerance, &what)?;
                    close("gradient", grad, &want_grad, tolerance, &what)?;
                }
            }
        }
    }
    Ok(())
}

/// The angles of large positions are exact. An f32 product of position and frequency would be wrong in the third digit.
#[test]
fn far_positions_keep_their_angle() -> Result<()> {
    let rotary = Rotary::new(&RotaryConfig::new(4, 1_000_001), &Device::Cpu)?;
    let xs = normal((1, 1, 1, 4), 1.0, "far", DType::F32)?;
    let want = rotated(&xs, 1_000_000, 4, 10_000.0, RotaryLayout::HalfSplit, 1.0)?;
    let tolerance = Tolerance::from(&want, &want, DType::F32)?;
    close("rotated", &rotary.apply(&xs, 1_000_000)?, &want, tolerance, &"position 1,000,000")
}

/// Explicit frequencies. The frequencies of `theta` give the same bits as `theta`. Half the frequencies at position 2n equal
/// the frequencies at position n.
#[test]
fn frequencies_replace_theta() -> Result<()> {
    let by_theta = Rotary::new(&RotaryConfig::new(8, MAX_SEQLEN).theta(500.0), &Device::Cpu)?;
    let frequencies: Vec<f64> = (0..4).map(|pair| 500f64.powf(-2.0 * f64::from(pair) / 8.0)).collect();
    let same = RotaryConfig::new(8, MAX_SEQLEN).frequencies(frequencies.clone());
    let halved = frequencies.iter().map(|frequency| frequency / 2.0).collect();
    let halved = RotaryConfig::new(8, MAX_SEQLEN).frequencies(halved);
    let xs = normal((1, 1, 2, 8), 1.0, "frequencies", DType::F32)?;
    let bits =
        |rotary: &Rotary, offset| -> Result<Vec<f32>> { Ok(rotary.apply(&xs, offset)?.flatten_all()?.to_vec1()?) };
    assert_eq!(bits(&Rotary::new(&same, &Device::Cpu)?, 9)?, bits(&by_theta, 9)?);
    assert_eq!(bits(&Rotary::new(&halved, &Device::Cpu)?, 18)?, bits(&by_theta, 9)?);
    Ok(())
}

/// Positions begin at 0 in each sequence of a packed batch. Some sequences are empty.
#[test]
fn packed_positions_restart() -> Result<()> {
    for layout in LAYOUTS {
        let rotary = Rotary::new(&RotaryConfig::new(8, MAX_SEQLEN).layout(layout), &Device::Cpu)?;
        let lengths = [5, 0, 1, 9];
        let cu_seqlens = CuSeqlens::from_lengths(&lengths, &Device::Cpu)?;
        let xs = normal((15, 3, HEAD_DIM), 1.0, "packed", DType::F32)?;
        let got = rotary.apply_packed(&xs, &cu_seqlens)?;
        let mut start = 0;
        for length in lengths {
            let alone = rotary.apply(&xs.narrow(0, start, length)?.unsqueeze(0)?, 0)?.flatten_all()?;
            let packed = got.narrow(0, start, length)?.flatten_all()?;
            assert_eq!(
                packed.to_vec1::<f32>()?,
                alone.to_vec1::<f32>()?,
                "{layout:?}, sequence of {length} at {start}"
            );
            start += length;
        }
    }
    Ok(())
}

/// A transposed view rotates like its contiguous copy.
#[test]
fn strided_input_equals_contiguous() -> Result<()> {
    for layout in LAYOUTS {
        let rotary = Rotary::new(&RotaryConfig::new(8, MAX_SEQLEN).layout(layout), &Device::Cpu)?;
        let heads_first = normal((2, 3, 7, HEAD_DIM), 1.0, "strided", DType::F32)?;
        let view = heads_first.transpose(1, 2)?;
        let values = |xs: &Tensor| -> Result<Vec<f32>> { Ok(rotary.apply(xs, 2)?.flatten_all()?.to_vec1()?) };
        assert_eq!(values(&view)?, values(&view.contiguous()?)?);
    }
    Ok(())
}
