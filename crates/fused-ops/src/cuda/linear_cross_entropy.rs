//! Cross-entropy of a linear layer, chunk by chunk: three products of cuBLAS, and the loss in place between them.

use candle_core::cuda::cudarc::driver::sys::CUdeviceptr;
use candle_core::{CudaDevice, CudaStorage, DType, Result, Storage, Tensor};

use super::cross_entropy::{mean, scaled, LossCall, Mean};
use super::launch::Launcher;
use super::matmul::{product, Matrix, Sizes};
use super::memory::{tensor, uninit, zeros, Locked};
use super::params::CrossEntropyParams;
use crate::loss::CrossEntropy;
use crate::node;

/// See [`CrossEntropy::forward_linear`]. Logits and their gradient have the type of `x`; the gradients of x and weight are summed in
/// f32, over the chunks too.
pub(crate) fn linear_cross_entropy(
    device: &CudaDevice,
    options: &CrossEntropy,
    x: &Tensor,
    weight: &Tensor,
    targets: &Tensor,
) -> Result<Tensor> {
    let (x, weight) = (x.contiguous()?, weight.contiguous()?);
    let (vocab, width) = weight.dims2()?;
    // Rows of logits begin at 16 bytes, whatever the vocabulary.
    let stride = vocab.next_multiple_of(8);
    let call = LossCall::with_stride(device, options, x.dtype(), vocab, stride, targets)?;
    let sums = sums(&call, options.rows_per_chunk(&x, stride, x.dtype()), &x, &weight, width)?;
    let Mean { mean, counted } = mean(device, options, &sums.losses, &call.targets)?;
    let Sums { dx, dweight, .. } = sums;
    node::node("linear_cross_entropy", &[&x, &weight], Storage::Cuda(mean), (), move |inputs, dloss| {
        let scaled = |gradient: &Option<Tensor>, input: &Tensor| {
            gradient.as_ref().map(|gradient| scaled(gradient, dloss, &counted, input)).transpose()
        };
        Ok(vec![scaled(&dx, inputs[0])?, scaled(&dweight, inputs[1])?])
    })
}

/// The loss of each row, and the gradients of their sum for the tracked inputs, in f32.
struct Sums {
    losses: Tensor,
    dx: Option<Tensor>,
    dweight: Option<Tensor>,
}

fn sums(call: &LossCall, rows_per_chunk: usize, x: &Tensor, weight: &Tensor, width: usize) -> Result<Sums> {
    let LossCall { device, dtype, stride, .. } = call;
    let (count, vocab) = (call.targets.elem_count(), weight.elem_count() / width);
    let chunks = count.div_ceil(rows_per_chunk).max(1);
    let rows_per_chunk = count.div_ceil(chunks).max(1); // chunks of about one size
    let mut logits = uninit(device, rows_per_chunk * stride, *dtype)?;
    let mut losses = uninit(device, count, DType::F32)?;
    let mut dx = x.track_op().then(|| uninit(device, count * width, DType::F32)).transpose()?;
    // The first chunk overwrites it. Without rows there is none.
    let mut dweight = match (weight.track_op(), count) {
        (false, _) => None,
        (true, 0) => Some(zeros(device, weight.elem_count(), DType::F32)?),
        (true, _) => Some(uninit(device, weight.elem_count(), DType::F32)?),
    };
    {
        let kept_bytes = call.kept_bytes()?;
        let (x, weight, targets) = (Locked::of(x), Locked::of(weight), Locked::of(&call.targets));
        let stream = device.cuda_stream();
        for start in (0..count).step_by(rows_per_chunk) {
            let size = rows_per_chunk.min(count - start);
            let mut launcher = Launcher::new(&stream);
            let at = |address: CUdeviceptr, element: usize, dtype: DType| {
                address + (element * dtype.size_in_bytes()) as CUdeviceptr
            };
            let matrix = |address, dtype, stride| Matrix { address, dtype, stride, transposed: false };
            let x = matrix(at(launcher.read(&x), start * width, *dtype), *dtype, width);
            let weight = matrix(launcher.read(&weight), *dtype, width);
            let logits = matrix(launcher.write(&mut logits), *dtype, *stride);
            let dx = dx.as_mut().map(|dx| matrix(at(launcher.write(dx), start * width, DType::F32), DType::F32, width));
            let dweight = dweight.as_mut().map(|dweight| matrix(launcher.write(dweight), DType::F32, width));
            let sizes = |m, n, k| Sizes { m, n, k };
            let transposed = |matrix: Matrix| Matrix { transposed: true, ..matrix };

            // SAFETY: the matrices have these sizes, and `launcher` holds their memory until all is queued.
            unsafe { product(device, x, transposed(weight), logits, sizes(size, vocab, width), false)? };
            let tracked = dx.is_some() || dweight.is_some();
            let params = CrossEntropyParams {
                logits: logits.address,
                targets: at(launcher.read(&targets), start, DType::I64),
                losses: at(launcher.write(&mut losses), start, DType::F32),
                dlogits: logits.address,
                kept_bytes: if tracked { kept_bytes as i32 } else { 0 },
                ..call.params(size)
            };
            // SAFETY: as above.
            unsafe { call.queue(&launcher, if tracked { "in_place" } else { "losses" }, &params)? };
            if let Some(dx) = dx {
                // SAFETY: as above.
                unsafe { product(device, logits, weight, dx, sizes(size, width, vocab), false)? };
            }
            if let Some(dweight) = dweight {
                // SAFETY: as above.
                unsafe { product(device, transposed(logits), x, dweight, sizes(vocab, width, size), start > 0)? };
            }
        }
    }
    let gradient = |sum: CudaStorage, like: &Tensor| tensor(sum, like.shape());
    Ok(Sums {
        losses: tensor(losses, count),
        dx: dx.map(|dx| gradient(dx, x)),
        dweight: dweight.map(|dweight| gradient(dweight, weight)),
    })
}
