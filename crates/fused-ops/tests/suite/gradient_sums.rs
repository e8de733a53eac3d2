//! The sum of the gradients of one tensor, which the backward of a norm computes if one of them waits for it.

use anyhow::{ensure, Result};
use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CudaStorage, CustomOp1, DType, Device, Layout, Shape, Tensor, Var};
use candle_fused_ops::{self as fused, backward_once, composed};

use crate::close::relative;
use crate::run::{bits, precision, random, DTYPES};

type View = fn(&Tensor) -> candle_core::Result<Tensor>;

/// Hands its input on, and a view of its gradient back.
struct GradientView(View);

impl CustomOp1 for GradientView {
    fn name(&self) -> &'static str {
        "gradient_view"
    }
    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        Ok((x.try_clone(layout)?, layout.shape().clone()))
    }
    fn cuda_fwd(&self, x: &CudaStorage, layout: &Layout) -> candle_core::Result<(CudaStorage, Shape)> {
        Ok((x.try_clone(layout)?, layout.shape().clone()))
    }
    fn bwd(&self, _: &Tensor, _: &Tensor, dy: &Tensor) -> candle_core::Result<Option<Tensor>> {
        Ok(Some((self.0)(dy)?))
    }
}

/// A view with gaps.
fn gaps(dy: &Tensor) -> candle_core::Result<Tensor> {
    dy.pad_with_zeros(1, 1, 2)?.narrow(1, 1, dy.dim(1)?)
}

/// A view without gaps that does not begin at 16 bytes.
fn later(dy: &Tensor) -> candle_core::Result<Tensor> {
    dy.flatten_all()?.pad_with_zeros(0, 1, 0)?.narrow(0, 1, dy.elem_count())?.reshape(dy.shape())
}

/// The fused operators, or Candle's.
struct Operators {
    gelu: fn(&Tensor) -> candle_core::Result<Tensor>,
    layer_norm: fn(&Tensor, &Tensor, Option<&Tensor>, f64) -> candle_core::Result<Tensor>,
    rms_norm: fn(&Tensor, &Tensor, f64) -> candle_core::Result<Tensor>,
    linear_add: fn(&Tensor, &Tensor, &Tensor, &Tensor) -> candle_core::Result<Tensor>,
    gradient_view: fn(&Tensor, View) -> candle_core::Result<Tensor>,
}

const FUSED: Operators = Operators {
    gelu: fused::gelu,
    layer_norm: fused::layer_norm,
    rms_norm: fused::rms_norm,
    linear_add: fused::linear_add,
    gradient_view: |x, view| fused::apply_op1(x, GradientView(view)),
};

const COMPOSED: Operators = Operators {
    gelu: composed::gelu,
    layer_norm: composed::layer_norm,
    rms_norm: composed::rms_norm,
    linear_add: |x, weight, bias, residual| residual + composed::linear(x, weight, bias)?,
    gradient_view: |x, _| Ok(x.clone()),
};

const EPS: f64 = 1e-5;

/// From (rows, width), two vectors, and a matrix in [`BLOCKS`], to (rows, width).
type Graph = fn(&Operators, &[Tensor]) -> candle_core::Result<Tensor>;

/// `x` is a result of this crate, so gradients of it wait.
const SUMS: &[(&str, Graph)] = &[
    ("a sum of Candle", |op, t| {
        let x = (op.gelu)(&t[0])?;
        &x + (op.layer_norm)(&x, &t[1], None, EPS)?
    }),
    ("a sum of Candle, the norm first", |op, t| {
        let x = (op.gelu)(&t[0])?;
        (op.layer_norm)(&x, &t[1], None, EPS)? + &x
    }),
];

/// Likewise, with products of matrices.
const BLOCKS: &[(&str, Graph)] = &[
    ("two blocks of a transformer", |op, t| {
        let x = (op.gelu)(&t[0])?;
        let y = (op.linear_add)(&(op.layer_norm)(&x, &t[1], Some(&t[2]), EPS)?, &t[3], &t[2], &x)?;
        (op.linear_add)(&(op.rms_norm)(&y, &t[1], EPS)?, &t[3], &t[2], &y)
    }),
    ("many uses", |op, t| {
        let x = (op.gelu)(&t[0])?;
        let norms = ((op.rms_norm)(&x, &t[1], EPS)? + (op.layer_norm)(&x, &t[2], Some(&t[1]), EPS)?)?;
        let y = (op.linear_add)(&x, &t[3], &t[2], &x)?;
        ((op.rms_norm)(&y, &t[1], EPS)? + norms)? + (x.sqr()? + (op.gelu)(&y)?)?
    }),
    ("views with gaps", |op, t| {
        let x = (op.gelu)(&t[0])?;
        (op.linear_add)(&(op.rms_norm)(&x, &t[1], EPS)?, &t[3], &t[2], &(op.gradient_view)(&x, gaps)?)
    }),
    ("views that begin later", |op, t| {
        let x = (op.gelu)(&t[0])?;
        (op.linear_add)(&(op.rms_norm)(&x, &t[1], EPS)?, &t[3], &t[2], &(op.gradient_view)(&x, later)?)
    }),
];

