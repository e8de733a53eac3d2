//! Every error text, as the user reads it. Every call and `supports` return the same text, before anything runs. Candle's error
//! type does not change it.

use anyhow::Result;
use candle_core::{DType, Device, DeviceLocation, IndexOp, Tensor, Var};
use candle_fa2::{Attention, CuSeqlens, Error, KeyLengths, Mask, PaddingSide, TensorLayout};
use std::process::Command;

fn zeros(shape: &[usize]) -> Tensor {
    Tensor::zeros(shape, DType::F32, &Device::Cpu).expect("zeros on the host")
}

/// Text of the error of a call that must fail.
fn text<T>(result: candle_fa2::Result<T>) -> String {
    match result {
        Ok(_) => "no error".to_string(),
        Err(error) => {
            let text = error.to_string();
            let through_candle = candle_core::Error::from(error).to_string();
            assert_eq!(through_candle, text, "Candle's error says something else");
            assert!(!text.contains('\n'), "more than one line: {text}");
            text
        }
    }
}

/// The text that `supports`, `forward` and `forward_with_lse` all return.
fn refused(attention: &Attention, q: &Tensor, k: &Tensor, v: &Tensor) -> String {
    let answer = text(attention.supports(q, k, v));
    assert_eq!(text(attention.forward(q, k, v)), answer, "forward and supports disagree");
    assert_eq!(text(attention.forward_with_lse(q, k, v)), answer, "forward_with_lse and supports disagree");
    answer
}

/// The same for a packed call.
fn refused_packed(attention: &Attention, [q, k, v]: [&Tensor; 3], [lengths_q, lengths_k]: [&CuSeqlens; 2]) -> String {
    let answer = text(attention.supports_packed(q, k, v, lengths_q, lengths_k));
    let forward = text(attention.forward_packed(q, k, v, lengths_q, lengths_k));
    assert_eq!(forward, answer, "forward_packed and supports_packed disagree");
    let with_lse = text(attention.forward_packed_with_lse(q, k, v, lengths_q, lengths_k));
    assert_eq!(with_lse, answer, "forward_packed_with_lse and supports_packed disagree");
    answer
}

/// Shapes of q, k and v, and the error text.
const PADDED: [([&[usize]; 3], &str); 18] = [
    (
        [&[3, 8, 64], &[2, 4, 2, 64], &[2, 4, 2, 64]],
        "q: expected (batch, seqlen_q, num_heads, head_dim), got 3 axes in shape [3, 8, 64]; reshape it, or use the packed call for sequences laid end to end",
    ),
    (
        [&[2, 3, 8, 64], &[4, 2, 64], &[2, 4, 2, 64]],
        "k: expected (batch, seqlen_k, num_heads_k, head_dim), got 3 axes in shape [4, 2, 64]; reshape it, or use the packed call for sequences laid end to end",
    ),
    (
        [&[2, 3, 8, 64], &[2, 4, 2, 64], &[2, 1, 4, 2, 64]],
        "v: expected (batch, seqlen_k, num_heads_k, head_dim_v), got 5 axes in shape [2, 1, 4, 2, 64]; reshape it, or use the packed call for sequences laid end to end",
    ),
    ([&[2, 3, 8, 64], &[1, 4, 2, 64], &[2, 4, 2, 64]], "k: batch must be 2 as in q, got 1 in shape [1, 4, 2, 64]; give both the same batch"),
    ([&[2, 3, 8, 64], &[2, 4, 2, 64], &[3, 4, 2, 64]], "v: batch must be 2 as in q, got 3 in shape [3, 4, 2, 64]; give both the same batch"),
    ([&[2, 3, 8, 64], &[2, 4, 2, 64], &[2, 5, 2, 64]], "v: seqlen_k must be 4 as in k, got 5 in shape [2, 5, 2, 64]; give both the same seqlen_k"),
    ([&[2, 3, 8, 64], &[2, 4, 2, 64], &[2, 4, 4, 64]], "v: num_heads_k must be 2 as in k, got 4 in shape [2, 4, 4, 64]; give both the same num_heads_k"),
    ([&[2, 3, 8, 64], &[2, 4, 2, 32], &[2, 4, 2, 64]], "k: head_dim must be 64 as in q, got 32 in shape [2, 4, 2, 32]; give both the same head_dim"),
    (
        [&[2, 3, 8, 64], &[2, 4, 3, 64], &[2, 4, 3, 64]],
        "num_heads 8 of q is not a multiple of num_heads_k 3 of k and v; each key head must serve the same number of query heads",
    ),
    (
        [&[2, 3, 2, 64], &[2, 4, 4, 64], &[2, 4, 4, 64]],
        "num_heads 2 of q is not a multiple of num_heads_k 4 of k and v; each key head must serve the same number of query heads",
    ),
    (
        [&[2, 3, 2, 64], &[2, 4, 0, 64], &[2, 4, 0, 64]],
        "num_heads 2 of q is not a multiple of num_heads_k 0 of k and v; each key head must serve the same number of query heads",
    ),
    (
        [&[2, 3, 1, 513], &[2, 4, 1, 513], &[2, 4, 1, 513]],
        "head_dim 513 is not supported (supported: 1 to 512); choose another num_heads",
    ),
    (
        [&[2, 3, 1, 0], &[2, 4, 1, 0], &[2, 4, 1, 0]],
        "head_dim 0 is not supported (supported: 1 to 512); choose another num_heads",
    ),
    (
        [&[2, 3, 1, 64], &[2, 4, 1, 64], &[2, 4, 1, 513]],
        "head_dim_v 513 is not supported (supported: 1 to 512); choose another num_heads",
    ),
    (
        [&[2, 3, 1, 64], &[2, 4, 1, 64], &[2, 4, 1, 0]],
        "head_dim_v 0 is not supported (supported: 1 to 512); choose another num_heads",
    ),
    // The error names the first broken rule, in the order of q, k, v.
    ([&[1, 3, 8, 64], &[2, 4, 3, 32], &[3, 4, 2, 80]], "k: batch must be 1 as in q, got 2 in shape [2, 4, 3, 32]; give both the same batch"),
    ([&[2, 3, 8, 64], &[2, 4, 2, 64], &[2, 4, 2, 64]], "no error"),
    ([&[2, 3, 8, 64], &[2, 4, 2, 64], &[2, 4, 2, 80]], "no error"),
];

