//! FlashAttention-2 for Candle.
#![deny(missing_docs)]

mod attention;
mod cpu;
mod error;
pub mod layers;
mod mask;
mod op;
mod packed;
mod plan;
mod problem;
#[doc(hidden)]
pub mod testing;

pub use attention::Attention;
pub use error::{Error, Result};
pub use mask::Mask;
pub use packed::CuSeqlens;
