//! Linear layers whose bias and GELU are part of one node.

use candle_core::{Result, Tensor, D};
use rayon::prelude::*;

use crate::activation::Activation;
use crate::node::{self, accumulator, update, Numbers};
use crate::number::{for_float, narrowed, Element, Real};
use crate::rows::{add, rows_per_task};
use crate::{check, composed};

/// `x weight^T + bias` with its backward, as one node.
///
/// ```text
/// y = x weight^T + bias          dx = dy weight          dweight = dy^T x          dbias = sum over rows of dy
/// ```
///
/// | tensor | shape | type |
/// | --- | --- | --- |
/// | `x` | `(.., inputs)` | f16, bf16, f32, f64 |
/// | `weight` | `(outputs, inputs)`, as `candle_nn::Linear` has it | as `x` |
/// | `bias` | `(outputs)` | as `x` |
/// | result | `(.., outputs)` | as `x` |
///
/// Candle's matrix product runs, and the bias is added in place. For f16 and bf16 it is an f32 product, and the result is rounded
/// once, after the bias.
///
/// # Errors
/// If shapes, types or devices disagree.
///
/// ```
/// # use candle_core::{DType, Device, Tensor, Var};
/// let x = Tensor::randn(0f32, 1f32, (2, 3, 4), &Device::Cpu)?;
/// let weight = Var::randn(0f32, 1f32, (5, 4), &Device::Cpu)?;
/// let bias = Var::zeros(5, DType::F32, &Device::Cpu)?;
/// let grads = candle_fused_ops::linear(&x, &weight, &bias)?.sum_all()?.backward()?;
/// assert!(grads.get(&weight).is_some() && grads.get(&bias).is_some());
/// # Ok::<(), candle_core::Error>(())
/// ```
pub fn linear(x: &Tensor, weight: &Tensor, bias: &Tensor) -> Result<Tensor> {
    check_linear(x, weight, bias)?;
    match x.device().is_cpu() {
        true => fused("linear", x, weight, bias, None),
        false => composed::linear(x, weight, bias),
    }
}

/// [`gelu`](crate::gelu) of [`linear`], as one node. The node keeps `h = x weight^T + bias` for the backward, in f32 for f16 and
/// bf16.
///
/// # Errors
/// As [`linear`].
pub fn linear_gelu(x: &Tensor, weight: &Tensor, bias: &Tensor) -> Result<Tensor> {
    check_linear(x, weight, bias)?;
    match x.device().is_cpu() {
        true => fused("linear_gelu", x, weight, bias, Some(Activation::Gelu)),
        false => composed::gelu(&composed::linear(x, weight, bias)?),
    }
}

fn check_linear(x: &Tensor, weight: &Tensor, bias: &Tensor) -> Result<()> {
    check::float("x", x)?;
    let inputs = check::last_axis("x", x)?;
    let outputs = match *weight.dims() {
        [outputs, of_weight] if of_weight == inputs && outputs > 0 => outputs,
        _ => {
            let got = weight.dims();
            return Err(check::error(format!(
                "weight: shape must be (outputs, {inputs}) with the last axis of x, got {got:?}"
            )));
        }
    };
    check::shape("bias", bias, &[outputs], "as the first axis of weight")?;
    check::same("weight", weight, "x", x)?;
    check::same("bias", bias, "x", x)
}

fn fused(
    name: &'static str,
    x: &Tensor,
    weight: &Tensor,
    bias: &Tensor,
    activation: Option<Activation>,
) -> Result<Tensor> {
    let (x, weight, bias) = (x.contiguous()?, weight.contiguous()?, bias.contiguous()?);
    let shape = [&x.dims()[..x.rank() - 1], bias.dims()].concat();
    for_float!(x.dtype(), T => {
        let h = preactivation::<T>(&x, &weight, &bias)?;
        let (y, kept) = match activation {
            Some(activation) => (activated::<T>(&h, activation), h),
            None => (T::from_acc(h), Vec::new()),
        };
        node::node(name, &[&x, &weight, &bias], node::storage(y), shape, move |inputs, dy| {
            let &[x, weight, bias] = inputs else { unreachable!("the node has three inputs") };
            let slopes = activation.map(|activation| (activation, kept.as_slice()));
            let (dh, dbias) = upstream::<T>(Numbers::of(dy).as_slice()?, slopes, bias.elem_count());
            let dh = node::tensor(dh, (dy.elem_count() / bias.elem_count(), bias.elem_count()));
            let dx = || dh.matmul(&wide(weight)?)?.to_dtype(x.dtype())?.reshape(x.shape());
            let dweight = || dh.t()?.matmul(&as_rows(x)?)?.to_dtype(x.dtype());
            Ok(vec![
                if x.track_op() { Some(dx()?) } else { None },
                if weight.track_op() { Some(dweight()?) } else { None },
                Some(node::tensor(narrowed::<T>(&dbias), bias.shape())),
            ])
        })
    })
}

/// Without its graph, in the type that sums are computed in.
fn wide(tensor: &Tensor) -> Result<Tensor> {
    tensor.detach().to_dtype(accumulator(tensor.dtype()))
}

/// [`wide`] as (rows, inputs).
fn as_rows(x: &Tensor) -> Result<Tensor> {
    wide(x)?.reshape(((), x.dim(D::Minus1)?))
}

/// x weight^T + bias
fn preactivation<T: Element>(x: &Tensor, weight: &Tensor, bias: &Tensor) -> Result<Vec<T::Acc>> {
    let product = as_rows(x)?.matmul(&wide(weight)?.t()?)?;
    let mut h = update::<T::Acc, _>(&product, std::mem::take)?;
    let (bias, outputs) = (wide(bias)?, bias.elem_count());
    let bias = Numbers::of(&bias);
    let bias = bias.as_slice::<T::Acc>()?;
    let rows = rows_per_task(h.len() / outputs, outputs);
    h.par_chunks_mut(rows * outputs).for_each(|rows| rows.chunks_exact_mut(outputs).for_each(|row| add(row, bias)));
    Ok(h)
}

fn activated<T: Element>(h: &[T::Acc], activation: Activation) -> Vec<T> {
    T::from_acc(h.par_iter().map(|&h| activation.at(h).0).collect())
}

/// The gradient of h, which is dy times the slope of the activation at h, and its sum over the rows.
fn upstream<T: Element>(
    dy: &[T],
    slopes: Option<(Activation, &[T::Acc])>,
    outputs: usize,
) -> (Vec<T::Acc>, Vec<T::Acc>) {
    let rows = rows_per_task(dy.len() / outputs, outputs);
    let chunk = rows * outputs;
    let mut dh = vec![T::Acc::ZERO; dy.len()];
    let partial_sums: Vec<Vec<T::Acc>> = dh
        .par_chunks_mut(chunk)
        .zip(dy.par_chunks(chunk))
        .enumerate()
        .map(|(task, (dh, dy))| {
            T::widen(dy, dh);
            if let Some((activation, h)) = slopes {
                dh.iter_mut().zip(&h[task * chunk..]).for_each(|(dh, &h)| *dh *= activation.at(h).1);
            }
            let mut sum = vec![T::Acc::ZERO; outputs];
            dh.chunks_exact(outputs).for_each(|row| add(&mut sum, row));
            sum
        })
        .collect();
    let mut dbias = vec![T::Acc::ZERO; outputs];
    partial_sums.iter().for_each(|sum| add(&mut dbias, sum));
    (dh, dbias)
}
