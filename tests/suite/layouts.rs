//! A view with any strides gives the same bits as its contiguous copy, in values and in gradients through the view.
//!
//! On the CPU offsets and strides are odd numbers. On a GPU, kernels read rows in chunks, so they are odd numbers of chunks.

use crate::common::cases::{self, gpu_targets_or_skip, targets, window, Case};
use crate::common::compare;
use crate::common::run::Call;
use anyhow::{ensure, Context, Result};
use candle_core::{Tensor, Var};
use candle_fa2::{testing, Attention, Mask};

/// A view of shape `dims` into a larger or transposed tensor.
struct View {
    name: &'static str,
    /// Shape of the stored tensor, for a view of shape `dims` whose rows begin at multiples of `chunk` elements.
    base: fn(&[usize], usize) -> Vec<usize>,
    /// The view of the stored tensor.
    view: fn(&Tensor, &[usize], usize) -> candle_core::Result<Tensor>,
}

/// Views of `(batch, seqlen, heads, head_dim)`.
const PADDED: [View; 9] = [
    View { name: "contiguous", base: |d, _| d.to_vec(), view: |t, _, _| Ok(t.clone()) },
    View { name: "heads first", base: |d, _| vec![d[0], d[2], d[1], d[3]], view: |t, _, _| t.transpose(1, 2) },
    View { name: "sequence first", base: |d, _| vec![d[1], d[0], d[2], d[3]], view: |t, _, _| t.transpose(0, 1) },
    View {
        name: "slice of every axis",
        base: |d, chunk| vec![d[0] + 2, d[1] + 3, d[2] + 1, d[3] + 5 * chunk],
        view: |t, d, chunk| t.narrow(0, 1, d[0])?.narrow(1, 2, d[1])?.narrow(2, 1, d[2])?.narrow(3, 3 * chunk, d[3]),
    },
    View {
        name: "slice of heads first",
        base: |d, chunk| vec![d[0], d[2] + 2, d[1] + 1, d[3] + chunk],
        view: |t, d, chunk| t.narrow(1, 2, d[2])?.narrow(2, 1, d[1])?.narrow(3, chunk, d[3])?.transpose(1, 2),
    },
    View {
        name: "one of q, k, v in one tensor",
        base: |d, _| vec![d[0], d[1], 3, d[2], d[3]],
        view: |t, _, _| t.narrow(2, 1, 1)?.squeeze(2),
    },
    View {
        name: "one sequence for the whole batch",
        base: |d, _| vec![1, d[1], d[2], d[3]],
        view: |t, d, _| t.broadcast_as(d),
    },
    View { name: "one head for all", base: |d, _| vec![d[0], d[1], 1, d[3]], view: |t, d, _| t.broadcast_as(d) },
    View { name: "one token for all", base: |d, _| vec![d[0], 1, d[2], d[3]], view: |t, d, _| t.broadcast_as(d) },
];

/// Views of `(total, heads, head_dim)`.
const PACKED: [View; 5] = [
    View { name: "contiguous", base: |d, _| d.to_vec(), view: |t, _, _| Ok(t.clone()) },
    View { name: "heads first", base: |d, _| vec![d[1], d[0], d[2]], view: |t, _, _| t.transpose(0, 1) },
    View {
        name: "slice of every axis",
        base: |d, chunk| vec![d[0] + 3, d[1] + 1, d[2] + 5 * chunk],
        view: |t, d, chunk| t.narrow(0, 2, d[0])?.narrow(1, 1, d[1])?.narrow(2, 3 * chunk, d[2]),
    },
    View {
        name: "one of q, k, v in one tensor",
        base: |d, _| vec![d[0], 3, d[1], d[2]],
        view: |t, _, _| t.narrow(1, 1, 1)?.squeeze(1),
    },
    View { name: "one head for all", base: |d, _| vec![d[0], 1, d[2]], view: |t, d, _| t.broadcast_as(d) },
];

/// The stored variables, and their views as q, k and v.
struct Bases {
    vars: [Var; 3],
    dims: [Vec<usize>; 3],
    chunk: usize,
}

impl Bases {
    /// Draws the stored tensors for `views` of q, k and v of the case, on the device of the case.
    fn draw(case: &Case, views: [&View; 3]) -> Result<Self> {
        Self::draw_in_chunks(case, views, cases::chunk(&case.device))
    }

