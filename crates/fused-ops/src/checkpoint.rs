//! A part of a model whose activations are not kept.

use candle_core::{Result, Tensor, Var};

use crate::{check, node};

/// `f(inputs)`, without keeping what `f` computes on the way: the backward runs `f` again. Memory for the activations of a model of
/// `n` such blocks falls to their inputs and the activations of one block, for about a third more time.
///
/// `f` gets tensors like `inputs`, in the same order. Every tensor that needs a gradient must be one of them, weights too. `f` must
/// compute the same each time.
///
/// ```
/// # use candle_core::{Device, Tensor, Var};
/// # use candle_fused_ops::{checkpoint, gelu, layer_norm};
/// let x = Var::randn(0f32, 1f32, (2, 3, 8), &Device::Cpu)?;
/// let weight = Var::ones(8, candle_core::DType::F32, &Device::Cpu)?;
/// let y = checkpoint(&[&x, &weight], |t| gelu(&layer_norm(&t[0], &t[1], None, 1e-5)?))?;
/// assert!(y.sum_all()?.backward()?.get(&weight).is_some());
/// # Ok::<(), candle_core::Error>(())
/// ```
///
/// # Errors
/// Those of `f`, and if `f` uses a tracked tensor that is not in `inputs`.
pub fn checkpoint<F>(inputs: &[&Tensor], f: F) -> Result<Tensor>
where
    F: Fn(&[Tensor]) -> Result<Tensor> + Send + Sync + 'static,
{
    let detached: Vec<Tensor> = inputs.iter().map(|input| input.detach()).collect();
    let y = f(&detached)?;
    if y.track_op() {
        return Err(check::error(
            "checkpoint: the function uses a tracked tensor that is not in inputs, so its gradient would be lost; add it to \
             inputs, or detach it"
                .to_string(),
        ));
    }
    node::node("checkpoint", inputs, node::copied(&y)?, y.shape(), move |inputs, dy| {
        // A variable is a leaf already. Candle makes a leaf of a tensor by a copy.
        let leaf = |input: &&Tensor| match input.track_op() {
            true => Ok(Var::from_tensor(input)?.into_inner()),
            false => Ok((*input).clone()),
        };
        let leaves = inputs.iter().map(leaf).collect::<Result<Vec<_>>>()?;
        let y = f(&leaves)?;
        // Candle begins a backward with ones. This scalar hands `dy` on instead.
        let dy = dy.clone();
        let seed = node::node("seed", &[&y], node::unread(y.device())?, 1, move |_, _| Ok(vec![Some(dy.clone())]))?;
        let mut gradients = node::backward_once(&seed)?;
        let gradient = |leaf: &Tensor| gradients.remove(leaf).map_or_else(|| leaf.zeros_like(), Ok).map(Some);
        leaves.iter().map(gradient).collect()
    })
}
