//! How tensors are laid out: the axis order of q, k, v and of the result, and the side of the padding.

/// The axis order of q, k and v, and of the result.
///
/// | | padded | packed | who uses it |
/// | --- | --- | --- | --- |
/// | `Bshd` | `(batch, seqlen, num_heads, head_dim)` | `(total, num_heads, head_dim)` | a projection after `reshape`; FlashAttention |
/// | `Bhsd` | `(batch, num_heads, seqlen, head_dim)` | `(num_heads, total, head_dim)` | `candle_nn::ops::sdpa`, most models of Candle, PyTorch's `scaled_dot_product_attention` |
///
/// The layout only names the axes. Both layouts accept any strides, so a transposed view is read without a copy. (On a GPU, if
/// rows are 16-byte aligned.)
///
/// **A wrong layout usually gives no error.** If there are as many queries as keys, the shapes are valid in both layouts. The
/// wrong layout then computes attention over heads instead of tokens. [`Error::SwappedAxes`](crate::Error::SwappedAxes) is
/// returned only if the shapes fit the other layout and not this one, as in decoding with a cache.
///
/// ```
/// # use candle_core::{Device, Tensor};
/// # use candle_fa2::{Attention, Mask, TensorLayout};
/// let q = Tensor::randn(0f32, 1f32, (1, 8, 3, 64), &Device::Cpu)?; // (batch, num_heads, seqlen, head_dim)
/// let k = Tensor::randn(0f32, 1f32, (1, 2, 5, 64), &Device::Cpu)?;
/// let attention = Attention::new().mask(Mask::Causal).layout(TensorLayout::Bhsd);
/// assert_eq!(attention.forward(&q, &k, &k)?.dims(), [1, 8, 3, 64]);
/// // The result in the other layout, for `flatten_from(2)` and the output projection:
/// let attention = attention.output_layout(TensorLayout::Bshd);
/// assert_eq!(attention.forward(&q, &k, &k)?.dims(), [1, 3, 8, 64]);
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum TensorLayout {
    /// `(batch, seqlen, num_heads, head_dim)`, packed `(total, num_heads, head_dim)`.
    #[default]
    Bshd,
    /// `(batch, num_heads, seqlen, head_dim)`, packed `(num_heads, total, head_dim)`.
    Bhsd,
}

impl TensorLayout {
    /// Indices of the token axis and of the head axis. `rank` is 4 (padded) or 3 (packed).
    pub(crate) fn axes(self, rank: usize) -> (usize, usize) {
        match self {
            TensorLayout::Bshd => (rank - 3, rank - 2),
            TensorLayout::Bhsd => (rank - 2, rank - 3),
        }
    }

    /// Converts `shape` from the order of [`TensorLayout::Bshd`] to this layout.
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

/// The side of each sequence that holds the padding (`padding_side` of Hugging Face tokenizers).
///
/// ```text
///          Right        Left            x a token, . padding
/// row 0    x x x .      . x x x
/// row 1    x . . .      . . . x
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum PaddingSide {
    /// Padding before the tokens. Common for generating text in batches.
    Left,
    /// Padding after the tokens. Common for training.
    Right,
}

impl std::fmt::Display for PaddingSide {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        f.write_str(match self {
            PaddingSide::Left => "left",
            PaddingSide::Right => "right",
        })
    }
}

impl PaddingSide {
    /// The first token of a sequence of `length` tokens in `seqlen` positions.
    pub(crate) fn start(self, length: usize, seqlen: usize) -> usize {
        match self {
            PaddingSide::Left => seqlen - length,
            PaddingSide::Right => 0,
        }
    }
}