    fn draw_in_chunks(case: &Case, views: [&View; 3], chunk: usize) -> Result<Self> {
        let dims = [case.shape_q(), case.shape_k(), case.shape_v()];
        let mut vars = Vec::new();
        for (n, (view, dims)) in views.into_iter().zip(&dims).enumerate() {
            let shape = (view.base)(dims, chunk);
            let count = shape.iter().product();
            // The q of this case is a list of `len` normally distributed numbers.
            let mut source = Case { num_heads: 1, num_heads_k: 1, head_dim: 1, ..case.clone() }.batch(1, count, 1);
            source.softmax_scale = Some(n as f64);
            vars.push(Var::from_tensor(&case.tensor(&source.draw().q, &shape)?)?);
        }
        Ok(Self { vars: vars.try_into().expect("three views"), dims, chunk })
    }

    /// The views q, k and v.
    fn views(&self, views: [&View; 3]) -> Result<Vec<Tensor>> {
        let all = views.iter().zip(&self.vars).zip(&self.dims);
        all.map(|((view, var), dims)| Ok((view.view)(var, dims, self.chunk)?)).collect()
    }

    /// o, lse and the gradients of the three variables, computed from the views or from their contiguous copies.
    fn results(&self, case: &Case, views: [&View; 3], copied: bool) -> Result<Vec<(&'static str, Tensor)>> {
        let input = case.draw();
        let attention = case.attention(&input)?;
        let mut seen = Vec::new();
        for view in self.views(views)? {
            seen.push(if copied { view.contiguous()? } else { view });
        }
        let (o, lse) = case.forward_with_lse(&attention, &seen[0], &seen[1], &seen[2])?;
        let grads = case.loss(&input, &o, &lse)?.backward()?;
        let grad = |n: usize| anyhow::Ok(grads.get(&self.vars[n]).context("no gradient")?.clone());
        let plain = case.forward(&attention, &seen[0], &seen[1], &seen[2])?;
        Ok(vec![
            ("o", o),
            ("lse", lse),
            ("o without lse", plain),
            ("gradient of the variable of q", grad(0)?),
            ("gradient of the variable of k", grad(1)?),
            ("gradient of the variable of v", grad(2)?),
        ])
    }
}

fn check(case: &Case, views: [&View; 3]) -> Result<()> {
    check_in_chunks(case, views, cases::chunk(&case.device))
}

fn check_in_chunks(case: &Case, views: [&View; 3], chunk: usize) -> Result<()> {
    // The test compares bits, so the backward on a GPU must be deterministic.
    let case = &case.clone().deterministic();
    let bases = Bases::draw_in_chunks(case, views, chunk)?;
    let viewed = bases.results(case, views, false)?;
    let copied = bases.results(case, views, true)?;
    let what = format!("case {case}, q {}, k {}, v {}", views[0].name, views[1].name, views[2].name);
    for ((name, got), (_, want)) in viewed.iter().zip(&copied) {
        compare::same_bits(name, got, want, &what)?;
    }
    Ok(())
}

#[test]
fn views_of_padded_tensors_equal_their_copies() -> Result<()> {
    for target in targets() {
        let case = Case::new(&target).batch(2, 19, 23).heads(4, 2).head_dim(8).mask(Mask::Causal);
        for view in &PADDED {
            check(&case, [view, view, view])?;
            check(&case, [&PADDED[0], view, &PADDED[3]])?;
            check(&case, [view, &PADDED[1], &PADDED[0]])?;
        }
        // Several tiles, and axes of size 1, whose strides do not matter.
        let wide =
            Case::new(&target).batch(1, 140, 290).heads(2, 1).head_dim(16).head_dim_v(24).mask(window(150, 20)).dlse();
        let single = Case::new(&target).batch(1, 1, 1).heads(1, 1).head_dim(1);
        for view in &PADDED {
            check(&wide, [view, view, view])?;
            check(&single, [view, view, view])?;
        }
    }
    Ok(())
}

#[test]
fn views_of_packed_tensors_equal_their_copies() -> Result<()> {
    for target in targets() {
        let case = Case::new(&target).packed(&[(5, 9), (0, 2), (20, 14)]).heads(4, 2).head_dim(8).mask(Mask::Causal);
        for view in &PACKED {
            check(&case, [view, view, view])?;
            check(&case.clone().head_dim_v(5).dlse(), [&PACKED[0], view, &PACKED[2]])?;
        }
    }
    Ok(())
}

