//! Norms as modules, with the names of candle_nn's parameters.

use candle_core::{Result, Tensor};
use candle_nn::{Init, Module, VarBuilder};

use crate::{add_layer_norm, add_rms_norm, layer_norm, rms_norm};

/// [`layer_norm`] with its parameters. It replaces `candle_nn::LayerNorm`, and gradients flow through it.
///
/// ```
/// # use candle_core::{DType, Device, Tensor};
/// # use candle_nn::{Module, VarBuilder, VarMap};
/// let variables = VarMap::new();
/// let vb = VarBuilder::from_varmap(&variables, DType::F32, &Device::Cpu);
/// let norm = candle_fused_ops::LayerNorm::load(8, 1e-5, vb.pp("ln_1"))?; // ln_1.weight, ln_1.bias
/// let y = norm.forward(&Tensor::randn(0f32, 1f32, (2, 8), &Device::Cpu)?)?;
/// let grads = y.sum_all()?.backward()?;
/// assert!(variables.all_vars().iter().all(|var| grads.get(var).is_some()));
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct LayerNorm {
    weight: Tensor,
    bias: Option<Tensor>,
    eps: f64,
}

impl LayerNorm {
    /// A layer norm with these parameters, both `(width)`.
    pub fn new(weight: Tensor, bias: Option<Tensor>, eps: f64) -> Self {
        Self { weight, bias, eps }
    }

    /// Loads `weight` and `bias`. As in candle_nn, old checkpoints may call them `gamma` and `beta`. New variables are 1 and 0.
    ///
    /// # Errors
    /// If a tensor is missing or has another shape.
    pub fn load(width: usize, eps: f64, vb: VarBuilder) -> Result<Self> {
        let bias = vb.get_with_hints(width, name(&vb, ["bias", "beta"]), Init::Const(0.0))?;
        Ok(Self { bias: Some(bias), ..Self::load_without_bias(width, eps, vb)? })
    }

    /// As [`Self::load`], without a bias.
    ///
    /// # Errors
    /// If the weight is missing or has another shape.
    pub fn load_without_bias(width: usize, eps: f64, vb: VarBuilder) -> Result<Self> {
        let weight = vb.get_with_hints(width, name(&vb, ["weight", "gamma"]), Init::Const(1.0))?;
        Ok(Self { weight, bias: None, eps })
    }

    /// `(x + residual, norm of it)`: [`add_layer_norm`].
    ///
    /// # Errors
    /// As [`add_layer_norm`].
    pub fn forward_add(&self, x: &Tensor, residual: &Tensor) -> Result<(Tensor, Tensor)> {
        add_layer_norm(x, residual, &self.weight, self.bias.as_ref(), self.eps)
    }

    /// The weight, `(width)`.
    pub fn weight(&self) -> &Tensor {
        &self.weight
    }

    /// The bias, `(width)`.
    pub fn bias(&self) -> Option<&Tensor> {
        self.bias.as_ref()
    }
}

impl Module for LayerNorm {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        layer_norm(x, &self.weight, self.bias.as_ref(), self.eps)
    }
}

/// [`rms_norm`] with its parameter. It replaces `candle_nn::RmsNorm`, and gradients flow through it.
#[derive(Clone, Debug)]
pub struct RmsNorm {
    weight: Tensor,
    eps: f64,
}

impl RmsNorm {
    /// An RMS norm with this weight, `(width)`.
    pub fn new(weight: Tensor, eps: f64) -> Self {
        Self { weight, eps }
    }

    /// Loads `weight`, or `gamma` of an old checkpoint. A new variable is 1.
    ///
    /// # Errors
    /// If the weight is missing or has another shape.
    pub fn load(width: usize, eps: f64, vb: VarBuilder) -> Result<Self> {
        let weight = vb.get_with_hints(width, name(&vb, ["weight", "gamma"]), Init::Const(1.0))?;
        Ok(Self { weight, eps })
    }

    /// `(x + residual, norm of it)`: [`add_rms_norm`].
    ///
    /// # Errors
    /// As [`add_rms_norm`].
    pub fn forward_add(&self, x: &Tensor, residual: &Tensor) -> Result<(Tensor, Tensor)> {
        add_rms_norm(x, residual, &self.weight, self.eps)
    }

    /// The weight, `(width)`.
    pub fn weight(&self) -> &Tensor {
        &self.weight
    }
}

impl Module for RmsNorm {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        rms_norm(x, &self.weight, self.eps)
    }
}

/// The first name that the checkpoint has, else the first of all.
fn name<'a>(vb: &VarBuilder, names: [&'a str; 2]) -> &'a str {
    names.into_iter().find(|name| vb.contains_tensor(name)).unwrap_or(names[0])
}
