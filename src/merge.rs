//! Attention over all keys from attention over parts of them.
//!
//! With `lse_i` and `o_i` of part `i`, the log-sum-exp and the output over the keys of all parts are
//!
//! ```text
//! lse = ln(sum over i of exp(lse_i))
//! o   = sum over i of exp(lse_i - lse) * o_i
//! ```
//!
//! (Milakov and Gimelshein 2018; ring attention, Liu et al. 2023.) It is made of Candle's operators, so that gradients flow.

use candle_core::{DType, Tensor};

use crate::layout::TensorLayout;
use crate::{Error, Result};

/// Merges parts whose o is in `layout`. The result is in the type of lse.
pub(crate) fn merge(parts: &[(Tensor, Tensor)], layout: TensorLayout) -> Result<(Tensor, Tensor)> {
    check(parts, layout)?;
    let lse: Vec<&Tensor> = parts.iter().map(|(_, lse)| lse).collect();
    let lse = Tensor::stack(&lse, 0)?; // (parts, ..)

    // Weights are relative to the largest lse of a row. A row without keys in any part has none: 0 stands in for it.
    let max = lse.detach().max(0)?;
    let empty = max.eq(f64::NEG_INFINITY)?;
    let reference = empty.where_cond(&max.zeros_like()?, &max)?;
    let weights = lse.broadcast_sub(&reference)?.exp()?;
    let sum = weights.sum(0)?;
    // ln 0 would be right for such a row, but its gradient would not.
    let sum = empty.where_cond(&sum.ones_like()?, &sum)?;
    let merged_lse = (sum.log()? + reference)?;
    let merged_lse = empty.where_cond(&max, &merged_lse)?;

    let mut merged_o: Option<Tensor> = None;
    for (i, (o, _)) in parts.iter().enumerate() {
        let weight = weight_of_rows(&(weights.get(i)? / &sum)?, layout)?;
        let term = o.to_dtype(weight.dtype())?.broadcast_mul(&weight)?;
        merged_o = Some(match merged_o {
            Some(before) => (before + term)?,
            None => term,
        });
    }
    let merged_o = merged_o.ok_or(Error::MergeNothing)?;
    Ok((merged_o, merged_lse))
}

/// `(batch, num_heads, seqlen)`, packed `(num_heads, total)`, as a factor of the rows of o.
fn weight_of_rows(weight: &Tensor, layout: TensorLayout) -> Result<Tensor> {
    let weight = weight.unsqueeze(weight.rank())?;
    Ok(match layout {
        TensorLayout::Bshd => weight.transpose(weight.rank() - 3, weight.rank() - 2)?,
        TensorLayout::Bhsd => weight,
    })
}

/// Whether all parts have the shapes, types and device of the first, and o fits lse.
fn check(parts: &[(Tensor, Tensor)], layout: TensorLayout) -> Result<()> {
    let Some((first_o, first_lse)) = parts.first() else { return Err(Error::MergeNothing) };
    if !matches!(first_o.rank(), 3 | 4) {
        let axes = "(batch, seqlen_q, num_heads, head_dim) or (total_q, num_heads, head_dim)";
        return Err(Error::Rank { tensor: "o", axes, shape: first_o.dims().to_vec() });
    }
    if !matches!(first_lse.dtype(), DType::F32 | DType::F64) {
        return Err(Error::DType { tensor: "lse", got: first_lse.dtype(), supported: "F32, F64" });
    }
    // lse has the axes of o without head_dim, the heads before the tokens.
    let mut shape_lse = first_o.dims().to_vec();
    let (rows_axis, heads_axis) = layout.axes(shape_lse.len());
    if rows_axis < heads_axis {
        shape_lse.swap(rows_axis, heads_axis);
    }
    shape_lse.pop();
    for (part, (o, lse)) in parts.iter().enumerate() {
        for (tensor, x, shape, dtype) in
            [("o", o, first_o.dims(), first_o.dtype()), ("lse", lse, &shape_lse[..], first_lse.dtype())]
        {
            let (got, device) = (x.device().location(), first_o.device().location());
            if x.dims() != shape || x.dtype() != dtype || got != device {
                return Err(Error::MergeMismatch {
                    part,
                    tensor,
                    got: format!("{:?} {:?} on {got:?}", x.dims(), x.dtype()),
                    expected: format!("{shape:?} {dtype:?} on {device:?}"),
                });
            }
        }
    }
    Ok(())
}
