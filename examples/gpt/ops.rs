//! Operators of the model with hand-written gradients. They make few passes over memory, over whole contiguous tensors.
//!
//! On a GPU these operators are limited by memory traffic. Candle's autograd splits a layer norm or a GELU into a dozen
//! operators, each with its own gradient. Several of them read broadcast operands. For these, Candle computes an index by
//! division for each element, 5 to 10 times as slow as a plain pass. Every tensor with a gradient costs two more passes,
//! because Candle adds each gradient to zeros.
//!
//! So each operator here is one node of the graph. Candle's operators compute its value from detached tensors, with a fused
//! operator if Candle has one. A closure computes the gradient of its input. In bf16 on a GPU the matrix products include
//! bias, residual and GELU (`blas.rs`).
//!
//! Weights are not part of the graph. A [`Weight`] accumulates its gradient itself, in f32.

#[cfg(feature = "cuda")]
use crate::blas;
use crate::profile::{self, Part};
use candle_core::backend::{BackendDevice, BackendStorage};
use candle_core::{
    bail, CpuStorage, CudaStorage, CustomOp1, CustomOp2, DType, InplaceOp1, Layout, Result, Shape, Tensor, D,
};
use std::sync::{Arc, Mutex};

/// A parameter in the type that the model computes in, and its gradient. Every backward that reaches it adds to the gradient.
#[derive(Clone)]
pub struct Weight {
    value: Tensor,
    gradient: Arc<Mutex<Option<Tensor>>>,
}

impl Weight {
    pub fn new(value: &Tensor) -> Result<Self> {
        Ok(Self { value: value.detach().contiguous()?, gradient: Arc::default() })
    }

    pub fn value(&self) -> &Tensor {
        &self.value
    }

    /// Adds `gradient`. It has the shape of the weight and any type.
    fn accumulate(&self, gradient: &Tensor) -> Result<()> {
        let gradient = gradient.to_dtype(DType::F32)?;
        let mut sum = self.gradient.lock().expect("no backward panics");
        *sum = Some(match sum.take() {
            Some(before) => (before + gradient)?,
            None => gradient,
        });
        Ok(())
    }

    /// The accumulated gradient, f32. `None` if no backward reached this weight.
    pub fn take_gradient(&self) -> Option<Tensor> {
        self.gradient.lock().expect("no backward panics").take()
    }
}

/// y = x W + b
#[derive(Clone)]
pub struct Linear {
    pub weight: Weight, // (inputs, outputs)
    pub bias: Weight,   // (outputs)
    /// The part of the model before this layer. The backward runs it next, so a profile counts the time after this layer there.
    pub before: Part,
}

/// y = weight (x - mean) / sqrt(variance + epsilon) + bias, mean and variance over the last axis
#[derive(Clone)]
pub struct LayerNorm {
    pub weight: Weight, // (width)
    pub bias: Weight,   // (width)
    pub epsilon: f32,
}

/// Applies `layer`: x of any shape with n * inputs elements -> `shape`, with n * outputs elements.
///
/// ```text
/// dx = dy W^T          dW = x^T dy          db = 1^T dy
/// ```
pub fn linear(x: &Tensor, layer: &Linear, shape: impl Into<Shape>) -> Result<Tensor> {
    let _part = profile::part(Part::Linear);
    let (rows, layer) = (as_rows(x, &layer.weight)?, layer.clone());
    let y = layer.product(&rows, None)?.reshape(shape.into())?;
    let dims = x.dims().to_vec();
    node("linear", x, y, move |_, dy| {
        let _part = profile::part_before(Part::Linear, layer.before);
        layer.backward(&rows, &dy.reshape(((), layer.outputs()))?)?.reshape(dims.as_slice())
    })
}

/// `residual + linear(x)`: (n, outputs), and x of any shape with n * inputs elements -> (n, outputs).
pub fn linear_add(residual: &Tensor, x: &Tensor, layer: &Linear) -> Result<Tensor> {
    let _part = profile::part(Part::Linear);
    let (rows, layer) = (as_rows(x, &layer.weight)?, layer.clone());
    let y = layer.product(&rows, Some(residual))?;
    let dims = x.dims().to_vec();
    node2("linear_add", residual, x, y, move |_, dy| {
        let _part = profile::part_before(Part::Linear, layer.before);
        Ok((dy.clone(), layer.backward(&rows, dy)?.reshape(dims.as_slice())?))
    })
}

