//! From a [`Problem`] and a device to how it is computed. Pure: no tensor is touched, no device is asked.

use std::cmp::Reverse;
use std::collections::HashSet;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::{Mutex, OnceLock};

use candle_core::{DType, Device, DeviceLocation};

use crate::instances::{Arch, Grid, Kernel, Pass, KERNELS};
use crate::mask::Mask;
use crate::problem::{Lengths, Problem, Strides};
use crate::{Error, Result};

/// What a plan needs to know about a device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DeviceCaps {
    /// The host.
    Cpu,
    /// An NVIDIA GPU.
    Cuda {
        /// Major and minor compute capability.
        compute_cap: (u32, u32),
        /// Streaming multiprocessors.
        multiprocessors: usize,
        /// Shared memory that one thread block may ask for.
        shared_bytes_per_block: usize,
    },
    /// A device that no kernel of this build runs on.
    Other(DeviceLocation),
}

impl DeviceCaps {
    /// The capabilities of `device`. `CANDLE_FA2_SHARED_LIMIT` in the environment lowers a GPU's shared memory to so many
    /// bytes a thread block, which selects the kernels of smaller GPUs.
    ///
    /// # Errors
    /// An error of Candle if the driver does not answer, [`Error::Environment`] if the limit is not a number.
    pub fn of(device: &Device) -> Result<Self> {
        match device {
            Device::Cpu => Ok(Self::Cpu),
            #[cfg(feature = "cuda")]
            Device::Cuda(device) => {
                let mut caps = crate::cuda::device_caps(device)?;
                if let (Self::Cuda { shared_bytes_per_block, .. }, Some(limit)) = (&mut caps, shared_limit()?) {
                    *shared_bytes_per_block = limit.min(*shared_bytes_per_block);
                }
                Ok(caps)
            }
            other => Ok(Self::Other(other.location())),
        }
    }
}

#[cfg(feature = "cuda")]
fn shared_limit() -> Result<Option<usize>> {
    const NAME: &str = "CANDLE_FA2_SHARED_LIMIT";
    // Asked once: each call of the operator comes by here.
    static VALUE: OnceLock<Option<String>> = OnceLock::new();
    let value = VALUE.get_or_init(|| std::env::var(NAME).ok().filter(|value| !value.is_empty()));
    let parse = |value: &String| {
        value.parse().map_err(|_| Error::Environment {
            name: NAME,
            value: value.clone(),
            expected: "a number of bytes",
        })
    };
    value.as_ref().map(parse).transpose()
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
    /// On an NVIDIA GPU.
    Cuda(CudaPlan),
}

impl Plan {
    /// The only place that says no to a device.
    ///
    /// # Errors
    /// [`Error::NoKernel`] if this build has no kernel for the device; on an NVIDIA GPU also those of
    /// [`CudaPlan::choose`].
    pub fn choose(problem: &Problem, caps: &DeviceCaps) -> Result<Self> {
        match caps {
            DeviceCaps::Cpu => {
                Ok(Self::Cpu { forward: CPU_FORWARD.within(problem), backward: CPU_BACKWARD.within(problem) })
            }
            DeviceCaps::Cuda { .. } => Ok(Self::Cuda(CudaPlan::choose(problem, caps, |_| true)?)),
            &DeviceCaps::Other(device) => Err(Error::NoKernel { dtype: problem.dtype, device }),
        }
    }

    /// The tiles of scores that the forward and the backward walk in.
    pub fn tiles(&self) -> [Tile; 2] {
        match self {
            &Self::Cpu { forward, backward } => [forward, backward],
            Self::Cuda(plan) => {
                let tile = |launch: Launch| Tile { block_m: launch.kernel.block_m, block_n: launch.kernel.block_n };
                [tile(plan.forward), tile(plan.backward)]
            }
        }
    }
}

/// One launch of one kernel.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Launch {
    /// What runs.
    pub kernel: &'static Kernel,
    /// Thread blocks along x, y and z. If one of them is 0, nothing runs. z may exceed what one grid holds; the launch is then
    /// split.
    pub grid: (u32, u32, u32),
}

