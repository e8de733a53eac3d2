//! The right results of attention, and how far an implementation may be from them.
//!
//! | module | content |
//! | --- | --- |
//! | [`mod@attention`] | the formulas, forward and backward, for one query of one head |
//! | [`call`] | a whole call: a batch of sequences, shared key heads, the five results |
//! | [`rounding`] | the error model: how much rounding may change a row |
//! | [`tolerance`] | the rule: how far a row may be from the reference |
//! | [`compare`] | the comparison, and the errors for wrong results |
//! | [`precision`], [`number`], [`double`], [`matrix`] | number types, and rows of numbers |
//! | [`draw`] | random inputs |
//! | [`fixtures`] | files of inputs, answers and limits for programs in other languages |
//!
//! This crate does not depend on candle-fa2 and shares no code with it. The suite of candle-fa2 tests the rule: it must
//! reject results with lost keys, and accept other correct implementations. The suite also compares the gradients with
//! finite differences.

pub mod attention;
pub mod call;
pub mod compare;
pub mod double;
pub mod draw;
pub mod fixtures;
pub mod matrix;
pub mod number;
pub mod precision;
pub mod rounding;
pub mod tolerance;

pub use call::{attention, attention_plain, attention_variant, Input, Output, Rows};
pub use compare::{close, Closeness};
pub use precision::Precision;
pub use tolerance::{tolerances, Tolerance};
