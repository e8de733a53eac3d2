//! Runs the operator on a case. Returns values and gradients in the form of the reference.

use super::cases::{accumulator, first_token, in_layout, Case, Lengths};
use super::compare;
use super::nonfinite::Nonfinite;
use anyhow::{Context, Result};
use attention_reference::{self as reference, Input, Output, Rows, Tolerance};
use candle_core::{DType, Device, Tensor, Var, D};
use candle_fa2::testing::{self, CudaPlan, Kernel, Plan, Problem};
use candle_fa2::Attention;

/// q, k and v as variables, and the options.
pub struct Call {
    pub attention: Attention,
    pub q: Var,
    pub k: Var,
    pub v: Var,
}

impl Case {
    pub fn call(&self, input: &Input) -> Result<Call> {
        Ok(Call {
            attention: self.attention(input)?,
            q: Var::from_tensor(&self.query_tensor(&input.q)?)?,
            k: Var::from_tensor(&self.key_tensor(&input.k)?)?,
            v: Var::from_tensor(&self.value_tensor(&input.v)?)?,
        })
    }

    pub fn forward(&self, attention: &Attention, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor> {
        Ok(match self.lengths {
            Lengths::Padded { .. } => attention.forward(q, k, v)?,
            Lengths::Packed(_) => {
                let (cu_seqlens_q, cu_seqlens_k) = self.cu_seqlens()?;
                attention.forward_packed(q, k, v, &cu_seqlens_q, &cu_seqlens_k)?
            }
        })
    }

    pub fn forward_with_lse(
        &self,
        attention: &Attention,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
    ) -> Result<(Tensor, Tensor)> {
        Ok(match self.lengths {
            Lengths::Padded { .. } => attention.forward_with_lse(q, k, v)?,
            Lengths::Packed(_) => {
                let (cu_seqlens_q, cu_seqlens_k) = self.cu_seqlens()?;
                attention.forward_packed_with_lse(q, k, v, &cu_seqlens_q, &cu_seqlens_k)?
            }
        })
    }

    /// The loss whose gradient with respect to o is `do`. If `self.dlse`, its gradient with respect to lse is `dlse`.
    pub fn loss(&self, input: &Input, o: &Tensor, lse: &Tensor) -> Result<Tensor> {
        let do_ = self.output_tensor(&input.do_)?;
        let loss = (o * do_)?.sum_all()?.to_dtype(accumulator(self.dtype))?;
        Ok(if self.dlse { (loss + self.lse_loss(input, lse)?)? } else { loss })
    }

    /// The loss whose gradient with respect to lse is `dlse`.
    pub fn lse_loss(&self, input: &Input, lse: &Tensor) -> Result<Tensor> {
        Ok((lse * self.dlse_tensor(input)?)?.sum_all()?)
    }

    /// The gradient of lse, in its layout and type.
    pub fn dlse_tensor(&self, input: &Input) -> Result<Tensor> {
        let dlse = Tensor::from_slice(&input.dlse, self.token_major_lse(), &Device::Cpu)?;
        Ok(self.head_major(&dlse)?.to_dtype(accumulator(self.dtype))?.to_device(&self.device)?)
    }

    /// o and lse of untracked inputs, without gradients. Checks that `forward` and `forward_with_lse` give the same bits of o.
    pub fn run_forward(&self, input: &Input) -> Result<Output> {
        let attention = self.attention(input)?;
        let (q, k, v) = (self.query_tensor(&input.q)?, self.key_tensor(&input.k)?, self.value_tensor(&input.v)?);
        let (o, lse) = self.forward_with_lse(&attention, &q, &k, &v)?;
        compare::same_bits("o with and without lse", &o, &self.forward(&attention, &q, &k, &v)?, self)?;
        let none = Rows::default;
        Ok(Output { o: self.output_rows(&o)?, lse: self.lse_rows(&lse)?, dq: none(), dk: none(), dv: none() })
    }

    /// Compares o and lse of untracked inputs with the reference.
    pub fn check_forward(&self) -> Result<()> {
        let input = self.draw();
        let got = self.run_forward(&input).with_context(|| format!("case {self}"))?;
        let want = reference::attention(&input);
        let tolerances = reference::tolerances(&input, &want);
        compare::close("o", &got.o, &want.o, &tolerances[0], self)?;
        compare::close("lse", &got.lse, &want.lse, &tolerances[1], self)
    }

    /// o, lse and the three gradients. Checks that `forward` and `forward_with_lse` give the same bits of o.
    pub fn run(&self, input: &Input) -> Result<Output> {
        let Call { attention, q, k, v } = self.call(input)?;
        let (o_with_lse, lse) = self.forward_with_lse(&attention, &q, &k, &v)?;
        let o = self.forward(&attention, &q, &k, &v)?;
        compare::same_bits("o with and without lse", &o_with_lse, &o, self)?;
        anyhow::ensure!(lse.dtype() == accumulator(self.dtype), "lse is {:?}\ncase {self}", lse.dtype());
        // Without `self.dlse`, use the result of `forward`, because it has another backward.
        let loss = self.loss(input, if self.dlse { &o_with_lse } else { &o }, &lse)?;
        let grads = loss.backward()?;
        let grad = |name: &str, var: &Var| -> Result<Rows> {
            let grad = grads.get(var).with_context(|| format!("{name} has no gradient\ncase {self}"))?;
            anyhow::ensure!(grad.dims() == var.dims() && grad.dtype() == var.dtype(), "d{name}: {grad:?}\ncase {self}");
            self.input_rows(grad, name == "q")
        };
        Ok(Output {
            o: self.output_rows(&o)?,
            lse: self.lse_rows(&lse)?,
            dq: grad("q", &q)?,
            dk: grad("k", &k)?,
            dv: grad("v", &v)?,
        })
    }

    /// The problem of `call`.
    pub fn problem(&self, Call { attention, q, k, v }: &Call) -> Result<Problem> {
        Ok(match self.lengths {
            Lengths::Padded { .. } => testing::problem(attention, q, k, v)?,
            Lengths::Packed(_) => {
                let (cu_seqlens_q, cu_seqlens_k) = self.cu_seqlens()?;
                testing::problem_packed(attention, (q, k, v), &cu_seqlens_q, &cu_seqlens_k)?
            }
        })
    }

    /// As [`Self::run`], but on a GPU, with only the kernels that `allow` accepts, and without autograd. Also returns the plan.
    pub fn run_with(&self, input: &Input, allow: impl Fn(&Kernel) -> bool) -> Result<(CudaPlan, Output)> {
        let call = self.call(input)?;
        let problem = self.problem(&call)?;
        let plan = CudaPlan::choose(&problem, &testing::device_caps(&self.device)?, allow)?;
        let Call { attention, q, k, v } = &call;
        let call = testing::Call::with_plan(attention, problem, (q, k, v), Plan::Cuda(plan.clone()))?;
        let o = call.forward()?;
        let (o_with_lse, lse) = call.forward_with_lse()?;
        compare::same_bits("o with and without lse", &o_with_lse.to_dtype(o.dtype())?, &o, self)?;
        let do_ = self.output_tensor(&input.do_)?;
        let (dq, dk, dv) = if self.dlse {
            call.backward_with_lse((&o_with_lse, &lse), (&do_, &self.dlse_tensor(input)?))?
        } else {
            call.backward(&o, &do_)?
        };
        let grad = |name: &str, grad: Option<Tensor>| -> Result<Rows> {
            self.input_rows(&grad.with_context(|| format!("no {name}"))?, name == "dq")
        };
        let got = Output {
            o: self.output_rows(&call.narrowed(&o)?)?,
            lse: self.lse_rows(&lse)?,
            dq: grad("dq", dq)?,
            dk: grad("dk", dk)?,
            dv: grad("dv", dv)?,
        };
        Ok((plan, got))
    }

    /// Runs the case on `input` and compares all five results with the reference.
    pub fn check_on(&self, input: &Input) -> Result<()> {
        let got = self.run(input).with_context(|| format!("case {self}"))?;
        self.check_output(input, &got)
    }

    /// [`Self::check_on`] with the input that the case draws.
    pub fn check(&self) -> Result<()> {
        self.check_on(&self.draw())
    }

    /// Checks that each tensor of `got` is within the tolerance of the reference.
    pub fn check_output(&self, input: &Input, got: &Output) -> Result<()> {
        self.check_output_within(1.0, input, got)
    }

    /// [`Self::check_output`] with `factor` times each limit.
    pub fn check_output_within(&self, factor: f64, input: &Input, got: &Output) -> Result<()> {
        self.check_outputs_within(factor, input, &[got])
    }

    /// Checks that `got`, the output of `input`, is the output of `clean`. The two inputs differ only in hidden keys.
    ///
    /// On a GPU, gradients may be NaN if `input` has a non-finite number in the same sequence and group of heads.
    pub fn check_hidden(&self, clean: &Input, input: &Input, got: &Output) -> Result<()> {
        let want = reference::attention(clean);
        let tolerances = reference::tolerances(clean, &want);
        self.close(&Nonfinite::of(input), got, &want, &tolerances)
    }

    /// [`Self::check_output_within`] for several outputs. The reference takes most of the time, and it runs only once.
    pub fn check_outputs_within(&self, factor: f64, input: &Input, outputs: &[&Output]) -> Result<()> {
        let want = reference::attention(input);
        let tolerances = reference::tolerances(input, &want).map(|tolerance| tolerance.scaled(factor));
        let nonfinite = Nonfinite::of(input);
        outputs.iter().try_for_each(|got| self.close(&nonfinite, got, &want, &tolerances))
    }

    /// Compares with the reference. On a GPU, gradients may also have the NaN that [`Nonfinite`] allows.
    fn close(&self, nonfinite: &Nonfinite, got: &Output, want: &Output, tolerances: &[Tolerance; 5]) -> Result<()> {
        for (((name, got), (_, want)), tolerance) in got.named().into_iter().zip(want.named()).zip(tolerances) {
            let spreads = !self.device.is_cpu() && matches!(name, "dq" | "dk" | "dv");
            let got = if spreads { &nonfinite.without_spread(got, want) } else { got };
            compare::close(name, got, want, tolerance, self)?;
        }
        Ok(())
    }

    /// The rows of a tensor with the shape and layout of o.
    pub fn output_rows(&self, o: &Tensor) -> Result<Rows> {
        self.rows(&in_layout(o, self.layouts.1)?, true)
    }

    /// The rows of a gradient with the layout and the rows of q, or of k.
    pub fn input_rows(&self, grad: &Tensor, queries: bool) -> Result<Rows> {
        self.rows(&in_layout(grad, self.layouts.0)?, queries)
    }

    /// The rows of a tensor with the rows of q, or of k, and the tokens before the heads. Checks that rows of invalid keys
    /// are 0, and leaves them out.
    fn rows(&self, tensor: &Tensor, queries: bool) -> Result<Rows> {
        let lengths = self.sequences();
        let lengths = lengths.iter().map(|l| if queries { l.0 } else { l.1 }).collect();
        let heads = if queries { self.num_heads } else { self.num_heads_k };
        let width = tensor.dim(D::Minus1)?;
        let mut values = values(tensor)?;
        if let (false, Some((counts, side)), &Lengths::Padded { seqlen_k, .. }) =
            (queries, &self.key_lengths, &self.lengths)
        {
            let row = heads * width;
            let mut kept = Vec::new();
            for (sequence, &count) in values.chunks_exact((seqlen_k * row).max(1)).zip(counts) {
                let (before, from) = sequence.split_at(first_token(*side, count, seqlen_k) * row);
                let (these, after) = from.split_at(count * row);
                anyhow::ensure!(before.iter().chain(after).all(|&x| x == 0.0), "invalid keys are not 0\ncase {self}");
                kept.extend(these);
            }
            values = kept;
        }
        Ok(Rows { lengths, heads, width, values, ..Rows::default() })
    }

    /// lse, `(batch, num_heads, seqlen_q)` or packed `(num_heads, total_q)`, as rows of one number.
    pub fn lse_rows(&self, lse: &Tensor) -> Result<Rows> {
        let token_major = match self.lengths {
            Lengths::Padded { .. } => lse.transpose(1, 2)?,
            Lengths::Packed(_) => lse.transpose(0, 1)?,
        };
        anyhow::ensure!(
            token_major.dims() == self.token_major_lse(),
            "lse has shape {:?}, but its heads must come before its tokens\ncase {self}",
            lse.dims()
        );
        let lengths = self.sequences().iter().map(|l| l.0).collect();
        Ok(Rows { lengths, heads: self.num_heads, width: 1, values: values(&token_major)?, ..Rows::default() })
    }

    fn token_major_lse(&self) -> Vec<usize> {
        let mut shape = self.shape_q();
        shape.pop();
        shape
    }

    /// Converts lse from the layout of the reference to the layout of the operator.
    fn head_major(&self, lse: &Tensor) -> Result<Tensor> {
        Ok(match self.lengths {
            Lengths::Padded { .. } => lse.transpose(1, 2)?.contiguous()?,
            Lengths::Packed(_) => lse.transpose(0, 1)?.contiguous()?,
        })
    }
}

/// The elements of a tensor, in order.
pub fn values(tensor: &Tensor) -> Result<Vec<f64>> {
    Ok(tensor.to_dtype(DType::F64)?.flatten_all()?.to_vec1()?)
}
