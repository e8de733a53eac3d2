//! GELU, SwiGLU and GEGLU: cuda/activation.cuh.

use candle_core::cuda::cudarc::driver::LaunchConfig;
use candle_core::{CudaDevice, CudaStorage, Result, Storage, Tensor};

use super::launch::{grid, Launcher};
use super::memory::{tensor, uninit, vectors, Locked};
use super::params::{ActivationBackwardParams, ActivationForwardParams};
use super::params::{ACTIVATION_THREADS, GATED_VECTORS, UNARY_VECTORS};
use crate::node;

const FILE: &str = "activation";

/// The activation `name` of `x`.
pub(crate) fn unary(device: &CudaDevice, name: &'static str, x: &Tensor) -> Result<Tensor> {
    let x = vectors(x)?;
    let y = forward(device, name, &x, None)?;
    let device = device.clone();
    node::node(name, &[&x], Storage::Cuda(y), x.shape(), move |inputs, dy| {
        let (dx, _) = backward(&device, name, inputs[0], None, dy)?;
        Ok(vec![Some(dx)])
    })
}

/// The activation `name` of `gate`, times `up`.
pub(crate) fn gated(device: &CudaDevice, name: &'static str, gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    let (gate, up) = (vectors(gate)?, vectors(up)?);
    let y = forward(device, name, &gate, Some(&up))?;
    let device = device.clone();
    node::node(name, &[&gate, &up], Storage::Cuda(y), gate.shape(), move |inputs, dy| {
        let (dgate, dup) = backward(&device, name, inputs[0], Some(inputs[1]), dy)?;
        Ok(vec![Some(dgate), dup])
    })
}

fn forward(device: &CudaDevice, name: &str, x: &Tensor, up: Option<&Tensor>) -> Result<CudaStorage> {
    let (len, dtype) = (x.elem_count(), x.dtype());
    let mut y = uninit(device, len, dtype)?;
    let vectors_of_thread = if up.is_some() { GATED_VECTORS } else { UNARY_VECTORS };
    {
        let (x, up) = (Locked::of(x), up.map(Locked::of));
        let stream = device.cuda_stream();
        let mut launcher = Launcher::new(&stream);
        let params = ActivationForwardParams {
            x: launcher.read(&x),
            up: launcher.read_or_null(up.as_ref()),
            y: launcher.write(&mut y),
            len: len as i64,
        };
        let config = config(len * dtype.size_in_bytes(), vectors_of_thread);
        // SAFETY: all tensors have `len` elements and begin at 16 bytes.
        unsafe { launcher.launch(FILE, &format!("{name}_forward_{}", dtype.as_str()), config, &params)? };
    }
    Ok(y)
}

/// dx, and dup if there is an `up`.
pub(crate) fn backward(
    device: &CudaDevice,
    name: &str,
    x: &Tensor,
    up: Option<&Tensor>,
    dy: &Tensor,
) -> Result<(Tensor, Option<Tensor>)> {
    let (len, dtype, dy) = (x.elem_count(), x.dtype(), vectors(dy)?);
    let mut dx = uninit(device, len, dtype)?;
    let mut dup = up.map(|_| uninit(device, len, dtype)).transpose()?;
    {
        let (x, up, dy) = (Locked::of(x), up.map(Locked::of), Locked::of(&dy));
        let stream = device.cuda_stream();
        let mut launcher = Launcher::new(&stream);
        let params = ActivationBackwardParams {
            x: launcher.read(&x),
            up: launcher.read_or_null(up.as_ref()),
            dy: launcher.read(&dy),
            dx: launcher.write(&mut dx),
            dup: launcher.write_or_null(dup.as_mut()),
            len: len as i64,
        };
        // SAFETY: as in `forward`.
        unsafe {
            let config = config(len * dtype.size_in_bytes(), 1);
            launcher.launch(FILE, &format!("{name}_backward_{}", dtype.as_str()), config, &params)?;
        }
    }
    Ok((tensor(dx, x.shape()), dup.map(|dup| tensor(dup, x.shape()))))
}

/// The first block also has the elements after the last whole vector, so there is at least one block.
fn config(bytes: usize, vectors_of_thread: usize) -> LaunchConfig {
    let blocks = (bytes / 16).div_ceil(vectors_of_thread * ACTIVATION_THREADS).max(1);
    grid(blocks, ACTIVATION_THREADS)
}
