//! Who computes attention: this crate, and the attention that Candle has without it.

use anyhow::{bail, Result};
#[cfg(feature = "cuda")]
use candle_core::backend::BackendStorage;
use candle_core::backprop::GradStore;
#[cfg(feature = "cuda")]
use candle_core::CudaStorage;
use candle_core::{CpuStorage, CustomOp1, DType, Layout, Shape, Tensor, Var, D};
use candle_fa2::testing::Call;
use candle_fa2::{Attention, CuSeqlens};
use candle_nn::attention::{flash_attn, flash_attn_varlen_cpu, AttnMask};
use half::f16;

use crate::cases::{Case, Mask, Peer};
use crate::inputs::Inputs;

type Attend = Box<dyn Fn(&Tensor, &Tensor, &Tensor) -> Result<Tensor> + Send + Sync>;

/// One peer, ready to compute one case.
///
/// Each peer gets its inputs in the layout that suits it best, and its mask already built. Neither is timed.
pub struct Contender {
    q: Var,
    k: Var,
    v: Var,
    /// A forward without a backward, which keeps nothing.
    infer: Attend,
    /// For a forward that a backward follows.
    train: Attend,
    inputs: Axes,
    outputs: Axes,
}

/// The order of the axes of a peer's tensors.
#[derive(Clone, Copy, PartialEq)]
enum Axes {
    /// The order of [`Inputs`].
    SeqlenFirst,
    /// `(batch, heads, seqlen, head_dim)`.
    HeadsFirst,
}

impl Axes {
    /// Converts from the order of [`Inputs`] to this one, and back.
    fn swap(self, tensor: &Tensor) -> candle_core::Result<Tensor> {
        match self {
            Axes::SeqlenFirst => Ok(tensor.clone()),
            Axes::HeadsFirst => tensor.transpose(1, 2)?.contiguous(),
        }
    }
}

/// o, and dq, dk and dv if the case has a backward, in the layout of [`Inputs`].
pub struct Answer {
    pub o: Tensor,
    pub grads: Option<[Tensor; 3]>,
}

impl Peer {
    pub fn prepare(self, case: &Case, inputs: &Inputs) -> Result<Contender> {
        let (infer, train) = match self {
            Peer::Ours => (ours(case, inputs)?, ours(case, inputs)?),
            Peer::Standard => {
                let mask = additive_mask(case, inputs)?;
                (standard(case, mask.clone(), false), standard(case, mask, true))
            }
            Peer::CandleFlash => (candle_flash(case, inputs)?, candle_flash(case, inputs)?),
        };
        let packed = !case.lengths.is_empty();
        let (inputs_as, outputs_as) = match self {
            Peer::Standard => (Axes::HeadsFirst, Axes::HeadsFirst),
            Peer::CandleFlash if !packed => (Axes::SeqlenFirst, Axes::HeadsFirst),
            Peer::Ours | Peer::CandleFlash => (Axes::SeqlenFirst, Axes::SeqlenFirst),
        };
        let var = |tensor: &Tensor| Var::from_tensor(&inputs_as.swap(tensor)?);
        let (q, k, v) = (var(&inputs.q)?, var(&inputs.k)?, var(&inputs.v)?);
        Ok(Contender { q, k, v, infer, train, inputs: inputs_as, outputs: outputs_as })
    }
}

impl Contender {
    /// `do_` in the layout of this peer's output.
    pub fn upstream(&self, do_: &Tensor) -> Result<Tensor> {
        Ok(self.outputs.swap(do_)?)
    }

    pub fn forward(&self) -> Result<Tensor> {
        let [q, k, v] = [&self.q, &self.k, &self.v].map(|var| var.as_detached_tensor());
        (self.infer)(&q, &k, &v)
    }

    /// Our operator without autograd, with the same q, k, v and `upstream`.
    pub fn operator(&self, case: &Case, upstream: &Tensor) -> Result<Operator> {
        let (attention, q, k, v) = (attention(case), &self.q, &self.k, &self.v);
        let call = match cu_seqlens(case, q)? {
            None => Call::new(&attention, q, k, v)?,
            Some(cu_seqlens) => Call::packed(&attention, (q, k, v), &cu_seqlens, &cu_seqlens)?,
        };
        Ok(Operator { call, upstream: upstream.clone() })
    }

    /// o and the graph that computes its backward.
    #[cfg(feature = "cuda")]
    pub fn tracked_forward(&self) -> Result<Tensor> {
        (self.train)(&self.q, &self.k, &self.v)
    }