/// The MLP of a block, `residual + proj(gelu(fc(x)))`: (n, width), (n, width) -> (n, width).
///
/// ```text
/// h = fc(x), g = gelu(h)          dg = dy Wp^T          dh = dg gelu'(h)          dx = dh Wf^T
/// ```
pub fn mlp_add(residual: &Tensor, x: &Tensor, fc: &Linear, proj: &Linear) -> Result<Tensor> {
    let (x_, fc, proj) = (x.detach(), fc.clone(), proj.clone());
    let (h, g) = fc.product_and_gelu(&x_)?; // (n, 4 * width)
    let _part = profile::part(Part::Linear);
    let y = proj.product(&g, Some(residual))?;
    node2("mlp_add", residual, x, y, move |_, dy| {
        let dh = proj.backward_of_gelu(&h, &g, dy)?; // (n, 4 * width)
        let _part = profile::part(Part::Linear);
        Ok((dy.clone(), fc.backward(&x_, &dh)?))
    })
}

impl Linear {
    fn outputs(&self) -> usize {
        self.bias.value.elem_count()
    }

    /// x W + b, plus `residual` if there is one: (n, inputs), (n, outputs) -> (n, outputs)
    fn product(&self, x: &Tensor, residual: Option<&Tensor>) -> Result<Tensor> {
        let (w, b, residual) = (&self.weight.value, &self.bias.value, residual.map(Tensor::detach));
        #[cfg(feature = "cuda")]
        if blas::supports(x) {
            return blas::affine(x, w, b, residual.as_ref());
        }
        let y = x.matmul(w)?.broadcast_add(b)?;
        match residual {
            Some(residual) => y + residual,
            None => Ok(y),
        }
    }

    /// h = x W + b, and gelu(h): (n, inputs) -> (n, outputs), (n, outputs)
    fn product_and_gelu(&self, x: &Tensor) -> Result<(Tensor, Tensor)> {
        #[cfg(feature = "cuda")]
        if blas::supports(x) {
            let _part = profile::part(Part::Linear);
            return blas::affine_gelu(x, &self.weight.value, &self.bias.value);
        }
        let h = {
            let _part = profile::part(Part::Linear);
            self.product(x, None)?
        };
        let _part = profile::part(Part::Gelu);
        let g = h.gelu()?;
        Ok((h, g))
    }

    /// Accumulates dW and db, and returns dx.
    fn backward(&self, x: &Tensor, dy: &Tensor) -> Result<Tensor> {
        self.accumulate(x, dy)?;
        dy.matmul(&self.weight.value.t()?)
    }

    /// For a layer whose input was g = gelu(h): accumulates dW and db, and returns dh.
    fn backward_of_gelu(&self, h: &Tensor, g: &Tensor, dy: &Tensor) -> Result<Tensor> {
        let _part = profile::part(Part::Linear);
        #[cfg(feature = "cuda")]
        if blas::supports(dy) {
            self.accumulate(g, dy)?;
            return blas::product_gelu_backward(dy, &self.weight.value.t()?, h);
        }
        let dg = self.backward(g, dy)?;
        let _part = profile::part(Part::Gelu);
        gelu_backward(h, g, &dg)
    }

    /// Accumulates dW and db.
    fn accumulate(&self, x: &Tensor, dy: &Tensor) -> Result<()> {
        self.bias.accumulate(&column_sums(dy)?)?;
        self.weight.accumulate(&x.t()?.matmul(dy)?)
    }
}

/// dy gelu'(h), for g = gelu(h). All have one shape.
///
/// GELU in its tanh form is `h s` with `s = sigmoid(2 sqrt(2/pi) (h + 0.044715 h^3))`. So
///
/// ```text
/// gelu'(h) = s + g (1 - s) q          q = 2 sqrt(2/pi) (1 + 3 * 0.044715 h^2)
/// ```
fn gelu_backward(h: &Tensor, g: &Tensor, dy: &Tensor) -> Result<Tensor> {
    const CUBIC: f64 = 0.044715;
    let linear = 2.0 * (2.0 / std::f64::consts::PI).sqrt();
    let h2 = (h * h)?;
    let s = candle_nn::ops::sigmoid(&(h2.affine(linear * CUBIC, linear)? * h)?)?;
    let g_1_minus_s = (s.affine(-1.0, 1.0)? * g)?;
    let q = h2.affine(3.0 * linear * CUBIC, linear)?;
    dy * (s + (q * g_1_minus_s)?)?
}