/// q, k and v in one tensor: the values equal those of three separate tensors, and so do the parts of the gradient.
#[test]
fn one_tensor_of_q_k_and_v_equals_three() -> Result<()> {
    for target in targets() {
        let case = |heads: usize, heads_k, seqlen, head_dim| {
            Case::new(&target).batch(2, seqlen, seqlen).heads(heads, heads_k).head_dim(head_dim).deterministic()
        };
        for case in [
            case(3, 3, 70, 64).mask(Mask::Causal),
            case(4, 2, 150, 8),
            case(8, 1, 33, 32).mask(window(9, 2)).softcap(5.0),
            case(2, 2, 1, 16),
            case(2, 1, 0, 16),
            case(0, 0, 5, 16),
        ] {
            let input = case.draw();
            let Call { attention, q, k, v } = case.call(&input)?;
            let (heads_k, what) = (k.dim(2)?, format!("case {case}"));
            let parts = [&q, &k, &v].map(|var| var.detach());
            let contiguous = Var::from_tensor(&Tensor::cat(&parts, 2)?)?;
            let heads_first = Var::from_tensor(&contiguous.transpose(1, 2)?.contiguous()?)?;
            let longer = Var::from_tensor(&Tensor::cat(&[&contiguous.narrow(0, 1, 1)?, contiguous.as_tensor()], 0)?)?;
            let do_ = case.tensor(&input.do_, &case.shape_o())?;
            let o = attention.forward(&q, &k, &v)?;
            let grads = (&o * &do_)?.sum_all()?.backward()?;
            let grad = |var: &Var| grads.get(var).context("no gradient").cloned();
            let want = Tensor::cat(&[grad(&q)?, grad(&k)?, grad(&v)?], 2)?;
            type Seen = fn(&Tensor) -> candle_core::Result<Tensor>;
            let views: [(&Var, Seen); 3] = [
                (&contiguous, |t| Ok(t.clone())),
                (&heads_first, |t| t.transpose(1, 2)),
                (&longer, |t| t.narrow(0, 1, 2)), // the last two of a batch of 3
            ];
            for (var, view) in views {
                let fused = attention.forward_qkv(&view(var)?, heads_k)?;
                compare::same_bits("o", &fused, &o, &what)?;
                let loss = (&fused * &do_)?.sum_all()?;
                for _ in 0..2 {
                    let got = view(loss.backward()?.get(var).context("no gradient")?)?.contiguous()?;
                    compare::same_bits("dqkv", &got, &want, &what)?;
                }
            }
        }
    }
    Ok(())
}

/// A GPU cannot read rows that are not 16-byte aligned, so a call copies such a tensor first.
#[test]
#[cfg_attr(not(feature = "cuda"), ignore = "needs the feature cuda")]
fn rows_between_chunks_are_copied_on_a_gpu() -> Result<()> {
    for target in gpu_targets_or_skip() {
        let case = Case::new(&target).batch(2, 19, 23).heads(4, 2).head_dim(8);
        let (plain, odd) = (&PADDED[0], &PADDED[3]);
        for views in [[odd, plain, plain], [plain, odd, plain], [plain, plain, odd]] {
            check_in_chunks(&case, views, 1)?;
        }
        // q, k and v in one tensor.
        let wide = Var::from_tensor(&case.tensor(&case.draw().q, &[2, 19, 4, 8])?)?;
        let odd = Tensor::cat(&[wide.as_tensor(), wide.as_tensor()], 3)?.narrow(3, 1, 8)?;
        let o = Attention::new().forward_qkv(&odd, 1)?;
        compare::same_bits("o", &o, &Attention::new().forward_qkv(&odd.contiguous()?, 1)?, &"one odd tensor")?;
        ensure!(o.sqr()?.sum_all()?.backward()?.get(&wide).is_some(), "no gradient through the copy");
    }
    Ok(())
}

/// Slopes may be views too.
#[test]
fn slopes_that_are_views_equal_their_copies() -> Result<()> {
    for target in targets() {
        let case = Case::new(&target).batch(3, 9, 11).heads(4, 2);
        let input = case.draw();
        let Call { q, k, v, .. } = case.call(&input)?;
        let table = Tensor::arange(0f32, 24.0, &case.device)?.affine(0.02, 0.01)?.reshape((4, 6))?;
        // A column for the heads, a transposed block for batch and heads, one element for all.
        let column = table.narrow(1, 2, 1)?.squeeze(1)?;
        let block = table.narrow(1, 1, 3)?.t()?;
        let one = table.narrow(0, 1, 1)?.narrow(1, 1, 1)?.broadcast_as((3, 4))?;
        for (name, slopes) in [("column", column), ("block", block), ("one", one)] {
            let viewed = Attention::new().alibi_slopes(&slopes).forward(&q, &k, &v)?;
            let copied = Attention::new().alibi_slopes(&slopes.contiguous()?).forward(&q, &k, &v)?;
            compare::same_bits("o", &viewed, &copied, &format!("case {case}, slopes {name}"))?;
        }
    }
    Ok(())
}

