//! Cross-entropy over logits, and over a linear layer whose logits are never all in memory.

mod linear;

pub(crate) use linear::Layer;

use candle_core::{DType, Result, Tensor};
use rayon::prelude::*;

#[cfg(feature = "cuda")]
use crate::cuda;
use crate::number::{for_float, Element, Real};
use crate::rows::{rows_per_task, sum, sum_in_f64};
use crate::{check, composed, node};

/// Mean cross-entropy of `logits` against `targets`: [`CrossEntropy::forward`] without options.
///
/// # Errors
/// As [`CrossEntropy::forward`].
pub fn cross_entropy(logits: &Tensor, targets: &Tensor) -> Result<Tensor> {
    CrossEntropy::new().forward(logits, targets)
}

/// Mean cross-entropy of the logits `x weight^T`: [`CrossEntropy::forward_linear`] without options.
///
/// # Errors
/// As [`CrossEntropy::forward_linear`].
pub fn linear_cross_entropy(x: &Tensor, weight: &Tensor, targets: &Tensor) -> Result<Tensor> {
    CrossEntropy::new().forward_linear(x, weight, targets)
}

/// Cross-entropy with options, as a mean over the targets.
///
/// For a row of logits `x` with target `t` among `vocab` classes:
///
/// ```text
/// z = softcap tanh(x / softcap)                    without a softcap, z = x
/// lse = ln(sum of exp(z))                          p = exp(z - lse)
/// q = (1 - label_smoothing) onehot(t) + label_smoothing / vocab
/// loss of the row = lse - sum of q z + z_loss lse^2
/// loss = mean over the rows whose target is not ignore_index
///
/// dz = p (1 + 2 z_loss lse) - q                    dx = dz (1 - (z / softcap)^2) dloss / rows
/// ```
///
/// The probabilities are never stored. The node keeps lse, one number per row. The backward writes the gradient in one pass
/// over the logits.
///
/// If every target is ignored, the loss is 0 and so are all gradients.
///
/// **NaN and infinity.** A logit of minus infinity has probability 0; as the target, or with label smoothing, it makes the loss
/// infinite. NaN, plus infinity, or a row of minus infinity only, makes the loss NaN, and the gradient of its row. A softcap makes
/// infinity the finite cap. The logits of an ignored row are not read, so NaN there has no effect.
///
/// ```
/// # use candle_core::{Device, Tensor, Var};
/// # use candle_fused_ops::CrossEntropy;
/// let logits = Var::randn(0f32, 1f32, (3, 10), &Device::Cpu)?;
/// let targets = Tensor::new(&[7i64, -100, 2], &Device::Cpu)?;
/// let loss = CrossEntropy::new().ignore_index(-100).label_smoothing(0.1).forward(&logits, &targets)?;
/// let dlogits = loss.backward()?.remove(&logits).expect("a gradient");
/// assert_eq!(dlogits.get(1)?.to_vec1::<f32>()?, [0.0; 10]); // the ignored row
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Clone, Copy, Debug)]
pub struct CrossEntropy {
    pub(crate) ignore_index: Option<i64>,
    pub(crate) label_smoothing: f64,
    pub(crate) z_loss: f64,
    pub(crate) softcap: Option<f64>,
    chunk_bytes: Option<usize>,
}

impl Default for CrossEntropy {
    fn default() -> Self {
        Self::new()
    }
}

impl CrossEntropy {
    /// No target is ignored, and all other options are off.
    pub fn new() -> Self {
        Self { ignore_index: None, label_smoothing: 0.0, z_loss: 0.0, softcap: None, chunk_bytes: None }
    }

    /// Rows with this target do not count: they add nothing to the loss, and their gradient is 0. PyTorch uses -100, which
    /// needs targets in i64.
    pub fn ignore_index(mut self, index: i64) -> Self {
        self.ignore_index = Some(index);
        self
    }

    /// Moves this share of the target's probability to all classes evenly: 0 to 1.
    pub fn label_smoothing(mut self, share: f64) -> Self {
        self.label_smoothing = share;
        self
    }

    /// Adds `weight * lse^2`, so that logits do not drift away (PaLM: 1e-4).
    pub fn z_loss(mut self, weight: f64) -> Self {
        self.z_loss = weight;
        self
    }

    /// Limits logits smoothly to this absolute value (Gemma 2: 30).
    pub fn softcap(mut self, cap: f64) -> Self {
        self.softcap = Some(cap);
        self
    }

    /// Largest memory for the logits that [`Self::forward_linear`] holds at once. The default is 256 MiB on the CPU and
    /// 1 GiB on other devices. Each chunk adds to the gradient of the weight once, so larger chunks save passes over it.
    pub fn chunk_bytes(mut self, bytes: usize) -> Self {
        self.chunk_bytes = Some(bytes);
        self
    }