#[test]
fn shapes_of_padded_calls() {
    for (shapes, message) in PADDED {
        let [q, k, v] = shapes.map(zeros);
        assert_eq!(refused(&Attention::new(), &q, &k, &v), message);
    }
}

#[test]
fn shapes_of_one_tensor_of_q_k_and_v() {
    for (shape, num_heads_k, message) in [
        (
            &[2, 3, 3, 8, 64][..],
            8,
            "qkv: expected (batch, seqlen, num_heads + 2 * num_heads_k, head_dim), got 5 axes in shape [2, 3, 3, 8, 64]; reshape it",
        ),
        (
            &[2, 3, 4, 64],
            2,
            "qkv: 4 heads in shape [2, 3, 4, 64] are not num_heads + 2 * num_heads_k with num_heads_k 2; the heads of q come first, then k, then v",
        ),
        (
            &[2, 3, 4, 64],
            usize::MAX,
            "qkv: 4 heads in shape [2, 3, 4, 64] are not num_heads + 2 * num_heads_k with num_heads_k 18446744073709551615; the heads of q come first, then k, then v",
        ),
        (
            &[2, 3, 7, 64],
            2,
            "num_heads 3 of q is not a multiple of num_heads_k 2 of k and v; each key head must serve the same number of query heads",
        ),
        (
            &[2, 3, 7, 64],
            0,
            "num_heads 7 of q is not a multiple of num_heads_k 0 of k and v; each key head must serve the same number of query heads",
        ),
        (&[2, 3, 0, 64], 0, "no error"),
    ] {
        assert_eq!(text(Attention::new().forward_qkv(&zeros(shape), num_heads_k)), message);
    }
}

/// The error names the tensor of the caller, not the views q, k and v of it.
#[test]
fn strides_of_one_tensor_of_q_k_and_v() -> Result<()> {
    let qkv = zeros(&[2, 3, 64, 6]).transpose(2, 3)?;
    assert_eq!(
        text(Attention::new().forward_qkv(&qkv, 2)),
        "qkv: last axis must be contiguous, got stride 6 in shape [2, 3, 6, 64] with strides [1152, 384, 1, 6]; \
         call .contiguous()"
    );
    Ok(())
}