/// Applies `layer`: (n, width) -> (n, width). Sums are in f32. A bf16 backward rounds its row statistics to bf16.
///
/// ```text
/// xhat = (x - mean) rstd          dx = rstd (dxhat - mean(dxhat) - xhat mean(dxhat xhat)),  dxhat = weight dy
/// dweight = sum of rows of dy xhat          dbias = sum of rows of dy
/// ```
pub fn layer_norm(x: &Tensor, layer: &LayerNorm) -> Result<Tensor> {
    let _part = profile::part(Part::Norm);
    let (x_, layer) = (x.detach(), layer.clone());
    let y = candle_nn::ops::layer_norm(&x_, &layer.weight.value, &layer.bias.value, layer.epsilon)?;
    node("layer_norm", x, y, move |_, dy| {
        let _part = profile::part(Part::Norm);
        layer.backward(&x_, dy)
    })
}

impl LayerNorm {
    fn backward(&self, x: &Tensor, dy: &Tensor) -> Result<Tensor> {
        let weight = &self.weight.value;
        let width = weight.elem_count() as f64;
        let xhat = candle_nn::ops::layer_norm(x, &weight.ones_like()?, &weight.zeros_like()?, self.epsilon)?;
        let (ones, weight) = (repeated(&weight.ones_like()?)?, repeated(weight)?);

        // The fused kernel does not return rstd, so compute it from xhat. The mean of xhat is 0, so
        // s = mean(xhat x) = variance rstd. With variance = r^2 - epsilon, r = 1 / rstd solves s = r - epsilon / r.
        let width_s = row_sums(&(&xhat * x)?, &ones)?;
        let root = (width_s.sqr()? + 4.0 * f64::from(self.epsilon) * width * width)?.sqrt()?;
        let rstd = ((width_s + root)?.recip()? * (2.0 * width))?;

        let dy_xhat = (dy * &xhat)?;
        self.weight.accumulate(&column_sums(&dy_xhat)?)?;
        self.bias.accumulate(&column_sums(dy)?)?;
        let minus_rstd_over_width = (&rstd * (-1.0 / width))?;
        let constant = (row_sums(dy, &weight)? * &minus_rstd_over_width)?; // -rstd mean(dxhat)
        let of_xhat = (row_sums(&dy_xhat, &weight)? * &minus_rstd_over_width)?; // -rstd mean(dxhat xhat)
        drop(dy_xhat);
        ((dy * outer(&rstd, &weight)?)? + (xhat * outer(&of_xhat, &ones)?)?)? + outer(&constant, &ones)?
    }
}

/// The embedding of token and position, `wte[token] + wpe[position]`: u32 (batch, seqlen) -> (batch * seqlen, width).
///
/// No input of this node has a gradient. `anchor` is a variable with one element. Candle keeps the graph because of it.
pub fn embedding(anchor: &Tensor, tokens: &Tensor, wte: &Weight, wpe: &Weight) -> Result<Tensor> {
    let _part = profile::part(Part::Embedding);
    let ((batch, seqlen), width) = (tokens.dims2()?, wte.value.dim(1)?);
    let (ids, wte, wpe) = (tokens.flatten_all()?, wte.clone(), wpe.clone());
    let positions = wpe.value.narrow(0, 0, seqlen)?; // (seqlen, width)
    let embedded = wte.value.index_select(&ids, 0)?.reshape((batch, seqlen, width))?;
    let x = embedded.broadcast_add(&positions)?.reshape((batch * seqlen, width))?;
    node_without_gradient("embedding", anchor, x, move |_, dx| {
        let _part = profile::part(Part::Embedding);
        let dx = dx.to_dtype(DType::F32)?; // f32, because the sums run over many tokens
        wte.accumulate(&index_add(&dx, &ids, wte.value.dim(0)?)?)?;
        let per_position = dx.reshape((batch, seqlen, width))?.sum(0)?;
        wpe.accumulate(&per_position.pad_with_zeros(0, 0, wpe.value.dim(0)? - seqlen)?)
    })
}

/// Adds row i of `x` to row `ids[i]` of `count` rows of zeros: f32 (n, width), u32 (n) -> f32 (count, width).
fn index_add(x: &Tensor, ids: &Tensor, count: usize) -> Result<Tensor> {
    match on_gpu(x) && x.dim(0)?.is_multiple_of(TABLES) {
        true => index_add_in_tables(x, ids, count),
        false => Tensor::zeros((count, x.dim(1)?), x.dtype(), x.device())?.index_add(ids, x, 0),
    }
}