    /// The loss of `logits`, a scalar.
    ///
    /// | tensor | shape | type |
    /// | --- | --- | --- |
    /// | `logits` | `(.., vocab)` | f16, bf16, f32, f64 |
    /// | `targets` | `(..)` | u32, i64 |
    /// | result | `()` | f32; f64 for f64 logits |
    ///
    /// # Errors
    /// If shapes or devices disagree; if an option is out of range; on the CPU, if a target is neither a class nor
    /// `ignore_index`. On a GPU nobody waits to check targets: such a target makes the loss NaN.
    pub fn forward(&self, logits: &Tensor, targets: &Tensor) -> Result<Tensor> {
        check::float("logits", logits)?;
        let vocab = check::last_axis("logits", logits)?;
        self.check(targets, "logits", logits)?;
        #[cfg(feature = "cuda")]
        if let Some(device) = cuda::device_with_kernels(logits) {
            return cuda::cross_entropy::cross_entropy(device, self, logits, targets);
        }
        if !logits.device().is_cpu() {
            return composed::cross_entropy(self, logits, targets);
        }
        let (logits, targets) = (logits.contiguous()?, self.read(targets, vocab)?);
        for_float!(logits.dtype(), T => self.node::<T>(&logits, targets, vocab))
    }

    fn node<T: Element>(&self, logits: &Tensor, targets: Vec<Target>, vocab: usize) -> Result<Tensor> {
        let formula = Formula::new(self, vocab);
        let (loss, lse) = losses::<T>(node::Numbers::of(logits).as_slice()?, &targets, &formula);
        let counted = counted(&targets);
        let loss = vec![T::Acc::real(loss / counted)];
        node::node("cross_entropy", &[logits], node::storage(loss), (), move |inputs, dloss| {
            let logits = inputs[0];
            let factor = T::Acc::real(scalar(dloss)? / counted);
            let dlogits = gradients::<T>(node::Numbers::of(logits).as_slice()?, &targets, &lse, &formula, factor);
            Ok(vec![Some(node::tensor(dlogits, logits.shape()))])
        })
    }

    /// Checks the options, and `targets` against a tensor with one more axis.
    fn check(&self, targets: &Tensor, name: &str, tensor: &Tensor) -> Result<()> {
        let leading = &tensor.dims()[..tensor.rank() - 1];
        check::shape("targets", targets, leading, &format!("as the leading axes of {name}"))?;
        check::same_device("targets", targets, name, tensor.device())?;
        check::ids("targets", targets)?;
        check::not_negative("label_smoothing", self.label_smoothing)?;
        check::not_negative("z_loss", self.z_loss)?;
        match (self.label_smoothing, self.softcap) {
            (share, _) if share > 1.0 => Err(check::error(format!("label_smoothing must be at most 1, got {share}"))),
            (_, Some(cap)) if !(cap.is_finite() && cap > 0.0) => {
                Err(check::error(format!("softcap must be finite and above 0, got {cap}; leave it out for no softcap")))
            }
            _ => Ok(()),
        }
    }

    fn read(&self, targets: &Tensor, vocab: usize) -> Result<Vec<Target>> {
        let ids = targets.to_dtype(DType::I64)?.flatten_all()?.to_vec1::<i64>()?;
        let target = |(row, &id): (usize, &i64)| match (usize::try_from(id), self.ignore_index) {
            (_, ignored) if Some(id) == ignored => Ok(None),
            (Ok(class), _) if class < vocab => Ok(Some(class)),
            (_, Some(index)) => Err(check::error(format!(
                "targets: each must be a class of 0..{vocab} or the ignore_index {index}, got {id} at row {row}"
            ))),
            (_, None) => Err(check::error(format!(
                "targets: each must be a class of 0..{vocab}, got {id} at row {row}; set ignore_index to leave rows out"
            ))),
        };
        ids.iter().enumerate().map(target).collect()
    }
}

/// The class of a row. `None` if the row is ignored.
type Target = Option<usize>;

/// The number of rows that count, as the divisor of a mean. It is at least 1, so the mean of no rows is 0.
fn counted(targets: &[Target]) -> f64 {
    targets.iter().flatten().count().max(1) as f64
}

fn scalar(tensor: &Tensor) -> Result<f64> {
    tensor.to_dtype(DType::F64)?.to_scalar()
}

/// The options as numbers of the type that the loss is computed in.
struct Formula<A> {
    smooths: bool,
    target_share: A,
    other_share: A,
    z_loss: A,
    softcap: Option<A>,
}

impl<A: Real> Formula<A> {
    fn new(options: &CrossEntropy, vocab: usize) -> Self {
        Self {
            smooths: options.label_smoothing > 0.0,
            target_share: A::real(1.0 - options.label_smoothing),
            other_share: A::real(options.label_smoothing / vocab as f64),
            z_loss: A::real(options.z_loss),
            softcap: options.softcap.map(A::real),
        }
    }

