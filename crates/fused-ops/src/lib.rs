//! Fused operators for [Candle](https://github.com/huggingface/candle) that train.
//!
//! Candle's own fused norms drop gradients without an error, and its losses and its AdamW are dozens of passes over memory. Each
//! operator here is one node of Candle's graph with a hand-written backward.
//!
//! ```
//! use candle_core::{DType, Device, Tensor, Var};
//! use candle_fused_ops::layer_norm;
//!
//! let x = Var::randn(0f32, 1f32, (2, 3, 8), &Device::Cpu)?;
//! let weight = Tensor::ones(8, DType::F32, &Device::Cpu)?;
//! let y = layer_norm(&x, &weight, None, 1e-5)?;
//! assert!(y.sqr()?.sum_all()?.backward()?.get(&x).is_some());
//! # Ok::<(), candle_core::Error>(())
//! ```
//!
//! | operator | function | module |
//! | --- | --- | --- |
//! | layer norm | [`layer_norm`], with a residual [`add_layer_norm`] | [`LayerNorm`] |
//! | RMS norm | [`rms_norm`], with a residual [`add_rms_norm`] | [`RmsNorm`] |
//! | embedding | [`embedding`] | |
//! | rotary position embedding | [`rotary`], for inference [`rotary_in_place`] | |
//! | activations | [`gelu`], [`gelu_erf`], [`swiglu`], [`geglu`] | |
//! | linear layer | [`linear`], with GELU [`linear_gelu`], with a residual [`linear_add`] | |
//! | rows with more or fewer columns | [`resize_columns`] | |
//! | MLP of a transformer | [`mlp_add`] | |
//! | a part of a model whose activations are not kept | [`checkpoint`] | |
//! | cross-entropy | [`cross_entropy`], with options [`CrossEntropy::forward`] | |
//! | cross-entropy of a linear layer | [`linear_cross_entropy`], with options [`CrossEntropy::forward_linear`] | |
//!
//! [`AdamW`] updates parameters with f32 master weights and clipping. Its [`save`](AdamW::save) writes everything that training needs to
//! go on. [`mean_gradients`] adds up the gradients of several batches. [`Schedule`] gives the learning rate of each step.
//! [`profile`] measures the time of each operator in a training step, and [`pool`] the memory of a GPU. [`apply_op1`] and
//! [`apply_op3`] make a custom operator of yours a node like the operators here.
//!
//! # What holds for every operator
//!
//! - **Types.** f16, bf16, f32, f64. Sums are in f32, and in f64 for f64 tensors. Each result and each gradient is rounded once.
//! - **Gradients.** Every float input gets its gradient. What a backward needs stays in the graph, so a second `backward()` on one
//!   graph gives the same gradients. [`backward_once`] instead frees each operator as soon as its backward has run. There are no second
//!   derivatives.
//! - **Strides.** A tensor that is not contiguous is first copied by Candle.
//! - **Order of sums.** It depends on the shapes. In the backward of [`embedding`] it also depends on the ids. On a GPU it also depends on
//!   the number of multiprocessors. So on the CPU, results have the same bits for any number of threads, and on one GPU for any number of
//!   calls. [`measure_products`] says when a linear layer on a GPU has the same bits in every process.
//! - **Devices.** On the CPU the operators are fused. With the feature `cuda` they have kernels of their own for f16, bf16 and f32, and
//!   linear layers run on cuBLASLt. Everything else is composed of Candle's differentiable operators (module [`composed`]): the
//!   gradients are right, but the speed is Candle's.
//! - **Threads.** Candle gives each thread a stream of its own on a GPU, and does not order them. Before another thread uses a result,
//!   call `Device::synchronize`. That holds for Candle's operators too.
//! - **Graph.** Candle adds every gradient to a tensor of zeros first. Between two operators of this crate that does not happen.
//! - **Errors.** All arguments are checked first. An error names the argument, the rule, the value and the way out.

#![deny(missing_docs)]

mod accumulate;
mod activation;
mod adamw;
mod check;
mod checkpoint;
mod columns;
pub mod composed;
#[cfg(feature = "cuda")]
mod cuda;
mod custom;
mod embedding;
mod layers;
mod linear;
mod loss;
mod node;
mod norm;
mod number;
pub mod pool;
pub mod profile;
mod rotary;
mod rows;
mod schedule;

pub use accumulate::mean_gradients;
pub use activation::{geglu, gelu, gelu_erf, swiglu};
pub use adamw::{AdamW, AdamWConfig, ParameterGroup};
pub use checkpoint::checkpoint;
pub use columns::resize_columns;
pub use custom::{apply_op1, apply_op3};
pub use embedding::embedding;
pub use layers::{LayerNorm, RmsNorm};
pub use linear::{linear, linear_add, linear_gelu, measure_products, mlp_add};
pub use loss::{cross_entropy, linear_cross_entropy, CrossEntropy};
pub use node::backward_once;
#[doc(hidden)]
pub use node::testing;
pub use norm::{add_layer_norm, add_rms_norm, layer_norm, rms_norm};
pub use rotary::{rotary, rotary_in_place, RotaryOrder};
pub use schedule::Schedule;