/// Number of tables of [`index_add_in_tables`]: even, and small, because each table is as large as the embedding.
const TABLES: usize = 4;

/// As [`index_add`], for a GPU. Each of `TABLES` parts of the rows is added to its own table, and the tables are added last.
///
/// Candle's kernel uses one thread per column, which adds one row after another. Tables multiply the number of threads.
pub fn index_add_in_tables(x: &Tensor, ids: &Tensor, count: usize) -> Result<Tensor> {
    let (n, width) = x.dims2()?;
    let part = (TABLES, n / TABLES, width);
    let tables = Tensor::zeros((TABLES, count, width), x.dtype(), x.device())?;
    let ids = ids.reshape((TABLES, n / TABLES, 1))?.broadcast_as(part)?.contiguous()?;
    tables.scatter_add_set(&ids, &x.reshape(part)?, 1)?;
    let halves = (tables.narrow(0, 0, TABLES / 2)? + tables.narrow(0, TABLES / 2, TABLES / 2)?)?;
    halves.get(0)? + halves.get(1)?
}

/// Largest number of logits in memory at once. In f32 they take 2 GiB.
const LOGITS_AT_ONCE: usize = 1 << 29;

/// Added to a probability before its logarithm. So the logarithm is finite even if f32 rounded the probability to 0.
const TINY: f64 = 1e-37;

/// Mean cross-entropy of logits `x wte^T` against `targets`, in nats: x (n, width), targets u32 (n) -> f32 ().
///
/// The rows are processed in pieces, so that at most about `LOGITS_AT_ONCE` logits are in memory. For each piece, the forward
/// computes the logits and their softmax p in f32, and from p the loss and the gradient. The backward only scales the
/// gradient:
///
/// ```text
/// loss = -1/n sum of ln p[target]          d = p - onehot(target)          dx = d wte / n          dwte = d^T x / n
/// ```
pub fn cross_entropy(x: &Tensor, wte: &Weight, targets: &Tensor) -> Result<Tensor> {
    cross_entropy_in_pieces(x, wte, targets, LOGITS_AT_ONCE)
}

/// [`cross_entropy`] with about `logits_at_once` logits per piece.
pub fn cross_entropy_in_pieces(x: &Tensor, wte: &Weight, targets: &Tensor, logits_at_once: usize) -> Result<Tensor> {
    let _part = profile::part(Part::Loss);
    let (n, vocab_size) = (x.dim(0)?, wte.value.dim(0)?);
    let pieces = (n * vocab_size).div_ceil(logits_at_once).min(n);
    let tracked = x.track_op();
    let (mut losses, mut dx, mut dwte) = (Vec::new(), Vec::new(), None);
    let mut start = 0;
    while start < n {
        let len = n.div_ceil(pieces).min(n - start);
        let x = x.detach().narrow(0, start, len)?;
        let targets = targets.narrow(0, start, len)?.reshape((len, 1))?.contiguous()?;
        let p = candle_nn::ops::softmax_last_dim(&x.matmul(&wte.value.t()?)?.to_dtype(DType::F32)?)?; // (len, vocab_size)
        losses.push((p.gather(&targets, 1)? + TINY)?.log()?.sum_all()?);
        if tracked {
            p.scatter_add_set(&targets, &Tensor::full(-1f32, (len, 1), p.device())?, 1)?;
            let d = p.to_dtype(x.dtype())?;
            drop(p);
            dx.push(d.matmul(&wte.value)?);
            let part = d.t()?.matmul(&x)?.to_dtype(DType::F32)?; // (vocab_size, width)
            dwte = Some(match dwte {
                Some(sum) => (sum + part)?,
                None => part,
            });
        }
        start += len;
    }
    let loss = Tensor::stack(&losses, 0)?.sum_all()?.affine(-1.0 / n as f64, 0.0)?; // f32 ()
    let Some(dwte) = dwte else { return Ok(loss) };
    let (dx, wte, dtype) = (Tensor::cat(&dx, 0)?, wte.clone(), x.dtype());
    node("cross_entropy", x, loss, move |_, dloss| {
        let _part = profile::part(Part::Loss);
        let scale = dloss.affine(1.0 / n as f64, 0.0)?; // f32 ()
        wte.accumulate(&dwte.broadcast_mul(&scale)?)?;
        dx.to_dtype(DType::F32)?.broadcast_mul(&scale)?.to_dtype(dtype)
    })
}

