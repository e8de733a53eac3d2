//! The sum of two gradients of one tensor: cuda/sum.cuh.

use candle_core::{CudaDevice, Result, Tensor};

use super::launch::{grid, Launcher};
use super::memory::{tensor, uninit, vectors, Locked};
use super::params::{SumParams, SUM_THREADS, SUM_VECTORS};

/// `a + b`, two tensors of the same shape and type.
pub(crate) fn sum(device: &CudaDevice, a: &Tensor, b: &Tensor) -> Result<Tensor> {
    let (a, b) = (vectors(a)?, vectors(b)?);
    let (len, dtype) = (a.elem_count(), a.dtype());
    let mut y = uninit(device, len, dtype)?;
    {
        let (a, b) = (Locked::of(&a), Locked::of(&b));
        let stream = device.cuda_stream();
        let mut launcher = Launcher::new(&stream);
        let params =
            SumParams { a: launcher.read(&a), b: launcher.read(&b), y: launcher.write(&mut y), len: len as i64 };
        // The first block also has the elements after the last whole vector, so there is at least one block.
        let blocks = (len * dtype.size_in_bytes() / 16).div_ceil(SUM_VECTORS * SUM_THREADS).max(1);
        // SAFETY: all tensors have `len` elements and begin at 16 bytes.
        unsafe { launcher.launch("sum", &format!("sum_{}", dtype.as_str()), grid(blocks, SUM_THREADS), &params)? };
    }
    Ok(tensor(y, a.shape()))
}
