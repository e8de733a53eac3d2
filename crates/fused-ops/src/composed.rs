//! The same operators, composed of Candle's differentiable ones.
//!
//! They run where this crate has no fused operator for a device and type yet. Their gradients are right, but each call is a dozen
//! nodes and passes over memory. On the CPU you can call them to compare.
//!
//! The arguments are those of the fused operators, which have checked them.

use std::f64::consts::{FRAC_1_SQRT_2, PI};

use candle_core::{DType, Result, Tensor, Var, D};

use crate::activation::{Activation, CUBIC};
use crate::adamw::{Rule, Slot};
use crate::linear::result_shape;
use crate::loss::{CrossEntropy, Layer};
use crate::node::accumulator;
use crate::rotary::RotaryOrder;

/// [`layer_norm`](crate::layer_norm), composed.
///
/// # Errors
/// If Candle cannot compute with these tensors.
pub fn layer_norm(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>, eps: f64) -> Result<Tensor> {
    let wide = x.to_dtype(accumulator(x.dtype()))?;
    let centred = wide.broadcast_sub(&wide.mean_keepdim(D::Minus1)?)?;
    normalised(&centred, x, weight, bias, eps)
}

/// [`rms_norm`](crate::rms_norm), composed.
///
/// # Errors
/// If Candle cannot compute with these tensors.
pub fn rms_norm(x: &Tensor, weight: &Tensor, eps: f64) -> Result<Tensor> {
    normalised(&x.to_dtype(accumulator(x.dtype()))?, x, weight, None, eps)
}

fn normalised(centred: &Tensor, x: &Tensor, weight: &Tensor, bias: Option<&Tensor>, eps: f64) -> Result<Tensor> {
    let rms = (centred.sqr()?.mean_keepdim(D::Minus1)? + eps)?.sqrt()?;
    let y = centred.broadcast_div(&rms)?.broadcast_mul(&weight.to_dtype(centred.dtype())?)?;
    let y = match bias {
        Some(bias) => y.broadcast_add(&bias.to_dtype(y.dtype())?)?,
        None => y,
    };
    y.to_dtype(x.dtype())
}

/// [`resize_columns`](crate::resize_columns), composed.
///
/// # Errors
/// If Candle cannot compute with these tensors.
pub fn resize_columns(x: &Tensor, columns: usize) -> Result<Tensor> {
    match columns.checked_sub(x.dim(D::Minus1)?) {
        Some(missing) => x.contiguous()?.pad_with_zeros(D::Minus1, 0, missing),
        None => x.narrow(D::Minus1, 0, columns)?.contiguous(),
    }
}

/// [`CrossEntropy::forward`], composed. NaN in an ignored row makes the gradient of that row NaN. Targets out of range are not
/// checked on a GPU, because that would wait for it.
///
/// # Errors
/// If Candle cannot compute with these tensors.
pub fn cross_entropy(options: &CrossEntropy, logits: &Tensor, targets: &Tensor) -> Result<Tensor> {
    let (sum, counted) = cross_entropy_sum(options, logits, targets)?;
    sum / counted
}

/// The sum of the losses of all rows, and the number of rows that count, at least 1: both ().
fn cross_entropy_sum(options: &CrossEntropy, logits: &Tensor, targets: &Tensor) -> Result<(Tensor, Tensor)> {
    let wide = accumulator(logits.dtype());
    let z = logits.to_dtype(wide)?.flatten_to(logits.rank().saturating_sub(2))?;
    let z = match options.softcap {
        Some(cap) => ((z / cap)?.tanh()? * cap)?,
        None => z,
    };
    let targets = targets.to_dtype(DType::I64)?.reshape(((), 1))?;
    let counts = match options.ignore_index {
        Some(index) => targets.ne(index)?,
        None => targets.ones_like()?.to_dtype(DType::U8)?,
    };
    let class = counts.where_cond(&targets, &targets.zeros_like()?)?;

    let largest = z.max_keepdim(D::Minus1)?.detach();
    let lse = (z.broadcast_sub(&largest)?.exp()?.sum_keepdim(D::Minus1)?.log()? + largest)?;
    let mut losses = (&lse - (z.gather(&class, D::Minus1)? * (1.0 - options.label_smoothing))?)?;
    if options.label_smoothing > 0.0 {
        losses = (losses - (z.mean_keepdim(D::Minus1)? * options.label_smoothing)?)?;
    }
    if options.z_loss > 0.0 {
        losses = (losses + (lse.sqr()? * options.z_loss)?)?;
    }
    let sum = counts.where_cond(&losses, &losses.zeros_like()?)?.sum_all()?;
    Ok((sum, counts.to_dtype(wide)?.sum_all()?.maximum(1.0)?))
}

