//! From a [`Problem`] and a device to how it is computed. Pure: no tensor is touched, no device is asked.

use std::collections::HashSet;
use std::sync::{Mutex, OnceLock};

use candle_core::{DType, Device, DeviceLocation};

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
                let forward = cpu_forward_tile(problem);
                let backward = cpu_backward_tile(problem);
                Ok(Self::Cpu { forward, backward })
            }
            &DeviceCaps::Other(device) => Err(Error::NoKernel { dtype: problem.dtype, device }),
        }
    }
}

/// S and P of one tile, and the tiles of q, k, v and o beside it, stay within a core's L2 cache (1 to 2 MB).
fn cpu_forward_tile(problem: &Problem) -> Tile {
    let wide = problem.dtype == DType::F64 || problem.head_dim > 128;
    Tile { block_m: 128, block_n: if wide { 128 } else { 256 } }
}

/// The backward holds two score tiles, the key tile twice and two accumulators at once: smaller tiles than forward.
fn cpu_backward_tile(problem: &Problem) -> Tile {
    let wide = problem.dtype == DType::F64 || problem.head_dim > 128;
    Tile { block_m: 128, block_n: if wide { 64 } else { 128 } }
}

/// With `CANDLE_FA2_LOG=plan` in the environment, prints each distinct problem and its plan once, to standard error.
pub(crate) fn log(problem: &Problem, plan: &Plan) {
    static WANTED: OnceLock<bool> = OnceLock::new();
    static SEEN: OnceLock<Mutex<HashSet<String>>> = OnceLock::new();
    if !WANTED.get_or_init(|| std::env::var("CANDLE_FA2_LOG").is_ok_and(|value| value == "plan")) {
        return;
    }
    let text = format!("candle-fa2: {problem:?} -> {plan:?}");
    let mut seen = SEEN.get_or_init(Mutex::default).lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    if seen.insert(text.clone()) {
        eprintln!("{text}");
    }
}
