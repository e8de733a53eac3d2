//! Rotary position embedding with a backward.

use candle_core::{Device, Tensor};
use candle_fused_ops::RotaryOrder;

use super::checks::{check_packed_rows, check_rank};
use super::error::{Error, Result};
use crate::packed::CuSeqlens;
use crate::problem::{is_float, FLOAT_DTYPES};

/// The largest number of values in each of the two tables: 1 GiB of f32, or 4,194,304 positions with `rotary_dim` 128.
/// Without this limit, a huge `max_seqlen` that means "no limit" would fill the memory.
const MAX_TABLE_VALUES: usize = 1 << 28;

/// Which two values of a head form a pair. The two values of a pair rotate together.
///
/// A model is trained with one of the two layouts. With the other layout its results are wrong, without any error. For
/// `rotary_dim = 8`:
///
/// ```text
/// value          0  1  2  3  4  5  6  7
/// HalfSplit      a  b  c  d  a  b  c  d     value i with value i + rotary_dim / 2
/// Interleaved    a  a  b  b  c  c  d  d     value 2 i with value 2 i + 1
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum RotaryLayout {
    /// Weights of Llama, Mistral, Qwen and GPT-NeoX from the Hugging Face hub.
    #[default]
    HalfSplit,
    /// Weights of GPT-J, and weights of Llama from Meta.
    Interleaved,
}

/// The configuration of a [`Rotary`]: how many values of each head rotate, how fast, in which pairs, up to which position.
#[derive(Clone, Debug)]
pub struct RotaryConfig {
    rotary_dim: usize,
    max_seqlen: usize,
    layout: RotaryLayout,
    frequencies: Frequencies,
}

/// Radians per position of each pair.
#[derive(Clone, Debug)]
enum Frequencies {
    /// `theta^(-2 i / rotary_dim)` for pair `i`.
    Theta(f64),
    /// One value per pair.
    Each(Vec<f64>),
}

impl RotaryConfig {
    /// The first `rotary_dim` values of each head rotate, usually all `head_dim` of them. By default `theta` is 10,000 and the
    /// layout is [`RotaryLayout::HalfSplit`].
    ///
    /// [`Rotary::new`] computes tables for the positions `0..max_seqlen`. So set `max_seqlen` to the longest sequence in use.
    /// A table with more than 2^28 values (`max_seqlen * rotary_dim / 2`) is an error.
    pub fn new(rotary_dim: usize, max_seqlen: usize) -> Self {
        let (layout, frequencies) = (RotaryLayout::default(), Frequencies::Theta(10_000.0));
        Self { rotary_dim, max_seqlen, layout, frequencies }
    }

    /// Pair `i` rotates by `theta^(-2 i / rotary_dim)` radians per position (Llama 3: 500,000).
    pub fn theta(mut self, theta: f64) -> Self {
        self.frequencies = Frequencies::Theta(theta);
        self
    }

    /// Radians per position of each pair, `rotary_dim / 2` values. They replace [`Self::theta`].
    ///
    /// Some checkpoints extend their context by scaled frequencies. With linear scaling by `f`, each frequency is divided by
    /// `f`.
    pub fn frequencies(mut self, radians_per_position: Vec<f64>) -> Self {
        self.frequencies = Frequencies::Each(radians_per_position);
        self
    }

    /// Which values form a pair.
    pub fn layout(mut self, layout: RotaryLayout) -> Self {
        self.layout = layout;
        self
    }

    /// Returns an error unless `rotary_dim` is a number of pairs and the tables are within the limit.
    fn check_sizes(&self) -> Result<()> {
        let (rotary_dim, max_seqlen, limit) = (self.rotary_dim, self.max_seqlen, MAX_TABLE_VALUES);
        if rotary_dim == 0 || !rotary_dim.is_multiple_of(2) {
            return Err(Error::RotaryDim { rotary_dim });
        }
        // Without positions the tables are empty. But the frequencies exist, as many as one position has values.
        match (rotary_dim / 2).checked_mul(max_seqlen.max(1)) {
            Some(values) if values <= limit => Ok(()),
            _ => Err(Error::RotaryTables { max_seqlen, rotary_dim, limit }),
        }
    }

