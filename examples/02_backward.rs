//! Attention that learns: the model must output the token three positions back. Only attention can see that token.
//!
//! `cargo run --release --example 02_backward`

use std::collections::BTreeMap;

use candle_core::backprop::GradStore;
use candle_core::{DType, Device, Result, Tensor, D};
use candle_fa2::layers::{MultiHeadAttention, MultiHeadAttentionConfig, Rotary, RotaryConfig};
use candle_fa2::Mask;
use candle_nn::{embedding, linear_no_bias, loss, AdamW, Module, Optimizer, ParamsAdamW, VarBuilder, VarMap};

const VOCAB: usize = 16;
const EMBED_DIM: usize = 64;
const BATCH: usize = 16;
const SEQLEN: usize = 48;
const BACK: usize = 3;

fn main() -> Result<()> {
    let device = Device::Cpu;
    let varmap = VarMap::new();
    let vb = VarBuilder::from_varmap(&varmap, DType::F32, &device);
    let rotary = Rotary::new(&RotaryConfig::new(EMBED_DIM / 4, SEQLEN), &device)?;
    let config = MultiHeadAttentionConfig::new(EMBED_DIM, 4).num_heads_k(2).mask(Mask::Causal).rotary(&rotary);
    let tokens = embedding(VOCAB, EMBED_DIM, vb.pp("tokens"))?;
    let attention = MultiHeadAttention::new(&config, vb.pp("attention"))?;
    let head = linear_no_bias(EMBED_DIM, VOCAB, vb.pp("head"))?;
    let mut optimizer = AdamW::new(varmap.all_vars(), ParamsAdamW { lr: 0.01, ..Default::default() })?;

    for step in 0..=60 {
        let ids = Tensor::rand(0f32, VOCAB as f32, (BATCH, SEQLEN), &device)?.to_dtype(DType::U32)?;
        let xs = attention.forward(&tokens.forward(&ids)?)?; // (batch, seqlen, embed_dim)
        let logits = head.forward(&xs)?.narrow(1, BACK, SEQLEN - BACK)?.reshape(((), VOCAB))?;
        let targets = ids.narrow(1, 0, SEQLEN - BACK)?.flatten_all()?;
        let loss = loss::cross_entropy(&logits, &targets)?;
        let grads = loss.backward()?;
        optimizer.step(&grads)?;
        if step == 0 {
            print_gradients(&varmap, &grads)?;
            println!("\na guess has loss ln {VOCAB} = {:.2}\n\nstep | loss | right", (VOCAB as f64).ln());
        }
        if step % 10 == 0 {
            let right = logits.argmax(D::Minus1)?.eq(&targets)?.to_dtype(DType::F32)?.mean_all()?;
            println!("{step:4} | {:.2} | {:3.0}%", loss.to_scalar::<f32>()?, 100.0 * right.to_scalar::<f32>()?);
        }
    }
    Ok(())
}

/// Prints one line per variable. If an operator cut the graph, variables before it would have no gradient.
fn print_gradients(varmap: &VarMap, grads: &GradStore) -> Result<()> {
    println!("norm of each gradient at the first step:");
    let vars = varmap.data().lock().expect("no other thread holds the map");
    for (name, var) in vars.iter().collect::<BTreeMap<_, _>>() {
        let grad = grads.get(var).expect("every variable has a gradient");
        println!("  {name:23} {:.2}", grad.sqr()?.sum_all()?.sqrt()?.to_scalar::<f32>()?);
    }
    Ok(())
}
