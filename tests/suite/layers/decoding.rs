//! Decoding with candle_nn's cache: any split of a sequence into calls gives the output of one call over the whole sequence.

use anyhow::Result;
use candle_core::{DType, Device, Tensor};
use candle_fa2::layers::{detached_var_builder, MultiHeadAttention};
use candle_fa2::Mask;
use candle_nn::kv_cache::KvCache;

use super::case::{self, normal, Case};
use super::close::{close, Tolerance};
use super::unfused;
use crate::common::cases::{own_gpu, GPU_DTYPES};

/// The cases whose mask hides later keys, and a window over each kind of projection.
fn cases() -> Vec<Case> {
    let window = Mask::Window { left: Some(6), right: Some(0) };
    let (causal, other): (Vec<Case>, Vec<Case>) = case::all().into_iter().partition(|case| case.mask == Mask::Causal);
    causal.into_iter().chain(other.into_iter().map(|case| Case { mask: window, ..case })).collect()
}

/// Splits of the 70 tokens of a case into calls.
const SPLITS: [&[usize]; 5] = [
    &[70],              // all at once
    &[1; 70],           // one at a time
    &[40, 1, 1, 1, 27], // a prompt, tokens, another prompt
    &[5, 0, 3, 31, 31], // several at a time, and one call without tokens
    &[1, 69],           // one, then the rest
];

/// Calls the layer with pieces of `xs` of these lengths and concatenates the results.
fn decode(layer: &MultiHeadAttention, xs: &Tensor, split: &[usize], cache: &mut KvCache) -> Result<Tensor> {
    let mut start = 0;
    let mut pieces = Vec::new();
    for &seqlen in split {
        assert_eq!(cache.current_seq_len(), start);
        pieces.push(layer.forward_cached(&xs.narrow(1, start, seqlen)?, cache)?);
        start += seqlen;
    }
    Ok(Tensor::cat(&pieces, 1)?)
}

#[test]
fn any_split_equals_the_whole() -> Result<()> {
    let gpu = own_gpu();
    for case in cases() {
        let reference = |dtype| unfused::forward(&case, &case.build(dtype)?.vars(), &case.xs(dtype)?);
        let want = reference(DType::F64)?;
        for (dtype, plain) in [(DType::F64, DType::F32), (DType::F32, DType::F32), (DType::BF16, DType::BF16)] {
            let tolerance = Tolerance::from(&reference(plain)?, &want, dtype)?;
            let on_gpu = gpu.as_ref().filter(|_| GPU_DTYPES.contains(&dtype)).map(|gpu| case.on(gpu));
            for case in [Some(case.clone()), on_gpu].into_iter().flatten() {
                let layer = case.build(dtype)?.layer.detach();
                // On a GPU, Candle cannot multiply empty matrices.
                let takes = |split: &&[usize]| case.device.is_cpu() || !split.contains(&0);
                for split in SPLITS.into_iter().filter(takes) {
                    let got = decode(&layer, &case.xs(dtype)?, split, &mut layer.new_cache(case.seqlen))?;
                    close(&format!("{dtype:?} output of {split:?}"), &got, &want, tolerance, &case)?;
                }
            }
        }
    }
    Ok(())
}

/// A cache that is too small grows, and a cache after a reset begins at position 0. Both give the same bits.
#[test]
fn cache_grows_and_resets() -> Result<()> {
    let case = cases().remove(1);
    let layer = case.build(DType::F32)?.layer.detach();
    let xs = case.xs(DType::F32)?;
    let split = SPLITS[2];
    let roomy = decode(&layer, &xs, split, &mut layer.new_cache(70))?;
    let mut small = layer.new_cache(3);
    for _ in 0..2 {
        let grown = decode(&layer, &xs, split, &mut small)?;
        assert_eq!(grown.flatten_all()?.to_vec1::<f32>()?, roomy.flatten_all()?.to_vec1::<f32>()?);
        small.reset();
    }
    Ok(())
}

/// A refused call does not change the cache, and decoding can continue.
#[test]
fn refused_call_leaves_the_cache() -> Result<()> {
    let case = case::all().into_iter().find(|case| case.name == "llama").expect("the grid has it");
    let layer = case.build(DType::F32)?.layer.detach();
    let xs = case.xs(DType::F32)?;
    let mut cache = layer.new_cache(case.seqlen);
    let first = layer.forward_cached(&xs.narrow(1, 0, 40)?, &mut cache)?;
    let too_many = normal((2, case::MAX_SEQLEN, 64), 1.0, "too many", DType::F32)?;
    for refused in [too_many, xs.narrow(0, 0, 1)?, xs.to_dtype(DType::F64)?, xs.narrow(2, 0, 63)?] {
        assert!(layer.forward_cached(&refused, &mut cache).is_err());
        assert_eq!((cache.k_cache().current_seq_len(), cache.v_cache().current_seq_len()), (40, 40));
    }
    let rest = layer.forward_cached(&xs.narrow(1, 40, 30)?, &mut cache)?;
    let got = Tensor::cat(&[first, rest], 1)?.flatten_all()?.to_vec1::<f32>()?;
    let want = decode(&layer, &xs, &[40, 30], &mut layer.new_cache(70))?.flatten_all()?.to_vec1::<f32>()?;
    assert_eq!(got, want);
    Ok(())
}

/// Decoding after training. A detached layer, and a second layer over the same variables, use the trained values, also after
/// another training step.
#[test]
fn trained_weights_decode() -> Result<()> {
    for name in ["llama", "gpt2", "gpt-neox"] {
        let case = case::all().into_iter().find(|case| case.name == name).expect("the grid has it");
        let built = case.build(DType::F32)?;
        let vb = detached_var_builder(&built.varmap, DType::F32, &Device::Cpu);
        let decoders = [built.layer.detach(), MultiHeadAttention::new(&case.config()?, vb)?];
        let xs = case.xs(DType::F32)?;
        let mut outputs = Vec::new();
        for step in ["before", "after"] {
            for decoder in &decoders {
                let got = decode(decoder, &xs, &[70], &mut decoder.new_cache(70))?;
                assert!(!got.track_op());
                let got = got.flatten_all()?.to_vec1::<f32>()?;
                assert_eq!(got, built.layer.forward(&xs)?.flatten_all()?.to_vec1::<f32>()?, "{name} {step}");
                outputs.push(got);
            }
            case::fill(&built.varmap, "one more step")?;
        }
        assert_ne!(outputs[0], outputs[2], "{name}");
    }
    Ok(())
}
