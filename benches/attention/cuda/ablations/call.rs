//! One call of attention, launched by hand: the parameters for any kernel, and the check of its results.

use std::sync::Arc;

use anyhow::{bail, ensure, Context, Result};
use candle_core::cuda::cudarc::driver::{CudaStream, DevicePtr, DeviceRepr, LaunchConfig, PushKernelArg};
use candle_core::cuda::CudaDType;
use candle_core::{CudaStorage, DType, Storage, Tensor, D};
use candle_fa2::testing::cuda::{
    BwdParams, ConvertParams, DeltaParams, FwdParams, Shape, ShapeAddresses, Strides, NULL,
};
use candle_fa2::testing::{self, Arch, CudaPlan, Problem};
use half::{bf16, f16};

use super::super::gpu::Gpu;
use super::images::{Images, Kernel, RESCALE};
use crate::cases::{Case, Pass};
use crate::inputs::{values, Inputs};
use crate::peers::{self, Answer};

/// Limit of a row's error in rounding steps. The error is divided by the row's norm plus the root mean square of all rows'
/// norms. Each of the two results rounds every p or ds by at most half a step, and then the result: at most one step each.
/// A tile of 64 keys lost among 16k makes 8 steps, and more among fewer keys.
const STEPS: f64 = 3.0;

/// `Statistics` of benches/ablations/softmax.cuh: the second argument of every kernel of ablations.cu. Both files assert the layout.
#[repr(C)]
#[derive(Clone, Copy)]
struct Statistics {
    max: u64,
    sum: u64,
}

const _: () = assert!(size_of::<Statistics>() == 16 && std::mem::offset_of!(Statistics, sum) == 8);

// SAFETY: it is `#[repr(C)]` and has two addresses, as the struct of the kernels.
unsafe impl DeviceRepr for Statistics {}

impl Statistics {
    fn of(max: &Tensor, sum: &Tensor) -> Result<Self> {
        Ok(Self { max: address(max)?, sum: address(sum)? })
    }
}

pub struct Call<'a> {
    pub case: &'a Case,
    pub plan: CudaPlan,
    pub stream: Arc<CudaStream>,
    inputs: &'a Inputs,
    /// Our results.
    answer: Answer,
    lse: Tensor,
    problem: Problem,
    /// If there is a backward.
    delta: Option<Tensor>,
}

/// One launch of a kernel, with the memory that it writes.
pub struct Work {
    params: Params,
    statistics: Statistics,
    /// The tensors of `statistics`. A backward takes the maximum in place of lse.
    max: Tensor,
    sum: Tensor,
    outputs: Outputs,
}

enum Params {
    Forward(Box<FwdParams>),
    Backward(Box<BwdParams>),
}

enum Outputs {
    Forward { o: Tensor, lse: Tensor },
    Backward { convert: Box<ConvertParams>, grads: [Tensor; 3], _dq_accum: Tensor },
}

impl<'a> Call<'a> {
    pub fn new(case: &'a Case, inputs: &'a Inputs, answer: Answer, lse: Tensor, gpu: &Gpu) -> Result<Self> {
        let problem = testing::problem(&peers::attention(case), &inputs.q, &inputs.k, &inputs.v)?;
        ensure!(case.num_heads_k() == case.num_heads, "the variants' grids are for heads that share no keys");
        // The variants use the templates in cuda/sm80, so they are compared with the kernels of sm80.
        let plan = CudaPlan::choose(&problem, &testing::device_caps(&gpu.device)?, |kernel| kernel.arch == Arch::Sm80)?;
        let stream = gpu.device.as_cuda_device()?.cuda_stream();
        let mut call = Self { case, plan, stream, inputs, answer, lse, problem, delta: None };
        if call.answer.grads.is_some() {
            call.delta = Some(call.compute_delta()?);
        }
        Ok(call)
    }

    /// The arguments and the memory for one launch of `kernel`. Outputs start as NaN, so that missing ones are found. dq_accum starts
    /// as zeros, because the kernel adds to it.
    pub fn work(&self, kernel: &Kernel, images: &Images) -> Result<Work> {
        match kernel.pass {
            Pass::Forward => self.forward(),
            _ => self.backward(kernel, images),
        }
    }

    /// Queues the kernel.
    pub fn launch(&self, kernel: &Kernel, work: &Work) -> Result<()> {
        let (grid, statistics) = (kernel.grid(self.case), kernel.variant.map(|_| &work.statistics));
        match &work.params {
            Params::Forward(params) => self.queue(kernel, grid, &**params, statistics),
            Params::Backward(params) => self.queue(kernel, grid, &**params, statistics),
        }
    }