/// [`CrossEntropy::forward_linear`], composed: in chunks too, each differentiated by Candle. Logits and their gradient have the
/// type of `x`, and a chunk needs about eight times its logits in f32.
///
/// # Errors
/// If Candle cannot compute with these tensors.
pub fn linear_cross_entropy(options: &CrossEntropy, x: &Tensor, weight: &Tensor, targets: &Tensor) -> Result<Tensor> {
    let layer = Layer::new(x, weight, options.rows_per_chunk(x, weight.dim(0)?, x.dtype()))?;
    let targets = targets.flatten_all()?;
    let tracked = x.track_op() || weight.track_op();
    let sums = layer.sums(x.track_op(), weight.track_op(), |logits, start| {
        let targets = targets.narrow(0, start, logits.dim(0)?)?;
        if !tracked {
            let (loss, _) = cross_entropy_sum(options, logits, &targets)?;
            return Ok((loss, logits.clone()));
        }
        let logits = Var::from_tensor(logits)?;
        let (loss, _) = cross_entropy_sum(options, &logits, &targets)?;
        let dlogits = loss.backward()?.remove(&logits);
        Ok((loss.detach(), dlogits.expect("the loss depends on the logits")))
    })?;
    let counted = match options.ignore_index {
        Some(index) => targets.to_dtype(DType::I64)?.ne(index)?.to_dtype(DType::F32)?.sum_all()?.maximum(1.0)?,
        None => Tensor::full(targets.elem_count().max(1) as f32, (), x.device())?,
    };
    sums.mean(x, weight, &counted)
}

fn activation(activation: Activation, x: &Tensor) -> Result<Tensor> {
    let wide = x.to_dtype(accumulator(x.dtype()))?;
    let y = match activation {
        // Not `Tensor::gelu`: its gradient has constants of six digits.
        Activation::Gelu => {
            let cubic = (wide.sqr()? * CUBIC)?.affine(1.0, 1.0)?;
            let u = ((&wide * cubic)? * (2.0 / PI).sqrt())?;
            (wide * u.tanh()?.affine(0.5, 0.5)?)?
        }
        Activation::GeluErf => {
            let c = (&wide * FRAC_1_SQRT_2)?.erf()?.affine(0.5, 0.5)?;
            (wide * c)?
        }
        Activation::Silu => wide.silu()?,
    };
    y.to_dtype(x.dtype())
}

/// [`linear`](crate::linear), composed. The product is rounded to the type of `x` before the bias is added.
///
/// # Errors
/// If Candle cannot compute with these tensors.
pub fn linear(x: &Tensor, weight: &Tensor, bias: &Tensor) -> Result<Tensor> {
    let outputs = bias.elem_count();
    let inputs = weight.elem_count() / outputs;
    let product = x.reshape(((), inputs))?.matmul(&weight.reshape((outputs, inputs))?.t()?)?;
    product.broadcast_add(&bias.flatten_all()?)?.reshape(result_shape(x, weight, bias))
}

/// [`gelu`](crate::gelu), composed.
///
/// # Errors
/// If Candle cannot compute with this tensor.
pub fn gelu(x: &Tensor) -> Result<Tensor> {
    activation(Activation::Gelu, x)
}

/// [`gelu_erf`](crate::gelu_erf), composed.
///
/// # Errors
/// If Candle cannot compute with this tensor.
pub fn gelu_erf(x: &Tensor) -> Result<Tensor> {
    activation(Activation::GeluErf, x)
}

/// [`swiglu`](crate::swiglu), composed.
///
/// # Errors
/// If Candle cannot compute with these tensors.
pub fn swiglu(gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    gated(Activation::Silu, gate, up)
}

/// [`geglu`](crate::geglu), composed.
///
/// # Errors
/// If Candle cannot compute with these tensors.
pub fn geglu(gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    gated(Activation::Gelu, gate, up)
}

fn gated(activation: Activation, gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    let wide = accumulator(gate.dtype());
    (self::activation(activation, &gate.to_dtype(wide)?)? * up.to_dtype(wide)?)?.to_dtype(gate.dtype())
}

