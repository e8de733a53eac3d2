//! The public call: options, and the ways to run them.

use candle_core::Tensor;

use crate::layout::TensorLayout;
use crate::mask::Mask;
use crate::op::{self, FlashAttention, FusedFlashAttention, Output};
use crate::packed::CuSeqlens;
use crate::padding::KeyLengths;
use crate::plan::{DeviceCaps, Plan};
use crate::problem::Problem;
use crate::{merge, Result};

/// Attention of every query over the keys its mask lets it see.
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
/// The `seqlen_q x seqlen_k` scores are never stored (FlashAttention-2, Dao 2023, algorithms 1 and 2). Extra memory of the
/// forward is lse, two floats per query and head, one on a GPU; the backward adds one more, and sums dq in the accumulator's
/// type, on a GPU in whole tiles of up to 64 queries for each sequence and head. With the lse returned, o of f16 and bf16 is
/// kept in f32 too.
///
/// | tensor | padded | packed | type |
/// | --- | --- | --- | --- |
/// | `q`, result | `(batch, seqlen_q, num_heads, head_dim)` | `(total_q, num_heads, head_dim)` | f64, f32, f16, bf16 |
/// | `k`, `v` | `(batch, seqlen_k, num_heads_k, head_dim)` | `(total_k, num_heads_k, head_dim)` | as `q` |
/// | lse | `(batch, num_heads, seqlen_q)` | `(num_heads, total_q)` | f32; f64 for f64 |
///
/// These are the shapes of [`TensorLayout::Bshd`], the default. [`Attention::layout`] takes tensors with the heads before the
/// tokens. The shape of lse is the same in both.
///
/// `num_heads` is a multiple of `num_heads_k` (grouped-query and multi-query attention; keys and values are not
/// copied), `head_dim` is 1 to 512. The last axis must be contiguous; every other stride is free, 0 included. Sums run
/// in f32 (f64 for f64); in f32, probabilities below `2^-126` of a row's largest count as 0. On an NVIDIA GPU (feature `cuda`)
/// the types are f16 and bf16, `head_dim` is a multiple of 8 up to 256, and rows begin at multiples of 16 bytes.
///
/// Gradients flow to `q`, `k` and `v`, and from the lse too. The backward recomputes the scores; it may run several
/// times over one graph. The same inputs give the same bits, on the CPU on any number of threads; on a GPU the gradient of `q`
/// does so with [`Attention::deterministic`].
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
    pub(crate) mask: Mask,
    pub(crate) softmax_scale: Option<f64>,
    pub(crate) softcap: Option<f64>,
    pub(crate) alibi_slopes: Option<Tensor>,
    pub(crate) deterministic: bool,
    pub(crate) key_lengths: Option<KeyLengths>,
    pub(crate) layout: TensorLayout,
    output_layout: Option<TensorLayout>,
}

impl Attention {
    /// No mask, scale `1/sqrt(head_dim)`, no softcap, no ALiBi.
    pub fn new() -> Self {
        Self::default()
    }

    /// Which keys each query sees; [`Mask`] draws them.
    pub fn mask(mut self, mask: Mask) -> Self {
        self.mask = mask;
        self
    }

    /// Factor of the scores; any finite number. Without it, `1/sqrt(head_dim)`.
    pub fn softmax_scale(mut self, softmax_scale: f64) -> Self {
        self.softmax_scale = Some(softmax_scale);
        self
    }

    /// Bounds the scaled scores smoothly to `(-softcap, softcap)`, as Gemma 2 does; finite and above 0.
    pub fn softcap(mut self, softcap: f64) -> Self {
        self.softcap = Some(softcap);
        self
    }

    /// Linear biases by distance (ALiBi, Press et al. 2022): f32 of shape `(num_heads)` or `(batch, num_heads)`.
    ///
    /// No gradient is offered for the slopes, so slopes that are tracked for one are refused. They must be finite, which
    /// is checked on the CPU alone.
    pub fn alibi_slopes(mut self, slopes: &Tensor) -> Self {
        self.alibi_slopes = Some(slopes.clone());
        self
    }

    /// Whether the same inputs give the same bits of the gradient of `q` each time.
    ///
    /// Everything else always does, and on the CPU that gradient too. On a GPU, blocks of keys add to it in the order in which
    /// they come; with this they take turns, which costs 16 to 28% of the backward's speed (docs/cuda.md).
    pub fn deterministic(mut self, deterministic: bool) -> Self {
        self.deterministic = deterministic;
        self
    }

