//! AdamW over many parameters, with f32 master weights, clipping, and a state that can be saved.

use std::collections::{BTreeSet, HashMap};
use std::ffi::OsString;
use std::fs::{self, File};
use std::path::Path;

use candle_core::backprop::GradStore;
use candle_core::{DType, Device, Error, Result, Tensor, Var};
use candle_nn::VarMap;
use rayon::prelude::*;
use safetensors::SafeTensorError;

#[cfg(feature = "cuda")]
use crate::cuda;
use crate::node::{accumulator, update, Numbers};
use crate::number::{for_float, Element, Real};
use crate::rows::{sum, sum_in_f64};
use crate::{check, composed};

/// The numbers of [`AdamW`] that are the same for all parameters.
#[derive(Clone, Copy, Debug)]
pub struct AdamWConfig {
    /// Decay of the mean of the gradient.
    pub beta1: f64,
    /// Decay of the mean of the squared gradient.
    pub beta2: f64,
    /// Keeps the division finite where the gradient has always been zero.
    pub epsilon: f64,
    /// Gradients are scaled down so that their global norm is at most this.
    pub max_norm: Option<f64>,
}

impl Default for AdamWConfig {
    /// The defaults of PyTorch and candle_nn, without clipping.
    fn default() -> Self {
        Self { beta1: 0.9, beta2: 0.999, epsilon: 1e-8, max_norm: None }
    }
}

/// Parameters with one weight decay.
#[derive(Clone, Debug)]
pub struct ParameterGroup {
    /// Names and variables. The names are those of the saved state.
    pub parameters: Vec<(String, Var)>,
    /// Each step multiplies the parameters by `1 - lr * weight_decay`.
    pub weight_decay: f64,
}

impl ParameterGroup {
    /// The usual two groups: parameters with two axes or more decay; biases and the weights of norms do not.
    pub fn decay_matrices(variables: &VarMap, weight_decay: f64) -> [Self; 2] {
        let variables = variables.data().lock().expect("no thread panics with the lock of a VarMap");
        let mut named: Vec<(String, Var)> = variables.iter().map(|(name, var)| (name.clone(), var.clone())).collect();
        named.sort_by(|(a, _), (b, _)| a.cmp(b));
        Self::decay_matrices_of(named, weight_decay)
    }

    /// [`Self::decay_matrices`] of `parameters`, which keep their order.
    pub fn decay_matrices_of(parameters: impl IntoIterator<Item = (String, Var)>, weight_decay: f64) -> [Self; 2] {
        let (matrices, vectors) = parameters.into_iter().partition(|(_, var)| var.rank() >= 2);
        [Self { parameters: matrices, weight_decay }, Self { parameters: vectors, weight_decay: 0.0 }]
    }
}

/// AdamW (Adam with decoupled weight decay) over a list of parameters.
///
/// ```text
/// g = gradient min(1, max_norm / norm)               norm over the gradients of all parameters
/// m = beta1 m + (1 - beta1) g                        v = beta2 v + (1 - beta2) g^2
/// w = (1 - lr weight_decay) w - lr (m / c1) / (sqrt(v / c2) + epsilon)             c = 1 - beta^step
/// ```
///
/// m, v and w are f32 (f64 for f64 parameters). A parameter in f16 or bf16 has master weights in f32, and each step also writes
/// them to the parameter, rounded. A step is one pass over the gradients for their norm and one pass over everything. On a GPU these
/// are two launches for each type of parameters, and one for the norm. Nothing waits for the GPU.
///
/// ```
/// # use candle_core::{DType, Device, Tensor};
/// # use candle_fused_ops::{AdamW, AdamWConfig, ParameterGroup, Schedule};
/// # use candle_nn::{linear, Module, VarBuilder, VarMap};
/// let variables = VarMap::new();
/// let model = linear(4, 1, VarBuilder::from_varmap(&variables, DType::F32, &Device::Cpu))?;
/// let groups = ParameterGroup::decay_matrices(&variables, 0.1);
/// let mut optimizer = AdamW::new(groups, AdamWConfig { max_norm: Some(1.0), ..Default::default() })?;
/// let schedule = Schedule::cosine(1e-2, 1e-3, 20).warmup(5);
/// let x = Tensor::randn(0f32, 1f32, (8, 4), &Device::Cpu)?;
/// for step in 1..=20 {
///     let loss = (model.forward(&x)? - 1.0)?.sqr()?.mean_all()?;
///     let norm = optimizer.step(&loss.backward()?, schedule.at(step))?; // read it when you log it
/// }
/// # Ok::<(), candle_core::Error>(())
/// ```
///
/// **NaN and infinity.** A gradient element that is not finite makes its own elements of m and v non-finite, and its w NaN. If the
/// norm is infinite, clipping makes all other gradients zero; if it is NaN, nothing is clipped.
#[derive(Debug)]
pub struct AdamW {
    config: AdamWConfig,
    slots: Vec<Slot>,
    step: usize,
    /// For parameters on a GPU that has kernels for them.
    #[cfg(feature = "cuda")]
    plan: Option<cuda::adamw::Plan>,
}

