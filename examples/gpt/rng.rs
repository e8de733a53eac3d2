//! The only source of randomness. It is seeded, and every checkpoint stores its state.
//!
//! Candle's `randn` has no seed on a CPU. So this module draws the initial weights, the order of the batches, and the samples.

use rand::seq::SliceRandom;
use rand::{Rng as _, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rand_distr::{Distribution, StandardNormal};
use serde::{Deserialize, Serialize};

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Rng(ChaCha8Rng);

impl Rng {
    pub fn new(seed: u64) -> Self {
        Self(ChaCha8Rng::seed_from_u64(seed))
    }

    /// `count` draws from a normal distribution of mean 0 and standard deviation `std`.
    pub fn normal(&mut self, count: usize, std: f32) -> Vec<f32> {
        (0..count).map(|_| std * Distribution::<f32>::sample(&StandardNormal, &mut self.0)).collect()
    }

    /// Uniform in [0, 1).
    pub fn uniform(&mut self) -> f32 {
        self.0.random()
    }

    /// A seed for another generator.
    pub fn seed(&mut self) -> u64 {
        self.0.random()
    }

    /// Uniform in 0..bound.
    pub fn below(&mut self, bound: usize) -> usize {
        self.0.random_range(0..bound as u64) as usize
    }

    pub fn shuffle<T>(&mut self, items: &mut [T]) {
        items.shuffle(&mut self.0)
    }
}
