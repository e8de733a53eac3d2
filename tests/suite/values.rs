//! Results compared with the reference: o and lse of untracked inputs, and all five for a gradient of o, or of o and lse.

use crate::common::cases::{self, targets, window, Alibi, Case, Target};
use crate::common::compare;
use crate::common::reference;
use crate::common::run::Call;
use anyhow::{Context, Result};
use candle_fa2::Mask;

fn check(list: impl Fn(&Target) -> Vec<Case>) -> Result<()> {
    for target in targets() {
        for case in list(&target).into_iter().filter(Case::fits) {
            case.check_forward()?;
            case.check()?;
        }
    }
    Ok(())
}

#[test]
fn every_mask_with_every_option() -> Result<()> {
    check(cases::options)
}

#[test]
fn every_kind_of_head_dim() -> Result<()> {
    check(cases::head_dims)
}

#[test]
fn another_head_dim_of_v() -> Result<()> {
    check(cases::head_dims_v)
}

#[test]
fn packed_batches() -> Result<()> {
    check(cases::packed)
}

#[test]
fn long_sequences() -> Result<()> {
    check(cases::long)
}

/// Lengths one row before, at, and one row after the edges of the tiles.
#[test]
fn tile_edges() -> Result<()> {
    for target in targets() {
        for case in cases::around_tiles(&target, 16)? {
            case.check_forward()?;
            case.check()?;
        }
    }
    Ok(())
}

/// Cases of several tiles with a gradient of lse and with each option.
#[test]
fn options_across_tiles() -> Result<()> {
    check(|target| {
        let case = || Case::new(target).batch(1, 150, 280).heads(2, 1).head_dim(8);
        vec![
            case().dlse().mask(Mask::Causal),
            case().softcap(1.0).mask(window(70, 70)),
            case().alibi(Alibi::PerHead).mask(Mask::Causal),
            case().alibi(Alibi::PerBatchAndHead).softcap(2.0).softmax_scale(-0.4).dlse(),
            // Values of head_dim in common models.
            case().heads(4, 2).head_dim(64).mask(Mask::Causal),
            case().head_dim(128).mask(window(100, 0)),
        ]
    })
}

/// The loss depends only on lse: `dlse` reaches q and k, and the gradient of v is 0.
#[test]
fn lse_alone_carries_a_gradient() -> Result<()> {
    for target in targets() {
        for mask in [Mask::None, Mask::Causal] {
            let case = Case::new(&target).batch(2, 9, 6).mask(mask).dlse();
            let mut input = case.draw();
            input.do_.fill(0.0);
            case.check_on(&input)?;

            // The same with o outside the graph.
            let Call { attention, q, k, v } = case.call(&input)?;
            let (_, lse) = attention.forward_with_lse(&q, &k, &v)?;
            let grads = case.lse_loss(&input, &lse)?.backward()?;
            let want = reference::attention(&input);
            let tolerances = reference::tolerances(&input, &want);
            for (name, var, want, tolerance) in
                [("dq", &q, &want.dq, &tolerances[2]), ("dk", &k, &want.dk, &tolerances[3])]
            {
                let got = case.input_rows(grads.get(var).context(name)?, name == "dq")?;
                compare::close(name, &got, want, tolerance, &case)?;
            }
        }
    }
    Ok(())
}

/// A second backward over the same graph works, because the operator keeps lse.
#[test]
fn a_second_backward_gives_the_same_bits() -> Result<()> {
    for target in targets() {
        for case in cases::smoke(&target).into_iter().map(Case::deterministic) {
            let input = case.draw();
            let Call { attention, q, k, v } = case.call(&input)?;
            let (o, lse) = case.forward_with_lse(&attention, &q, &k, &v)?;
            let loss = case.loss(&input, &o, &lse)?;
            let (first, second) = (loss.backward()?, loss.backward()?);
            for (name, var) in [("dq", &q), ("dk", &k), ("dv", &v)] {
                let missing = || format!("{name} is missing\ncase {case}");
                let (first, second) = (first.get(var).with_context(missing)?, second.get(var).with_context(missing)?);
                compare::same_bits(name, second, first, &case)?;
            }
        }
    }
    Ok(())
}

/// One tensor is q, k and v at once. Its gradient is the sum of the three gradients.
#[test]
fn self_attention_on_one_tensor_sums_the_gradients() -> Result<()> {
    for target in targets() {
        let case = Case::new(&target).mask(Mask::Causal).deterministic();
        let mut input = case.draw();
        (input.k, input.v) = (input.q.clone(), input.q.clone());
        let Call { attention, q, .. } = case.call(&input)?;
        let o = attention.forward(&q, &q, &q)?;
        let together = case.loss(&input, &o, &o)?.backward()?;
        let together = together.get(&q).context("no gradient")?;

        let Call { attention, q, k, v } = case.call(&input)?;
        let o = attention.forward(&q, &k, &v)?;
        let apart = case.loss(&input, &o, &o)?.backward()?;
        let [dq, dk, dv] = [&q, &k, &v].map(|var| apart.get(var).context("no gradient"));
        compare::same_bits("dq + dk + dv", together, &((dq? + dk?)? + dv?)?, &case)?;
    }
    Ok(())
}

/// An input that is not tracked gets no gradient. The gradients of the other inputs stay the same.
#[test]
fn constants_get_no_gradient() -> Result<()> {
    for target in targets() {
        let case = Case::new(&target).mask(Mask::Causal).deterministic();
        let input = case.draw();
        let Call { attention, q, k, v } = case.call(&input)?;
        let all = case.loss(&input, &attention.forward(&q, &k, &v)?, &v)?.backward()?;
        for tracked in 0..3 {
            let on =
                |n: usize, var: &candle_core::Var| if n == tracked { var.as_tensor().clone() } else { var.detach() };
            let o = attention.forward(&on(0, &q), &on(1, &k), &on(2, &v))?;
            let grads = case.loss(&input, &o, &o)?.backward()?;
            for (n, (name, var)) in [("dq", &q), ("dk", &k), ("dv", &v)].into_iter().enumerate() {
                match grads.get(var) {
                    Some(grad) if n == tracked => {
                        compare::same_bits(name, grad, all.get(var).context(name)?, &case)?;
                    }
                    Some(_) => anyhow::bail!("{name} of a constant\ncase {case}"),
                    None => anyhow::ensure!(n != tracked, "{name} is missing\ncase {case}"),
                }
            }
        }
    }
    Ok(())
}
