//! Cross-entropy of logits: cuda/cross_entropy.cuh.

use candle_core::cuda::cudarc::driver::LaunchConfig;
use candle_core::{CudaDevice, CudaStorage, DType, Result, Storage, Tensor};

use super::device;
use super::launch::{grid, Launcher};
use super::memory::{tensor, uninit, vectors, Locked};
use super::params::{CrossEntropyMeanParams, CrossEntropyParams, ScaleParams, NULL};
use super::params::{LOSS_THREADS, MEAN_THREADS, SCALE_THREADS};
use crate::loss::CrossEntropy;
use crate::node;

const FILE: &str = "cross_entropy";

const RESERVED_BYTES: usize = 2048; // static shared memory of the kernel, rounded up

/// See [`CrossEntropy::forward`].
pub(crate) fn cross_entropy(
    device: &CudaDevice,
    options: &CrossEntropy,
    logits: &Tensor,
    targets: &Tensor,
) -> Result<Tensor> {
    // The backward writes 16 bytes of dlogits where it reads 16 bytes of logits, and dlogits begins at 16 bytes.
    let logits = vectors(logits)?;
    let call = LossCall::new(device, options, &logits, targets)?;
    let count = call.targets.elem_count();
    let mut losses = uninit(device, count, DType::F32)?;
    let mut lse = uninit(device, count, DType::F32)?;
    {
        let (logits, targets) = (Locked::of(&logits), Locked::of(&call.targets));
        let stream = device.cuda_stream();
        let mut launcher = Launcher::new(&stream);
        let params = CrossEntropyParams {
            logits: launcher.read(&logits),
            targets: launcher.read(&targets),
            losses: launcher.write(&mut losses),
            lse: launcher.write(&mut lse),
            ..call.params(count)
        };
        // SAFETY: sizes and addresses are those of one call.
        unsafe { call.queue(&launcher, "losses", &params)? };
    }
    let lse = tensor(lse, count);
    let Mean { mean, counted } = mean(device, options, &tensor(losses, count), &call.targets)?;
    node::node("cross_entropy", &[&logits], Storage::Cuda(mean), (), move |inputs, dloss| {
        let logits = inputs[0];
        let mut dlogits = uninit(&call.device, logits.elem_count(), logits.dtype())?;
        {
            let (logits, targets, lse) = (Locked::of(logits), Locked::of(&call.targets), Locked::of(&lse));
            let (dloss, counted) = (Locked::of(dloss), Locked::of(&counted));
            let stream = call.device.cuda_stream();
            let mut launcher = Launcher::new(&stream);
            let params = CrossEntropyParams {
                logits: launcher.read(&logits),
                targets: launcher.read(&targets),
                lse: launcher.read(&lse),
                dlogits: launcher.write(&mut dlogits),
                dloss: launcher.read(&dloss),
                counted: launcher.read(&counted),
                ..call.params(count)
            };
            // SAFETY: as above.
            unsafe { call.queue(&launcher, "gradients", &params)? };
        }
        Ok(vec![Some(tensor(dlogits, logits.shape()))])
    })
}

/// The device, the options, the sizes and the targets that all launches of one loss share.
pub(super) struct LossCall {
    pub(super) device: CudaDevice,
    options: CrossEntropy,
    pub(super) dtype: DType,
    vocab: usize,
    /// Elements from one row of logits to the next.
    pub(super) stride: usize,
    /// i64, one axis, contiguous.
    pub(super) targets: Tensor,
}

impl LossCall {
    fn new(device: &CudaDevice, options: &CrossEntropy, logits: &Tensor, targets: &Tensor) -> Result<Self> {
        let vocab = logits.dims()[logits.rank() - 1];
        Self::with_stride(device, options, logits.dtype(), vocab, vocab, targets)
    }

    pub(super) fn with_stride(
        device: &CudaDevice,
        options: &CrossEntropy,
        dtype: DType,
        vocab: usize,
        stride: usize,
        targets: &Tensor,
    ) -> Result<Self> {
        let targets = targets.to_dtype(DType::I64)?.flatten_all()?.contiguous()?;
        Ok(Self { device: device.clone(), options: *options, dtype, vocab, stride, targets })
    }

