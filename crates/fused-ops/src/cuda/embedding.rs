//! The lookup of rows by id, and its backward: cuda/embedding.cuh.

use candle_core::{CudaDevice, CudaStorage, DType, Result, Storage, Tensor};

use super::launch::{grid, Launcher};
use super::memory::{aligned, tensor, uninit, zeros, Locked};
use super::params::{EmbeddingForwardParams, EmbeddingSortParams, EmbeddingSumParams, NULL};
use super::params::{DIGIT_BITS, EMBEDDING_THREADS, EMBEDDING_WORDS, SEGMENT, SORT_THREADS};
use crate::node;

const FILE: &str = "embedding";
const DIGITS: usize = 1 << DIGIT_BITS;

/// Blocks of the sort. Each reads the counts of all, so there are few. Not tuned yet.
const MAX_SORT_BLOCKS: usize = 128;

/// Tokens of a block of the sort. So many keep its counts small next to its keys. Not tuned yet.
const MIN_SHARE: usize = 1024;

/// The GPU of `weight`, if there are kernels for its type and size: they count with 32 bits.
pub(crate) fn device_with_kernels<'a>(ids: &Tensor, weight: &'a Tensor) -> Option<&'a CudaDevice> {
    let sizes = [weight.elem_count(), ids.elem_count() * weight.dims()[1]];
    let fits = weight.elem_count() > 0 && sizes.into_iter().all(|size| u32::try_from(size).is_ok());
    super::device_with_kernels(weight).filter(|_| fits)
}

/// See [`crate::embedding`].
pub(crate) fn embedding(device: &CudaDevice, ids: &Tensor, weight: &Tensor, shape: Vec<usize>) -> Result<Tensor> {
    let (ids, weight) = (ids.contiguous()?, weight.contiguous()?);
    let y = lookup(device, &ids, &weight)?;
    let device = device.clone();
    node::node("embedding", &[&weight], Storage::Cuda(y), shape, move |inputs, dy| {
        let sorted = Sorted::new(&device, &ids, inputs[0].dims()[0])?;
        Ok(vec![Some(sorted.sums(&device, dy, inputs[0])?)])
    })
}

fn lookup(device: &CudaDevice, ids: &Tensor, weight: &Tensor) -> Result<CudaStorage> {
    let tokens = ids.elem_count();
    let &[rows, width] = weight.dims() else { unreachable!("embedding has checked the shape") };
    let mut y = uninit(device, tokens * width, weight.dtype())?;
    {
        let row_bytes = width * weight.dtype().size_in_bytes();
        let (locked_ids, weight) = (Locked::of(ids), Locked::of(weight));
        let stream = device.cuda_stream();
        let mut launcher = Launcher::new(&stream);
        let weight = launcher.read(&weight);
        let fits =
            |word_bytes: &usize| row_bytes.is_multiple_of(*word_bytes) && weight.is_multiple_of(*word_bytes as u64);
        let word_bytes = [16, 4, 2].into_iter().find(fits).expect("a type has at least 2 bytes");
        let params = EmbeddingForwardParams {
            ids: launcher.read(&locked_ids),
            weight,
            y: launcher.write(&mut y),
            tokens: tokens as u32,
            rows: rows as u32,
            words: (row_bytes / word_bytes) as u32,
            wide_ids: wide(ids),
        };
        let config =
            grid((tokens * row_bytes / word_bytes).div_ceil(EMBEDDING_WORDS * EMBEDDING_THREADS), EMBEDDING_THREADS);
        // SAFETY: sizes and addresses are those of one call. Rows are multiples of a word, and begin at one.
        unsafe { launcher.launch(FILE, &format!("embedding_forward_b{word_bytes}"), config, &params)? };
    }
    Ok(y)
}

/// The ids in ascending order, and where each was. Equal ids keep their order.
struct Sorted {
    keys: Tensor,      // (tokens), u32; `rows` for an id that is no row
    positions: Tensor, // (tokens), u32
}

