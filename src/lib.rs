//! FlashAttention-2 for [Candle](candle_core): attention in one operator that trains, on the CPU and on NVIDIA GPUs.
//!
//! [`Attention::forward`] computes attention, and `backward()` computes the gradients of `q`, `k` and `v`. The memory of both
//! grows with the length of the sequences, not with its square. Candle's own fused attention has no backward, and several of its
//! fused operators drop gradients without an error.
//!
//! ```
//! use candle_core::{Device, Tensor, Var};
//! use candle_fa2::{Attention, Mask};
//!
//! # fn main() -> candle_core::Result<()> {
//! // (batch, seqlen, num_heads, head_dim); 4 query heads share each key head.
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
//! | sequences of different lengths, end to end | [`CuSeqlens`], then [`Attention::forward_packed`] |
//! | a padded batch and its padding mask | [`CuSeqlens::from_mask`], [`CuSeqlens::unpad`], [`Attention::forward_packed`], [`CuSeqlens::pad_to`] |
//! | a causal batch padded on the right | [`Mask::Causal`] and [`Attention::forward`]; leave the padding out of the loss |
//! | a KV cache filled to different lengths, a batch padded on the left, or padding without a mask (BERT) | [`KeyLengths`], [`Attention::key_lengths`], then [`Attention::forward`] |
//! | keys that are split into parts (ring attention) | [`Attention::forward_partial`] for each, with the mask of that part, then [`Attention::merge`] |
//! | a model to build or to load | [`layers`] |
//! | a call to check without computing it | [`Attention::supports`] |
//!
//! # Masks
//!
//! [`Mask`] aligns the last query with the last key. Examples for 3 queries and 5 keys: a causal mask, and a window in which each
//! query sees its aligned key and the key before it.
//!
//! ```text
//!      Mask::Causal        Mask::Window { left: Some(1), right: Some(0) }
//!      k0 k1 k2 k3 k4      k0 k1 k2 k3 k4
//! q0    x  x  x  .  .       .  x  x  .  .
//! q1    x  x  x  x  .       .  .  x  x  .
//! q2    x  x  x  x  x       .  .  .  x  x
//! ```
//!
//! Score tiles that the mask hides are not computed, so time depends on the number of visible tiles. If a row sees no key, its
//! output is 0 and its gradients are 0.
//!
//! # Gradients
//!
//! The operator keeps the log-sum-exp of each row of scores, and the backward recomputes the weights from it, tile by tile.
//! On the CPU the log-sum-exp is kept in two parts, which are exact for scores of any size. `backward()` may be called several
//! times and gives the same gradients.
//!
//! ALiBi slopes and a KV cache have no gradient. If such a tensor is tracked, the call returns an error and does not drop the
//! gradient silently.
//!
//! # NaN and infinity
//!
//! In the forward, a NaN or an infinity changes only rows that see it. The same is true of the backward on the CPU. In the
//! backward on a GPU, it can make all gradients NaN of its sequence and its group of heads (a key head with its query heads). It
//! never leaves them, and a gradient that must be NaN never becomes a number.
//!
//! # Errors
//!
//! A call that breaks a rule returns an [`Error`] before anything is computed. Its text names the tensor, the rule, the value and
//! the way out. The layers have errors of their own, [`layers::Error`]. `?` turns both into Candle's error.
//!
//! # How a call is computed
//!
//! A call has three steps:
//!
//! 1. The tensors and options are checked and become a problem. Only this step refuses a shape.
//! 2. The problem and the device's capabilities become a plan. Only this step refuses a device.
//! 3. The plan runs.
//!
//! `CANDLE_FA2_LOG=plan` prints each distinct problem and its plan once.
//!
//! On the CPU, a forward task computes a query tile, and a backward task computes a key tile. Threads take tasks of any sequence
//! and head, so one long sequence keeps all cores busy. The order of every sum is fixed, so the same inputs give the same bits
//! on any number of threads. A call of few queries sums in another order if no input is tracked for gradients. So its `o` can
//! differ in the last bits from that of a tracked call.
//!
//! On a GPU, thread blocks compute the tiles. Only the gradient of `q` is summed in any order. With
//! [`Attention::deterministic`], semaphores fix this order too.
//!
//! # Features
//!
//! | feature | default | effect |
//! | --- | --- | --- |
//! | `cuda` | off | NVIDIA GPUs (Ampere and newer): f32, f16 and bf16, `head_dim` up to 512 |
//!
//! Vector instructions (AVX2, AVX-512, NEON) are chosen at run time. No compiler flags are needed.
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