    /// Compares the kernel's results with ours: the worst row of [`Self::compare`].
    ///
    /// # Errors
    /// If a row is off by more than rounding explains.
    pub fn check(&self, kernel: &Kernel, work: &Work) -> Result<f64> {
        match &work.outputs {
            Outputs::Forward { o, lse } => {
                let lse = if kernel.max_and_sum() { (&work.max + work.sum.log()?)? } else { lse.clone() };
                self.compare_lse(&lse)?;
                self.compare("o", o, &self.answer.o)
            }
            Outputs::Backward { convert, grads, .. } => {
                let convert_launch = self.launch_of(testing::Pass::Convert)?;
                self.queue(&self.of_crate(convert_launch.kernel)?, convert_launch.grid, &**convert, None)?;
                let want = self.answer.grads.as_ref().context("a case with a backward has gradients")?;
                let mut worst = 0f64;
                for ((name, got), want) in ["dq", "dk", "dv"].into_iter().zip(grads).zip(want) {
                    worst = worst.max(self.compare(name, got, want)?);
                }
                Ok(worst)
            }
        }
    }

    fn shape(&self) -> Shape {
        Shape::new(&self.problem, ShapeAddresses::default())
    }

    /// NaN in the shape of lse.
    fn statistics(&self) -> Result<Tensor> {
        poisoned_like(&self.lse)
    }

    /// The crate's own launch of a pass.
    fn launch_of(&self, pass: testing::Pass) -> Result<&testing::Launch> {
        self.plan.launch(pass).with_context(|| format!("no kernel computes {pass:?}"))
    }

    fn of_crate(&self, kernel: &'static testing::Kernel) -> Result<Kernel> {
        Kernel::of_crate(kernel, Pass::Backward, self.stream.context())
    }

    /// Computes delta with the crate's own kernel.
    fn compute_delta(&self) -> Result<Tensor> {
        let delta = self.statistics()?;
        let strides: Strides = self.problem.contiguous_q().into();
        let params = DeltaParams {
            o: address(&self.answer.o)?,
            do_: address(&self.inputs.do_)?,
            dlse: NULL,
            delta: address(&delta)?,
            o_strides: strides,
            do_strides: strides,
            shape: self.shape(),
        };
        let delta_launch = self.launch_of(testing::Pass::Delta)?;
        self.queue(&self.of_crate(delta_launch.kernel)?, delta_launch.grid, &params, None)?;
        Ok(delta)
    }

    fn forward(&self) -> Result<Work> {
        let Inputs { q, k, v, .. } = self.inputs;
        let o = poisoned_like(q)?;
        let (lse, max, sum) = (self.statistics()?, self.statistics()?, self.statistics()?);
        let params = FwdParams {
            q: address(q)?,
            k: address(k)?,
            v: address(v)?,
            o: address(&o)?,
            lse: address(&lse)?,
            q_strides: self.problem.q.into(),
            k_strides: self.problem.k.into(),
            v_strides: self.problem.v.into(),
            o_strides: self.problem.contiguous_o().into(),
            shape: self.shape(),
            o_is_f32: 0,
        };
        Ok(Work {
            params: Params::Forward(Box::new(params)),
            statistics: Statistics::of(&max, &sum)?,
            max,
            sum,
            outputs: Outputs::Forward { o, lse },
        })
    }

    fn backward(&self, kernel: &Kernel, images: &Images) -> Result<Work> {
        let Inputs { q, k, v, do_ } = self.inputs;
        let delta = self.delta.as_ref().context("a case with a backward has a delta")?;
        // The maximum takes the place of lse.
        let (max, sum) = match kernel.max_and_sum() {
            true => self.max_and_sum(images)?,
            false => (self.lse.clone(), self.statistics()?),
        };
        let plan = self.plan.backward.as_ref().context("a case with a backward has its plan")?;
        let dq_accum = Tensor::zeros(plan.dq_accum.elements(), DType::F32, q.device())?;
        let grads = [poisoned_like(q)?, poisoned_like(k)?, poisoned_like(v)?];
        let strides: Strides = self.problem.contiguous_q().into();
        let softmax_scale = self.problem.softmax_scale as f32;
        let params = BwdParams {
            q: address(q)?,
            k: address(k)?,
            v: address(v)?,
            do_: address(do_)?,
            lse: address(&max)?,
            delta: address(delta)?,
            dq_accum: address(&dq_accum)?,
            semaphores: NULL,
            dk: address(&grads[1])?,
            dv: address(&grads[2])?,
            q_strides: self.problem.q.into(),
            k_strides: self.problem.k.into(),
            v_strides: self.problem.v.into(),
            do_strides: strides,
            dk_strides: self.problem.contiguous_k().into(),
            dv_strides: self.problem.contiguous_v().into(),
            dq_groups: plan.dq_accum.groups.into(),
            dq_tiles: plan.dq_tiles.into(),
            shape: self.shape(),
            softmax_scale,
        };
        let convert = ConvertParams {
            dq_accum: params.dq_accum,
            dq: address(&grads[0])?,
            dq_strides: strides,
            dq_groups: params.dq_groups,
            shape: params.shape,
            dq_accum_head_dim: plan.dq_accum.head_dim as i32,
            softmax_scale,
        };
        Ok(Work {
            params: Params::Backward(Box::new(params)),
            statistics: Statistics::of(&max, &sum)?,
            max,
            sum,
            outputs: Outputs::Backward { convert: Box::new(convert), grads, _dq_accum: dq_accum },
        })
    }