    /// The loss whose gradient for o is `upstream`.
    pub fn loss(&self, upstream: &Tensor) -> Result<Tensor> {
        let (_, loss) = self.graph(upstream)?;
        Ok(loss)
    }

    fn graph(&self, upstream: &Tensor) -> Result<(Tensor, Tensor)> {
        let o = (self.train)(&self.q, &self.k, &self.v)?;
        let loss = o.apply_op1(Upstream { do_: upstream.clone() })?;
        Ok((o, loss))
    }

    /// A forward, and the backward if there is an `upstream`. Checks and peak memory are taken of this.
    pub fn run(&self, upstream: Option<&Tensor>) -> Result<(Tensor, Option<GradStore>)> {
        match upstream {
            None => Ok((self.forward()?, None)),
            Some(upstream) => {
                let (o, loss) = self.graph(upstream)?;
                let grads = loss.backward()?;
                Ok((o, Some(grads)))
            }
        }
    }

    /// The result of [`Self::run`] in the layout of [`Inputs`].
    pub fn answer(&self, (o, grads): (Tensor, Option<GradStore>)) -> Result<Answer> {
        let grad = |grads: &GradStore, (name, var): (&str, &Var)| -> Result<Tensor> {
            let grad = grads.get(var).ok_or_else(|| anyhow::anyhow!("{name} got no gradient"))?;
            Ok(self.inputs.swap(grad)?)
        };
        let grads = match grads {
            Some(grads) => {
                Some([grad(&grads, ("q", &self.q))?, grad(&grads, ("k", &self.k))?, grad(&grads, ("v", &self.v))?])
            }
            None => None,
        };
        Ok(Answer { o: self.outputs.swap(&o)?, grads })
    }
}

/// The operator without autograd around it.
pub struct Operator {
    call: Call,
    upstream: Tensor,
}

impl Operator {
    pub fn run(&self) -> Result<[Tensor; 4]> {
        let o = self.forward()?;
        let [dq, dk, dv] = self.backward(&o)?;
        Ok([o, dq, dk, dv])
    }

    /// o, with the head_dim of the plan.
    pub fn forward(&self) -> Result<Tensor> {
        Ok(self.call.forward()?)
    }

    /// `o` of [`Self::forward`] with the head_dim of the case.
    #[cfg(feature = "cuda")]
    pub fn narrowed(&self, o: &Tensor) -> Result<Tensor> {
        Ok(self.call.narrowed(o)?)
    }

    /// dq, dk and dv, given the o of a forward.
    pub fn backward(&self, o: &Tensor) -> Result<[Tensor; 3]> {
        match self.call.backward(o, &self.upstream)? {
            (Some(dq), Some(dk), Some(dv)) => Ok([dq, dk, dv]),
            _ => bail!("q, k and v are variables, and one of them got no gradient"),
        }
    }
}

/// The lse of our forward: `(batch, num_heads, seqlen_q)`, packed `(num_heads, rows)`.
pub fn lse(case: &Case, Inputs { q, k, v, .. }: &Inputs) -> Result<Tensor> {
    let (_, lse) = match cu_seqlens(case, q)? {
        None => attention(case).forward_with_lse(q, k, v)?,
        Some(cu_seqlens) => attention(case).forward_packed_with_lse(q, k, v, &cu_seqlens, &cu_seqlens)?,
    };
    Ok(lse)
}

/// Where the sequences of a packed case begin and end, on the device of `q`.
fn cu_seqlens(case: &Case, q: &Tensor) -> Result<Option<CuSeqlens>> {
    let packed = !case.lengths.is_empty();
    Ok(if packed { Some(CuSeqlens::from_lengths(&case.lengths, q.device())?) } else { None })
}

/// The options of `case`.
pub fn attention(case: &Case) -> Attention {
    Attention::new().tf32(case.tf32).mask(match case.mask {
        Mask::None => candle_fa2::Mask::None,
        Mask::Causal => candle_fa2::Mask::Causal,
        Mask::Window { left, right } => candle_fa2::Mask::Window { left, right },
    })
}

fn ours(case: &Case, inputs: &Inputs) -> Result<Attend> {
    let attention = attention(case);
    Ok(match cu_seqlens(case, &inputs.q)? {
        None => Box::new(move |q, k, v| Ok(attention.forward(q, k, v)?)),
        Some(cu_seqlens) => Box::new(move |q, k, v| Ok(attention.forward_packed(q, k, v, &cu_seqlens, &cu_seqlens)?)),
    })
}

