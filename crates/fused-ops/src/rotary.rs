//! Rotary position embedding.

#[cfg(feature = "cuda")]
use candle_core::CudaStorage;
use candle_core::{CpuStorage, InplaceOp1, Layout, Result, Tensor};
use rayon::prelude::*;

#[cfg(feature = "cuda")]
use crate::cuda;
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
/// computed in f32 (f64 for f64) and rounded once. [`rotary_in_place`] needs no second tensor. Candle's fast kernels return a result
/// without a gradient.
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
    #[cfg(feature = "cuda")]
    if let Some(device) = cuda::rotary::device_with_kernels(x) {
        return cuda::rotary::rotary(device, &x.contiguous()?, Tables::new(x, cos, sin, order)?);
    }
    if !x.device().is_cpu() {
        return composed::rotary(x, cos, sin, order);
    }
    let (x, tables) = (x.contiguous()?, Tables::new(x, cos, sin, order)?);
    for_float!(x.dtype(), T => {
        let y = rotated::<T>(&x, &tables, 1.0)?;
        node::node("rotary", &[&x], node::storage(y), x.shape(), move |_, dy| {
            Ok(vec![Some(node::tensor(rotated::<T>(dy, &tables, -1.0)?, dy.shape()))])
        })
    })
}

/// [`rotary`] in the memory of `x`, for inference. All tensors that share this memory see the result.
///
/// # Errors
/// As [`rotary`]; if `x` is not contiguous; if `x` is a variable or was computed from one, because its old values may be needed.
///
/// ```
/// # use candle_core::{Device, Tensor};
/// # use candle_fused_ops::{rotary, rotary_in_place, RotaryOrder};
/// let x = Tensor::randn(0f32, 1f32, (2, 3, 4, 8), &Device::Cpu)?;
/// let angles = Tensor::randn(0f32, 1f32, (3, 4), &Device::Cpu)?;
/// let (cos, sin) = (angles.cos()?, angles.sin()?);
/// let y = rotary(&x, &cos, &sin, RotaryOrder::HalfSplit)?;
/// rotary_in_place(&x, &cos, &sin, RotaryOrder::HalfSplit)?;
/// assert_eq!(x.flatten_all()?.to_vec1::<f32>()?, y.flatten_all()?.to_vec1::<f32>()?);
/// # Ok::<(), candle_core::Error>(())
/// ```
pub fn rotary_in_place(x: &Tensor, cos: &Tensor, sin: &Tensor, order: RotaryOrder) -> Result<()> {
    check_rotary(x, cos, sin)?;
    if x.track_op() {
        let text = "x: must not be part of a graph, because its old values may be needed; call rotary, or detach it";
        return Err(check::error(text.to_string()));
    }
    if !x.is_contiguous() {
        let (dims, strides) = (x.dims(), x.stride());
        return Err(check::error(format!(
            "x: must be contiguous, got strides {strides:?} in shape {dims:?}; call contiguous() or rotary"
        )));
    }
    #[cfg(feature = "cuda")]
    let fused = x.device().is_cpu() || cuda::rotary::device_with_kernels(x).is_some();
    #[cfg(not(feature = "cuda"))]
    let fused = x.device().is_cpu();
    match fused {
        true => x.inplace_op1(&InPlace(Tables::new(x, cos, sin, order)?)),
        false => x.slice_set(&composed::rotary(x, cos, sin, order)?, 0, 0),
    }
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

/// The tables, contiguous and in the accumulator type of `x`.
pub(crate) struct Tables {
    pub(crate) cos: Tensor,
    pub(crate) sin: Tensor,
    pub(crate) order: RotaryOrder,
}

impl Tables {
    fn new(x: &Tensor, cos: &Tensor, sin: &Tensor, order: RotaryOrder) -> Result<Self> {
        let wide = |table: &Tensor| table.detach().to_dtype(accumulator(x.dtype()))?.contiguous();
        Ok(Self { cos: wide(cos)?, sin: wide(sin)?, order })
    }
}

struct InPlace(Tables);

impl InplaceOp1 for InPlace {
    fn name(&self) -> &'static str {
        "rotary_in_place"
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> Result<()> {
        let range = layout.start_offset()..layout.start_offset() + layout.shape().elem_count();
        match storage {
            CpuStorage::F16(x) => rotate_heads(&mut x[range], layout.dims(), &self.0, 1.0),
            CpuStorage::BF16(x) => rotate_heads(&mut x[range], layout.dims(), &self.0, 1.0),
            CpuStorage::F32(x) => rotate_heads(&mut x[range], layout.dims(), &self.0, 1.0),
            CpuStorage::F64(x) => rotate_heads(&mut x[range], layout.dims(), &self.0, 1.0),
            _ => unreachable!("check::float accepts no other type"),
        }
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, storage: &mut CudaStorage, layout: &Layout) -> Result<()> {
        cuda::rotary::rotate_in_place(storage, layout, &self.0)
    }
}

/// A contiguous `x` rotated by the angles of the tables, times `sign`.
fn rotated<T: Element>(x: &Tensor, tables: &Tables, sign: f64) -> Result<Vec<T>> {
    let mut y = Numbers::of(x).as_slice::<T>()?.to_vec();
    rotate_heads(&mut y, x.dims(), tables, sign)?;
    Ok(y)
}

/// Rotates the heads of `x`, which has the shape `dims`.
fn rotate_heads<T: Element>(x: &mut [T], dims: &[usize], tables: &Tables, sign: f64) -> Result<()> {
    let (seqlen, pairs) = tables.cos.dims2()?;
    let &[.., heads, head_dim] = dims else { unreachable!("check_rotary has compared the shapes") };
    let (cos, sin) = (Numbers::of(&tables.cos), Numbers::of(&tables.sin));
    let (cos, sin) = (cos.as_slice::<T::Acc>()?, sin.as_slice::<T::Acc>()?);
    if pairs == 0 || x.is_empty() {
        return Ok(());
    }
    let rows = rows_per_task(x.len() / head_dim, head_dim);
    x.par_chunks_mut(rows * head_dim).enumerate().for_each(|(task, heads_of_task)| {
        let mut wide = vec![T::Acc::ZERO; 2 * pairs];
        for (index, head) in heads_of_task.chunks_exact_mut(head_dim).enumerate() {
            let token = (task * rows + index) / heads % seqlen;
            let range = token * pairs..(token + 1) * pairs;
            T::widen(&head[..2 * pairs], &mut wide);
            rotate(&mut wide, &cos[range.clone()], &sin[range], T::Acc::real(sign), tables.order);
            T::narrow(&wide, &mut head[..2 * pairs]);
        }
    });
    Ok(())
}

fn rotate<A: Real>(head: &mut [A], cos: &[A], sin: &[A], sign: A, order: RotaryOrder) {
    let turned = |a: A, b: A, cos: A, sin: A| (a * cos - b * (sign * sin), a * (sign * sin) + b * cos);
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
