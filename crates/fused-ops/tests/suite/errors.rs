//! The text of each error.

use anyhow::Result;
use candle_core::{DType, Device, Tensor, Var};
use candle_fused_ops::{
    add_rms_norm, embedding, gelu, layer_norm, linear, rms_norm, rotary, rotary_in_place, swiglu, RotaryOrder,
};

/// The first line of the error, because candle adds a backtrace if RUST_BACKTRACE is set.
pub fn text<T>(result: candle_core::Result<T>) -> String {
    match result {
        Ok(_) => panic!("this call must fail"),
        Err(error) => error.to_string(),
    }
}

pub fn zeros(shape: &[usize], dtype: DType) -> Tensor {
    Tensor::zeros(shape, dtype, &Device::Cpu).expect("zeros")
}

#[test]
fn norms_name_the_argument_the_rule_and_the_value() -> Result<()> {
    let (x, weight) = (zeros(&[2, 8], DType::F32), zeros(&[8], DType::F32));
    for (error, expected) in [
        (
            text(rms_norm(&zeros(&[2, 8], DType::U32), &weight, 1e-5)),
            "x: dtype must be F16, BF16, F32 or F64, got U32; convert it with to_dtype",
        ),
        (
            text(rms_norm(&zeros(&[], DType::F32), &weight, 1e-5)),
            "x: must have a last axis that is not empty, got shape []",
        ),
        (
            text(rms_norm(&zeros(&[3, 0], DType::F32), &weight, 1e-5)),
            "x: must have a last axis that is not empty, got shape [3, 0]",
        ),
        (
            text(rms_norm(&x, &zeros(&[7], DType::F32), 1e-5)),
            "weight: shape must be [8] as the last axis of x, got [7]",
        ),
        (
            text(layer_norm(&x, &weight, Some(&zeros(&[8, 1], DType::F32)), 1e-5)),
            "bias: shape must be [8] as the last axis of x, got [8, 1]",
        ),
        (
            text(layer_norm(&x, &weight, Some(&zeros(&[8], DType::BF16)), 1e-5)),
            "bias: dtype must be F32 as x, got BF16; convert one with to_dtype",
        ),
        (text(rms_norm(&x, &weight, -1.0)), "eps must be finite and at least 0, got -1"),
        (
            text(add_rms_norm(&x, &zeros(&[8], DType::F32), &weight, 1e-5)),
            "residual: shape must be [2, 8] as x, got [8]",
        ),
    ] {
        assert_eq!(error, expected);
    }
    Ok(())
}

#[test]
fn activations_and_linear_layers_name_the_argument_the_rule_and_the_value() -> Result<()> {
    let gate = zeros(&[2, 3], DType::F32);
    for (error, expected) in [
        (
            text(gelu(&zeros(&[2], DType::I64))),
            "x: dtype must be F16, BF16, F32 or F64, got I64; convert it with to_dtype",
        ),
        (
            text(linear(&gate, &zeros(&[3, 2], DType::F32), &zeros(&[3], DType::F32))),
            "weight: axes must be those of bias, [3], then the last of x, [2, 3], and none empty, got [3, 2]",
        ),
        (
            text(linear(&gate, &zeros(&[2, 3], DType::F32), &zeros(&[3], DType::F32))),
            "weight: axes must be those of bias, [3], then the last of x, [2, 3], and none empty, got [2, 3]",
        ),
        (text(swiglu(&gate, &zeros(&[3, 2], DType::F32))), "up: shape must be [2, 3] as gate, got [3, 2]"),
        (
            text(swiglu(&gate, &zeros(&[2, 3], DType::F16))),
            "up: dtype must be F32 as gate, got F16; convert one with to_dtype",
        ),
    ] {
        assert_eq!(error, expected);
    }
    Ok(())
}

#[test]
fn embedding_and_rotary_name_the_argument_the_rule_and_the_value() -> Result<()> {
    let weight = zeros(&[4, 2], DType::F32);
    let x = zeros(&[1, 3, 2, 8], DType::F32);
    let turn = |x: &Tensor, cos: &[usize], sin: &[usize]| {
        text(rotary(x, &zeros(cos, DType::F32), &zeros(sin, DType::F32), RotaryOrder::HalfSplit))
    };
    let in_place = |x: &Tensor| {
        let table = zeros(&[x.dims()[1], 4], DType::F32);
        text(rotary_in_place(x, &table, &table, RotaryOrder::HalfSplit))
    };
    for (error, expected) in [
        (
            text(embedding(&Tensor::new(&[3u32, 4], &Device::Cpu)?, &weight)),
            "ids: each must be a row of weight, 0..4, got 4 at position 1",
        ),
        (
            text(embedding(&zeros(&[2], DType::F32), &weight)),
            "ids: dtype must be U32 or I64, got F32; convert it with to_dtype",
        ),
        (
            text(embedding(&zeros(&[2], DType::U32), &zeros(&[4], DType::F32))),
            "weight: shape must be (rows, width), got [4]",
        ),
        (
            turn(&weight, &[4, 1], &[4, 1]),
            "x: shape must be (batch, seqlen, num_heads, head_dim) or (seqlen, num_heads, head_dim), got [4, 2]",
        ),
        (
            turn(&x, &[3, 5], &[3, 5]),
            "cos: shape must be (seqlen, rotary_dim / 2) with seqlen 3 and rotary_dim at most 8 as in x, got [3, 5]",
        ),
        (turn(&x, &[3, 4], &[3, 3]), "sin: shape must be [3, 4] as cos, got [3, 3]"),
        (
            in_place(Var::from_tensor(&x)?.as_tensor()),
            "x: must not be part of a graph, because its old values may be needed; call rotary, or detach it",
        ),
        (
            in_place(&x.transpose(1, 2)?),
            "x: must be contiguous, got strides [48, 8, 16, 1] in shape [1, 2, 3, 8]; call contiguous() or rotary",
        ),
    ] {
        assert_eq!(error, expected);
    }
    Ok(())
}
