//! Layer norm and RMS norm, each also with a residual add before it.

use candle_core::{Result, Storage, Tensor};
use rayon::prelude::*;

#[cfg(feature = "cuda")]
use crate::cuda;
use crate::number::{for_float, narrowed, widened, Element, Real};
use crate::rows::{add, dot, rows_per_task, sum};
use crate::{check, composed, node};

/// Layer norm over the last axis, with its backward.
///
/// ```text
/// mean = sum of x / width          rstd = 1 / sqrt(sum of (x - mean)^2 / width + eps)          xhat = (x - mean) rstd
/// y = xhat weight + bias
///
/// g = dy weight                    dx = rstd (g - sum of g / width - xhat sum of (g xhat) / width)
/// dweight = sum over rows of dy xhat                    dbias = sum over rows of dy
/// ```
///
/// | tensor | shape | type |
/// | --- | --- | --- |
/// | `x`, result | `(.., width)` | f16, bf16, f32, f64 |
/// | `weight`, `bias` | `(width)` | as `x` |
///
/// The backward reads x and dy once. Between the passes the node keeps mean and rstd, two numbers per row. Without a `bias` it
/// is left out of the sum.
///
/// If x is a result of this crate and another operator uses it too, such as a residual add, x has two gradients. If the other one is
/// there first, the backward adds it to dx in the same pass, before rounding. On a GPU it does so for f16 and bf16 in rows aligned to 16
/// bytes. Otherwise a second kernel adds it after rounding.
///
/// NaN or infinity in a row of x makes the whole row NaN, and its gradient.
///
/// # Errors
/// If `x` has no last axis or an empty one; if shapes, types or devices disagree; if `eps` is negative or not finite.
///
/// # Example
/// ```
/// # use candle_core::{DType, Device, Tensor, Var};
/// let x = Var::randn(0f32, 1f32, (2, 3, 8), &Device::Cpu)?;
/// let weight = Var::ones(8, DType::F32, &Device::Cpu)?;
/// let bias = Var::zeros(8, DType::F32, &Device::Cpu)?;
/// let y = candle_fused_ops::layer_norm(&x, &weight, Some(&bias), 1e-5)?;
/// let grads = y.sqr()?.sum_all()?.backward()?;
/// assert!([x, weight, bias].iter().all(|var| grads.get(var).is_some()));
/// # Ok::<(), candle_core::Error>(())
/// ```
pub fn layer_norm(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>, eps: f64) -> Result<Tensor> {
    Ok(Norm { weight, bias, kind: Kind::Layer, eps }.apply(x, None)?.1)
}

/// RMS norm over the last axis, with its backward.
///
/// ```text
/// rstd = 1 / sqrt(sum of x^2 / width + eps)          xhat = x rstd          y = xhat weight
///
/// g = dy weight          dx = rstd (g - xhat sum of (g xhat) / width)          dweight = sum over rows of dy xhat
/// ```
///
/// Shapes, types and errors are as for [`layer_norm`]. A NaN makes its whole row NaN. An infinity makes its own element NaN and the
/// rest of the row 0. In both cases the gradient of the whole row is NaN.
///
/// ```
/// # use candle_core::{DType, Device, Tensor, Var};
/// let x = Var::randn(0f32, 1f32, (2, 3, 8), &Device::Cpu)?;
/// let weight = Var::ones(8, DType::F32, &Device::Cpu)?;
/// let y = candle_fused_ops::rms_norm(&x, &weight, 1e-6)?;
/// assert!(y.sum_all()?.backward()?.get(&x).is_some());
/// # Ok::<(), candle_core::Error>(())
/// ```
pub fn rms_norm(x: &Tensor, weight: &Tensor, eps: f64) -> Result<Tensor> {
    Ok(Norm { weight, bias: None, kind: Kind::Rms, eps }.apply(x, None)?.1)
}

