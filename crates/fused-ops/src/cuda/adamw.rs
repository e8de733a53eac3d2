//! Steps of AdamW: cuda/adamw.cuh.

use candle_core::cuda::cudarc::driver::{sys::CUdeviceptr, CudaSlice, DevicePtr};
use candle_core::{CudaDevice, DType, Device, Result, Tensor};

use super::launch::{grid, Launcher};
use super::memory::{tensor, uninit, vectors, Locked};
use super::params::{AdamWBlock, AdamWParams, AdamWTensor, GlobalNormParams, NULL};
use super::params::{ADAM_W_CHUNK, ADAM_W_THREADS, GLOBAL_NORM_THREADS};
use crate::adamw::{Rule, Slot};

const FILE: &str = "adamw";

/// Which chunk each block updates. The parameters of one type are one launch.
#[derive(Debug)]
pub(crate) struct Plan {
    device: CudaDevice,
    launches: Vec<Launch>,
}

#[derive(Debug)]
struct Launch {
    dtype: DType,
    blocks: CudaSlice<AdamWBlock>,
    count: usize,
}

impl Plan {
    /// `None` if the parameters are not on a GPU, or if there is no kernel for the type of one.
    pub(crate) fn new(slots: &[Slot]) -> Result<Option<Self>> {
        const DTYPES: [DType; 3] = [DType::F32, DType::F16, DType::BF16];
        let Some(Device::Cuda(device)) = slots.first().map(|slot| slot.var.device()) else { return Ok(None) };
        if slots.iter().any(|slot| !DTYPES.contains(&slot.var.dtype())) {
            return Ok(None);
        }
        let mut launches = Vec::new();
        for dtype in DTYPES {
            let slots = slots.iter().enumerate().filter(|(_, slot)| slot.var.dtype() == dtype);
            let blocks: Vec<AdamWBlock> = slots
                .flat_map(|(tensor, slot)| {
                    let chunks = slot.var.elem_count().div_ceil(ADAM_W_CHUNK) as u32;
                    (0..chunks).map(move |chunk| AdamWBlock { tensor: tensor as u32, chunk })
                })
                .collect();
            if !blocks.is_empty() {
                launches.push(Launch { dtype, count: blocks.len(), blocks: device.clone_htod(&blocks)? });
            }
        }
        Ok(Some(Self { device: device.clone(), launches }))
    }

    /// Updates every slot. Returns the global norm of the gradients.
    pub(crate) fn step(
        &self,
        slots: &[Slot],
        gradients: &[Tensor],
        rules: &[Rule],
        max_norm: Option<f64>,
    ) -> Result<Tensor> {
        let gradients = gradients.iter().map(vectors).collect::<Result<Vec<_>>>()?;
        let blocks: usize = self.launches.iter().map(|launch| launch.count).sum();
        let scalar = |len| uninit(&self.device, len, DType::F32);
        let (mut partial, mut norm, mut factor) = (scalar(blocks)?, scalar(1)?, scalar(1)?);
        {
            let gradients: Vec<Locked> = gradients.iter().map(Locked::of).collect();
            let parts: Vec<Parts> = slots.iter().map(Parts::of).collect();
            let stream = self.device.cuda_stream();
            let mut launcher = Launcher::new(&stream);
            let table = self.table(&mut launcher, &parts, &gradients, rules)?;
            let (tensors, _guard) = table.device_ptr(&stream);
            let norm_params = GlobalNormParams {
                partial: launcher.write(&mut partial),
                norm: launcher.write(&mut norm),
                factor: launcher.write(&mut factor),
                blocks: blocks as u32,
                max_norm: max_norm.map_or(f32::INFINITY, |limit| limit as f32),
            };
            // SAFETY: the table has the addresses of this step. There is a partial sum for each block.
            unsafe { self.queue(&launcher, tensors, &rules[0], &norm_params)? };
        }
        Ok(tensor(norm, ()))
    }

    /// The table of all parameters on the device. `launcher` holds their memory.
    fn table<'a>(
        &self,
        launcher: &mut Launcher<'a>,
        parts: &'a [Parts],
        gradients: &'a [Locked],
        rules: &[Rule],
    ) -> Result<CudaSlice<AdamWTensor>> {
        let tensors = parts.iter().zip(gradients).zip(rules);
        let tensors: Vec<_> = tensors.map(|((parts, gradient), rule)| parts.params(launcher, gradient, rule)).collect();
        // Up to 64 KiB, 1,170 parameters, the driver copies before it returns and does not wait for the stream.
        self.device.clone_htod(&tensors)
    }

    /// Queues the norm of the gradients, the factor that clips, and the updates. Of `rule`, all but `keep` holds for every parameter.
    ///
    /// # Safety
    /// As [`Launcher::queue`], for the table `tensors` of all slots and for `norm`.
    unsafe fn queue(
        &self,
        launcher: &Launcher,
        tensors: CUdeviceptr,
        rule: &Rule,
        norm: &GlobalNormParams,
    ) -> Result<()> {
        let stream = self.device.cuda_stream();
        let mut first = 0;
        let mut launches = Vec::new();
        for launch in &self.launches {
            let (blocks, guard) = launch.blocks.device_ptr(&stream);
            let params = AdamWParams {
                tensors,
                blocks,
                partial: norm.partial + (first * size_of::<f32>()) as CUdeviceptr,
                factor: norm.factor,
                beta1: rule.beta1 as f32,
                beta2: rule.beta2 as f32,
                of_gradient: (1.0 - rule.beta1) as f32,
                of_square: (1.0 - rule.beta2) as f32,
                rate: rule.rate as f32,
                epsilon: rule.epsilon as f32,
            };
            launches.push((launch, params, guard));
            first += launch.count;
        }
        let for_each_type = |pass: &str| {
            launches.iter().try_for_each(|(launch, params, _)| {
                let name = format!("adamw_{pass}_{}", launch.dtype.as_str());
                // SAFETY: as the caller promises; there is a block for each chunk of each tensor.
                unsafe { launcher.queue(FILE, &name, grid(launch.count, ADAM_W_THREADS), params) }
            })
        };
        for_each_type("norm")?;
        // SAFETY: every block of the launches before has written its partial sum.
        unsafe { launcher.queue(FILE, "global_norm", grid(1, GLOBAL_NORM_THREADS), norm)? };
        for_each_type("update")
    }
}

/// The tensors of a slot. They are written too: all work of a device is on one stream, which keeps the order.
struct Parts<'a> {
    var: Locked<'a>,
    master: Option<Locked<'a>>,
    m: Locked<'a>,
    v: Locked<'a>,
}

impl<'a> Parts<'a> {
    fn of(slot: &'a Slot) -> Self {
        let master = slot.master.as_ref().map(Locked::of);
        Self { var: Locked::of(&slot.var), master, m: Locked::of(&slot.m), v: Locked::of(&slot.v) }
    }

    fn params(&'a self, launcher: &mut Launcher<'a>, gradient: &'a Locked, rule: &Rule) -> AdamWTensor {
        let var = launcher.read(&self.var);
        let (w, rounded) = match &self.master {
            Some(master) => (launcher.read(master), var),
            None => (var, NULL),
        };
        AdamWTensor {
            gradient: launcher.read(gradient),
            w,
            m: launcher.read(&self.m),
            v: launcher.read(&self.v),
            rounded,
            len: gradient.size() as i64,
            keep: rule.keep as f32,
        }
    }
}