/// A broadcast tensor uses almost no memory, but its gradient would be too large.
#[test]
fn more_elements_than_memory() -> Result<()> {
    let row = zeros(&[1, 1, 2, 8]);
    let long = row.expand((1, 1 << 57, 2, 8))?;
    assert_eq!(
        refused(&Attention::new(), &long, &row, &row),
        "q: shape [1, 144115188075855872, 2, 8] has more elements than can be addressed; split the call"
    );
    let (long, wide) = (zeros(&[1, 1, 2, 1]).expand((1, 1 << 57, 2, 1))?, zeros(&[1, 1, 2, 512]));
    assert_eq!(
        refused(&Attention::new(), &long, &zeros(&[1, 1, 2, 1]), &wide),
        "o: shape [1, 144115188075855872, 2, 512] has more elements than can be addressed; split the call"
    );
    Ok(())
}

#[test]
fn shapes_and_lengths_of_packed_calls() -> Result<()> {
    let lengths = |lengths: &[usize]| CuSeqlens::from_lengths(lengths, &Device::Cpu);
    let (lengths_q, lengths_k) = (lengths(&[3, 2])?, lengths(&[4, 1])?);
    let (q, k) = (zeros(&[5, 4, 8]), zeros(&[5, 2, 8]));
    let padded = zeros(&[1, 5, 2, 8]);
    let long = zeros(&[6, 2, 8]);
    let one = lengths(&[5])?;
    for ([q, k, v], lengths, message) in [
        (
            [&padded, &k, &k],
            [&lengths_q, &lengths_k],
            "q: expected (total_q, num_heads, head_dim), got 4 axes in shape [1, 5, 2, 8]; reshape it, or use the padded call for sequences of one length",
        ),
        (
            [&q, &k, &padded],
            [&lengths_q, &lengths_k],
            "v: expected (total_k, num_heads_k, head_dim_v), got 4 axes in shape [1, 5, 2, 8]; reshape it, or use the padded call for sequences of one length",
        ),
        ([&q, &k, &k], [&lengths_q, &one], "cu_seqlens_k must describe as many sequences as cu_seqlens_q: 2, got 1; a length of 0 counts as a sequence"),
        ([&long, &k, &k], [&lengths_q, &lengths_k], "cu_seqlens_q must end at the number of rows of q: 6 in shape [6, 2, 8], got 5; make the lengths with CuSeqlens::from_lengths from this batch"),
        ([&q, &long, &k], [&lengths_q, &lengths_k], "cu_seqlens_k must end at the number of rows of k: 6 in shape [6, 2, 8], got 5; make the lengths with CuSeqlens::from_lengths from this batch"),
        ([&q, &k, &long], [&lengths_q, &lengths_k], "cu_seqlens_k must end at the number of rows of v: 6 in shape [6, 2, 8], got 5; make the lengths with CuSeqlens::from_lengths from this batch"),
        ([&q, &k, &k], [&lengths_q, &lengths_k], "no error"),
    ] {
        assert_eq!(refused_packed(&Attention::new(), [q, k, v], lengths), message);
    }
    Ok(())
}

#[test]
fn types() -> Result<()> {
    let x = zeros(&[1, 2, 2, 8]);
    let of = |dtype| x.to_dtype(dtype);
    let attention = Attention::new();
    let ids = of(DType::U32)?;
    assert_eq!(
        refused(&attention, &ids, &ids, &ids),
        "q: dtype U32 is not supported (supported: F64, F32, F16, BF16); convert with to_dtype"
    );
    assert_eq!(
        refused(&attention, &x, &of(DType::F16)?, &x),
        "k: dtype F16 differs from q's F32; convert one with to_dtype"
    );
    assert_eq!(
        refused(&attention, &of(DType::BF16)?, &of(DType::BF16)?, &x),
        "v: dtype F32 differs from q's BF16; convert one with to_dtype"
    );
    Ok(())
}

#[test]
fn strides() -> Result<()> {
    let good = zeros(&[2, 8, 64, 128]);
    let bad = zeros(&[2, 8, 128, 64]).transpose(2, 3)?;
    let attention = Attention::new();
    for (name, [q, k, v]) in [("q", [&bad, &good, &good]), ("k", [&good, &bad, &good]), ("v", [&good, &good, &bad])] {
        assert_eq!(
            refused(&attention, q, k, v),
            format!(
                "{name}: last axis must be contiguous, got stride 64 in shape [2, 8, 64, 128] \
                 with strides [65536, 8192, 1, 64]; call .contiguous()"
            )
        );
    }
    let expanded = zeros(&[2, 8, 64, 1]).expand((2, 8, 64, 128))?;
    assert_eq!(
        refused(&attention, &good, &expanded, &good),
        "k: last axis must be contiguous, got stride 0 in shape [2, 8, 64, 128] \
         with strides [512, 64, 1, 0]; call .contiguous()"
    );
    Ok(())
}