/// The attention of Candle's models. Without gradients it uses Candle's fused softmax, which has no backward.
fn standard(case: &Case, mask: Option<Tensor>, train: bool) -> Attend {
    let softmax_scale = case.softmax_scale();
    let group = case.num_heads / case.num_heads_k();
    Box::new(move |q, k, v| {
        let (k, v) = (repeat_heads(k, group)?, repeat_heads(v, group)?);
        let mut s = (q.matmul(&k.t()?)? * softmax_scale)?;
        if let Some(mask) = &mask {
            s = s.broadcast_add(mask)?;
        }
        let p = if train { candle_nn::ops::softmax(&s, D::Minus1)? } else { candle_nn::ops::softmax_last_dim(&s)? };
        Ok(p.matmul(&v)?)
    })
}

/// `(seqlen_q, seqlen_k)`: 0 where the key is visible, minus infinity elsewhere; `None` if every key is visible.
fn additive_mask(case: &Case, inputs: &Inputs) -> Result<Option<Tensor>> {
    let sequence = case.sequences()[0];
    let mut mask = vec![f32::NEG_INFINITY; sequence.seqlen_q * sequence.seqlen_k];
    for (row, mask) in mask.chunks_exact_mut(sequence.seqlen_k).enumerate() {
        mask[case.visible_keys(&sequence, row)].fill(0.0);
    }
    if mask.iter().all(|&hidden| hidden == 0.0) {
        return Ok(None);
    }
    let mask = Tensor::from_vec(mask, (sequence.seqlen_q, sequence.seqlen_k), inputs.q.device())?;
    Ok(Some(mask.to_dtype(case.dtype)?))
}

/// Repeats each head `group` times: Candle's matmul does not share heads.
fn repeat_heads(tensor: &Tensor, group: usize) -> Result<Tensor> {
    if group == 1 {
        return Ok(tensor.clone());
    }
    let (batch, heads, seqlen, head_dim) = tensor.dims4()?;
    let repeated = tensor.unsqueeze(2)?.expand((batch, heads, group, seqlen, head_dim))?;
    Ok(repeated.reshape((batch, heads * group, seqlen, head_dim))?)
}

fn candle_flash(case: &Case, inputs: &Inputs) -> Result<Attend> {
    let softmax_scale = case.softmax_scale() as f32;
    let causal = case.mask == Mask::Causal;
    let (seqlen_q, seqlen_k) = case.seqlens();
    if !case.lengths.is_empty() {
        let lengths: Vec<u32> = case.lengths.iter().map(|&length| length as u32).collect();
        let lengths = Tensor::new(lengths, inputs.q.device())?;
        return Ok(Box::new(move |q, k, v| {
            let (longest_q, longest_k) = (seqlen_q, seqlen_k);
            Ok(flash_attn_varlen_cpu(
                q,
                k,
                v,
                None,
                &lengths,
                &lengths,
                longest_q,
                longest_k,
                softmax_scale,
                causal,
                None,
                None,
            )?)
        }));
    }
    let half = case.dtype == DType::F16;
    Ok(Box::new(move |q, k, v| {
        // Its masks line up the first query with key `kv_offset`.
        let mask = if causal { AttnMask::causal_with_offset(seqlen_k - seqlen_q) } else { AttnMask::None };
        let attend = if half { flash_attn::<f16> } else { flash_attn::<f32> };
        Ok(attend(q, k, v, softmax_scale, mask, None, None)?)
    }))
}

/// A loss whose gradient for o is `do_`; its value is meaningless. A loss made of Candle's operators would add passes
/// over o to the time of attention.
struct Upstream {
    do_: Tensor,
}

impl CustomOp1 for Upstream {
    fn name(&self) -> &'static str {
        "upstream"
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        Ok((CpuStorage::F32(vec![0.0]), Shape::from(())))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, o: &CudaStorage, _: &Layout) -> candle_core::Result<(CudaStorage, Shape)> {
        let device = o.device().clone();
        let loss = device.alloc_zeros::<f32>(1)?;
        Ok((CudaStorage::wrap_cuda_slice(loss, device), Shape::from(())))
    }

    fn bwd(&self, _: &Tensor, _: &Tensor, _: &Tensor) -> candle_core::Result<Option<Tensor>> {
        Ok(Some(self.do_.clone()))
    }
}
