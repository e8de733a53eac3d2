//! The public calls of the operator, and their options.

use candle_core::{Tensor, D};
use candle_fused_ops::{apply_op1, apply_op3, resize_columns};

use crate::device;
use crate::environment;
use crate::error::{Error, Result};
use crate::layout::TensorLayout;
use crate::mask::Mask;
use crate::merge;
use crate::op::{FlashAttention, FusedFlashAttention};
use crate::options::Options;
use crate::output::{o_and_lse, Output};
use crate::packed::CuSeqlens;
use crate::padding::KeyLengths;
use crate::plan::Plan;
use crate::problem::Problem;
use crate::tensors::Inputs;

/// Attention of every query over the keys that its mask shows.
///
/// For batch `b`, query `i`, head `h` and its key head `g = h / (num_heads / num_heads_k)`:
///
/// ```text
/// s[j] = softmax_scale * q[b, i, h] . k[b, j, g]
/// s[j] = softcap * tanh(s[j] / softcap)                        with a softcap
/// s[j] = s[j] - slope[h] * |i + seqlen_k - seqlen_q - j|       with ALiBi slopes
/// lse  = ln(sum over visible j of exp(s[j]))
/// o[b, i, h] = sum over visible j of  exp(s[j] - lse) * v[b, j, g]
/// ```
///
/// The `seqlen_q x seqlen_k` scores are never stored (FlashAttention-2, Dao 2023, algorithms 1 and 2). Calls need this extra
/// memory:
///
/// - The forward keeps lse: two floats per query and head on the CPU, one on a GPU.
/// - The backward adds one float per query and head, and accumulates dq in the accumulator's type. On a GPU, these accumulators
///   are whole groups of 8 queries for each sequence and head.
/// - On a GPU, a copy of each input whose rows are too far apart, not 16-byte aligned, or not whole 16 bytes.
/// - If a call returns lse, it also keeps o of f16 and bf16 in f32; on a GPU its backward rounds copies of o and of its gradient.
///
/// | tensor | padded | packed | type |
/// | --- | --- | --- | --- |
/// | `q` | `(batch, seqlen_q, num_heads, head_dim)` | `(total_q, num_heads, head_dim)` | f64, f32, f16, bf16 |
/// | `k` | `(batch, seqlen_k, num_heads_k, head_dim)` | `(total_k, num_heads_k, head_dim)` | as `q` |
/// | `v` | `(batch, seqlen_k, num_heads_k, head_dim_v)` | `(total_k, num_heads_k, head_dim_v)` | as `q` |
/// | result | `(batch, seqlen_q, num_heads, head_dim_v)` | `(total_q, num_heads, head_dim_v)` | as `q` |
/// | lse | `(batch, num_heads, seqlen_q)` | `(num_heads, total_q)` | f32; f64 for f64 |
///
/// These shapes are for [`TensorLayout::Bshd`], the default. [`Attention::layout`] selects `(batch, num_heads, seqlen, head_dim)`.
/// lse has the same shape in both layouts.
///
/// `num_heads` must be a multiple of `num_heads_k`, for grouped-query and multi-query attention; keys and values are not copied.
/// `head_dim` and `head_dim_v` are 1 to 512. They are usually equal; the default scale depends only on `head_dim`. The last axis must be
/// contiguous. All other strides are free, and may be 0.
///
/// Sums are in f32 (f64 for f64 inputs). In f32, a weight below `2^-126` of the largest in its row counts as 0.
///
/// On an NVIDIA GPU (feature `cuda`) the types are f32, f16 and bf16. Inputs whose rows are not 16-byte aligned, or not whole
/// 16 bytes, are copied.
///
/// Gradients flow to `q`, `k` and `v`, from the result and from lse. The backward recomputes the scores. It may run several times
/// over one graph.
///
/// The same inputs give the same bits, on the CPU with any number of threads. On a GPU, the gradient of `q` needs
/// [`Attention::deterministic`] for this. On the CPU, a call of few queries sums in another order if no input is tracked for gradients: the
/// last bits of its o can differ from those of a tracked call.
///
/// ```
/// # use candle_core::{Device, Tensor, Var};
/// # use candle_fa2::{Attention, Mask};
/// let q = Var::randn(0f32, 1f32, (1, 3, 8, 64), &Device::Cpu)?;
/// let k = Tensor::randn(0f32, 1f32, (1, 4, 2, 64), &Device::Cpu)?; // 4 query heads share each key head
/// let o = Attention::new().mask(Mask::Causal).forward(&q, &k, &k)?;
/// assert_eq!(o.dims(), q.dims());
/// let grads = o.sum_all()?.backward()?;
/// assert_eq!(grads.get(&q).unwrap().dims(), q.dims());
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Clone, Debug, Default)]
pub struct Attention {
    pub(crate) options: Options,
}

