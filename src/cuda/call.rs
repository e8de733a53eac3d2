//! One call on a GPU, and the addresses that its launches read.

use candle_core::cuda::cudarc::driver::sys::CUdeviceptr;
use candle_core::{CudaStorage, Result, Tensor};

use super::launch::{address_or_null, Launcher};
use super::memory::{Element, Locked};
use super::params::{Shape, ShapeAddresses};
use crate::plan::CudaPlan;
use crate::problem::{Lengths, Problem};
use crate::tensors::Inputs;

/// A [`Problem`] with its plan and its ALiBi slopes.
pub(crate) struct Call<'a> {
    pub(super) problem: &'a Problem,
    pub(super) plan: &'a CudaPlan,
    /// ALiBi slopes, contiguous.
    slopes: Option<Tensor>,
}

impl<'a> Call<'a> {
    pub(crate) fn new(problem: &'a Problem, plan: &'a CudaPlan, alibi_slopes: Option<&Tensor>) -> Result<Self> {
        Ok(Self { problem, plan, slopes: alibi_slopes.map(Tensor::contiguous).transpose()? })
    }

    /// Number of rows of lse: one for each query and head.
    pub(super) fn rows(&self) -> usize {
        self.problem.rows_q() * self.problem.num_heads
    }

    /// The addresses of q, k and v. The problem has their strides.
    pub(super) fn read_inputs<'b, T: Element>(
        &self,
        inputs: Inputs<&'b CudaStorage>,
        launcher: &mut Launcher<'b>,
    ) -> Result<Inputs<CUdeviceptr>> {
        Ok(Inputs {
            q: launcher.read_storage::<T>(inputs.q, self.problem.q.offset)?,
            k: launcher.read_storage::<T>(inputs.k, self.problem.k.offset)?,
            v: launcher.read_storage::<T>(inputs.v, self.problem.v.offset)?,
        })
    }

    /// Locks the small tensors that every launch reads.
    pub(super) fn side_tensors(&self) -> SideTensors<'_> {
        let (cu_seqlens_q, cu_seqlens_k, key_lengths) = match &self.problem.lengths {
            Lengths::Padded { key_lengths, .. } => (None, None, key_lengths.as_ref().map(|lengths| lengths.tensor())),
            Lengths::Packed { cu_seqlens_q, cu_seqlens_k } => {
                (Some(cu_seqlens_q.tensor()), Some(cu_seqlens_k.tensor()), None)
            }
        };
        SideTensors {
            problem: self.problem,
            cu_seqlens_q: cu_seqlens_q.map(Locked::of),
            cu_seqlens_k: cu_seqlens_k.map(Locked::of),
            key_lengths: key_lengths.map(Locked::of),
            slopes: self.slopes.as_ref().map(Locked::of),
        }
    }
}

/// The small tensors that every launch of a call reads: lengths and ALiBi slopes.
pub(super) struct SideTensors<'a> {
    problem: &'a Problem,
    cu_seqlens_q: Option<Locked<'a>>,
    cu_seqlens_k: Option<Locked<'a>>,
    key_lengths: Option<Locked<'a>>,
    slopes: Option<Locked<'a>>,
}

impl SideTensors<'_> {
    /// The parameters that all kernels have.
    pub(super) fn shape<'b>(&'b self, launcher: &mut Launcher<'b>) -> Result<Shape> {
        let mut lengths =
            |tensor: &'b Option<Locked<'_>>| address_or_null(tensor.as_ref(), |lengths| lengths.read::<u32>(launcher));
        let cu_seqlens_q = lengths(&self.cu_seqlens_q)?;
        let cu_seqlens_k = lengths(&self.cu_seqlens_k)?;
        let key_lengths = lengths(&self.key_lengths)?;
        let alibi_slopes = address_or_null(self.slopes.as_ref(), |slopes| slopes.read::<f32>(launcher))?;
        Ok(Shape::new(self.problem, ShapeAddresses { cu_seqlens_q, cu_seqlens_k, key_lengths, alibi_slopes }))
    }
}