    /// Radians per position of each pair. Returns an error if one is not usable.
    fn radians_per_position(&self) -> Result<Vec<f64>> {
        let rotary_dim = self.rotary_dim;
        let frequencies = match &self.frequencies {
            Frequencies::Theta(theta) if !theta.is_finite() || *theta <= 0.0 => {
                return Err(Error::RotaryTheta(*theta));
            }
            Frequencies::Theta(theta) => {
                (0..rotary_dim / 2).map(|pair| theta.powf(-2.0 * pair as f64 / rotary_dim as f64)).collect()
            }
            Frequencies::Each(frequencies) => frequencies.clone(),
        };
        if frequencies.len() != rotary_dim / 2 {
            return Err(Error::RotaryFrequencies { got: frequencies.len(), rotary_dim });
        }
        match frequencies.iter().position(|frequency| !frequency.is_finite()) {
            Some(pair) => Err(Error::RotaryFrequency { pair, got: frequencies[pair] }),
            None => Ok(frequencies),
        }
    }
}

/// Rotary position embedding: rotates each pair of values of q and k by an angle that grows with the position. So a score
/// depends on the distance between query and key.
///
/// For a pair `(x, y)` at position `p` with frequency `f`:
///
/// ```text
/// x' = x cos(p f) - y sin(p f)
/// y' = x sin(p f) + y cos(p f)
/// ```
///
/// Candle's fast kernels (`candle_nn::rotary_emb::{rope, rope_i, rope_thd}`) cut their result off from the graph, without
/// an error. The layers before them get no gradient. `Rotary` uses [`candle_fused_ops::rotary`], whose backward is a rotation by
/// the opposite angles. Gradients flow to `xs`.
///
/// The tables of cos and sin have shape `(max_seqlen, rotary_dim / 2)`. They are computed in f64, rounded once to f32, and
/// kept on the device. Clones share them, so build one `Rotary` for all layers.
///
/// f16 and bf16 tensors are rotated in f32 and rounded once. f64 tensors are rotated in f64, with the same f32 tables.
///
/// ```
/// # use candle_core::{DType, Device, Tensor, Var};
/// # use candle_fa2::layers::{Rotary, RotaryConfig};
/// let rotary = Rotary::new(&RotaryConfig::new(64, 2048), &Device::Cpu)?;
/// let q = Var::ones((1, 16, 8, 64), DType::F32, &Device::Cpu)?; // (batch, seqlen, num_heads, head_dim)
/// let rotated = rotary.apply(q.as_tensor(), 0)?;
/// let grads = rotated.sum_all()?.backward()?;
/// assert!(grads.get(q.as_tensor()).is_some());
///
/// // In decoding, the token at position 10 comes alone. Its result is the same as in the whole sequence.
/// let one = rotary.apply(&q.narrow(1, 10, 1)?, 10)?;
/// assert_eq!(one.flatten_all()?.to_vec1::<f32>()?, rotated.narrow(1, 10, 1)?.flatten_all()?.to_vec1::<f32>()?);
/// # Ok::<(), candle_fa2::layers::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Rotary {
    /// `(max_seqlen, rotary_dim / 2)`, f32.
    cos: Tensor,
    /// As `cos`.
    sin: Tensor,
    layout: RotaryLayout,
}

/// The rows of both tables for the positions of one call, `(seqlen, rotary_dim / 2)` each.
pub(super) struct RotaryRows {
    cos: Tensor,
    sin: Tensor,
}

impl Rotary {
    /// Computes the tables on the host and copies them to `device`.
    ///
    /// # Errors
    /// [`Error::RotaryDim`], [`Error::RotaryTables`], [`Error::RotaryTheta`], [`Error::RotaryFrequencies`] or
    /// [`Error::RotaryFrequency`] if a value of the configuration is out of range.
    pub fn new(config: &RotaryConfig, device: &Device) -> Result<Self> {
        config.check_sizes()?;
        let frequencies = config.radians_per_position()?;
        let shape = (config.max_seqlen, frequencies.len());
        // The angles are f64, because f32 angles would be off by 0.004 radians at position 100,000.
        let angles = (0..config.max_seqlen).flat_map(|position| frequencies.iter().map(move |f| position as f64 * f));
        let (sin, cos): (Vec<f32>, Vec<f32>) =
            angles.map(f64::sin_cos).map(|(sin, cos)| (sin as f32, cos as f32)).unzip();
        let (cos, sin) = (Tensor::from_vec(cos, shape, device)?, Tensor::from_vec(sin, shape, device)?);
        Ok(Self { cos, sin, layout: config.layout })
    }

    /// Number of values of each head that rotate. The others stay as they are.
    pub fn rotary_dim(&self) -> usize {
        2 * self.cos.dims()[1]
    }

    /// Number of positions in the tables: `0..max_seqlen`.
    pub fn max_seqlen(&self) -> usize {
        self.cos.dims()[0]
    }