impl std::fmt::Display for Launch {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        let (grid, block, shared) = (self.grid, self.kernel.threads(), self.kernel.shared_bytes);
        write!(f, "grid {grid:?}, block {block}, shared {shared} bytes")
    }
}

impl std::fmt::Debug for Launch {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        write!(f, "{} ({self})", self.kernel.name)
    }
}

/// The kernels of one call on an NVIDIA GPU, in the order in which they run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CudaPlan {
    /// o and lse.
    pub forward: Launch,
    /// How the blocks of the forward share its tiles; `None` if each has one, which its place in the grid says.
    pub schedule: Option<Schedule>,
    /// delta, before the backward.
    pub delta: Launch,
    /// dk, dv and the f32 sums of dq.
    pub backward: Launch,
    /// dq from its sums.
    pub convert: Launch,
    /// Where the sums of dq lie.
    pub dq_tiles: DqTiles,
}

/// How the blocks of a persistent forward come by their tiles: `block_m` queries of one head of one sequence each, numbered
/// by section, in a section by block of queries, the last first, and there by head.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Schedule {
    /// All of them.
    pub tiles: usize,
    /// Blocks of queries: of a sequence if padded, of all of them at the most if packed.
    pub m_blocks: usize,
    /// Heads whose tiles are taken together, so that their keys and values stay in L2: of all sequences if padded.
    pub section_heads: usize,
}

impl Schedule {
    fn new(problem: &Problem, forward: &Kernel, multiprocessors: usize) -> Self {
        let (m_blocks, heads) = Self::blocks_and_heads(problem, forward);
        let section_heads = match problem.mask {
            Mask::None => 1,
            _ => Self::section_heads(m_blocks, heads, multiprocessors),
        };
        Self { tiles: m_blocks * heads, m_blocks, section_heads }
    }

    /// Under a mask the tiles of a head differ in length. Those of many heads even that out, those of too many need more keys and
    /// values than L2 holds, and a last section of few heads leaves multiprocessors idle. Measured on an H200 with 2 to 32 heads,
    /// 512 to 16k keys: fastest are some four tiles to a multiprocessor, at most 32 heads, in sections of one size.
    fn section_heads(m_blocks: usize, heads: usize, multiprocessors: usize) -> usize {
        const MOST: usize = 32;
        let ideal = (4.0 * multiprocessors as f64 / m_blocks.max(1) as f64).clamp(1.0, MOST as f64);
        let cost = |size: usize| {
            let missing = heads.div_ceil(size) * size - heads; // in the last section
            let ratio = size as f64 / ideal;
            ratio.max(1.0 / ratio) + missing as f64 / size as f64
        };
        let sizes = (1..=heads.min(MOST)).map(|size| (cost(size), size));
        sizes.min_by(|(a, _), (b, _)| a.total_cmp(b)).map_or(1, |(_, size)| size)
    }

    /// Blocks of queries, and heads that each have so many.
    fn blocks_and_heads(problem: &Problem, forward: &Kernel) -> (usize, usize) {
        match &problem.lengths {
            &Lengths::Padded { batch, seqlen_q, .. } => (seqlen_q.div_ceil(forward.block_m), batch * problem.num_heads),
            Lengths::Packed { cu_seqlens_q, .. } => {
                let (total, batch) = (cu_seqlens_q.total(), cu_seqlens_q.batch());
                (if total == 0 { 0 } else { total / forward.block_m + batch }, problem.num_heads)
            }
        }
    }

    /// Thread blocks along x: one to a multiprocessor, and no more tiles to a block than its list holds.
    fn blocks(&self, multiprocessors: usize) -> usize {
        const TILES_PER_BLOCK: usize = 256; // the list has twice as many places: blocks do not progress alike
        self.tiles.min(multiprocessors).max(self.tiles.div_ceil(TILES_PER_BLOCK))
    }
}