impl Sorted {
    fn new(device: &CudaDevice, ids: &Tensor, rows: usize) -> Result<Self> {
        let tokens = ids.elem_count();
        let share = tokens.div_ceil(MAX_SORT_BLOCKS).next_multiple_of(SORT_THREADS).max(MIN_SHARE);
        let blocks = tokens.div_ceil(share);
        let config = grid(blocks, SORT_THREADS);
        let stream = device.cuda_stream();
        let unsigned = |len| uninit(device, len, DType::U32);
        let mut counts = unsigned(blocks * DIGITS)?;
        let mut sorted: Option<Self> = None;
        // Keys go from 0 to `rows`.
        for shift in (0..=rows.ilog2() as usize).step_by(DIGIT_BITS) {
            let (mut keys, mut positions) = (unsigned(tokens)?, unsigned(tokens)?);
            {
                let locked_ids = Locked::of(ids);
                let last = sorted.as_ref().map(|last| (Locked::of(&last.keys), Locked::of(&last.positions)));
                let mut launcher = Launcher::new(&stream);
                let params = EmbeddingSortParams {
                    ids: if last.is_none() { launcher.read(&locked_ids) } else { NULL },
                    keys: launcher.read_or_null(last.as_ref().map(|(keys, _)| keys)),
                    positions: launcher.read_or_null(last.as_ref().map(|(_, positions)| positions)),
                    counts: launcher.write(&mut counts),
                    sorted_keys: launcher.write(&mut keys),
                    sorted_positions: launcher.write(&mut positions),
                    tokens: tokens as u32,
                    rows: rows as u32,
                    share: share as u32,
                    shift: shift as i32,
                    wide_ids: wide(ids),
                };
                // SAFETY: sizes and addresses are those of one call. `blocks` shares hold all tokens.
                unsafe {
                    launcher.queue(FILE, "embedding_count", config, &params)?;
                    launcher.queue(FILE, "embedding_scatter", config, &params)?;
                }
            }
            sorted = Some(Self { keys: tensor(keys, tokens), positions: tensor(positions, tokens) });
        }
        Ok(sorted.expect("there is a first pass"))
    }

    /// dweight: for each row, the sum of dy at its positions.
    fn sums(&self, device: &CudaDevice, dy: &Tensor, weight: &Tensor) -> Result<Tensor> {
        let (dtype, tokens) = (weight.dtype(), self.keys.elem_count());
        let &[rows, width] = weight.dims() else { unreachable!("embedding has checked the shape") };
        let segments = tokens / SEGMENT;
        let mut runs = zeros(device, 2 * rows, DType::U32)?;
        let mut partial = uninit(device, segments * width, DType::F32)?;
        let mut dweight = uninit(device, rows * width, dtype)?;
        {
            let (dy, keys, positions) = (Locked::of(dy), Locked::of(&self.keys), Locked::of(&self.positions));
            let stream = device.cuda_stream();
            let mut launcher = Launcher::new(&stream);
            let params = EmbeddingSumParams {
                dy: launcher.read(&dy),
                keys: launcher.read(&keys),
                positions: launcher.read(&positions),
                runs: launcher.write(&mut runs),
                partial: launcher.write(&mut partial),
                dweight: launcher.write(&mut dweight),
                tokens: tokens as u32,
                rows: rows as u32,
                width: width as u32,
            };
            let (columns, suffix) = match aligned([&dy].into_iter(), width) {
                true => (width / (16 / dtype.size_in_bytes()), ""),
                false => (width, "_any"),
            };
            let name = |part: &str| format!("embedding_{part}_{}{suffix}", dtype.as_str());
            let threads = |count: usize| grid(count.div_ceil(EMBEDDING_THREADS), EMBEDDING_THREADS);
            // SAFETY: sizes and addresses are those of one call. The kernels with vectors get aligned rows.
            unsafe {
                launcher.queue(FILE, "embedding_runs", threads(tokens), &params)?;
                launcher.queue(FILE, &name("segments"), threads(segments * columns), &params)?;
                launcher.queue(FILE, &name("rows"), threads(rows * columns), &params)?;
            }
        }
        Ok(tensor(dweight, weight.shape()))
    }
}

fn wide(ids: &Tensor) -> i32 {
    i32::from(ids.dtype() == DType::I64)
}
