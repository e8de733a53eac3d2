//! Attention on an NVIDIA GPU: from a [`CudaPlan`] to launches on Candle's stream. Nothing is decided here, and nothing waits
//! for the device.

mod counters;
mod launch;
pub(crate) mod module;
pub(crate) mod params;
mod tensor_map;

use candle_core::backend::BackendStorage;
use candle_core::cuda::cudarc::driver::sys::CUdevice_attribute_enum::{
    CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN, CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT,
};
use candle_core::cuda::cudarc::driver::sys::CUdeviceptr;
use candle_core::cuda::cudarc::driver::{CudaSlice, DeviceRepr, ValidAsZeroBits};
use candle_core::cuda::{CudaDType, WrapErr};
use candle_core::{CudaDevice, CudaStorage, DType, Layout, Result, Storage, StorageRef, Tensor, WithDType};
use half::{bf16, f16};

use self::counters::Counters;
use self::launch::Launcher;
use self::params::{
    BwdParams, ConvertParams, DeltaParams, FwdParams, HopperFwdParams, Schedule, Shape, ShapeAddresses, NULL,
};
use crate::op::Output;
use crate::plan::{aligned, in_reach, CudaPlan, DeviceCaps};
use crate::problem::{Lengths, Problem, Strides};

/// What the driver says of `device`.
pub(crate) fn device_caps(device: &CudaDevice) -> Result<DeviceCaps> {
    let stream = device.cuda_stream();
    let context = stream.context();
    let (major, minor) = context.compute_capability().w()?;
    Ok(DeviceCaps::Cuda {
        compute_cap: (major as u32, minor as u32),
        multiprocessors: context.attribute(CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT).w()? as usize,
        shared_bytes_per_block: context.attribute(CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN).w()? as usize,
    })
}

/// A [`Problem`] with the device memory that goes with it besides q, k and v.
pub(crate) struct Call<'a> {
    problem: &'a Problem,
    plan: &'a CudaPlan,
    /// ALiBi slopes, contiguous.
    slopes: Option<Tensor>,
}

impl<'a> Call<'a> {
    pub(crate) fn new(problem: &'a Problem, plan: &'a CudaPlan, alibi_slopes: Option<&Tensor>) -> Result<Self> {
        Ok(Self { problem, plan, slopes: alibi_slopes.map(Tensor::contiguous).transpose()? })
    }

    /// Locks what every launch reads.
    fn side(&self) -> Side<'_> {
        let (cu_seqlens, key_lengths) = match &self.problem.lengths {
            Lengths::Padded { key_lengths, .. } => (None, key_lengths.as_ref().map(|lengths| lengths.tensor())),
            Lengths::Packed { cu_seqlens_q, cu_seqlens_k } => {
                (Some([cu_seqlens_q, cu_seqlens_k].map(|lengths| Locked::of(lengths.tensor()))), None)
            }
        };
        Side {
            problem: self.problem,
            cu_seqlens,
            key_lengths: key_lengths.map(Locked::of),
            slopes: self.slopes.as_ref().map(Locked::of),
        }
    }
}

/// The storage of a tensor on the GPU, locked against writers.
struct Locked<'a> {
    storage: StorageRef<'a>,
    layout: &'a Layout,
}

impl<'a> Locked<'a> {
    fn of(tensor: &'a Tensor) -> Self {
        let (storage, layout) = tensor.storage_and_layout();
        Self { storage, layout }
    }

    fn cuda(&self) -> &CudaStorage {
        match &*self.storage {
            Storage::Cuda(storage) => storage,
            _ => unreachable!("Problem admits one device"),
        }
    }

    /// Address of the first element.
    fn read<'b, T: CudaDType + 'b>(&'b self, launcher: &mut Launcher<'b>) -> Result<u64> {
        Ok(launcher.read(T::as_cuda_slice(self.cuda())?, self.layout.start_offset()))
    }
}

/// What every launch of a call reads besides its tensors.
struct Side<'a> {
    problem: &'a Problem,
    cu_seqlens: Option<[Locked<'a>; 2]>,
    key_lengths: Option<Locked<'a>>,
    slopes: Option<Locked<'a>>,
}

