//! Gradients of several batches.

use candle_core::backprop::GradStore;
use candle_core::{Error, Tensor, Var};

use crate::check;
use crate::node::{accumulator, backward_once};

/// The mean of `loss(batch)` over `batches`, and the gradients of this mean. So one optimizer step can use more data than memory
/// has room for.
///
/// Gradients of several batches are summed in f32 (f64 for f64 parameters). [`AdamW::step`](crate::AdamW::step) takes them as they are. A
/// batch that does not use a parameter adds nothing to its gradient. Only the gradients of `parameters` are sums: those of other
/// variables are of the last batch alone.
///
/// Each batch has its own backward, a [`backward_once`](crate::backward_once), and its activations are freed before the next. So `loss` itself must compute
/// whatever it derives from parameters. If two batches share a result of an operator of this crate, the first one frees its graph, and
/// the second one is an error.
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
        let mut gradients = backward_once(&loss)?;
        losses.push(loss.detach());
        if let Some(mut before) = sum.take() {
            for var in parameters.clone() {
                let wide = accumulator(var.dtype());
                let sum = match (before.remove(var), gradients.remove(var)) {
                    (Some(before), Some(gradient)) => (before.to_dtype(wide)? + gradient.to_dtype(wide)?)?,
                    (Some(one), None) | (None, Some(one)) => one,
                    (None, None) => continue,
                };
                gradients.insert(var, sum);
            }
        }
        sum = Some(gradients);
    }
    let gradients = sum.ok_or_else(|| check::error("batches: at least one is needed, got none".to_string()))?;
    Ok((Tensor::stack(&losses, 0)?.sum_all()?, gradients))
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::{Device, Result};

    #[test]
    fn a_parameter_may_be_in_some_batches_only() -> Result<()> {
        let parameters = [1f32, 2.0, 3.0, 4.0].map(|x| Var::new(x, &Device::Cpu).expect("a scalar"));
        let [first, middle, last, every] = &parameters;
        let batches = [(first, 3.0), (middle, 6.0), (last, 9.0)];
        let (loss, gradients) =
            mean_gradients(&parameters, &batches, |&(one, factor)| (one.as_tensor() * factor)? + every.as_tensor())?;
        assert_eq!(loss.to_scalar::<f32>()?, 18.0);
        for (var, expected) in parameters.iter().zip([1f32, 2.0, 3.0, 1.0]) {
            let gradient = gradients.get(var).expect("a gradient").to_scalar::<f32>()?;
            assert!((gradient - expected).abs() < 1e-6, "{gradient} instead of {expected}");
        }
        Ok(())
    }
}
