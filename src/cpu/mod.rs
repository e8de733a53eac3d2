//! Attention on the CPU: the algorithm of the paper, split into tasks that run on any thread.
//!
//! The forward cuts the queries into tiles and the backward cuts the keys. Each (batch, head, tile) is one task. A task
//! loops over the tiles of the other side and skips those that the mask hides. It never stores a `seqlen x seqlen` matrix.
//! The tiles alone fix the order of every sum, so the bits do not depend on the number of threads.
//!
//! A forward of few queries without gradients is memory-bound, so it has other tasks: each reads a part of the keys.

mod backward;
mod call;
mod element;
mod few_queries;
mod forward;
mod lse;
mod matmul;
mod parallel;
mod scores;

use candle_core::{CpuStorage, DType, Result, Storage, StorageRef, Tensor, WithDType};
use half::{bf16, f16};

pub(crate) use self::call::Call;
use self::element::{Element, Real};
pub(crate) use self::lse::Lse;
use crate::output::Output;
use crate::problem::{Problem, Strides};
use crate::tensors::{BackwardInputs, Gradients, Inputs};

/// Runs the forward over the storages of q, k and v.
///
/// Returns the result that `output` asks for, and the lse that the backward reads.
pub(crate) fn forward(
    call: &Call,
    output: Output,
    inputs: Inputs<&CpuStorage>,
) -> Result<(CpuStorage, Lse<CpuStorage>)> {
    match call.problem.dtype {
        DType::F64 => typed_forward::<f64>(call, output, inputs),
        DType::F32 => typed_forward::<f32>(call, output, inputs),
        DType::F16 => typed_forward::<f16>(call, output, inputs),
        DType::BF16 => typed_forward::<bf16>(call, output, inputs),
        other => unreachable!("Problem accepts no {other:?}"),
    }
}

/// Runs the backward.
///
/// Returns the gradients of q, k and v; `None` for an input that is not tracked.
pub(crate) fn backward(
    call: &Call,
    output: Output,
    tensors: BackwardInputs<Lse<Tensor>>,
) -> Result<Gradients<Option<CpuStorage>>> {
    match call.problem.dtype {
        DType::F64 => typed_backward::<f64>(call, output, tensors),
        DType::F32 => typed_backward::<f32>(call, output, tensors),
        DType::F16 => typed_backward::<f16>(call, output, tensors),
        DType::BF16 => typed_backward::<bf16>(call, output, tensors),
        other => unreachable!("Problem accepts no {other:?}"),
    }
}

fn typed_forward<T: Element>(
    call: &Call,
    output: Output,
    inputs: Inputs<&CpuStorage>,
) -> Result<(CpuStorage, Lse<CpuStorage>)> {
    let inputs = inputs.try_map(T::cpu_storage_as_slice)?;
    let rows = call.problem.rows_q() * call.problem.num_heads;
    let o_len = rows * call.problem.head_dim_v;
    let mut lse = Lse { row_max_log2: vec![T::Acc::ZERO; rows], row_sum_log2: vec![T::Acc::ZERO; rows] };
    let result = match output {
        Output::O => {
            let mut o = vec![T::default(); o_len];
            forward_into(call, inputs, &mut o, &mut lse);
            T::to_cpu_storage_owned(o)
        }
        Output::OAndLse => {
            let mut both = vec![T::Acc::ZERO; o_len + rows];
            let (o, natural) = both.split_at_mut(o_len);
            forward_into(call, inputs, o, &mut lse);
            for ((natural, &row_max_log2), &row_sum_log2) in
                natural.iter_mut().zip(&lse.row_max_log2).zip(&lse.row_sum_log2)
            {
                *natural = (row_max_log2 + row_sum_log2) * T::Acc::LN_2;
            }
            T::Acc::to_cpu_storage_owned(both)
        }
    };
    Ok((result, lse.map(T::Acc::to_cpu_storage_owned)))
}

/// The forward that the plan chose. The caller has filled `o` with zeros.
fn forward_into<T: Element, O: Element<Acc = T::Acc>>(
    call: &Call,
    inputs: Inputs<&[T]>,
    o: &mut [O],
    lse: &mut Lse<Vec<T::Acc>>,
) {
    match call.plan.few_queries {
        true => few_queries::forward(call, inputs, o, lse),
        false => forward::forward(call, inputs, o, lse),
    }
}

fn typed_backward<T: Element>(
    call: &Call,
    output: Output,
    BackwardInputs { inputs, result, grad, lse }: BackwardInputs<Lse<Tensor>>,
) -> Result<Gradients<Option<CpuStorage>>> {
    let problem = call.problem;
    let wanted = backward::Wanted { dq: inputs.q.track_op(), dk: inputs.k.track_op(), dv: inputs.v.track_op() };
    let grad = readable(problem, output, grad)?;
    let grad_start = grad.layout().start_offset();
    let (inputs, lse) = (inputs.map(Locked::of), lse.as_ref().map(Locked::of));
    let (result, locked_grad) = (Locked::of(result), Locked::of(&grad));
    let inputs = inputs.as_ref().try_map(Locked::slice::<T>)?;
    let lse = lse.as_ref().try_map(Locked::slice::<T::Acc>)?;
    let grads = match output {
        Output::O => {
            let upstream = backward::Upstream {
                o: result.slice::<T>()?,
                do_: locked_grad.slice::<T>()?,
                do_strides: Strides::of("do", grad.layout(), problem.output_layout)?,
                dlse: None,
            };
            backward::backward(call, inputs, lse, &upstream, wanted)
        }
        Output::OAndLse => {
            let o_len = problem.rows_q() * problem.num_heads * problem.head_dim_v;
            let (do_, dlse) = locked_grad.slice::<T::Acc>()?[grad_start..].split_at(o_len);
            let upstream = backward::Upstream {
                o: &result.slice::<T::Acc>()?[..o_len],
                do_,
                do_strides: problem.contiguous_o(),
                dlse: Some(dlse),
            };
            backward::backward(call, inputs, lse, &upstream, wanted)
        }
    };
    Ok(grads.map(|grad| grad.map(T::to_cpu_storage_owned)))
}

/// A gradient with strides that the backward supports. Candle passes gradients with any strides: transposed, or broadcast from a
/// sum.
fn readable(problem: &Problem, output: Output, grad: &Tensor) -> Result<Tensor> {
    match output {
        Output::O if Strides::of("do", grad.layout(), problem.output_layout).is_ok() => Ok(grad.clone()),
        _ => grad.contiguous(),
    }
}

/// The storage of a tensor on the CPU, locked against writers.
struct Locked<'a>(StorageRef<'a>);

impl<'a> Locked<'a> {
    fn of(tensor: &'a Tensor) -> Self {
        Self(tensor.storage_and_layout().0)
    }

    /// All elements of the storage.
    fn slice<T: WithDType>(&self) -> Result<&[T]> {
        match &*self.0 {
            Storage::Cpu(storage) => T::cpu_storage_as_slice(storage),
            _ => unreachable!("Problem accepts only one device"),
        }
    }
}
