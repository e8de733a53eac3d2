//! Queues the forward: o, or o and lse in f32, and the lse that the backward reads.

use candle_core::backend::BackendStorage;
use candle_core::cuda::cudarc::driver::sys::CUdeviceptr;
use candle_core::cuda::cudarc::driver::CudaSlice;
use candle_core::cuda::CudaDType;
use candle_core::{CudaDevice, CudaStorage, Layout, Result};

use super::call::Call;
use super::counters::Counters;
use super::launch::Launcher;
use super::memory::{uninit, Element};
use super::params::{FwdParams, Sm90FwdParams};
use super::tensor_map::TensorMaps;
use crate::instances::Parameters;
use crate::output::Output;
use crate::plan::Launch;
use crate::tensors::Inputs;

/// Queues the forward for inputs of type `T`. Returns the result and lse.
pub(super) fn forward<T: Element>(
    call: &Call,
    output: Output,
    inputs: Inputs<&CudaStorage>,
) -> Result<(CudaStorage, CudaStorage)> {
    let (device, rows) = (&inputs.q.device, call.rows());
    let mut result = ResultMemory::<T>::new(device, output, rows, call.problem.head_dim_v)?;
    let mut lse = uninit::<f32>(device, rows)?;
    for launch in &call.plan.forward {
        queue(call, launch, inputs, &mut result, &mut lse)?;
    }
    let lse = f32::wrap_cuda_slice(lse, device.clone());
    Ok((result.into_storage(&lse, rows, device)?, lse))
}

/// The memory of the operator's result.
enum ResultMemory<T> {
    O(CudaSlice<T>),
    /// o in f32, followed by lse.
    OAndLse(CudaSlice<f32>),
}

impl<T: Element> ResultMemory<T> {
    fn new(device: &CudaDevice, output: Output, rows: usize, head_dim_v: usize) -> Result<Self> {
        Ok(match output {
            Output::O => Self::O(uninit(device, rows * head_dim_v)?),
            Output::OAndLse => Self::OAndLse(uninit(device, rows * (head_dim_v + 1))?),
        })
    }

    /// Address of o, for a kernel that writes it.
    fn write_o<'a>(&'a mut self, launcher: &mut Launcher<'a>) -> CUdeviceptr {
        match self {
            Self::O(o) => launcher.write(o),
            Self::OAndLse(both) => launcher.write(both),
        }
    }

    /// The finished result. Copies lse to its place after o, if the result has both.
    fn into_storage(self, lse: &CudaStorage, rows: usize, device: &CudaDevice) -> Result<CudaStorage> {
        match self {
            Self::O(o) => Ok(T::wrap_cuda_slice(o, device.clone())),
            Self::OAndLse(both) => {
                let len = both.len();
                let mut both = f32::wrap_cuda_slice(both, device.clone());
                // Candle's copy cannot copy 0 elements.
                if rows > 0 {
                    lse.copy_strided_src(&mut both, len - rows, &Layout::contiguous(rows))?;
                }
                Ok(both)
            }
        }
    }
}

fn queue<T: Element>(
    call: &Call,
    launch: &Launch,
    inputs: Inputs<&CudaStorage>,
    result: &mut ResultMemory<T>,
    lse: &mut CudaSlice<f32>,
) -> Result<()> {
    let problem = call.problem;
    let (stream, side) = (inputs.q.device.cuda_stream(), call.side_tensors());
    let mut counters = Counters::of(launch, &stream)?;
    let mut launcher = Launcher::new(&stream);
    let Inputs { q, k, v } = call.read_inputs::<T>(inputs, &mut launcher)?;
    let o_is_f32 = matches!(result, ResultMemory::OAndLse(_));
    let params = FwdParams {
        q,
        k,
        v,
        o: result.write_o(&mut launcher),
        lse: launcher.write(lse),
        q_strides: problem.q.into(),
        k_strides: problem.k.into(),
        v_strides: problem.v.into(),
        o_strides: problem.contiguous_o().into(),
        shape: side.shape(&mut launcher)?,
        o_is_f32: i32::from(o_is_f32),
    };
    if launch.kernel.params == Parameters::Fwd {
        return Ok(launcher.launch(launch, &params)?);
    }
    // The other kernel reads q, k and v through tensor maps and takes its tiles from a schedule.
    let schedule = Counters::schedule(launch, &mut counters, &mut launcher);
    let maps = TensorMaps { problem, kernel: launch.kernel, not_empty: params.o };
    let Inputs { q, k, v } = maps.of_inputs(Inputs { q, k, v })?;
    Ok(launcher.launch(launch, &Sm90FwdParams { q, k, v, fwd: params, schedule })?)
}
