//! Packed batches: sequences of different lengths, end to end, without padding.

use std::sync::Arc;

use candle_core::{DType, Device, Tensor};

use crate::layout::PaddingSide;
use crate::padding::read_mask;
use crate::{Error, Result};

/// Where each sequence of a packed batch begins and ends: `[0, l0, l0 + l1, ..]`, one entry more than sequences.
///
/// The constructor checks the values once. It keeps a copy on the host, a copy on the device, and the longest length. So
/// later calls never read the device.
///
/// ```
/// # use candle_core::{Device, Tensor};
/// # use candle_fa2::{CuSeqlens, PaddingSide};
/// let cu_seqlens = CuSeqlens::from_lengths(&[3, 0, 2], &Device::Cpu)?;
/// assert_eq!(cu_seqlens.offsets(), [0, 3, 3, 5]);
/// assert_eq!((cu_seqlens.batch(), cu_seqlens.total(), cu_seqlens.max_seqlen()), (3, 5, 3));
///
/// let padded = Tensor::arange(0f32, 9.0, &Device::Cpu)?.reshape((3, 3, 1))?;
/// let packed = cu_seqlens.unpad(&padded, PaddingSide::Right)?;
/// assert_eq!(packed.flatten_all()?.to_vec1::<f32>()?, [0.0, 1.0, 2.0, 6.0, 7.0]);
/// # Ok::<(), candle_fa2::Error>(())
/// ```
#[derive(Clone)]
pub struct CuSeqlens {
    offsets: Arc<[u32]>,
    max_seqlen: usize,
    tensor: Tensor,
}

/// Prints only sizes, because a batch may have thousands of lengths.
impl std::fmt::Debug for CuSeqlens {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        let mut debug = f.debug_struct("CuSeqlens");
        debug.field("batch", &self.batch()).field("total", &self.total()).field("max_seqlen", &self.max_seqlen);
        debug.finish_non_exhaustive()
    }
}

impl CuSeqlens {
    /// From cumulative lengths. The first is 0, and no other is smaller than the one before it.
    ///
    /// # Errors
    /// - [`Error::CuSeqlens`] if there are no values, if the first is not 0, or if one is smaller than the one before it;
    /// - an error of Candle if the copy to `device` fails.
    pub fn new(offsets: &[u32], device: &Device) -> Result<Self> {
        let way_out = "CuSeqlens::from_lengths takes plain lengths";
        let refuse = |rule, got: String| Err(Error::CuSeqlens { rule, got, way_out });
        match offsets.first() {
            None => return refuse("must hold at least the leading 0", "no entries".into()),
            Some(0) => {}
            Some(first) => return refuse("must start at 0", first.to_string()),
        }
        if let Some(at) = offsets.windows(2).position(|pair| pair[1] < pair[0]) {
            return refuse("must not fall", format!("{} after {} at entry {}", offsets[at + 1], offsets[at], at + 1));
        }
        let max_seqlen = offsets.windows(2).map(|pair| (pair[1] - pair[0]) as usize).max().unwrap_or(0);
        let tensor = Tensor::new(offsets, device)?;
        Ok(Self { offsets: offsets.into(), max_seqlen, tensor })
    }

    /// From the length of each sequence. A length may be 0.
    ///
    /// # Errors
    /// [`Error::CuSeqlens`] if the sum of the lengths is above `u32::MAX`; an error of Candle if the copy to `device` fails.
    pub fn from_lengths(lengths: &[usize], device: &Device) -> Result<Self> {
        let total: u128 = lengths.iter().map(|&length| length as u128).sum();
        if total > u128::from(u32::MAX) {
            let (rule, way_out) = ("must end below 2^32 rows", "split the batch");
            return Err(Error::CuSeqlens { rule, got: total.to_string(), way_out });
        }
        let mut end = 0;
        let ends = lengths.iter().map(|&length| {
            end += length as u32;
            end
        });
        let offsets: Vec<u32> = std::iter::once(0).chain(ends).collect();
        Self::new(&offsets, device)
    }

    /// From a `u32` tensor of cumulative lengths, shape `(batch + 1)`. This reads the tensor from its device once.
    ///
    /// # Errors
    /// [`Error::DType`] if it is not `u32`, [`Error::Rank`] if it has more than one axis, otherwise as [`Self::new`].
    pub fn from_tensor(offsets: &Tensor) -> Result<Self> {
        if offsets.dtype() != DType::U32 {
            return Err(Error::DType { tensor: "cu_seqlens", got: offsets.dtype(), supported: "U32" });
        }
        if offsets.rank() != 1 {
            return Err(Error::Rank { tensor: "cu_seqlens", axes: "(batch + 1)", shape: offsets.dims().to_vec() });
        }
        Self::new(&offsets.to_vec1::<u32>()?, offsets.device())
    }

