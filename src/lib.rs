//! Attention for [Candle](candle_core) that trains: FlashAttention-2, forward and backward.
//!
//! Candle's own fused attention has no backward, and several of its fused operators drop gradients without a word.
//! Here [`Attention::forward`] takes `q`, `k` and `v` to the output in memory that grows with the sequence and not with
//! its square, and `backward()` brings the gradients of all three back the same way.
//!
//! ```
//! use candle_core::{Device, Tensor, Var};
//! use candle_fa2::{Attention, Mask};
//!
//! # fn main() -> candle_core::Result<()> {
//! // (batch, seqlen, num_heads, head_dim); four query heads share each of the two key heads.
//! let q = Var::randn(0f32, 1f32, (2, 128, 8, 64), &Device::Cpu)?;
//! let k = Var::randn(0f32, 1f32, (2, 128, 2, 64), &Device::Cpu)?;
//! let v = Var::randn(0f32, 1f32, (2, 128, 2, 64), &Device::Cpu)?;
//!
//! let o = Attention::new().mask(Mask::Causal).forward(&q, &k, &v)?;
//! let grads = o.sqr()?.mean_all()?.backward()?;
//! assert_eq!(grads.get(&k).unwrap().dims(), k.dims());
//! # Ok(())
//! # }
//! ```
//!
//! # What to call
//!
//! | you have | you call |
//! | --- | --- |
//! | a batch of equal lengths, `(batch, seqlen, num_heads, head_dim)` | [`Attention::forward`] |
//! | a batch of equal lengths, `(batch, num_heads, seqlen, head_dim)` | [`Attention::layout`], then [`Attention::forward`] |
//! | sequences of different lengths, laid end to end | [`CuSeqlens`], then [`Attention::forward_packed`] |
//! | a padded batch and its padding mask | [`CuSeqlens::from_mask`], [`CuSeqlens::unpad`], [`Attention::forward_packed`], [`CuSeqlens::pad_to`] |
//! | a causal batch padded on the right | [`Mask::Causal`] and [`Attention::forward`]; leave the padding out of the loss |
//! | a KV cache filled to different lengths, a batch padded on the left, or padding without a mask (BERT) | [`KeyLengths`], [`Attention::key_lengths`], then [`Attention::forward`] |
//! | keys that are split into parts (ring attention) | [`Attention::forward_partial`] for each, with the mask of that part, then [`Attention::merge`] |
//! | a model to build or to load | [`layers`] |
//! | a question, not a computation | [`Attention::supports`] |
//!
//! # Masks
//!
//! [`Mask`] lines up the last query with the last key. A causal mask over 3 queries and 5 keys, and a window that lets
//! each query see its aligned key and one before:
//!
//! ```text
//!      Mask::Causal        Mask::Window { left: Some(1), right: Some(0) }
//!      k0 k1 k2 k3 k4      k0 k1 k2 k3 k4
//! q0    x  x  x  .  .       .  x  x  .  .
//! q1    x  x  x  x  .       .  .  x  x  .
//! q2    x  x  x  x  x       .  .  .  x  x
//! ```
//!
//! Tiles of scores that the mask hides are not computed: time falls with what is visible. A row that sees nothing gives
//! 0, and its gradients are 0.
//!
//! # Gradients
//!
//! The forward keeps the log-sum-exp of each row of scores inside the operator (on the CPU in two parts, the largest score
//! and the rest, exact for scores of any size); the backward recomputes the probabilities from it, tile by tile. Calling
//! `backward()` again gives the same gradients again. A tensor that is tracked for gradients where none is offered (ALiBi
//! slopes, a cache for decoding) is refused instead of being cut off silently.
//!
//! # How a call is computed
//!
//! Three values, each of which can be printed (`CANDLE_FA2_LOG=plan` does, once per distinct call): the options become a
//! checked problem, the only place that refuses a shape; problem and device become a plan, the only place that refuses a
//! device; the plan is run. On the CPU a forward task owns a tile of queries and a backward task a tile of keys; threads
//! take tasks of any sequence and head, so that one long sequence keeps all cores busy. The order of every sum is fixed,
//! and the same inputs give the same bits on any number of threads. On a GPU the tasks are thread blocks, and only the
//! gradient of q is summed in the order in which they come, unless [`Attention::deterministic`] has them take turns.
//!
//! # Features
//!
//! | feature | default | what it does |
//! | --- | --- | --- |
//! | `cuda` | off | NVIDIA GPUs (Ampere and newer): f16 and bf16, `head_dim` a multiple of 8 up to 256 |
//!
//! Vector instructions (AVX2, AVX-512, NEON) are chosen at run time; no compiler flags are needed.
#![deny(missing_docs)]

mod attention;
mod cpu;
#[cfg(feature = "cuda")]
mod cuda;
mod device;
mod environment;
mod error;
mod instances;
pub mod layers;
mod layout;
mod mask;
mod merge;
mod op;
mod options;
mod output;
mod packed;
mod padding;
mod plan;
mod problem;
mod tensors;
#[doc(hidden)]
pub mod testing;

pub use attention::Attention;
pub use error::{Error, Result};
pub use layout::{PaddingSide, TensorLayout};
pub use mask::Mask;
pub use packed::CuSeqlens;
pub use padding::KeyLengths;

/// Compiles and runs the README's Rust examples with the other doc tests.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