/// A parameter and its state.
#[derive(Debug)]
pub(crate) struct Slot {
    pub(crate) name: String,
    pub(crate) var: Var,
    /// f32 weights of a parameter in f16 or bf16.
    pub(crate) master: Option<Tensor>,
    pub(crate) m: Tensor,
    pub(crate) v: Tensor,
    pub(crate) weight_decay: f64,
}

/// Name of the number of steps in the state.
const STEP: &str = "adamw.step";

/// What follows the name of a parameter in the names of its weights, m and v in the state.
const PARTS: [&str; 3] = ["", ".m", ".v"];

/// The numbers of one step for one parameter: `w = keep w - rate m / (sqrt(v) + epsilon)`.
pub(crate) struct Rule {
    pub(crate) beta1: f64,
    pub(crate) beta2: f64,
    pub(crate) keep: f64,
    /// lr / c1 sqrt(c2)
    pub(crate) rate: f64,
    /// epsilon sqrt(c2)
    pub(crate) epsilon: f64,
}

impl AdamW {
    /// Starts with moments of zero.
    ///
    /// # Errors
    /// If two parameters have one name in [`Self::state`], are one variable or are on different devices; if a type is not a
    /// floating-point type; if a number of the configuration is out of range.
    pub fn new(groups: impl IntoIterator<Item = ParameterGroup>, config: AdamWConfig) -> Result<Self> {
        config.check()?;
        let mut slots: Vec<Slot> = Vec::new();
        let mut names = BTreeSet::from([STEP.to_string()]);
        for ParameterGroup { parameters, weight_decay } in groups {
            check::not_negative("weight_decay", weight_decay)?;
            for (name, var) in parameters {
                check::float(&name, &var)?;
                for entry in PARTS.map(|part| format!("{name}{part}")) {
                    if names.contains(&entry) {
                        return Err(check::error(format!(
                            "parameter {name}: the names NAME, NAME.m and NAME.v of each parameter and {STEP} must all differ \
                             in the state, but {entry} is there already; give it another name"
                        )));
                    }
                    names.insert(entry);
                }
                if let Some(same) = slots.iter().find(|slot| slot.var.id() == var.id()) {
                    return Err(check::error(format!(
                        "parameters {} and {name} are one variable; leave one out, or each step updates it twice",
                        same.name
                    )));
                }
                if let Some(first) = slots.first() {
                    check::same_device(&name, &var, &first.name, first.var.device())?;
                }
                slots.push(Slot::new(name, var, weight_decay)?);
            }
        }
        Ok(Self {
            #[cfg(feature = "cuda")]
            plan: cuda::adamw::Plan::new(&slots)?,
            config,
            slots,
            step: 0,
        })
    }

    /// Number of steps so far.
    pub fn steps(&self) -> usize {
        self.step
    }