#[test]
fn options() -> Result<()> {
    let x = zeros(&[1, 2, 2, 8]);
    for (scale, message) in [
        (f64::NAN, "softmax_scale NaN is not finite; leave it out for 1/sqrt(head_dim)"),
        (f64::INFINITY, "softmax_scale inf is not finite; leave it out for 1/sqrt(head_dim)"),
        (f64::NEG_INFINITY, "softmax_scale -inf is not finite; leave it out for 1/sqrt(head_dim)"),
        (0.0, "no error"),
        (-1.0, "no error"),
    ] {
        assert_eq!(refused(&Attention::new().softmax_scale(scale), &x, &x, &x), message);
    }
    for (softcap, message) in [
        (0.0, "softcap 0 must be finite and above 0; leave it out for no cap"),
        (-2.5, "softcap -2.5 must be finite and above 0; leave it out for no cap"),
        (f64::NAN, "softcap NaN must be finite and above 0; leave it out for no cap"),
        (f64::INFINITY, "softcap inf must be finite and above 0; leave it out for no cap"),
        (30.0, "no error"),
    ] {
        assert_eq!(refused(&Attention::new().softcap(softcap), &x, &x, &x), message);
    }
    // These values are finite in f64, but not in the type of the scores.
    for (attention, message) in [
        (
            Attention::new().softmax_scale(1e39),
            "softmax_scale 1e39 is out of range for F32; leave it out for 1/sqrt(head_dim)",
        ),
        (Attention::new().softcap(3e38), "softcap 3e38 is out of range for F32; leave it out for no cap"),
        (Attention::new().softcap(1e-40), "softcap 1e-40 is out of range for F32; leave it out for no cap"),
    ] {
        assert_eq!(refused(&attention, &x, &x, &x), message);
    }
    let wide = x.to_dtype(DType::F64)?;
    assert_eq!(refused(&Attention::new().softmax_scale(1e39), &wide, &wide, &wide), "no error");
    assert_eq!(
        refused(&Attention::new().softcap(f64::MAX), &wide, &wide, &wide),
        "softcap 1.7976931348623157e308 is out of range for F64; leave it out for no cap"
    );
    // A window of only the aligned key is valid, and so is a window of any width.
    for (left, right) in [(Some(0), Some(0)), (Some(usize::MAX), None)] {
        assert_eq!(refused(&Attention::new().mask(Mask::Window { left, right }), &x, &x, &x), "no error");
    }
    Ok(())
}

#[test]
fn alibi_slopes() -> Result<()> {
    let x = zeros(&[2, 3, 8, 16]);
    let refused = |slopes: &Tensor| refused(&Attention::new().alibi_slopes(slopes), &x, &x, &x);
    for (shape, got) in
        [(&[4][..], "[4]"), (&[8, 2], "[8, 2]"), (&[1, 8], "[1, 8]"), (&[], "[]"), (&[1, 1, 8], "[1, 1, 8]")]
    {
        assert_eq!(
            refused(&zeros(shape)),
            format!("alibi_slopes: expected shape [8] (num_heads) or [2, 8] (batch, num_heads), got {got}")
        );
    }
    assert_eq!(
        refused(&zeros(&[8]).to_dtype(DType::F16)?),
        "alibi_slopes: dtype F16 is not supported (supported: F32); convert with to_dtype"
    );
    let tracked =
        "alibi_slopes: tracked for gradients, but attention computes no gradient for it; call .detach() if you need none";
    let slopes = Var::from_tensor(&zeros(&[8]))?;
    assert_eq!(refused(&slopes), tracked);
    assert_eq!(refused(&(slopes.as_tensor() * 2.0)?), tracked);
    assert_eq!(refused(&slopes.detach()), "no error");
    let infinite = Tensor::new(&[0f32, 1.0, 2.0, f32::INFINITY, 0.0, 0.0, f32::NAN, 0.0], &Device::Cpu)?;
    assert_eq!(refused(&infinite), "alibi_slopes: value inf at index 3 is not finite; use 0 for no bias");
    assert_eq!(refused(&zeros(&[2, 8])), "no error");
    Ok(())
}