/// The operator after o in the graph decides the strides of the gradient of o. All these graphs compute the same loss.
#[test]
fn gradients_through_transposed_and_expanded_results() -> Result<()> {
    for target in targets() {
        let case = Case::new(&target).batch(2, 9, 11).heads(4, 2).head_dim(8).head_dim_v(12);
        let case = case.mask(Mask::Causal).deterministic();
        let input = case.draw();
        let Call { attention, q, k, v } = case.call(&input)?;
        let do_ = case.tensor(&input.do_, &case.shape_o())?;
        let ones = do_.ones_like()?;
        let loss = |o: &Tensor, grad: &Tensor| -> candle_core::Result<Tensor> { (o * grad)?.sum_all() };
        type Loss<'a> = &'a dyn Fn(&Tensor) -> candle_core::Result<Tensor>;
        let pairs: [(&str, Loss, Loss); 4] = [
            ("transposed", &|o| loss(&o.transpose(1, 2)?, &do_.transpose(1, 2)?), &|o| loss(o, &do_)),
            ("transposed and copied", &|o| loss(&o.transpose(1, 3)?.contiguous()?, &do_.transpose(1, 3)?), &|o| {
                loss(o, &do_)
            }),
            ("expanded from a sum", &|o| o.sum_all(), &|o| loss(o, &ones)),
            ("expanded from sums over an axis", &|o| o.sum_keepdim(3)?.sum(1)?.sum_all(), &|o| loss(o, &ones)),
        ];
        for (name, loss, plain) in pairs {
            let grads = |loss: Loss| -> Result<Vec<Tensor>> {
                let grads = loss(&attention.forward(&q, &k, &v)?)?.backward()?;
                [&q, &k, &v].into_iter().map(|var| Ok(grads.get(var).context("no gradient")?.clone())).collect()
            };
            for (n, (got, want)) in grads(loss)?.iter().zip(&grads(plain)?).enumerate() {
                compare::same_bits(["dq", "dk", "dv"][n], got, want, &format!("case {case}, {name}"))?;
            }
        }
    }
    Ok(())
}

/// The gradient of o has unusual strides. Candle's autograd adds gradients into contiguous tensors, so this test calls the
/// operator's `bwd` directly.
#[test]
fn gradients_that_are_views_equal_their_copies() -> Result<()> {
    for target in targets() {
        let case = Case::new(&target).batch(2, 140, 60).heads(4, 2).head_dim(8).mask(Mask::Causal).deterministic();
        let input = case.draw();
        let call = case.call(&input)?;
        let call = testing::Call::new(&call.attention, &call.q, &call.k, &call.v)?;
        let o = call.forward()?;
        let dims = case.shape_o();
        let last_axis = [
            View { name: "one dim for all", base: |d, _| vec![d[0], d[1], d[2], 1], view: |t, d, _| t.broadcast_as(d) },
            View { name: "one number for all", base: |_, _| vec![1], view: |t, d, _| t.broadcast_as(d) },
            View {
                name: "head_dim first",
                base: |d, _| vec![d[3], d[1], d[2], d[0]],
                view: |t, _, _| t.transpose(0, 3),
            },
        ];
        for view in PADDED.iter().chain(&last_axis) {
            let base = Bases::draw(&case, [view, &PADDED[0], &PADDED[0]])?;
            let do_ = (view.view)(&base.vars[0], &dims, base.chunk)?;
            let (dq, dk, dv) = call.backward(&o, &do_)?;
            let (dq_copied, dk_copied, dv_copied) = call.backward(&o, &do_.contiguous()?)?;
            for (name, got, want) in [("dq", dq, dq_copied), ("dk", dk, dk_copied), ("dv", dv, dv_copied)] {
                let what = format!("case {case}, do {}", view.name);
                compare::same_bits(name, &got.context("no gradient")?, &want.context("no gradient")?, &what)?;
            }
        }
    }
    Ok(())
}
