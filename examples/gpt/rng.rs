//! The one source of randomness: seeded, and its state goes into every checkpoint.
//!
//! Candle's CPU `randn` cannot be seeded, so initial weights, the order of the batches and samples are all drawn here.

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

    /// A seed for a generator of its own.
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
