//! The results of a layer: the output, and the gradients of every weight, every bias and the input.

use std::collections::BTreeMap;
use std::fmt::Display;

use anyhow::{ensure, Context, Result};
use candle_core::{DType, Tensor, Var};

use super::case::normal;
use super::close::{close, relative_error, Tolerance};

/// The output and the gradients by name.
pub type Outcome = BTreeMap<String, Tensor>;

/// Runs `forward` on `xs`, and the backward of a weighted sum of its output. With a sum without weights, an error that is the
/// same in all rows could be hidden.
pub fn run(vars: BTreeMap<String, Var>, xs: &Tensor, forward: impl Fn(&Tensor) -> Result<Tensor>) -> Result<Outcome> {
    let xs = Var::from_tensor(xs)?;
    let ys = forward(xs.as_tensor())?;
    let weights = normal(ys.shape(), 1.0, "loss", ys.dtype())?.to_device(ys.device())?;
    let grads = (&ys * weights)?.sum_all()?.backward()?;
    let mut outcome = Outcome::from([("output".to_string(), ys.detach())]);
    for (name, var) in vars.into_iter().chain([("xs".to_string(), xs)]) {
        let grad = grads.get(var.as_tensor()).with_context(|| format!("{name} has no gradient"))?;
        outcome.insert(format!("gradient of {name}"), grad.clone());
    }
    Ok(outcome)
}

/// Checks that `got`, computed in `dtype`, equals `want`. The tolerance is from the error of `plain`, the plain layer. The caller
/// computes `plain` in `dtype`, or in f32 if `dtype` is f64.
pub fn equal(dtype: DType, got: &Outcome, want: &Outcome, plain: &Outcome, what: &dyn Display) -> Result<()> {
    ensure!(got.len() == want.len(), "got {} tensors, expected {}\n{what}", got.len(), want.len());
    for name in want.keys() {
        let tolerance = tolerance(name, dtype, want, plain)?;
        close(&format!("{dtype:?} {name}"), &got[name], &want[name], tolerance, what)?;
    }
    Ok(())
}

/// The tolerance for one tensor of an outcome.
///
/// The gradient of a bias is a single row, so its error in the plain layer may be small by chance. The gradient of its weight
/// sums the same rows, so the error of the weight counts too.
pub fn tolerance(name: &str, dtype: DType, want: &Outcome, plain: &Outcome) -> Result<Tolerance> {
    let weight = name.strip_suffix(".bias").map(|projection| format!("{projection}.weight"));
    let names = [name].into_iter().chain(weight.as_deref());
    let errors = names.map(|name| relative_error(&plain[name], &want[name])).collect::<Result<Vec<_>>>()?;
    Ok(Tolerance::from_plain_error(errors.into_iter().fold(0.0, f64::max), dtype))
}