    /// Updates every parameter. Returns the global norm of the gradients before clipping: a scalar, f32 (f64 if the first
    /// parameter is f64), still on the device.
    ///
    /// # Errors
    /// If a parameter has no gradient, or one of another shape or device; if `lr` is negative or not finite. Then no parameter has
    /// changed.
    pub fn step(&mut self, gradients: &GradStore, lr: f64) -> Result<Tensor> {
        check::not_negative("lr", lr)?;
        let gradients = self.gradients(gradients)?;
        self.step += 1;
        #[cfg(feature = "cuda")]
        if let Some(plan) = &self.plan {
            return plan.step(&self.slots, &gradients, &self.rules(lr), self.config.max_norm);
        }
        match self.slots.first() {
            Some(first) if !first.var.device().is_cpu() => self.composed_step(&gradients, lr),
            _ => self.fused_step(&gradients, lr),
        }
    }

    /// The gradient of each parameter, contiguous and in its type. A sum over several batches may be in a wider one.
    fn gradients(&self, gradients: &GradStore) -> Result<Vec<Tensor>> {
        let without = self.slots.iter().filter(|slot| gradients.get(&slot.var).is_none());
        let missing: Vec<&str> = without.map(|slot| &*slot.name).collect();
        if !missing.is_empty() {
            return Err(check::error(format!(
                "{} of {} parameters have no gradient: {}; an operator on their way to the loss drops it, or they should not \
                 be in the optimizer",
                missing.len(),
                self.slots.len(),
                missing.join(", ")
            )));
        }
        let checked = |Slot { name, var, .. }: &Slot| {
            let (gradient, of) = (gradients.get(var).expect("none is missing"), format!("the gradient of {name}"));
            check::shape(&of, gradient, var.dims(), "as the parameter")?;
            check::same_device(&of, gradient, "the parameter", var.device())?;
            check::float(&of, gradient)?;
            gradient.to_dtype(var.dtype())?.contiguous()
        };
        self.slots.iter().map(checked).collect()
    }

    fn rules(&self, lr: f64) -> Vec<Rule> {
        self.slots.iter().map(|slot| self.rule(slot, lr)).collect()
    }

    fn rule(&self, slot: &Slot, lr: f64) -> Rule {
        let AdamWConfig { beta1, beta2, epsilon, .. } = self.config;
        let [c1, c2] = [beta1, beta2].map(|beta| 1.0 - beta.powf(self.step as f64));
        let root = c2.sqrt();
        Rule { beta1, beta2, keep: 1.0 - lr * slot.weight_decay, rate: lr / c1 * root, epsilon: epsilon * root }
    }

    fn fused_step(&self, gradients: &[Tensor], lr: f64) -> Result<Tensor> {
        let mut squares = 0.0;
        for gradient in gradients {
            squares += for_float!(gradient.dtype(), T => sum_of_squares::<T>(Numbers::of(gradient).as_slice()?));
        }
        let norm = f64::sqrt(squares);
        let factor = match self.config.max_norm {
            Some(limit) if norm > limit => limit / norm,
            _ => 1.0,
        };
        for (slot, gradient) in self.slots.iter().zip(gradients) {
            for_float!(slot.var.dtype(), T => slot.update::<T>(gradient, factor, &self.rule(slot, lr))?);
        }
        let dtype = self.slots.first().map_or(DType::F32, |slot| slot.m.dtype());
        Tensor::new(norm, &Device::Cpu)?.to_dtype(dtype)
    }

    fn composed_step(&mut self, gradients: &[Tensor], lr: f64) -> Result<Tensor> {
        let norm = composed::global_norm(gradients)?;
        let factor = match self.config.max_norm {
            Some(limit) => Some(composed::clipping(&norm, limit)?),
            None => None,
        };
        for (rule, (slot, gradient)) in self.rules(lr).iter().zip(self.slots.iter_mut().zip(gradients)) {
            composed::adamw(slot, gradient, factor.as_ref(), rule)?;
        }
        Ok(norm)
    }

