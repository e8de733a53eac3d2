//! Layer norm and RMS norm: cuda/norm.cuh.

use candle_core::cuda::cudarc::driver::LaunchConfig;
use candle_core::{CudaDevice, CudaStorage, DType, Result, Storage, Tensor};

use super::device;
use super::launch::{grid, Launcher};
use super::memory::{aligned, tensor, uninit, vectors, Locked};
use super::params::{NormBackwardParams, NormFinishParams, NormForwardParams};
use super::params::{FINISH_COLUMNS, FINISH_PARTS, WARP_SIZE};
use super::params::{NORM_ELEMENTS, NORM_LEAST_ELEMENTS, NORM_LESS_ELEMENTS, NORM_STAGES};
use super::params::{NORM_MORE_THREADS, NORM_MOST_THREADS, NORM_THREADS};
use super::sum::sum;
use crate::node;
use crate::norm::{sum_node, Kind, Norm};

const FILE: &str = "norm";

/// The largest width that a kernel holds in registers: a row of a whole block.
const MAX_WIDTH: usize = NORM_THREADS * NORM_ELEMENTS;

/// The GPU of `x`, if there are kernels for its type and width.
pub(crate) fn device_with_kernels(x: &Tensor) -> Option<&CudaDevice> {
    super::device_with_kernels(x).filter(|_| x.dims()[x.rank() - 1] <= MAX_WIDTH)
}

/// See [`Norm::apply`].
pub(crate) fn on_gpu(
    device: &CudaDevice,
    x: &Tensor,
    residual: Option<&Tensor>,
    norm: Norm,
) -> Result<(Tensor, Tensor)> {
    let (x, residual) = (x.contiguous()?, residual.map(Tensor::contiguous).transpose()?);
    let (weight, bias) = (norm.weight.contiguous()?, norm.bias.map(Tensor::contiguous).transpose()?);
    let norm = Norm { weight: &weight, bias: bias.as_ref(), ..norm };
    let Forward { sum, y, statistics } = forward(device, &x, residual.as_ref(), norm)?;
    let sum = match (&residual, sum) {
        (Some(residual), Some(sum)) => sum_node(&x, residual, Storage::Cuda(sum))?,
        _ => x,
    };
    let Norm { kind, eps, .. } = norm;
    let inputs: Vec<&Tensor> = [Some(&sum), Some(&weight), bias.as_ref()].into_iter().flatten().collect();
    let device = device.clone();
    let y = node::adding_node(kind.name(), &inputs, Storage::Cuda(y), sum.shape(), move |inputs, dy, other| {
        let norm = Norm { weight: inputs[1], bias: inputs.get(2).copied(), kind, eps };
        Ok(backward(&device, inputs[0], norm, dy, other, &statistics)?.into())
    })?;
    Ok((sum, y))
}

/// The results of one pass over x, and over the residual if there is one.
struct Forward {
    sum: Option<CudaStorage>,
    y: CudaStorage,
    statistics: Tensor, // (rows, 2) in f32
}

fn forward(device: &CudaDevice, x: &Tensor, residual: Option<&Tensor>, norm: Norm) -> Result<Forward> {
    let Norm { weight, bias, kind, eps } = norm;
    let (dtype, width) = (x.dtype(), weight.elem_count());
    let rows = x.elem_count() / width;
    let mut y = uninit(device, x.elem_count(), dtype)?;
    let mut sum = residual.map(|_| uninit(device, x.elem_count(), dtype)).transpose()?;
    let mut statistics = uninit(device, 2 * rows, DType::F32)?;
    {
        let (x, weight) = (Locked::of(x), Locked::of(weight));
        let (residual, bias) = (residual.map(Locked::of), bias.map(Locked::of));
        let tensors = [Some(&x), Some(&weight), residual.as_ref(), bias.as_ref()];
        let sharing = Sharing::of_forward(width, aligned(tensors.into_iter().flatten(), width));
        let stream = device.cuda_stream();
        let mut launcher = Launcher::new(&stream);
        let params = NormForwardParams {
            x: launcher.read(&x),
            residual: launcher.read_or_null(residual.as_ref()),
            weight: launcher.read(&weight),
            bias: launcher.read_or_null(bias.as_ref()),
            sum: launcher.write_or_null(sum.as_mut()),
            y: launcher.write(&mut y),
            statistics: launcher.write(&mut statistics),
            rows: rows as i64,
            width: width as i32,
            centre: i32::from(matches!(kind, Kind::Layer)),
            eps: eps as f32,
        };
        let config = sharing.config(rows.div_ceil(sharing.groups()), 0);
        // SAFETY: sizes and addresses are those of one call, and `sharing` is that of the kernel.
        unsafe { launcher.launch(FILE, &sharing.kernel("norm_forward", dtype), config, &params)? };
    }
    Ok(Forward { sum, y, statistics: tensor(statistics, (rows, 2)) })
}

