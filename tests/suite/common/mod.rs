//! What every test stands on: the cases, the operator under test, and the asserts. The crate `attention_reference` decides
//! what is right, and how near is near enough.

pub mod cases;
pub mod compare;
pub mod nonfinite;
mod rule;
pub mod run;

pub use attention_reference as reference;