    /// Everything that training needs to go on: for each parameter `NAME` its weights, `NAME.m` and `NAME.v`; and `adamw.step`.
    /// The weights of a parameter in f16 or bf16 are the master weights. The tensors are copies.
    ///
    /// # Errors
    /// If Candle cannot copy a tensor.
    pub fn state(&self) -> Result<HashMap<String, Tensor>> {
        let copy = |(name, tensor): (String, Tensor)| Ok((name, tensor.force_contiguous()?));
        self.tensors()?.into_iter().map(copy).collect()
    }

    /// Sets the state that [`Self::state`] returned, and with it the parameters.
    ///
    /// # Errors
    /// If a tensor is missing, left over, or has another shape or type; then nothing has changed.
    pub fn set_state(&mut self, state: &HashMap<String, Tensor>) -> Result<()> {
        let mut known = BTreeSet::new();
        for (name, tensor) in self.tensors()? {
            let new = state.get(&name).ok_or_else(|| check::error(format!("the state has no tensor {name}")))?;
            check::shape(&name, new, tensor.dims(), "as its parameter")?;
            if new.dtype() != tensor.dtype() {
                let (expected, got) = (tensor.dtype(), new.dtype());
                return Err(check::error(format!("{name}: dtype must be {expected:?}, got {got:?}")));
            }
            known.insert(name);
        }
        if let Some(name) = state.keys().filter(|name| !known.contains(*name)).min() {
            return Err(check::error(format!("the state has a tensor {name} that no parameter of the optimizer uses")));
        }
        let step = usize::try_from(state[STEP].to_scalar::<i64>()?)
            .map_err(|_| check::error(format!("{STEP}: must be at least 0 in the state")))?;
        for slot in &mut self.slots {
            slot.set_state(state)?;
        }
        self.step = step;
        Ok(())
    }

    /// Writes [`Self::state`] as a safetensors file, with `metadata` in its header: the settings of a run, for example. An
    /// earlier file stays until the new one is complete and on the disk. A process that is killed meanwhile may leave a
    /// temporary file: `PATH.tmp`, or `.tmp` and six letters.
    ///
    /// # Errors
    /// If the file cannot be written: [`Error::Io`].
    pub fn save(&self, path: impl AsRef<Path>, metadata: HashMap<String, String>) -> Result<()> {
        let path = path.as_ref();
        let complete = [path.as_os_str(), ".tmp".as_ref()].into_iter().collect::<OsString>();
        let written = safetensors::serialize_to_file(self.tensors()?, Some(metadata), complete.as_ref())
            .map_err(|error| match error {
                SafeTensorError::IoError(error) => Error::Io(error),
                error => error.into(),
            })
            // Opened for writing, because Windows flushes no other file.
            .and_then(|()| Ok(File::options().write(true).open(&complete)?.sync_all()?))
            .and_then(|()| Ok(fs::rename(&complete, path)?));
        if written.is_err() {
            let _ = fs::remove_file(&complete); // the error is in `written`
        }
        written
    }

    /// Reads a file of [`Self::save`].
    ///
    /// # Errors
    /// If the file cannot be read, and as [`Self::set_state`].
    pub fn load(&mut self, path: impl AsRef<Path>) -> Result<()> {
        self.set_state(&candle_core::safetensors::load(path, &Device::Cpu)?)
    }

    /// The tensors of [`Self::state`], not copied.
    fn tensors(&self) -> Result<Vec<(String, Tensor)>> {
        let step = (STEP.to_string(), Tensor::new(self.step as i64, &Device::Cpu)?);
        Ok(self.slots.iter().flat_map(Slot::state).chain([step]).collect())
    }
}

impl AdamWConfig {
    fn check(&self) -> Result<()> {
        for (name, beta) in [("beta1", self.beta1), ("beta2", self.beta2)] {
            if !(0.0..1.0).contains(&beta) {
                return Err(check::error(format!("{name} must be at least 0 and below 1, got {beta}")));
            }
        }
        check::not_negative("epsilon", self.epsilon)?;
        match self.max_norm {
            Some(limit) => check::not_negative("max_norm", limit),
            None => Ok(()),
        }
    }
}