/// dx, which includes `other`, dweight, dbias
fn backward(
    device: &CudaDevice,
    x: &Tensor,
    norm: Norm,
    dy: &Tensor,
    other: Option<&Tensor>,
    statistics: &Tensor,
) -> Result<[Option<Tensor>; 3]> {
    let Norm { weight, bias, kind, .. } = norm;
    let (dtype, width) = (x.dtype(), weight.elem_count());
    let rows = x.elem_count() / width;
    let mut dx = uninit(device, x.elem_count(), dtype)?;
    let other = other.map(vectors).transpose()?;
    let (sums, blocks, adds) = {
        let (x, dy, other) = (Locked::of(x), Locked::of(dy), other.as_ref().map(Locked::of));
        let (weight, statistics) = (Locked::of(weight), Locked::of(statistics));
        let sharing = Sharing::of_backward(width, aligned([&x, &dy, &weight].into_iter(), width), dtype);
        let adds = sharing.staged(dtype);
        // A block per multiprocessor, because its sums fill the registers.
        let blocks = device::multiprocessors(device)?.min(rows.div_ceil(sharing.groups()));
        let partial = || uninit(device, blocks * width, DType::F32);
        let (mut partial_dweight, mut partial_dbias) = (partial()?, bias.map(|_| partial()).transpose()?);
        let stream = device.cuda_stream();
        let mut launcher = Launcher::new(&stream);
        let params = NormBackwardParams {
            x: launcher.read(&x),
            dy: launcher.read(&dy),
            other: launcher.read_or_null(other.as_ref().filter(|_| adds)),
            weight: launcher.read(&weight),
            statistics: launcher.read(&statistics),
            dx: launcher.write(&mut dx),
            partial_dweight: launcher.write(&mut partial_dweight),
            partial_dbias: launcher.write_or_null(partial_dbias.as_mut()),
            rows: rows as i64,
            width: width as i32,
            centre: i32::from(matches!(kind, Kind::Layer)),
        };
        let sums_bytes = 2 * sharing.groups() * width * size_of::<f32>();
        let config = sharing.config(blocks, sums_bytes.max(sharing.stages_bytes(dtype)));
        // SAFETY: as in `forward`; the partial sums have a row for each block.
        unsafe { launcher.launch(FILE, &sharing.kernel("norm_backward", dtype), config, &params)? };
        let partial = |sum| tensor(sum, (blocks, width));
        ([Some(partial(partial_dweight)), partial_dbias.map(partial)], blocks, adds)
    };
    let [dweight, dbias] = finish(device, &sums, blocks, weight)?;
    let dx = tensor(dx, x.shape());
    let dx = match &other {
        Some(other) if !adds => sum(device, &dx, other)?,
        _ => dx,
    };
    Ok([Some(dx), dweight, dbias])
}

