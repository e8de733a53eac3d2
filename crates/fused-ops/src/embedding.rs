//! The lookup of rows by id, with a backward that adds in a fixed order.

use candle_core::{DType, Result, Tensor};
use rayon::prelude::*;

#[cfg(feature = "cuda")]
use crate::cuda;
use crate::number::{for_float, Element, Real};
use crate::rows::add;
use crate::{check, composed, node};

/// The rows of `weight` at `ids`, with its backward.
///
/// ```text
/// y[i] = weight[ids[i]]          dweight[r] = sum of dy[i] over the i with ids[i] = r
/// ```
///
/// | tensor | shape | type |
/// | --- | --- | --- |
/// | `ids` | `(..)` | u32, i64 |
/// | `weight` | `(rows, width)` | f16, bf16, f32, f64 |
/// | result | `(.., width)` | as `weight` |
///
/// The backward sorts the positions by their id. Each row of dweight is then the sum of its own positions, in a fixed order, in f32
/// (f64 for f64). Candle's `index_add` sums in the type of the gradient. dweight has the shape of weight; rows without an id are 0.
///
/// **An id without a row** is an error on the CPU. A GPU would have to be waited for, so there the id gives a row of NaN, and the
/// backward leaves it out.
///
/// # Errors
/// If `weight` has no two axes; if types or devices are wrong; on the CPU, if an id has no row.
///
/// ```
/// # use candle_core::{DType, Device, Tensor, Var};
/// let weight = Var::ones((5, 2), DType::F32, &Device::Cpu)?;
/// let ids = Tensor::new(&[[1u32, 3], [3, 3]], &Device::Cpu)?;
/// let y = candle_fused_ops::embedding(&ids, &weight)?;
/// assert_eq!(y.dims(), [2, 2, 2]);
/// let dweight = y.sum_all()?.backward()?.remove(&weight).expect("a gradient");
/// assert_eq!(dweight.to_vec2::<f32>()?, [[0.0; 2], [1.0; 2], [0.0; 2], [3.0; 2], [0.0; 2]]);
/// # Ok::<(), candle_core::Error>(())
/// ```
pub fn embedding(ids: &Tensor, weight: &Tensor) -> Result<Tensor> {
    check::float("weight", weight)?;
    check::ids("ids", ids)?;
    check::same_device("ids", ids, "weight", weight.device())?;
    let [rows, width] = *weight.dims() else {
        return Err(check::error(format!("weight: shape must be (rows, width), got {:?}", weight.dims())));
    };
    let shape = [ids.dims(), &[width]].concat();
    #[cfg(feature = "cuda")]
    if let Some(device) = cuda::embedding::device_with_kernels(ids, weight) {
        return cuda::embedding::embedding(device, ids, weight, shape);
    }
    if !weight.device().is_cpu() {
        return composed::embedding(ids, weight);
    }
    let ids = read(ids, rows)?;
    let weight = weight.contiguous()?;
    for_float!(weight.dtype(), T => {
        let y = lookup::<T>(&ids, node::Numbers::of(&weight).as_slice()?, width);
        node::node("embedding", &[&weight], node::storage(y), shape, move |inputs, dy| {
            let dweight = gradient::<T>(&ids, node::Numbers::of(dy).as_slice()?, rows, width);
            Ok(vec![Some(node::tensor(dweight, inputs[0].shape()))])
        })
    })
}

fn read(ids: &Tensor, rows: usize) -> Result<Vec<usize>> {
    let ids = ids.to_dtype(DType::I64)?.flatten_all()?.to_vec1::<i64>()?;
    let row = |(position, &id): (usize, &i64)| match usize::try_from(id) {
        Ok(row) if row < rows => Ok(row),
        _ => {
            Err(check::error(format!("ids: each must be a row of weight, 0..{rows}, got {id} at position {position}")))
        }
    };
    ids.iter().enumerate().map(row).collect()
}

fn lookup<T: Element>(ids: &[usize], weight: &[T], width: usize) -> Vec<T> {
    let mut y = Vec::with_capacity(ids.len() * width);
    ids.iter().for_each(|row| y.extend_from_slice(&weight[row * width..(row + 1) * width]));
    y
}

fn gradient<T: Element>(ids: &[usize], dy: &[T], rows: usize, width: usize) -> Vec<T> {
    // A stable sort: the positions of an id stay in ascending order.
    let mut positions: Vec<usize> = (0..ids.len()).collect();
    positions.sort_by_key(|&position| ids[position]);
    let groups: Vec<&[usize]> = positions.chunk_by(|&a, &b| ids[a] == ids[b]).collect();
    let mut dweight = vec![T::default(); rows * width];
    if width == 0 {
        return dweight;
    }
    let mut of_row: Vec<(&mut [T], &[usize])> =
        dweight.chunks_exact_mut(width).map(|row| (row, [].as_slice())).collect();
    groups.into_iter().for_each(|group| of_row[ids[group[0]]].1 = group);
    of_row.into_par_iter().filter(|(_, positions)| !positions.is_empty()).for_each_init(
        || (vec![T::Acc::ZERO; width], vec![T::Acc::ZERO; width]),
        |(sum, row), (dweight, positions)| {
            sum.fill(T::Acc::ZERO);
            for position in positions {
                T::widen(&dy[position * width..(position + 1) * width], row);
                add(sum, row);
            }
            T::narrow(sum, dweight);
        },
    );
    dweight
}