/// `sum = x + residual` and [`layer_norm`] of the sum, in one pass. Returns `(sum, norm)`.
///
/// `x` and `residual` have the same shape. The sum is rounded to its type before the norm reads it. So both results have the
/// bits of the two separate operators. Both carry gradients.
///
/// ```
/// # use candle_core::{DType, Device, Tensor};
/// # let x = Tensor::randn(0f32, 1f32, (2, 3, 8), &Device::Cpu)?;
/// # let residual = x.clone();
/// # let weight = Tensor::ones(8, DType::F32, &Device::Cpu)?;
/// let (sum, norm) = candle_fused_ops::add_layer_norm(&x, &residual, &weight, None, 1e-5)?;
/// assert_eq!(sum.dims(), norm.dims());
/// # Ok::<(), candle_core::Error>(())
/// ```
///
/// # Errors
/// As [`layer_norm`], and if `residual` differs from `x` in shape, type or device.
pub fn add_layer_norm(
    x: &Tensor,
    residual: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    eps: f64,
) -> Result<(Tensor, Tensor)> {
    Norm { weight, bias, kind: Kind::Layer, eps }.apply(x, Some(residual))
}

/// `sum = x + residual` and [`rms_norm`] of the sum, in one pass. Returns `(sum, norm)`; see [`add_layer_norm`].
///
/// # Errors
/// As [`rms_norm`], and if `residual` differs from `x` in shape, type or device.
pub fn add_rms_norm(x: &Tensor, residual: &Tensor, weight: &Tensor, eps: f64) -> Result<(Tensor, Tensor)> {
    Norm { weight, bias: None, kind: Kind::Rms, eps }.apply(x, Some(residual))
}

/// Which norm.
#[derive(Clone, Copy)]
pub(crate) enum Kind {
    Layer,
    Rms,
}

impl Kind {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Kind::Layer => "layer_norm",
            Kind::Rms => "rms_norm",
        }
    }
}

/// A norm without its input.
#[derive(Clone, Copy)]
pub(crate) struct Norm<'a> {
    pub(crate) weight: &'a Tensor,
    pub(crate) bias: Option<&'a Tensor>,
    pub(crate) kind: Kind,
    pub(crate) eps: f64,
}

impl Norm<'_> {
    /// The sum of `x` and `residual`, and its norm. Without a residual the sum is `x`.
    fn apply(self, x: &Tensor, residual: Option<&Tensor>) -> Result<(Tensor, Tensor)> {
        self.check(x, residual)?;
        if x.device().is_cpu() {
            return on_cpu(x, residual, self);
        }
        #[cfg(feature = "cuda")]
        if let Some(device) = cuda::norm::device_with_kernels(x) {
            return cuda::norm::on_gpu(device, x, residual, self);
        }
        let Self { weight, bias, kind, eps } = self;
        let sum = match residual {
            Some(residual) => (x + residual)?,
            None => x.clone(),
        };
        let y = match kind {
            Kind::Layer => composed::layer_norm(&sum, weight, bias, eps)?,
            Kind::Rms => composed::rms_norm(&sum, weight, eps)?,
        };
        Ok((sum, y))
    }

    fn check(self, x: &Tensor, residual: Option<&Tensor>) -> Result<()> {
        check::float("x", x)?;
        let width = check::last_axis("x", x)?;
        for (name, tensor) in [("weight", Some(self.weight)), ("bias", self.bias)] {
            let Some(tensor) = tensor else { continue };
            check::shape(name, tensor, &[width], "as the last axis of x")?;
            check::same(name, tensor, "x", x)?;
        }
        check::not_negative("eps", self.eps)?;
        let Some(residual) = residual else { return Ok(()) };
        check::shape("residual", residual, x.dims(), "as x")?;
        check::same("residual", residual, "x", x)
    }
}

/// mean and rstd of a row. The mean of an RMS norm is 0.
#[derive(Clone, Copy)]
struct Statistics<A> {
    mean: A,
    rstd: A,
}

/// See [`Norm::apply`].
fn on_cpu(x: &Tensor, residual: Option<&Tensor>, norm: Norm) -> Result<(Tensor, Tensor)> {
    let (x, residual) = (x.contiguous()?, residual.map(Tensor::contiguous).transpose()?);
    let (weight, bias) = (norm.weight.contiguous()?, norm.bias.map(Tensor::contiguous).transpose()?);
    let norm = Norm { weight: &weight, bias: bias.as_ref(), ..norm };
    for_float!(x.dtype(), T => {
        let (sum, normed) = match &residual {
            None => {
                let normed = forward::<T>(node::Numbers::of(&x).as_slice()?, norm)?;
                (x, normed)
            }
            Some(residual) => {
                let (sum, normed) = {
                    let (x, residual) = (node::Numbers::of(&x), node::Numbers::of(residual));
                    add_forward::<T>(x.as_slice()?, residual.as_slice()?, norm)?
                };
                (sum_node(&x, residual, node::storage(sum))?, normed)
            }
        };
        let y = with_backward(&sum, norm, normed)?;
        Ok((sum, y))
    })
}

