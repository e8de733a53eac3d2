//! Linear layers whose bias, GELU and residual are part of one node.

mod cpu;

use candle_core::{Result, Storage, Tensor};

#[cfg(feature = "cuda")]
use crate::cuda;
use crate::{check, composed, node};

/// `x weight^T + bias` with its backward, as one node.
///
/// ```text
/// y = x weight^T + bias          dx = dy weight          dweight = dy^T x          dbias = sum over rows of dy
/// ```
///
/// | tensor | shape | type |
/// | --- | --- | --- |
/// | `x` | `(.., inputs)` | f16, bf16, f32, f64 |
/// | `weight` | `(outputs, inputs)`, as `candle_nn::Linear` has it | as `x` |
/// | `bias` | `(outputs)` | as `x` |
/// | result | `(.., outputs)` | as `x` |
///
/// `inputs` and `outputs` may be several axes each, for example heads and head_dim: the axes of `weight` are those of `bias`, then
/// the last axes of `x`. So no reshape is needed around attention.
///
/// On the CPU, Candle's matrix product runs, and the bias is added in place. For f16 and bf16 it is an f32 product, and the result
/// is rounded once, after the bias. On a GPU, cuBLASLt adds the bias while the product is in registers; see
/// [`measure_products`](crate::measure_products) for how it chooses an algorithm. Its tensor cores need `inputs` and `outputs` in
/// multiples of 8; with others, and for f64, the operator is composed of Candle's.
///
/// # Errors
/// If shapes, types or devices disagree.
///
/// ```
/// # use candle_core::{DType, Device, Tensor, Var};
/// let x = Tensor::randn(0f32, 1f32, (2, 3, 4), &Device::Cpu)?;
/// let weight = Var::randn(0f32, 1f32, (5, 4), &Device::Cpu)?;
/// let bias = Var::zeros(5, DType::F32, &Device::Cpu)?;
/// let grads = candle_fused_ops::linear(&x, &weight, &bias)?.sum_all()?.backward()?;
/// assert!(grads.get(&weight).is_some() && grads.get(&bias).is_some());
/// # Ok::<(), candle_core::Error>(())
/// ```
pub fn linear(x: &Tensor, weight: &Tensor, bias: &Tensor) -> Result<Tensor> {
    check_layer(NAMES, x.dims(), [x, weight, bias])?;
    match products(x, &[(weight, bias)]) {
        Some(products) => affine(products, x, weight, bias, None),
        None => composed::linear(x, weight, bias),
    }
}

/// `residual + linear(x)`, as one node. The sum is rounded once.
///
/// `residual` has the shape of the result. Its gradient is dy itself. See [`linear`].
///
/// # Errors
/// As [`linear`], and if `residual` has another shape, type or device than the result.
pub fn linear_add(x: &Tensor, weight: &Tensor, bias: &Tensor, residual: &Tensor) -> Result<Tensor> {
    check_layer(NAMES, x.dims(), [x, weight, bias])?;
    check_residual(residual, &result_shape(x, weight, bias), x)?;
    match products(x, &[(weight, bias)]) {
        Some(products) => affine(products, x, weight, bias, Some(residual)),
        None => residual + composed::linear(x, weight, bias)?,
    }
}

/// [`gelu`](crate::gelu) of [`linear`], as one node. The node keeps `h = x weight^T + bias` for the backward, on the CPU in f32
/// for f16 and bf16.
///
/// # Errors
/// As [`linear`].
pub fn linear_gelu(x: &Tensor, weight: &Tensor, bias: &Tensor) -> Result<Tensor> {
    check_layer(NAMES, x.dims(), [x, weight, bias])?;
    let Some(products) = products(x, &[(weight, bias)]) else {
        return composed::gelu(&composed::linear(x, weight, bias)?);
    };
    let shape = result_shape(x, weight, bias);
    let (h, y) = products.affine_gelu(&Layer::of(x, weight, bias)?)?;
    node::node("linear_gelu", &[x, weight, bias], y, shape, move |inputs, dy| {
        let &[x, weight, bias] = inputs else { unreachable!("the node has three inputs") };
        let layer = Layer::of(x, weight, bias)?;
        let dh = products.through_gelu(&layer.rows_of(dy)?, &h)?;
        layer.gradients(products, &dh, [x, weight, bias])
    })
}

