//! The operators against f64 formulas, finite differences and each other.
//!
//! `operators.rs` lists all operators. The modules `against_reference`, `gradients` and `properties` put every one of them through
//! the same tests.

mod adamw;
mod against_reference;
mod close;
#[cfg(feature = "cuda")]
mod cuda;
#[cfg(feature = "cuda")]
mod cuda_against_cpu;
mod errors;
mod gradient_sums;
mod gradients;
mod layers;
#[cfg(feature = "cuda")]
mod linear_cuda;
mod loss;
mod nonfinite;
mod operators;
mod properties;
mod reference;
mod run;
