//! The plan of a [`Problem`] on an NVIDIA GPU: the kernels and their grids.
//!
//! A new architecture needs a [`Spec`](spec::Spec) in its own file, and a line in [`choice::spec`].

mod backward;
mod choice;
mod launch;
mod limits;
mod schedule;
mod sm80;
mod sm90;
mod spec;

pub use self::backward::{BackwardPlan, DqAccum, RowBlocks};
pub use self::choice::Rejection;
pub use self::launch::Launch;
#[cfg(feature = "cuda")]
pub(crate) use self::limits::{axes, readable, MAX_GRID_YZ, MAX_SEQLEN};
pub use self::schedule::Schedule;
pub use self::spec::Reason;
use super::caps::{CudaCaps, DeviceCaps};
use crate::error::{Error, Result};
use crate::instances::{Kernel, Pass};
use crate::problem::Problem;

/// The kernels of one call on an NVIDIA GPU.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CudaPlan {
    /// The inputs that are copied first, because their rows are not whole 16 bytes, not 16-byte aligned, or too far apart. The copies
    /// are contiguous, and padded with columns of zeros to `head_dim` or `head_dim_v`.
    pub copied: Vec<&'static str>,
    /// The head_dim of q and k in the kernels: that of the call, or of copies with more columns.
    pub head_dim: usize,
    /// The same for v and o. The columns of o past those of the call are dropped.
    pub head_dim_v: usize,
    /// The launches that compute o and lse, in order.
    pub forward: Vec<Launch>,
    /// The launches that compute dq, dk and dv. `None` if no kernel fits the GPU; the call then has no gradients.
    pub backward: Option<BackwardPlan>,
    /// The rejected kernels of both passes, and the reasons.
    pub rejected: Vec<Rejection>,
}

impl CudaPlan {
    /// Chooses among the kernels that `allow` accepts.
    ///
    /// # Errors
    /// - The GPU is too old.
    /// - No kernel supports the dtype or head_dim.
    /// - A size is too large for a grid or an index.
    /// - An input is tracked for gradients, and no backward kernel fits.
    pub fn choose(problem: &Problem, caps: &DeviceCaps, allow: impl Fn(&Kernel) -> bool) -> Result<Self> {
        let DeviceCaps::Cuda(caps) = caps else {
            return Err(Error::NoKernel { dtype: problem.dtype, device: problem.device });
        };
        limits::check(problem, caps.compute_cap)?;
        let copied = limits::copied(problem);
        let (head_dim, head_dim_v) = limits::padded_head_dims(problem);
        let with_copies;
        let problem = if copied.is_empty() {
            problem
        } else {
            with_copies = problem.clone().with_copies(&copied, head_dim, head_dim_v);
            limits::check_copies(&with_copies)?;
            &with_copies
        };
        let of_forward = choice::choose(problem, Pass::Forward, caps, &allow);
        let of_backward = choice::choose(problem, Pass::Backward, caps, &allow);
        let Some(kernel) = of_forward.kernel else {
            return Err(no_instance(problem, "forward", caps, &of_forward.rejected));
        };
        if let (None, Some(tensor)) = (of_backward.kernel, problem.tracked) {
            let error = no_instance(problem, "backward", caps, &of_backward.rejected);
            return Err(Error::NoBackward { tensor, error: Box::new(error) });
        }
        Ok(Self {
            copied,
            head_dim,
            head_dim_v,
            forward: vec![Launch::of_tiles(problem, kernel, caps.multiprocessors)],
            backward: of_backward.kernel.map(|kernel| BackwardPlan::new(problem, kernel, caps)).transpose()?,
            rejected: [of_forward.rejected, of_backward.rejected].concat(),
        })
    }

    /// All launches: first those of the forward, then those of the backward.
    pub fn launches(&self) -> impl Iterator<Item = &Launch> {
        self.forward.iter().chain(self.backward.iter().flat_map(|backward| &backward.launches))
    }

    /// The launch that computes `pass`.
    pub fn launch(&self, pass: Pass) -> Option<&Launch> {
        self.launches().find(|launch| launch.kernel.pass == pass)
    }
}

fn no_instance(problem: &Problem, pass: &'static str, caps: &CudaCaps, rejected: &[Rejection]) -> Error {
    Error::NoInstance {
        pass,
        dtype: problem.dtype,
        head_dim: problem.head_dim.max(problem.head_dim_v),
        compute_cap: caps.compute_cap,
        shared_bytes_per_block: caps.shared_bytes_per_block,
        rejected: rejected.iter().map(Rejection::to_string).collect(),
    }
}
