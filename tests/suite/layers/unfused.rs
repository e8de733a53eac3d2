//! The plain layer, written without this crate: Candle's `matmul`, `softmax` and `matmul`. It repeats keys for grouped queries
//! and adds the mask as minus infinity. All its operators are differentiable. It reads the weights by name.

use std::collections::BTreeMap;

use anyhow::Result;
use candle_core::{Tensor, Var, D};
use candle_fa2::layers::{QkvOrder, RotaryLayout, WeightLayout};
use candle_fa2::Mask;
use candle_nn::{ops, rotary_emb};

use super::case::{Case, Rotation};

/// The output of the layer: `xs (batch, seqlen, embed_dim)` to the same shape.
pub fn forward(case: &Case, vars: &BTreeMap<String, Var>, xs: &Tensor) -> Result<Tensor> {
    let (batch, seqlen, _) = xs.dims3()?;
    let project = |name: &str, xs: &Tensor| -> Result<Tensor> {
        let weight = vars[&format!("{name}.weight")].as_tensor();
        let weight = if case.weight_layout == WeightLayout::OutIn { weight.t()? } else { weight.clone() };
        let ys = xs.broadcast_matmul(&weight)?;
        Ok(match vars.get(&format!("{name}.bias")) {
            Some(bias) => ys.broadcast_add(bias.as_tensor())?,
            None => ys,
        })
    };
    let (num_heads, num_heads_k) = (case.num_heads, case.num_heads_k);
    let (q, k, v) = match case.fused {
        None => (project("q_proj", xs)?, project("k_proj", xs)?, project("v_proj", xs)?),
        Some(QkvOrder::Concatenated) => cut(case, &project("c_attn", xs)?)?,
        Some(QkvOrder::ByKeyHead) => cut(case, &project("query_key_value", xs)?)?,
    };
    // (batch, seqlen, heads * head_dim) -> (batch, heads, seqlen, head_dim)
    let heads = |xs: Tensor, heads: usize| -> Result<Tensor> {
        Ok(xs.reshape((batch, seqlen, heads, case.head_dim))?.transpose(1, 2)?.contiguous()?)
    };
    let q = rotate(case.rotary, &heads(q, num_heads)?)?;
    let k = rotate(case.rotary, &heads(k, num_heads_k)?)?;
    let v = heads(v, num_heads_k)?;
    let group = num_heads / num_heads_k;
    let repeat = |xs: &Tensor| -> Result<Tensor> {
        let repeated: Vec<Tensor> = (0..num_heads).map(|h| xs.narrow(1, h / group, 1)).collect::<Result<_, _>>()?;
        Ok(Tensor::cat(&repeated, 1)?)
    };
    let (k, v) = (repeat(&k)?, repeat(&v)?);

    let scale = case.softmax_scale.unwrap_or(1.0 / (case.head_dim as f64).sqrt());
    let mut scores = (q.matmul(&k.t()?.contiguous()?)? * scale)?;
    if let Some(softcap) = case.softcap {
        scores = ((scores / softcap)?.tanh()? * softcap)?;
    }
    if let Some(slopes) = case.alibi_slopes {
        scores = scores.broadcast_add(&alibi(slopes, &scores)?)?;
    }
    let p = ops::softmax(&scores.broadcast_add(&hidden(case.mask, &scores)?)?, D::Minus1)?;
    // (batch, heads, seqlen, head_dim) -> (batch, seqlen, heads * head_dim)
    let o = p.matmul(&v)?.transpose(1, 2)?.flatten_from(2)?;
    let name = match case.fused {
        None => "o_proj",
        Some(QkvOrder::Concatenated) => "c_proj",
        Some(QkvOrder::ByKeyHead) => "dense",
    };
    project(name, &o)
}

