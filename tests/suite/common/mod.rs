//! Shared by all tests: the cases, the operator under test, and the asserts. The crate `attention_reference` computes the
//! expected values and the tolerances.

pub mod cases;
pub mod compare;
pub mod nonfinite;
mod rule;
pub mod run;

pub use attention_reference as reference;