impl Side<'_> {
    fn shape<'b>(&'b self, launcher: &mut Launcher<'b>) -> Result<Shape> {
        let cu_seqlens = match &self.cu_seqlens {
            None => [NULL; 2],
            Some([q, k]) => [q.read::<u32>(launcher)?, k.read::<u32>(launcher)?],
        };
        let key_lengths = match &self.key_lengths {
            None => NULL,
            Some(lengths) => lengths.read::<u32>(launcher)?,
        };
        let alibi_slopes = match &self.slopes {
            None => NULL,
            Some(slopes) => slopes.read::<f32>(launcher)?,
        };
        Ok(Shape::new(self.problem, ShapeAddresses { cu_seqlens, key_lengths, alibi_slopes }))
    }
}

/// Element types with kernels.
trait Element: CudaDType + DeviceRepr + ValidAsZeroBits + WithDType {}
impl Element for f16 {}
impl Element for bf16 {}

/// Queues the forward over the storages of q, k and v: the result as `output` asks for it, and lse.
pub(crate) fn forward(call: &Call, output: Output, inputs: [&CudaStorage; 3]) -> Result<(CudaStorage, CudaStorage)> {
    match call.problem.dtype {
        DType::F16 => typed_forward::<f16>(call, output, inputs),
        DType::BF16 => typed_forward::<bf16>(call, output, inputs),
        other => unreachable!("Plan admits no {other:?} on CUDA"),
    }
}

/// Queues the backward over q, k, v, the result of the forward, its gradient and lse: dq, dk and dv, which `places` says
/// where to put; one storage for each tensor there.
pub(crate) fn backward(call: &Call, output: Output, places: Places, tensors: [&Tensor; 6]) -> Result<Vec<CudaStorage>> {
    match call.problem.dtype {
        DType::F16 => typed_backward::<f16>(call, output, places, tensors),
        DType::BF16 => typed_backward::<bf16>(call, output, places, tensors),
        other => unreachable!("Plan admits no {other:?} on CUDA"),
    }
}

/// Where dq, dk and dv go.
#[derive(Clone, Copy)]
pub(crate) enum Places {
    /// Each into a contiguous tensor of its own.
    Separate,
    /// Into one, side by side along its axis of heads.
    Fused,
}

impl Places {
    /// Elements of each tensor, and of dq, dk and dv where they lie in theirs.
    fn of(self, problem: &Problem) -> (Vec<usize>, [Strides; 3]) {
        let lens = [problem.shape_q(), problem.shape_k(), problem.shape_k()].map(|shape| shape.iter().product());
        match self {
            Places::Separate => {
                (lens.to_vec(), [problem.contiguous_q(), problem.contiguous_k(), problem.contiguous_k()])
            }
            Places::Fused => (vec![lens.iter().sum()], problem.contiguous_qkv()),
        }
    }
}

/// Device memory of dq, dk and dv: three slices or one.
struct Gradients<T> {
    slices: Vec<CudaSlice<T>>,
    strides: [Strides; 3],
}

impl<T: DeviceRepr> Gradients<T> {
    /// Addresses of dq, dk and dv, for a kernel that writes some of them.
    fn write<'a>(&'a mut self, launcher: &mut Launcher<'a>) -> [CUdeviceptr; 3] {
        let bases: Vec<CUdeviceptr> = self.slices.iter_mut().map(|slice| launcher.write(slice)).collect();
        let last = bases.len() - 1;
        let address = |at: usize| bases[at.min(last)] + (self.strides[at].offset * size_of::<T>()) as CUdeviceptr;
        [address(0), address(1), address(2)]
    }
}

/// Device memory of the forward's result.
enum Memory<T> {
    O(CudaSlice<T>),
    /// o in f32, followed by lse.
    OAndLse(CudaSlice<f32>),
}

