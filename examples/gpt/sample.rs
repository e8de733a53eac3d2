//! Uses of a trained model: text sampled from it, and its loss on a text.

use crate::checkpoint::{self, Checkpoint};
use crate::cli::{positive, zero_or_above};
use crate::config::{Config, Precision};
use crate::data::{window_starts, Corpus, Text};
use crate::model::Gpt;
use crate::rng::Rng;
use crate::train::mean_loss;
use anyhow::{bail, Result};
use candle_core::Device;
use clap::Args;
use std::path::{Path, PathBuf};

#[derive(Args, Clone, Debug)]
pub struct Sampling {
    /// Number of tokens to write
    #[arg(long, value_name = "N", default_value_t = Self::default().tokens, value_parser = positive)]
    pub tokens: usize,
    /// Lower values make unlikely tokens rarer; 0 always takes the most likely token
    #[arg(long, value_name = "T", default_value_t = Self::default().temperature, value_parser = zero_or_above)]
    pub temperature: f64,
    /// Draw from the K most likely tokens
    #[arg(long, value_name = "K", default_value_t = Self::default().top_k, value_parser = positive)]
    pub top_k: usize,
}

impl Default for Sampling {
    fn default() -> Self {
        Self { tokens: 500, temperature: 0.8, top_k: 50 }
    }
}

/// The prompt and the model's continuation of it.
pub fn sample(model: &Gpt, prompt: &str, sampling: &Sampling, rng: &mut Rng) -> Result<String> {
    let Config { tokenizer, context, .. } = *model.config();
    let mut tokens = tokenizer.encode(prompt.as_bytes(), "--prompt")?;
    if tokens.is_empty() {
        bail!("--prompt is empty; give at least one character to continue");
    }
    for _ in 0..sampling.tokens {
        // The model has `context` learned positions, so it sees only the last `context` tokens.
        let logits = model.next_token(&tokens[tokens.len().saturating_sub(context)..])?;
        // The model may have more tokens than the tokenizer. These are padding and are never sampled.
        tokens.push(draw(&logits[..tokenizer.vocab_size()], sampling, rng));
    }
    Ok(String::from_utf8_lossy(&tokenizer.decode(&tokens)?).into_owned())
}

/// Draws a token from softmax(logits / temperature) over the `top_k` most likely tokens.
fn draw(logits: &[f32], sampling: &Sampling, rng: &mut Rng) -> u32 {
    let mut order: Vec<usize> = (0..logits.len()).collect();
    order.sort_by(|&a, &b| logits[b].total_cmp(&logits[a])); // stable: ties go to the smaller token
    if sampling.temperature == 0.0 {
        return order[0] as u32;
    }
    order.truncate(sampling.top_k);
    let weight = |&token: &usize| (f64::from(logits[token] - logits[order[0]]) / sampling.temperature).exp();
    let mut left = f64::from(rng.uniform()) * order.iter().map(weight).sum::<f64>();
    for token in &order {
        left -= weight(token);
        if left < 0.0 {
            return *token as u32;
        }
    }
    order[order.len() - 1] as u32 // rounding can leave `left` at 0 or a little above
}

/// A trained model, for sampling and evaluation.
pub struct Trained {
    pub model: Gpt,
    dir: PathBuf,
    text_sha256: String,
}

impl Trained {
    /// Loads the model from `path`, a run's folder or a checkpoint file.
    pub fn load(path: &Path, device: &Device) -> Result<Self> {
        let file = checkpoint::locate(path)?;
        let Checkpoint { state, tensors } = checkpoint::load(&file, device)?;
        let mut config = state.config;
        if device.is_cpu() {
            config.precision = Precision::F32; // faster on a CPU, and the weights are f32 anyway
        }
        Ok(Self {
            model: Gpt::frozen(&config, &tensors)?,
            dir: file.parent().unwrap_or(Path::new("")).to_owned(),
            text_sha256: state.text_sha256,
        })
    }

    /// Loss on the held-out part of the text that the model was trained on, or on all of another text.
    pub fn evaluate(&self, data: Option<&Path>) -> Result<Evaluation> {
        let config = self.model.config();
        let text = Text::of_run(&self.dir, config, data)?;
        if data.is_none() {
            text.check_is(&self.text_sha256)?;
        }
        let (name, tokens) = if text.sha256 == self.text_sha256 {
            let corpus = Corpus::new(text, config.tokenizer, config.context)?;
            (format!("the held-out part of {}", corpus.name), corpus.held_out)
        } else {
            let tokens = config.tokenizer.encode(&text.bytes, &text.name)?;
            (text.name, tokens)
        };
        if tokens.len() <= config.context {
            bail!(
                "{name} is too short for the model's context {}: it has {} tokens and needs {}; give a longer text",
                config.context,
                tokens.len(),
                config.context + 1
            );
        }
        let starts = window_starts(tokens.len(), config.context, 0);
        let loss = f64::from(mean_loss(&self.model, &tokens, &starts)?);
        // A token may have several bytes. Bits per byte compare models with different vocabularies.
        let bytes_per_token = config.tokenizer.decode(&tokens)?.len() as f64 / tokens.len() as f64;
        Ok(Evaluation {
            text: name,
            tokens: starts.len() * config.context,
            loss,
            bits_per_byte: loss / std::f64::consts::LN_2 / bytes_per_token,
        })
    }
}

pub struct Evaluation {
    pub text: String,
    pub tokens: usize,
    pub loss: f64, // nats per token
    pub bits_per_byte: f64,
}

impl std::fmt::Display for Evaluation {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        write!(
            f,
            "loss {:.4} nats per token, perplexity {:.3}, {:.4} bits per byte, on {} tokens of {}",
            self.loss,
            self.loss.exp(),
            self.bits_per_byte,
            self.tokens,
            self.text
        )
    }
}
