//! Queues the backward: delta, then dk, dv and dq_accum, then dq.

use candle_core::cuda::cudarc::driver::sys::CUdeviceptr;
use candle_core::cuda::cudarc::driver::{CudaSlice, DeviceRepr};
use candle_core::{CudaDevice, CudaStorage, Result, Tensor};

use super::call::{Call, SideTensors};
use super::counters::Counters;
use super::launch::{address_or_null, Launcher};
use super::memory::{uninit, zeros, Element, Locked};
use super::params::{BwdParams, ConvertParams, DeltaParams, Sm90BwdParams};
use super::tensor_map::TensorMaps;
use crate::instances::{Parameters, Pass};
use crate::output::Output;
use crate::plan::{readable, BackwardPlan, Launch};
use crate::problem::{Lengths, Problem, Strides};
use crate::tensors::{BackwardInputs, Gradients, Inputs};

/// Queues a backward that writes dq, dk and dv into three tensors.
pub(super) fn separate<T: Element>(
    call: &Call,
    output: Output,
    tensors: BackwardInputs<Tensor>,
) -> Result<Gradients<CudaStorage>> {
    let (problem, device) = (call.problem, tensors.inputs.q.device().as_cuda_device()?);
    let lens = lens(problem);
    let mut slices = Gradients {
        dq: gradient::<T>(problem, device, lens.dq)?,
        dk: gradient::<T>(problem, device, lens.dk)?,
        dv: gradient::<T>(problem, device, lens.dv)?,
    };
    let strides = Gradients { dq: problem.contiguous_q(), dk: problem.contiguous_k(), dv: problem.contiguous_v() };
    let mut grads = GradientMemory { slices: Slices::Separate(&mut slices), strides };
    queue(call, output, &tensors, &mut grads)?;
    Ok(slices.map(|slice| T::wrap_cuda_slice(slice, device.clone())))
}

/// Queues a backward that writes dq, dk and dv into one tensor, one after another along its head axis.
pub(super) fn fused<T: Element>(call: &Call, output: Output, tensors: BackwardInputs<Tensor>) -> Result<CudaStorage> {
    let (problem, device) = (call.problem, tensors.inputs.q.device().as_cuda_device()?);
    let lens = lens(problem);
    let mut slice = gradient::<T>(problem, device, lens.dq + lens.dk + lens.dv)?;
    let [dq, dk, dv] = problem.contiguous_qkv();
    let mut grads = GradientMemory { slices: Slices::Fused(&mut slice), strides: Gradients { dq, dk, dv } };
    queue(call, output, &tensors, &mut grads)?;
    Ok(T::wrap_cuda_slice(slice, device.clone()))
}

/// Number of elements of dq, dk and dv.
fn lens(problem: &Problem) -> Gradients<usize> {
    let len = |shape: Vec<usize>| shape.iter().product();
    Gradients { dq: len(problem.shape_q()), dk: len(problem.shape_k()), dv: len(problem.shape_v()) }
}

/// Allocates memory for one gradient, or for all three.
fn gradient<T: Element>(problem: &Problem, device: &CudaDevice, len: usize) -> Result<CudaSlice<T>> {
    // Kernels do not write gradients of invalid keys, and without queries no kernel runs. So fill with zeros then.
    let hides_keys = matches!(problem.lengths, Lengths::Padded { key_lengths: Some(_), .. });
    if hides_keys || problem.rows_q() * problem.num_heads == 0 {
        zeros(device, len)
    } else {
        uninit(device, len)
    }
}

/// The memory for dq, dk and dv.
struct GradientMemory<'a, T> {
    slices: Slices<'a, T>,
    /// Strides of each gradient in its slice.
    strides: Gradients<Strides>,
}

enum Slices<'a, T> {
    Separate(&'a mut Gradients<CudaSlice<T>>),
    Fused(&'a mut CudaSlice<T>),
}

impl<T: DeviceRepr> GradientMemory<'_, T> {
    /// Addresses of dq, dk and dv, for a kernel that writes some of them.
    fn write<'b>(&'b mut self, launcher: &mut Launcher<'b>) -> Gradients<CUdeviceptr> {
        match &mut self.slices {
            Slices::Separate(Gradients { dq, dk, dv }) => {
                Gradients { dq: launcher.write(dq), dk: launcher.write(dk), dv: launcher.write(dv) }
            }
            Slices::Fused(slice) => {
                let base = launcher.write(slice);
                self.strides.map(|strides| base + (strides.offset * size_of::<T>()) as CUdeviceptr)
            }
        }
    }
}