#[test]
fn cumulative_lengths() -> Result<()> {
    let new = |offsets: &[u32]| text(CuSeqlens::new(offsets, &Device::Cpu));
    let from_tensor = |tensor: &Tensor| text(CuSeqlens::from_tensor(tensor));
    assert_eq!(
        new(&[]),
        "cu_seqlens: must hold at least the leading 0, got no entries; CuSeqlens::from_lengths takes plain lengths"
    );
    assert_eq!(new(&[1, 3]), "cu_seqlens: must start at 0, got 1; CuSeqlens::from_lengths takes plain lengths");
    assert_eq!(
        new(&[0, 5, 3, 9]),
        "cu_seqlens: must not fall, got 3 after 5 at entry 2; CuSeqlens::from_lengths takes plain lengths"
    );
    assert_eq!(
        text(CuSeqlens::from_lengths(&[u32::MAX as usize, 1], &Device::Cpu)),
        "cu_seqlens: must end below 2^32 rows, got 4294967296; split the batch"
    );
    assert_eq!(
        text(CuSeqlens::from_lengths(&[usize::MAX, usize::MAX], &Device::Cpu)),
        format!("cu_seqlens: must end below 2^32 rows, got {}; split the batch", 2 * (usize::MAX as u128))
    );
    assert_eq!(from_tensor(&Tensor::new(&[0u32, 5, 3], &Device::Cpu)?), new(&[0, 5, 3]));
    for tensor in [Tensor::new(&[0i64, 3], &Device::Cpu)?, Tensor::new(&[0f32, 3.0], &Device::Cpu)?] {
        assert_eq!(
            from_tensor(&tensor),
            format!("cu_seqlens: dtype {:?} is not supported (supported: U32); convert with to_dtype", tensor.dtype())
        );
    }
    assert_eq!(
        from_tensor(&Tensor::new(&[[0u32, 3]], &Device::Cpu)?),
        "cu_seqlens: expected (batch + 1), got 2 axes in shape [1, 2]; reshape it"
    );
    Ok(())
}

#[test]
fn padding_and_unpadding() -> Result<()> {
    let cu_seqlens = CuSeqlens::from_lengths(&[2, 4], &Device::Cpu)?;
    let unpad = |shape: &[usize]| text(cu_seqlens.unpad(&zeros(shape), PaddingSide::Right));
    assert_eq!(
        unpad(&[3, 4, 8]),
        "padded: batch must be 2 as in cu_seqlens, got 3 in shape [3, 4, 8]; give both the same batch"
    );
    assert_eq!(unpad(&[2, 3, 8]), "padded: seqlen must be at least the longest length 4, got 3 in shape [2, 3, 8]; use the seqlen of the batch that these lengths describe");
    assert_eq!(unpad(&[2]), "padded: expected (batch, seqlen, ..), got 1 axes in shape [2]; reshape it");
    assert_eq!(unpad(&[2, 4]), "no error");
    assert_eq!(
        text(cu_seqlens.pad(&Tensor::new(1f32, &Device::Cpu)?, PaddingSide::Right)),
        "packed: expected (total, ..), got 0 axes in shape []; reshape it, or use the padded call for sequences of one length"
    );
    assert_eq!(
        text(cu_seqlens.pad_to(&zeros(&[6, 8]), 3, PaddingSide::Right)),
        "padded: seqlen must be at least the longest length 4, got 3 in shape [2, 3, 8]; use the seqlen of the batch that these lengths describe"
    );
    let pad = |shape: &[usize]| text(cu_seqlens.pad(&zeros(shape), PaddingSide::Right));
    assert_eq!(pad(&[7, 8]), "cu_seqlens must end at the number of rows of packed: 7 in shape [7, 8], got 6; make the lengths with CuSeqlens::from_lengths from this batch");
    assert_eq!(pad(&[6, 8]), "no error");
    Ok(())
}

