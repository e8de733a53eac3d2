//! What learns, and one step of it: the same for a run and for a measurement.

use crate::config::Config;
use crate::model::{Gpt, Parameters};
use crate::optimizer::{clip, learning_rate, AdamW, Named};
use crate::profile;
use anyhow::{bail, Result};
use candle_core::Tensor;

/// Tokens and their targets: u32, both (batch, context).
pub type Batch = (Tensor, Tensor);

pub struct Learner {
    pub parameters: Parameters,
    pub model: Gpt, // over the parameters
    pub optimizer: AdamW,
}

/// What a step says of itself.
pub struct Outcome {
    pub train_loss: f32, // of the step's batches, before its update
    pub grad_norm: f32,  // before clipping
    pub lr: f64,
}

impl Learner {
    pub fn new(config: &Config, parameters: Parameters, optimizer: AdamW) -> Self {
        let model = Gpt::new(config, &parameters);
        Self { parameters, model, optimizer }
    }

    /// One optimizer step on the mean loss over `batches`; `step` counts from 1.
    pub fn step(&mut self, config: &Config, step: usize, batches: &[Batch]) -> Result<Outcome> {
        let (train_loss, mut gradients) = self.gradients(batches)?;
        profile::phase("optimizer")?;
        let grad_norm = clip(&mut gradients, config.clip)?;
        if !train_loss.is_finite() || !grad_norm.is_finite() {
            bail!(
                "step {step}: the loss is {train_loss} and the norm of its gradient {grad_norm}; the last checkpoint is \
                 from before; a smaller --lr or a longer --warmup may help"
            );
        }
        #[cfg(test)]
        crate::tests::abort_at("inside", std::path::Path::new("a step"));
        let lr = learning_rate(config, step);
        self.optimizer.update(&self.parameters, &gradients, config, step, lr)?;
        Ok(Outcome { train_loss, grad_norm, lr })
    }

    /// Mean loss over `batches`, and its gradient.
    fn gradients(&self, batches: &[Batch]) -> Result<(f32, Named)> {
        let mut train_loss = 0.0;
        let mut gradients = Named::new();
        for (tokens, targets) in batches {
            let loss = (self.model.loss(tokens, targets)? / batches.len() as f64)?;
            profile::phase("backward")?;
            let mut store = loss.backward()?;
            for (name, var) in &self.parameters {
                let Some(gradient) = store.remove(var) else { bail!("parameter {name} received no gradient") };
                // Candle's gradients remember what they were computed from, and would keep this whole pass alive.
                let gradient = gradient.detach();
                let sum = match gradients.remove(name) {
                    Some(before) => (before + gradient)?,
                    None => gradient,
                };
                gradients.insert(name.clone(), sum);
            }
            train_loss += loss.to_scalar::<f32>()?;
        }
        Ok((train_loss, gradients))
    }
}