/// o, do and dlse, with types and strides that the kernels support.
struct Upstream {
    o: Tensor,
    do_: Tensor,
    dlse: Option<Tensor>,
}

impl Upstream {
    fn new<T: Element>(problem: &Problem, output: Output, result: &Tensor, grad: &Tensor) -> Result<Self> {
        match output {
            Output::O => Ok(Self { o: result.clone(), do_: readable_grad(problem, grad)?, dlse: None }),
            // o and its gradient are f32 here. The kernels read the type of q, so convert both.
            Output::OAndLse => {
                let lse_len = problem.rows_q() * problem.num_heads;
                let o_len = lse_len * problem.head_dim_v;
                let shape = problem.shape_of_result();
                let part = |both: &Tensor| both.narrow(0, 0, o_len)?.to_dtype(T::DTYPE)?.reshape(&shape[..]);
                let dlse = grad.contiguous()?.narrow(0, o_len, lse_len)?;
                Ok(Self { o: part(result)?, do_: readable_grad(problem, &part(grad)?)?, dlse: Some(dlse) })
            }
        }
    }
}

/// A gradient with strides that the kernels support. Candle passes gradients with any strides: transposed, or broadcast from a
/// sum.
fn readable_grad(problem: &Problem, grad: &Tensor) -> Result<Tensor> {
    let shape = problem.shape_o();
    match Strides::of("do", grad.layout(), problem.output_layout) {
        Ok(strides) if readable(&strides, &shape, problem.dtype) => Ok(grad.clone()),
        _ => grad.force_contiguous(),
    }
}

/// Queues the kernels of the plan. Without queries it queues nothing, and all gradients are 0.
fn queue<T: Element>(
    call: &Call,
    output: Output,
    tensors: &BackwardInputs<Tensor>,
    grads: &mut GradientMemory<T>,
) -> Result<()> {
    let Some(plan) = &call.plan.backward else {
        unreachable!("Plan::choose refuses tracked inputs without a backward")
    };
    let (problem, rows) = (call.problem, call.rows());
    if rows == 0 {
        return Ok(());
    }
    let device = tensors.inputs.q.device().as_cuda_device()?;
    let upstream = Upstream::new::<T>(problem, output, tensors.result, tensors.grad)?;
    let mut memory = Memory {
        delta: uninit(device, rows)?,
        dq_accum: zeros(device, plan.dq_accum.elements())?,
        semaphores: problem.deterministic.then(|| zeros(device, plan.semaphores)).transpose()?,
    };
    let kernels = Kernels {
        call,
        plan,
        device,
        side: call.side_tensors(),
        inputs: tensors.inputs.map(Locked::of),
        do_strides: Strides::of("do", upstream.do_.layout(), problem.output_layout)?,
        o: Locked::of(&upstream.o),
        do_: Locked::of(&upstream.do_),
        dlse: upstream.dlse.as_ref().map(Locked::of),
        lse: Locked::of(tensors.lse),
    };
    for launch in &plan.launches {
        match launch.kernel.pass {
            Pass::Delta => kernels.delta::<T>(launch, &mut memory)?,
            Pass::Backward => kernels.backward(launch, &mut memory, grads)?,
            Pass::Convert => kernels.convert(launch, &memory, grads)?,
            Pass::Forward => unreachable!("a backward has no launch of {}", launch.kernel.name),
        }
    }
    Ok(())
}

/// Memory that one kernel of a backward writes and a later one reads.
struct Memory {
    delta: CudaSlice<f32>,
    dq_accum: CudaSlice<f32>,
    /// Semaphores that order the additions to dq_accum, if the call is deterministic.
    semaphores: Option<CudaSlice<u32>>,
}

