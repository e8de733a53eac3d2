//! What the kernels of one architecture ask of a call. Each architecture implements it once.

use crate::instances::{Arch, Kernel};
use crate::problem::Problem;

/// The kernels of one architecture.
pub(super) trait Spec {
    /// Why `kernel` cannot compute `problem` on any GPU, though it keeps the limits of all CUDA kernels.
    fn refuses(&self, _problem: &Problem, _kernel: &Kernel) -> Option<Reason> {
        None
    }

    /// Why the kernels of another architecture are faster.
    fn unsuited(&self, _problem: &Problem) -> Option<Reason> {
        None
    }
}

/// Why a kernel was not taken. The first four make it impossible, the others make another kernel better.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reason {
    /// The GPU does not have the instructions.
    Instructions(Arch),
    /// The GPU has less shared memory than these bytes.
    SharedMemory(usize),
    /// More tiles than the kernel counts.
    Tiles {
        /// Tiles of the call.
        got: usize,
        /// The most that the kernel counts.
        max: usize,
    },
    /// A stride is longer than the kernel can express.
    Stride {
        /// The longest stride in elements.
        got: usize,
        /// The longest that the kernel takes.
        max: usize,
    },
    /// A kernel of a smaller head_dim pads less.
    HeadDim,
    /// With few queries most rows of the kernel's tiles stay empty.
    Decoding,
    /// A kernel for newer GPUs is there.
    OlderArch,
    /// A kernel before it in cuda/instances.def fits as well.
    LaterLine,
}

impl std::fmt::Display for Reason {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        match self {
            Self::Instructions(arch) => write!(f, "needs {arch}"),
            Self::SharedMemory(bytes) => write!(f, "needs {bytes} bytes of shared memory"),
            Self::Tiles { got, max } => write!(f, "supports at most {max} tiles, got {got}"),
            Self::Stride { got, max } => write!(f, "supports strides of at most {max} elements, got {got}"),
            Self::HeadDim => f.write_str("pads head_dim more"),
            Self::Decoding => f.write_str("has large tiles, but decoding is faster with small ones"),
            Self::OlderArch => f.write_str("is for older GPUs"),
            Self::LaterLine => f.write_str("comes later in the table"),
        }
    }
}
