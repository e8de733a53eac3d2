//! Cumulative lengths, packing, and unpacking.

use crate::common::cases::{targets, Case};
use crate::common::compare;
use anyhow::{Context, Result};
use candle_core::{DType, Device, Tensor, Var};
use candle_fa2::PaddingSide::Right;
use candle_fa2::{CuSeqlens, Mask};

#[test]
fn three_ways_to_the_same_lengths() -> Result<()> {
    let device = Device::Cpu;
    let offsets = [0u32, 3, 3, 8];
    for cu_seqlens in [
        CuSeqlens::new(&offsets, &device)?,
        CuSeqlens::from_lengths(&[3, 0, 5], &device)?,
        CuSeqlens::from_tensor(&Tensor::new(&offsets, &device)?)?,
    ] {
        assert_eq!(cu_seqlens.offsets(), offsets);
        assert_eq!((cu_seqlens.batch(), cu_seqlens.total(), cu_seqlens.max_seqlen()), (3, 8, 5));
        assert_eq!(cu_seqlens.tensor().to_vec1::<u32>()?, offsets);
        assert_eq!(cu_seqlens.tensor().dtype(), DType::U32);
    }
    Ok(())
}

#[test]
fn a_tensor_of_lengths_may_be_a_view() -> Result<()> {
    let all = Tensor::new(&[[7u32, 0], [7, 2], [7, 6]], &Device::Cpu)?;
    let column = all.narrow(1, 1, 1)?.squeeze(1)?;
    assert_eq!(CuSeqlens::from_tensor(&column)?.offsets(), [0, 2, 6]);
    Ok(())
}

#[test]
fn no_sequence_and_empty_sequences() -> Result<()> {
    let none = CuSeqlens::from_lengths(&[], &Device::Cpu)?;
    assert_eq!((none.offsets(), none.batch(), none.total(), none.max_seqlen()), (&[0u32][..], 0, 0, 0));
    let empty = CuSeqlens::new(&[0, 0, 0], &Device::Cpu)?;
    assert_eq!((empty.batch(), empty.total(), empty.max_seqlen()), (2, 0, 0));
    Ok(())
}

/// `0, 1, 2, ..` in `shape`, as f32.
fn counting(shape: &[usize]) -> Result<Tensor> {
    let count: usize = shape.iter().product();
    Ok(Tensor::arange(0.0, count as f32, &Device::Cpu)?.reshape(shape)?)
}

#[test]
fn unpad_keeps_the_rows_and_pad_brings_them_back() -> Result<()> {
    let lengths = [2, 0, 4, 1];
    let cu_seqlens = CuSeqlens::from_lengths(&lengths, &Device::Cpu)?;
    for (dtype, seqlen) in [(DType::F32, 4), (DType::F64, 4), (DType::F16, 6), (DType::BF16, 5), (DType::U32, 4)] {
        let padded = counting(&[4, seqlen, 2, 3])?.to_dtype(dtype)?;
        let packed = cu_seqlens.unpad(&padded, Right)?;
        assert_eq!((packed.dims(), packed.dtype()), (&[7, 2, 3][..], dtype));
        let mut row = 0;
        for (batch, &len) in lengths.iter().enumerate() {
            let (got, want) = (packed.narrow(0, row, len)?, padded.get(batch)?.narrow(0, 0, len)?);
            assert_eq!(
                got.to_dtype(DType::F64)?.flatten_all()?.to_vec1::<f64>()?,
                want.to_dtype(DType::F64)?.flatten_all()?.to_vec1::<f64>()?,
                "{dtype:?}, sequence {batch}"
            );
            row += len;
        }
        if dtype == DType::U32 {
            continue;
        }
        let again = cu_seqlens.pad(&packed, Right)?;
        assert_eq!((again.dims(), again.dtype()), (&[4, 4, 2, 3][..], dtype));
        compare::same_bits("unpad(pad)", &cu_seqlens.unpad(&again, Right)?, &packed, &format!("{dtype:?}"))?;
        // After each sequence there are zeros.
        let again = again.to_dtype(DType::F32)?;
        for (batch, &len) in lengths.iter().enumerate() {
            let rest = again.get(batch)?.narrow(0, len, 4 - len)?.flatten_all()?.to_vec1::<f32>()?;
            assert!(rest.iter().all(|&x| x == 0.0), "{dtype:?}, sequence {batch}: {rest:?}");
        }
    }
    Ok(())
}

/// Token ids, `(batch, seqlen)`, and tensors with more axes.
#[test]
fn pad_to_gives_a_longer_batch_its_shape_back() -> Result<()> {
    let cu_seqlens = CuSeqlens::from_lengths(&[2, 0, 3], &Device::Cpu)?;
    let batch = counting(&[3, 5, 2])?;
    let back = cu_seqlens.pad_to(&cu_seqlens.unpad(&batch, Right)?, 5, Right)?;
    assert_eq!(back.dims(), batch.dims());
    let (back, batch) = (back.to_vec3::<f32>()?, batch.to_vec3::<f32>()?);
    for (b, length) in [2, 0, 3].into_iter().enumerate() {
        assert_eq!(back[b][..length], batch[b][..length]);
        assert!(back[b][length..].iter().flatten().all(|&x| x == 0.0));
    }
    Ok(())
}