/// The kernels of one backward, and the tensors that they read.
struct Kernels<'a> {
    call: &'a Call<'a>,
    plan: &'a BackwardPlan,
    device: &'a CudaDevice,
    side: SideTensors<'a>,
    inputs: Inputs<Locked<'a>>,
    o: Locked<'a>,
    do_: Locked<'a>,
    do_strides: Strides,
    dlse: Option<Locked<'a>>,
    lse: Locked<'a>,
}

impl Kernels<'_> {
    fn delta<T: Element>(&self, launch: &Launch, memory: &mut Memory) -> Result<()> {
        let stream = self.device.cuda_stream();
        let mut launcher = Launcher::new(&stream);
        let params = DeltaParams {
            o: self.o.read::<T>(&mut launcher)?,
            do_: self.do_.read::<T>(&mut launcher)?,
            dlse: address_or_null(self.dlse.as_ref(), |dlse| dlse.read::<f32>(&mut launcher))?,
            delta: launcher.write(&mut memory.delta),
            o_strides: self.call.problem.contiguous_o().into(),
            do_strides: self.do_strides.into(),
            shape: self.side.shape(&mut launcher)?,
        };
        Ok(launcher.launch(launch, &params)?)
    }

    /// dk, dv and dq_accum.
    fn backward<T: Element>(&self, launch: &Launch, memory: &mut Memory, grads: &mut GradientMemory<T>) -> Result<()> {
        let problem = self.call.problem;
        let stream = self.device.cuda_stream();
        let mut counters = Counters::of(launch, &stream)?;
        let mut launcher = Launcher::new(&stream);
        let inputs = self.inputs.as_ref().map(Locked::storage);
        let Inputs { q, k, v } = self.call.read_inputs::<T>(inputs, &mut launcher)?;
        let Gradients { dk: dk_strides, dv: dv_strides, .. } = grads.strides;
        let Gradients { dk, dv, .. } = grads.write(&mut launcher);
        let params = BwdParams {
            q,
            k,
            v,
            do_: self.do_.read::<T>(&mut launcher)?,
            lse: self.lse.read::<f32>(&mut launcher)?,
            delta: launcher.read(&memory.delta),
            dq_accum: launcher.write(&mut memory.dq_accum),
            semaphores: address_or_null(memory.semaphores.as_mut(), |semaphores| Ok(launcher.write(semaphores)))?,
            dk,
            dv,
            q_strides: problem.q.into(),
            k_strides: problem.k.into(),
            v_strides: problem.v.into(),
            do_strides: self.do_strides.into(),
            dk_strides: dk_strides.into(),
            dv_strides: dv_strides.into(),
            dq_groups: self.plan.dq_accum.groups.into(),
            dq_tiles: self.plan.dq_tiles.into(),
            shape: self.side.shape(&mut launcher)?,
            softmax_scale: problem.softmax_scale as f32,
        };
        if launch.kernel.params == Parameters::Bwd {
            return Ok(launcher.launch(launch, &params)?);
        }
        // The other kernel reads q, k, v and do through tensor maps and takes its tiles from a schedule.
        let schedule = Counters::schedule(launch, &mut counters, &mut launcher);
        let maps = TensorMaps { problem, kernel: launch.kernel, not_empty: params.lse };
        let do_ = maps.of("do", params.do_, &self.do_strides, &problem.shape_o(), launch.kernel.block_m)?;
        let Inputs { q, k, v } = maps.of_inputs(Inputs { q, k, v })?;
        Ok(launcher.launch(launch, &Sm90BwdParams { q, k, v, do_, bwd: params, schedule })?)
    }

    /// dq from dq_accum.
    fn convert<T: Element>(&self, launch: &Launch, memory: &Memory, grads: &mut GradientMemory<T>) -> Result<()> {
        let problem = self.call.problem;
        let stream = self.device.cuda_stream();
        let mut launcher = Launcher::new(&stream);
        let dq_strides = grads.strides.dq;
        let params = ConvertParams {
            dq_accum: launcher.read(&memory.dq_accum),
            dq: grads.write(&mut launcher).dq,
            dq_strides: dq_strides.into(),
            dq_groups: self.plan.dq_accum.groups.into(),
            shape: self.side.shape(&mut launcher)?,
            dq_accum_head_dim: self.plan.dq_accum.head_dim as i32,
            softmax_scale: problem.softmax_scale as f32,
        };
        Ok(launcher.launch(launch, &params)?)
    }
}
