//! What a kernel is handed: the twins of the structs in cuda/params.h, which has the shapes. Strides are in elements.
#![allow(missing_docs)] // cuda/params.h has them; only `testing` hands the structs on

use candle_core::cuda::cudarc::driver::sys::CUdeviceptr;
use candle_core::cuda::cudarc::driver::DeviceRepr;

use crate::instances::{Arch, Pass};
use crate::layout::PaddingSide;
use crate::mask::Mask;
use crate::plan::{self, MAX_SEQLEN};
use crate::problem::{self, Alibi, Lengths, Problem};

/// A parameter struct, and the kernels that take it as their one argument.
pub(super) trait Params: DeviceRepr + Copy {
    const PASS: Pass;
    const ARCH: Arch;
    fn shape_mut(&mut self) -> &mut Shape;
}

#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Strides {
    pub batch: i64,
    pub row: i64,
    pub head: i64,
}

#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    pub cu_seqlens_q: CUdeviceptr,
    pub cu_seqlens_k: CUdeviceptr,
    pub key_lengths: CUdeviceptr,
    pub alibi_slopes: CUdeviceptr,
    pub lse_batch: i64,
    pub lse_head: i64,
    pub alibi_batch: i32,
    pub batch: i32,
    pub first_batch: i32,
    pub keys_at_end: i32,
    pub seqlen_q: i32,
    pub seqlen_k: i32,
    pub num_heads: i32,
    pub num_heads_k: i32,
    pub head_dim: i32,
    pub window_left: i32,
    pub window_right: i32,
    pub product_factor: f32,
    pub softcap_log2: f32,
}

#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct FwdParams {
    pub q: CUdeviceptr,
    pub k: CUdeviceptr,
    pub v: CUdeviceptr,
    pub o: CUdeviceptr,
    pub lse: CUdeviceptr,
    pub q_strides: Strides,
    pub k_strides: Strides,
    pub v_strides: Strides,
    pub o_strides: Strides,
    pub shape: Shape,
    pub unrounded: i32,
}

#[repr(C, align(64))]
#[derive(Clone, Copy, Debug)]
pub struct TensorMap {
    pub words: [u64; 16],
}

#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Schedule {
    pub counters: CUdeviceptr,
    pub tiles: i32,
    pub m_blocks: i32,
    pub section_heads: i32,
}

#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct HopperFwdParams {
    pub q: TensorMap,
    pub k: TensorMap,
    pub v: TensorMap,
    pub fwd: FwdParams,
    pub schedule: Schedule,
}

#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct DeltaParams {
    pub o: CUdeviceptr,
    pub do_: CUdeviceptr,
    pub dlse: CUdeviceptr,
    pub delta: CUdeviceptr,
    pub o_strides: Strides,
    pub do_strides: Strides,
    pub shape: Shape,
}

#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct DqTiles {
    pub batch: i64,
    pub head: i64,
    pub count: i64,
}

#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct BwdParams {
    pub q: CUdeviceptr,
    pub k: CUdeviceptr,
    pub v: CUdeviceptr,
    pub do_: CUdeviceptr,
    pub lse: CUdeviceptr,
    pub delta: CUdeviceptr,
    pub dq_sums: CUdeviceptr,
    pub turns: CUdeviceptr,
    pub dk: CUdeviceptr,
    pub dv: CUdeviceptr,
    pub q_strides: Strides,
    pub k_strides: Strides,
    pub v_strides: Strides,
    pub do_strides: Strides,
    pub dk_strides: Strides,
    pub dq_tiles: DqTiles,
    pub shape: Shape,
    pub softmax_scale: f32,
}

#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct ConvertParams {
    pub dq_sums: CUdeviceptr,
    pub dq: CUdeviceptr,
    pub dq_strides: Strides,
    pub dq_tiles: DqTiles,
    pub shape: Shape,
    pub softmax_scale: f32,
}

// The same sizes and offsets are asserted by nvcc on cuda/params.h.
include!(concat!(env!("OUT_DIR"), "/layout.rs"));

macro_rules! params {
    ($($name:ident: $pass:ident on $arch:ident, $($shape:ident).+;)*) => {$(
        // SAFETY: `#[repr(C)]`, integers and floats only, laid out as the kernels' struct of the same name.
        unsafe impl DeviceRepr for $name {}
        impl Params for $name {
            const PASS: Pass = Pass::$pass;
            const ARCH: Arch = Arch::$arch;
            fn shape_mut(&mut self) -> &mut Shape {
                &mut self.$($shape).+
            }
        }
    )*};
}
params!(
    FwdParams: Forward on Sm80, shape;
    HopperFwdParams: Forward on Sm90, fwd.shape;
    DeltaParams: Delta on Sm80, shape;
    BwdParams: Backward on Sm80, shape;
    ConvertParams: Convert on Sm80, shape;
);

