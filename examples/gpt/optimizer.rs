//! AdamW, the learning-rate schedule and gradient clipping.
//!
//! candle_nn's AdamW keeps its moments private, and a run that cannot save them cannot be resumed; hence this one.
//! Weights and moments are f32, whatever type the model computes in.

use crate::config::Config;
use crate::model::Parameters;
use anyhow::Result;
use candle_core::{DType, Tensor};
use std::collections::BTreeMap;
use std::f64::consts::PI;

/// Keeps the division finite where a gradient has always been zero.
const EPSILON: f64 = 1e-8;

/// Tensors by the name of their parameter. Sorted, so that sums over parameters always run in one order.
pub type Named = BTreeMap<String, Tensor>;

pub struct AdamW {
    pub m: Named, // running mean of the gradient
    pub v: Named, // running mean of its square
}

impl AdamW {
    pub fn new(parameters: &Parameters) -> Result<Self> {
        let zeros =
            || parameters.iter().map(|(name, var)| Ok((name.clone(), var.zeros_like()?))).collect::<Result<_>>();
        Ok(Self { m: zeros()?, v: zeros()? })
    }

    /// One update of all `parameters`; `step` counts from 1.
    pub fn update(
        &mut self,
        parameters: &Parameters,
        gradients: &Named,
        config: &Config,
        step: usize,
        lr: f64,
    ) -> Result<()> {
        let Config { beta1, beta2, .. } = *config;
        // The moments start at zero; dividing by these makes them unbiased.
        let correction1 = 1.0 - beta1.powf(step as f64);
        let correction2 = 1.0 - beta2.powf(step as f64);
        for (name, var) in parameters {
            let gradient = &gradients[name];
            let m = ((&self.m[name] * beta1)? + (gradient * (1.0 - beta1))?)?;
            let v = ((&self.v[name] * beta2)? + (gradient.sqr()? * (1.0 - beta2))?)?;
            let direction = ((&m / correction1)? / ((&v / correction2)?.sqrt()? + EPSILON)?)?;
            // Decoupled decay, on matrices only: norms and biases have one axis.
            let decay = if var.rank() >= 2 { lr * config.weight_decay } else { 0.0 };
            var.set(&((var.as_tensor() * (1.0 - decay))? - (direction * lr)?)?)?;
            self.m.insert(name.clone(), m);
            self.v.insert(name.clone(), v);
        }
        Ok(())
    }
}

/// Learning rate of `step` (from 1): linear warm-up to `lr`, then half a cosine that ends at `min_lr` in the last step.
pub fn learning_rate(config: &Config, step: usize) -> f64 {
    if step <= config.warmup {
        return config.lr * step as f64 / config.warmup as f64;
    }
    let progress = (step - config.warmup) as f64 / (config.steps - config.warmup) as f64;
    config.min_lr + (config.lr - config.min_lr) * 0.5 * (1.0 + (PI * progress.min(1.0)).cos())
}

/// Scales `gradients` so that their global norm is at most `limit`, and returns the norm they had.
pub fn clip(gradients: &mut Named, limit: f64) -> Result<f32> {
    let squares = gradients.values().map(|g| g.sqr()?.sum_all()).collect::<candle_core::Result<Vec<_>>>()?;
    let norm = Tensor::stack(&squares, 0)?.to_dtype(DType::F64)?.sum_all()?.to_scalar::<f64>()?.sqrt();
    if norm > limit {
        for gradient in gradients.values_mut() {
            *gradient = (&*gradient * (limit / norm))?;
        }
    }
    Ok(norm as f32)
}
