//! Padded batches: the number of valid keys.

use std::sync::Arc;

use candle_core::{DType, Device, Tensor};

use crate::layout::PaddingSide;
use crate::{Error, Result};

/// The number of valid keys in each sequence of a padded batch (`seqused_k` or `cache_seqlens` of FlashAttention).
///
/// The other keys have no effect, even if they are NaN, and their gradients are 0. Fill unused slots with zeros, though: on Hopper, a NaN
/// in v near the last valid key makes the forward compute its rows a second, slow way. With [`PaddingSide::Right`] the first
/// keys are valid, with [`PaddingSide::Left`] the last ones. [`Attention::key_lengths`](crate::Attention::key_lengths) says
/// when to use this and how masks align.
///
/// ```
/// # use candle_core::{Device, Tensor};
/// # use candle_fa2::{Attention, KeyLengths, Mask, PaddingSide};
/// // Decoding: a cache of 6 slots. The two sequences use 4 and 2 slots, with the new token.
/// let lengths = KeyLengths::new(&[4, 2], PaddingSide::Right, &Device::Cpu)?;
/// let q = Tensor::randn(0f32, 1f32, (2, 1, 8, 64), &Device::Cpu)?;
/// let k = Tensor::randn(0f32, 1f32, (2, 6, 8, 64), &Device::Cpu)?;
/// let o = Attention::new().mask(Mask::Causal).key_lengths(&lengths).forward(&q, &k, &k)?;
/// # assert_eq!(o.dims(), q.dims());
/// # Ok::<(), candle_fa2::Error>(())
/// ```
#[derive(Clone)]
pub struct KeyLengths {
    /// The lengths on the host. The CPU and the checks read them.
    lengths: Arc<[u32]>,
    side: PaddingSide,
    tensor: Tensor,
}

/// Prints only sizes, because a batch may have thousands of lengths.
impl std::fmt::Debug for KeyLengths {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        let mut debug = f.debug_struct("KeyLengths");
        debug.field("batch", &self.batch()).field("side", &self.side);
        debug.finish_non_exhaustive()
    }
}

impl KeyLengths {
    /// From the number of valid keys of each sequence; 0 is allowed. Copies the lengths to `device`, the device of q.
    ///
    /// # Errors
    /// [`Error::KeyLength`] if a length is above `u32::MAX`; an error of Candle if the copy fails.
    ///
    /// The attention call checks the lengths against its tensors. Its errors are [`Error::KeyLengthsBatch`],
    /// [`Error::KeyLength`], [`Error::KeyLengthAlignment`] and [`Error::Device`].
    pub fn new(lengths: &[usize], side: PaddingSide, device: &Device) -> Result<Self> {
        let count = |(sequence, &length): (usize, &usize)| {
            u32::try_from(length).map_err(|_| Error::KeyLength { sequence, length, seqlen_k: u32::MAX as usize })
        };
        let lengths = lengths.iter().enumerate().map(count).collect::<Result<Vec<u32>>>()?;
        let tensor = Tensor::new(lengths.as_slice(), device)?;
        Ok(Self { lengths: lengths.into(), side, tensor })
    }

    /// From a mask of shape `(batch, seqlen_k)`, 1 for a valid key and 0 for padding, like the mask of
    /// [`CuSeqlens::from_mask`](crate::CuSeqlens::from_mask). On a GPU this call waits for the device.
    ///
    /// # Errors
    /// Those of [`CuSeqlens::from_mask`](crate::CuSeqlens::from_mask).
    pub fn from_mask(mask: &Tensor) -> Result<Self> {
        let (lengths, side) = read_mask(mask)?;
        Self::new(&lengths, side, mask.device())
    }

    /// Number of sequences.
    pub fn batch(&self) -> usize {
        self.lengths.len()
    }

    /// The padding side: with `Right` the first keys are valid, with `Left` the last ones.
    pub fn side(&self) -> PaddingSide {
        self.side
    }

    /// The lengths on the device, `u32`, shape `(batch)`.
    pub fn tensor(&self) -> &Tensor {
        &self.tensor
    }

    /// Index of the first valid key of a sequence, and the number of valid keys.
    pub(crate) fn keys(&self, sequence: usize, seqlen_k: usize) -> (usize, usize) {
        let length = self.lengths[sequence] as usize;
        (self.side.start(length, seqlen_k), length)
    }

    /// Returns an error if aligning the last query with the last valid key would be wrong. In self-attention padded on the
    /// right, the last query is padding, so its key is not the last valid one.
    pub(crate) fn check_alignment(&self, seqlen_q: usize) -> Result<()> {
        let shifted = |&length: &u32| self.side == PaddingSide::Right && length > 0 && (length as usize) < seqlen_q;
        match self.lengths.iter().position(shifted) {
            Some(sequence) => {
                Err(Error::KeyLengthAlignment { sequence, length: self.lengths[sequence] as usize, seqlen_q })
            }
            None => Ok(()),
        }
    }

    /// Returns an error unless there are `batch` lengths, each at most `seqlen_k`.
    pub(crate) fn check(&self, batch: usize, seqlen_k: usize) -> Result<()> {
        if self.batch() != batch {
            return Err(Error::KeyLengthsBatch { got: self.batch(), batch });
        }
        match self.lengths.iter().position(|&length| length as usize > seqlen_k) {
            Some(sequence) => Err(Error::KeyLength { sequence, length: self.lengths[sequence] as usize, seqlen_k }),
            None => Ok(()),
        }
    }
}

/// The number of tokens in each row of a padding mask, and the padding side ([`PaddingSide::Right`] without padding).
pub(crate) fn read_mask(mask: &Tensor) -> Result<(Vec<usize>, PaddingSide)> {
    if mask.rank() != 2 {
        return Err(Error::Rank { tensor: "mask", axes: "(batch, seqlen)", shape: mask.dims().to_vec() });
    }
    let seqlen = mask.dims()[1];
    let mut lengths = Vec::new();
    let mut found: Option<(usize, PaddingSide)> = None;
    for (row, values) in mask.to_dtype(DType::F64)?.to_vec2::<f64>()?.into_iter().enumerate() {
        if let Some(column) = values.iter().position(|&value| value != 0.0 && value != 1.0) {
            return Err(Error::MaskValue { row, column, value: values[column] });
        }
        let is_token = |value: &f64| *value == 1.0;
        let length = values.iter().filter(|value| is_token(value)).count();
        lengths.push(length);
        if length == 0 || length == seqlen {
            continue;
        }
        let side = if values[..length].iter().all(is_token) {
            PaddingSide::Right
        } else if values[seqlen - length..].iter().all(is_token) {
            PaddingSide::Left
        } else {
            return Err(Error::MaskHole { row, tokens: length, seqlen });
        };
        match found {
            Some((other, of_other)) if of_other != side => {
                return Err(Error::MaskSides { row, side, other, of_other });
            }
            Some(_) => {}
            None => found = Some((row, side)),
        }
    }
    Ok((lengths, found.map_or(PaddingSide::Right, |(_, side)| side)))
}
