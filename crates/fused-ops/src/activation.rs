//! GELU, and the gated activations of MLPs.

use std::f64::consts::{FRAC_1_SQRT_2, PI};

use candle_core::{Result, Tensor};
use rayon::prelude::*;

#[cfg(feature = "cuda")]
use crate::cuda;
use crate::number::{for_float, Element, Real};
use crate::{check, composed, node};

/// GELU in its tanh form, as GPT-2 has it.
///
/// ```text
/// s = sigmoid(2 sqrt(2 / pi) (x + 0.044715 x^3))          y = x s
///
/// dx = dy (s + y (1 - s) 2 sqrt(2 / pi) (1 + 3 * 0.044715 x^2))
/// ```
///
/// `x` has any shape, in f16, bf16, f32 or f64. Infinity gives infinity, minus infinity gives 0, and NaN gives NaN.
///
/// # Errors
/// If the type of `x` is not a floating-point type.
///
/// ```
/// # use candle_core::{Device, Tensor, Var};
/// let x = Var::randn(0f32, 1f32, (2, 3), &Device::Cpu)?;
/// assert!(candle_fused_ops::gelu(&x)?.sum_all()?.backward()?.get(&x).is_some());
/// # Ok::<(), candle_core::Error>(())
/// ```
pub fn gelu(x: &Tensor) -> Result<Tensor> {
    unary("gelu", Activation::Gelu, x, composed::gelu)
}

/// GELU with the error function, as BERT and PyTorch's default have it.
///
/// ```text
/// c = (1 + erf(x / sqrt(2))) / 2          y = x c          dx = dy (c + x exp(-x^2 / 2) / sqrt(2 pi))
/// ```
///
/// Otherwise as [`gelu`].
///
/// # Errors
/// If the type of `x` is not a floating-point type.
pub fn gelu_erf(x: &Tensor) -> Result<Tensor> {
    unary("gelu_erf", Activation::GeluErf, x, composed::gelu_erf)
}

/// `silu(gate) * up`, as Llama has it between the projections of its MLP.
///
/// ```text
/// s = sigmoid(gate)          y = gate s up
///
/// dgate = dy up s (1 + gate (1 - s))          dup = dy gate s
/// ```
///
/// `gate` and `up` have one shape and one type. NaN gives NaN; an infinite gate has a gradient of NaN.
///
/// # Errors
/// If `gate` and `up` differ in shape, type or device, or have no floating-point type.
///
/// ```
/// # use candle_core::{Device, Tensor, Var};
/// let gate = Var::randn(0f32, 1f32, (2, 3), &Device::Cpu)?;
/// let up = Var::randn(0f32, 1f32, (2, 3), &Device::Cpu)?;
/// let grads = candle_fused_ops::swiglu(&gate, &up)?.sum_all()?.backward()?;
/// assert!(grads.get(&gate).is_some() && grads.get(&up).is_some());
/// # Ok::<(), candle_core::Error>(())
/// ```
pub fn swiglu(gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    gated("swiglu", Activation::Silu, gate, up, composed::swiglu)
}

/// `gelu(gate) * up` with the [`gelu`] of the tanh form, as Gemma has it.
///
/// # Errors
/// As [`swiglu`].
pub fn geglu(gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    gated("geglu", Activation::Gelu, gate, up, composed::geglu)
}

/// The tanh form of GELU is x (1 + tanh(sqrt(2 / pi) (x + CUBIC x^3))) / 2.
pub(crate) const CUBIC: f64 = 0.044715;

#[derive(Clone, Copy)]
pub(crate) enum Activation {
    Gelu,
    GeluErf,
    Silu,
}

impl Activation {
    /// The value at x, and the derivative.
    pub(crate) fn at<A: Real>(self, x: A) -> (A, A) {
        // From here on, both forms of GELU are x or 0 in every type. Powers of a larger x would overflow.
        const SATURATED: f64 = 20.0;
        let saturated = A::real(SATURATED);
        match self {
            Self::Gelu | Self::GeluErf if x > saturated => (x, A::ONE),
            Self::Gelu | Self::GeluErf if x < -saturated => (A::ZERO, A::ZERO),
            Self::Gelu => {
                let linear = 2.0 * (2.0 / PI).sqrt();
                let (linear, cubic) = (A::real(linear), A::real(linear * CUBIC));
                let s = sigmoid(x * (linear + cubic * x * x));
                let y = x * s;
                (y, s + y * (A::ONE - s) * (linear + A::real(3.0) * cubic * x * x))
            }
            Self::GeluErf => {
                let half = A::real(0.5);
                let c = half * (A::ONE + (x * A::real(FRAC_1_SQRT_2)).erf());
                let density = (-half * x * x).exp() * A::real(1.0 / (2.0 * PI).sqrt());
                (x * c, c + x * density)
            }
            Self::Silu => {
                let s = sigmoid(x);
                (x * s, s * (A::ONE + x * (A::ONE - s)))
            }
        }
    }
}

