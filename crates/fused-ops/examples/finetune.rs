//! Trains a small byte model on this crate's README, saves the run, and fine-tunes its weights in bf16 on source code with a frozen
//! embedding.
//!
//! ```sh
//! cargo run --release --example finetune
//! ```
//!
//! The model sees 8 bytes and predicts the next one:
//!
//! ```text
//! embedding (n, 8, width) -> linear (n, width) -> 2 blocks -> RMS norm -> loss against the embedding as output head
//! block: x + down(swiglu(gate(norm(x)), up(norm(x))))
//! ```

use std::collections::HashMap;
use std::time::Instant;

use anyhow::{ensure, Result};
use candle_core::{DType, Device, Tensor, Var};
use candle_fused_ops::{
    embedding, linear_cross_entropy, mean_gradients, swiglu, AdamW, AdamWConfig, ParameterGroup, RmsNorm, Schedule,
};
use candle_nn::{linear_no_bias, Linear, Module, VarBuilder, VarMap};

const CONTEXT: usize = 8;
const WIDTH: usize = 64;
const BLOCKS: usize = 2;
const BATCH: usize = 64;
/// Batches of one step. Their gradients are added.
const BATCHES: usize = 2;
const STEPS: usize = 150;
const EPS: f64 = 1e-6;

struct Block {
    norm: RmsNorm,
    gate: Linear,
    up: Linear,
    down: Linear,
}

struct Model {
    bytes: Tensor, // (256, WIDTH)
    join: Linear,  // (CONTEXT * WIDTH) -> (WIDTH)
    blocks: Vec<Block>,
    norm: RmsNorm,
}

impl Model {
    fn new(vb: VarBuilder) -> Result<Self> {
        let block = |vb: VarBuilder| -> Result<Block> {
            Ok(Block {
                norm: RmsNorm::load(WIDTH, EPS, vb.pp("norm"))?,
                gate: linear_no_bias(WIDTH, 2 * WIDTH, vb.pp("gate"))?,
                up: linear_no_bias(WIDTH, 2 * WIDTH, vb.pp("up"))?,
                down: linear_no_bias(2 * WIDTH, WIDTH, vb.pp("down"))?,
            })
        };
        Ok(Self {
            bytes: vb.get_with_hints((256, WIDTH), "bytes", candle_nn::Init::Randn { mean: 0.0, stdev: 0.1 })?,
            join: linear_no_bias(CONTEXT * WIDTH, WIDTH, vb.pp("join"))?,
            blocks: (0..BLOCKS).map(|index| block(vb.pp(format!("block.{index}")))).collect::<Result<_>>()?,
            norm: RmsNorm::load(WIDTH, EPS, vb.pp("norm"))?,
        })
    }

    /// Mean loss in nats per byte: contexts (n, CONTEXT), targets (n).
    fn loss(&self, contexts: &Tensor, targets: &Tensor) -> Result<Tensor> {
        let mut x = self.join.forward(&embedding(contexts, &self.bytes)?.flatten_from(1)?)?; // (n, WIDTH)
        let mut change = x.zeros_like()?;
        for block in &self.blocks {
            let (sum, norm) = block.norm.forward_add(&change, &x)?;
            change = block.down.forward(&swiglu(&block.gate.forward(&norm)?, &block.up.forward(&norm)?)?)?;
            x = sum;
        }
        let (_, norm) = self.norm.forward_add(&change, &x)?;
        Ok(linear_cross_entropy(&norm, &self.bytes, targets)?)
    }
}

/// Batch `step` of `text`: positions that are spread over it.
fn batch(text: &[u8], step: usize) -> Result<(Tensor, Tensor)> {
    let starts = (0..BATCH).map(|row| (step * BATCH + row) * 7919 % (text.len() - CONTEXT));
    let (mut contexts, mut targets) = (Vec::new(), Vec::new());
    for start in starts {
        contexts.extend(text[start..start + CONTEXT].iter().map(|&byte| u32::from(byte)));
        targets.push(u32::from(text[start + CONTEXT]));
    }
    let contexts = Tensor::from_vec(contexts, (BATCH, CONTEXT), &Device::Cpu)?;
    Ok((contexts, Tensor::from_vec(targets, BATCH, &Device::Cpu)?))
}

/// Trains `model` for `STEPS` steps. Returns the optimizer, and the first and the last loss.
fn train(name: &str, model: &Model, groups: [ParameterGroup; 2], text: &str, lr: f64) -> Result<(AdamW, f32, f32)> {
    let started = Instant::now();
    let trained: Vec<Var> = groups.iter().flat_map(|group| &group.parameters).map(|(_, var)| var.clone()).collect();
    let mut optimizer = AdamW::new(groups, AdamWConfig { max_norm: Some(1.0), ..Default::default() })?;
    let schedule = Schedule::cosine(lr, lr / 10.0, STEPS).warmup(STEPS / 10);
    let mut losses = Vec::new();
    for step in 1..=STEPS {
        let batches = (0..BATCHES).map(|index| batch(text.as_bytes(), BATCHES * step + index));
        let batches = batches.collect::<Result<Vec<_>>>()?;
        let (loss, gradients) =
            mean_gradients(&trained, &batches, |(contexts, targets)| model.loss(contexts, targets))?;
        let norm = optimizer.step(&gradients, schedule.at(step))?;
        losses.push(loss.to_scalar::<f32>()?);
        if step % (STEPS / 5) == 0 {
            println!(
                "{name}  step {step:3}  loss {:.3}  gradient norm {:.2}",
                losses[step - 1],
                norm.to_scalar::<f32>()?
            );
        }
    }
    println!("{name}  {:.1} s", started.elapsed().as_secs_f64());
    Ok((optimizer, losses[0], losses[STEPS - 1]))
}

fn main() -> Result<()> {
    let variables = VarMap::new();
    let model = Model::new(VarBuilder::from_varmap(&variables, DType::F32, &Device::Cpu))?;
    let groups = ParameterGroup::decay_matrices(&variables, 0.1);
    let (optimizer, first, last) = train("README", &model, groups, include_str!("../README.md"), 3e-3)?;
    ensure!(last < first - 1.0, "the loss fell only from {first} to {last}");
    // The file has the weights and the state of the optimizer: this run could also go on from it.
    let file = std::env::temp_dir().join(format!("finetune-{}.safetensors", std::process::id()));
    optimizer.save(&file, HashMap::from([("context".to_string(), CONTEXT.to_string())]))?;

    // The same model in bf16. The optimizer keeps f32 weights, because a step is often smaller than a rounding step of bf16.
    let mut variables = VarMap::new();
    let model = Model::new(VarBuilder::from_varmap(&variables, DType::BF16, &Device::Cpu))?;
    let saved = candle_core::safetensors::load(&file, &Device::Cpu)?;
    std::fs::remove_file(&file)?;
    let names: Vec<String> = variables.data().lock().expect("one thread").keys().cloned().collect();
    for name in names {
        variables.set_one(&name, saved[&name].to_dtype(DType::BF16)?)?;
    }
    let frozen = |(name, _): &(String, Var)| name != "bytes";
    let groups = ParameterGroup::decay_matrices(&variables, 0.1).map(|mut group| {
        group.parameters.retain(frozen);
        group
    });
    let (_, first, last) = train("source", &model, groups, include_str!("../src/norm.rs"), 1e-3)?;
    ensure!(last < first - 0.5, "the loss fell only from {first} to {last}");
    Ok(())
}