/// q, k and v from the output of a fused projection, head by head.
fn cut(case: &Case, qkv: &Tensor) -> Result<(Tensor, Tensor, Tensor)> {
    let (num_heads, num_heads_k) = (case.num_heads, case.num_heads_k);
    let group = num_heads / num_heads_k;
    let heads = |count: usize, place: &dyn Fn(usize) -> usize| -> Result<Tensor> {
        let heads = (0..count).map(|head| qkv.narrow(2, place(head) * case.head_dim, case.head_dim));
        Ok(Tensor::cat(&heads.collect::<Result<Vec<_>, _>>()?, 2)?)
    };
    if case.fused == Some(QkvOrder::ByKeyHead) {
        // Before query head h there are one k and one v for each earlier key head.
        let q = heads(num_heads, &|h| h + 2 * (h / group))?;
        Ok((
            q,
            heads(num_heads_k, &|h| h * (group + 2) + group)?,
            heads(num_heads_k, &|h| h * (group + 2) + group + 1)?,
        ))
    } else {
        let q = heads(num_heads, &|h| h)?;
        Ok((q, heads(num_heads_k, &|h| num_heads + h)?, heads(num_heads_k, &|h| num_heads + num_heads_k + h)?))
    }
}

/// `(heads, seqlen, seqlen)`: minus the slope of each head times the distance of query and key.
fn alibi(slopes: &[f32], like: &Tensor) -> Result<Tensor> {
    let seqlen = like.dim(D::Minus1)?;
    let distances =
        move |slope: f64| (0..seqlen * seqlen).map(move |at| -slope * (at / seqlen).abs_diff(at % seqlen) as f64);
    let values: Vec<f64> = slopes.iter().flat_map(|&slope| distances(slope.into())).collect();
    Ok(Tensor::from_vec(values, (slopes.len(), seqlen, seqlen), like.device())?.to_dtype(like.dtype())?)
}

/// `(seqlen, seqlen)`: 0 where a query sees a key, minus infinity elsewhere.
fn hidden(mask: Mask, like: &Tensor) -> Result<Tensor> {
    let seqlen = like.dim(D::Minus1)?;
    let sees = |i: usize, j: usize| match mask {
        Mask::None => true,
        Mask::Causal => j <= i,
        Mask::Window { left, right } => {
            left.is_none_or(|left| j + left >= i) && right.is_none_or(|right| j <= i + right)
        }
    };
    let values: Vec<f64> =
        (0..seqlen).flat_map(|i| (0..seqlen).map(move |j| if sees(i, j) { 0.0 } else { f64::NEG_INFINITY })).collect();
    Ok(Tensor::from_vec(values, (seqlen, seqlen), like.device())?.to_dtype(like.dtype())?)
}

/// Rotates `xs (batch, heads, seqlen, head_dim)`. Positions begin at 0. Its own tables are rounded to f32, as the tables of
/// `Rotary` are.
fn rotate(rotary: Option<Rotation>, xs: &Tensor) -> Result<Tensor> {
    let Some(Rotation { rotary_dim, theta, layout }) = rotary else {
        return Ok(xs.clone());
    };
    let (seqlen, head_dim) = (xs.dim(2)?, xs.dim(3)?);
    let table = |of: fn(f64) -> f64| -> Result<Tensor> {
        let angle = |p: usize, i: usize| p as f64 / theta.powf((2 * i) as f64 / rotary_dim as f64);
        let values: Vec<f32> =
            (0..seqlen).flat_map(|p| (0..rotary_dim / 2).map(move |i| of(angle(p, i)) as f32)).collect();
        Ok(Tensor::from_vec(values, (seqlen, rotary_dim / 2), xs.device())?.to_dtype(xs.dtype())?)
    };
    let (cos, sin) = (table(f64::cos)?, table(f64::sin)?);
    let part = xs.narrow(3, 0, rotary_dim)?;
    let rotated = match layout {
        RotaryLayout::HalfSplit => rotary_emb::rope_slow(&part, &cos, &sin)?,
        RotaryLayout::Interleaved => rotary_emb::rope_i_slow(&part, &cos, &sin)?,
    };
    Ok(Tensor::cat(&[&rotated, &xs.narrow(3, rotary_dim, head_dim - rotary_dim)?], 3)?)
}