impl Slot {
    fn new(name: String, var: Var, weight_decay: f64) -> Result<Self> {
        let wide = accumulator(var.dtype());
        let master = if var.dtype() == wide { None } else { Some(var.detach().to_dtype(wide)?) };
        let zeros = || Tensor::zeros(var.shape(), wide, var.device());
        let (m, v) = (zeros()?, zeros()?);
        Ok(Self { name, var, master, m, v, weight_decay })
    }

    fn state(&self) -> [(String, Tensor); 3] {
        let weights = self.master.as_ref().unwrap_or(&self.var);
        let tensors = [weights, &self.m, &self.v];
        std::array::from_fn(|i| (format!("{}{}", self.name, PARTS[i]), tensors[i].clone()))
    }

    /// Copies the checked tensors of this parameter.
    fn set_state(&mut self, state: &HashMap<String, Tensor>) -> Result<()> {
        // A copy, because a step changes these tensors in place.
        let [weights, m, v] =
            PARTS.map(|part| state[&format!("{}{part}", self.name)].to_device(self.var.device())?.force_contiguous());
        let (weights, m, v) = (weights?, m?, v?);
        self.var.set(&weights.to_dtype(self.var.dtype())?)?;
        self.master = self.master.is_some().then_some(weights);
        (self.m, self.v) = (m, v);
        Ok(())
    }

    /// One pass over the gradient, both moments and the weights.
    fn update<T: Element>(&self, gradient: &Tensor, factor: f64, rule: &Rule) -> Result<()> {
        let gradient = Numbers::of(gradient);
        let gradient = gradient.as_slice::<T>()?;
        update::<T::Acc, _>(&self.m, |m| {
            update::<T::Acc, _>(&self.v, |v| match &self.master {
                Some(master) => update::<T::Acc, _>(master, |w| {
                    update::<T, _>(&self.var, |rounded| pass(Parts { w, m, v, rounded }, gradient, factor, rule))
                })?,
                None => update::<T::Acc, _>(&self.var, |w| {
                    pass(Parts { w, m, v, rounded: &mut [] }, gradient, factor, rule)
                }),
            })
        })??
    }
}

/// The slices that a step changes. `rounded` is empty if the weights themselves are the parameter.
struct Parts<'a, T: Element> {
    w: &'a mut [T::Acc],
    m: &'a mut [T::Acc],
    v: &'a mut [T::Acc],
    rounded: &'a mut [T],
}

/// Elements per task. In the type of the sums they are on the stack: 16 KiB of f32, 32 KiB of f64. Not tuned yet.
const CHUNK: usize = 1 << 12;

fn pass<T: Element>(Parts { w, m, v, rounded }: Parts<T>, gradient: &[T], factor: f64, rule: &Rule) {
    let real = |value: f64| T::Acc::real(value);
    let (beta1, beta2) = (real(rule.beta1), real(rule.beta2));
    let (of_gradient, of_square) = (real((1.0 - rule.beta1) * factor), real((1.0 - rule.beta2) * factor * factor));
    let (keep, rate, epsilon) = (real(rule.keep), real(rule.rate), real(rule.epsilon));
    let mut rounded = rounded.chunks_mut(CHUNK);
    let rounded: Vec<&mut [T]> = (0..w.len().div_ceil(CHUNK)).map(|_| rounded.next().unwrap_or_default()).collect();
    w.par_chunks_mut(CHUNK)
        .zip(m.par_chunks_mut(CHUNK).zip(v.par_chunks_mut(CHUNK)))
        .zip(gradient.par_chunks(CHUNK).zip(rounded))
        .for_each(|((w, (m, v)), (gradient, rounded))| {
            let mut wide = [T::Acc::ZERO; CHUNK];
            let g = &mut wide[..gradient.len()];
            T::widen(gradient, g);
            for (((w, m), v), &mut g) in w.iter_mut().zip(m).zip(v).zip(g) {
                *m = beta1 * *m + of_gradient * g;
                *v = beta2 * *v + of_square * g * g;
                *w = keep * *w - rate * *m / (v.sqrt() + epsilon);
            }
            if !rounded.is_empty() {
                T::narrow(w, rounded);
            }
        });
}

