//! The trained state, and one training step. Training and `gpt time` use the same step.

use crate::config::Config;
use crate::model::Gpt;
use crate::optimizer::{clip, learning_rate, AdamW};
use crate::parameters::{Flat, Named};
use crate::profile;
use anyhow::{anyhow, Result};
use candle_core::Tensor;

/// Tokens and their targets: u32, both (batch, context).
pub type Batch = (Tensor, Tensor);

pub struct Learner {
    pub parameters: Flat, // f32
    pub optimizer: AdamW,
}

/// The result of a step. A GPU may still be computing it, so [`Outcome::read`] waits.
pub struct Outcome {
    pub step: usize,
    pub lr: f64,
    train_loss: Tensor, // f32 (), on the batches of the step, before its update
    grad_norm: Tensor,  // f32 (), before clipping
}

/// (train_loss, grad_norm)
pub type Numbers = (f32, f32);

impl Outcome {
    /// Waits once for all `outcomes` and returns their numbers. If one is not finite, returns the numbers before it, and the
    /// error.
    pub fn read(outcomes: &[Self]) -> Result<(Vec<Numbers>, Result<()>)> {
        if outcomes.is_empty() {
            return Ok((Vec::new(), Ok(())));
        }
        let scalars: Vec<&Tensor> =
            outcomes.iter().flat_map(|outcome| [&outcome.train_loss, &outcome.grad_norm]).collect();
        let numbers = Tensor::stack(&scalars, 0)?.to_vec1::<f32>()?;
        let mut pairs: Vec<Numbers> = numbers.chunks_exact(2).map(|pair| (pair[0], pair[1])).collect();
        let Some(first) = pairs.iter().position(|(loss, norm)| !loss.is_finite() || !norm.is_finite()) else {
            return Ok((pairs, Ok(())));
        };
        let (train_loss, grad_norm) = pairs[first];
        pairs.truncate(first);
        let what = format!("the loss is {train_loss} and the norm of its gradient {grad_norm}");
        Ok((pairs, Err(diverged(outcomes[first].step, &what))))
    }
}

/// The error of a step with a non-finite number. `what` names the number.
pub fn diverged(step: usize, what: &str) -> anyhow::Error {
    anyhow!("step {step}: {what}; the last checkpoint is older; a smaller --lr or a longer --warmup may help")
}

impl Learner {
    pub fn new(parameters: Flat) -> Result<Self> {
        let optimizer = AdamW::new(&parameters)?;
        Ok(Self { parameters, optimizer })
    }

    /// The current parameters, in the type that the model computes in.
    pub fn weights(&self, config: &Config) -> Result<Named> {
        self.parameters.to_dtype(config.precision.dtype())?.named()
    }

    /// One optimizer step on the mean loss over `batches`. `step` counts from 1.
    pub fn step(&mut self, config: &Config, step: usize, batches: &[Batch]) -> Result<Outcome> {
        profile::phase("weights")?;
        let model = Gpt::new(config, &self.weights(config)?)?;
        let (train_loss, gradients) = mean_gradients(&model, batches)?;
        profile::phase("optimizer")?;
        let gradient = self.parameters.gradient(gradients)?;
        #[cfg(test)]
        crate::tests::abort_at("inside", std::path::Path::new("a step"));
        let (grad_norm, factor) = clip(&gradient, config.clip)?;
        let lr = learning_rate(config, step);
        self.optimizer.update(&mut self.parameters, &gradient, &factor, config, step, lr)?;
        Ok(Outcome { step, lr, train_loss, grad_norm })
    }
}

/// Mean loss over `batches`, and its gradient for each parameter: f32.
pub fn mean_gradients(model: &Gpt, batches: &[Batch]) -> Result<(Tensor, Named)> {
    let mut losses = Vec::new();
    for (tokens, targets) in batches {
        let loss = (model.loss(tokens, targets)? / batches.len() as f64)?;
        profile::phase("backward")?;
        loss.backward()?;
        losses.push(loss.detach());
    }
    Ok((Tensor::stack(&losses, 0)?.sum_all()?, model.take_gradients()))
}