/// The f32 sums of dq: tiles of `block_m` queries and `head_dim` columns of the backward's kernel, a whole number of them for
/// each sequence and head. All in tiles, but for `elements`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DqTiles {
    /// From one sequence to the next; 0 for packed tensors.
    pub batch: usize,
    /// From one head to the next.
    pub head: usize,
    /// All of them.
    pub count: usize,
    /// f32 of one tile.
    pub elements: usize,
}

impl DqTiles {
    fn new(problem: &Problem, backward: &Kernel) -> Self {
        let (batch, head, count) = match &problem.lengths {
            &Lengths::Padded { batch, seqlen_q, .. } => {
                let head = seqlen_q.div_ceil(backward.block_m);
                (problem.num_heads * head, head, batch * problem.num_heads * head)
            }
            // Sequence `b` begins at tile first_q / block_m + b: not before the end of the one in front, however ragged.
            Lengths::Packed { cu_seqlens_q, .. } => {
                let head = cu_seqlens_q.total() / backward.block_m + cu_seqlens_q.batch();
                (0, head, problem.num_heads * head)
            }
        };
        Self { batch, head, count, elements: backward.block_m * backward.head_dim }
    }
}

impl CudaPlan {
    /// Chooses among the kernels that `allow` lets pass.
    ///
    /// # Errors
    /// If the GPU is too old, if no kernel takes the dtype, head_dim or strides, or if a size exceeds what a grid or an
    /// index holds.
    pub fn choose(problem: &Problem, caps: &DeviceCaps, allow: impl Fn(&Kernel) -> bool) -> Result<Self> {
        let &DeviceCaps::Cuda { compute_cap, multiprocessors, shared_bytes_per_block } = caps else {
            return Err(Error::NoKernel { dtype: problem.dtype, device: problem.device });
        };
        check_cuda(problem, compute_cap)?;
        let pick = |pass| pick(problem, pass, compute_cap, shared_bytes_per_block, &allow);
        let (seqlen_q, seqlen_k) = (problem.max_seqlen_q(), problem.max_seqlen_k());
        let (batch, num_heads) = (problem.batch() as u32, problem.num_heads as u32);
        let blocks = |elements: usize, block: usize| elements.div_ceil(block) as u32;
        let launch = |kernel, x, heads| Launch { kernel, grid: (x, heads, batch) };
        let forward = pick(Pass::Forward)?;
        let backward = pick(Pass::Backward)?;
        let delta = companion(Pass::Delta, |kernel| kernel.dtype == problem.dtype);
        let convert = companion(Pass::Convert, |kernel| {
            (kernel.dtype, kernel.image) == (problem.dtype, backward.image) // each backward has its own
        });
        let backward_launch = launch(backward, blocks(seqlen_k, backward.block_n), problem.num_heads_k as u32);
        if problem.deterministic {
            check_tickets(&backward_launch)?;
        }
        // The threads of a row are a power of two. Any number of blocks is right: they stride over the rows.
        let rows_per_block = delta.threads() / problem.head_dim.div_ceil(CHUNK).next_power_of_two().max(4);
        let schedule = (forward.grid == Grid::Persistent).then(|| Schedule::new(problem, forward, multiprocessors));
        Ok(Self {
            forward: match &schedule {
                Some(schedule) => Launch { kernel: forward, grid: (schedule.blocks(multiprocessors) as u32, 1, 1) },
                None => launch(forward, blocks(seqlen_q, forward.block_m), num_heads),
            },
            schedule,
            delta: launch(delta, blocks(seqlen_q, rows_per_block), num_heads),
            // One block takes all query heads of its key head, so that dk and dv are written once.
            backward: backward_launch,
            convert: launch(convert, blocks(seqlen_q, backward.block_m), num_heads),
            dq_tiles: DqTiles::new(problem, backward),
        })
    }
}

/// Elements of 16 bytes, the size of every access to q, k, v, o and their gradients.
const CHUNK: usize = 8;

/// The largest gridDim.y (CUDA C++ Programming Guide, technical specifications per compute capability).
const MAX_GRID_Y: usize = 65_535;

/// The device adds rows, bounds of the mask and tiles in 32-bit integers. A sum of three of these stays below 2^31.
pub(crate) const MAX_SEQLEN: usize = 1 << 29;