/// The node of a computed `sum` of `x` and `residual`.
pub(crate) fn sum_node(x: &Tensor, residual: &Tensor, sum: Storage) -> Result<Tensor> {
    node::node("add", &[x, residual], sum, x.shape(), |_, dsum| Ok(vec![Some(dsum.clone()), Some(dsum.clone())]))
}

/// The node of a computed norm of `x`.
fn with_backward<T: Element>(
    x: &Tensor,
    Norm { weight, bias, kind, .. }: Norm,
    Normed { y, statistics }: Normed<T>,
) -> Result<Tensor> {
    let inputs: Vec<&Tensor> = [Some(x), Some(weight), bias].into_iter().flatten().collect();
    node::adding_node(kind.name(), &inputs, node::storage(y), x.shape(), move |inputs, dy, other| {
        let (x, weight) = (inputs[0], inputs[1]);
        let Gradients { dx, dweight, dbias } = {
            let (x, weight, dy) = (node::Numbers::of(x), node::Numbers::of(weight), node::Numbers::of(dy));
            let other = other.map(node::Numbers::of);
            let other = other.as_ref().map(node::Numbers::as_slice).transpose()?;
            backward::<T>(x.as_slice()?, weight.as_slice()?, dy.as_slice()?, other, kind, &statistics)
        };
        let vector = |numbers: Vec<T>| Some(node::tensor(numbers, weight.shape()));
        Ok(vec![Some(node::tensor(dx, x.shape())), vector(dweight), vector(dbias)])
    })
}

/// weight and bias, as numbers that sums are computed in. An absent bias is empty.
struct Affine<A> {
    weight: Vec<A>,
    bias: Vec<A>,
}

impl<A: Real> Affine<A> {
    fn of<T: Element<Acc = A>>(norm: Norm) -> Result<Self> {
        let widened = |tensor: &Tensor| -> Result<Vec<A>> { Ok(widened::<T>(node::Numbers::of(tensor).as_slice()?)) };
        Ok(Self { weight: widened(norm.weight)?, bias: norm.bias.map_or_else(|| Ok(Vec::new()), widened)? })
    }
}

/// The norm of each row, and its statistics.
struct Normed<T: Element> {
    y: Vec<T>,
    statistics: Vec<Statistics<T::Acc>>,
}

/// The norm of each row of `x`.
fn forward<T: Element>(x: &[T], norm: Norm) -> Result<Normed<T>> {
    let affine = &Affine::of::<T>(norm)?;
    let width = affine.weight.len();
    let rows = rows_per_task(x.len() / width, width);
    let mut y = vec![T::default(); x.len()];
    let statistics = y
        .par_chunks_mut(rows * width)
        .zip(x.par_chunks(rows * width))
        .flat_map_iter(|(y, x)| {
            let mut row = vec![T::Acc::ZERO; width];
            y.chunks_exact_mut(width).zip(x.chunks_exact(width)).map(move |(y, x)| {
                T::widen(x, &mut row);
                let statistics = normalise(&mut row, norm);
                scale(&mut row, affine);
                T::narrow(&row, y);
                statistics
            })
        })
        .collect();
    Ok(Normed { y, statistics })
}

/// `x + residual`, and [`forward`] of it.
fn add_forward<T: Element>(x: &[T], residual: &[T], norm: Norm) -> Result<(Vec<T>, Normed<T>)> {
    let affine = &Affine::of::<T>(norm)?;
    let width = affine.weight.len();
    let chunk = rows_per_task(x.len() / width, width) * width;
    let (mut sum, mut y) = (vec![T::default(); x.len()], vec![T::default(); x.len()]);
    let statistics = sum
        .par_chunks_mut(chunk)
        .zip(y.par_chunks_mut(chunk))
        .zip(x.par_chunks(chunk).zip(residual.par_chunks(chunk)))
        .flat_map_iter(|((sum, y), (x, residual))| {
            let (mut row, mut other) = (vec![T::Acc::ZERO; width], vec![T::Acc::ZERO; width]);
            let results = sum.chunks_exact_mut(width).zip(y.chunks_exact_mut(width));
            let inputs = x.chunks_exact(width).zip(residual.chunks_exact(width));
            results.zip(inputs).map(move |((sum, y), (x, residual))| {
                T::widen(x, &mut row);
                T::widen(residual, &mut other);
                add(&mut row, &other);
                T::narrow(&row, sum);
                // The norm reads the rounded sum, as the backward will.
                T::widen(sum, &mut row);
                let statistics = normalise(&mut row, norm);
                scale(&mut row, affine);
                T::narrow(&row, y);
                statistics
            })
        })
        .collect();
    Ok((sum, Normed { y, statistics }))
}

