//! The parameters of kernels, made from a [`Problem`] and a plan. Strides are in elements.
#![allow(missing_docs)] // cuda/params.h documents the structs; only `testing` exports them

use candle_core::cuda::cudarc::driver::sys::CUdeviceptr;
use candle_core::cuda::cudarc::driver::DeviceRepr;

use crate::instances::Parameters;
use crate::layout::PaddingSide;
use crate::mask::Mask;
use crate::plan::{self, MAX_SEQLEN};
use crate::problem::{self, Alibi, Lengths, Problem};

// The structs, with their layout asserted: generated from cuda/params.h, on which nvcc asserts the same.
include!(concat!(env!("OUT_DIR"), "/params.rs"));

/// A parameter struct: the one argument of the kernels whose row in the table has its kind.
pub(super) trait Params: DeviceRepr + Copy {
    const KIND: Parameters;
    fn shape_mut(&mut self) -> &mut Shape;
}

macro_rules! params {
    ($($name:ident, $kind:ident: $($shape:ident).+;)*) => {$(
        // SAFETY: `#[repr(C)]`, integers and floats only, laid out as the kernels' struct of the same name.
        unsafe impl DeviceRepr for $name {}
        impl Params for $name {
            const KIND: Parameters = Parameters::$kind;
            fn shape_mut(&mut self) -> &mut Shape {
                &mut self.$($shape).+
            }
        }
    )*};
}
params!(
    FwdParams, Fwd: shape;
    Sm90FwdParams, Sm90Fwd: fwd.shape;
    DeltaParams, Delta: shape;
    BwdParams, Bwd: shape;
    Sm90BwdParams, Sm90Bwd: bwd.shape;
    ConvertParams, Convert: shape;
);

/// The null pointer.
pub const NULL: CUdeviceptr = 0;

impl From<problem::Strides> for Strides {
    /// The offset is part of the pointer.
    fn from(strides: problem::Strides) -> Self {
        Self { batch: strides.batch as i64, row: strides.row as i64, head: strides.head as i64 }
    }
}

impl From<plan::RowBlocks> for RowBlocks {
    fn from(blocks: plan::RowBlocks) -> Self {
        Self { batch: blocks.batch as i64, head: blocks.head as i64, count: blocks.count as i64 }
    }
}

impl Schedule {
    /// The tiles of `schedule`, and the address of the tile counter.
    pub fn new(schedule: &plan::Schedule, counters: CUdeviceptr) -> Self {
        // `Plan` has checked that they fit 32 bits.
        let &plan::Schedule { tiles, head_tiles, section_heads } = schedule;
        Self { counters, tiles: tiles as i32, head_tiles: head_tiles as i32, section_heads: section_heads as i32 }
    }
}

/// The device addresses of a [`Shape`]; [`NULL`] if the call does not use the tensor.
#[derive(Clone, Copy, Debug, Default)]
pub struct ShapeAddresses {
    /// `u32`, `batch + 1` entries.
    pub cu_seqlens_q: CUdeviceptr,
    /// `u32`, `batch + 1` entries.
    pub cu_seqlens_k: CUdeviceptr,
    /// `u32`, `batch` entries.
    pub key_lengths: CUdeviceptr,
    /// f32.
    pub alibi_slopes: CUdeviceptr,
}

impl Shape {
    /// Sizes, mask and options of `problem`, with its device addresses.
    pub fn new(problem: &Problem, addresses: ShapeAddresses) -> Self {
        let ShapeAddresses { cu_seqlens_q, cu_seqlens_k, key_lengths, alibi_slopes } = addresses;
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
        // MAX_SEQLEN is longer than every sequence, so it means no limit.
        let side = |side: Option<usize>| side.unwrap_or(MAX_SEQLEN).min(MAX_SEQLEN) as i32;
        let log2_e = std::f64::consts::LOG2_E;
        // 0 means no softcap, and the device flushes numbers below the normal range to 0.
        let softcap_log2 = problem.softcap.map_or(0.0, |softcap| (softcap * log2_e).max(f64::from(f32::MIN_POSITIVE)));
        Self {
            cu_seqlens_q,
            cu_seqlens_k,
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
            head_dim_v: problem.head_dim_v as i32,
            window_left: side(left),
            window_right: side(right),
            softmax_scale_log2: (problem.softmax_scale * log2_e) as f32,
            softcap_log2: softcap_log2 as f32,
            softmax_scale_over_softcap: problem.softcap.map_or(0.0, |softcap| problem.softmax_scale / softcap) as f32,
        }
    }
}