    /// Which values form a pair.
    pub fn layout(&self) -> RotaryLayout {
        self.layout
    }

    /// The device that holds the tables.
    pub fn device(&self) -> &Device {
        self.cos.device()
    }

    /// Rotates `xs` of shape `(batch, seqlen, num_heads, head_dim)`. The result has the same shape.
    ///
    /// The first token has position `offset`. In training this is 0; in decoding it is the length of the cache.
    ///
    /// # Errors
    /// [`Rank`](crate::Error::Rank); [`Error::RotaryHeadDim`] if `head_dim` is smaller than `rotary_dim`;
    /// [`DType`](crate::Error::DType) if it is not a floating-point type;
    /// [`Error::RotaryDevice`] if the tables are elsewhere; [`Error::RotaryPositions`] if the last position has no row in the
    /// tables.
    pub fn apply(&self, xs: &Tensor, offset: usize) -> Result<Tensor> {
        check_rank(xs, "(batch, seqlen, num_heads, head_dim)")?;
        self.rotate(xs, &self.rows(offset, xs.dims()[1])?)
    }

    /// Rotates packed `xs` of shape `(total, num_heads, head_dim)`. Positions begin at 0 in every sequence.
    ///
    /// # Errors
    /// As [`Self::apply`], and [`PackedRows`](crate::Error::PackedRows) if `cu_seqlens` does not end at `total`.
    pub fn apply_packed(&self, xs: &Tensor, cu_seqlens: &CuSeqlens) -> Result<Tensor> {
        check_rank(xs, "(total, num_heads, head_dim)")?;
        check_packed_rows(xs, cu_seqlens)?;
        self.rotate(xs, &self.rows_packed(cu_seqlens)?)
    }

    /// The rows for positions `offset..offset + seqlen`.
    pub(super) fn rows(&self, offset: usize, seqlen: usize) -> Result<RotaryRows> {
        self.check_positions(offset, seqlen)?;
        Ok(RotaryRows { cos: self.cos.narrow(0, offset, seqlen)?, sin: self.sin.narrow(0, offset, seqlen)? })
    }

    /// The rows for a packed batch, `(total, rotary_dim / 2)`: each sequence begins at position 0.
    pub(super) fn rows_packed(&self, cu_seqlens: &CuSeqlens) -> Result<RotaryRows> {
        self.check_positions(0, cu_seqlens.max_seqlen())?;
        if cu_seqlens.total() == 0 {
            return self.rows(0, 0);
        }
        let positions: Vec<u32> = cu_seqlens.offsets().windows(2).flat_map(|pair| 0..pair[1] - pair[0]).collect();
        let positions = Tensor::from_vec(positions, cu_seqlens.total(), self.device())?;
        Ok(RotaryRows { cos: self.cos.index_select(&positions, 0)?, sin: self.sin.index_select(&positions, 0)? })
    }

    /// Rotates `xs`, `(batch, seqlen, num_heads, head_dim)` or `(total, num_heads, head_dim)`, with one row per token. The
    /// result is contiguous.
    pub(super) fn rotate(&self, xs: &Tensor, rows: &RotaryRows) -> Result<Tensor> {
        let (head_dim, rotary_dim) = (xs.dims()[xs.rank() - 1], self.rotary_dim());
        if head_dim < rotary_dim {
            return Err(Error::RotaryHeadDim { rotary_dim, head_dim });
        }
        if !is_float(xs.dtype()) {
            return Err(crate::Error::DType { tensor: "xs", got: xs.dtype(), supported: FLOAT_DTYPES }.into());
        }
        let (got, expected) = (self.device().location(), xs.device().location());
        if got != expected {
            return Err(Error::RotaryDevice { got, expected });
        }
        if xs.elem_count() == 0 {
            return Ok(xs.clone());
        }
        let order = match self.layout {
            RotaryLayout::HalfSplit => RotaryOrder::HalfSplit,
            RotaryLayout::Interleaved => RotaryOrder::Interleaved,
        };
        Ok(candle_fused_ops::rotary(xs, &rows.cos, &rows.sin, order)?)
    }

    /// Returns an error unless the tables have rows for positions `start..start + seqlen`.
    fn check_positions(&self, start: usize, seqlen: usize) -> Result<()> {
        let (end, max_seqlen) = (start.saturating_add(seqlen), self.max_seqlen());
        if end > max_seqlen {
            return Err(Error::RotaryPositions { start, end, max_seqlen });
        }
        Ok(())
    }
}