/// Stands for no pointer.
pub const NULL: CUdeviceptr = 0;

impl From<problem::Strides> for Strides {
    /// The offset is part of the pointer.
    fn from(strides: problem::Strides) -> Self {
        Self { batch: strides.batch as i64, row: strides.row as i64, head: strides.head as i64 }
    }
}

impl From<plan::DqTiles> for DqTiles {
    fn from(tiles: plan::DqTiles) -> Self {
        Self { batch: tiles.batch as i64, head: tiles.head as i64, count: tiles.count as i64 }
    }
}

impl Schedule {
    /// The tiles of `schedule`, and what its blocks count in.
    pub fn new(schedule: &plan::Schedule, counters: CUdeviceptr) -> Self {
        // `Plan` has checked that they fit 32 bits.
        let &plan::Schedule { tiles, m_blocks, section_heads } = schedule;
        Self { counters, tiles: tiles as i32, m_blocks: m_blocks as i32, section_heads: section_heads as i32 }
    }
}

/// The device addresses of a [`Shape`]; [`NULL`] for what the call does not use.
#[derive(Clone, Copy, Debug, Default)]
pub struct ShapeAddresses {
    /// `u32`, `batch + 1` entries: of q, and of k and v.
    pub cu_seqlens: [CUdeviceptr; 2],
    /// `u32`, `batch` entries.
    pub key_lengths: CUdeviceptr,
    /// f32.
    pub alibi_slopes: CUdeviceptr,
}

impl Shape {
    /// Sizes, mask and options of `problem`, with the device addresses that belong to it.
    pub fn new(problem: &Problem, addresses: ShapeAddresses) -> Self {
        let ShapeAddresses { cu_seqlens, key_lengths, alibi_slopes } = addresses;
        // `Plan` has checked that sizes fit 32 bits.
        let keys_at_end = match &problem.lengths {
            Lengths::Padded { key_lengths: Some(lengths), .. } => lengths.side() == PaddingSide::Left,
            _ => false,
        };
        let (lse_batch, lse_head) = match &problem.lengths {
            &Lengths::Padded { seqlen_q, .. } => (problem.num_heads * seqlen_q, seqlen_q),
            Lengths::Packed { .. } => (0, problem.rows_q()),
        };
        let alibi_batch = match problem.alibi {
            Some(Alibi::PerBatchAndHead) => problem.num_heads,
            Some(Alibi::PerHead) | None => 0,
        };
        let (left, right) = match problem.mask {
            Mask::None => (None, None),
            Mask::Causal => (None, Some(0)),
            Mask::Window { left, right } => (left, right),
        };
        // An open side reaches past every sequence, and so does a longer window.
        let side = |side: Option<usize>| side.unwrap_or(MAX_SEQLEN).min(MAX_SEQLEN) as i32;
        let log2_e = std::f64::consts::LOG2_E;
        let product_factor = match problem.softcap {
            None => problem.softmax_scale * log2_e,
            Some(softcap) => problem.softmax_scale / softcap,
        };
        // 0 stands for none, and the device takes what is below the normal range for it.
        let softcap_log2 = problem.softcap.map_or(0.0, |softcap| (softcap * log2_e).max(f64::from(f32::MIN_POSITIVE)));
        Self {
            cu_seqlens_q: cu_seqlens[0],
            cu_seqlens_k: cu_seqlens[1],
            key_lengths,
            alibi_slopes,
            lse_batch: lse_batch as i64,
            lse_head: lse_head as i64,
            alibi_batch: alibi_batch as i32,
            batch: problem.batch() as i32,
            first_batch: 0,
            keys_at_end: i32::from(keys_at_end),
            seqlen_q: problem.max_seqlen_q() as i32,
            seqlen_k: problem.max_seqlen_k() as i32,
            num_heads: problem.num_heads as i32,
            num_heads_k: problem.num_heads_k as i32,
            head_dim: problem.head_dim as i32,
            window_left: side(left),
            window_right: side(right),
            product_factor: product_factor as f32,
            softcap_log2: softcap_log2 as f32,
        }
    }
}
