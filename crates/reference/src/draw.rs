//! Random inputs. The same name gives the same numbers on every machine.

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rand_distr::StandardNormal;
use sha2::{Digest, Sha256};

use crate::precision::Precision;

/// A generator with the name as its seed.
pub fn generator(name: &str) -> ChaCha8Rng {
    ChaCha8Rng::from_seed(Sha256::digest(name).into())
}

/// Standard normal numbers, rounded to `precision`.
pub fn normal(generator: &mut impl Rng, precision: Precision, count: usize) -> Vec<f64> {
    (0..count).map(|_| precision.round(generator.sample(StandardNormal))).collect()
}