/// The norm of all `gradients` together, (), in f32 (f64 if the first is f64).
pub(crate) fn global_norm(gradients: &[Tensor]) -> Result<Tensor> {
    let wide = gradients.first().map_or(DType::F32, |gradient| accumulator(gradient.dtype()));
    let squares =
        |gradient: &Tensor| gradient.to_dtype(accumulator(gradient.dtype()))?.sqr()?.sum_all()?.to_dtype(wide);
    Tensor::stack(&gradients.iter().map(squares).collect::<Result<Vec<_>>>()?, 0)?.sum_all()?.sqrt()
}

/// The factor that scales gradients of this norm down to `limit`, ().
pub(crate) fn clipping(norm: &Tensor, limit: f64) -> Result<Tensor> {
    norm.gt(limit)?.where_cond(&(norm.recip()? * limit)?, &norm.ones_like()?)
}

/// A step of [`AdamW`](crate::AdamW) for one parameter.
pub(crate) fn adamw(slot: &mut Slot, gradient: &Tensor, factor: Option<&Tensor>, rule: &Rule) -> Result<()> {
    let wide = slot.m.dtype();
    let gradient = gradient.to_dtype(wide)?;
    let g = match factor {
        Some(factor) => gradient.broadcast_mul(&factor.to_dtype(wide)?)?,
        None => gradient,
    };
    slot.m = ((&slot.m * rule.beta1)? + (&g * (1.0 - rule.beta1))?)?;
    slot.v = ((&slot.v * rule.beta2)? + (g.sqr()? * (1.0 - rule.beta2))?)?;
    let change = ((&slot.m * rule.rate)? / (slot.v.sqrt()? + rule.epsilon)?)?;
    let before = slot.master.as_ref().unwrap_or(&slot.var);
    let after = ((before.detach() * rule.keep)? - change)?;
    slot.var.set(&after.to_dtype(slot.var.dtype())?)?;
    if slot.master.is_some() {
        slot.master = Some(after);
    }
    Ok(())
}

/// [`embedding`](crate::embedding), composed. The gradient is summed in the type of `weight`. Ids out of range are not checked on
/// a GPU, because that would wait for it.
///
/// # Errors
/// If Candle cannot compute with these tensors.
pub fn embedding(ids: &Tensor, weight: &Tensor) -> Result<Tensor> {
    let shape = [ids.dims(), &weight.dims()[1..]].concat();
    weight.index_select(&ids.flatten_all()?, 0)?.reshape(shape)
}

/// [`rotary`](crate::rotary), composed.
///
/// # Errors
/// If Candle cannot compute with these tensors.
pub fn rotary(x: &Tensor, cos: &Tensor, sin: &Tensor, order: RotaryOrder) -> Result<Tensor> {
    let wide = accumulator(x.dtype());
    let (seqlen, pairs) = cos.dims2()?;
    let table = |table: &Tensor| table.detach().to_dtype(wide)?.reshape((seqlen, 1, pairs));
    let (cos, sin) = (table(cos)?, table(sin)?);
    let rotating = x.narrow(D::Minus1, 0, 2 * pairs)?.to_dtype(wide)?;
    // The pairs as (.., 2, pairs) or (.., pairs, 2): the axis of 2 is `side`.
    let leading = &rotating.dims()[..x.rank() - 1];
    let (split, side) = match order {
        RotaryOrder::HalfSplit => ([2, pairs], x.rank() - 1),
        RotaryOrder::Interleaved => ([pairs, 2], x.rank()),
    };
    let sides = rotating.reshape([leading, &split].concat())?;
    let (a, b) = (sides.narrow(side, 0, 1)?.squeeze(side)?, sides.narrow(side, 1, 1)?.squeeze(side)?);
    let turned_a = (a.broadcast_mul(&cos)? - b.broadcast_mul(&sin)?)?;
    let turned_b = (a.broadcast_mul(&sin)? + b.broadcast_mul(&cos)?)?;
    let turned = Tensor::stack(&[turned_a, turned_b], side)?.reshape(rotating.shape())?.to_dtype(x.dtype())?;
    let rest = x.dim(D::Minus1)? - 2 * pairs;
    match rest {
        0 => Ok(turned),
        _ => Tensor::cat(&[turned, x.narrow(D::Minus1, 2 * pairs, rest)?], D::Minus1),
    }
}
