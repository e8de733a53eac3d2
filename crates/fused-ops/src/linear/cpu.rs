//! Layers on the CPU. For f16 and bf16 the products are in f32.

use candle_core::{Result, Storage, Tensor};
use rayon::prelude::*;

use super::{Layer, Products};
use crate::activation::Activation;
use crate::node::{self, accumulator, update, Numbers};
use crate::number::{for_float, narrowed, Element, Real};
use crate::rows::{add, rows_per_task};

pub(super) struct Cpu;

impl Products for Cpu {
    fn affine(&self, layer: &Layer, residual: Option<&Tensor>) -> Result<Storage> {
        for_float!(layer.x.dtype(), T => {
            let mut y = product::<T>(layer)?;
            if let Some(residual) = residual {
                add_tensor::<T>(&mut y, residual)?;
            }
            Ok(node::storage(T::from_acc(y)))
        })
    }

    fn affine_gelu(&self, layer: &Layer) -> Result<(Tensor, Storage)> {
        for_float!(layer.x.dtype(), T => {
            let h = product::<T>(layer)?;
            let g = T::from_acc(h.par_iter().map(|&h| Activation::Gelu.at(h).0).collect());
            Ok((node::tensor(h, (layer.x.dim(0)?, layer.bias.elem_count())), node::storage(g)))
        })
    }

    fn through_gelu(&self, dg: &Tensor, h: &Tensor) -> Result<Tensor> {
        for_float!(dg.dtype(), T => times_slopes::<T>(&wide(dg)?, h))
    }

    fn product_through_gelu(&self, dy: &Tensor, weight: &Tensor, h: &Tensor) -> Result<Tensor> {
        self.through_gelu(&wide(dy)?.matmul(&wide(weight)?)?, h)
    }

    fn input_gradient(&self, dh: &Tensor, weight: &Tensor) -> Result<Tensor> {
        wide(dh)?.matmul(&wide(weight)?)?.to_dtype(weight.dtype())
    }

    fn weight_gradients(&self, dh: &Tensor, x: &Tensor) -> Result<(Tensor, Tensor)> {
        let dh = wide(dh)?;
        let dweight = dh.t()?.matmul(&wide(x)?)?.to_dtype(x.dtype())?;
        let outputs = dh.dim(1)?;
        for_float!(x.dtype(), T => {
            let dbias = column_sums(Numbers::of(&dh).as_slice()?, outputs);
            Ok((dweight, node::tensor(narrowed::<T>(&dbias), outputs)))
        })
    }
}

/// In the type that sums are computed in.
fn wide(tensor: &Tensor) -> Result<Tensor> {
    tensor.to_dtype(accumulator(tensor.dtype()))
}

/// x weight^T + bias
fn product<T: Element>(layer: &Layer) -> Result<Vec<T::Acc>> {
    let product = wide(&layer.x)?.matmul(&wide(&layer.weight)?.t()?)?;
    let mut h = update::<T::Acc, _>(&product, std::mem::take)?;
    let (bias, outputs) = (wide(&layer.bias)?, layer.bias.elem_count());
    let bias = Numbers::of(&bias);
    let bias = bias.as_slice::<T::Acc>()?;
    let rows = rows_per_task(h.len() / outputs, outputs);
    h.par_chunks_mut(rows * outputs).for_each(|rows| rows.chunks_exact_mut(outputs).for_each(|row| add(row, bias)));
    Ok(h)
}

fn add_tensor<T: Element>(y: &mut [T::Acc], tensor: &Tensor) -> Result<()> {
    let tensor = wide(&tensor.contiguous()?)?;
    let numbers = Numbers::of(&tensor);
    y.par_iter_mut().zip(numbers.as_slice::<T::Acc>()?).for_each(|(y, &number)| *y += number);
    Ok(())
}

/// dg gelu'(h), both wide
fn times_slopes<T: Element>(dg: &Tensor, h: &Tensor) -> Result<Tensor> {
    let numbers = (Numbers::of(dg), Numbers::of(h));
    let (dg, of_h) = (numbers.0.as_slice::<T::Acc>()?, numbers.1.as_slice::<T::Acc>()?);
    let dh: Vec<T::Acc> = dg.par_iter().zip(of_h).map(|(&dg, &h)| dg * Activation::Gelu.at(h).1).collect();
    Ok(node::tensor(dh, h.shape()))
}

/// The sum over the rows.
fn column_sums<A: Real>(rows: &[A], width: usize) -> Vec<A> {
    let chunk = rows_per_task(rows.len() / width, width) * width;
    let partial_sums: Vec<Vec<A>> = rows
        .par_chunks(chunk)
        .map(|rows| {
            let mut sum = vec![A::ZERO; width];
            rows.chunks_exact(width).for_each(|row| add(&mut sum, row));
            sum
        })
        .collect();
    let mut sum = vec![A::ZERO; width];
    partial_sums.iter().for_each(|part| add(&mut sum, part));
    sum
}