/// dweight and dbias from their partial sums, in the shape and type of `weight`.
fn finish(
    device: &CudaDevice,
    partial: &[Option<Tensor>; 2],
    blocks: usize,
    weight: &Tensor,
) -> Result<[Option<Tensor>; 2]> {
    let (dtype, width) = (weight.dtype(), weight.elem_count());
    let [partial_dweight, partial_dbias] = partial.each_ref().map(|sums| sums.as_ref().map(Locked::of));
    let mut dweight = uninit(device, width, dtype)?;
    let mut dbias = partial_dbias.as_ref().map(|_| uninit(device, width, dtype)).transpose()?;
    let blocks_of_sum = width.div_ceil(FINISH_COLUMNS);
    let grid_dim = (blocks_of_sum as u32, 1 + u32::from(dbias.is_some()), 1);
    let config = LaunchConfig { grid_dim, ..grid(blocks_of_sum, FINISH_COLUMNS * FINISH_PARTS) };
    let stream = device.cuda_stream();
    let mut launcher = Launcher::new(&stream);
    let params = NormFinishParams {
        partial_dweight: launcher.read_or_null(partial_dweight.as_ref()),
        partial_dbias: launcher.read_or_null(partial_dbias.as_ref()),
        dweight: launcher.write(&mut dweight),
        dbias: launcher.write_or_null(dbias.as_mut()),
        blocks: blocks as i32,
        width: width as i32,
    };
    // SAFETY: the grid has a second row only if there is a dbias.
    unsafe { launcher.launch(FILE, &format!("norm_finish_{}", dtype.as_str()), config, &params)? };
    let vector = |sum| tensor(sum, weight.shape());
    Ok([Some(vector(dweight)), dbias.map(vector)])
}

/// How the threads of a block share rows: `Rows` of cuda/norm.cuh.
#[derive(Clone, Copy)]
struct Sharing {
    warps: usize, // of a row
    threads: usize,
    elements: usize, // of a row, for each thread
    vectors: bool,   // whether they are loaded as vectors
}

impl Sharing {
    fn of_forward(width: usize, aligned: bool) -> Self {
        debug_assert!(width <= MAX_WIDTH);
        Self::with(NORM_THREADS, NORM_ELEMENTS, width, aligned)
    }

    /// The kernel with the fewest idle lanes.
    fn of_backward(width: usize, aligned: bool, dtype: DType) -> Self {
        if !aligned {
            return Self::of_forward(width, false);
        }
        let more_threads = Self::with(NORM_MORE_THREADS, NORM_LESS_ELEMENTS, width, true);
        let other = match dtype {
            DType::F32 => Self::with(NORM_THREADS, NORM_ELEMENTS, width, true),
            _ => Self::with(NORM_MOST_THREADS, NORM_LEAST_ELEMENTS, width, true),
        };
        match more_threads.shares_a_block() && more_threads.row_elements() <= other.row_elements() {
            true => more_threads,
            false => other,
        }
    }

    fn with(threads: usize, elements: usize, width: usize, aligned: bool) -> Self {
        let warps = width.div_ceil(elements * WARP_SIZE).next_power_of_two();
        Self { warps, threads, elements, vectors: aligned }
    }

    /// Whether rows share a block without a rest.
    fn shares_a_block(self) -> bool {
        self.threads.is_multiple_of(self.warps * WARP_SIZE)
    }

    /// Elements that the threads of a row have room for.
    fn row_elements(self) -> usize {
        self.warps * WARP_SIZE * self.elements
    }

    /// Whether a backward copies rows through shared memory and can add another gradient. Kernels for f32 and for single elements do
    /// neither, because they have no registers left for it.
    fn staged(self, dtype: DType) -> bool {
        self.vectors && dtype != DType::F32
    }

    /// Shared memory of a backward for rows on their way: `Stages` of cuda/norm.cuh.
    fn stages_bytes(self, dtype: DType) -> usize {
        match self.staged(dtype) {
            true => NORM_STAGES * 2 * self.threads * self.elements * dtype.size_in_bytes(),
            false => 0,
        }
    }

    /// Rows that a block has at once.
    fn groups(self) -> usize {
        self.threads / (self.warps * WARP_SIZE)
    }

    fn kernel(self, pass: &str, dtype: DType) -> String {
        let elements = if self.vectors { self.elements.to_string() } else { "single".to_string() };
        format!("{pass}_{}_w{}_{elements}", dtype.as_str(), self.warps)
    }

    fn config(self, blocks: usize, shared_bytes: usize) -> LaunchConfig {
        LaunchConfig { shared_mem_bytes: shared_bytes as u32, ..grid(blocks, self.threads) }
    }
}
