//! Matrix products with an epilogue on a GPU, compared with their formulas in f32 on the CPU.

use crate::blas;
use crate::rng::Rng;
use anyhow::Result;
use candle_core::{DType, Device, Tensor};

/// The largest relative error of rounding to bf16: half a unit in the last of its 8 bits.
const ROUNDING: f32 = 1.0 / 256.0;

/// The largest error of the hardware's tanh. GELU and its slope use tanh.
const TANH: f32 = 1.0 / 1024.0;

/// The largest error of a sum of 48 f32 values of up to about 10, added in another order.
const SUMS: f32 = 1e-4;

/// Sizes that are not powers of two. Their rows are multiples of 16 bytes.
const K: usize = 48;
const N: usize = 80;

/// Normally distributed numbers that bf16 holds exactly, as f32 on the CPU.
fn normal(rng: &mut Rng, shape: &[usize], std: f32) -> Result<Tensor> {
    let tensor = Tensor::from_vec(rng.normal(shape.iter().product(), std), shape, &Device::Cpu)?;
    Ok(tensor.to_dtype(DType::BF16)?.to_dtype(DType::F32)?)
}

/// Asserts that `got`, in bf16 on a GPU, equals `want` up to two roundings and `scale` times the error of tanh.
fn assert_close(what: &str, got: &Tensor, want: &Tensor, scale: Option<&Tensor>) -> Result<()> {
    assert_eq!((got.dtype(), got.dims()), (DType::BF16, want.dims()), "{what}");
    let values = |tensor: &Tensor| -> Result<Vec<f32>> {
        Ok(tensor.to_device(&Device::Cpu)?.to_dtype(DType::F32)?.flatten_all()?.to_vec1()?)
    };
    let scale = scale.map_or(Ok(vec![0.0; want.elem_count()]), values)?;
    for (at, ((got, want), scale)) in values(got)?.iter().zip(values(want)?).zip(scale).enumerate() {
        let limit = 2.0 * ROUNDING * want.abs() + TANH * scale.abs() + SUMS;
        let (row, column) = (at / N, at % N);
        assert!((got - want).abs() <= limit, "{what} at [{row}, {column}]: {got}, formula {want}, limit {limit}");
    }
    Ok(())
}

/// 2 sqrt(2/pi) (h + 0.044715 h^3), and its slope
fn inside(h: &Tensor) -> candle_core::Result<(Tensor, Tensor)> {
    let slope = 2.0 * (2.0 / std::f64::consts::PI).sqrt();
    let square = h.sqr()?;
    Ok(((h * square.affine(slope * 0.044715, slope)?)?, square.affine(3.0 * slope * 0.044715, slope)?))
}

/// The slope of `h sigmoid(inside(h))`
fn gelu_slope(h: &Tensor) -> candle_core::Result<Tensor> {
    let (inside, slope) = inside(h)?;
    let s = candle_nn::ops::sigmoid(&inside)?;
    &s + (((h * &s)? * s.affine(-1.0, 1.0)?)? * slope)?
}

#[test]
fn products_follow_their_formulas() -> Result<()> {
    let Ok(gpu) = Device::new_cuda(0) else {
        println!("SKIPPED: no CUDA device");
        return Ok(());
    };
    let on_gpu = |tensor: &Tensor| tensor.to_dtype(DType::BF16)?.to_device(&gpu);
    for m in [1, 5, 128] {
        let mut rng = Rng::new(m as u64);
        let (x, w) = (normal(&mut rng, &[m, K], 1.0)?, normal(&mut rng, &[K, N], 0.3)?);
        let (bias, residual) = (normal(&mut rng, &[N], 1.0)?, normal(&mut rng, &[m, N], 1.0)?);
        let (x_, w_, bias_, residual_) = (on_gpu(&x)?, on_gpu(&w)?, on_gpu(&bias)?, on_gpu(&residual)?);
        // w as it is, and w as the transpose of a contiguous tensor.
        for (layout, w_) in [("w", &w_), ("w transposed", &w_.t()?.contiguous()?.t()?)] {
            let what = |name: &str| format!("{name}, m {m}, {layout}");
            let xw = x.matmul(&w)?;
            let h = xw.broadcast_add(&bias)?;
            assert_close(&what("affine"), &blas::affine(&x_, w_, &bias_, None)?, &h, None)?;
            let got = blas::affine(&x_, w_, &bias_, Some(&residual_))?;
            assert_close(&what("affine residual"), &got, &(&h + &residual)?, None)?;

            let (got_h, got_g) = blas::affine_gelu(&x_, w_, &bias_)?;
            assert_close(&what("h of affine_gelu"), &got_h, &h, None)?;
            let g = (&h * candle_nn::ops::sigmoid(&inside(&h)?.0)?)?;
            // GELU may use the rounded h. That error is up to four times the error of tanh, so allow five times in total.
            assert_close(&what("g of affine_gelu"), &got_g, &g, Some(&(&h * 5.0)?))?;

            let dy_w = blas::product_gelu_backward(&x_, w_, &residual_)?;
            let want = (&xw * gelu_slope(&residual)?)?;
            // The slope multiplies tanh by up to 5.
            assert_close(&what("product_gelu_backward"), &dy_w, &want, Some(&(&xw * 5.0)?))?;
        }
    }
    Ok(())
}

/// An error names the operand that does not fit. The check needs no GPU.
#[test]
fn operands_that_do_not_fit_are_named() -> Result<()> {
    let zeros = |shape: &[usize]| Tensor::zeros(shape, DType::BF16, &Device::Cpu);
    let (x, w, bias) = (zeros(&[5, 48])?, zeros(&[48, 80])?, zeros(&[80])?);
    // With RUST_BACKTRACE, Candle adds lines.
    let text = |result: candle_core::Result<Tensor>| {
        result.expect_err("it does not fit").to_string().lines().next().map(String::from).unwrap_or_default()
    };
    assert_eq!(
        text(blas::affine(&x, &zeros(&[40, 80])?, &bias, None)),
        "w: rows must be 48 as the columns of x in shape [5, 48], got shape [40, 80]"
    );
    assert_eq!(
        text(blas::affine(&x, &w, &zeros(&[48])?, None)),
        "bias: must be contiguous with shape [80] for x [5, 48] and w [48, 80], got shape [48] with strides [1]"
    );
    assert_eq!(
        text(blas::affine(&x, &w, &bias, Some(&zeros(&[80, 5])?.t()?))),
        "residual: must be contiguous with shape [5, 80] for x [5, 48] and w [48, 80], got shape [5, 80] with strides [1, 5]"
    );
    assert_eq!(
        text(blas::product_gelu_backward(&x, &w, &zeros(&[5, 80])?.to_dtype(DType::F32)?)),
        "h: dtype F32 is not supported (supported: BF16)"
    );
    assert_eq!(text(blas::affine(&x, &w, &bias, None)), "products with an epilogue need tensors on a GPU");
    Ok(())
}