/// Elements from one row to the next: a copy steps over at most 32 rows at once, in 32 bits.
pub(crate) const MAX_ROW_STRIDE: usize = i32::MAX as usize / 32;

/// Elements of 2 bytes from one row, head or sequence to the next: TMA's strides stay below 2^40 bytes.
const MAX_TMA_STRIDE: usize = (1 << 39) - 1;

/// A deterministic backward numbers its thread blocks in 32 bits, over all launches of a call.
fn check_tickets(backward: &Launch) -> Result<()> {
    let (x, y, z) = backward.grid;
    let (got, max) = ([x, y, z].map(|blocks| blocks as usize).iter().product(), u32::MAX as usize);
    if got > max {
        return Err(Error::CudaSize { name: "number of thread blocks of a deterministic backward", got, max });
    }
    Ok(())
}

/// What no CUDA kernel takes.
fn check_cuda(problem: &Problem, compute_cap: (u32, u32)) -> Result<()> {
    let oldest = KERNELS.iter().map(|kernel| kernel.arch.compute_cap()).min().unwrap_or_default();
    if compute_cap < oldest {
        return Err(Error::ComputeCap { got: compute_cap, oldest });
    }
    if !matches!(problem.dtype, DType::F16 | DType::BF16) {
        return Err(Error::DType { tensor: "q", got: problem.dtype, supported: "F16, BF16 on CUDA" });
    }
    let max = KERNELS.iter().map(|kernel| kernel.head_dim).max().unwrap_or(0);
    if problem.head_dim > max || !problem.head_dim.is_multiple_of(CHUNK) {
        return Err(Error::CudaHeadDim { head_dim: problem.head_dim, max });
    }
    for (name, got, max) in [
        ("batch", problem.batch(), MAX_SEQLEN),
        ("num_heads", problem.num_heads, MAX_GRID_Y),
        ("rows of q", problem.rows_q(), i32::MAX as usize),
        ("rows of k", problem.rows_k(), i32::MAX as usize),
        ("seqlen_q", problem.max_seqlen_q(), MAX_SEQLEN),
        ("seqlen_k", problem.max_seqlen_k(), MAX_SEQLEN),
    ] {
        if got > max {
            return Err(Error::CudaSize { name, got, max });
        }
    }
    let (shape_q, shape_k) = (problem.shape_q(), problem.shape_k());
    for (tensor, strides, shape) in [("q", problem.q, &shape_q), ("k", problem.k, &shape_k), ("v", problem.v, &shape_k)]
    {
        if !aligned(&strides, shape) {
            let Strides { offset, batch, row, head } = strides;
            return Err(Error::Alignment { tensor, offset, strides: [batch, row, head] });
        }
        if !in_reach(&strides, shape) {
            return Err(Error::CudaRowStride { tensor, got: strides.row, max: MAX_ROW_STRIDE });
        }
    }
    Ok(())
}

/// Stride and size along rows, heads and sequences; packed tensors have one sequence.
pub(crate) fn axes(strides: &Strides, shape: &[usize]) -> [(usize, usize); 3] {
    let (row_axis, head_axis) = (shape.len() - 3, shape.len() - 2);
    let batch = if row_axis == 0 { 1 } else { shape[0] };
    [(strides.row, shape[row_axis]), (strides.head, shape[head_axis]), (strides.batch, batch)]
}

/// Whether every row of a tensor begins at a multiple of 16 bytes, as the kernels' accesses need.
pub(crate) fn aligned(strides: &Strides, shape: &[usize]) -> bool {
    // The stride of an axis of one element is never used.
    let steps = axes(strides, shape).into_iter().all(|(stride, size)| size <= 1 || stride.is_multiple_of(CHUNK));
    shape.contains(&0) || (steps && strides.offset.is_multiple_of(CHUNK))
}

/// Whether the kernels can step from row to row of a tensor.
pub(crate) fn in_reach(strides: &Strides, shape: &[usize]) -> bool {
    shape[shape.len() - 3] <= 1 || strides.row <= MAX_ROW_STRIDE
}