/// The sum of the three thirds of `x` along `axis`. It replaces attention if attention is left out.
pub fn sum_of_thirds(x: &Tensor, axis: usize) -> Result<Tensor> {
    let thirds = x.detach().chunk(3, axis)?.iter().map(Tensor::contiguous).collect::<Result<Vec<_>>>()?;
    let sum = ((&thirds[0] + &thirds[1])? + &thirds[2])?;
    node("sum_of_thirds", x, sum, move |_, dy| Tensor::cat(&[dy, dy, dy], axis))
}

/// `softmax(scores + mask)` over the last axis, for standard attention: (.., n, m) and (n, m) -> (.., n, m).
///
/// ```text
/// dscores = p (dp - sum of dp p)
/// ```
pub fn softmax(scores: &Tensor, mask: &Tensor) -> Result<Tensor> {
    let p = candle_nn::ops::softmax_last_dim(&scores.detach().broadcast_add(mask)?)?;
    node("softmax", scores, p, |p, dp| {
        let m = p.dim(D::Minus1)?;
        let (rows, dp) = (p.reshape(((), m))?, dp.reshape(((), m))?);
        let ones = repeated(&Tensor::ones(m, p.dtype(), p.device())?)?;
        let dp_p = (dp * &rows)?;
        let sums = row_sums(&dp_p, &ones)?;
        (dp_p - (rows * outer(&sums, &ones)?)?)?.reshape(p.shape())
    })
}

// Sums over rows and columns, and outer products, as matrix products.

fn on_gpu(x: &Tensor) -> bool {
    x.device().is_cuda()
}

/// The number of copies of a vector in the matrices below. On a GPU it is 8, because tensor cores need rows of a multiple of
/// 16 bytes.
fn lanes(x: &Tensor) -> usize {
    match on_gpu(x) {
        true => 8,
        false => 1,
    }
}

/// (m) -> (m, lanes)
fn repeated(row: &Tensor) -> Result<Tensor> {
    repeated_in(lanes(row), row)
}

pub fn repeated_in(lanes: usize, row: &Tensor) -> Result<Tensor> {
    let m = row.elem_count();
    row.reshape((m, 1))?.broadcast_as((m, lanes))?.contiguous()
}

/// sum over j of x[i, j] row[j]: (n, m), (m, lanes) -> f32 (n, lanes)
pub fn row_sums(x: &Tensor, row: &Tensor) -> Result<Tensor> {
    x.matmul(row)?.to_dtype(DType::F32)
}

/// column[i] row[j]: f32 (n, lanes), (m, lanes) -> (n, m) in the type of `row`. The product sums over the lanes, so each lane
/// holds an equal share of `column`.
pub fn outer(column: &Tensor, row: &Tensor) -> Result<Tensor> {
    let shares = (column * (1.0 / row.dim(1)? as f64))?;
    shares.to_dtype(row.dtype())?.matmul(&row.t()?)
}

/// sum over i of x[i, j]: (n, m) -> (m)
fn column_sums(x: &Tensor) -> Result<Tensor> {
    column_sums_in(lanes(x), x)
}

/// [`column_sums`] as a product of (lanes, n) and (n, m).
pub fn column_sums_in(lanes: usize, x: &Tensor) -> Result<Tensor> {
    Tensor::ones((lanes, x.dim(0)?), x.dtype(), x.device())?.matmul(x)?.narrow(0, 0, 1)?.squeeze(0)
}

/// `x` without its graph, as (n, inputs) of `weight`.
fn as_rows(x: &Tensor, weight: &Weight) -> Result<Tensor> {
    x.detach().reshape(((), weight.value.dim(0)?))
}

// Nodes of Candle's graph.

/// Computes the gradients of the inputs from the result and its gradient.
type Backward = Box<dyn Fn(&Tensor, &Tensor) -> Result<[Option<Tensor>; 2]> + Send + Sync>;

struct Node {
    name: &'static str,
    value: Mutex<Option<Tensor>>,
    backward: Backward,
}

