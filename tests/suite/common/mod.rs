//! Shared by all tests: the cases, the operator under test, and the asserts. The crate `attention_reference` has the
//! right answers and the limits.

pub mod cases;
pub mod compare;
pub mod nonfinite;
mod rule;
pub mod run;

pub use attention_reference as reference;