    /// Reads the sequence lengths and the padding side from a padding mask.
    ///
    /// The mask has shape `(batch, seqlen)` and any type. It is 1 for a token and 0 for padding, like `attention_mask` of
    /// Hugging Face. (`key_padding_mask` of PyTorch is the opposite: invert it first.)
    ///
    /// Pass the side to [`Self::unpad`] and [`Self::pad_to`]. Without padding it is [`PaddingSide::Right`]. On a GPU this call
    /// waits for the device. So call it once per batch, not once per layer.
    ///
    /// ```
    /// # use candle_core::{Device, Tensor};
    /// # use candle_fa2::{CuSeqlens, PaddingSide};
    /// let mask = Tensor::new(&[[0u8, 1, 1], [0, 0, 1]], &Device::Cpu)?;
    /// let (cu_seqlens, side) = CuSeqlens::from_mask(&mask)?;
    /// assert_eq!((cu_seqlens.offsets(), side), (&[0, 2, 3][..], PaddingSide::Left));
    ///
    /// let tokens = Tensor::new(&[[9u32, 5, 6], [9, 9, 7]], &Device::Cpu)?;
    /// assert_eq!(cu_seqlens.unpad(&tokens, side)?.to_vec1::<u32>()?, [5, 6, 7]);
    /// assert_eq!(cu_seqlens.mask(3, side)?.to_vec2::<u8>()?, mask.to_vec2::<u8>()?);
    /// # Ok::<(), candle_fa2::Error>(())
    /// ```
    ///
    /// # Errors
    /// - [`Error::Rank`] if the mask does not have two axes;
    /// - [`Error::MaskValue`] if a value is neither 0 nor 1;
    /// - [`Error::MaskHole`] if a row has padding between tokens or on both sides of them;
    /// - [`Error::MaskSides`] if rows are padded on different sides;
    /// - the errors of [`Self::from_lengths`].
    pub fn from_mask(mask: &Tensor) -> Result<(Self, PaddingSide)> {
        let (lengths, side) = read_mask(mask)?;
        Ok((Self::from_lengths(&lengths, mask.device())?, side))
    }

    /// The cumulative lengths.
    pub fn offsets(&self) -> &[u32] {
        &self.offsets
    }

    /// Number of sequences.
    pub fn batch(&self) -> usize {
        self.offsets.len() - 1
    }

    /// Number of rows of the packed tensors: the sum of all lengths.
    pub fn total(&self) -> usize {
        self.offsets.last().map_or(0, |&end| end as usize)
    }

    /// Number of blocks of `rows` rows that are enough for any lengths, when no block has rows of two sequences. Sequence `b` begins at block
    /// `first_row / rows + b`, which is not before the end of sequence `b - 1`.
    pub(crate) fn blocks(&self, rows: usize) -> usize {
        self.total() / rows + self.batch()
    }

    /// The longest length.
    pub fn max_seqlen(&self) -> usize {
        self.max_seqlen
    }

    /// The cumulative lengths on the device, `u32`, shape `(batch + 1)`.
    pub fn tensor(&self) -> &Tensor {
        &self.tensor
    }

    /// The padding mask of this batch, padded to `seqlen`. It is a `u8` tensor of shape `(batch, seqlen)`, 1 for a token and 0
    /// for padding, on the device of [`Self::tensor`].
    ///
    /// # Errors
    /// [`Error::PaddedSeqlen`] if `seqlen` is shorter than the longest length; an error of Candle if the copy to the device
    /// fails.
    pub fn mask(&self, seqlen: usize, side: PaddingSide) -> Result<Tensor> {
        self.check_seqlen(seqlen, &[self.batch(), seqlen])?;
        let mut mask = vec![0u8; self.batch() * seqlen];
        for row in self.padded_rows(seqlen, side) {
            mask[row as usize] = 1;
        }
        Ok(Tensor::from_vec(mask, (self.batch(), seqlen), self.tensor.device())?)
    }

