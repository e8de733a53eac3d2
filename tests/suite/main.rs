//! Smoke.
mod layers;
use candle_core::{DType, Device, Tensor, Var, D};
use candle_fa2::{Attention, Mask};
fn naive(q: &Tensor, k: &Tensor, v: &Tensor, causal: bool) -> candle_core::Result<Tensor> {
    let (_b, s, h, d) = q.dims4()?;
    let hk = k.dim(2)?;
    let sk = k.dim(1)?;
    let rep = |x: &Tensor| -> candle_core::Result<Tensor> {
        let (b, s, _, d) = x.dims4()?;
        x.unsqueeze(3)?.expand((b, s, hk, h / hk, d))?.reshape((b, s, h, d))?.transpose(1, 2)?.contiguous()
    };
    let (q, k, v) = (q.transpose(1, 2)?.contiguous()?, rep(k)?, rep(v)?);
    let mut s_ = (q.matmul(&k.t()?)? / (d as f64).sqrt())?;
    if causal {
        let m: Vec<f32> =
            (0..s).flat_map(|i| (0..sk).map(move |j| if j <= i + sk - s { 0. } else { f32::NEG_INFINITY })).collect();
        s_ = s_.broadcast_add(&Tensor::from_vec(m, (s, sk), &Device::Cpu)?.to_dtype(s_.dtype())?)?;
    }
    candle_nn::ops::softmax(&s_, D::Minus1)?.matmul(&v)?.transpose(1, 2)?.contiguous()
}
#[test]
fn smoke() -> anyhow::Result<()> {
    for dt in [DType::F64, DType::F32, DType::F16, DType::BF16] {
        for causal in [false, true] {
            for (s, sk, d) in [(5, 7, 3), (300, 523, 64), (130, 129, 40)] {
                let s = if causal && s > sk { sk } else { s };
                let mk = |r: usize, h: usize| -> anyhow::Result<Var> {
                    Ok(Var::from_tensor(&Tensor::randn(0f32, 1f32, (2, r, h, d), &Device::Cpu)?.to_dtype(dt)?)?)
                };
                let (q, k, v) = (mk(s, 4)?, mk(sk, 2)?, mk(sk, 2)?);
                let a = Attention::new().mask(if causal { Mask::Causal } else { Mask::None });
                let (o, lse) = a.forward_with_lse(&q, &k, &v)?;
                let o1 = a.forward(&q, &k, &v)?;
                let up = Tensor::randn(0f32, 1f32, o.shape(), &Device::Cpu)?.to_dtype(dt)?;
                let g = (&o * &up)?.to_dtype(DType::F32)?.sum_all()?.backward()?;
                let g1 = (&o1 * &up)?.to_dtype(DType::F32)?.sum_all()?.backward()?;
                let acc = if dt == DType::F64 { DType::F64 } else { DType::F32 };
                let up = up.to_dtype(acc)?;
                let (q2, k2, v2) = (
                    Var::from_tensor(&q.to_dtype(acc)?)?,
                    Var::from_tensor(&k.to_dtype(acc)?)?,
                    Var::from_tensor(&v.to_dtype(acc)?)?,
                );
                let o2 = naive(&q2, &k2, &v2, causal)?;
                let g2 = (&o2 * &up)?.sum_all()?.backward()?;
                let diff = |a: &Tensor, b: &Tensor| -> anyhow::Result<f64> {
                    Ok((a.to_dtype(DType::F64)? - b.to_dtype(DType::F64)?)?
                        .abs()?
                        .flatten_all()?
                        .max(0)?
                        .to_scalar()?)
                };
                print!(
                    "{dt:?} {causal} {s} {sk} {d}: o {:.1e} {:.1e} lse {:?}",
                    diff(&o, &o2)?,
                    diff(&o1, &o2)?,
                    lse.dims()
                );
                for (a, b) in [(&q, &q2), (&k, &k2), (&v, &v2)] {
                    print!(
                        " {:.1e} {:.1e}",
                        diff(g.get(a).unwrap(), g2.get(b).unwrap())?,
                        diff(g1.get(a).unwrap(), g2.get(b).unwrap())?
                    );
                }
                println!();
            }
        }
    }
    Ok(())
}
