//! From a [`Problem`] and a device to how it is computed. Pure: no tensor is touched, no device is asked.

use std::collections::HashSet;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::{Mutex, OnceLock};

use candle_core::{Device, DeviceLocation};

use crate::problem::Problem;
use crate::{Error, Result};

/// What a plan needs to know about a device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DeviceCaps {
    /// The host.
    Cpu,
    /// A device that no kernel of this build runs on.
    Other(DeviceLocation),
}

impl DeviceCaps {
    /// The capabilities of `device`.
    pub fn of(device: &Device) -> Self {
        match device {
            Device::Cpu => Self::Cpu,
            other => Self::Other(other.location()),
        }
    }
}

/// Size of one tile of scores.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Tile {
    /// Queries.
    pub block_m: usize,
    /// Keys.
    pub block_n: usize,
}

impl Tile {
    /// No larger than the longest sequences ask for, so that small calls use small buffers; at least 1 x 1.
    fn within(self, problem: &Problem) -> Self {
        let cut = |block: usize, longest: usize| block.min(longest.max(1));
        Self { block_m: cut(self.block_m, problem.max_seqlen_q()), block_n: cut(self.block_n, problem.max_seqlen_k()) }
    }
}

/// How a [`Problem`] is computed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Plan {
    /// On the host, tile by tile.
    Cpu {
        /// Tile of the forward: each task owns `block_m` queries.
        forward: Tile,
        /// Tile of the backward: each task owns `block_n` keys.
        backward: Tile,
    },
}

impl Plan {
    /// The only place that says no to a device.
    ///
    /// # Errors
    /// [`Error::NoKernel`] if this build has no kernel for the device.
    pub fn choose(problem: &Problem, caps: &DeviceCaps) -> Result<Self> {
        match caps {
            DeviceCaps::Cpu => {
                Ok(Self::Cpu { forward: CPU_FORWARD.within(problem), backward: CPU_BACKWARD.within(problem) })
            }
            &DeviceCaps::Other(device) => Err(Error::NoKernel { dtype: problem.dtype, device }),
        }
    }
}

/// S, and the tiles of q, k, v and o beside it, stay within 1 MB in f32 up to head_dim 256, half of a server core's L2.
///
/// Rates are flat around it: from 64 x 64 to 256 x 512, at head_dim 64, 128 and 256, the forward varied by 10% (one core
/// with 2 MB of L2, f32, causal). Larger tiles waste more on the diagonal, smaller ones more on the edges of products.
const CPU_FORWARD: Tile = Tile { block_m: 128, block_n: 256 };

/// The backward holds S, dP, k, v, their transposes, dk and dv at once. At head_dim 256, 256 keys cost a quarter more
/// time than 128.
const CPU_BACKWARD: Tile = Tile { block_m: 128, block_n: 128 };

/// With `CANDLE_FA2_LOG=plan` in the environment, prints each distinct problem and its plan once, to standard error.
pub(crate) fn log(problem: &Problem, plan: &Plan) {
    static WANTED: OnceLock<bool> = OnceLock::new();
    static SEEN: OnceLock<Mutex<HashSet<u64>>> = OnceLock::new();
    let wanted = || match std::env::var("CANDLE_FA2_LOG").as_deref() {
        Ok("plan") => true,
        Ok("") | Err(_) => false,
        Ok(other) => {
            eprintln!("candle-fa2: CANDLE_FA2_LOG={other} is unknown; plan prints each distinct call once");
            false
        }
    };
    if !WANTED.get_or_init(wanted) {
        return;
    }
    let text = format!("candle-fa2: {problem:?} -> {plan:?}");
    // Decoding makes a new problem with every token: a hash of each is enough to remember.
    let mut hasher = DefaultHasher::new();
    text.hash(&mut hasher);
    let mut seen = SEEN.get_or_init(Mutex::default).lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    if seen.insert(hasher.finish()) {
        eprintln!("{text}");
    }
}
