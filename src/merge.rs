//! Merges attention over parts of the keys into attention over all keys.
//!
//! Part `i` has `lse_i` and `o_i`. The result over all keys is
//!
//! ```text
//! lse = ln(sum over i of exp(lse_i))
//! o   = sum over i of exp(lse_i - lse) * o_i
//! ```
//!
//! (Online softmax: Milakov and Gimelshein 2018, arXiv:1805.02867. Ring attention: Liu et al. 2023, arXiv:2310.01889.)
//!
//! The merge uses Candle's differentiable operators, so gradients flow to every part.

use candle_core::{DType, Tensor};

use crate::layout::TensorLayout;
use crate::{Error, Result};

/// Merges parts `(o, lse)` into one. o has the axis order of `layout`. Both results have the type of lse.
pub(crate) fn merge(parts: &[(Tensor, Tensor)], layout: TensorLayout) -> Result<(Tensor, Tensor)> {
    check(parts, layout)?;
    if let Some((o, lse)) = parts.first().filter(|(_, lse)| lse.elem_count() == 0) {
        return Ok((o.to_dtype(lse.dtype())?, lse.clone())); // no rows
    }
    let lse: Vec<&Tensor> = parts.iter().map(|(_, lse)| lse).collect();
    let lse = Tensor::stack(&lse, 0)?; // (parts, ..)

    // Subtract the row's largest lse, so that exp does not overflow. If a row has no key in any part, its largest lse is minus
    // infinity, so subtract 0 instead. `max` cannot find these rows: on a GPU it skips NaN, so a row with NaN looks the same.
    let without_keys = lse.eq(f64::NEG_INFINITY)?;
    let empty = without_keys.min(0)?;
    let max = lse.detach().max(0)?;
    let reference = empty.where_cond(&max.zeros_like()?, &max)?;
    let weights = lse.broadcast_sub(&reference)?.exp()?;
    let sum = weights.sum(0)?;
    // For a row without keys ln(0) is correct, but its gradient is NaN. So take ln(1); `where_cond` below restores -inf.
    let sum = empty.where_cond(&sum.ones_like()?, &sum)?;
    let merged_lse = (sum.log()? + reference)?;
    let merged_lse = empty.where_cond(&max, &merged_lse)?;

    let mut merged_o: Option<Tensor> = None;
    for (i, (o, _)) in parts.iter().enumerate() {
        let o = o.to_dtype(lse.dtype())?;
        // If all scores of a row are minus infinity, its o is NaN. Its weight is 0, but 0 times NaN would make the sum NaN.
        let without_keys = of_rows(&without_keys.get(i)?, layout)?.broadcast_as(o.shape())?;
        let o = without_keys.where_cond(&o.zeros_like()?, &o)?;
        let term = o.broadcast_mul(&of_rows(&(weights.get(i)? / &sum)?, layout)?)?;
        merged_o = Some(match merged_o {
            Some(before) => (before + term)?,
            None => term,
        });
    }
    let merged_o = merged_o.ok_or(Error::MergeNothing)?;
    Ok((merged_o, merged_lse))
}

/// Reshapes one number per row, `(batch, num_heads, seqlen)` or packed `(num_heads, total)`, so that it broadcasts to o.
fn of_rows(numbers: &Tensor, layout: TensorLayout) -> Result<Tensor> {
    let numbers = numbers.unsqueeze(numbers.rank())?;
    Ok(match layout {
        TensorLayout::Bshd => numbers.transpose(numbers.rank() - 3, numbers.rank() - 2)?,
        TensorLayout::Bhsd => numbers,
    })
}

/// Returns an error unless all parts have the shapes, types and device of the first, and o fits lse.
fn check(parts: &[(Tensor, Tensor)], layout: TensorLayout) -> Result<()> {
    let Some((first_o, first_lse)) = parts.first() else { return Err(Error::MergeNothing) };
    if !matches!(first_o.rank(), 3 | 4) {
        let (got, expected) = (format!("{:?}", first_o.dims()), "4 axes, or 3 if packed".to_string());
        return Err(Error::MergeMismatch { part: 0, tensor: "o", got, expected });
    }
    if !matches!(first_lse.dtype(), DType::F32 | DType::F64) {
        return Err(Error::DType { tensor: "lse", got: first_lse.dtype(), supported: "F32, F64" });
    }
    // The shape of lse: the shape of o without head_dim, with the heads before the tokens.
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
