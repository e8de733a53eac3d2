//! The asserts: compare a tensor with the reference within a tolerance, and compare two tensors bit by bit.

use anyhow::{bail, ensure, Result};
use attention_reference::{Output, Rows, Tolerance};
use candle_core::{DType, Tensor};
use half::{bf16, f16};
use std::fmt::Display;

/// Compares a tensor of the case `what` with the reference; see [`attention_reference::close`].
pub fn close(name: &str, got: &Rows, want: &Rows, tolerance: &Tolerance, what: &dyn Display) -> Result<()> {
    attention_reference::close(name, got, want, tolerance, what).map(|_| ())
}

/// Asserts that two tensors have the same shape, type and bits.
pub fn same_bits(name: &str, got: &Tensor, want: &Tensor, what: &dyn Display) -> Result<()> {
    ensure!(
        got.dims() == want.dims() && got.dtype() == want.dtype(),
        "{name}: {:?} {:?} against {:?} {:?}\n{what}",
        got.dims(),
        got.dtype(),
        want.dims(),
        want.dtype()
    );
    let (got_bits, want_bits) = (bits(got)?, bits(want)?);
    let differing: Vec<usize> = (0..got_bits.len()).filter(|&at| got_bits[at] != want_bits[at]).collect();
    if let Some(&first) = differing.first() {
        let mut rest = first;
        let mut index = vec![0; got.rank()];
        for (axis, &len) in got.dims().iter().enumerate().rev() {
            index[axis] = rest % len;
            rest /= len;
        }
        bail!(
            "{name}: bits {:#x} against {:#x} at {index:?} of {:?}; {} of {} elements differ\n{what}",
            got_bits[first],
            want_bits[first],
            got.dims(),
            differing.len(),
            got_bits.len(),
        );
    }
    Ok(())
}

/// Asserts that two outputs have the same bits in each tensor.
pub fn same_outputs(got: &Output, want: &Output, what: &impl Display) -> Result<()> {
    let pairs = got.named().into_iter().zip(want.named());
    pairs.into_iter().try_for_each(|((name, got), (_, want))| same_rows(name, &got.values, &want.values, what))
}

/// Asserts that both lists have the same bits in the same order.
pub fn same_rows(name: &str, got: &[f64], want: &[f64], what: &impl Display) -> Result<()> {
    ensure!(got.len() == want.len(), "{name} has {} elements, not {}\n{what}", got.len(), want.len());
    let differ = got.iter().zip(want).filter(|(got, want)| got.to_bits() != want.to_bits()).count();
    ensure!(differ == 0, "{differ} of {} elements of {name} differ\n{what}", got.len());
    Ok(())
}

fn bits(tensor: &Tensor) -> Result<Vec<u64>> {
    let flat = tensor.flatten_all()?;
    Ok(match tensor.dtype() {
        DType::F64 => flat.to_vec1::<f64>()?.into_iter().map(f64::to_bits).collect(),
        DType::F32 => flat.to_vec1::<f32>()?.into_iter().map(|x| x.to_bits().into()).collect(),
        DType::F16 => flat.to_vec1::<f16>()?.into_iter().map(|x| x.to_bits().into()).collect(),
        DType::BF16 => flat.to_vec1::<bf16>()?.into_iter().map(|x| x.to_bits().into()).collect(),
        other => bail!("no bits of {other:?}"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bits_are_bits() -> Result<()> {
        let device = candle_core::Device::Cpu;
        let zero = Tensor::new(&[[0f32, 0.0], [0.0, 0.0]], &device)?;
        let minus = Tensor::new(&[[0f32, 0.0], [0.0, -0.0]], &device)?;
        same_bits("o", &zero, &zero, &"same")?;
        let error = same_bits("o", &minus, &zero, &"case").expect_err("the sign differs");
        assert_eq!(
            error.to_string(),
            "o: bits 0x80000000 against 0x0 at [1, 1] of [2, 2]; 1 of 4 elements differ\ncase"
        );
        assert!(same_bits("o", &zero, &zero.flatten_all()?, &"shape").is_err());
        assert!(same_bits("o", &zero, &zero.to_dtype(DType::F16)?, &"type").is_err());
        Ok(())
    }
}
