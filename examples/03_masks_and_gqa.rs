//! Draws each mask from the operator's own output, and shows that query heads can share keys and values.
//!
//! `cargo run --release --example 03_masks_and_gqa`

use candle_core::{DType, Device, Result, Tensor};
use candle_fa2::{Attention, Mask};

fn main() -> Result<()> {
    let (seqlen_q, seqlen_k) = (4, 7);
    let masks = [
        ("None", Mask::None),
        ("Causal", Mask::Causal),
        ("Window 2, 0", Mask::Window { left: Some(2), right: Some(0) }),
        ("Window 1, 1", Mask::Window { left: Some(1), right: Some(1) }),
    ];
    println!("{seqlen_q} queries (rows) over {seqlen_k} keys; the last query is aligned with the last key\n");
    let drawn: Vec<Vec<String>> =
        masks.iter().map(|(_, mask)| draw(*mask, seqlen_q, seqlen_k)).collect::<Result<_>>()?;
    println!("{}", masks.map(|(name, _)| format!("{name:18}")).concat().trim_end());
    for row in 0..seqlen_q {
        println!("{}", drawn.iter().map(|mask| format!("{:18}", mask[row])).collect::<String>().trim_end());
    }

    println!("\n8 query heads of 64, 512 tokens; keys and values are shared, not copied:\n");
    println!("num_heads_k |  k and v | as repeated heads");
    for num_heads_k in [8, 4, 2, 1] {
        let random = |heads: usize| Tensor::randn(0f32, 1f32, (1, 512, heads, 64), &Device::Cpu);
        let (q, k, v) = (random(8)?, random(num_heads_k)?, random(num_heads_k)?);
        let attention = Attention::new().mask(Mask::Causal);
        let shared = attention.forward(&q, &k, &v)?;
        // The same attention, with a copy of each key head for every query head that uses it.
        let repeat = |x: &Tensor| {
            let each = x.unsqueeze(3)?.broadcast_as((1, 512, num_heads_k, 8 / num_heads_k, 64))?;
            each.reshape((1, 512, 8, 64))
        };
        let repeated = attention.forward(&q, &repeat(&k)?, &repeat(&v)?)?;
        let difference = (shared - repeated)?.abs()?.flatten_all()?.max(0)?.to_scalar::<f32>()?;
        let kib = 2 * 512 * num_heads_k * 64 * DType::F32.size_in_bytes() / 1024;
        println!("{num_heads_k:11} | {kib:4} KiB | largest difference {difference:.1e}");
    }
    Ok(())
}

/// Draws one row of text per query. All scores are equal and the values are unit vectors, so `o[i]` is query `i`'s row of
/// softmax: above 0 where the key is visible.
fn draw(mask: Mask, seqlen_q: usize, seqlen_k: usize) -> Result<Vec<String>> {
    let zeros = |seqlen| Tensor::zeros((1, seqlen, 1, seqlen_k), DType::F32, &Device::Cpu);
    let v = Tensor::eye(seqlen_k, DType::F32, &Device::Cpu)?.reshape((1, seqlen_k, 1, seqlen_k))?;
    let o = Attention::new().mask(mask).forward(&zeros(seqlen_q)?, &zeros(seqlen_k)?, &v)?;
    let rows = o.reshape((seqlen_q, seqlen_k))?.gt(0f32)?.to_vec2::<u8>()?;
    Ok(rows
        .into_iter()
        .map(|row| row.into_iter().map(|visible| if visible == 1 { "x " } else { ". " }).collect())
        .collect())
}
