//! NaN and infinity, as the documentation of each operator says.

use anyhow::Result;
use candle_core::{DType, Device, Tensor, Var};
use candle_fused_ops::layer_norm;

/// Which rows have a NaN.
pub fn rows_with_nan(tensor: &Tensor) -> Result<Vec<bool>> {
    let rows: Vec<Vec<f32>> = tensor.to_dtype(DType::F32)?.to_vec2()?;
    Ok(rows.iter().map(|row| row.iter().any(|x| x.is_nan())).collect())
}

#[test]
fn a_row_with_nan_or_infinity_spoils_itself_only() -> Result<()> {
    for spoiled in [f32::NAN, f32::INFINITY] {
        let x = Var::new(&[[1f32, 2.0, 4.0], [1.0, spoiled, 3.0], [5.0, 0.0, 1.0]], &Device::Cpu)?;
        let y = layer_norm(&x, &Tensor::ones(3, DType::F32, &Device::Cpu)?, None, 1e-5)?;
        assert_eq!(rows_with_nan(&y)?, [false, true, false]);
        let grads = y.sqr()?.sum_all()?.backward()?;
        assert_eq!(rows_with_nan(grads.get(&x).expect("a gradient"))?, [false, true, false]);
    }
    Ok(())
}
