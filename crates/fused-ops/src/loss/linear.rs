//! Cross-entropy of a linear layer, chunk by chunk.

use candle_core::{DType, Result, Tensor};

use super::{counted, losses, replace_by_gradients, CrossEntropy, Formula};
#[cfg(feature = "cuda")]
use crate::cuda;
use crate::node::accumulator;
use crate::number::Real;
use crate::{check, composed, node};

impl CrossEntropy {
    /// The loss of the logits `x weight^T`, a scalar. At most [`Self::chunk_bytes`] of logits are in memory.
    ///
    /// | tensor | shape | type |
    /// | --- | --- | --- |
    /// | `x` | `(.., width)` | f16, bf16, f32, f64 |
    /// | `weight` | `(vocab, width)`, as `candle_nn::Linear` and an embedding have it | as `x` |
    /// | `targets` | `(..)`, the leading axes of `x` | u32, i64 |
    /// | result | `()` | f32; f64 for f64 |
    ///
    /// The rows are processed in chunks. For each chunk the forward computes the logits, their loss, and in their place their
    /// gradient d; from d it computes the gradients of x and weight. The backward only scales them:
    ///
    /// ```text
    /// dx = d weight dloss / rows          dweight = d^T x dloss / rows
    /// ```
    ///
    /// So the node keeps both gradients (f32 for f16 and bf16), and not the logits. If no input is tracked, the forward computes the
    /// loss alone. On the CPU the logits of f16 and bf16 tensors are f32; on a GPU logits and d have the type of x.
    ///
    /// An ignored row adds `0 * x` to the gradient of weight. So unlike its logits in [`Self::forward`], it must be finite.
    ///
    /// ```
    /// # use candle_core::{Device, Tensor, Var};
    /// let x = Var::randn(0f32, 1f32, (2, 3, 4), &Device::Cpu)?;
    /// let weight = Var::randn(0f32, 1f32, (10, 4), &Device::Cpu)?;
    /// let targets = Tensor::new(&[[1u32, 9, 0], [5, 5, 2]], &Device::Cpu)?;
    /// let grads = candle_fused_ops::linear_cross_entropy(&x, &weight, &targets)?.backward()?;
    /// assert!(grads.get(&x).is_some() && grads.get(&weight).is_some());
    /// # Ok::<(), candle_core::Error>(())
    /// ```
    ///
    /// # Errors
    /// As [`Self::forward`].
    pub fn forward_linear(&self, x: &Tensor, weight: &Tensor, targets: &Tensor) -> Result<Tensor> {
        check::float("x", x)?;
        let width = check::last_axis("x", x)?;
        let vocab = match *weight.dims() {
            [vocab, of_weight] if of_weight == width && vocab > 0 => vocab,
            _ => {
                let got = weight.dims();
                return Err(check::error(format!(
                    "weight: shape must be (vocab, {width}) with the last axis of x, got {got:?}"
                )));
            }
        };
        check::same("weight", weight, "x", x)?;
        self.check(targets, "x", x)?;
        #[cfg(feature = "cuda")]
        if let Some(device) = cuda::device_with_kernels(x) {
            return cuda::linear_cross_entropy::linear_cross_entropy(device, self, x, weight, targets);
        }
        if !x.device().is_cpu() {
            return composed::linear_cross_entropy(self, x, weight, targets);
        }
        let wide = accumulator(x.dtype());
        let layer = Layer::new(&x.to_dtype(wide)?, &weight.to_dtype(wide)?, self.rows_per_chunk(x, vocab, wide))?;
        match wide {
            DType::F64 => self.fused::<f64>(&layer, x, weight, targets),
            _ => self.fused::<f32>(&layer, x, weight, targets),
        }
    }

    fn fused<A: Real>(&self, layer: &Layer, x: &Tensor, weight: &Tensor, targets: &Tensor) -> Result<Tensor> {
        let vocab = weight.dim(0)?;
        let (targets, formula) = (self.read(targets, vocab)?, Formula::new(self, vocab));
        let tracked = x.track_op() || weight.track_op();
        let sums = layer.sums(x.track_op(), weight.track_op(), |logits, start| {
            let targets = &targets[start..start + logits.dim(0)?];
            let loss = match tracked {
                true => node::update::<A, _>(logits, |logits| replace_by_gradients(logits, targets, &formula))?,
                false => losses::<A>(node::Numbers::of(logits).as_slice()?, targets, &formula).0,
            };
            Ok((node::tensor(vec![loss], ()), logits.clone()))
        })?;
        sums.mean(x, weight, &node::tensor(vec![counted(&targets)], ()))
    }

