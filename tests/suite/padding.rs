//! Padded batches: masks, the side of the padding, and invalid keys.

use crate::common::cases::{first_token, targets, window, Alibi, Case};
use crate::common::compare;
use crate::common::run::Call;
use anyhow::{Context, Result};
use candle_core::{DType, Device, Tensor, Var};
use candle_fa2::PaddingSide::{Left, Right};
use candle_fa2::{Attention, CuSeqlens, KeyLengths, Mask, PaddingSide};
use proptest::prelude::*;

/// In these cases, invalid keys are NaN or large numbers, and their gradients must be 0.
#[test]
fn key_lengths_match_the_reference() -> Result<()> {
    for target in targets() {
        let case = || Case::new(&target).batch(4, 6, 11).heads(4, 2).head_dim(24);
        for side in [Left, Right] {
            for case in [
                case().key_lengths(&[11, 4, 0, 1], side),
                case().key_lengths(&[6, 11, 7, 8], side).mask(Mask::Causal).dlse(),
                case().key_lengths(&[7, 0, 11, 8], side).mask(window(2, 3)),
                case().key_lengths(&[6, 9, 10, 0], side).mask(Mask::Causal).alibi(Alibi::PerHead).softcap(2.0),
                // A cache for decoding, partly filled.
                case().batch(4, 1, 300).key_lengths(&[300, 129, 128, 1], side).mask(Mask::Causal),
                // Lengths at the edges of tiles and inside tiles.
                case().batch(4, 150, 300).heads(2, 1).key_lengths(&[256, 255, 150, 0], side).mask(Mask::Causal),
                case().batch(4, 33, 300).heads(2, 1).key_lengths(&[300, 0, 64, 200], side).deterministic().dlse(),
            ] {
                case.check()?;
            }
        }
    }
    Ok(())
}

/// q, k and v in one tensor, padded on the left: values and gradient equal those of three tensors.
#[test]
fn key_lengths_of_one_tensor_of_q_k_and_v() -> Result<()> {
    for target in targets() {
        let case = Case::new(&target).batch(3, 40, 40).heads(4, 2).mask(Mask::Causal).deterministic();
        let case = case.key_lengths(&[40, 7, 0], Left);
        let input = case.draw();
        let Call { attention, q, k, v } = case.call(&input)?;
        let do_ = case.output_tensor(&input.do_)?;
        let loss = |o: &Tensor| (o * &do_)?.sum_all();
        let grads = loss(&attention.forward(&q, &k, &v)?)?.backward()?;
        let grad = |var: &Var| grads.get(var).context("no gradient").cloned();
        let want = Tensor::cat(&[grad(&q)?, grad(&k)?, grad(&v)?], 2)?;
        let qkv = Var::from_tensor(&Tensor::cat(&[&q, &k, &v].map(|var| var.detach()), 2)?)?;
        let o = attention.forward_qkv(&qkv, 2)?;
        compare::same_bits("o", &o, &attention.forward(&q, &k, &v)?, &case)?;
        compare::same_bits("dqkv", loss(&o)?.backward()?.get(&qkv).context("no gradient")?, &want, &case)?;
    }
    Ok(())
}

/// Self-attention of a batch padded on the left is allowed with any lengths, because the last query is always a token.
#[test]
fn fewer_keys_than_queries_on_the_left() -> Result<()> {
    for target in targets() {
        let case = || Case::new(&target).batch(4, 150, 150).heads(2, 1).head_dim(24);
        case().key_lengths(&[150, 1, 129, 40], Left).mask(Mask::Causal).dlse().check()?;
        case().key_lengths(&[3, 0, 128, 149], Left).mask(window(20, 2)).alibi(Alibi::PerHead).check()?;
        case().key_lengths(&[150, 7, 0, 140], Right).check()?;
    }
    Ok(())
}

/// If all keys are valid, the bits equal those of a call without lengths.
#[test]
fn full_key_lengths_change_nothing() -> Result<()> {
    for target in targets() {
        for side in [Left, Right] {
            let case = Case::new(&target).batch(3, 20, 70).heads(4, 2).mask(Mask::Causal).deterministic();
            let input = case.draw();
            let with_lengths = case.clone().key_lengths(&[70; 3], side);
            compare::same_outputs(&with_lengths.run(&input)?, &case.run(&input)?, &with_lengths)?;
        }
    }
    Ok(())
}

#[test]
fn key_lengths_come_from_a_mask() -> Result<()> {
    let mask = Tensor::new(&[[0u32, 1, 1, 1], [0, 0, 0, 1], [0, 0, 0, 0]], &Device::Cpu)?;
    let lengths = KeyLengths::from_mask(&mask)?;
    assert_eq!((lengths.batch(), lengths.side()), (3, Left));
    assert_eq!(lengths.tensor().to_vec1::<u32>()?, [3, 1, 0]);
    assert_eq!(format!("{lengths:?}"), "KeyLengths { batch: 3, side: Left, .. }");
    Ok(())
}

