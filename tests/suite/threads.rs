//! The same inputs give the same bits, on any number of threads and in every call.

use crate::common::cases::{self, cpu, Alibi, Case};
use crate::common::compare;
use crate::common::reference::Input;
use crate::common::run::Call;
use anyhow::{Context, Result};
use candle_core::{DType, Tensor};
use candle_fa2::Mask;
use rayon::prelude::*;

const DTYPES: [DType; 4] = [DType::F64, DType::F32, DType::F16, DType::BF16];

/// o, lse, dq, dk, dv.
fn results(case: &Case, input: &Input) -> Result<Vec<(&'static str, Tensor)>> {
    let Call { attention, q, k, v } = case.call(input)?;
    let (o, lse) = case.forward_with_lse(&attention, &q, &k, &v)?;
    let grads = case.loss(input, &o, &lse)?.backward()?;
    let grad = |name: &'static str, var| anyhow::Ok((name, grads.get(var).context(name)?.clone()));
    Ok(vec![("o", o), ("lse", lse), grad("dq", &q)?, grad("dk", &k)?, grad("dv", &v)?])
}

/// Many tiles with one head, many heads with one tile, shared key heads, sequences of different lengths.
fn parallel_cases(dtype: DType) -> Vec<Case> {
    let case = || Case::new(&cpu(dtype)).mask(Mask::Causal);
    vec![
        case().batch(1, 700, 900).heads(1, 1),
        case().batch(2, 300, 300).heads(6, 2).alibi(Alibi::PerHead).dlse(),
        case().batch(5, 20, 30).heads(3, 1).mask(Mask::None),
        case().batch(1, 513, 640).mask(cases::window(100, 30)).softcap(2.0),
        case().packed(&[(300, 310), (1, 500), (0, 3), (17, 17)]).heads(2, 1).dlse(),
        case().batch(2, 300, 300).heads(2, 1).head_dim_v(24),
    ]
}

#[test]
fn any_number_of_threads_gives_the_same_bits() -> Result<()> {
    for case in DTYPES.into_iter().flat_map(parallel_cases) {
        let input = case.draw();
        let mut alone = None;
        for threads in [1, 2, 3, 8] {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build()?;
            let got = pool.install(|| results(&case, &input))?;
            let want = alone.get_or_insert_with(|| got.clone());
            for ((name, got), (_, want)) in got.iter().zip(want.iter()) {
                compare::same_bits(name, got, want, &format!("case {case}, {threads} threads against 1"))?;
            }
        }
    }
    Ok(())
}

#[test]
fn the_same_call_again_gives_the_same_bits() -> Result<()> {
    for case in DTYPES.into_iter().flat_map(parallel_cases) {
        let input = case.draw();
        let first = results(&case, &input)?;
        for _ in 0..3 {
            for ((name, got), (_, want)) in results(&case, &input)?.iter().zip(&first) {
                compare::same_bits(name, got, want, &format!("case {case}, called again"))?;
            }
        }
    }
    Ok(())
}

/// Calls from many threads at the same time do not change each other's results.
#[test]
fn concurrent_calls_do_not_disturb_each_other() -> Result<()> {
    let cases: Vec<Case> = DTYPES.into_iter().flat_map(parallel_cases).collect();
    let alone = cases.iter().map(|case| results(case, &case.draw())).collect::<Result<Vec<_>>>()?;
    std::thread::scope(|scope| {
        let workers: Vec<_> = cases.iter().map(|case| scope.spawn(move || results(case, &case.draw()))).collect();
        for ((worker, want), case) in workers.into_iter().zip(&alone).zip(&cases) {
            let got = worker.join().expect("a worker panicked")?;
            for ((name, got), (_, want)) in got.iter().zip(want) {
                compare::same_bits(name, got, want, &format!("case {case}, at the same time as the others"))?;
            }
        }
        Ok(())
    })
}

/// Calls from the threads of a rayon pool finish, with the same bits.
#[test]
fn calls_from_inside_a_pool_finish() -> Result<()> {
    let cases = [parallel_cases(DType::F32), parallel_cases(DType::F16), parallel_cases(DType::F32)].concat();
    let alone = cases.iter().map(|case| results(case, &case.draw())).collect::<Result<Vec<_>>>()?;
    let pool = rayon::ThreadPoolBuilder::new().num_threads(3).build()?;
    let together =
        pool.install(|| cases.par_iter().map(|case| results(case, &case.draw())).collect::<Result<Vec<_>>>())?;
    for ((got, want), case) in together.iter().zip(&alone).zip(&cases) {
        for ((name, got), (_, want)) in got.iter().zip(want) {
            compare::same_bits(name, got, want, &format!("case {case}, inside a pool"))?;
        }
    }
    Ok(())
}

/// Several threads may run the backward of one graph at the same time.
#[test]
fn one_graph_serves_many_backward() -> Result<()> {
    for case in parallel_cases(DType::F32) {
        let input = case.draw();
        let Call { attention, q, k, v } = case.call(&input)?;
        let (o, lse) = case.forward_with_lse(&attention, &q, &k, &v)?;
        let loss = case.loss(&input, &o, &lse)?;
        let dq = || -> Result<Tensor> { Ok(loss.backward()?.get(&q).context("dq")?.clone()) };
        let want = dq()?;
        std::thread::scope(|scope| {
            let workers: Vec<_> = (0..4).map(|_| scope.spawn(dq)).collect();
            workers.into_iter().try_for_each(|worker| {
                compare::same_bits("dq", &worker.join().expect("a worker panicked")?, &want, &format!("case {case}"))
            })
        })?;
    }
    Ok(())
}
