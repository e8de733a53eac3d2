//! Rotary position embedding.

use candle_core::{Result, Tensor};
use rayon::prelude::*;

use crate::node::{accumulator, Numbers};
use crate::number::{for_float, Element, Real};
use crate::rows::rows_per_task;
use crate::{check, composed, node};

/// Which two values of a head form a pair. For 8 values:
///
/// ```text
/// value          0  1  2  3  4  5  6  7
/// HalfSplit      a  b  c  d  a  b  c  d     value i with value i + 4
/// Interleaved    a  a  b  b  c  c  d  d     value 2 i with value 2 i + 1
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RotaryOrder {
    /// Weights of Llama, Mistral, Qwen and GPT-NeoX from the Hugging Face hub; `candle_nn::rotary_emb::rope`.
    HalfSplit,
    /// Weights of GPT-J, and weights of Llama from Meta; `candle_nn::rotary_emb::rope_i`.
    Interleaved,
}

/// Rotates the pairs of each head by the angles of its token, with a backward that rotates by the opposite angles.
///
/// ```text
/// y_a = x_a cos - x_b sin          y_b = x_a sin + x_b cos          for pair (a, b)
///
/// dx_a = dy_a cos + dy_b sin       dx_b = dy_b cos - dy_a sin
/// ```
///
/// | tensor | shape | type |
/// | --- | --- | --- |
/// | `x`, result | `(batch, seqlen, num_heads, head_dim)` or `(seqlen, num_heads, head_dim)` | f16, bf16, f32, f64 |
/// | `cos`, `sin` | `(seqlen, rotary_dim / 2)`: the rows of the positions in `x` | a floating-point type |
///
/// The first `rotary_dim` values of a head rotate; the others stay. `cos` and `sin` are tables and get no gradient. The rotation is
/// computed in f32 (f64 for f64) and rounded once. Candle's fast kernels return a result without a gradient.
///
/// # Errors
/// If a shape, a type or a device is wrong.
///
/// ```
/// # use candle_core::{Device, Tensor, Var};
/// # use candle_fused_ops::{rotary, RotaryOrder};
/// let x = Var::randn(0f32, 1f32, (2, 3, 4, 8), &Device::Cpu)?;
/// let angles = Tensor::randn(0f32, 1f32, (3, 4), &Device::Cpu)?;
/// let y = rotary(&x, &angles.cos()?, &angles.sin()?, RotaryOrder::HalfSplit)?;
/// assert!(y.sum_all()?.backward()?.get(&x).is_some());
/// # Ok::<(), candle_core::Error>(())
/// ```
pub fn rotary(x: &Tensor, cos: &Tensor, sin: &Tensor, order: RotaryOrder) -> Result<Tensor> {
    check_rotary(x, cos, sin)?;
    if !x.device().is_cpu() {
        return composed::rotary(x, cos, sin, order);
    }
    let x = x.contiguous()?;
    let wide = |table: &Tensor| table.detach().to_dtype(accumulator(x.dtype()))?.contiguous();
    let (cos, sin) = (wide(cos)?, wide(sin)?);
    for_float!(x.dtype(), T => {
        let y = rotated::<T>(&x, &cos, &sin, order)?;
        node::node("rotary", &[&x], node::storage(y), x.shape(), move |_, dy| {
            let dx = rotated::<T>(dy, &cos, &sin.neg()?, order)?;
            Ok(vec![Some(node::tensor(dx, dy.shape()))])
        })
    })
}

fn check_rotary(x: &Tensor, cos: &Tensor, sin: &Tensor) -> Result<()> {
    check::float("x", x)?;
    let (seqlen, head_dim) = match *x.dims() {
        [_, seqlen, _, head_dim] | [seqlen, _, head_dim] => (seqlen, head_dim),
        _ => {
            let got = x.dims();
            return Err(check::error(format!(
                "x: shape must be (batch, seqlen, num_heads, head_dim) or (seqlen, num_heads, head_dim), got {got:?}"
            )));
        }
    };
    match *cos.dims() {
        [rows, pairs] if rows == seqlen && 2 * pairs <= head_dim => {}
        _ => {
            return Err(check::error(format!(
                "cos: shape must be (seqlen, rotary_dim / 2) with seqlen {seqlen} and rotary_dim at most {head_dim} as in x, \
                 got {:?}",
                cos.dims()
            )));
        }
    }
    check::shape("sin", sin, cos.dims(), "as cos")?;
    for (name, table) in [("cos", cos), ("sin", sin)] {
        check::float(name, table)?;
        check::same_device(name, table, "x", x.device())?;
    }
    Ok(())
}

/// `x` rotated by tables in its accumulator type. All are contiguous.
fn rotated<T: Element>(x: &Tensor, cos: &Tensor, sin: &Tensor, order: RotaryOrder) -> Result<Vec<T>> {
    let (seqlen, pairs) = cos.dims2()?;
    let &[.., heads, head_dim] = x.dims() else { unreachable!("check_rotary has compared the shapes") };
    let (x, cos, sin) = (Numbers::of(x), Numbers::of(cos), Numbers::of(sin));
    let (x, cos, sin) = (x.as_slice::<T>()?, cos.as_slice::<T::Acc>()?, sin.as_slice::<T::Acc>()?);
    let mut y = x.to_vec();
    if pairs == 0 || y.is_empty() {
        return Ok(y);
    }
    let rows = rows_per_task(y.len() / head_dim, head_dim);
    y.par_chunks_mut(rows * head_dim).enumerate().for_each(|(task, heads_of_task)| {
        let mut wide = vec![T::Acc::ZERO; 2 * pairs];
        for (index, head) in heads_of_task.chunks_exact_mut(head_dim).enumerate() {
            let token = (task * rows + index) / heads % seqlen;
            let range = token * pairs..(token + 1) * pairs;
            T::widen(&head[..2 * pairs], &mut wide);
            rotate(&mut wide, &cos[range.clone()], &sin[range], order);
            T::narrow(&wide, &mut head[..2 * pairs]);
        }
    });
    Ok(y)
}

fn rotate<A: Real>(head: &mut [A], cos: &[A], sin: &[A], order: RotaryOrder) {
    let turned = |a: A, b: A, cos: A, sin: A| (a * cos - b * sin, a * sin + b * cos);
    match order {
        RotaryOrder::HalfSplit => {
            let (first, second) = head.split_at_mut(cos.len());
            for ((a, b), (&cos, &sin)) in first.iter_mut().zip(second).zip(cos.iter().zip(sin)) {
                (*a, *b) = turned(*a, *b, cos, sin);
            }
        }
        RotaryOrder::Interleaved => {
            for (pair, (&cos, &sin)) in head.chunks_exact_mut(2).zip(cos.iter().zip(sin)) {
                (pair[0], pair[1]) = turned(pair[0], pair[1], cos, sin);
            }
        }
    }
}
