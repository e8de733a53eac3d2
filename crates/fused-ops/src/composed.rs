//! The same operators, composed of Candle's differentiable ones.
//!
//! They run on every device that has no fused operator of this crate yet; today this is every device except the CPU. Their
//! gradients are right, but each call is a dozen nodes and passes over memory. On the CPU you can call them to compare.
//!
//! The arguments are those of the fused operators, which have checked them.

use candle_core::{Result, Tensor, D};

use crate::node::accumulator;

/// [`layer_norm`](crate::layer_norm), composed.
///
/// # Errors
/// If Candle cannot compute with these tensors.
pub fn layer_norm(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>, eps: f64) -> Result<Tensor> {
    let wide = x.to_dtype(accumulator(x.dtype()))?;
    let centred = wide.broadcast_sub(&wide.mean_keepdim(D::Minus1)?)?;
    normalised(&centred, x, weight, bias, eps)
}

/// [`rms_norm`](crate::rms_norm), composed.
///
/// # Errors
/// If Candle cannot compute with these tensors.
pub fn rms_norm(x: &Tensor, weight: &Tensor, eps: f64) -> Result<Tensor> {
    normalised(&x.to_dtype(accumulator(x.dtype()))?, x, weight, None, eps)
}

fn normalised(centred: &Tensor, x: &Tensor, weight: &Tensor, bias: Option<&Tensor>, eps: f64) -> Result<Tensor> {
    let rms = (centred.sqr()?.mean_keepdim(D::Minus1)? + eps)?.sqrt()?;
    let y = centred.broadcast_div(&rms)?.broadcast_mul(&weight.to_dtype(centred.dtype())?)?;
    let y = match bias {
        Some(bias) => y.broadcast_add(&bias.to_dtype(y.dtype())?)?,
        None => y,
    };
    y.to_dtype(x.dtype())
}