    /// The row maxima and row sums, from the forward that keeps them.
    fn max_and_sum(&self, images: &Images) -> Result<(Tensor, Tensor)> {
        let kernel = images.kernel(self.case, &RESCALE)?.context("the forward with maximum and sum does not fit")?;
        let work = self.forward()?;
        self.launch(&kernel, &work)?;
        Ok((work.max, work.sum))
    }

    fn queue(
        &self,
        kernel: &Kernel,
        grid: (u32, u32, u32),
        params: &impl DeviceRepr,
        statistics: Option<&Statistics>,
    ) -> Result<()> {
        let config = LaunchConfig {
            grid_dim: grid,
            block_dim: (kernel.threads as u32, 1, 1),
            shared_mem_bytes: kernel.shared_bytes as u32,
        };
        let mut builder = self.stream.launch_builder(&kernel.function);
        builder.arg(params);
        if let Some(statistics) = statistics {
            builder.arg(statistics);
        }
        // SAFETY: the arguments are those of the kernel: the parameters of its pass, and the statistics for a variant.
        // `Call` and `Work` hold the tensors of all addresses, in the shapes of `Problem`. Candle's stream runs one kernel
        // after the other.
        unsafe { builder.launch(config)? };
        Ok(())
    }

    fn compare_lse(&self, got: &Tensor) -> Result<()> {
        // As in `sample::check`. Kernels that compute lse in f32 are far more exact.
        let limit = 0.5 * self.case.precision().half_step();
        let (got, want) = (values(got)?, values(&self.lse)?);
        let off = got.iter().zip(&want).map(|(got, want)| (got - want).abs());
        let worst = off.fold(0f64, |worst, off| if off.is_nan() || off > worst { off } else { worst });
        ensure!(worst <= limit, "lse differs from ours by up to {worst:.2e}, limit {limit:.2e}");
        Ok(())
    }

    /// The largest error of a row, divided by the row's norm plus the root mean square of all rows' norms.
    fn compare(&self, name: &str, got: &Tensor, want: &Tensor) -> Result<f64> {
        let (got, want) = (got.to_dtype(DType::F32)?, want.to_dtype(DType::F32)?);
        let lengths = |rows: Tensor| anyhow::Ok(values(&rows.sqr()?.sum(D::Minus1)?.sqrt()?)?);
        let (off, lengths) = (lengths((got - &want)?)?, lengths(want)?);
        let usual = (lengths.iter().map(|length| length * length).sum::<f64>() / lengths.len() as f64).sqrt();
        let (mut worst, mut at) = (0f64, 0);
        let mut wrong = 0;
        let limit = STEPS * self.case.precision().half_step();
        for (row, (off, length)) in off.iter().zip(&lengths).enumerate() {
            let share = off / (length + usual);
            if share.is_nan() || share > worst {
                (worst, at) = (share, row);
            }
            wrong += usize::from(share.is_nan() || share > limit);
        }
        let (token, head) = (at / self.case.num_heads, at % self.case.num_heads);
        ensure!(
            wrong == 0,
            "{name} differs from ours: [row {token}, head {head}] by {worst:.2e} of its norm plus the usual norm, limit \
             {limit:.2e}; {wrong} of {} rows are over it",
            off.len()
        );
        Ok(worst)
    }
}

/// NaN in the shape and type of a tensor.
fn poisoned_like(tensor: &Tensor) -> Result<Tensor> {
    Ok(Tensor::full(f32::NAN, tensor.shape(), tensor.device())?.to_dtype(tensor.dtype())?)
}

/// The address of a contiguous tensor on the GPU.
fn address(tensor: &Tensor) -> Result<u64> {
    fn of<T: CudaDType>(storage: &CudaStorage, first: usize) -> Result<u64> {
        let stream = storage.device.cuda_stream();
        let (address, _order) = T::as_cuda_slice(storage)?.device_ptr(&stream);
        Ok(address + (first * size_of::<T>()) as u64)
    }
    let (storage, layout) = tensor.storage_and_layout();
    let Storage::Cuda(storage) = &*storage else { bail!("a tensor of this benchmark is not on the GPU") };
    ensure!(layout.is_contiguous(), "a tensor of this benchmark is not contiguous");
    match tensor.dtype() {
        DType::F32 => of::<f32>(storage, layout.start_offset()),
        DType::F16 => of::<f16>(storage, layout.start_offset()),
        DType::BF16 => of::<bf16>(storage, layout.start_offset()),
        other => bail!("no kernel takes {other:?}"),
    }
}