/// Each chunk in the accumulator type, and the chunks in f64 and in order.
fn sum_of_squares<T: Element>(gradient: &[T]) -> f64 {
    let sums: Vec<T::Acc> = gradient
        .par_chunks(CHUNK)
        .map(|gradient| {
            let mut wide = [T::Acc::ZERO; CHUNK];
            T::widen(gradient, &mut wide[..gradient.len()]);
            sum(&wide[..gradient.len()], |g| g * g)
        })
        .collect();
    sum_in_f64(&sums)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The steps of other devices, run on the CPU, agree with the fused ones.
    #[test]
    fn composed_steps_agree_with_fused_ones() -> Result<()> {
        for (dtype, limit) in [(DType::F64, 4.0 * f64::EPSILON), (DType::BF16, 4.0 * f64::from(f32::EPSILON))] {
            let [mut fused, mut composed] = [(); 2].map(|()| {
                let var = Var::from_tensor(&Tensor::arange(-2f64, 2.0, &Device::Cpu)?.to_dtype(dtype)?)?;
                let group = ParameterGroup { parameters: vec![("w".to_string(), var)], weight_decay: 0.1 };
                AdamW::new([group], AdamWConfig { max_norm: Some(1.0), ..Default::default() })
            });
            let (fused, composed) = (fused.as_mut().expect("valid"), composed.as_mut().expect("valid"));
            for step in 1..=5 {
                // Norms of 0.6 to 3: some steps clip.
                let gradient = Tensor::new(&[0.1, -0.2, 0.3, 0.5], &Device::Cpu)?.to_dtype(dtype)?;
                let gradient = [(gradient * step as f64)?];
                (fused.step, composed.step) = (step, step);
                let norms = [fused.fused_step(&gradient, 0.01)?, composed.composed_step(&gradient, 0.01)?];
                assert_eq!(norms[0].dtype(), norms[1].dtype());
            }
            let vectors = |optimizer: &AdamW| -> Result<Vec<Vec<f64>>> {
                let tensors = optimizer.slots[0].state().map(|(_, tensor)| tensor).into_iter();
                tensors.chain([optimizer.slots[0].var.detach()]).map(|t| t.to_dtype(DType::F64)?.to_vec1()).collect()
            };
            for (a, b) in vectors(fused)?.iter().flatten().zip(vectors(composed)?.iter().flatten()) {
                assert!((a - b).abs() <= limit * a.abs(), "{a} and {b} in {dtype:?}");
            }
        }
        Ok(())
    }

    /// The non-finite elements of the documentation of [`AdamW`], with and without clipping.
    #[test]
    fn a_nonfinite_gradient_element_stays_alone() -> Result<()> {
        for (nonfinite, max_norm) in [f32::NAN, f32::INFINITY].into_iter().flat_map(|x| [(x, None), (x, Some(1.0))]) {
            let var = Var::new(&[1f32, 1.0], &Device::Cpu)?;
            let group = ParameterGroup { parameters: vec![("w".to_string(), var.clone())], weight_decay: 0.0 };
            let mut optimizer = AdamW::new([group], AdamWConfig { max_norm, ..Default::default() })?;
            let loss = (var.as_tensor() * Tensor::new(&[nonfinite, 1.0], &Device::Cpu)?)?.sum_all()?;
            optimizer.step(&loss.backward()?, 0.1)?;
            let [w, m, v] = optimizer.slots[0].state().map(|(_, tensor)| tensor.to_vec1::<f32>().expect("f32"));
            assert!(w[0].is_nan() && !m[0].is_finite() && !v[0].is_finite(), "{w:?} {m:?} {v:?}");
            assert!(w[1].is_finite() && m[1].is_finite() && v[1].is_finite(), "{w:?} {m:?} {v:?}");
            assert_eq!(w[1] == 1.0, nonfinite == f32::INFINITY && max_norm.is_some());
        }
        Ok(())
    }
}