#[test]
fn padding_masks() -> Result<()> {
    let refused = |rows: &[[f32; 4]]| -> Result<String> {
        let mask = Tensor::from_slice(rows.as_flattened(), (rows.len(), 4), &Device::Cpu)?;
        let answer = text(CuSeqlens::from_mask(&mask));
        assert_eq!(text(KeyLengths::from_mask(&mask)), answer);
        Ok(answer)
    };
    assert_eq!(
        refused(&[[1., 1., 0., 0.], [0., -1e9, 1., 1.]])?,
        "mask: value -1000000000 at row 1, column 1 is neither 0 nor 1; 1 marks a token and 0 padding"
    );
    let hole = "are not one block at the start or end of its 4 positions; put all padding on one side";
    assert_eq!(refused(&[[1., 0., 1., 1.]])?, format!("mask: the 3 tokens of row 0 {hole}"));
    assert_eq!(refused(&[[1., 1., 1., 1.], [0., 1., 1., 0.]])?, format!("mask: the 2 tokens of row 1 {hole}"));
    assert_eq!(
        refused(&[[1., 1., 1., 1.], [1., 0., 0., 0.], [0., 0., 0., 1.]])?,
        "mask: the padding of row 2 is on the left, but that of row 1 is on the right; pad all rows on one side"
    );
    assert_eq!(
        text(CuSeqlens::from_mask(&zeros(&[2, 1, 1, 4]))),
        "mask: expected (batch, seqlen), got 4 axes in shape [2, 1, 1, 4]; reshape it"
    );
    let lengths = CuSeqlens::from_lengths(&[2, 4], &Device::Cpu)?;
    assert_eq!(
        text(lengths.mask(3, PaddingSide::Left)),
        "padded: seqlen must be at least the longest length 4, got 3 in shape [2, 3]; use the seqlen of the batch that these lengths describe"
    );
    Ok(())
}

#[test]
fn key_lengths() -> Result<()> {
    let lengths = |lengths: &[usize]| KeyLengths::new(lengths, PaddingSide::Right, &Device::Cpu);
    let attention = |lengths: &KeyLengths| Attention::new().key_lengths(lengths);
    let (q, k) = (zeros(&[2, 3, 8, 64]), zeros(&[2, 5, 2, 64]));
    assert_eq!(
        refused(&attention(&lengths(&[5])?), &q, &k, &k),
        "key_lengths: got 1 lengths for a batch of 2; give one per sequence"
    );
    assert_eq!(
        refused(&attention(&lengths(&[5, 6])?), &q, &k, &k),
        "key_lengths: length 6 of sequence 1 is larger than seqlen_k 5; do not count padding"
    );
    assert_eq!(refused(&attention(&lengths(&[0, 5])?), &q, &k, &k), "no error");
    assert_eq!(
        text(lengths(&[5, 1 << 32])),
        "key_lengths: length 4294967296 of sequence 1 is larger than seqlen_k 4294967295; do not count padding"
    );
    let shifted = "key_lengths: sequence 1 has 2 keys but 3 queries, and the mask or ALiBi aligns the last query with the last \
                   valid key; if the queries are padded too, use Mask::Causal without key_lengths, or CuSeqlens::from_mask \
                   and forward_packed";
    let short = attention(&lengths(&[3, 2])?);
    assert_eq!(refused(&short.clone().mask(Mask::Causal), &q, &k, &k), shifted);
    let slopes = Tensor::zeros(8, DType::F32, &Device::Cpu)?;
    assert_eq!(refused(&short.clone().alibi_slopes(&slopes), &q, &k, &k), shifted);
    for mask in [Mask::None, Mask::Window { left: None, right: None }] {
        assert_eq!(refused(&short.clone().mask(mask), &q, &k, &k), "no error");
    }
    let on_the_left = KeyLengths::new(&[3, 2], PaddingSide::Left, &Device::Cpu)?;
    assert_eq!(refused(&attention(&on_the_left).mask(Mask::Causal), &q, &k, &k), "no error");
    assert_eq!(refused(&attention(&lengths(&[0, 3])?).mask(Mask::Causal), &q, &k, &k), "no error");
    let (packed, cu_seqlens) = (zeros(&[4, 2, 64]), CuSeqlens::from_lengths(&[1, 3], &Device::Cpu)?);
    assert_eq!(
        refused_packed(&attention(&lengths(&[1, 3])?), [&packed; 3], [&cu_seqlens; 2]),
        "key_lengths: a packed call reads key lengths from cu_seqlens_k; remove key_lengths"
    );
    Ok(())
}