/// x, weight and bias.
fn vectors(dtype: DType, (rows, width): (usize, usize)) -> Result<Vec<Tensor>> {
    Ok(vec![random("x", &[rows, width], dtype)?, random("weight", &[width], dtype)?, random("bias", &[width], dtype)?])
}

pub fn sums_match_f64(device: &Device, dtype: DType, shape: (usize, usize)) -> Result<()> {
    match_f64(SUMS, &vectors(dtype, shape)?, device)
}

pub fn blocks_match_f64(device: &Device, dtype: DType, shape: (usize, usize)) -> Result<()> {
    let width = shape.1;
    let matrix = (random("matrix", &[width, width], dtype)? / (width as f64).sqrt())?;
    match_f64(BLOCKS, &[vectors(dtype, shape)?, vec![matrix]].concat(), device)
}

/// The gradients of all inputs against f64. A second backward, and one that frees the graph, have the bits of the first.
fn match_f64(graphs: &[(&str, Graph)], inputs: &[Tensor], device: &Device) -> Result<()> {
    let (dtype, shape) = (inputs[0].dtype(), inputs[0].dims());
    let upstream = random("dy", shape, dtype)?;
    for (name, graph) in graphs {
        let loss = |operators: &Operators, device: &Device, dtype: DType| -> Result<(Tensor, Vec<Var>)> {
            let here = |tensor: &Tensor| tensor.to_dtype(dtype)?.to_device(device);
            let vars = inputs.iter().map(|input| Var::from_tensor(&here(input)?)).collect::<Result<Vec<_>, _>>()?;
            let tensors: Vec<Tensor> = vars.iter().map(|var| var.as_tensor().clone()).collect();
            Ok(((graph(operators, &tensors)? * here(&upstream)?)?.sum_all()?, vars))
        };
        let gradients = |grads: &candle_core::backprop::GradStore, vars: &[Var]| -> Vec<Tensor> {
            vars.iter().filter_map(|var| grads.get(var).cloned()).collect()
        };
        let (want, vars) = loss(&COMPOSED, &Device::Cpu, DType::F64)?;
        let want = gradients(&want.backward()?, &vars);
        let (loss, vars) = loss(&FUSED, device, dtype)?;
        let got = gradients(&loss.backward()?, &vars);
        let case = format!("{name}, {dtype:?} {shape:?} on {:?}", device.location());
        ensure!(got.len() == want.len(), "{case}: {} gradients", got.len());
        for (index, (got, want)) in got.iter().zip(&want).enumerate() {
            // A lost gradient, or one that is added twice, is an error of the size of the gradient.
            let (error, limit) = (relative(got, want)?, 4.0 * precision(dtype).step(1.0) + 2e-5);
            ensure!(error <= limit, "{case}: gradient {index} has the error {error:.1e}, limit {limit:.1e}");
        }
        let want = bits(&got)?;
        ensure!(bits(&gradients(&loss.backward()?, &vars))? == want, "{case}: a second backward differs");
        ensure!(bits(&gradients(&backward_once(&loss)?, &vars))? == want, "{case}: backward_once differs");
    }
    Ok(())
}

#[test]
fn sums_of_gradients_match_f64() -> Result<()> {
    for dtype in DTYPES {
        for shape in [(5, 16), (67, 33), (9, 200)] {
            sums_match_f64(&Device::Cpu, dtype, shape)?;
            blocks_match_f64(&Device::Cpu, dtype, shape)?;
        }
    }
    Ok(())
}

/// The row and the weight of a norm may be one tensor. Both of its gradients join the one that waits.
#[test]
fn a_tensor_may_be_every_input_of_a_norm() -> Result<()> {
    let gradient = |op: &Operators| -> Result<Tensor> {
        let x0 = Var::from_tensor(&random("x", &[12], DType::F64)?)?;
        let x = (op.gelu)(&x0)?;
        let y = ((op.layer_norm)(&x, &x, Some(&x), EPS)? + (op.gelu)(&x)?)?;
        Ok(y.sqr()?.sum_all()?.backward()?.remove(&x0).expect("a gradient"))
    };
    ensure!(relative(&gradient(&FUSED)?, &gradient(&COMPOSED)?)? < 1e-12);
    Ok(())
}