/// The MLP of a transformer with its residual, `residual + proj(gelu(fc(x)))`, as one node.
///
/// ```text
/// h = x Wf^T + bf          y = residual + gelu(h) Wp^T + bp          dh = (dy Wp) gelu'(h)
/// ```
///
/// `fc` and `proj` are a weight and a bias each; see [`linear`] for their shapes. On a GPU, GELU and its slope are parts of the
/// matrix products. The node keeps h and gelu(h).
///
/// # Errors
/// As [`linear_add`].
///
/// ```
/// # use candle_core::{DType, Device, Tensor, Var};
/// # let device = Device::Cpu;
/// let x = Tensor::randn(0f32, 1f32, (3, 4), &device)?;
/// let [fc, proj] = [Var::randn(0f32, 1f32, (16, 4), &device)?, Var::randn(0f32, 1f32, (4, 16), &device)?];
/// let [bf, bp] = [Var::zeros(16, DType::F32, &device)?, Var::zeros(4, DType::F32, &device)?];
/// let y = candle_fused_ops::mlp_add(&x, [&fc, &bf], [&proj, &bp], &x)?;
/// assert!(y.sum_all()?.backward()?.get(&fc).is_some());
/// # Ok::<(), candle_core::Error>(())
/// ```
pub fn mlp_add(x: &Tensor, fc: [&Tensor; 2], proj: [&Tensor; 2], residual: &Tensor) -> Result<Tensor> {
    let ([fc_weight, fc_bias], [proj_weight, proj_bias]) = (fc, proj);
    check_layer(["x", "the weight of fc", "the bias of fc"], x.dims(), [x, fc_weight, fc_bias])?;
    let hidden = result_shape(x, fc_weight, fc_bias);
    let names = ["the result of fc", "the weight of proj", "the bias of proj"];
    check_layer(names, &hidden, [x, proj_weight, proj_bias])?;
    let shape = [&hidden[..hidden.len() - fc_bias.rank()], proj_bias.dims()].concat();
    check_residual(residual, &shape, x)?;
    let Some(products) = products(x, &[(fc_weight, fc_bias), (proj_weight, proj_bias)]) else {
        let g = composed::gelu(&composed::linear(x, fc_weight, fc_bias)?)?;
        return residual + composed::linear(&g, proj_weight, proj_bias)?;
    };
    let (h, g) = products.affine_gelu(&Layer::of(x, fc_weight, fc_bias)?)?;
    let g = node::untracked(g, hidden);
    let y = products.affine(&Layer::of(&g, proj_weight, proj_bias)?, Some(residual))?;
    let inputs = [x, fc_weight, fc_bias, proj_weight, proj_bias, residual];
    node::node("mlp_add", &inputs, y, shape, move |inputs, dy| {
        let &[x, fc_weight, fc_bias, proj_weight, proj_bias, _] = inputs else {
            unreachable!("the node has six inputs")
        };
        let (fc, proj) = (Layer::of(x, fc_weight, fc_bias)?, Layer::of(&g, proj_weight, proj_bias)?);
        let rows = proj.rows_of(dy)?;
        let dh = products.product_through_gelu(&rows, &proj.weight, &h)?;
        let mut gradients = fc.gradients(products, &dh, [x, fc_weight, fc_bias])?;
        gradients.extend(proj.gradients(products, &rows, [&g, proj_weight, proj_bias])?.into_iter().skip(1));
        gradients.push(Some(dy.clone()));
        Ok(gradients)
    })
}

/// Whether the first product of each shape on a GPU measures which algorithm of cuBLASLt is the fastest. It does by default.
///
/// The measurement waits for the GPU, so it cannot be part of a CUDA graph: run a step before the graph is recorded. Each thread
/// keeps the algorithms that it has chosen. Algorithms differ in the order of their sums, and two processes may choose differently.
/// With `false`, cuBLASLt's first suggestion is taken, and every process gets the same bits on the same GPU and library. Set it
/// before the first product.
pub fn measure_products(measure: bool) {
    #[cfg(feature = "cuda")]
    cuda::linear::measure_products(measure);
    let _ = measure;
}

const NAMES: [&str; 3] = ["x", "weight", "bias"];

/// The axes of `weight` are those of `bias`, then the last ones of `dims`. Types and devices are those of `x`.
fn check_layer(names: [&str; 3], dims: &[usize], [x, weight, bias]: [&Tensor; 3]) -> Result<()> {
    check::float("x", x)?;
    match weight.dims().strip_prefix(bias.dims()) {
        Some(inputs) if !inputs.is_empty() && weight.elem_count() > 0 && dims.ends_with(inputs) => {}
        _ => {
            return Err(check::error(format!(
                "{}: axes must be those of {}, {:?}, then the last of {}, {dims:?}, and none empty, got {:?}",
                names[1],
                names[2],
                bias.dims(),
                names[0],
                weight.dims()
            )))
        }
    }
    check::same(names[1], weight, "x", x)?;
    check::same(names[2], bias, "x", x)
}

fn check_residual(residual: &Tensor, shape: &[usize], x: &Tensor) -> Result<()> {
    check::shape("residual", residual, shape, "as the result")?;
    check::same("residual", residual, "x", x)
}

