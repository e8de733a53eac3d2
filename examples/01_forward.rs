//! Attention without the scores in memory: the fused operator compared with Candle's matmul, softmax, matmul.
//!
//! `cargo run --release --example 01_forward`

use std::time::Instant;

use candle_core::{Device, Result, Tensor, D};
use candle_fa2::{Attention, Mask};

const NUM_HEADS: usize = 8;
const HEAD_DIM: usize = 64;

fn main() -> Result<()> {
    let device = Device::Cpu;
    println!("causal, f32, {NUM_HEADS} heads of {HEAD_DIM}, seqlen x seqlen scores that are never stored:\n");
    println!("seqlen |    fused |  unfused |   scores | largest difference");
    for seqlen in [512, 1024, 2048] {
        let shape = (1, seqlen, NUM_HEADS, HEAD_DIM); // (batch, seqlen, num_heads, head_dim)
        let q = Tensor::randn(0f32, 1f32, shape, &device)?;
        let k = Tensor::randn(0f32, 1f32, shape, &device)?;
        let v = Tensor::randn(0f32, 1f32, shape, &device)?;

        let attention = Attention::new().mask(Mask::Causal);
        attention.forward(&q, &k, &v)?; // warm up
        let start = Instant::now();
        let o = attention.forward(&q, &k, &v)?;
        let fused = start.elapsed();

        let start = Instant::now();
        let want = unfused(&q, &k, &v)?;
        let plain = start.elapsed();

        let difference = (o - want)?.abs()?.flatten_all()?.max(0)?.to_scalar::<f32>()?;
        let [fused, plain] = [fused, plain].map(|time| time.as_secs_f64() * 1e3);
        let scores_mb = (NUM_HEADS * seqlen * seqlen * 4) >> 20;
        println!("{seqlen:6} | {fused:5.1} ms | {plain:5.0} ms | {scores_mb:5} MB | {difference:.1e}");
    }
    Ok(())
}

/// Standard attention: computes all scores, masks them, applies softmax, multiplies by v. All scores are in memory at once.
fn unfused(q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor> {
    let seqlen = q.dim(1)?;
    let heads_first = |x: &Tensor| x.transpose(1, 2)?.contiguous(); // (batch, num_heads, seqlen, head_dim)
    let (q, k, v) = (heads_first(q)?, heads_first(k)?, heads_first(v)?);
    let hidden = |i| (0..seqlen).map(move |j| if j <= i { 0.0 } else { f32::NEG_INFINITY });
    let mask = Tensor::from_iter((0..seqlen).flat_map(hidden), q.device())?.reshape((seqlen, seqlen))?;
    let scores = (q.matmul(&k.t()?)? / (HEAD_DIM as f64).sqrt())?.broadcast_add(&mask)?;
    candle_nn::ops::softmax(&scores, D::Minus1)?.matmul(&v)?.transpose(1, 2)
}
