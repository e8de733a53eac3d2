//! Rotary position embedding: cuda/rotary.cuh.

use candle_core::backend::BackendStorage;
use candle_core::cuda::cudarc::driver::sys::CUdeviceptr;
use candle_core::{CudaDevice, CudaStorage, DType, Layout, Result, Storage, Tensor};

use super::launch::{grid, Launcher};
use super::memory::{tensor, uninit, Locked};
use super::params::{RotaryParams, HALVES_ITEMS, INTERLEAVED_ITEMS, ROTARY_THREADS};
use crate::node;
use crate::rotary::{RotaryOrder, Tables};

/// The GPU of `x`, if there are kernels for its type and size: they count with 32 bits.
pub(crate) fn device_with_kernels(x: &Tensor) -> Option<&CudaDevice> {
    super::device_with_kernels(x).filter(|_| u32::try_from(x.elem_count()).is_ok())
}

/// See [`crate::rotary`]. `x` is contiguous.
pub(crate) fn rotary(device: &CudaDevice, x: &Tensor, tables: Tables) -> Result<Tensor> {
    let y = rotated(device, x, &tables, 1.0)?;
    let device = device.clone();
    node::node("rotary", &[x], Storage::Cuda(y), x.shape(), move |_, dy| {
        Ok(vec![Some(tensor(rotated(&device, dy, &tables, -1.0)?, dy.shape()))])
    })
}

/// `x` rotated by the angles of the tables, times `sign`.
fn rotated(device: &CudaDevice, x: &Tensor, tables: &Tables, sign: f32) -> Result<CudaStorage> {
    let mut y = uninit(device, x.elem_count(), x.dtype())?;
    {
        let locked = Locked::of(x);
        let stream = device.cuda_stream();
        let mut launcher = Launcher::new(&stream);
        let (from, to) = (launcher.read(&locked), launcher.write(&mut y));
        launch(launcher, [from, to], x.dims(), x.dtype(), tables, sign)?;
    }
    Ok(y)
}

/// See [`crate::rotary_in_place`]. The layout of `x` is contiguous.
pub(crate) fn rotate_in_place(x: &mut CudaStorage, layout: &Layout, tables: &Tables) -> Result<()> {
    let (dtype, stream) = (x.dtype(), x.device().cuda_stream());
    let mut launcher = Launcher::new(&stream);
    let x = launcher.write(x) + (layout.start_offset() * dtype.size_in_bytes()) as CUdeviceptr;
    launch(launcher, [x, x], layout.dims(), dtype, tables, 1.0)
}

/// Queues the kernel for `x` and `y` with shape `dims`.
fn launch(
    launcher: Launcher,
    [x, y]: [CUdeviceptr; 2],
    dims: &[usize],
    dtype: DType,
    tables: &Tables,
    sign: f32,
) -> Result<()> {
    let &[.., seqlen, num_heads, head_dim] = dims else { unreachable!("check_rotary has compared the shapes") };
    let (rows, pairs) = (dims.iter().product::<usize>() / head_dim.max(1), tables.cos.dims()[1]);
    let (cos, sin) = (Locked::of(&tables.cos), Locked::of(&tables.sin));
    let mut launcher = launcher; // drops before the locks
    let params = RotaryParams {
        x,
        y,
        cos: launcher.read(&cos),
        sin: launcher.read(&sin),
        rows: rows as u32,
        num_heads: num_heads as u32,
        seqlen: seqlen as u32,
        head_dim: head_dim as u32,
        pairs: pairs as u32,
        sign,
    };
    let vector = 16 / dtype.size_in_bytes();
    // Values that must be whole vectors, and the items of a thread.
    let (order, part, items) = match tables.order {
        RotaryOrder::HalfSplit => ("halves", pairs, HALVES_ITEMS),
        RotaryOrder::Interleaved => ("interleaved", 2 * pairs, INTERLEAVED_ITEMS),
    };
    let aligned = [params.x, params.y, params.cos, params.sin].iter().all(|address| address % 16 == 0);
    // A thread has two vectors. If the shapes allow none, an item is one pair.
    let (suffix, pairs_of_thread) = match aligned && part % vector == 0 && head_dim % vector == 0 {
        true => ("", vector),
        false => ("_any", items),
    };
    // Not one block too many: the kernel counts its items with 32 bits, and must not begin at 0 again.
    let blocks = (rows * pairs).div_ceil(pairs_of_thread * ROTARY_THREADS).max(1);
    let config = grid(blocks, ROTARY_THREADS);
    let name = format!("rotary_{order}_{}{suffix}", dtype.as_str());
    // SAFETY: check_rotary has compared the shapes. The kernel with vectors gets aligned rows.
    unsafe { launcher.launch("rotary", &name, config, &params) }
}
