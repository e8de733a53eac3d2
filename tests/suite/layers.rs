//! The multi-head attention layer against the same layer written with Candle's own differentiable operators.

mod case;
mod close;
mod decoding;
mod errors;
mod gradients;
mod outcome;
mod packed;
mod rotary;
mod unfused;
mod weights;