    fn capped(&self, x: A) -> A {
        match self.softcap {
            Some(cap) => cap * (x / cap).tanh(),
            None => x,
        }
    }

    /// The loss of a row of logits, and its lse.
    fn loss(&self, row: &[A], target: usize) -> (A, A) {
        // NaN loses every comparison here, but makes the sum NaN.
        let largest = row.iter().fold(row[0], |largest, &x| if x > largest { x } else { largest });
        let largest = self.capped(largest); // capping keeps the order
        let lse = largest + sum(row, |x| (self.capped(x) - largest).exp()).ln();
        let mut expected = self.target_share * self.capped(row[target]);
        if self.smooths {
            expected += self.other_share * sum(row, |x| self.capped(x));
        }
        (lse - expected + self.z_loss * lse * lse, lse)
    }

    /// Replaces a row of logits by `factor` times its gradient.
    fn gradient(&self, row: &mut [A], target: usize, lse: A, factor: A) {
        let of_p = factor * (A::ONE + (self.z_loss + self.z_loss) * lse);
        let of_others = factor * self.other_share;
        let slope = |z: A| match self.softcap {
            Some(cap) => A::ONE - (z / cap) * (z / cap),
            None => A::ONE,
        };
        let of_target = factor * self.target_share * slope(self.capped(row[target]));
        for x in row.iter_mut() {
            let z = self.capped(*x);
            *x = ((z - lse).exp() * of_p - of_others) * slope(z);
        }
        row[target] -= of_target;
    }
}

/// The sum of the losses of all rows, and lse of each row that counts.
fn losses<T: Element>(logits: &[T], targets: &[Target], formula: &Formula<T::Acc>) -> (f64, Vec<T::Acc>) {
    let Some(vocab) = logits.len().checked_div(targets.len()) else { return (0.0, Vec::new()) };
    let rows = rows_per_task(targets.len(), vocab);
    let (losses, lse): (Vec<T::Acc>, Vec<T::Acc>) = logits
        .par_chunks(rows * vocab)
        .zip(targets.par_chunks(rows))
        .flat_map_iter(|(logits, targets)| {
            let mut row = vec![T::Acc::ZERO; vocab];
            logits.chunks_exact(vocab).zip(targets).map(move |(logits, target)| {
                let Some(target) = *target else { return (T::Acc::ZERO, T::Acc::ZERO) };
                T::widen(logits, &mut row);
                formula.loss(&row, target)
            })
        })
        .unzip();
    (sum_in_f64(&losses), lse)
}

/// The gradient of `factor` times the sum of the losses.
fn gradients<T: Element>(
    logits: &[T],
    targets: &[Target],
    lse: &[T::Acc],
    formula: &Formula<T::Acc>,
    factor: T::Acc,
) -> Vec<T> {
    let mut dlogits = vec![T::default(); logits.len()]; // zeros: the gradient of ignored rows
    let Some(vocab) = logits.len().checked_div(targets.len()) else { return dlogits };
    let rows = rows_per_task(targets.len(), vocab);
    dlogits
        .par_chunks_mut(rows * vocab)
        .zip(logits.par_chunks(rows * vocab))
        .zip(targets.par_chunks(rows).zip(lse.par_chunks(rows)))
        .for_each(|((dlogits, logits), (targets, lse))| {
            let mut row = vec![T::Acc::ZERO; vocab];
            let rows = dlogits.chunks_exact_mut(vocab).zip(logits.chunks_exact(vocab));
            for ((dlogits, logits), (target, &lse)) in rows.zip(targets.iter().zip(lse)) {
                let Some(target) = *target else { continue };
                T::widen(logits, &mut row);
                formula.gradient(&mut row, target, lse, factor);
                T::narrow(&row, dlogits);
            }
        });
    dlogits
}

/// Replaces logits by the gradient of the sum of their losses. Returns the sum.
fn replace_by_gradients<A: Real>(logits: &mut [A], targets: &[Target], formula: &Formula<A>) -> f64 {
    let Some(vocab) = logits.len().checked_div(targets.len()) else { return 0.0 };
    let rows = rows_per_task(targets.len(), vocab);
    let losses: Vec<A> = logits
        .par_chunks_mut(rows * vocab)
        .zip(targets.par_chunks(rows))
        .flat_map_iter(|(logits, targets)| {
            logits.chunks_exact_mut(vocab).zip(targets).map(|(row, target)| {
                let Some(target) = *target else {
                    row.fill(A::ZERO);
                    return A::ZERO;
                };
                let (loss, lse) = formula.loss(row, target);
                formula.gradient(row, target, lse, A::ONE);
                loss
            })
        })
        .collect();
    sum_in_f64(&losses)
}
