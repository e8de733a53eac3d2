//! Multi-head attention as a layer: projections, rotary embedding, the fused operator, a cache for decoding.
//!
//! [`MultiHeadAttention`] takes `xs` of shape `(batch, seqlen, embed_dim)` and returns the same shape, as Candle's other
//! layers do. It loads the weights of Llama (`q_proj`, `k_proj`, `v_proj`, `o_proj`), GPT-2 (`c_attn`, `c_proj`),
//! GPT-NeoX (`query_key_value`, `dense`) and other models; [`Projections`] has a table. Every weight receives a gradient.
//!
//! ```
//! # use candle_core::{DType, Device, Tensor};
//! # use candle_nn::{VarBuilder, VarMap};
//! use candle_fa2::layers::{MultiHeadAttention, MultiHeadAttentionConfig, Rotary, RotaryConfig};
//! use candle_fa2::Mask;
//!
//! let device = Device::Cpu;
//! let varmap = VarMap::new();
//! let vb = VarBuilder::from_varmap(&varmap, DType::F32, &device);
//!
//! let rotary = Rotary::new(&RotaryConfig::new(16, 128), &device)?; // head_dim, longest sequence
//! let config = MultiHeadAttentionConfig::new(64, 4) // embed_dim, num_heads
//!     .num_heads_k(2) // 2 query heads share each key head
//!     .mask(Mask::Causal)
//!     .rotary(&rotary);
//! let layer = MultiHeadAttention::new(&config, vb.pp("attn"))?;
//!
//! // Train: every weight has a gradient.
//! let xs = Tensor::randn(0f32, 1f32, (2, 10, 64), &device)?; // (batch, seqlen, embed_dim)
//! let ys = layer.forward(&xs)?;
//! let grads = ys.sqr()?.sum_all()?.backward()?;
//! assert!(varmap.all_vars().iter().all(|var| grads.get(var.as_tensor()).is_some()));
//!
//! // Decode: first the whole prompt, then one token at a time.
//! let decoder = layer.detach();
//! let mut cache = decoder.new_cache(128);
//! let prompt = decoder.forward_cached(&xs.narrow(1, 0, 9)?, &mut cache)?;
//! let last = decoder.forward_cached(&xs.narrow(1, 9, 1)?, &mut cache)?;
//! assert_eq!((prompt.dims(), last.dims()), (&[2, 9, 64][..], &[2, 1, 64][..]));
//! # Ok::<(), candle_fa2::layers::Error>(())
//! ```
//!
//! # Gradients
//!
//! Several of Candle's fast operators cut their result off from the graph, without an error. The weights before the cut
//! then never change. The loss still falls, because the layers after the cut learn.
//!
//! | cut off | keeps the gradient | here |
//! | --- | --- | --- |
//! | `candle_nn::rotary_emb::{rope, rope_i, rope_thd}` | `rope_slow`, `rope_i_slow` | [`Rotary`] |
//! | `candle_nn::attention::flash_attn`, `candle_nn::ops::sdpa` | | [`Attention`](crate::Attention) |
//! | `candle_nn::ops::softmax_last_dim` | `candle_nn::ops::softmax` | [`Attention`](crate::Attention) |
//! | `candle_nn::kv_cache`, `Tensor::slice_set` | | refused: [`MultiHeadAttention::forward_cached`] |
//!
//! In the rest of a model, `candle_nn::LayerNorm` (with a bias) and `candle_nn::RmsNorm` also cut the graph if their
//! input is contiguous. `candle_nn::ops::{layer_norm_slow, rms_norm_slow}` and `RmsNorm::forward_diff` keep the gradient.
//! After the first backward, check that each variable has a gradient, as the example does.
//!
//! # Loading mistakes
//!
//! With some mistakes all weights load without an error, but the results are wrong. The layer prevents most of them:
//!
//! | mistake | here |
//! | --- | --- |
//! | wrong order of the heads of a fused projection | no default: you must name the [`QkvOrder`] |
//! | a bias, q/k norm or similar tensor is not used | [`MultiHeadAttention::new`] returns an error with its name |
//! | names of another model, so a `VarMap` would create new weights | [`MultiHeadAttention::new`] returns an error |
//! | two projections with one name | [`MultiHeadAttention::new`] returns an error |
//! | wrong rotary pairing (interleaved or half) | not detected; see [`RotaryLayout`] |
//!
//! `VarMap::load` runs after these checks and ignores extra tensors in the file. To check a file, build the layer once
//! from `VarBuilder::from_mmaped_safetensors`.
//!
//! # Decoding with trained weights
//!
//! Weights from a `VarMap` are variables, so autograd tracks them. But autograd does not track writes to a cache, so a
//! cached call would lose gradients silently. The layer returns an error instead. There are two ways to decode:
//!
//! - [`MultiHeadAttention::detach`] returns one layer without tracking.
//! - [`detached_var_builder`] builds the whole model, with norms and embeddings, a second time without tracking.
//!
//! Both share the storage of the variables and copy nothing. A decoder built before training sees each training step.

mod attention;
mod checks;
mod config;
mod error;
mod projection;
mod rotary;
mod unused;

use std::collections::HashMap;
use std::sync::PoisonError;

use candle_core::{DType, Device, Tensor};
use candle_nn::{VarBuilder, VarMap};

pub use attention::MultiHeadAttention;
pub use config::{MultiHeadAttentionConfig, Projections, QkvOrder, WeightLayout};
pub use error::{Error, Result};
pub use rotary::{Rotary, RotaryConfig, RotaryLayout};

/// A `VarBuilder` that returns the variables of `varmap` without tracking. With it, build a trained model a second time,
/// for inference with a KV cache.
///
/// If a variable has the dtype and device of the builder, the new model shares its storage and follows its training.
/// Otherwise the builder converts a copy when the model is built. If the map lacks a variable, the builder returns an
/// error and makes no new one.
///
/// ```
/// # use candle_core::{DType, Device};
/// # use candle_nn::{VarBuilder, VarMap};
/// # use candle_fa2::layers::{detached_var_builder, MultiHeadAttention, MultiHeadAttentionConfig};
/// # use candle_fa2::Mask;
/// let varmap = VarMap::new();
/// let config = MultiHeadAttentionConfig::new(64, 4).mask(Mask::Causal);
/// let trained = MultiHeadAttention::new(&config, VarBuilder::from_varmap(&varmap, DType::F32, &Device::Cpu))?;
/// # let _ = trained;
/// let decoder = MultiHeadAttention::new(&config, detached_var_builder(&varmap, DType::F32, &Device::Cpu))?;
/// # let _ = decoder;
/// # Ok::<(), candle_fa2::layers::Error>(())
/// ```
pub fn detached_var_builder(varmap: &VarMap, dtype: DType, device: &Device) -> VarBuilder<'static> {
    // A poisoned lock means that another thread panicked while it held the map. The map is still valid: Candle only inserts.
    let vars = varmap.data().lock().unwrap_or_else(PoisonError::into_inner);
    let tensors: HashMap<String, Tensor> =
        vars.iter().map(|(name, var)| (name.clone(), var.as_detached_tensor())).collect();
    VarBuilder::from_tensors(tensors, dtype, device)
}