fn typed_forward<T: Element>(
    call: &Call,
    output: Output,
    [q, k, v]: [&CudaStorage; 3],
) -> Result<(CudaStorage, CudaStorage)> {
    let (problem, device) = (call.problem, &q.device);
    let rows = problem.rows_q() * problem.num_heads;
    let o_len = rows * problem.head_dim;
    let mut result = match output {
        Output::O => Memory::O(uninit::<T>(device, o_len)?),
        Output::OAndLse => Memory::OAndLse(uninit::<f32>(device, o_len + rows)?),
    };
    let mut lse = uninit::<f32>(device, rows)?;
    {
        let (stream, side) = (device.cuda_stream(), call.side());
        let &CudaPlan { forward, schedule, .. } = call.plan;
        // A block for every tile needs no counting.
        let counted = schedule.is_some_and(|schedule| schedule.tiles > forward.grid.0 as usize);
        let mut counters = counted.then(|| Counters::of(&stream)).transpose()?;
        let mut launcher = Launcher::new(&stream);
        let params = FwdParams {
            q: launcher.read(T::as_cuda_slice(q)?, problem.q.offset),
            k: launcher.read(T::as_cuda_slice(k)?, problem.k.offset),
            v: launcher.read(T::as_cuda_slice(v)?, problem.v.offset),
            o: match &mut result {
                Memory::O(o) => launcher.write(o),
                Memory::OAndLse(both) => launcher.write(both),
            },
            lse: launcher.write(&mut lse),
            q_strides: problem.q.into(),
            k_strides: problem.k.into(),
            v_strides: problem.v.into(),
            o_strides: problem.contiguous_o().into(),
            shape: side.shape(&mut launcher)?,
            o_is_f32: i32::from(output == Output::OAndLse),
        };
        match schedule {
            None => launcher.launch(&forward, &params)?,
            Some(schedule) => {
                let counters = counters.as_mut().map_or(NULL, |counters| counters.write(&mut launcher));
                let [q, k, v] = tensor_map::of_inputs(problem, forward.kernel, &params)?;
                let schedule = Schedule::new(&schedule, counters);
                launcher.launch(&forward, &HopperFwdParams { q, k, v, fwd: params, schedule })?;
            }
        }
    }
    let lse = f32::wrap_cuda_slice(lse, device.clone());
    let result = match result {
        Memory::O(o) => T::wrap_cuda_slice(o, device.clone()),
        Memory::OAndLse(both) => {
            let mut both = f32::wrap_cuda_slice(both, device.clone());
            if rows > 0 {
                lse.copy_strided_src(&mut both, o_len, &Layout::contiguous(rows))?;
            }
            both
        }
    };
    Ok((result, lse))
}

