//! NaN and infinity, as the documentation of each operator says.

use anyhow::Result;
use candle_core::{DType, Device, Tensor, Var};
use candle_fused_ops::{gelu, gelu_erf, layer_norm, rms_norm, swiglu};

/// Which rows have a NaN.
pub fn rows_with_nan(tensor: &Tensor) -> Result<Vec<bool>> {
    let rows: Vec<Vec<f32>> = tensor.to_dtype(DType::F32)?.to_vec2()?;
    Ok(rows.iter().map(|row| row.iter().any(|x| x.is_nan())).collect())
}

#[test]
fn a_nonfinite_number_stays_in_its_row() -> Result<()> {
    nonfinite_row_of_a_norm(&Device::Cpu)
}

pub fn nonfinite_row_of_a_norm(device: &Device) -> Result<()> {
    let weight = Tensor::ones(3, DType::F32, device)?;
    let nan_in = |tensor: &Tensor| -> Result<Vec<Vec<bool>>> {
        Ok(tensor.to_vec2::<f32>()?.iter().map(|row| row.iter().map(|x| x.is_nan()).collect()).collect())
    };
    let whole_row = [[false; 3], [true; 3], [false; 3]];
    for nonfinite in [f32::NAN, f32::INFINITY, -f32::INFINITY] {
        for is_rms in [false, true] {
            let x = Var::new(&[[1f32, 2.0, 4.0], [1.0, nonfinite, 3.0], [5.0, 0.0, 1.0]], device)?;
            let y = match is_rms {
                true => rms_norm(&x, &weight, 1e-5)?,
                false => layer_norm(&x, &weight, None, 1e-5)?,
            };
            match is_rms && nonfinite.is_infinite() {
                true => {
                    let row = y.to_vec2::<f32>()?.swap_remove(1);
                    assert!(row[0] == 0.0 && row[1].is_nan() && row[2] == 0.0, "{row:?}");
                    assert_eq!(rows_with_nan(&y)?, [false, true, false]);
                }
                false => assert_eq!(nan_in(&y)?, whole_row),
            }
            let grads = y.sum_all()?.backward()?;
            assert_eq!(nan_in(grads.get(&x).expect("a gradient"))?, whole_row);
        }
    }
    Ok(())
}

#[test]
fn gelu_has_its_limits_at_infinity() -> Result<()> {
    limits_of_gelu(&Device::Cpu)
}

pub fn limits_of_gelu(device: &Device) -> Result<()> {
    let infinity = f32::INFINITY;
    for function in [gelu, gelu_erf] {
        let x = Var::new(&[infinity, f32::MAX, 20.0, -20.0, f32::MIN, -infinity, f32::NAN], device)?;
        let y = function(&x)?;
        let dx = y.sum_all()?.backward()?.remove(&x).expect("a gradient").to_vec1::<f32>()?;
        let y = y.to_vec1::<f32>()?;
        assert_eq!(y[..6], [infinity, f32::MAX, 20.0, 0.0, 0.0, 0.0]);
        assert_eq!(dx[..6], [1.0, 1.0, 1.0, 0.0, 0.0, 0.0]);
        assert!(y[6].is_nan() && dx[6].is_nan());
    }
    Ok(())
}

#[test]
fn finite_gates_give_finite_results() -> Result<()> {
    finite_gates(&Device::Cpu)
}

pub fn finite_gates(device: &Device) -> Result<()> {
    let gate = Var::new(&[1e4f32, -1e4, f32::MIN], device)?;
    let y = swiglu(&gate, &Tensor::ones(3, DType::F32, device)?)?;
    assert_eq!(y.to_vec1::<f32>()?, [1e4, 0.0, 0.0]);
    let dgate = y.sum_all()?.backward()?.remove(&gate).expect("a gradient");
    assert_eq!(dgate.to_vec1::<f32>()?, [1.0, 0.0, 0.0]);
    Ok(())
}