/// The axes of `x` that are not summed over, then those of `bias`.
pub(crate) fn result_shape(x: &Tensor, weight: &Tensor, bias: &Tensor) -> Vec<usize> {
    let leading = &x.dims()[..x.rank() - (weight.rank() - bias.rank())];
    [leading, bias.dims()].concat()
}

/// `affine` of a layer, with the node.
fn affine(
    products: &'static dyn Products,
    x: &Tensor,
    weight: &Tensor,
    bias: &Tensor,
    residual: Option<&Tensor>,
) -> Result<Tensor> {
    let shape = result_shape(x, weight, bias);
    let y = products.affine(&Layer::of(x, weight, bias)?, residual)?;
    let name = if residual.is_some() { "linear_add" } else { "linear" };
    let inputs: Vec<&Tensor> = [Some(x), Some(weight), Some(bias), residual].into_iter().flatten().collect();
    node::node(name, &inputs, y, shape, move |inputs, dy| {
        let layer = Layer::of(inputs[0], inputs[1], inputs[2])?;
        let mut gradients = layer.gradients(products, &layer.rows_of(dy)?, [inputs[0], inputs[1], inputs[2]])?;
        gradients.extend(inputs.get(3).map(|_| Some(dy.clone())));
        Ok(gradients)
    })
}

/// The operands of a layer as contiguous matrices without their graphs.
pub(crate) struct Layer {
    pub(crate) x: Tensor,      // (rows, inputs)
    pub(crate) weight: Tensor, // (outputs, inputs)
    pub(crate) bias: Tensor,   // (outputs)
}

impl Layer {
    fn of(x: &Tensor, weight: &Tensor, bias: &Tensor) -> Result<Self> {
        let outputs = bias.elem_count();
        let inputs = weight.elem_count() / outputs;
        Ok(Self {
            x: x.detach().contiguous()?.reshape(((), inputs))?,
            weight: weight.detach().contiguous()?.reshape((outputs, inputs))?,
            bias: bias.detach().contiguous()?.flatten_all()?,
        })
    }

    /// A tensor like the result as (rows, outputs).
    fn rows_of(&self, y: &Tensor) -> Result<Tensor> {
        y.detach().contiguous()?.reshape(((), self.bias.elem_count()))
    }

    /// The gradients of `x`, `weight` and `bias`, which the operands come from, for the gradient `dh` of `x weight^T + bias`.
    fn gradients(
        &self,
        products: &dyn Products,
        dh: &Tensor,
        [x, weight, bias]: [&Tensor; 3],
    ) -> Result<Vec<Option<Tensor>>> {
        let dx = match x.track_op() {
            true => Some(products.input_gradient(dh, &self.weight)?.reshape(x.shape())?),
            false => None,
        };
        if !weight.track_op() && !bias.track_op() {
            return Ok(vec![dx, None, None]);
        }
        let (dweight, dbias) = products.weight_gradients(dh, &self.x)?;
        Ok(vec![dx, Some(dweight.reshape(weight.shape())?), Some(dbias.reshape(bias.shape())?)])
    }
}

/// Matrix products with what comes before and after them, on one kind of device.
///
/// Results and gradients have the type of their operands. `h`, and a `dh` computed from it, may have a wider one.
pub(crate) trait Products: Sync {
    /// x weight^T + bias, plus `residual` if there is one: (rows, outputs)
    fn affine(&self, layer: &Layer, residual: Option<&Tensor>) -> Result<Storage>;

    /// h = x weight^T + bias, and gelu(h): both (rows, outputs)
    fn affine_gelu(&self, layer: &Layer) -> Result<(Tensor, Storage)>;

    /// dg gelu'(h)
    fn through_gelu(&self, dg: &Tensor, h: &Tensor) -> Result<Tensor>;

    /// (dy weight) gelu'(h), for the weight (outputs, inputs) of the layer after the GELU
    fn product_through_gelu(&self, dy: &Tensor, weight: &Tensor, h: &Tensor) -> Result<Tensor>;

    /// dh weight
    fn input_gradient(&self, dh: &Tensor, weight: &Tensor) -> Result<Tensor>;

    /// dh^T x, and the sum of dh over the rows
    fn weight_gradients(&self, dh: &Tensor, x: &Tensor) -> Result<(Tensor, Tensor)>;
}

/// Who computes layers with these weights and biases. `None` if they are composed of Candle's operators.
fn products(x: &Tensor, layers: &[(&Tensor, &Tensor)]) -> Option<&'static dyn Products> {
    if x.device().is_cpu() {
        return Some(&cpu::Cpu);
    }
    #[cfg(feature = "cuda")]
    if cuda::linear::supports(x, layers) {
        return Some(&cuda::linear::CublasLt);
    }
    let _ = layers;
    None
}