#[test]
fn masks_of_every_type_say_lengths_and_side() -> Result<()> {
    type Rows<'a> = &'a [[f32; 4]];
    let cases: [(Rows, &[u32], PaddingSide); 6] = [
        (&[[1., 1., 0., 0.], [1., 1., 1., 1.], [0., 0., 0., 0.]], &[0, 2, 6, 6], Right),
        (&[[0., 0., 1., 1.], [1., 1., 1., 1.], [0., 0., 0., 0.]], &[0, 2, 6, 6], Left),
        (&[[0., 0., 0., 0.], [0., 1., 1., 1.]], &[0, 0, 3], Left),
        (&[[1., 1., 1., 1.]], &[0, 4], Right),
        (&[[0., 0., 0., 0.]], &[0, 0], Right),
        (&[[1., 0., 0., 0.]], &[0, 1], Right),
    ];
    for (values, offsets, side) in cases {
        for dtype in [DType::U8, DType::U32, DType::I64, DType::F32, DType::F64, DType::F16, DType::BF16] {
            let mask = Tensor::from_slice(values.as_flattened(), (values.len(), 4), &Device::Cpu)?.to_dtype(dtype)?;
            let (cu_seqlens, found) = CuSeqlens::from_mask(&mask)?;
            assert_eq!((cu_seqlens.offsets(), found), (offsets, side), "{dtype:?} {values:?}");
            let again = cu_seqlens.mask(4, side)?.to_dtype(DType::F32)?.to_vec2::<f32>()?;
            assert_eq!(again, values, "{dtype:?}");
        }
    }
    let none = Tensor::zeros((0, 4), DType::U8, &Device::Cpu)?;
    assert_eq!(CuSeqlens::from_mask(&none)?.0.batch(), 0);
    Ok(())
}

/// `unpad` keeps the tokens of a batch padded on the left and removes the padding. `pad` restores the places of the tokens.
#[test]
fn a_batch_padded_on_the_left_keeps_its_tokens() -> Result<()> {
    let mask = Tensor::new(&[[0u8, 0, 1, 1], [1, 1, 1, 1], [0, 0, 0, 1]], &Device::Cpu)?;
    let (cu_seqlens, side) = CuSeqlens::from_mask(&mask)?;
    let padded = Tensor::new(&[[0f32, 0., 1., 2.], [3., 4., 5., 6.], [0., 0., 0., 7.]], &Device::Cpu)?;
    let packed = cu_seqlens.unpad(&padded, side)?;
    assert_eq!(packed.to_vec1::<f32>()?, [1., 2., 3., 4., 5., 6., 7.]);
    assert_eq!(cu_seqlens.pad_to(&packed, 4, side)?.to_vec2::<f32>()?, padded.to_vec2::<f32>()?);
    assert_eq!(cu_seqlens.pad(&packed, Right)?.get(2)?.to_vec1::<f32>()?, [7., 0., 0., 0.]);
    Ok(())
}

/// Self-attention of a padded batch through unpad, packed attention and pad equals attention of each sequence alone. The
/// padded tensor has a gradient, which is 0 in the padding.
#[test]
fn padded_self_attention_trains_through_a_mask() -> Result<()> {
    let (device, attention) = (Device::Cpu, Attention::new().mask(Mask::Causal));
    for side in [Left, Right] {
        let lengths = [3, 5, 0, 1];
        let given = CuSeqlens::from_lengths(&lengths, &device)?.mask(5, side)?;
        let (cu_seqlens, found) = CuSeqlens::from_mask(&given)?;
        let xs = Var::randn(0f64, 1f64, (4, 5, 2, 8), &device)?;
        let packed = cu_seqlens.unpad(&xs, found)?;
        let o = attention.forward_packed(&packed, &packed, &packed, &cu_seqlens, &cu_seqlens)?;
        let o = cu_seqlens.pad_to(&o, 5, found)?;
        let weights = Tensor::randn(0f64, 1f64, o.shape(), &device)?;
        let grads = (&o * &weights)?.sum_all()?.backward()?;
        let dxs = grads.get(&xs).context("no gradient")?;
        for (b, &length) in lengths.iter().enumerate() {
            let start = first_token(side, length, 5);
            let rows = |x: &Tensor| x.narrow(0, b, 1)?.narrow(1, start, length)?.contiguous();
            let alone = Var::from_tensor(&rows(&xs.detach())?)?;
            let want = attention.forward(&alone, &alone, &alone)?;
            let grads = (&want * rows(&weights)?)?.sum_all()?.backward()?;
            let what = format!("sequence {b} padded on the {side}");
            compare::same_bits("o", &rows(&o)?, &want, &what)?;
            let dwant = grads.get(&alone).context("no gradient")?;
            let off = (rows(dxs)? - dwant)?.abs()?.flatten_all()?.to_vec1::<f64>()?;
            assert!(off.iter().all(|&off| off < 1e-14), "{what}: {off:?}");
            let whole = dxs.get(b)?.abs()?.sum_all()?.to_scalar::<f64>()?;
            let kept = rows(dxs)?.abs()?.sum_all()?.to_scalar::<f64>()?;
            assert!((whole - kept).abs() < 1e-12, "{what}: the padding has a gradient");
        }
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    /// A mask made from lengths is read back to the same lengths, and `unpad` reverses `pad`.
    #[test]
    fn masks_and_padding_are_inverse(lengths in prop::collection::vec(0usize..7, 0..6), spare in 0usize..3, left: bool) {
        let side = if left { Left } else { Right };
        let cu_seqlens = CuSeqlens::from_lengths(&lengths, &Device::Cpu).unwrap();
        let seqlen = cu_seqlens.max_seqlen() + spare;
        let (again, found) = CuSeqlens::from_mask(&cu_seqlens.mask(seqlen, side).unwrap()).unwrap();
        prop_assert_eq!(again.offsets(), cu_seqlens.offsets());
        let tells = lengths.iter().any(|&length| length > 0 && length < seqlen);
        prop_assert_eq!(found, if tells { side } else { Right });
        let rows = Tensor::arange(0f32, cu_seqlens.total() as f32, &Device::Cpu).unwrap();
        let padded = cu_seqlens.pad_to(&rows, seqlen, side).unwrap();
        let back = cu_seqlens.unpad(&padded, side).unwrap();
        prop_assert_eq!(back.to_vec1::<f32>().unwrap(), rows.to_vec1::<f32>().unwrap());
    }
}
