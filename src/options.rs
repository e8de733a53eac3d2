//! The options of a call as plain values. [`Problem`](crate::problem::Problem) checks them.

use candle_core::Tensor;

use crate::layout::TensorLayout;
use crate::mask::Mask;
use crate::padding::KeyLengths;

/// The options of an [`Attention`](crate::Attention). Its methods of the same names document them.
#[derive(Clone, Debug, Default)]
pub struct Options {
    pub(crate) mask: Mask,
    /// `None`: `1 / sqrt(head_dim)`.
    pub(crate) softmax_scale: Option<f64>,
    pub(crate) softcap: Option<f64>,
    pub(crate) alibi_slopes: Option<Tensor>,
    pub(crate) deterministic: bool,
    pub(crate) tf32: bool,
    pub(crate) key_lengths: Option<KeyLengths>,
    /// Axis order of q, k and v.
    pub(crate) layout: TensorLayout,
    /// Axis order of the result. `None`: that of q, k and v.
    pub(crate) output_layout: Option<TensorLayout>,
}

impl Options {
    /// The axis order of the result.
    pub(crate) fn layout_of_result(&self) -> TensorLayout {
        self.output_layout.unwrap_or(self.layout)
    }
}
