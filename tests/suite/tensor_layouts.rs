//! Heads before or after the tokens, in the inputs and in the result: all four combinations have the same result.

use crate::common::cases::{in_layout, targets, window, Alibi, Case};
use crate::common::compare;
use crate::common::run::Call;
use anyhow::{Context, Result};
use candle_core::{Tensor, Var};
use candle_fa2::TensorLayout::{self, Bhsd, Bshd};
use candle_fa2::{Attention, Mask};

const COMBINATIONS: [(TensorLayout, TensorLayout); 4] = [(Bshd, Bshd), (Bshd, Bhsd), (Bhsd, Bshd), (Bhsd, Bhsd)];

#[test]
fn every_combination_matches_the_reference() -> Result<()> {
    for target in targets() {
        let case = || Case::new(&target).batch(2, 9, 13).heads(4, 2).head_dim(24);
        for (inputs, output) in COMBINATIONS {
            for case in [
                case().mask(Mask::Causal),
                case().mask(window(4, 2)).dlse(),
                case().softcap(2.0).alibi(Alibi::PerBatchAndHead).dlse(),
                case().batch(1, 150, 300).heads(2, 1).head_dim(16).mask(Mask::Causal),
                case().packed(&[(5, 9), (0, 4), (12, 3)]).mask(Mask::Causal).dlse(),
                case().head_dim_v(16).mask(Mask::Causal).dlse(),
            ] {
                case.layouts(inputs, output).check()?;
            }
        }
    }
    Ok(())
}

/// A transposed view in one layout gives the bits of the tensor itself in the other layout, also in the gradients.
#[test]
fn a_transposed_view_gives_the_bits_of_the_other_layout() -> Result<()> {
    for target in targets() {
        let case =
            Case::new(&target).batch(2, 19, 23).heads(4, 2).head_dim(8).mask(Mask::Causal).dlse().deterministic();
        let input = case.draw();
        let Call { attention, q, k, v } = case.call(&input)?;
        let results = |layout: TensorLayout| -> Result<Vec<Tensor>> {
            let heads_first = |x: &Tensor| if layout == Bhsd { x.transpose(1, 2) } else { Ok(x.clone()) };
            let attention = attention.clone().layout(layout).output_layout(Bshd);
            let (o, lse) = attention.forward_with_lse(&heads_first(&q)?, &heads_first(&k)?, &heads_first(&v)?)?;
            let grads = case.loss(&input, &o, &lse)?.backward()?;
            let grad = |var: &Var| grads.get(var).context("no gradient").cloned();
            let grads = [grad(&q)?, grad(&k)?, grad(&v)?];
            Ok([o, lse].into_iter().chain(grads).collect())
        };
        for (n, (got, want)) in results(Bhsd)?.iter().zip(&results(Bshd)?).enumerate() {
            compare::same_bits(["o", "lse", "dq", "dk", "dv"][n], got, want, &case)?;
        }
    }
    Ok(())
}

/// The operator writes the result in its layout and does not transpose it afterwards.
#[test]
fn the_result_is_contiguous_in_its_layout() -> Result<()> {
    for target in targets() {
        for (inputs, output) in COMBINATIONS {
            let case = Case::new(&target).batch(2, 5, 7).heads(4, 2).head_dim_v(20).layouts(inputs, output);
            let input = case.draw();
            let Call { attention, q, k, v } = case.call(&input)?;
            let o = attention.forward(&q, &k, &v)?;
            let want = if output == Bshd { [2, 5, 4, case.head_dim_v] } else { [2, 4, 5, case.head_dim_v] };
            assert_eq!(o.dims(), want, "{case}");
            assert!(o.is_contiguous(), "{case}");
            attention.supports(&q, &k, &v)?;
        }
    }
    Ok(())
}

/// The order of the two option calls does not matter. Without `output_layout`, the result has the layout of the inputs.
#[test]
fn output_layout_overrides_layout() -> Result<()> {
    let q = Tensor::zeros((1, 6, 3, 8), candle_core::DType::F32, &candle_core::Device::Cpu)?;
    let dims = |attention: Attention| anyhow::Ok(attention.forward(&q, &q, &q)?.dims().to_vec());
    assert_eq!(dims(Attention::new().layout(Bhsd))?, [1, 6, 3, 8]);
    assert_eq!(dims(Attention::new().layout(Bhsd).output_layout(Bshd))?, [1, 3, 6, 8]);
    assert_eq!(dims(Attention::new().output_layout(Bshd).layout(Bhsd))?, [1, 3, 6, 8]);
    assert_eq!(dims(Attention::new().output_layout(Bhsd))?, [1, 3, 6, 8]);
    Ok(())
}

/// q, k and v in one tensor with the heads before the tokens: values and gradient equal those of the other layout.
#[test]
fn one_tensor_of_q_k_and_v() -> Result<()> {
    for target in targets() {
        let case = Case::new(&target).batch(2, 70, 70).heads(4, 2).head_dim(16).mask(Mask::Causal).deterministic();
        let input = case.draw();
        let Call { attention, q, k, v } = case.call(&input)?;
        let joined = Tensor::cat(&[&q, &k, &v].map(|var| var.detach()), 2)?;
        let do_ = case.output_tensor(&input.do_)?;
        let results = |layout: TensorLayout| -> Result<[Tensor; 2]> {
            let qkv = Var::from_tensor(&in_layout(&joined, layout)?)?;
            let o = attention.clone().layout(layout).output_layout(Bshd).forward_qkv(&qkv, 2)?;
            let grads = (&o * &do_)?.sum_all()?.backward()?;
            Ok([o, in_layout(grads.get(&qkv).context("no gradient")?, layout)?])
        };
        for (name, (got, want)) in ["o", "dqkv"].iter().zip(results(Bhsd)?.iter().zip(&results(Bshd)?)) {
            compare::same_bits(name, got, want, &case)?;
        }
    }
    Ok(())
}
