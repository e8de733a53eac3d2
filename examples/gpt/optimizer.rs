//! AdamW, the learning-rate schedule and gradient clipping.
//!
//! candle_nn's AdamW keeps its moments private. A run must save them to be resumed, so this module has its own AdamW.
//! Weights and moments are always f32, also if the model computes in bf16. Nothing here waits for a GPU.

use crate::config::Config;
use crate::parameters::Flat;
use anyhow::Result;
use candle_core::Tensor;
use std::f64::consts::PI;

/// Keeps the division finite if a gradient has always been zero.
const EPSILON: f64 = 1e-8;

/// Replaces a learning rate of 0 as a divisor; the change of a weight is then nearly 0. The inverse of 0 is infinite, and
/// infinity times a `v` of 0 is NaN.
const LEAST_RATE: f64 = 1e-30;

/// Number of partial sums of a sum over a whole tensor. Candle uses one thread block per sum, and a single block leaves most
/// of a GPU idle.
const PARTIAL_SUMS: usize = 1024;

pub struct AdamW {
    pub m: Flat, // running mean of the gradient
    pub v: Flat, // running mean of its square
}

impl AdamW {
    pub fn new(parameters: &Flat) -> Result<Self> {
        Ok(Self { m: parameters.zeros_like()?, v: parameters.zeros_like()? })
    }

    /// Updates all `parameters` with `factor` times `gradient`. `step` counts from 1.
    ///
    /// ```text
    /// m = beta1 m + (1 - beta1) g                 v = beta2 v + (1 - beta2) g^2
    /// w = (1 - lr decay) w - lr (m / c1) / (sqrt(v / c2) + epsilon)         c = 1 - beta^step, the moments start at zero
    /// ```
    pub fn update(
        &mut self,
        parameters: &mut Flat,
        gradient: &Flat,
        factor: &Tensor, // f32 ()
        config: &Config,
        step: usize,
        lr: f64,
    ) -> Result<()> {
        let Config { beta1, beta2, .. } = *config;
        let c1 = 1.0 - beta1.powf(step as f64);
        let c2 = 1.0 - beta2.powf(step as f64);
        let factor = (factor * (1.0 - beta1))?; // f32 (), on the device: reading it would wait for a GPU
        let divisor = lr.max(LEAST_RATE);
        let update = |group: usize, weight_decay: f64| -> candle_core::Result<[Tensor; 3]> {
            let [g, w, m, v] = [gradient, parameters, &self.m, &self.v].map(|flat| flat.groups()[group]);
            let g = g.broadcast_mul(&factor)?; // (1 - beta1) times the gradient
            let m = ((m * beta1)? + &g)?;
            let v = ((v * beta2)? + (g.sqr()? * ((1.0 - beta2) / (1.0 - beta1).powi(2)))?)?;
            // -lr (m / c1) / (sqrt(v / c2) + epsilon). The constants move into the divisor, so one pass applies them.
            let change = (&m / v.sqrt()?.affine(-c1 / (divisor * c2.sqrt()), -c1 * EPSILON / divisor)?)?;
            let w = ((w * (1.0 - lr * weight_decay))? + change)?;
            Ok([w, m, v])
        };
        // Decoupled decay, on matrices only: norms and biases have one axis.
        let [matrices, vectors] = [update(0, config.weight_decay)?, update(1, 0.0)?];
        let [[w0, m0, v0], [w1, m1, v1]] = [matrices, vectors];
        parameters.set_groups([w0, w1]);
        self.m.set_groups([m0, m1]);
        self.v.set_groups([v0, v1]);
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

/// The global norm of `gradient`, and the factor that reduces it to at most `limit`: both f32 ().
pub fn clip(gradient: &Flat, limit: f64) -> Result<(Tensor, Tensor)> {
    let [matrices, vectors] = gradient.groups();
    let norm = (sum_of_squares(matrices)? + sum_of_squares(vectors)?)?.sqrt()?;
    let factor = (norm.recip()? * limit)?.minimum(1.0)?;
    Ok((norm, factor))
}

/// f32 (n) -> f32 ()
fn sum_of_squares(x: &Tensor) -> candle_core::Result<Tensor> {
    let rows = gcd(x.elem_count(), PARTIAL_SUMS);
    x.sqr()?.reshape((rows, x.elem_count() / rows))?.sum(1)?.sum_all()
}

fn gcd(a: usize, b: usize) -> usize {
    match b {
        0 => a,
        b => gcd(b, a % b),
    }
}
