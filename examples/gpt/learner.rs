//! The trained state, and one training step. Training and `gpt time` use the same step.

use crate::config::Config;
use crate::model::{Gpt, Named};
use anyhow::{anyhow, Result};
use candle_core::backprop::GradStore;
use candle_core::Tensor;
use candle_fused_ops::{measure_products, profile, AdamW, AdamWConfig, ParameterGroup, Schedule};

/// Tokens and their targets: u32, both (batch, context).
pub type Batch = (Tensor, Tensor);

pub struct Learner {
    pub model: Gpt,
    pub optimizer: AdamW,
}

/// The result of a step. A GPU may still be computing it, so [`Outcome::read`] waits.
pub struct Outcome {
    pub step: usize,
    pub lr: f64,
    train_loss: Tensor, // f32 (), on the batches of the step, before its update
    grad_norm: Tensor,  // f32 (), before clipping
}

impl Outcome {
    /// Waits once for all `outcomes` and returns the loss and the norm of each.
    pub fn read(outcomes: &[Self]) -> Result<Vec<(f32, f32)>> {
        let scalars: Vec<&Tensor> =
            outcomes.iter().flat_map(|outcome| [&outcome.train_loss, &outcome.grad_norm]).collect();
        let numbers = Tensor::stack(&scalars, 0)?.to_vec1::<f32>()?;
        Ok(numbers.chunks_exact(2).map(|pair| (pair[0], pair[1])).collect())
    }
}

/// The error of a step with a non-finite number. `what` names the number.
pub fn diverged(step: usize, what: &str) -> anyhow::Error {
    anyhow!("step {step}: {what}; the last checkpoint is older; a smaller --lr or a longer --warmup may help")
}

impl Learner {
    /// Starts with `parameters` and moments of zero.
    pub fn new(config: &Config, parameters: &Named) -> Result<Self> {
        measure_products(!config.deterministic);
        let model = Gpt::new(config, parameters)?;
        let groups = ParameterGroup::decay_matrices_of(model.variables().clone(), config.weight_decay);
        let Config { beta1, beta2, clip, .. } = *config;
        let optimizer =
            AdamW::new(groups, AdamWConfig { beta1, beta2, max_norm: Some(clip), ..AdamWConfig::default() })?;
        Ok(Self { model, optimizer })
    }

    /// Continues with the tensors of a checkpoint.
    pub fn restore(config: &Config, tensors: &Named) -> Result<Self> {
        let mut learner = Self::new(config, tensors)?;
        learner.optimizer.set_state(tensors)?;
        Ok(learner)
    }

    /// The current model without gradients.
    pub fn frozen(&self) -> Result<Gpt> {
        let variables = self.model.variables().iter();
        let parameters = variables.map(|(name, var)| (name.clone(), var.as_detached_tensor())).collect();
        Gpt::frozen(self.model.config(), &parameters)
    }

    /// One optimizer step on the mean loss over `batches`. `step` counts from 1.
    pub fn step(&mut self, step: usize, batches: &[Batch]) -> Result<Outcome> {
        let (train_loss, gradients) = mean_gradients(&self.model, batches)?;
        #[cfg(test)]
        crate::tests::abort_at("inside", std::path::Path::new("a step"));
        let Config { lr, min_lr, steps, warmup, .. } = *self.model.config();
        let lr = Schedule::cosine(lr, min_lr, steps).warmup(warmup).at(step);
        let grad_norm = self.optimizer.step(&gradients, lr)?;
        profile::mark("optimizer")?;
        Ok(Outcome { step, lr, train_loss, grad_norm })
    }
}

/// Mean loss over `batches`, and its gradient for each parameter.
pub fn mean_gradients(model: &Gpt, batches: &[Batch]) -> Result<(Tensor, GradStore)> {
    candle_fused_ops::mean_gradients(model.variables().values(), batches, |(tokens, targets)| {
        model.loss(tokens, targets)
    })
}