#[test]
fn any_axes_after_the_tokens() -> Result<()> {
    let cu_seqlens = CuSeqlens::from_lengths(&[1, 3], &Device::Cpu)?;
    for rest in [&[][..], &[5], &[2, 3, 4]] {
        let padded = counting(&[&[2, 3][..], rest].concat())?;
        let packed = cu_seqlens.unpad(&padded, Right)?;
        assert_eq!(packed.dims(), [&[4][..], rest].concat());
        assert_eq!(cu_seqlens.pad(&packed, Right)?.dims(), padded.dims());
    }
    Ok(())
}

#[test]
fn views_and_batches_of_nothing() -> Result<()> {
    let cu_seqlens = CuSeqlens::from_lengths(&[2, 1], &Device::Cpu)?;
    let heads_first = counting(&[2, 3, 4, 5])?;
    let view = heads_first.transpose(1, 2)?;
    let what = "a view against its copy";
    compare::same_bits(
        "unpad",
        &cu_seqlens.unpad(&view, Right)?,
        &cu_seqlens.unpad(&view.contiguous()?, Right)?,
        &what,
    )?;
    let packed = counting(&[4, 3, 2])?.transpose(0, 1)?;
    compare::same_bits("pad", &cu_seqlens.pad(&packed, Right)?, &cu_seqlens.pad(&packed.contiguous()?, Right)?, &what)?;

    let none = CuSeqlens::from_lengths(&[], &Device::Cpu)?;
    assert_eq!(none.unpad(&counting(&[0, 3, 2])?, Right)?.dims(), [0, 2]);
    assert_eq!(none.pad(&counting(&[0, 2])?, Right)?.dims(), [0, 0, 2]);
    let empty = CuSeqlens::from_lengths(&[0, 0], &Device::Cpu)?;
    assert_eq!(empty.unpad(&counting(&[2, 3, 2])?, Right)?.dims(), [0, 2]);
    assert_eq!(empty.pad(&counting(&[0, 2])?, Right)?.dims(), [2, 0, 2]);
    Ok(())
}

/// The gradient of unpad is pad, and the gradient of pad is unpad. The gradient of padding is 0.
#[test]
fn gradients_of_pad_and_unpad() -> Result<()> {
    let cu_seqlens = CuSeqlens::from_lengths(&[2, 0, 3], &Device::Cpu)?;
    for dtype in [DType::F64, DType::F32, DType::F16, DType::BF16] {
        let padded = Var::from_tensor(&counting(&[3, 3, 2])?.to_dtype(dtype)?)?;
        let weights = (counting(&[5, 2])? + 1.0)?.to_dtype(dtype)?;
        let grads = (cu_seqlens.unpad(&padded, Right)? * &weights)?.sum_all()?.backward()?;
        let got = grads.get(&padded).context("padded has no gradient")?;
        compare::same_bits("gradient of unpad", got, &cu_seqlens.pad(&weights, Right)?, &format!("{dtype:?}"))?;

        let packed = Var::from_tensor(&weights)?;
        let weights = (counting(&[3, 3, 2])? + 1.0)?.to_dtype(dtype)?;
        let grads = (cu_seqlens.pad(&packed, Right)? * &weights)?.sum_all()?.backward()?;
        let got = grads.get(&packed).context("packed has no gradient")?;
        compare::same_bits("gradient of pad", got, &cu_seqlens.unpad(&weights, Right)?, &format!("{dtype:?}"))?;
    }
    Ok(())
}

/// A padded batch goes through unpad, packed attention and pad. The rows of each sequence equal the reference. The padded
/// tensors have gradients, which are 0 in the padding.
#[test]
fn a_padded_batch_trains_through_packed_attention() -> Result<()> {
    for target in targets() {
        let case = Case::new(&target)
            .packed(&[(5, 5), (9, 9), (2, 2)])
            .mask(Mask::Causal)
            .heads(2, 1)
            .head_dim_v(5)
            .deterministic();
        let input = case.draw();
        let attention = case.attention(&input)?;
        let (cu_seqlens, _) = case.cu_seqlens()?;
        let direct = {
            let call = case.call(&input)?;
            let o = case.forward(&attention, &call.q, &call.k, &call.v)?;
            let grads = case.loss(&input, &o, &o)?.backward()?;
            (o, grads.get(&call.q).context("dq")?.clone(), grads.get(&call.v).context("dv")?.clone())
        };
        let padded = |values: &[f64], shape: &[usize]| -> Result<Var> {
            Ok(Var::from_tensor(&cu_seqlens.pad(&case.tensor(values, shape)?, Right)?)?)
        };
        let q = padded(&input.q, &case.shape_q())?;
        let k = padded(&input.k, &case.shape_k())?;
        let v = padded(&input.v, &case.shape_v())?;
        let [q_packed, k_packed, v_packed] = [&q, &k, &v].map(|var| cu_seqlens.unpad(var, Right));
        let o = case.forward(&attention, &q_packed?, &k_packed?, &v_packed?)?;
        compare::same_bits("o", &o, &direct.0, &case)?;
        let o = cu_seqlens.unpad(&cu_seqlens.pad(&o, Right)?, Right)?;
        let grads = case.loss(&input, &o, &o)?.backward()?;
        let what = &format!("case {case}, padded");
        compare::same_bits("dq", grads.get(&q).context("dq")?, &cu_seqlens.pad(&direct.1, Right)?, what)?;
        compare::same_bits("dv", grads.get(&v).context("dv")?, &cu_seqlens.pad(&direct.2, Right)?, what)?;
    }
    Ok(())
}
