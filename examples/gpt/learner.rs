//! The trained state, and one training step. Training and `gpt time` use the same step.

use crate::config::Config;
use crate::model::{Gpt, Named};
use anyhow::{anyhow, Result};
use candle_core::backprop::GradStore;
use candle_core::{DType, Device, Tensor};
use candle_fused_ops::{measure_products, profile, AdamW, AdamWConfig, ParameterGroup, Schedule};
use std::collections::HashMap;

/// Tokens and their targets: u32, both (batch, context).
pub type Batch = (Tensor, Tensor);

pub struct Learner {
    pub model: Gpt,
    optimizer: AdamW,
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

    /// Continues after `step` with the tensors of [`Self::tensors`].
    pub fn restore(config: &Config, step: usize, tensors: &Named) -> Result<Self> {
        let mut learner = Self::new(config, tensors)?;
        let mut state = HashMap::from([("step".to_string(), Tensor::new(step as i64, &Device::Cpu)?)]);
        for (name, var) in learner.model.variables() {
            state.insert(format!("{name}.m"), tensors[&format!("adam.m.{name}")].clone());
            state.insert(format!("{name}.v"), tensors[&format!("adam.v.{name}")].clone());
            if var.dtype() != DType::F32 {
                state.insert(format!("{name}.master"), tensors[name].clone());
            }
        }
        learner.optimizer.set_state(&state)?;
        Ok(learner)
    }

    /// Everything that a checkpoint stores of it, all in f32: for each parameter `NAME`, `adam.m.NAME` and `adam.v.NAME`.
    pub fn tensors(&self) -> Result<Named> {
        let mut state = self.optimizer.state()?;
        let mut tensors = Named::new();
        for (name, var) in self.model.variables() {
            let mut take = |part: &str| state.remove(&format!("{name}.{part}"));
            let moments = [take("m"), take("v")].map(|moment| moment.expect("AdamW has two moments of each parameter"));
            let [m, v] = moments;
            tensors.insert(format!("adam.m.{name}"), m);
            tensors.insert(format!("adam.v.{name}"), v);
            tensors.insert(name.clone(), take("master").unwrap_or_else(|| var.as_detached_tensor()));
        }
        Ok(tensors)
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

/// Mean loss over `batches`, and its gradient for each parameter. Gradients of several batches are summed in f32.
pub fn mean_gradients(model: &Gpt, batches: &[Batch]) -> Result<(Tensor, GradStore)> {
    let mut losses = Vec::new();
    let mut sum: Option<GradStore> = None;
    for (tokens, targets) in batches {
        let loss = (model.loss(tokens, targets)? / batches.len() as f64)?;
        let mut gradients = loss.backward()?;
        losses.push(loss.detach());
        if let Some(mut before) = sum.take() {
            for var in model.variables().values() {
                if let (Some(before), Some(gradient)) = (before.remove(var), gradients.remove(var)) {
                    gradients.insert(var, (before.to_dtype(DType::F32)? + gradient.to_dtype(DType::F32)?)?);
                }
            }
        }
        sum = Some(gradients);
    }
    let gradients = sum.ok_or_else(|| anyhow!("a step needs at least one batch"))?;
    Ok((Tensor::stack(&losses, 0)?.sum_all()?, gradients))
}
