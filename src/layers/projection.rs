//! A linear projection of the last axis, with a weight in either layout.

use candle_core::{Tensor, D};
use candle_nn::{init, Init, VarBuilder};

use super::config::{MultiHeadAttentionConfig, WeightLayout};
use super::error::Result;

/// `xs w + b` over the last axis.
///
/// There are two differences to `candle_nn::Linear`. A weight of shape `(in, out)` is used as it is. And if `xs` is not
/// contiguous, the weight is not repeated per batch.
#[derive(Clone, Debug)]
pub(super) struct Projection {
    /// Full name in the checkpoint, with the prefix of the builder.
    name: String,
    weight: Tensor,
    bias: Option<Tensor>,
    layout: WeightLayout,
}

impl Projection {
    /// Loads `name.weight`, and `name.bias` if `bias` is true. A builder that makes new variables draws them.
    pub(super) fn new(
        config: &MultiHeadAttentionConfig,
        name: &str,
        in_dim: usize,
        out_dim: usize,
        bias: bool,
        vb: &VarBuilder,
    ) -> Result<Self> {
        let layout = config.weight_layout;
        let vb = vb.pp(name);
        let weight_init = layout.init(config.weight_init.unwrap_or(init::DEFAULT_KAIMING_NORMAL));
        let weight = vb.get_with_hints(layout.shape(in_dim, out_dim), "weight", weight_init)?;
        let bias = match (bias, config.weight_init) {
            (false, _) => None,
            (true, Some(_)) => Some(vb.get_with_hints(out_dim, "bias", init::ZERO)?),
            (true, None) => {
                // The same distribution as in candle_nn::linear.
                let bound = (in_dim as f64).sqrt().recip();
                Some(vb.get_with_hints(out_dim, "bias", Init::Uniform { lo: -bound, up: bound })?)
            }
        };
        Ok(Self { name: vb.prefix(), weight, bias, layout })
    }

    /// `(.., in)` to `(.., out)`.
    pub(super) fn forward(&self, xs: &Tensor) -> Result<Tensor> {
        let mut shape = xs.dims().to_vec();
        let in_dim = shape.pop().unwrap_or(0);
        let weight = match self.layout {
            WeightLayout::OutIn => self.weight.t()?,
            WeightLayout::InOut => self.weight.clone(),
        };
        shape.push(weight.dim(D::Minus1)?);
        // (.., in) -> (rows, in): one matrix product instead of one per batch.
        let rows = xs.elem_count() / in_dim;
        let ys = xs.contiguous()?.reshape((rows, in_dim))?.matmul(&weight)?;
        let ys = match &self.bias {
            Some(bias) => ys.broadcast_add(bias)?,
            None => ys,
        };
        Ok(ys.reshape(shape)?)
    }

    /// The same projection without tracking. It shares the storage.
    pub(super) fn detach(&self) -> Self {
        Self { weight: self.weight.detach(), bias: self.bias.as_ref().map(Tensor::detach), ..self.clone() }
    }

    /// The weight as it was loaded.
    pub(super) fn weight(&self) -> &Tensor {
        &self.weight
    }

    /// The full name of the weight or bias that is tracked for gradients; the weight if both are.
    pub(super) fn tracked(&self) -> Option<String> {
        let bias = self.bias.as_ref().filter(|bias| bias.track_op()).map(|_| "bias");
        let part = if self.weight.track_op() { Some("weight") } else { bias };
        part.map(|part| format!("{}.{part}", self.name))
    }
}