    /// The parameters of a launch over `rows` rows, without addresses.
    pub(super) fn params(&self, rows: usize) -> CrossEntropyParams {
        CrossEntropyParams {
            logits: NULL,
            targets: NULL,
            losses: NULL,
            lse: NULL,
            dlogits: NULL,
            dloss: NULL,
            counted: NULL,
            rows: rows as i64,
            stride: self.stride as i64,
            ignore_index: ignored(&self.options),
            vocab: self.vocab as i32,
            kept_bytes: 0,
            label_smoothing: self.options.label_smoothing as f32,
            z_loss: self.options.z_loss as f32,
            softcap: self.options.softcap.unwrap_or(0.0) as f32,
        }
    }

    /// Bytes of a row that fit the shared memory of a thread block, next to `RESERVED_BYTES`.
    pub(super) fn kept_bytes(&self) -> Result<usize> {
        let row = (self.vocab * self.dtype.size_in_bytes()).next_multiple_of(16);
        Ok(row.min(device::shared_bytes(&self.device)? - RESERVED_BYTES) / 16 * 16)
    }

    /// Queues a pass.
    ///
    /// # Safety
    /// As [`Launcher::queue`].
    pub(super) unsafe fn queue(&self, launcher: &Launcher, pass: &str, params: &CrossEntropyParams) -> Result<()> {
        let options = self.options.softcap.is_some() || self.options.label_smoothing > 0.0;
        let name = format!("cross_entropy_{pass}_{}{}", self.dtype.as_str(), if options { "_options" } else { "" });
        let config =
            LaunchConfig { shared_mem_bytes: params.kept_bytes as u32, ..grid(params.rows as usize, LOSS_THREADS) };
        // SAFETY: as the caller promises.
        unsafe { launcher.queue(FILE, &name, config, params) }
    }
}

/// A value that no target has, if nothing is ignored.
fn ignored(options: &CrossEntropy) -> i64 {
    options.ignore_index.unwrap_or(i64::MIN)
}

/// The mean loss, (), and its divisor, ().
pub(super) struct Mean {
    pub(super) mean: CudaStorage,
    pub(super) counted: Tensor,
}

/// The mean of `losses` over the rows that are not ignored, 0 if there are none.
pub(super) fn mean(device: &CudaDevice, options: &CrossEntropy, losses: &Tensor, targets: &Tensor) -> Result<Mean> {
    let (mut mean, mut counted) = (uninit(device, 1, DType::F32)?, uninit(device, 1, DType::F32)?);
    {
        let (losses, targets) = (Locked::of(losses), Locked::of(targets));
        let stream = device.cuda_stream();
        let mut launcher = Launcher::new(&stream);
        let params = CrossEntropyMeanParams {
            losses: launcher.read(&losses),
            targets: launcher.read(&targets),
            mean: launcher.write(&mut mean),
            counted: launcher.write(&mut counted),
            rows: targets.size() as i64,
            ignore_index: ignored(options),
        };
        let config = grid(1, MEAN_THREADS);
        // SAFETY: there is a loss for each target.
        unsafe { launcher.launch(FILE, "cross_entropy_mean_of_rows", config, &params)? };
    }
    Ok(Mean { mean, counted: tensor(counted, ()) })
}

/// `from * dloss / counted` in the shape and type of `like`. `from` is in f32.
pub(super) fn scaled(from: &Tensor, dloss: &Tensor, counted: &Tensor, like: &Tensor) -> Result<Tensor> {
    let candle_core::Device::Cuda(device) = like.device() else { unreachable!("the loss ran on a GPU") };
    let mut to = uninit(device, like.elem_count(), like.dtype())?;
    {
        let (from, dloss, counted) = (Locked::of(from), Locked::of(dloss), Locked::of(counted));
        let stream = device.cuda_stream();
        let mut launcher = Launcher::new(&stream);
        let params = ScaleParams {
            from: launcher.read(&from),
            to: launcher.write(&mut to),
            dloss: launcher.read(&dloss),
            counted: launcher.read(&counted),
            len: like.elem_count() as i64,
        };
        let vectors = (like.elem_count() * like.dtype().size_in_bytes()).div_ceil(16);
        let config = grid(vectors.div_ceil(SCALE_THREADS), SCALE_THREADS);
        // SAFETY: both have `len` elements.
        unsafe { launcher.launch(FILE, &format!("scale_{}", like.dtype().as_str()), config, &params)? };
    }
    Ok(tensor(to, like.shape()))
}