/// If the shapes fit only the other layout, the error says so.
#[test]
fn swapped_axes() -> Result<()> {
    let heads_first = "if q is (batch, num_heads, seqlen_q, head_dim), call .layout(TensorLayout::Bhsd)";
    let tokens_first = "if q is (batch, seqlen_q, num_heads, head_dim), call .layout(TensorLayout::Bshd)";
    let (q, k) = (zeros(&[2, 8, 3, 64]), zeros(&[2, 2, 5, 64]));
    let groups =
        "num_heads 3 of q is not a multiple of num_heads_k 5 of k and v; each key head must serve the same number of query heads";
    assert_eq!(refused(&Attention::new(), &q, &k, &k), format!("{groups}; {heads_first}"));
    // Decoding with Candle's cache.
    let q = zeros(&[1, 8, 1, 64]);
    let k = zeros(&[1, 8, 100, 64]);
    let groups = "num_heads 1 of q is not a multiple of num_heads_k 100 of k and v; each key head must serve the same number of query heads";
    assert_eq!(refused(&Attention::new(), &q, &k, &k), format!("{groups}; {heads_first}"));
    let other = Attention::new().layout(TensorLayout::Bhsd);
    let (q, k) = (zeros(&[2, 3, 8, 64]), zeros(&[2, 5, 2, 64]));
    let groups =
        "num_heads 3 of q is not a multiple of num_heads_k 5 of k and v; each key head must serve the same number of query heads";
    assert_eq!(refused(&other, &q, &k, &k), format!("{groups}; {tokens_first}"));
    // Shapes that fit neither layout get no such hint.
    let k = zeros(&[2, 5, 3, 64]);
    assert_eq!(
        refused(&Attention::new(), &q, &k, &k),
        "num_heads 8 of q is not a multiple of num_heads_k 3 of k and v; each key head must serve the same number of query heads"
    );
    let lengths = CuSeqlens::from_lengths(&[1, 3], &Device::Cpu)?;
    let packed = zeros(&[2, 4, 64]);
    assert_eq!(
        refused_packed(&Attention::new(), [&packed; 3], [&lengths; 2]),
        "cu_seqlens_q must end at the number of rows of q: 2 in shape [2, 4, 64], got 4; make the lengths with CuSeqlens::from_lengths from this batch; \
         if q is (num_heads, total_q, head_dim), call .layout(TensorLayout::Bhsd)"
    );
    assert_eq!(
        refused(&other, &packed, &packed, &packed),
        "q: expected (batch, num_heads, seqlen_q, head_dim), got 3 axes in shape [2, 4, 64]; \
         reshape it, or use the packed call for sequences laid end to end"
    );
    assert_eq!(
        refused_packed(&other, [&q, &packed, &packed], [&lengths; 2]),
        "q: expected (num_heads, total_q, head_dim), got 4 axes in shape [2, 3, 8, 64]; \
         reshape it, or use the padded call for sequences of one length"
    );
    assert_eq!(
        text(other.forward_qkv(&packed, 1)),
        "qkv: expected (batch, num_heads + 2 * num_heads_k, seqlen, head_dim), got 3 axes in shape [2, 4, 64]; reshape it"
    );
    Ok(())
}

#[test]
fn alibi_over_a_part() -> Result<()> {
    let slopes = Tensor::zeros(8, DType::F32, &Device::Cpu)?;
    let attention = Attention::new().alibi_slopes(&slopes);
    let answer =
        "alibi_slopes: attention over one part of the keys does not know how far they are from the queries; leave the \
                  slopes out, or use forward_with_lse, which counts distances from the last key of the call";
    let x = zeros(&[2, 3, 8, 64]);
    assert_eq!(text(attention.forward_partial(&x, &x, &x)), answer);
    let (x, lengths) = (zeros(&[6, 8, 64]), CuSeqlens::from_lengths(&[3, 3], &Device::Cpu)?);
    assert_eq!(text(attention.forward_packed_partial(&x, &x, &x, &lengths, &lengths)), answer);
    Ok(())
}