impl Attention {
    /// No mask, scale `1/sqrt(head_dim)`, no softcap, no ALiBi.
    pub fn new() -> Self {
        Self::default()
    }

    /// Which keys each query sees; [`Mask`] draws them.
    pub fn mask(mut self, mask: Mask) -> Self {
        self.options.mask = mask;
        self
    }

    /// Factor of the scores, any finite number. The default is `1/sqrt(head_dim)`.
    pub fn softmax_scale(mut self, softmax_scale: f64) -> Self {
        self.options.softmax_scale = Some(softmax_scale);
        self
    }

    /// Limits the scaled scores smoothly to `(-softcap, softcap)`, as in Gemma 2. It must be finite and above 0.
    pub fn softcap(mut self, softcap: f64) -> Self {
        self.options.softcap = Some(softcap);
        self
    }

    /// Slopes of linear biases by distance (ALiBi, Press et al. 2022): f32 of shape `(num_heads)` or `(batch, num_heads)`.
    ///
    /// Slopes have no gradient, so tracked slopes are an error. They must be finite; this is checked only for slopes on the CPU.
    pub fn alibi_slopes(mut self, slopes: &Tensor) -> Self {
        self.options.alibi_slopes = Some(slopes.clone());
        self
    }

    /// Whether the same inputs always give the same bits of the gradient of `q` on a GPU.
    ///
    /// All other results always have the same bits, and on the CPU this gradient too. On a GPU, key tiles add to the gradient
    /// of `q` in any order. With this option semaphores order them. That costs 11% of the backward's speed on Hopper in the
    /// geometric mean (1 to 29%), and 16 to 28% with the kernels for every GPU (H100, before their last change;
    /// docs/benchmarks.md).
    pub fn deterministic(mut self, deterministic: bool) -> Self {
        self.options.deterministic = deterministic;
        self
    }

    /// Whether products of f32 may use TF32 on a GPU: one product of operands rounded to 11 bits. Without this option, a product is
    /// the sum of three such products, which is about as precise as f32.
    ///
    /// Results then have errors like those of f16, 4e-4 to 6e-4 of their size, but the range of f32 (docs/design/sm80.md says why). Sums
    /// stay in f32, and so do q, k, v, o and their gradients. The option changes nothing on the CPU, and is an error for other types.
    pub fn tf32(mut self, tf32: bool) -> Self {
        self.options.tf32 = tf32;
        self
    }

    /// Sets how many keys of each sequence are valid in a padded call; see [`KeyLengths`].
    ///
    /// The mask and ALiBi align the last query with the last *valid* key. For 2 queries, 5 keys of which 3 are valid, and
    /// [`Mask::Causal`]:
    ///
    /// ```text
    ///      PaddingSide::Right      PaddingSide::Left
    ///      k0 k1 k2 k3 k4          k0 k1 k2 k3 k4
    /// q0    x  x  .  .  .           .  .  x  x  .
    /// q1    x  x  x  .  .           .  .  x  x  x
    /// ```
    ///
    /// | use it for | side |
    /// | --- | --- |
    /// | a KV cache whose sequences fill different numbers of slots; every query is a token | `Right` |
    /// | self-attention of a batch padded on the left, with any mask | `Left` |
    /// | self-attention of a batch padded on the right, without mask and ALiBi (BERT) | `Right` |
    ///
    /// The output rows of padded queries have no meaning. Leave them out of the loss.
    ///
    /// Do not use key lengths for self-attention padded on the right with a mask or ALiBi. The last query is then padding, so all
    /// positions would be shifted, and the call returns [`Error::KeyLengthAlignment`]. [`Mask::Causal`] needs no key lengths
    /// there, because the padding comes after every token. In all other cases use [`CuSeqlens::from_mask`] and
    /// [`Self::forward_packed`], which also skip the padding.
    pub fn key_lengths(mut self, key_lengths: &KeyLengths) -> Self {
        self.options.key_lengths = Some(key_lengths.clone());
        self
    }

    /// Sets the axis order of q, k and v, and of the result unless [`Self::output_layout`] is set. The default is
    /// [`TensorLayout::Bshd`]. No tensor is copied.
    pub fn layout(mut self, layout: TensorLayout) -> Self {
        self.options.layout = layout;
        self
    }

