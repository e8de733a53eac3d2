//! Calls of few queries over many keys, as in decoding. Without gradients the CPU splits their keys into parts (src/cpu/few_queries.rs).

use crate::common::cases::{cpu, cpu_targets, targets, window, Alibi, Case, Target};
use crate::common::compare;
use anyhow::{ensure, Result};
use candle_core::{DType, Device, Tensor};
use candle_fa2::testing::{self, CpuPlan, Plan, Problem};
use candle_fa2::{Attention, Mask, PaddingSide};

/// The plan of a call on the CPU: one sequence, one key head.
fn plan(seqlen_q: usize, num_heads: usize) -> Result<CpuPlan> {
    let q = Tensor::zeros((1, seqlen_q, num_heads, 8), DType::F32, &Device::Cpu)?;
    let keys = Tensor::zeros((1, 5000, 1, 8), DType::F32, &Device::Cpu)?;
    cpu_plan(&testing::problem(&Attention::new(), &q, &keys, &keys)?)
}

fn cpu_plan(problem: &Problem) -> Result<CpuPlan> {
    match Plan::choose(problem, &testing::device_caps(&Device::Cpu)?)? {
        Plan::Cpu(plan) => Ok(plan),
        Plan::Cuda(plan) => anyhow::bail!("the CPU got {plan:?}"),
    }
}

/// One to sixteen rows of a key head's group, over no keys, one key, whole parts and a rest.
fn many_keys(target: &Target) -> Result<Vec<Case>> {
    let part = plan(1, 1)?.forward.block_n;
    let groups = [(1, (8, 2)), (1, (3, 3)), (1, (16, 1)), (2, (6, 2)), (3, (4, 1)), (4, (2, 2)), (2, (32, 1))];
    let masks = [Mask::Causal, Mask::None, window(part / 2, 0), window(part + 3, 1)];
    let options: [&dyn Fn(Case) -> Case; 5] = [
        &|case| case,
        &|case| case.softcap(1.5),
        &|case| case.alibi(Alibi::PerHead),
        &|case| case.alibi(Alibi::PerBatchAndHead).softcap(2.0),
        &|case| case.softmax_scale(-0.6),
    ];
    let mut cases = Vec::new();
    for (g, &(seqlen_q, (num_heads, num_heads_k))) in groups.iter().enumerate() {
        for (n, seqlen_k) in [1, 5, part - 1, part, part + 1, 2 * part + 3, 5 * part - 2].into_iter().enumerate() {
            for (m, mask) in masks.into_iter().enumerate() {
                let head_dim = [8, 16, 40, 64, 33][(g + n + m) % 5];
                let case = Case::new(target).batch(1 + n % 2, seqlen_q, seqlen_k).heads(num_heads, num_heads_k);
                cases.push(options[(g + 2 * n + m) % 5](case.head_dim(head_dim).mask(mask)));
            }
        }
    }
    let case = || Case::new(target).heads(4, 2).head_dim(20);
    cases.push(case().packed(&[(1, 3 * part + 1), (0, 9), (3, part), (2, 0), (1, 1)]).mask(Mask::Causal));
    for side in [PaddingSide::Left, PaddingSide::Right] {
        let lengths = [2 * part + 1, 1, part, 0, 700];
        cases.push(case().batch(lengths.len(), 1, 3 * part).key_lengths(&lengths, side));
        cases.push(case().batch(lengths.len(), 2, 3 * part).key_lengths(&lengths, side).softcap(3.0));
    }
    cases.push(case().head_dim_v(7).batch(2, 2, 2 * part + 9).mask(Mask::Causal));
    Ok(cases)
}

#[test]
fn o_and_lse_match_the_reference() -> Result<()> {
    for target in targets() {
        for case in many_keys(&target)?.into_iter().filter(Case::fits) {
            case.check_forward()?;
        }
    }
    Ok(())
}

/// The parts follow from the lengths alone.
#[test]
fn any_number_of_threads_gives_the_same_bits() -> Result<()> {
    for dtype in [DType::F64, DType::F32, DType::F16, DType::BF16] {
        let case = Case::new(&cpu(dtype)).batch(2, 1, 3000).heads(8, 2).head_dim(64);
        let call = case.call(&case.draw())?;
        let (q, k, v) = (call.q.detach(), call.k.detach(), call.v.detach());
        let mut alone = None;
        for threads in [1, 2, 3, 8] {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build()?;
            let got = pool.install(|| call.attention.forward(&q, &k, &v))?;
            let want = alone.get_or_insert_with(|| got.clone());
            compare::same_bits("o", &got, want, &format!("case {case}, {threads} threads against 1"))?;
        }
    }
    Ok(())
}

/// A value that only some of the queries see does not reach the others, whatever it is. (On a GPU it can change their last bits.)
#[test]
fn a_hidden_value_that_is_not_finite_has_no_effect() -> Result<()> {
    for target in cpu_targets() {
        let case = Case::new(&target).batch(1, 3, 600).heads(4, 2).mask(Mask::Causal);
        let call = case.call(&case.draw())?;
        let (q, k, v) = (call.q.detach(), call.k.detach(), call.v.detach());
        let o = call.attention.forward(&q, &k, &v)?;
        // The last key, which the last query alone sees.
        let last_row = (v.narrow(1, 599, 1)? * f64::NAN)?;
        let v = Tensor::cat(&[v.narrow(1, 0, 599)?, last_row], 1)?;
        let with_nan = call.attention.forward(&q, &k, &v)?;
        compare::same_bits("o of the first queries", &with_nan.narrow(1, 0, 2)?, &o.narrow(1, 0, 2)?, &case)?;
        let last = with_nan.narrow(1, 2, 1)?.flatten_all()?.to_dtype(DType::F32)?.to_vec1::<f32>()?;
        ensure!(last.iter().all(|x| x.is_nan()), "the last query sees a NaN, and its o is {last:?}");
    }
    Ok(())
}

/// With gradients, the backward needs the scores of the other forward. More than 4 queries are a product of matrices.
#[test]
fn the_plan_of_few_queries() -> Result<()> {
    for (seqlen_q, num_heads, few) in [(1, 1, true), (1, 64, true), (4, 4, true), (5, 1, false), (16, 1, false)] {
        ensure!(plan(seqlen_q, num_heads)?.few_queries == few, "{seqlen_q} queries, {num_heads} heads");
    }
    let case = Case::new(&cpu(DType::F32)).batch(1, 1, 600).heads(4, 2);
    let call = case.call(&case.draw())?;
    ensure!(!cpu_plan(&testing::problem(&call.attention, &call.q, &call.k, &call.v)?)?.few_queries);
    let (q, k, v) = (call.q.detach(), call.k.detach(), call.v.detach());
    ensure!(cpu_plan(&testing::problem(&call.attention, &q, &k, &v)?)?.few_queries);
    Ok(())
}