fn typed_backward<T: Element>(
    call: &Call,
    output: Output,
    places: Places,
    [q, k, v, result, grad, lse]: [&Tensor; 6],
) -> Result<Vec<CudaStorage>> {
    let (problem, plan) = (call.problem, call.plan);
    let device = q.device().as_cuda_device()?;
    let rows = problem.rows_q() * problem.num_heads;
    let q_len = rows * problem.head_dim;
    let (lens, strides) = places.of(problem);
    if q_len == 0 {
        // Candle's own kernels, which the rest needs, cannot be launched over nothing.
        let zeros = |len: usize| Ok(T::wrap_cuda_slice(device.alloc_zeros::<T>(len.max(1))?, device.clone()));
        return lens.into_iter().map(zeros).collect();
    }
    let (o, do_, dlse) = match output {
        Output::O => (result.clone(), readable(problem, grad)?, None),
        // o and its gradient are f32 here. The kernels read the type of q, so both are rounded.
        Output::OAndLse => {
            let part = |both: &Tensor| both.narrow(0, 0, q_len)?.to_dtype(T::DTYPE)?.reshape(problem.shape_o());
            (part(result)?, part(grad)?, Some(grad.contiguous()?.narrow(0, q_len, rows)?))
        }
    };
    let mut delta = uninit::<f32>(device, rows)?;
    let tiles = plan.dq_tiles;
    let mut dq_accum = device.alloc_zeros::<f32>(tiles.count * tiles.elements)?;
    // One counter for each tile, and one that counts started blocks.
    let mut semaphores = problem.deterministic.then(|| device.alloc_zeros::<u32>(tiles.count + 1)).transpose()?;
    // No tile covers keys that are not valid, so no kernel writes their gradients: they are zeros from the start.
    let hides_keys = matches!(problem.lengths, Lengths::Padded { key_lengths: Some(_), .. });
    let memory = |len: usize| if hides_keys { device.alloc_zeros::<T>(len.max(1)) } else { uninit::<T>(device, len) };
    let slices = lens.into_iter().map(memory).collect::<Result<_>>()?;
    let mut grads = Gradients { slices, strides };
    {
        let (stream, side) = (device.cuda_stream(), call.side());
        let [q, k, v, o, do_, lse] = [q, k, v, &o, &do_, lse].map(Locked::of);
        let dlse = dlse.as_ref().map(Locked::of);
        let do_strides = Strides::of("do", do_.layout, problem.output_layout)?;

        let mut launcher = Launcher::new(&stream);
        let params = DeltaParams {
            o: o.read::<T>(&mut launcher)?,
            do_: do_.read::<T>(&mut launcher)?,
            dlse: dlse.as_ref().map_or(Ok(NULL), |dlse| dlse.read::<f32>(&mut launcher))?,
            delta: launcher.write(&mut delta),
            o_strides: problem.contiguous_o().into(),
            do_strides: do_strides.into(),
            shape: side.shape(&mut launcher)?,
        };
        launcher.launch(&plan.delta, &params)?;

        let mut launcher = Launcher::new(&stream);
        let [_, dk, dv] = grads.write(&mut launcher);
        let params = BwdParams {
            q: q.read::<T>(&mut launcher)?,
            k: k.read::<T>(&mut launcher)?,
            v: v.read::<T>(&mut launcher)?,
            do_: do_.read::<T>(&mut launcher)?,
            lse: lse.read::<f32>(&mut launcher)?,
            delta: launcher.read(&delta, 0),
            dq_accum: launcher.write(&mut dq_accum),
            semaphores: semaphores.as_mut().map_or(NULL, |semaphores| launcher.write(semaphores)),
            dk,
            dv,
            q_strides: problem.q.into(),
            k_strides: problem.k.into(),
            v_strides: problem.v.into(),
            do_strides: do_strides.into(),
            dk_strides: strides[1].into(), // dv's too
            dq_tiles: tiles.into(),
            shape: side.shape(&mut launcher)?,
            softmax_scale: problem.softmax_scale as f32,
        };
        launcher.launch(&plan.backward, &params)?;

        let mut launcher = Launcher::new(&stream);
        let [dq, ..] = grads.write(&mut launcher);
        let params = ConvertParams {
            dq_accum: launcher.read(&dq_accum, 0),
            dq,
            dq_strides: strides[0].into(),
            dq_tiles: tiles.into(),
            shape: side.shape(&mut launcher)?,
            softmax_scale: problem.softmax_scale as f32,
        };
        launcher.launch(&plan.convert, &params)?;
    }
    Ok(grads.slices.into_iter().map(|grad| T::wrap_cuda_slice(grad, device.clone())).collect())
}

/// Device memory that a kernel fills. The driver refuses to allocate nothing.
fn uninit<T: DeviceRepr>(device: &CudaDevice, len: usize) -> Result<CudaSlice<T>> {
    // SAFETY: what follows writes every element. Kernels write `o`, `lse`, `delta`, `dq`, `dk` and `dv` for every row; with key
    // lengths, `dk` and `dv` are not allocated here. A copy writes the lse of the flat result.
    unsafe { device.alloc::<T>(len.max(1)) }
}

/// A gradient as the kernels can read it. Candle hands them on as they come: transposed, or broadcast from a sum.
fn readable(problem: &Problem, grad: &Tensor) -> Result<Tensor> {
    let shape = problem.shape_q();
    match Strides::of("do", grad.layout(), problem.output_layout) {
        Ok(strides) if aligned(&strides, &shape) && in_reach(&strides, &shape) => Ok(grad.clone()),
        _ => grad.force_contiguous(),
    }
}
