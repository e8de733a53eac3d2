//! Checks of the input that the layer and the rotary embedding share.

use candle_core::Tensor;

use crate::error::{Error, Result};
use crate::packed::CuSeqlens;

/// Returns an error unless `xs` has one axis for each name in `axes`, for example `(batch, seqlen, embed_dim)`.
pub(super) fn check_rank(xs: &Tensor, axes: &'static str) -> Result<()> {
    if xs.rank() != axes.split(',').count() {
        return Err(Error::Rank { tensor: "xs", axes, shape: xs.dims().to_vec() });
    }
    Ok(())
}

/// Returns an error unless packed `xs` has as many rows as `cu_seqlens` describes.
pub(super) fn check_packed_rows(xs: &Tensor, cu_seqlens: &CuSeqlens) -> Result<()> {
    let rows = xs.dims()[0];
    if rows != cu_seqlens.total() {
        let (end, shape) = (cu_seqlens.total(), xs.dims().to_vec());
        return Err(Error::PackedRows { cu_seqlens: "cu_seqlens", end, tensor: "xs", rows, shape });
    }
    Ok(())
}
