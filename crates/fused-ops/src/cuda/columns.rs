//! Rows with more or fewer columns: cuda/columns.cuh.

use candle_core::{CudaDevice, CudaStorage, Result, Storage, Tensor};

use super::launch::{grid, Launcher};
use super::memory::{tensor, uninit, Locked};
use super::params::{ColumnsParams, COLUMNS_ROWS, COLUMNS_THREADS};
use crate::node;

/// See [`crate::resize_columns`].
pub(crate) fn resize_columns(device: &CudaDevice, x: &Tensor, columns: usize) -> Result<Tensor> {
    let x = x.contiguous()?;
    let y = resized(device, &x, columns)?;
    let device = device.clone();
    node::node("resize_columns", &[&x], Storage::Cuda(y), with_columns(&x, columns), move |inputs, dy| {
        let x = inputs[0];
        Ok(vec![Some(tensor(resized(&device, dy, columns_of(x))?, x.shape()))])
    })
}

fn columns_of(x: &Tensor) -> usize {
    x.dims()[x.rank() - 1]
}

/// The shape of `x`, with another last axis.
fn with_columns(x: &Tensor, columns: usize) -> Vec<usize> {
    [&x.dims()[..x.rank() - 1], &[columns]].concat()
}

/// `x` is contiguous.
fn resized(device: &CudaDevice, x: &Tensor, columns: usize) -> Result<CudaStorage> {
    let (width, bytes) = (columns_of(x), x.dtype().size_in_bytes());
    let rows = x.elem_count() / width;
    let mut y = uninit(device, rows * columns, x.dtype())?;
    {
        let x = Locked::of(x);
        // The largest word that divides both rows, so that every row begins and ends with a whole one.
        let divides = |word: &usize| [width, columns, x.start()].iter().all(|len| (len * bytes).is_multiple_of(*word));
        let word = [16, 8, 4].into_iter().find(divides).unwrap_or(2);
        let stream = device.cuda_stream();
        let mut launcher = Launcher::new(&stream);
        let params = ColumnsParams {
            x: launcher.read(&x),
            y: launcher.write(&mut y),
            rows: rows as i64,
            x_words: (width * bytes / word) as i32,
            y_words: (columns * bytes / word) as i32,
        };
        let threads_of_row = (params.y_words as usize).min(COLUMNS_THREADS);
        let rows_of_block = COLUMNS_THREADS / threads_of_row * COLUMNS_ROWS;
        let config = grid(rows.div_ceil(rows_of_block), COLUMNS_THREADS);
        // SAFETY: both tensors have `rows` rows of whole words, and begin at a word.
        unsafe { launcher.launch("columns", &format!("resize_columns_{word}"), config, &params)? };
    }
    Ok(y)
}
