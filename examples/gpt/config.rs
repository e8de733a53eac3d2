//! The configuration of a run: text, model and training. Every checkpoint contains all of it.
//!
//! A preset is a complete configuration. Each command-line option replaces one field.

use crate::tokenizer::Tokenizer;
use candle_core::DType;
use clap::ValueEnum;
use serde::{Deserialize, Serialize};
use std::path::PathBuf;

#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, ValueEnum)]
pub enum Preset {
    /// 0.8 M parameters on bytes: a few minutes on two cores
    Tiny,
    /// GPT-2 small
    #[value(name = "124m")]
    Gpt124m,
    /// GPT-2 medium
    #[value(name = "350m")]
    Gpt350m,
    /// GPT-3 XL
    #[value(name = "1.3b")]
    Gpt1300m,
}

#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, ValueEnum)]
pub enum AttentionKind {
    /// candle-fa2: the scores are never stored
    Flash,
    /// matmul, softmax, matmul: Candle's operators and Candle's gradients
    Standard,
    /// No attention, to measure the cost of the rest: q + k + v, which adds a few passes over memory
    None,
}

#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, ValueEnum)]
pub enum Precision {
    /// Everything in f32
    F32,
    /// Activations in bf16, master weights and optimizer in f32 (for GPUs; on a CPU slower than f32)
    Bf16,
}

/// The name of a value on the command line.
pub fn name_of(value: impl ValueEnum) -> String {
    value.to_possible_value().map_or(String::new(), |value| value.get_name().to_string())
}

impl Precision {
    pub fn dtype(self) -> DType {
        match self {
            Precision::F32 => DType::F32,
            Precision::Bf16 => DType::BF16,
        }
    }
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Config {
    // Text.
    pub data: Option<PathBuf>, // None: the repository's own sources and documents
    pub tokenizer: Tokenizer,

    // Model.
    pub num_layers: usize,
    pub num_heads: usize,
    pub embed_dim: usize,
    pub context: usize,
    pub attention: AttentionKind,
    pub precision: Precision,

    // Training: one step sees batch * accumulation windows of `context` tokens.
    pub steps: usize,
    pub batch: usize,
    pub accumulation: usize,
    pub lr: f64,     // the peak, reached after `warmup` steps
    pub min_lr: f64, // where the cosine ends
    pub warmup: usize,
    pub weight_decay: f64,
    pub beta1: f64,
    pub beta2: f64,
    pub clip: f64, // largest global norm of the gradient
    pub seed: u64,
    pub deterministic: bool,          // on a GPU, runs have the same bits
    pub checkpoint_activations: bool, // the backward computes each block again

    // Evaluation: every `eval_interval` steps, on `eval_windows` held-out windows.
    pub eval_interval: usize,
    pub eval_windows: usize,
    pub checkpoint_interval: Option<usize>, // None: the same as eval_interval
}

impl Config {
    pub fn checkpoint_interval(&self) -> usize {
        self.checkpoint_interval.unwrap_or(self.eval_interval)
    }

    pub fn head_dim(&self) -> usize {
        self.embed_dim / self.num_heads
    }

    pub fn tokens_per_step(&self) -> usize {
        self.batch * self.accumulation * self.context
    }

    pub fn preset(preset: Preset) -> Self {
        match preset {
            Preset::Tiny => Self {
                data: None,
                tokenizer: Tokenizer::Bytes,
                num_layers: 4,
                num_heads: 4,
                embed_dim: 128,
                context: 128,
                attention: AttentionKind::Flash,
                precision: Precision::F32,
                steps: 800,
                batch: 8,
                accumulation: 1,
                lr: 2e-3,
                min_lr: 2e-4,
                warmup: 80,
                weight_decay: 0.1,
                beta1: 0.9,
                beta2: 0.99,
                clip: 1.0,
                seed: 1,
                deterministic: false,
                checkpoint_activations: false,
                eval_interval: 50,
                eval_windows: 64,
                checkpoint_interval: None,
            },
            // Sizes and learning rates are from the table of models in the GPT-3 paper. A step has half a million tokens, or a
            // million for the largest model. Warm-up takes 375 million tokens. 20,000 steps are ten billion tokens.
            Preset::Gpt124m => Self {
                tokenizer: Tokenizer::Gpt2,
                num_layers: 12,
                num_heads: 12,
                embed_dim: 768,
                context: 1024,
                steps: 20_000,
                batch: 8,
                accumulation: 64,
                lr: 6e-4,
                min_lr: 6e-5,
                warmup: 715,
                beta2: 0.95,
                eval_interval: 250,
                ..Self::preset(Preset::Tiny)
            },
            Preset::Gpt350m => Self {
                num_layers: 24,
                num_heads: 16,
                embed_dim: 1024,
                batch: 4,
                accumulation: 128,
                lr: 3e-4,
                min_lr: 3e-5,
                ..Self::preset(Preset::Gpt124m)
            },
            Preset::Gpt1300m => Self {
                num_layers: 24,
                num_heads: 16,
                embed_dim: 2048,
                context: 2048,
                batch: 1,
                accumulation: 512,
                lr: 2e-4,
                min_lr: 2e-5,
                warmup: 358,
                ..Self::preset(Preset::Gpt124m)
            },
        }
    }
}