    /// Rows whose logits, `vocab` numbers of type `dtype` on the device of `x`, fit `chunk_bytes`; at least one.
    pub(crate) fn rows_per_chunk(&self, x: &Tensor, vocab: usize, dtype: DType) -> usize {
        let default = if x.device().is_cpu() { 256 << 20 } else { 1 << 30 };
        (self.chunk_bytes.unwrap_or(default) / (vocab * dtype.size_in_bytes())).max(1)
    }
}

/// A linear layer without its graph: x as (rows, width), and weight.
pub(crate) struct Layer {
    x: Tensor,
    weight: Tensor,
    rows_per_chunk: usize,
}

/// Sums over all rows: the loss, and its gradients for the tracked inputs.
pub(crate) struct Sums {
    loss: Tensor, // ()
    dx: Option<Tensor>,
    dweight: Option<Tensor>,
}

impl Layer {
    pub(crate) fn new(x: &Tensor, weight: &Tensor, rows_per_chunk: usize) -> Result<Self> {
        let x = x.detach().contiguous()?.reshape(((), weight.dim(1)?))?;
        Ok(Self { x, weight: weight.detach().contiguous()?, rows_per_chunk })
    }

    /// `chunk` gets the logits of some rows and the index of the first. It returns the sum of their losses, (), and the gradient of
    /// that sum by the logits, which nobody reads if no gradient is wanted.
    pub(crate) fn sums(
        &self,
        wants_dx: bool,
        wants_dweight: bool,
        chunk: impl Fn(&Tensor, usize) -> Result<(Tensor, Tensor)>,
    ) -> Result<Sums> {
        let rows = self.x.dim(0)?;
        let chunks = rows.div_ceil(self.rows_per_chunk).max(1);
        let rows_per_chunk = rows.div_ceil(chunks).max(1); // chunks of about one size
        let (mut losses, mut dx, mut dweight) = (Vec::new(), Vec::new(), None);
        for start in (0..rows).step_by(rows_per_chunk) {
            let x = self.x.narrow(0, start, rows_per_chunk.min(rows - start))?;
            let (loss, dlogits) = chunk(&x.matmul(&self.weight.t()?)?, start)?;
            losses.push(loss);
            if wants_dx {
                dx.push(dlogits.matmul(&self.weight)?);
            }
            if wants_dweight {
                let part = dlogits.t()?.matmul(&x)?.to_dtype(accumulator(x.dtype()))?;
                dweight = Some(match dweight {
                    Some(sum) => (sum + part)?,
                    None => part,
                });
            }
        }
        let zeros = |tensor: &Tensor| tensor.zeros_like()?.to_dtype(accumulator(tensor.dtype()));
        if losses.is_empty() {
            let loss = Tensor::zeros((), accumulator(self.x.dtype()), self.x.device())?;
            return Ok(Sums { loss, dx: Some(zeros(&self.x)?), dweight: Some(zeros(&self.weight)?) });
        }
        let dx = if wants_dx { Some(Tensor::cat(&dx, 0)?) } else { None };
        Ok(Sums { loss: Tensor::stack(&losses, 0)?.sum_all()?, dx, dweight })
    }
}

impl Sums {
    /// The node of the loss: the mean over `counted` rows, a tensor () so that nobody waits for a GPU.
    pub(crate) fn mean(self, x: &Tensor, weight: &Tensor, counted: &Tensor) -> Result<Tensor> {
        let Self { loss, dx, dweight } = self;
        let wide = accumulator(x.dtype());
        let counted = counted.to_dtype(loss.dtype())?;
        let loss = (loss / &counted)?.to_dtype(wide)?;
        node::node("linear_cross_entropy", &[x, weight], node::copied(&loss)?, (), move |inputs, dloss| {
            let factor = (dloss.to_dtype(wide)? / counted.to_dtype(wide)?)?;
            let scaled = |gradient: &Option<Tensor>, input: &Tensor| match gradient {
                Some(gradient) => {
                    let scaled = gradient.to_dtype(wide)?.broadcast_mul(&factor)?;
                    scaled.to_dtype(input.dtype())?.reshape(input.shape()).map(Some)
                }
                None => Ok(None),
            };
            Ok(vec![scaled(&dx, inputs[0])?, scaled(&dweight, inputs[1])?])
        })
    }
}