/// Replaces a row x by xhat.
fn normalise<A: Real>(row: &mut [A], norm: Norm) -> Statistics<A> {
    let width = A::real(row.len() as f64);
    let mean = match norm.kind {
        Kind::Layer => sum(row, |x| x) / width,
        Kind::Rms => A::ZERO,
    };
    let variance = sum(row, |x| (x - mean) * (x - mean)) / width;
    let statistics = Statistics { mean, rstd: A::ONE / (variance + A::real(norm.eps)).sqrt() };
    apply(row, statistics);
    statistics
}

/// Replaces a row x by xhat, from its statistics.
fn apply<A: Real>(row: &mut [A], Statistics { mean, rstd }: Statistics<A>) {
    row.iter_mut().for_each(|x| *x = (*x - mean) * rstd);
}

/// Replaces a row xhat by y.
fn scale<A: Real>(row: &mut [A], affine: &Affine<A>) {
    row.iter_mut().zip(&affine.weight).for_each(|(x, &weight)| *x *= weight);
    add(row, &affine.bias);
}

struct Gradients<T> {
    dx: Vec<T>,
    dweight: Vec<T>,
    dbias: Vec<T>,
}

/// One pass over the rows. dx includes `other`. Each task adds its rows to sums of its own for dweight and dbias. They are added in
/// the order of the tasks.
fn backward<T: Element>(
    x: &[T],
    weight: &[T],
    dy: &[T],
    other: Option<&[T]>,
    kind: Kind,
    statistics: &[Statistics<T::Acc>],
) -> Gradients<T> {
    let width = weight.len();
    let rows = rows_per_task(statistics.len(), width);
    let weight = widened::<T>(weight);
    let mut dx = other.map_or_else(|| vec![T::default(); x.len()], <[T]>::to_vec);
    let partial_sums: Vec<[Vec<T::Acc>; 2]> = dx
        .par_chunks_mut(rows * width)
        .zip(x.par_chunks(rows * width).zip(dy.par_chunks(rows * width)))
        .zip(statistics.par_chunks(rows))
        .map(|((dx, (x, dy)), statistics)| {
            let [mut dweight, mut dbias, mut xhat, mut g] = [(); 4].map(|()| vec![T::Acc::ZERO; width]);
            let rows = dx.chunks_exact_mut(width).zip(x.chunks_exact(width).zip(dy.chunks_exact(width)));
            for ((dx, (x, dy)), &statistics) in rows.zip(statistics) {
                T::widen(x, &mut xhat);
                apply(&mut xhat, statistics);
                T::widen(dy, &mut g);
                add(&mut dbias, &g);
                dweight.iter_mut().zip(&g).zip(&xhat).for_each(|((sum, &dy), &xhat)| *sum += dy * xhat);
                g.iter_mut().zip(&weight).for_each(|(g, &weight)| *g *= weight);
                row_gradient(&mut g, &xhat, kind, statistics.rstd);
                if other.is_some() {
                    T::widen(dx, &mut xhat);
                    add(&mut g, &xhat);
                }
                T::narrow(&g, dx);
            }
            [dweight, dbias]
        })
        .collect();
    let [mut dweight, mut dbias] = [(); 2].map(|()| vec![T::Acc::ZERO; width]);
    for [of_weight, of_bias] in &partial_sums {
        add(&mut dweight, of_weight);
        add(&mut dbias, of_bias);
    }
    Gradients { dx, dweight: narrowed(&dweight), dbias: narrowed(&dbias) }
}

/// Replaces a row g = dy weight by dx.
fn row_gradient<A: Real>(g: &mut [A], xhat: &[A], kind: Kind, rstd: A) {
    let width = A::real(g.len() as f64);
    let g_mean = match kind {
        Kind::Layer => sum(g, |g| g) / width,
        Kind::Rms => A::ZERO,
    };
    let g_xhat_mean = dot(g, xhat) / width;
    g.iter_mut().zip(xhat).for_each(|(g, &xhat)| *g = rstd * (*g - g_mean - xhat * g_xhat_mean));
}
