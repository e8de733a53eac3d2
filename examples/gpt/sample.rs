//! What a trained model is for: text drawn from it, and its loss on a text.

use crate::checkpoint::{self, Checkpoint};
use crate::config::{name_of, AttentionKind, Precision};
use crate::data::{way_to_text, window_starts, Corpus, Text};
use crate::model::Gpt;
use crate::rng::Rng;
use crate::tokenizer::Tokenizer;
use crate::train::mean_loss;
use anyhow::{bail, Result};
use candle_core::Device;
use std::path::{Path, PathBuf};

#[derive(Clone, Debug)]
pub struct Sampling {
    pub tokens: usize,
    pub temperature: f64, // 0: always the likeliest token
    pub top_k: usize,
}

impl Default for Sampling {
    fn default() -> Self {
        Self { tokens: 500, temperature: 0.8, top_k: 50 }
    }
}

/// Continues `prompt` by `sampling.tokens` tokens, which are returned without it. The model may know more tokens than
/// the tokenizer's `vocab_size`, which mean nothing.
pub fn generate(
    model: &Gpt,
    vocab_size: usize,
    prompt: &[u32],
    sampling: &Sampling,
    rng: &mut Rng,
) -> Result<Vec<u32>> {
    let mut tokens = prompt.to_vec();
    for _ in 0..sampling.tokens {
        // Positions are learned up to `context`: older tokens are out of sight.
        let seen = &tokens[tokens.len().saturating_sub(model.config().context)..];
        tokens.push(draw(&model.next_token(seen)?[..vocab_size], sampling, rng));
    }
    Ok(tokens.split_off(prompt.len()))
}

/// A token drawn from softmax(logits / temperature) over the `top_k` likeliest.
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
    order[order.len() - 1] as u32 // rounding may leave a little
}

/// A trained model, ready to be asked.
pub struct Trained {
    pub model: Gpt,
    pub tokenizer: Tokenizer,
    dir: PathBuf,
    text_name: String,
    text_sha256: String,
}

impl Trained {
    /// The model of the run or checkpoint file `path`; `attention` replaces the one it was trained with by
    /// another that computes the same.
    pub fn load(path: &Path, attention: Option<AttentionKind>, device: &Device) -> Result<Self> {
        let file = checkpoint::locate(path)?;
        let Checkpoint { state, learner } = checkpoint::load(&file, device)?;
        let mut config = state.config;
        let (trained, asked) = (config.attention, attention.unwrap_or(config.attention));
        // The other kinds compute the same; without attention it is another function.
        if (trained == AttentionKind::None) != (asked == AttentionKind::None) {
            bail!(
                "--attention {} is not what {} was trained with, {}: to leave attention out makes another model; leave \
                 the option out instead",
                name_of(asked),
                file.display(),
                name_of(trained),
            );
        }
        config.attention = asked;
        if device.is_cpu() {
            config.precision = Precision::F32; // faster there; the weights are f32 anyway
        }
        Ok(Self {
            tokenizer: Tokenizer::new(config.tokenizer),
            model: Gpt::frozen(&config, &learner.parameters.named()?)?,
            dir: file.parent().unwrap_or(Path::new("")).to_owned(),
            text_name: state.text_name,
            text_sha256: state.text_sha256,
        })
    }

    /// The prompt and what the model makes of it.
    pub fn sample(&self, prompt: &str, sampling: &Sampling, rng: &mut Rng) -> Result<String> {
        let prompt = self.tokenizer.encode(prompt.as_bytes(), "--prompt")?;
        if prompt.is_empty() {
            bail!("--prompt is empty; give at least one character to continue");
        }
        let continuation = generate(&self.model, self.tokenizer.vocab_size(), &prompt, sampling, rng)?;
        Ok(String::from_utf8_lossy(&self.tokenizer.decode(&[prompt, continuation].concat())?).into_owned())
    }

    /// Loss on all held-out windows of the text the model was trained on, or on all of another text.
    pub fn evaluate(&self, data: Option<&Path>) -> Result<Evaluation> {
        let config = self.model.config();
        let text = Text::read(data.or(config.data.as_deref()))?;
        let same = text.sha256 == self.text_sha256;
        if !same && data.is_none() {
            bail!(
                "{} is no longer the text that the model was trained on (SHA-256 {} then, {} now); {}",
                self.text_name,
                &self.text_sha256[..12],
                &text.sha256[..12],
                way_to_text(&self.dir),
            );
        }
        let (name, tokens) = if same {
            let corpus = Corpus::new(text, &self.tokenizer, config.context)?;
            (format!("the held-out part of {}", corpus.name), corpus.held_out)
        } else {
            let tokens = self.tokenizer.encode(&text.bytes, &text.name)?;
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
        // A token may stand for several bytes; bits per byte compares models of different vocabularies.
        let bytes_per_token = self.tokenizer.decode(&tokens)?.len() as f64 / tokens.len() as f64;
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
