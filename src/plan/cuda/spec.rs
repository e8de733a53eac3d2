//! The limits and preferences of the kernels of one architecture.

use crate::instances::{Arch, Kernel};
use crate::problem::Problem;

/// The limits and preferences of the kernels of one architecture. Each architecture implements it once.
pub(super) trait Spec {
    /// Why kernels of this architecture cannot compute `problem`. The limits of all CUDA kernels are checked before.
    fn refuses(&self, _problem: &Problem, _kernel: &Kernel) -> Option<Reason> {
        None
    }

    /// Why kernels of another architecture come first.
    fn unsuited(&self, _problem: &Problem, _kernel: &Kernel) -> Option<Reason> {
        None
    }
}

/// Why a kernel was not chosen. For the first four reasons it cannot compute the call. For the others, another kernel is better.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reason {
    /// The GPU does not have the instructions.
    Instructions(Arch),
    /// The kernel needs this number of bytes of shared memory, more than the GPU has.
    SharedMemory(usize),
    /// The call has more tiles than the kernel can count.
    Tiles {
        /// Number of tiles of the call.
        got: usize,
        /// The largest number that the kernel can count.
        max: usize,
    },
    /// A stride is too large for the kernel.
    Stride {
        /// The largest stride in elements.
        got: usize,
        /// The largest stride that the kernel supports.
        max: usize,
    },
    /// The call asks for plain TF32, and this kernel takes three products of TF32 for one of f32.
    ThreeProducts,
    /// Another kernel has a smaller sufficient head_dim, so it pads less.
    HeadDim,
    /// With few queries, most rows of the kernel's tiles would be empty.
    Decoding,
    /// There is a kernel for newer GPUs.
    OlderArch,
    /// An earlier kernel in cuda/instances.def fits too.
    LaterLine,
}

impl std::fmt::Display for Reason {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        match self {
            Self::Instructions(arch) => write!(f, "needs {arch}"),
            Self::SharedMemory(bytes) => write!(f, "needs {bytes} bytes of shared memory"),
            Self::Tiles { got, max } => write!(f, "supports at most {max} tiles, got {got}"),
            Self::Stride { got, max } => write!(f, "supports strides of at most {max} elements, got {got}"),
            Self::ThreeProducts => f.write_str("takes three products of TF32"),
            Self::HeadDim => f.write_str("pads head_dim more"),
            Self::Decoding => f.write_str("has large tiles, and decoding would leave most of their rows empty"),
            Self::OlderArch => f.write_str("is for older GPUs"),
            Self::LaterLine => f.write_str("comes later in the table"),
        }
    }
}