    /// How many keys of each sequence of a padded call count; see [`KeyLengths`].
    ///
    /// The mask and ALiBi line up the last query with the last key *that counts*. With 2 queries, room for 5 keys, of which
    /// 3 count, and [`Mask::Causal`]:
    ///
    /// ```text
    ///      PaddingSide::Right      PaddingSide::Left
    ///      k0 k1 k2 k3 k4          k0 k1 k2 k3 k4
    /// q0    x  x  .  .  .           .  .  x  x  .
    /// q1    x  x  x  .  .           .  .  x  x  x
    /// ```
    ///
    /// That is what a cache needs that is filled in part. It is wrong for self-attention of a batch that is padded on the
    /// right: there the last query is padding. Such a call is refused where the mask or ALiBi makes a difference. It has
    /// two ways out. [`CuSeqlens::from_mask`] and [`Self::forward_packed`] also skip the padding. And [`Mask::Causal`] needs
    /// no key lengths, because the padding comes after every query that is a token.
    pub fn key_lengths(mut self, key_lengths: &KeyLengths) -> Self {
        self.key_lengths = Some(key_lengths.clone());
        self
    }

    /// In which order the axes of q, k and v come, and those of the result unless [`Self::output_layout`] says otherwise.
    /// Without it, [`TensorLayout::Bshd`]. Neither layout is copied.
    pub fn layout(mut self, layout: TensorLayout) -> Self {
        self.layout = layout;
        self
    }

    /// In which order the axes of the result come, where it is not the order of q, k and v.
    pub fn output_layout(mut self, layout: TensorLayout) -> Self {
        self.output_layout = Some(layout);
        self
    }

    /// The order of the result's axes.
    pub(crate) fn layout_of_result(&self) -> TensorLayout {
        self.output_layout.unwrap_or(self.layout)
    }

