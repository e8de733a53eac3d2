//! The configuration of a run: text, model and training. Every checkpoint contains all of it.
//!
//! A preset is a complete configuration. Each command-line option replaces one field.

use crate::tokenizer::TokenizerKind;
use candle_core::DType;
use clap::ValueEnum;
use serde::{Deserialize, Serialize};
use std::fmt::Display;
use std::path::PathBuf;

#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, ValueEnum)]
pub enum Preset {
    /// 0.8 M parameters on bytes: two minutes on a laptop
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
    #[serde(with = "any_path")]
    pub data: Option<PathBuf>, // None: the repository's own sources and documents
    pub tokenizer: TokenizerKind,

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
    #[serde(default)]
    pub deterministic: bool, // on a GPU, runs have the same bits
    #[serde(default)]
    pub checkpoint_activations: bool, // the backward computes each block again

    // Evaluation: every `eval_interval` steps, on `eval_windows` held-out windows.
    pub eval_interval: usize,
    pub eval_windows: usize,
    #[serde(default)]
    pub checkpoint_interval: Option<usize>, // None: the same as eval_interval
}

impl Config {
    /// Returns the first invalid field and the rule that it breaks.
    pub fn check(&self) -> Result<(), String> {
        /// Upper limit for every size. Products of larger sizes could overflow `usize`.
        const MAX: usize = u32::MAX as usize;
        let rule = |field: &str, value: &dyn Display, holds: bool, rule: &str| match holds {
            true => Ok(()),
            false => Err(format!("{field} is {value}, but must be {rule}")),
        };
        for (field, value) in [
            ("num_layers", self.num_layers),
            ("num_heads", self.num_heads),
            ("embed_dim", self.embed_dim),
            ("context", self.context),
            ("batch", self.batch),
            ("accumulation", self.accumulation),
        ] {
            rule(field, &value, (1..=MAX).contains(&value), &format!("from 1 to {MAX}"))?;
        }
        for (field, value) in [
            ("steps", self.steps),
            ("eval_interval", self.eval_interval),
            ("eval_windows", self.eval_windows),
            ("checkpoint_interval", self.checkpoint_interval()),
        ] {
            rule(field, &value, value > 0, "at least 1")?;
        }
        let heads = format!("a multiple of num_heads {}", self.num_heads);
        rule("embed_dim", &self.embed_dim, self.embed_dim.is_multiple_of(self.num_heads), &heads)?;
        let tokens = self.batch.saturating_mul(self.accumulation).saturating_mul(self.context);
        rule("batch * accumulation * context", &tokens, tokens <= MAX, &format!("at most {MAX}"))?;

        rule("lr", &self.lr, self.lr > 0.0, "above 0")?;
        let from_0_to_lr = (0.0..=self.lr).contains(&self.min_lr);
        rule("min_lr", &self.min_lr, from_0_to_lr, &format!("from 0 to lr {}", self.lr))?;
        rule("weight_decay", &self.weight_decay, self.weight_decay >= 0.0, "0 or above")?;
        for (field, value) in [("beta1", self.beta1), ("beta2", self.beta2)] {
            rule(field, &value, (0.0..1.0).contains(&value), "from 0 to below 1")?;
        }
        rule("clip", &self.clip, self.clip > 0.0, "above 0")
    }

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
            Preset::Tiny => Self::tiny(),
            Preset::Gpt124m => Self::gpt_124m(),
            Preset::Gpt350m => Self::gpt_350m(),
            Preset::Gpt1300m => Self::gpt_1300m(),
        }
    }

    fn tiny() -> Self {
        Self {
            data: None,
            tokenizer: TokenizerKind::Bytes,
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
        }
    }

    // Sizes and learning rates are from the table of models in the GPT-3 paper. A step has half a million tokens, or a
    // million for the largest model. Warm-up takes 375 million tokens. 20,000 steps are ten billion tokens.
    fn gpt_124m() -> Self {
        Self {
            tokenizer: TokenizerKind::Gpt2,
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
            ..Self::tiny()
        }
    }

    fn gpt_350m() -> Self {
        Self {
            num_layers: 24,
            num_heads: 16,
            embed_dim: 1024,
            batch: 4,
            accumulation: 128,
            lr: 3e-4,
            min_lr: 3e-5,
            ..Self::gpt_124m()
        }
    }

    fn gpt_1300m() -> Self {
        Self {
            num_layers: 24,
            num_heads: 16,
            embed_dim: 2048,
            context: 2048,
            batch: 1,
            accumulation: 512,
            lr: 2e-4,
            min_lr: 2e-5,
            warmup: 358,
            ..Self::gpt_124m()
        }
    }
}

/// A path in JSON. A Unicode path is a string. Any other path is stored as the raw units of the operating system, so that it
/// is restored exactly.
mod any_path {
    use super::{Deserialize, PathBuf, Serialize};
    use serde::{Deserializer, Serializer};
    use std::ffi::OsString;

    #[derive(Serialize, Deserialize)]
    #[serde(untagged)]
    enum Stored {
        Unicode(String),
        Other(OsString),
    }

    pub fn serialize<S: Serializer>(path: &Option<PathBuf>, serializer: S) -> Result<S::Ok, S::Error> {
        let stored = |path: &PathBuf| match path.to_str() {
            Some(text) => Stored::Unicode(text.to_string()),
            None => Stored::Other(path.clone().into_os_string()),
        };
        path.as_ref().map(stored).serialize(serializer)
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<PathBuf>, D::Error> {
        let path = |stored| match stored {
            Stored::Unicode(text) => text.into(),
            Stored::Other(path) => path.into(),
        };
        Ok(Option::<Stored>::deserialize(deserializer)?.map(path))
    }
}