/// Whether the forward on Hopper's units is the faster one, on a GPU that has them.
fn hopper_suits(problem: &Problem) -> bool {
    // Decoding leaves most rows of a tile empty, and smaller tiles waste less. Where the two meet is to be measured.
    const DECODING: usize = 16;
    problem.max_seqlen_q() > DECODING
}

/// Why the forward on Hopper's units cannot take a call, if so.
fn hopper_refuses(problem: &Problem, kernel: &Kernel) -> Option<String> {
    let (m_blocks, heads) = Schedule::blocks_and_heads(problem, kernel);
    let tiles = m_blocks * heads;
    if tiles > i32::MAX as usize {
        return Some(format!("{} counts to {} tiles, not {tiles}", kernel.name, i32::MAX));
    }
    let (shape_q, shape_k) = (problem.shape_q(), problem.shape_k());
    let axes = [(problem.q, &shape_q), (problem.k, &shape_k), (problem.v, &shape_k)]
        .into_iter()
        .flat_map(|(strides, shape)| axes(&strides, shape));
    let longest = axes.filter(|&(_, size)| size > 1).map(|(stride, _)| stride).max().unwrap_or(0);
    (longest > MAX_TMA_STRIDE)
        .then(|| format!("{} takes strides of at most {MAX_TMA_STRIDE} elements, not {longest}", kernel.name))
}

/// The kernel of a tiled pass: of those that this GPU runs, the one with the smallest head_dim that fits, then the one
/// for the newest GPUs unless another suits the call better, then the first in cuda/instances.def.
fn pick(
    problem: &Problem,
    pass: Pass,
    compute_cap: (u32, u32),
    shared_bytes_per_block: usize,
    allow: impl Fn(&Kernel) -> bool,
) -> Result<&'static Kernel> {
    // With a factor below 0 the maximum is where q k is smallest, which the plain kernels do not track; with one of 0, or
    // flushed to it, their first reference is -inf * 0.
    let factor = (problem.softmax_scale * std::f64::consts::LOG2_E) as f32;
    let score_mod = problem.softcap.is_some() || problem.alibi.is_some() || factor < f32::MIN_POSITIVE;
    let takes = |kernel: &&Kernel| {
        (kernel.pass, kernel.dtype, kernel.score_mod) == (pass, problem.dtype, score_mod)
            && kernel.head_dim >= problem.head_dim
            && allow(kernel)
    };
    let reason = |kernel: &Kernel| {
        if !kernel.arch.runs_on(compute_cap) {
            return Some(format!("{} needs {}", kernel.name, kernel.arch));
        }
        let bytes = kernel.shared_bytes;
        if bytes > shared_bytes_per_block {
            return Some(format!("{} needs {bytes} bytes of shared memory", kernel.name));
        }
        if kernel.arch == Arch::Sm90 {
            hopper_refuses(problem, kernel)
        } else {
            None
        }
    };
    let candidates = || KERNELS.iter().filter(takes);
    let legal = candidates().filter(|kernel| reason(kernel).is_none());
    // min_by_key takes the first of equals.
    let suits = |kernel: &Kernel| kernel.arch != Arch::Sm90 || hopper_suits(problem);
    legal.min_by_key(|kernel| (kernel.head_dim, Reverse((suits(kernel), kernel.arch)))).ok_or_else(|| {
        let rejected: Vec<String> = candidates().filter_map(reason).collect();
        let (dtype, head_dim) = (problem.dtype, problem.head_dim);
        let pass = if pass == Pass::Forward { "forward" } else { "backward" };
        Error::NoInstance { pass, dtype, head_dim, compute_cap, shared_bytes_per_block, rejected }
    })
}

/// The kernel of a pass that leaves no choice.
fn companion(pass: Pass, is_it: impl Fn(&Kernel) -> bool) -> &'static Kernel {
    let found = KERNELS.iter().find(|kernel| kernel.pass == pass && is_it(kernel));
    found.expect("cuda/instances.def has delta, and every backward brings its conversion")
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
