//! Attention on the host: the algorithm of the paper, split into tasks that run on any thread.
//!
//! The forward cuts the queries into tiles and the backward cuts the keys. Each (batch, head, tile) is one task. A task
//! loops over the tiles of the other side and skips those that the mask hides. It never stores a `seqlen x seqlen` matrix.
//! The tiles alone fix the order of every sum, so the bits do not depend on the number of threads.

mod backward;
mod element;
mod forward;
mod matmul;
mod parallel;
mod scores;

use candle_core::{CpuStorage, DType, Result, Storage, Tensor, WithDType};
use half::{bf16, f16};

use self::element::Element;
use crate::op::Output;
use crate::plan::{Plan, Tile};
use crate::problem::{Alibi, Problem, Strides};

/// A [`Problem`] and everything else that the host needs to compute it.
pub(crate) struct Execution<'a> {
    problem: &'a Problem,
    forward: Tile,
    backward: Tile,
    /// ALiBi slopes, `(num_heads)` or `(batch, num_heads)`; empty without ALiBi.
    slopes: Vec<f32>,
    /// The widest vector instructions of this machine.
    arch: pulp::Arch,
}

impl<'a> Execution<'a> {
    pub(crate) fn new(problem: &'a Problem, plan: &Plan, alibi_slopes: Option<&Tensor>) -> Result<Self> {
        let &Plan::Cpu { forward, backward } = plan else {
            unreachable!("Plan::choose returns Plan::Cpu for tensors on the host")
        };
        let slopes = match alibi_slopes {
            Some(slopes) => slopes.flatten_all()?.to_vec1()?,
            None => Vec::new(),
        };
        Ok(Self { problem, forward, backward, slopes, arch: pulp::Arch::new() })
    }

    /// The ALiBi slope of one head.
    fn slope(&self, batch: usize, head: usize) -> Option<f32> {
        self.problem.alibi.map(|alibi| match alibi {
            Alibi::PerHead => self.slopes[head],
            Alibi::PerBatchAndHead => self.slopes[batch * self.problem.num_heads + head],
        })
    }
}

/// Runs the forward over the storages of q, k and v.
///
/// Returns the result that `output` asks for, and the two tensors that the backward needs: `row_max` and `log2_row_sum`.
pub(crate) fn forward(
    execution: &Execution,
    output: Output,
    inputs: [&CpuStorage; 3],
) -> Result<(CpuStorage, [CpuStorage; 2])> {
    match execution.problem.dtype {
        DType::F64 => typed_forward::<f64>(execution, output, inputs),
        DType::F32 => typed_forward::<f32>(execution, output, inputs),
        DType::F16 => typed_forward::<f16>(execution, output, inputs),
        DType::BF16 => typed_forward::<bf16>(execution, output, inputs),
        other => unreachable!("Problem admits no {other:?}"),
    }
}

/// Runs the backward over q, k, v, the result of the forward, its gradient, `row_max` and `log2_row_sum`.
///
/// Returns the gradients of q, k and v; `None` for an input that is not tracked.
pub(crate) fn backward(
    execution: &Execution,
    output: Output,
    tensors: [&Tensor; 7],
) -> Result<[Option<CpuStorage>; 3]> {
    match execution.problem.dtype {
        DType::F64 => typed_backward::<f64>(execution, output, tensors),
        DType::F32 => typed_backward::<f32>(execution, output, tensors),
        DType::F16 => typed_backward::<f16>(execution, output, tensors),
        DType::BF16 => typed_backward::<bf16>(execution, output, tensors),
        other => unreachable!("Problem admits no {other:?}"),
    }
}

fn typed_forward<T: Element>(
    execution: &Execution,
    output: Output,
    [q, k, v]: [&CpuStorage; 3],
) -> Result<(CpuStorage, [CpuStorage; 2])> {
    let inputs = [T::cpu_storage_as_slice(q)?, T::cpu_storage_as_slice(k)?, T::cpu_storage_as_slice(v)?];
    let rows = execution.problem.rows_q() * execution.problem.num_heads;
    let o_len = rows * execution.problem.head_dim;
    let mut lse = forward::Lse::new(rows);
    let result = match output {
        Output::O => {
            let mut o = vec![T::default(); o_len];
            forward::forward(execution, inputs, &mut o, &mut lse);
            T::to_cpu_storage_owned(o)
        }
        Output::OAndLse => {
            let mut both = vec![T::Acc::default(); o_len + rows];
            let (o, natural) = both.split_at_mut(o_len);
            forward::forward(execution, inputs, o, &mut lse);
            natural.iter_mut().zip(lse.natural()).for_each(|(to, lse)| *to = lse);
            T::Acc::to_cpu_storage_owned(both)
        }
    };
    Ok((result, [lse.row_max, lse.log2_row_sum].map(T::Acc::to_cpu_storage_owned)))
}

fn typed_backward<T: Element>(
    execution: &Execution,
    output: Output,
    [q, k, v, result, grad, row_max, log2_row_sum]: [&Tensor; 7],
) -> Result<[Option<CpuStorage>; 3]> {
    let wanted = backward::Wanted { dq: q.track_op(), dk: k.track_op(), dv: v.track_op() };
    let guards = [q, k, v, result, grad, row_max, log2_row_sum].map(|tensor| tensor.storage_and_layout().0);
    let [q, k, v, result, grad_storage, row_max, log2_row_sum] = guards.each_ref().map(|guard| match &**guard {
        Storage::Cpu(storage) => storage,
        _ => unreachable!("Problem admits one device"),
    });
    let inputs = [T::cpu_storage_as_slice(q)?, T::cpu_storage_as_slice(k)?, T::cpu_storage_as_slice(v)?];
    let lse = [T::Acc::cpu_storage_as_slice(row_max)?, T::Acc::cpu_storage_as_slice(log2_row_sum)?];
    let grads = match output {
        Output::O => {
            let upstream = backward::Upstream {
                o: T::cpu_storage_as_slice(result)?,
                do_: T::cpu_storage_as_slice(grad_storage)?,
                do_strides: Strides::of("do", grad.layout(), execution.problem.output_layout)?,
                dlse: None,
            };
            backward::backward(execution, inputs, lse, &upstream, wanted)
        }
        Output::OAndLse => {
            let o_len = execution.problem.rows_q() * execution.problem.num_heads * execution.problem.head_dim;
            let grad_start = grad.layout().start_offset();
            let (do_, dlse) = T::Acc::cpu_storage_as_slice(grad_storage)?[grad_start..].split_at(o_len);
            let upstream = backward::Upstream {
                o: &T::Acc::cpu_storage_as_slice(result)?[..o_len],
                do_,
                do_strides: execution.problem.contiguous_o(),
                dlse: Some(dlse),
            };
            backward::backward(execution, inputs, lse, &upstream, wanted)
        }
    };
    Ok(grads.map(|grad| grad.map(T::to_cpu_storage_owned)))
}