    /// Removes the padding: `(batch, seqlen, ..)` to `(total, ..)`. [`Self::from_mask`] returns the padding `side`.
    ///
    /// Axis 1 must be `seqlen`. So transpose `(batch, num_heads, seqlen, head_dim)` first, or unpad before the projections.
    /// Gradients flow to the rows of tokens. Each call copies an index of `total` rows to the device.
    ///
    /// # Errors
    /// [`Error::Rank`] if `padded` has fewer than two axes, [`Error::Axis`] if the batch differs, [`Error::PaddedSeqlen`] if
    /// `seqlen` is shorter than the longest length.
    pub fn unpad(&self, padded: &Tensor, side: PaddingSide) -> Result<Tensor> {
        let shape = padded.dims().to_vec();
        let &[batch, seqlen, ..] = shape.as_slice() else {
            return Err(Error::Rank { tensor: "padded", axes: "(batch, seqlen, ..)", shape });
        };
        if batch != self.batch() {
            let (axis, other, expected) = ("batch", "cu_seqlens", self.batch());
            return Err(Error::Axis { tensor: "padded", axis, got: batch, other, expected, shape });
        }
        self.check_seqlen(seqlen, &shape)?;
        let index = self.row_index(seqlen, side, padded.device())?;
        Ok(padded.flatten(0, 1)?.contiguous()?.index_select(&index, 0)?)
    }

    /// Adds padding of zeros: `(total, ..)` to `(batch, max_seqlen, ..)`. Gradients flow to the rows of `packed`.
    ///
    /// `max_seqlen` can be smaller than the `seqlen` before [`Self::unpad`]. [`Self::pad_to`] takes that `seqlen`.
    ///
    /// # Errors
    /// [`Error::Rank`] if `packed` has no axis, [`Error::PackedRows`] if its number of rows is not the sum of the lengths.
    pub fn pad(&self, packed: &Tensor, side: PaddingSide) -> Result<Tensor> {
        self.pad_to(packed, self.max_seqlen, side)
    }

    /// As [`Self::pad`], but to length `seqlen`. Use the original `seqlen` to undo [`Self::unpad`].
    ///
    /// # Errors
    /// As [`Self::pad`], and [`Error::PaddedSeqlen`] if `seqlen` is shorter than the longest length.
    pub fn pad_to(&self, packed: &Tensor, seqlen: usize, side: PaddingSide) -> Result<Tensor> {
        let shape = packed.dims().to_vec();
        let Some(&rows) = shape.first() else {
            return Err(Error::Rank { tensor: "packed", axes: "(total, ..)", shape });
        };
        if rows != self.total() {
            let (cu_seqlens, end, tensor) = ("cu_seqlens", self.total(), "packed");
            return Err(Error::PackedRows { cu_seqlens, end, tensor, rows, shape });
        }
        let batch = self.batch();
        let mut padded = vec![batch, seqlen];
        padded.extend(&shape[1..]);
        self.check_seqlen(seqlen, &padded)?;
        let mut flat = shape;
        flat[0] = batch * seqlen;
        let index = self.row_index(seqlen, side, packed.device())?;
        let zeros = Tensor::zeros(flat, packed.dtype(), packed.device())?;
        Ok(zeros.index_add(&index, &packed.contiguous()?, 0)?.reshape(padded)?)
    }

    /// Returns an error unless the longest sequence fits `seqlen`, axis 1 of the padded `shape`.
    fn check_seqlen(&self, seqlen: usize, shape: &[usize]) -> Result<()> {
        if seqlen < self.max_seqlen {
            return Err(Error::PaddedSeqlen { longest: self.max_seqlen, got: seqlen, shape: shape.to_vec() });
        }
        Ok(())
    }

    /// For each packed row, its row in the flattened `(batch * seqlen)` batch.
    fn padded_rows(&self, seqlen: usize, side: PaddingSide) -> impl Iterator<Item = i64> + '_ {
        self.offsets.windows(2).enumerate().flat_map(move |(b, pair)| {
            let length = (pair[1] - pair[0]) as usize;
            let start = b * seqlen + side.start(length, seqlen);
            start as i64..(start + length) as i64
        })
    }

    /// [`Self::padded_rows`] as an `i64` tensor on `device`.
    fn row_index(&self, seqlen: usize, side: PaddingSide, device: &Device) -> Result<Tensor> {
        let rows: Vec<i64> = self.padded_rows(seqlen, side).collect();
        Ok(Tensor::from_vec(rows, self.total(), device)?)
    }
}