/// Puts `value` into the graph as a result of `x` with the gradient `backward`. `value` was computed without a graph, and no
/// other tensor may share its memory.
fn node<B>(name: &'static str, x: &Tensor, value: Tensor, backward: B) -> Result<Tensor>
where
    B: Fn(&Tensor, &Tensor) -> Result<Tensor> + Send + Sync + 'static,
{
    x.apply_op1(Node::new(name, value, move |y, dy| Ok([Some(backward(y, dy)?), None])))
}

/// As [`node`], with two inputs.
fn node2<B>(name: &'static str, x1: &Tensor, x2: &Tensor, value: Tensor, backward: B) -> Result<Tensor>
where
    B: Fn(&Tensor, &Tensor) -> Result<(Tensor, Tensor)> + Send + Sync + 'static,
{
    let both = move |y: &Tensor, dy: &Tensor| backward(y, dy).map(|(dx1, dx2)| [Some(dx1), Some(dx2)]);
    x1.apply_op2(x2, Node::new(name, value, both))
}

/// As [`node`], but `x` receives no gradient. `backward` only accumulates gradients of weights.
fn node_without_gradient<B>(name: &'static str, x: &Tensor, value: Tensor, backward: B) -> Result<Tensor>
where
    B: Fn(&Tensor, &Tensor) -> Result<()> + Send + Sync + 'static,
{
    x.apply_op1(Node::new(name, value, move |y, dy| backward(y, dy).map(|()| [None, None])))
}

impl Node {
    fn new<B>(name: &'static str, value: Tensor, backward: B) -> Self
    where
        B: Fn(&Tensor, &Tensor) -> Result<[Option<Tensor>; 2]> + Send + Sync + 'static,
    {
        Self { name, value: Mutex::new(Some(value)), backward: Box::new(backward) }
    }

    /// Takes the memory out of the value. A Candle operator must return owned memory, but Candle offers no way to take a
    /// tensor's memory; see [`Taken`].
    fn take<S>(&self, memory: impl Fn(&Taken) -> Option<S>) -> Result<(S, Shape)> {
        let value = self.value.lock().expect("a forward does not panic").take();
        let Some(value) = value else { bail!("{}: its forward has already run", self.name) };
        if !value.is_contiguous() || value.layout().start_offset() != 0 {
            bail!("{}: its value is a view", self.name);
        }
        let taken = Taken::default();
        value.inplace_op1(&taken)?;
        let Some(memory) = memory(&taken) else {
            bail!("{}: its value is on another device than its input", self.name)
        };
        Ok((memory, value.shape().clone()))
    }

    fn take_cpu(&self) -> Result<(CpuStorage, Shape)> {
        self.take(|taken| taken.cpu.lock().expect("nothing panics").take())
    }

    fn take_cuda(&self) -> Result<(CudaStorage, Shape)> {
        self.take(|taken| taken.cuda.lock().expect("nothing panics").take())
    }
}

impl CustomOp1 for Node {
    fn name(&self) -> &'static str {
        self.name
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        self.take_cpu()
    }

    fn cuda_fwd(&self, _: &CudaStorage, _: &Layout) -> Result<(CudaStorage, Shape)> {
        self.take_cuda()
    }

    fn bwd(&self, _: &Tensor, result: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let [dx, _] = (self.backward)(&result.detach(), &grad.contiguous()?)?;
        Ok(dx)
    }
}

impl CustomOp2 for Node {
    fn name(&self) -> &'static str {
        self.name
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        self.take_cpu()
    }

    fn cuda_fwd(&self, _: &CudaStorage, _: &Layout, _: &CudaStorage, _: &Layout) -> Result<(CudaStorage, Shape)> {
        self.take_cuda()
    }

    fn bwd(&self, _: &Tensor, _: &Tensor, result: &Tensor, grad: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let [dx1, dx2] = (self.backward)(&result.detach(), &grad.contiguous()?)?;
        Ok((dx1, dx2))
    }
}

/// An in-place operator that moves the memory out of a tensor. It leaves one element or none in the tensor.
#[derive(Default)]
struct Taken {
    cpu: Mutex<Option<CpuStorage>>,
    cuda: Mutex<Option<CudaStorage>>,
}

impl InplaceOp1 for Taken {
    fn name(&self) -> &'static str {
        "take"
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, _: &Layout) -> Result<()> {
        let memory = std::mem::replace(storage, CpuStorage::F32(Vec::new()));
        *self.cpu.lock().expect("nothing panics") = Some(memory);
        Ok(())
    }

    fn cuda_fwd(&self, storage: &mut CudaStorage, _: &Layout) -> Result<()> {
        // SAFETY: nobody reads this memory. Only the node has the tensor that gets it, and `Node::take` drops that tensor.
        let one = unsafe { storage.device().alloc_uninit(&Shape::from(1), storage.dtype())? };
        let memory = std::mem::replace(storage, one);
        *self.cuda.lock().expect("nothing panics") = Some(memory);
        Ok(())
    }
}