    /// Attention over a padded batch; the result has the type of `q`, and its shape unless [`Self::output_layout`] differs.
    ///
    /// # Errors
    /// If shapes, types, strides, devices or options disagree with the table above, or the device has no kernel.
    /// Nothing is computed then.
    pub fn forward(&self, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor> {
        self.run(Problem::padded(self, q, k, v)?, q, k, v)
    }

    /// [`Self::forward`] over q, k and v in one tensor, as a fused projection gives them; the result is contiguous, of shape
    /// `(batch, seqlen, num_heads, head_dim)`.
    ///
    /// `qkv` is `(batch, seqlen, num_heads + 2 * num_heads_k, head_dim)`, or in [`TensorLayout::Bhsd`]
    /// `(batch, num_heads + 2 * num_heads_k, seqlen, head_dim)`: the heads of q, then those of k, then those of v.
    /// (A `(batch, seqlen, 3, num_heads, head_dim)` tensor is one after `reshape`.) Three views of it give the same
    /// values, but the gradient of each view is a tensor as large as `qkv`, padded with zeros and added up by Candle; here it
    /// comes in one piece.
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
    /// As [`Self::forward`], and if `qkv` has no head besides those of k and v.
    pub fn forward_qkv(&self, qkv: &Tensor, num_heads_k: usize) -> Result<Tensor> {
        let (problem, q) = Problem::fused(self, qkv, num_heads_k)?;
        let op = self.op(problem, Output::O, &q)?;
        Ok(qkv.apply_op1(FusedFlashAttention(op))?)
    }

    /// As [`Self::forward`], with the log-sum-exp of each row of scores (natural logarithm).
    ///
    /// Both results belong to the graph. A row that sees no key has lse minus infinity. To merge attention over parts of the
    /// keys, take [`Self::forward_partial`].
    ///
    /// # Errors
    /// As [`Self::forward`].
    pub fn forward_with_lse(&self, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<(Tensor, Tensor)> {
        self.run_with_lse(Problem::padded(self, q, k, v)?, q, k, v)
    }

    /// Attention within each sequence of a packed batch; the result has the type of `q`, and its shape unless
    /// [`Self::output_layout`] differs.
    ///
    /// Sequence `b` holds the rows `cu_seqlens_q[b]..cu_seqlens_q[b + 1]` of `q` and the rows
    /// `cu_seqlens_k[b]..cu_seqlens_k[b + 1]` of `k` and `v`. The mask lines up the ends of each pair.
    ///
    /// # Errors
    /// As [`Self::forward`], and if the lengths do not end at the tensors' last rows.
    pub fn forward_packed(
        &self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        cu_seqlens_q: &CuSeqlens,
        cu_seqlens_k: &CuSeqlens,
    ) -> Result<Tensor> {
        self.run(Problem::packed(self, (q, k, v), cu_seqlens_q, cu_seqlens_k)?, q, k, v)
    }

    /// As [`Self::forward_with_lse`], with o as it was summed: in f32 (f64 for f64), not rounded to the type of `q`. One part
    /// of the keys, for [`Self::merge`].
    ///
    /// # Errors
    /// As [`Self::forward`].
    pub fn forward_partial(&self, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<(Tensor, Tensor)> {
        self.run_partial(Problem::padded(self, q, k, v)?, q, k, v)
    }

    /// Attention over all keys from `(o, lse)` of parts of them, each with the same queries: o and lse, in the type of lse.
    ///
    /// Parts come from [`Self::forward_partial`] or [`Self::forward_packed_partial`] and are in the result's layout of this
    /// `Attention`; no other option plays a part. Gradients flow to every o and lse. A row without keys in a part (lse minus
    /// infinity) takes nothing from it, exactly; without keys in any part it is 0 with lse minus infinity, and its gradients
    /// are 0.
    ///
    /// ```
    /// # use candle_core::{Device, Tensor};
    /// # use candle_fa2::Attention;
    /// let q = Tensor::randn(0f32, 1f32, (1, 3, 8, 64), &Device::Cpu)?;
    /// let k = Tensor::randn(0f32, 1f32, (1, 6, 8, 64), &Device::Cpu)?;
    /// let attention = Attention::new();
    /// let mut parts = Vec::new();
    /// for start in [0, 2, 4] {
    ///     let part = k.narrow(1, start, 2)?; // on another device, in ring attention
    ///     parts.push(attention.forward_partial(&q, &part, &part)?);
    /// }
    /// let (o, _lse) = attention.merge(&parts)?;
    /// let whole = attention.forward(&q, &k, &k)?;
    /// assert!((o - whole)?.abs()?.max_all()?.to_scalar::<f32>()? < 1e-5);
    /// # Ok::<(), candle_core::Error>(())
    /// ```
    ///
    /// # Errors
    /// [`Error::MergeNothing`](crate::Error::MergeNothing) if `parts` is empty, [`Error::MergeMismatch`](crate::Error::MergeMismatch) if a part has other shapes, types or another
    /// device than the first, [`Error::Rank`](crate::Error::Rank) or [`Error::DType`](crate::Error::DType) if the first is no result of attention.
    pub fn merge(&self, parts: &[(Tensor, Tensor)]) -> Result<(Tensor, Tensor)> {
        merge::merge(parts, self.layout_of_result())
    }

    /// [`Self::forward_packed`] with the log-sum-exp, shape `(num_heads, total_q)`.
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
        self.run_with_lse(Problem::packed(self, (q, k, v), cu_seqlens_q, cu_seqlens_k)?, q, k, v)
    }

    /// [`Self::forward_partial`] of a packed batch.
    ///
    /// # Errors
    /// As [`Self::forward_packed`].
    pub fn forward_packed_partial(
        &self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        cu_seqlens_q: &CuSeqlens,
        cu_seqlens_k: &CuSeqlens,
    ) -> Result<(Tensor, Tensor)> {
        self.run_partial(Problem::packed(self, (q, k, v), cu_seqlens_q, cu_seqlens_k)?, q, k, v)
    }

    /// Whether [`Self::forward`] would accept this call. Computes nothing.
    ///
    /// # Errors
    /// The error that `forward` would return.
    pub fn supports(&self, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<()> {
        plan(&Problem::padded(self, q, k, v)?, q).map(drop)
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
        plan(&Problem::packed(self, (q, k, v), cu_seqlens_q, cu_seqlens_k)?, q).map(drop)
    }

    fn run(&self, problem: Problem, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor> {
        let op = self.op(problem, Output::O, q)?;
        Ok(q.apply_op3(k, v, op)?)
    }

    fn run_with_lse(&self, problem: Problem, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<(Tensor, Tensor)> {
        let (o, lse) = self.run_partial(problem, q, k, v)?;
        Ok((o.to_dtype(q.dtype())?, lse))
    }

    /// A custom op has one result, so o and lse come as one flat tensor of the accumulator's type. The two views cut
    /// from it keep both in the graph, and their gradients meet again in one backward of the op.
    fn run_partial(&self, problem: Problem, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<(Tensor, Tensor)> {
        let shapes = [problem.shape_o(), problem.shape_lse()];
        let op = self.op(problem, Output::OAndLse, q)?;
        Ok(op::o_and_lse(&q.apply_op3(k, v, op)?, shapes)?)
    }

    /// The operator of one checked call.
    pub(crate) fn op(&self, problem: Problem, output: Output, q: &Tensor) -> Result<FlashAttention> {
        let plan = logged_plan(&problem, q)?;
        Ok(FlashAttention::new(problem, plan, self.alibi_slopes.clone(), output))
    }
}

/// How the device of q computes `problem`.
fn plan(problem: &Problem, q: &Tensor) -> Result<Plan> {
    Plan::choose(problem, &DeviceCaps::of(q.device())?)
}

/// The same for a call that will run.
pub(crate) fn logged_plan(problem: &Problem, q: &Tensor) -> Result<Plan> {
    let plan = plan(problem, q)?;
    crate::plan::log(problem, &plan);
    Ok(plan)
}