fn sigmoid<A: Real>(x: A) -> A {
    A::ONE / (A::ONE + (-x).exp())
}

/// Elements that one task computes at a time, in buffers that fit the first-level cache.
const CHUNK: usize = 1 << 11;

fn unary(
    name: &'static str,
    activation: Activation,
    x: &Tensor,
    composed: fn(&Tensor) -> Result<Tensor>,
) -> Result<Tensor> {
    check::float("x", x)?;
    #[cfg(feature = "cuda")]
    if let Some(device) = cuda::device_with_kernels(x) {
        return cuda::activation::unary(device, name, x);
    }
    if !x.device().is_cpu() {
        return composed(x);
    }
    let x = x.contiguous()?;
    for_float!(x.dtype(), T => {
        let [y] = map::<T, 1, 1>([node::Numbers::of(&x).as_slice()?], |[x]| [activation.at(x).0]);
        node::node(name, &[&x], node::storage(y), x.shape(), move |inputs, dy| {
            let x = inputs[0];
            let (numbers, dy) = (node::Numbers::of(x), node::Numbers::of(dy));
            let [dx] = map::<T, 2, 1>([numbers.as_slice()?, dy.as_slice()?], |[x, dy]| [dy * activation.at(x).1]);
            Ok(vec![Some(node::tensor(dx, x.shape()))])
        })
    })
}

fn gated(
    name: &'static str,
    activation: Activation,
    gate: &Tensor,
    up: &Tensor,
    composed: fn(&Tensor, &Tensor) -> Result<Tensor>,
) -> Result<Tensor> {
    check::float("gate", gate)?;
    check::shape("up", up, gate.dims(), "as gate")?;
    check::same("up", up, "gate", gate)?;
    #[cfg(feature = "cuda")]
    if let Some(device) = cuda::device_with_kernels(gate) {
        return cuda::activation::gated(device, name, gate, up);
    }
    if !gate.device().is_cpu() {
        return composed(gate, up);
    }
    let (gate, up) = (gate.contiguous()?, up.contiguous()?);
    for_float!(gate.dtype(), T => {
        let [y] = {
            let (gate, up) = (node::Numbers::of(&gate), node::Numbers::of(&up));
            map::<T, 2, 1>([gate.as_slice()?, up.as_slice()?], |[gate, up]| [activation.at(gate).0 * up])
        };
        node::node(name, &[&gate, &up], node::storage(y), gate.shape(), move |inputs, dy| {
            let [gate, up, dy] = [inputs[0], inputs[1], dy].map(node::Numbers::of);
            let [dgate, dup] = map::<T, 3, 2>([gate.as_slice()?, up.as_slice()?, dy.as_slice()?], |[gate, up, dy]| {
                let (value, slope) = activation.at(gate);
                [dy * up * slope, dy * value]
            });
            let shape = inputs[0].shape();
            Ok(vec![Some(node::tensor(dgate, shape)), Some(node::tensor(dup, shape))])
        })
    })
}

/// Applies `f` to each element of the inputs, which have one length.
fn map<T: Element, const N: usize, const M: usize>(
    inputs: [&[T]; N],
    f: impl Fn([T::Acc; N]) -> [T::Acc; M] + Sync,
) -> [Vec<T>; M] {
    let len = inputs[0].len();
    let mut results = [(); M].map(|()| vec![T::default(); len]);
    let mut chunks = results.each_mut().map(|result| result.chunks_mut(CHUNK));
    let tasks: Vec<[&mut [T]; M]> = (0..len.div_ceil(CHUNK))
        .map(|_| chunks.each_mut().map(|chunks| chunks.next().expect("all results have one length")))
        .collect();
    tasks.into_par_iter().enumerate().for_each(|(task, results)| {
        let (start, len) = (task * CHUNK, results[0].len());
        let (mut wide, mut wide_results) = ([[T::Acc::ZERO; CHUNK]; N], [[T::Acc::ZERO; CHUNK]; M]);
        for (wide, input) in wide.iter_mut().zip(inputs) {
            T::widen(&input[start..start + len], &mut wide[..len]);
        }
        for at in 0..len {
            let values = f(std::array::from_fn(|input| wide[input][at]));
            wide_results.iter_mut().zip(values).for_each(|(result, value)| result[at] = value);
        }
        for (result, wide) in results.into_iter().zip(&wide_results) {
            T::narrow(&wide[..len], result);
        }
    });
    results
}