#[test]
fn merging() -> Result<()> {
    let attention = Attention::new();
    let merge = |parts: &[(Tensor, Tensor)]| text(attention.merge(parts));
    assert_eq!(merge(&[]), "merge: parts is empty; give at least one part");
    let (o, lse) = (zeros(&[2, 3, 8, 64]), zeros(&[2, 8, 3]));
    let part = |o: &Tensor, lse: &Tensor| (o.clone(), lse.clone());
    assert_eq!(merge(&[part(&o, &lse), part(&o, &lse)]), "no error");
    let queries = "all parts need the same queries, and o must have the result layout of this Attention";
    assert_eq!(
        merge(&[part(&o, &lse), part(&zeros(&[2, 4, 8, 64]), &lse)]),
        format!("merge: o of part 1 is [2, 4, 8, 64] F32 on Cpu, expected [2, 3, 8, 64] F32 on Cpu; {queries}")
    );
    assert_eq!(
        merge(&[part(&o, &zeros(&[2, 3, 8]))]),
        format!("merge: lse of part 0 is [2, 3, 8] F32 on Cpu, expected [2, 8, 3] F32 on Cpu; {queries}")
    );
    assert_eq!(
        merge(&[part(&o, &lse), part(&o, &lse.to_dtype(DType::F64)?)]),
        format!("merge: lse of part 1 is [2, 8, 3] F64 on Cpu, expected [2, 8, 3] F32 on Cpu; {queries}")
    );
    assert_eq!(
        merge(&[part(&o, &lse.to_dtype(DType::BF16)?)]),
        "lse: dtype BF16 is not supported (supported: F32, F64); convert with to_dtype"
    );
    assert_eq!(
        merge(&[part(&lse.i(0)?, &lse)]),
        format!("merge: o of part 0 is [8, 3], expected 4 axes, or 3 if packed; {queries}")
    );
    Ok(())
}

/// Errors that cannot occur on a machine without a GPU.
#[test]
fn devices() {
    let gpu = DeviceLocation::Cuda { gpu_id: 1 };
    assert_eq!(
        Error::Device { tensor: "k", got: gpu, expected: DeviceLocation::Cpu }.to_string(),
        "k: on device Cuda { gpu_id: 1 }, but q is on Cpu; move one with to_device"
    );
    assert_eq!(
        Error::NoKernel { dtype: DType::BF16, device: gpu }.to_string(),
        "no BF16 attention kernel for Cuda { gpu_id: 1 } (built: CPU); move q, k and v with to_device(&Device::Cpu)"
    );
    let no_instance = |rejected| Error::NoInstance {
        pass: "backward",
        dtype: DType::BF16,
        head_dim: 256,
        compute_cap: (8, 6),
        shared_bytes_per_block: 65_536,
        rejected,
    };
    let start =
        "head_dim 256 has no BF16 backward kernel for compute capability 8.6 with 65536 bytes of shared memory per block";
    let way_out = "use another head_dim, or move q, k and v with to_device(&Device::Cpu)";
    assert_eq!(no_instance(vec![]).to_string(), format!("{start} (none was built); {way_out}"));
    let rejected = vec!["one needs this".to_string(), "another needs that".to_string()];
    let no_instance = no_instance(rejected);
    let text = format!("{start} (one needs this, another needs that); {way_out}");
    assert_eq!(no_instance.to_string(), text);
    assert_eq!(
        Error::NoBackward { tensor: "qkv", error: Box::new(no_instance) }.to_string(),
        format!("qkv: tracked for gradients, but {text}; for inference, call .detach() on the inputs")
    );
    assert_eq!(
        Error::NoForward.to_string(),
        "flash_attention: backward found no lse; run the forward of this operator first"
    );
}

/// An error of Candle does not change when it is converted to this crate's error and back.
#[test]
fn errors_of_candle() -> Result<()> {
    let inner = zeros(&[2, 3]).matmul(&zeros(&[2, 3])).expect_err("shapes do not fit");
    let text = inner.to_string();
    let ours = Error::from(inner);
    assert_eq!(ours.to_string(), text);
    assert_eq!(candle_core::Error::from(ours).to_string(), text);
    Ok(())
}

/// `RUST_BACKTRACE` adds nothing to any text. The other tests of this file pass with it too.
#[test]
fn backtraces_stay_out_of_the_text() -> Result<()> {
    let child = Command::new(std::env::current_exe()?)
        .args(["errors::", "--skip", "errors::backtraces"])
        .env("RUST_BACKTRACE", "1")
        .output()?;
    let text = String::from_utf8_lossy(&child.stdout);
    anyhow::ensure!(child.status.success() && !text.contains("running 0 tests"), "{text}");
    Ok(())
}
