//! The multi-head attention layer, compared with the same layer written with Candle's differentiable operators.

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
