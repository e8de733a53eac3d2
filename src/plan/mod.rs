//! Chooses how a [`Problem`] is computed on a device. The choice depends only on the problem and on the device's capabilities,
//! given as data. This module touches no tensor and no device, reads no environment variable, and prints nothing.

mod caps;
mod cpu;
mod cuda;
mod tile;

pub use self::caps::{CudaCaps, DeviceCaps};
pub use self::cpu::CpuPlan;
#[cfg(feature = "cuda")]
pub(crate) use self::cuda::{axes, readable, MAX_GRID_YZ, MAX_SEQLEN};
pub use self::cuda::{BackwardPlan, CudaPlan, DqAccum, Launch, Reason, Rejection, RowBlocks, Schedule};
pub use self::tile::Tile;
use crate::error::{Error, Result};
use crate::instances::{Kernel, Pass};
use crate::problem::Problem;

/// How a [`Problem`] is computed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Plan {
    /// On the CPU.
    Cpu(CpuPlan),
    /// On an NVIDIA GPU.
    Cuda(CudaPlan),
}

impl Plan {
    /// Chooses a plan. This is the only place that refuses a device.
    ///
    /// # Errors
    /// [`Error::NoKernel`] if this build has no kernel for the device; on an NVIDIA GPU also those of
    /// [`CudaPlan::choose`].
    pub fn choose(problem: &Problem, caps: &DeviceCaps) -> Result<Self> {
        match caps {
            DeviceCaps::Cpu => Ok(Self::Cpu(CpuPlan::new(problem))),
            DeviceCaps::Cuda(_) => Ok(Self::Cuda(CudaPlan::choose(problem, caps, |_| true)?)),
            &DeviceCaps::Other(device) => Err(Error::NoKernel { dtype: problem.dtype, device }),
        }
    }

    /// The inputs of which the call makes contiguous copies first.
    pub(crate) fn copied(&self) -> &[&'static str] {
        match self {
            Self::Cpu(_) => &[],
            Self::Cuda(plan) => &plan.copied,
        }
    }

    /// `problem` with these copies.
    pub(crate) fn with_copies(&self, problem: Problem) -> Problem {
        match self {
            Self::Cpu(_) => problem,
            Self::Cuda(plan) => problem.with_copies(&plan.copied, plan.head_dim, plan.head_dim_v),
        }
    }

    /// The score tiles of the forward, and of the backward if there is one.
    pub fn tiles(&self) -> Vec<Tile> {
        match self {
            Self::Cpu(plan) => vec![plan.forward, plan.backward],
            Self::Cuda(plan) => {
                let kernels = [Pass::Forward, Pass::Backward].map(|pass| plan.launch(pass).map(|launch| launch.kernel));
                let tile = |kernel: &Kernel| Tile { block_m: kernel.block_m, block_n: kernel.block_n };
                kernels.into_iter().flatten().map(tile).collect()
            }
        }
    }
}