    /// Sets the axis order of the result if it differs from that of q, k and v. The result is written in this order.
    pub fn output_layout(mut self, layout: TensorLayout) -> Self {
        self.options.output_layout = Some(layout);
        self
    }

    /// Attention over a padded batch. The result is contiguous. It has the type and the shape of `q`, with the `head_dim` of `v`, in
    /// the result's layout.
    ///
    /// # Errors
    /// If shapes, types, strides, devices or options do not follow the rules of [`Attention`], or if the device has no kernel.
    /// Nothing is computed then. If the shapes fit only the other layout, the error is [`Error::SwappedAxes`].
    pub fn forward(&self, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor> {
        self.run(Problem::padded(&self.options, q, k, v)?, q, k, v)
    }

    /// Attention with q, k and v in one tensor, from a fused projection. The result is contiguous, by default with shape
    /// `(batch, seqlen, num_heads, head_dim)`.
    ///
    /// `qkv` is `(batch, seqlen, num_heads + 2 * num_heads_k, head_dim)`, or in [`TensorLayout::Bhsd`]
    /// `(batch, num_heads + 2 * num_heads_k, seqlen, head_dim)`. The heads of q come first, then those of k, then those of v. All have
    /// one `head_dim`.
    /// A `(batch, seqlen, 3, num_heads, head_dim)` tensor has the first shape after `reshape`. Another order of heads, as in
    /// GPT-NeoX, gives a wrong result; see [`QkvOrder`](crate::layers::QkvOrder).
    ///
    /// [`Self::forward`] with three views of `qkv` gives the same values. But Candle then makes three gradients of the size of
    /// `qkv` and adds them. This call makes only one.
    ///
    /// ```
    /// # use candle_core::{Device, Var};
    /// # use candle_fa2::{Attention, Mask};
    /// let qkv = Var::randn(0f32, 1f32, (1, 5, 8 + 2 * 2, 64), &Device::Cpu)?; // 8 query heads, 2 key heads
    /// let o = Attention::new().mask(Mask::Causal).forward_qkv(&qkv, 2)?;
    /// assert_eq!(o.dims(), [1, 5, 8, 64]);
    /// assert_eq!(o.sum_all()?.backward()?.get(&qkv).unwrap().dims(), qkv.dims());
    /// # Ok::<(), candle_core::Error>(())
    /// ```
    ///
    /// # Errors
    /// As [`Self::forward`], and if `qkv` has no head for q.
    pub fn forward_qkv(&self, qkv: &Tensor, num_heads_k: usize) -> Result<Tensor> {
        let (problem, q) = Problem::fused(&self.options, qkv, num_heads_k)?;
        let head_dim = problem.head_dim;
        let (problem, plan) = logged_plan(problem, &q)?;
        let qkv = read_or_copied(qkv, "q", &plan, problem.head_dim)?; // all three are copied, or none
        let o = apply_op1(&qkv, FusedFlashAttention(self.op(problem, plan, Output::O)))?;
        Ok(resize_columns(&o, head_dim)?)
    }

    /// As [`Self::forward`], and also returns the log-sum-exp of each row of scores (natural logarithm).
    ///
    /// Gradients flow through both results. If a row sees no key, its lse is minus infinity. To merge attention over parts of the
    /// keys, use [`Self::forward_partial`], because its o is not rounded.
    ///
    /// # Errors
    /// As [`Self::forward`].
    pub fn forward_with_lse(&self, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<(Tensor, Tensor)> {
        self.run_with_lse(Problem::padded(&self.options, q, k, v)?, q, k, v)
    }

    /// Attention within each sequence of a packed batch. The result is contiguous. It has the type and the shape of `q`, with the
    /// `head_dim` of `v`, in the result's layout.
    ///
    /// Sequence `b` has the rows `cu_seqlens_q[b]..cu_seqlens_q[b + 1]` of `q` and the rows
    /// `cu_seqlens_k[b]..cu_seqlens_k[b + 1]` of `k` and `v`. The mask aligns the last query and the last key of each sequence.
    ///
    /// # Errors
    /// As [`Self::forward`], and if the lengths do not end at the last rows of the tensors.
    pub fn forward_packed(
        &self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        cu_seqlens_q: &CuSeqlens,
        cu_seqlens_k: &CuSeqlens,
    ) -> Result<Tensor> {
        self.run(Problem::packed(&self.options, (q, k, v), cu_seqlens_q, cu_seqlens_k)?, q, k, v)
    }

    /// Attention over one part of the keys, for [`Self::merge`].
    ///
    /// Returns o and lse. o is in f32 (f64 for f64), not rounded to the type of `q`, and has the result's layout. The shape of lse
    /// is `(batch, num_heads, seqlen_q)`. On a GPU the backward rounds o and its gradient to the type of `q`.
    ///
    /// **The mask counts positions within this part.** It aligns the last query with the last key of the part. In a causal model,
    /// for a part that ends `n` keys before the last key of all, use `Mask::Window { left: None, right: Some(n) }`. In ring
    /// attention with equal parts: use [`Mask::Causal`] for the part that holds the queries' own keys, and [`Mask::None`] for
    /// earlier parts.
    ///
    /// # Errors
    /// As [`Self::forward`], and [`Error::PartialAlibi`] with ALiBi slopes, because a call over one part does not know how far its
    /// keys are from the queries.
    pub fn forward_partial(&self, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<(Tensor, Tensor)> {
        self.check_partial()?;
        self.run_partial(Problem::padded(&self.options, q, k, v)?, q, k, v)
    }

    /// Merges `(o, lse)` of parts of the keys into attention over all keys. All parts must have the same queries, and no key may
    /// be in two parts.
    ///
    /// The parts are results of [`Self::forward_partial`] or [`Self::forward_packed_partial`]. Returns `(o, lse)` with the shapes
    /// of one part, both in the type of lse. For an f16 or bf16 model, convert o with `to_dtype`. The merge uses only the result's
    /// layout of this `Attention`, and none of its other options.
    ///
    /// Gradients flow to every o and every lse. If a row has no key in a part (lse is minus infinity), that part changes no bit
    /// of the row. If a row has no key in any part, o is 0, lse is minus infinity, and all gradients are 0.
    ///
    /// ```
    /// # use candle_core::{Device, Tensor};
    /// # use candle_fa2::Attention;
    /// let q = Tensor::randn(0f32, 1f32, (1, 3, 8, 64), &Device::Cpu)?;
    /// let k = Tensor::randn(0f32, 1f32, (1, 6, 8, 64), &Device::Cpu)?;
    /// let attention = Attention::new();
    /// let mut parts = Vec::new();
    /// for start in [0, 2, 4] {
    ///     let part = k.narrow(1, start, 2)?; // in ring attention, the keys of another device
    ///     parts.push(attention.forward_partial(&q, &part, &part)?);
    /// }
    /// let (o, _lse) = attention.merge(&parts)?;
    /// let whole = attention.forward(&q, &k, &k)?;
    /// assert!((o - whole)?.abs()?.max_all()?.to_scalar::<f32>()? < 1e-5);
    /// # Ok::<(), candle_core::Error>(())
    /// ```
    ///
    /// # Errors
    /// - [`Error::MergeNothing`] if `parts` is empty;
    /// - [`Error::DType`] if the first lse is neither f32 nor f64;
    /// - [`Error::MergeMismatch`] if o does not have 3 or 4 axes, if lse does not fit o in this layout, or if a part differs from
    ///   the first part in shape, type or device.
    pub fn merge(&self, parts: &[(Tensor, Tensor)]) -> Result<(Tensor, Tensor)> {
        merge::merge(parts, self.options.layout_of_result())
    }

    /// As [`Self::forward_packed`], and also returns the log-sum-exp, of shape `(num_heads, total_q)`.
    ///
    /// # Errors
    /// As [`Self::forward_packed`].
    pub fn forward_packed_with_lse(
        &self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        cu_seqlens_q: &CuSeqlens,
        cu_seqlens_k: &CuSeqlens,
    ) -> Result<(Tensor, Tensor)> {
        self.run_with_lse(Problem::packed(&self.options, (q, k, v), cu_seqlens_q, cu_seqlens_k)?, q, k, v)
    }

    /// As [`Self::forward_partial`], for a packed batch. Returns o `(total_q, num_heads, head_dim_v)` and lse `(num_heads, total_q)`.
    ///
    /// Every part has all sequences. The length of a sequence in a part may be 0.
    ///
    /// # Errors
    /// As [`Self::forward_packed`] and [`Self::forward_partial`].
    pub fn forward_packed_partial(
        &self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        cu_seqlens_q: &CuSeqlens,
        cu_seqlens_k: &CuSeqlens,
    ) -> Result<(Tensor, Tensor)> {
        self.check_partial()?;
        self.run_partial(Problem::packed(&self.options, (q, k, v), cu_seqlens_q, cu_seqlens_k)?, q, k, v)
    }

    /// Whether [`Self::forward`] would accept this call. Computes nothing.
    ///
    /// # Errors
    /// The error that `forward` would return.
    pub fn supports(&self, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<()> {
        plan(&Problem::padded(&self.options, q, k, v)?, q).map(drop)
    }

    /// Whether [`Self::forward_packed`] would accept this call. Computes nothing.
    ///
    /// # Errors
    /// The error that `forward_packed` would return.
    pub fn supports_packed(
        &self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        cu_seqlens_q: &CuSeqlens,
        cu_seqlens_k: &CuSeqlens,
    ) -> Result<()> {
        plan(&Problem::packed(&self.options, (q, k, v), cu_seqlens_q, cu_seqlens_k)?, q).map(drop)
    }

    fn run(&self, problem: Problem, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor> {
        let head_dim_v = problem.head_dim_v;
        let (problem, plan, Inputs { q, k, v }) = planned(problem, Inputs { q, k, v })?;
        let o = apply_op3(&q, &k, &v, self.op(problem, plan, Output::O))?;
        Ok(resize_columns(&o, head_dim_v)?)
    }

    fn run_with_lse(&self, problem: Problem, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<(Tensor, Tensor)> {
        let (o, lse) = self.run_partial(problem, q, k, v)?;
        Ok((o.to_dtype(q.dtype())?, lse))
    }

    /// o in the accumulator's type, and lse.
    ///
    /// A custom op has only one result, so the op returns o and lse in one flat tensor. Both are views of it. In the backward,
    /// Candle adds their gradients, and the op gets the sum.
    fn run_partial(&self, problem: Problem, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<(Tensor, Tensor)> {
        let head_dim_v = problem.head_dim_v;
        let (problem, plan, Inputs { q, k, v }) = planned(problem, Inputs { q, k, v })?;
        let (shape_o, shape_lse) = (problem.shape_of_result(), problem.shape_lse());
        let result = apply_op3(&q, &k, &v, self.op(problem, plan, Output::OAndLse))?;
        let (o, lse) = o_and_lse(&result, shape_o, shape_lse)?;
        Ok((resize_columns(&o, head_dim_v)?, lse))
    }

    /// Returns an error if an option does not fit a call over one part of the keys.
    fn check_partial(&self) -> Result<()> {
        match self.options.alibi_slopes {
            Some(_) => Err(Error::PartialAlibi),
            None => Ok(()),
        }
    }

    /// The operator of one checked call, whose inputs are copied as the plan says.
    fn op(&self, problem: Problem, plan: Plan, output: Output) -> FlashAttention {
        FlashAttention::new(problem, plan, self.options.alibi_slopes.clone(), output)
    }
}

/// Plans a checked call. Returns the plan, the inputs with the copies that it asks for, and the problem of these inputs.
fn planned(problem: Problem, inputs: Inputs<&Tensor>) -> Result<(Problem, Plan, Inputs<Tensor>)> {
    let (problem, plan) = logged_plan(problem, inputs.q)?;
    let inputs = with_copies(&problem, &plan, inputs)?;
    Ok((problem, plan, inputs))
}

/// The inputs with the copies that `plan` asks for. `problem` is that of the result.
pub(crate) fn with_copies(
    problem: &Problem,
    plan: &Plan,
    Inputs { q, k, v }: Inputs<&Tensor>,
) -> candle_core::Result<Inputs<Tensor>> {
    Ok(Inputs {
        q: read_or_copied(q, "q", plan, problem.head_dim)?,
        k: read_or_copied(k, "k", plan, problem.head_dim)?,
        v: read_or_copied(v, "v", plan, problem.head_dim_v)?,
    })
}

/// The input `name`, or if the plan asks for it, a contiguous copy with `columns` columns. Those past the columns of `tensor` are zeros.
fn read_or_copied(tensor: &Tensor, name: &str, plan: &Plan, columns: usize) -> candle_core::Result<Tensor> {
    if !plan.copied().contains(&name) {
        return Ok(tensor.clone());
    }
    match columns - tensor.dim(D::Minus1)? {
        0 => tensor.force_contiguous(),
        _ => resize_columns(tensor, columns),
    }
}

/// The plan of `problem` on the device of q.
pub(crate) fn plan(problem: &Problem, q: &Tensor) -> Result<Plan> {
    Plan::choose(problem, &device::caps(q.device())?)
}

/// As [`plan`], for a call that will run: logs the plan, and returns the problem with the copies that it asks for.
fn logged_plan(problem: Problem, q: &Tensor) -> Result<(Problem, Plan)> {
    let plan = plan(&problem, q)?;
    environment::log(&problem, &plan);
    Ok((plan.with_copies(problem), plan))
}
