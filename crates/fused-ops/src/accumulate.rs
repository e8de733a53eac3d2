//! Gradients of several batches.

use candle_core::backprop::GradStore;
use candle_core::{Error, Tensor, Var};

use crate::check;
use crate::node::accumulator;

/// The mean of `loss(batch)` over `batches`, and its gradients for `parameters`: one step on more data than memory has room for.
///
/// Each batch has its own backward, and its activations are freed before the next. Gradients of several batches are summed in f32
/// (f64 for f64 parameters). [`AdamW::step`](crate::AdamW::step) takes them as they are.
///
/// ```
/// # use candle_core::{Device, Tensor, Var};
/// # use candle_fused_ops::mean_gradients;
/// let w = Var::new(2f32, &Device::Cpu)?;
/// let (loss, gradients) = mean_gradients([&w], &[1.0, 3.0], |&x| w.as_tensor() * x)?;
/// assert_eq!(loss.to_scalar::<f32>()?, 4.0);
/// assert_eq!(gradients.get(&w).expect("a gradient").to_scalar::<f32>()?, 2.0);
/// # Ok::<(), candle_core::Error>(())
/// ```
///
/// # Errors
/// Those of `loss`, and if there is no batch.
pub fn mean_gradients<'a, B, E: From<Error>>(
    parameters: impl IntoIterator<Item = &'a Var> + Clone,
    batches: &[B],
    loss: impl Fn(&B) -> Result<Tensor, E>,
) -> Result<(Tensor, GradStore), E> {
    let mut losses = Vec::new();
    let mut sum: Option<GradStore> = None;
    for batch in batches {
        let loss = (loss(batch)? / batches.len() as f64)?;
        let mut gradients = loss.backward()?;
        losses.push(loss.detach());
        if let Some(mut before) = sum.take() {
            for var in parameters.clone() {
                if let (Some(before), Some(gradient)) = (before.remove(var), gradients.remove(var)) {
                    let wide = accumulator(var.dtype());
                    gradients.insert(var, (before.to_dtype(wide)? + gradient.to_dtype(wide)?)?);
                }
            }
        }
        sum = Some(gradients);
    }
    let gradients = sum.ok_or_else(|| check::error("batches: at least one is needed, got none".to_string()))?;
    Ok((Tensor::stack(&losses, 0)?.sum_all()?, gradients))
}
