//! In which order the axes of q, k, v and o come.

/// Order of the axes of q, k and v, and of the result.
///
/// | | padded | packed | who uses it |
/// | --- | --- | --- | --- |
/// | `Bshd` | `(batch, seqlen, num_heads, head_dim)` | `(total, num_heads, head_dim)` | a projection after `reshape`; FlashAttention |
/// | `Bhsd` | `(batch, num_heads, seqlen, head_dim)` | `(num_heads, total, head_dim)` | `candle_nn::ops::sdpa`, most models of Candle, PyTorch's `scaled_dot_product_attention` |
///
/// The layout names the axes only. The strides stay free in both: a transposed view is read in place and costs nothing.
/// No shape tells the two layouts apart where `seqlen` could be a number of heads, so a call in the wrong layout computes
/// something else without an error.
///
/// ```
/// # use candle_core::{Device, Tensor};
/// # use candle_fa2::{Attention, Mask, TensorLayout};
/// let q = Tensor::randn(0f32, 1f32, (1, 8, 3, 64), &Device::Cpu)?; // (batch, num_heads, seqlen, head_dim)
/// let k = Tensor::randn(0f32, 1f32, (1, 2, 5, 64), &Device::Cpu)?;
/// let attention = Attention::new().mask(Mask::Causal).layout(TensorLayout::Bhsd);
/// assert_eq!(attention.forward(&q, &k, &k)?.dims(), [1, 8, 3, 64]);
/// // The result in the other layout, ready for `flatten_from(2)` and the output projection:
/// let attention = attention.output_layout(TensorLayout::Bshd);
/// assert_eq!(attention.forward(&q, &k, &k)?.dims(), [1, 3, 8, 64]);
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum TensorLayout {
    /// The tokens before the heads.
    #[default]
    Bshd,
    /// The heads before the tokens.
    Bhsd,
}

impl TensorLayout {
    /// The axis of the tokens and the axis of the heads of a tensor with `rank` axes: 4 padded, 3 packed.
    pub(crate) fn axes(self, rank: usize) -> (usize, usize) {
        match self {
            TensorLayout::Bshd => (rank - 3, rank - 2),
            TensorLayout::Bhsd => (rank - 2, rank - 3),
        }
    }

    /// `shape`, given in the order of [`TensorLayout::Bshd`], in this order.
    pub(crate) fn order(self, mut shape: Vec<usize>) -> Vec<usize> {
        let (rows, heads) = (shape.len() - 3, shape.len() - 2);
        if self == TensorLayout::Bhsd {
            shape.swap(rows, heads);
        }
        shape
    }

    /// The other layout.
    pub(crate) fn other(self) -> Self {
        match self {
            TensorLayout::Bshd => TensorLayout::Bhsd,
            TensorLayout::Bhsd => TensorLayout::Bshd,
        }
    }
}
