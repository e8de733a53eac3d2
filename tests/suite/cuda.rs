//! Tests of CUDA: each kernel at the edges of its tiles, a small sweep for the sanitizers, deterministic bits, and errors.
//! The other modules run on the GPU too, because `cases::targets` contains it.
//!
//! These tests need the feature `cuda` and a GPU. Without the feature they are ignored. Without a GPU each prints SKIPPED and
//! passes. The suite is one binary that reads no file of the repository, so it can be copied to a machine with a GPU.
//!
//! ```sh
//! cargo test --features cuda --test suite --no-run         # prints where the binary is, $SUITE below
//! $SUITE --nocapture                                       # everything, and how much of it ran on the GPU
//! CANDLE_FA2_SHARED_LIMIT=101376 $SUITE                    # on the kernels of GPUs with 99 KB of shared memory
//! for tool in memcheck racecheck initcheck synccheck; do
//!     compute-sanitizer --tool $tool --error-exitcode 1 $SUITE sanitizer_sweep --nocapture
//! done
//! ```

use std::collections::BTreeSet;

use crate::common::cases::{self, chunk, gpu_targets_or_skip, window, Alibi, Case, Target};
use crate::common::compare;
use crate::common::reference::{Input, Output};
use crate::common::run::Call;
use anyhow::{ensure, Context, Result};
use attention_reference::matrix::norm;
use candle_core::{DType, Tensor, Var};
use candle_fa2::testing::{self, CudaPlan, DeviceCaps, Grid, Kernel, Launch, Pass, Plan, KERNELS};
use candle_fa2::{Attention, Mask, PaddingSide, TensorLayout};
use rayon::prelude::*;

/// A forward or backward kernel, and the GPU.
#[derive(Clone)]
struct Tiled {
    kernel: &'static Kernel,
    target: Target,
}

/// The forward and backward kernels that this GPU runs. Prints the number and the names of the others.
fn tiled_kernels() -> Result<Vec<Tiled>> {
    let mut runnable = Vec::new();
    let mut others = Vec::new();
    let targets = gpu_targets_or_skip();
    for kernel in KERNELS.iter().filter(|kernel| matches!(kernel.pass, Pass::Forward | Pass::Backward)) {
        for target in targets.iter().filter(|target| target.dtype == kernel.dtype) {
            let DeviceCaps::Cuda(caps) = testing::device_caps(&target.device)? else {
                anyhow::bail!("{:?} is not a GPU", target.device);
            };
            if cases::fits(kernel, &caps) {
                runnable.push(Tiled { kernel, target: target.clone() });
            } else {
                others.push(kernel.name);
            }
        }
    }
    if !others.is_empty() {
        println!("{} kernels do not run on this GPU: {}", others.len(), others.join(", "));
    }
    ensure!(targets.is_empty() || !runnable.is_empty(), "this GPU runs no kernel");
    Ok(runnable)
}

impl Tiled {
    /// A case for this kernel. `variant` chooses the head_dims, the number of key heads, `deterministic`, a gradient of lse,
    /// and the score_mod if the kernel has one.
    fn case(&self, variant: usize) -> Case {
        let Kernel { head_dim, score_mod, .. } = *self.kernel;
        // The head_dim of the kernel, and smaller ones that it pads in shared memory. Of the last, whole panels are zeros.
        let chunk = chunk(&self.target.device);
        let (padded, narrow) = (head_dim - chunk, head_dim / 3 / chunk * chunk);
        let (num_heads, num_heads_k) = [(1, 1), (2, 1), (3, 3), (4, 2)][variant % 4];
        let pairs =
            [(head_dim, head_dim), (padded, padded), (head_dim, narrow), (narrow, head_dim), (padded, head_dim)];
        let (head_dim, head_dim_v) = pairs[variant / 4 % pairs.len()];
        let case = Case::new(&self.target).heads(num_heads, num_heads_k).head_dim(head_dim).head_dim_v(head_dim_v);
        let case = Case { deterministic: variant / 3 % 2 == 1, dlse: variant % 7 > 3, tf32: self.kernel.tf32, ..case };
        match (score_mod, variant % 5) {
            (false, _) => case,
            (true, 0) => case.softcap(1.5),
            (true, 1) => case.alibi(Alibi::PerHead),
            (true, 2) => case.softmax_scale(-0.6),
            (true, 3) => case.alibi(Alibi::PerBatchAndHead).softcap(2.0),
            (true, _) => case.softmax_scale(0.0),
        }
    }

    /// Cases around the edges of the kernel's tiles:
    ///
    /// - lengths one row or column before, at, and after an edge (of a cluster too), with every kind of mask;
    /// - several tiles of queries and keys, with windows that skip whole tiles;
    /// - packed sequences that end inside tiles and at their edges, and empty ones.
    fn around_tiles(&self) -> Vec<Case> {
        let Kernel { block_m, block_n, cluster, .. } = *self.kernel;
        let mut cases = Vec::new();
        let mut edges = vec![block_n, cluster * block_n];
        edges.dedup();
        for seqlen_q in [block_m - 1, block_m, block_m + 1] {
            for seqlen_k in edges.iter().flat_map(|edge| [edge - 1, *edge, edge + 1]) {
                for mask in [Mask::None, Mask::Causal, window(block_n / 2, 9)] {
                    cases.push(self.case(cases.len()).batch(1, seqlen_q, seqlen_k).mask(mask));
                }
            }
        }
        let (longer_q, longer_k) = (3 * block_m + 1, 3 * block_n + 1);
        for (seqlen_q, seqlen_k, mask) in [
            (longer_q, longer_k, Mask::Causal),
            (block_m / 2, 4 * block_n - 1, Mask::None),
            (4 * block_m - 1, block_n / 2, Mask::Causal),
            (longer_q, longer_k, window(block_n / 3, 5)),
        ] {
            cases.push(self.case(cases.len()).batch(1, seqlen_q, seqlen_k).heads(2, 1).mask(mask));
        }
        let counts = [2 * block_n, block_n + 1, block_n - 1, 0, 20];
        for side in [PaddingSide::Left, PaddingSide::Right] {
            let case = self.case(cases.len()).heads(2, 1).key_lengths(&counts, side);
            // Under a causal mask, a sequence with keys must not have more queries than keys.
            let seqlen_q = 17.min(block_n - 1);
            cases.push(case.clone().batch(counts.len(), seqlen_q, 2 * block_n).mask(Mask::Causal));
            if case.alibi == Alibi::Off || side == PaddingSide::Left {
                cases.push(case.batch(counts.len(), block_m + 1, 2 * block_n));
            }
        }
        let lengths = [(block_m + 1, block_n - 1), (3, 2 * block_n + 5), (0, 4), (block_m, block_n), (7, 0), (1, 1)];
        for mask in [Mask::None, Mask::Causal] {
            cases.push(self.case(cases.len()).packed(&lengths).mask(mask));
        }
        cases
    }

    /// Runs `case` with this kernel in its pass. Returns the plan and the output.
    fn run(&self, case: &Case, input: &Input) -> Result<(CudaPlan, Output)> {
        let allow = |other: &Kernel| other.pass != self.kernel.pass || other.name == self.kernel.name;
        let (plan, got) = case.run_with(input, allow).with_context(|| format!("kernel {}", self.kernel.name))?;
        let Launch { kernel, .. } = plan.launch(self.kernel.pass).context("the plan has both passes")?;
        ensure!(*kernel == self.kernel, "{} was requested, but {} was planned", self.kernel.name, kernel.name);
        Ok((plan, got))
    }

    /// Compares o, lse and the gradients of `case` with this kernel to the reference. Returns the plan.
    fn check(&self, case: &Case) -> Result<CudaPlan> {
        self.check_on(case, &case.draw())
    }

    /// The same on a given input.
    fn check_on(&self, case: &Case, input: &Input) -> Result<CudaPlan> {
        let (plan, got) = self.run(case, input)?;
        case.check_output(input, &got).with_context(|| format!("kernel {}", self.kernel.name))?;
        Ok(plan)
    }
}

/// Every kernel, also those that a plan would not choose.
#[test]
#[cfg_attr(not(feature = "cuda"), ignore = "needs the feature cuda")]
fn every_kernel_at_the_edges_of_its_tiles() -> Result<()> {
    let kernels = tiled_kernels()?;
    let cases: Vec<(&Tiled, Case)> =
        kernels.iter().flat_map(|kernel| kernel.around_tiles().into_iter().map(move |case| (kernel, case))).collect();
    // The reference takes most of the time, so the cases run in parallel.
    cases.par_iter().try_for_each(|(kernel, case)| kernel.check(case).map(drop))?;
    println!("{} cases on {} kernels match the reference", cases.len(), kernels.len());
    Ok(())
}

/// Persistent kernels distribute their tiles over fewer blocks. The cases have more tiles than the GPU has multiprocessors,
/// with grouped query heads, with and without a mask, and packed with empty sequences. The last case needs more blocks than there are
/// multiprocessors, because each block lists its tiles, and the lists of fewer blocks would not hold all.
///
/// Each call must reset the tile counters, so that the next call gives the same bits.
///
/// The reference computes some queries of each tile, because all of them would take most of the time of the suite. A tile
/// that is lost or computed twice is wrong in all of its rows.
#[test]
#[cfg_attr(not(feature = "cuda"), ignore = "needs the feature cuda")]
fn persistent_kernels_take_every_tile_once() -> Result<()> {
    const RUNS: usize = 3;
    let kernels = tiled_kernels()?;
    let mut cases = Vec::new();
    for tiled in kernels.iter().filter(|tiled| matches!(tiled.kernel.grid, Grid::Persistent { .. })) {
        let Kernel { block_m, block_n, .. } = *tiled.kernel;
        let case = |variant| Case { deterministic: true, ..tiled.case(variant) };
        let lengths: Vec<(usize, usize)> =
            (0..40).map(|n| [(block_m + 1, 70), (0, 9), (5, 0), (2 * block_m, block_n + 3)][n % 4]).collect();
        for mask in [Mask::None, Mask::Causal, window(block_n, 3)] {
            cases.push((tiled, case(cases.len()).batch(5, 40, 150).heads(64, 32).mask(mask)));
            cases.push((tiled, case(cases.len()).batch(4, 3 * block_m + 1, 4 * block_n).heads(20, 10).mask(mask)));
            cases.push((tiled, case(cases.len()).packed(&lengths).heads(8, 4).mask(mask)));
        }
        cases.push((tiled, case(cases.len()).batch(32, 1, 3).heads(1200, 5)));
    }
    cases.par_iter().try_for_each(|(tiled, case)| -> Result<()> {
        let input = with_some_queries(case.draw());
        let (plan, first) = tiled.run(case, &input)?;
        let launch = plan.launch(tiled.kernel.pass).context("the plan has the kernel's pass")?;
        ensure!(launch.shares_tiles(), "as many blocks as tiles: {plan:?}");
        for run in 1..RUNS {
            let (_, again) = tiled.run(case, &input)?;
            let what = format!("in run {run}, kernel {}\ncase {case}", tiled.kernel.name);
            compare::same_outputs(&again, &first, &what)?;
        }
        case.check_output(&input, &first).with_context(|| format!("kernel {}", tiled.kernel.name))
    })?;
    println!("{} cases on persistent kernels match the reference", cases.len());
    Ok(())
}

/// Chooses the queries that the reference computes: the first and the last of every 32, and the last of each sequence. So
/// the first and the last row of each tile are among them, and they see every key tile that a row of the tile sees.
fn with_some_queries(input: Input) -> Input {
    let chosen = |seqlen_q: usize| (0..seqlen_q).map(move |row| matches!(row % 32, 0 | 31) || row + 1 == seqlen_q);
    let queries = input.lengths.iter().flat_map(|&(seqlen_q, _)| chosen(seqlen_q)).collect();
    input.only(queries)
}

/// Scores as a function of the number of keys after the key, and the queries with these scores. Other queries have scores of 0.
struct KeyScores {
    name: String,
    score: Box<dyn Fn(usize) -> f64 + Send + Sync>,
    rows: fn(usize) -> bool,
}

impl KeyScores {
    /// `from` at the last key, and `per_tile` more for each key tile before it. Kernels visit the last key tile first.
    fn by(from: f64, per_tile: f64, block_n: usize, rows: fn(usize) -> bool) -> Self {
        let score = move |keys_after| from + keys_after as f64 * per_tile / block_n as f64;
        Self { name: format!("{from} plus {per_tile} per tile"), score: Box::new(score), rows }
    }

    /// `value` for the last `keys` keys and 0 for the others. If `for_the_last` is false, the other way round.
    fn step(keys: usize, value: f64, for_the_last: bool) -> Self {
        let score = move |keys_after| if (keys_after < keys) == for_the_last { value } else { 0.0 };
        let side = if for_the_last { "of" } else { "before" };
        Self { name: format!("{value} in the keys {side} the last {keys}"), score: Box::new(score), rows: |_| true }
    }
}

/// Scores that grow or fall from key tile to key tile, in the order in which a kernel visits them.
///
/// - The difference per tile is inside and outside the range of exp.
/// - Scores begin at 0 or below, so that row_max is negative for some tiles or for all.
/// - They grow in all rows, in the rows of one warp, or in some rows of each warp.
/// - Scores are also -inf, infinity and NaN, in the first tile that a kernel visits and in the last.
#[test]
#[cfg_attr(not(feature = "cuda"), ignore = "needs the feature cuda")]
fn scores_that_grow_from_tile_to_tile() -> Result<()> {
    // The first column of k is large, and equal within a tile. So the terms of dq cancel, and their rounding is large compared with dq. Of
    // 700,000 rows in bf16, three were up to 13% over the limit of the rule (H200).
    const FACTOR: f64 = 1.5;
    let kernels = tiled_kernels()?;
    let mut cases = Vec::new();
    for tiled in kernels.iter().filter(|tiled| tiled.kernel.pass == Pass::Forward) {
        let Kernel { block_m, block_n, .. } = *tiled.kernel;
        // Variant 2: a score_mod kernel gets a negative scale. A softcap would keep all scores small.
        let case = || tiled.case(2).heads(1, 1).batch(1, block_m + 20, 6 * block_n + 5);
        for per_tile in [2.0_f64, 20.0, 150.0, -20.0, -150.0] {
            for from in [0.0, -2.5 * per_tile.abs(), -7.0 * per_tile.abs()] {
                for mask in [Mask::None, Mask::Causal, window(2 * block_n, 0)] {
                    cases.push((tiled, case().mask(mask), KeyScores::by(from, per_tile, block_n, |_| true)));
                }
            }
        }
        for per_tile in [20.0, 150.0] {
            for from in [0.0, -2.5 * per_tile] {
                cases.push((tiled, case(), KeyScores::by(from, per_tile, block_n, |row| row / 16 % 4 == 1)));
                cases.push((tiled, case(), KeyScores::by(from, per_tile, block_n, |row| row % 3 == 1)));
            }
        }
        for value in [f64::NEG_INFINITY, f64::INFINITY, f64::NAN] {
            cases.push((tiled, case(), KeyScores::step(9, value, true)));
            cases.push((tiled, case(), KeyScores::step(6 * block_n, value, false)));
        }
    }
    let errors = cases.par_iter().filter_map(|(tiled, case, scores)| {
        let mut input = case.draw();
        let head_dim = case.head_dim;
        // Only the first column of q is not 0, because a sum of many large terms would be rounded.
        for (at, x) in input.q.iter_mut().enumerate() {
            *x = f64::from(at % head_dim == 0 && (scores.rows)(at / head_dim));
        }
        let keys = input.k.len() / head_dim;
        let scale = case.softmax_scale.unwrap_or((head_dim as f64).powf(-0.5));
        for (at, x) in input.k.iter_mut().enumerate().step_by(head_dim) {
            *x = case.precision().round((scores.score)(keys - 1 - at / head_dim) / scale);
        }
        let check = || {
            let (_, got) = tiled.run(case, &input)?;
            case.check_output_within(FACTOR, &input, &got).with_context(|| format!("kernel {}", tiled.kernel.name))
        };
        check().err().map(|error| format!("scores {}: {error:#}", scores.name))
    });
    let errors: Vec<String> = errors.collect();
    let few = &errors[..errors.len().min(4)];
    ensure!(errors.is_empty(), "{} of {} cases, among them {few:#?}", errors.len(), cases.len());
    println!("{} cases match the reference", cases.len());
    Ok(())
}

/// Small cases for a sanitizer, on every kernel; the test asserts that every kernel was launched.
///
/// The cases have one tile and a part of another tile of queries and of keys. They are padded and packed, with and without
/// `deterministic` and a gradient of lse. Each case also runs with a NaN in a key, a value and a gradient.
///
/// Candle's own kernels do not run, except for casts. The test prints each kernel when it is done, because some tools are slow.
fn sweep(dtype: DType) -> Result<()> {
    let mut kernels = tiled_kernels()?;
    kernels.retain(|tiled| tiled.kernel.dtype == dtype);
    let mut launched = BTreeSet::new();
    let mut cases = 0;
    for (at, tiled) in kernels.iter().enumerate() {
        let Kernel { block_m, block_n, .. } = *tiled.kernel;
        let (seqlen_q, seqlen_k) = (block_m + 9, block_n + 17);
        let small = |variant| tiled.case(variant).heads(2, 1).batch(1, seqlen_q, seqlen_k).mask(Mask::Causal);
        let mut of_kernel = vec![
            Case { deterministic: false, dlse: false, ..small(at) },
            Case { deterministic: true, dlse: true, ..small(at + 1) },
            small(at + 2).packed(&[(seqlen_q, 5), (3, seqlen_k)]).mask(window(block_n / 2, 20)),
            small(at + 3).batch(2, 20, seqlen_k).key_lengths(&[block_n + 1, 3], PaddingSide::Left),
        ];
        if matches!(tiled.kernel.grid, Grid::Persistent { .. }) {
            // More tiles than a GPU has multiprocessors, so that a block processes several tiles.
            of_kernel.push(small(at).batch(48, seqlen_q, seqlen_k).mask(window(block_n / 2, 20)));
        }
        for case in of_kernel {
            // NaN in v makes a forward recompute its rows.
            let mut input = case.draw();
            for values in [&mut input.k, &mut input.v, &mut input.do_] {
                let last = values.len() - 1;
                values[last] = f64::NAN;
            }
            tiled.check_on(&case, &input)?;
            launched.extend(tiled.check(&case)?.launches().map(|launch| launch.kernel.name));
            cases += 2;
        }
        println!("{} done", tiled.kernel.name);
    }
    for Tiled { kernel, .. } in &kernels {
        ensure!(launched.contains(kernel.name), "{} was not launched", kernel.name);
    }
    if !kernels.is_empty() {
        let helper = |kernel: &&Kernel| matches!(kernel.pass, Pass::Delta | Pass::Convert) && kernel.dtype == dtype;
        let names = KERNELS.iter().filter(helper).map(|kernel| kernel.name);
        let missing: Vec<&str> = names.filter(|name| !launched.contains(name)).collect();
        ensure!(missing.is_empty(), "not launched: {missing:?}");
    }
    println!("{cases} cases, {} kernels launched", launched.len());
    Ok(())
}

#[test]
#[cfg_attr(not(feature = "cuda"), ignore = "needs the feature cuda")]
fn sanitizer_sweep_in_f16() -> Result<()> {
    sweep(DType::F16)
}

#[test]
#[cfg_attr(not(feature = "cuda"), ignore = "needs the feature cuda")]
fn sanitizer_sweep_in_bf16() -> Result<()> {
    sweep(DType::BF16)
}

#[test]
#[cfg_attr(not(feature = "cuda"), ignore = "needs the feature cuda")]
fn sanitizer_sweep_in_f32() -> Result<()> {
    sweep(DType::F32)
}

/// A call without options at every head_dim that the README promises.
#[test]
#[cfg_attr(not(feature = "cuda"), ignore = "needs the feature cuda")]
fn every_head_dim() -> Result<()> {
    let mut cases = Vec::new();
    for target in &gpu_targets_or_skip() {
        for head_dim in 1..=cases::max_head_dim(&target.device, target.dtype) {
            let mask = [Mask::None, Mask::Causal, window(40, 3)][head_dim % 3];
            cases.push(Case::new(target).heads(4, 2).head_dim(head_dim).batch(2, 70, 150).mask(mask));
        }
    }
    cases.par_iter().try_for_each(Case::check)?;
    println!("{} cases on the GPU", cases.len());
    Ok(())
}

/// Calls without gradients above the head_dim that has some: all types with 99 KB of shared memory, and f32 with less than 201 KB.
#[test]
#[cfg_attr(not(feature = "cuda"), ignore = "needs the feature cuda")]
fn a_forward_of_wide_heads() -> Result<()> {
    let mut cases = Vec::new();
    for target in &gpu_targets_or_skip() {
        let widest = cases::widest(&target.device, target.dtype, Pass::Forward);
        for (n, (head_dim, head_dim_v)) in [(257, 257), (300, 40), (36, 500), (512, 512)].into_iter().enumerate() {
            let case = Case::new(target).heads(4, 2).batch(2, 70, 150).mask([Mask::None, Mask::Causal][n % 2]);
            cases.push(Case { head_dim: head_dim.min(widest), head_dim_v: head_dim_v.min(widest), ..case });
        }
    }
    cases.par_iter().try_for_each(Case::check_forward)?;
    println!("{} cases on the GPU", cases.len());
    Ok(())
}

/// Pairs of head_dim and head_dim_v: those of models, and others spread over all pairs.
#[test]
#[cfg_attr(not(feature = "cuda"), ignore = "needs the feature cuda")]
fn pairs_of_head_dims() -> Result<()> {
    const OTHERS: usize = 60;
    let mut cases = Vec::new();
    for target in &gpu_targets_or_skip() {
        let most = cases::max_head_dim(&target.device, target.dtype);
        // Steps without a common factor with `most` visit every remainder.
        let others = (0..OTHERS).map(|n| (1 + n * 101 % most, 1 + n * 67 % most));
        for (n, (head_dim, head_dim_v)) in
            [(192, 128), (128, 192), (96, 64), (64, 256)].into_iter().chain(others).enumerate()
        {
            let case = Case::new(target).heads(4, 2).head_dim(head_dim).head_dim_v(head_dim_v).batch(1, 70, 150);
            let case = case.mask([Mask::None, Mask::Causal][n % 2]);
            cases.push(match n % 4 {
                0 => case.dlse(),
                1 => case.softcap(1.5).deterministic(),
                2 => case.packed(&[(30, 70), (0, 4), (65, 65)]),
                _ => case.layouts(TensorLayout::Bhsd, TensorLayout::Bshd),
            });
        }
    }
    cases.par_iter().try_for_each(Case::check)?;
    println!("{} cases on the GPU", cases.len());
    Ok(())
}

/// One product of TF32 for each product of f32: the errors are those of 11 bits, also on inputs that have more. With three products they are
/// far smaller, so the option does choose other kernels.
#[test]
#[cfg_attr(not(feature = "cuda"), ignore = "needs the feature cuda")]
fn plain_tf32_has_the_errors_of_11_bits() -> Result<()> {
    for target in gpu_targets_or_skip().iter().filter(|target| target.dtype == DType::F32) {
        for head_dim in [24, 64, 100, 128, 256] {
            let case = Case::new(target).batch(1, 300, 700).heads(4, 2).head_dim(head_dim).mask(Mask::Causal);
            case.clone().tf32().check()?;
            let input = case.draw();
            let want = attention_reference::attention(&input);
            // The norm of the differences, relative to that of the values.
            let relative = |got: &[f64], want: &[f64]| {
                norm(&got.iter().zip(want).map(|(got, want)| got - want).collect::<Vec<_>>()) / norm(want)
            };
            let errors = |got: &Output| -> Vec<f64> {
                let pairs = got.named().into_iter().zip(want.named()).filter(|((name, _), _)| *name != "lse");
                pairs.map(|((_, got), (_, want))| relative(&got.values, &want.values)).collect()
            };
            let (split, plain) = (errors(&case.run(&input)?), errors(&case.clone().tf32().run(&input)?));
            let text = |errors: &[f64]| errors.iter().map(|error| format!("{error:.1e} ")).collect::<String>();
            println!("{case}: errors of o, dq, dk and dv: {}; with plain TF32: {}", text(&split), text(&plain));
            ensure!(split.iter().all(|&error| error < 3e-6), "{case}: {split:?}");
            ensure!(plain.iter().all(|&error| error > 2e-5 && error < 3e-3), "{case}: {plain:?}");
        }
    }
    Ok(())
}

/// q, k and v in one tensor, with a head_dim whose rows are not whole 16 bytes.
#[test]
#[cfg_attr(not(feature = "cuda"), ignore = "needs the feature cuda")]
fn a_fused_tensor_of_any_head_dim() -> Result<()> {
    for target in &gpu_targets_or_skip() {
        for head_dim in [1, 7, 36, 100] {
            let case =
                Case::new(target).batch(2, 33, 33).heads(4, 2).head_dim(head_dim).mask(Mask::Causal).deterministic();
            let input = case.draw();
            let Call { attention, q, k, v } = case.call(&input)?;
            let qkv = Var::from_tensor(&Tensor::cat(&[q.as_tensor(), k.as_tensor(), v.as_tensor()], 2)?)?;
            let (o, fused) = (attention.forward(&q, &k, &v)?, attention.forward_qkv(&qkv, 2)?);
            compare::same_bits("o", &fused, &o, &case)?;
            let do_ = case.output_tensor(&input.do_)?;
            let grads = (&o * &do_)?.sum_all()?.backward()?;
            let want = Tensor::cat(&[&q, &k, &v].map(|x| grads.get(x).expect("tracked").clone()), 2)?;
            let grads = (&fused * &do_)?.sum_all()?.backward()?;
            compare::same_bits("dqkv", grads.get(&qkv).context("no gradient")?, &want, &case)?;
        }
    }
    Ok(())
}

/// With `deterministic`, every call gives the same bits, although many key tiles add to one tile of dq. The results are right.
/// The reference computes some queries of each tile: a key tile that is lost or added twice is wrong in all rows of a tile.
#[test]
#[cfg_attr(not(feature = "cuda"), ignore = "needs the feature cuda")]
fn a_deterministic_backward_repeats_its_bits() -> Result<()> {
    const RUNS: usize = 10;
    let mut cases = Vec::new();
    for target in &gpu_targets_or_skip() {
        let widths: BTreeSet<usize> = KERNELS.iter().map(|kernel| kernel.head_dim).filter(|&width| width > 0).collect();
        for head_dim in widths {
            let case = || Case::new(target).head_dim(head_dim).deterministic();
            cases.extend([
                case().batch(1, 150, 1500).heads(2, 2),
                case().batch(2, 700, 700).heads(2, 1).mask(Mask::Causal),
                case().batch(1, 300, 900).heads(4, 2).mask(window(500, 30)).softcap(20.0),
                case().packed(&[(400, 700), (1, 300), (0, 3), (129, 129)]).heads(2, 1).mask(Mask::Causal).dlse(),
            ]);
        }
    }
    cases.par_iter().try_for_each(|case| -> Result<()> {
        let input = with_some_queries(case.draw());
        let first = case.run(&input)?;
        case.check_output(&input, &first)?;
        for run in 1..RUNS {
            compare::same_outputs(&case.run(&input)?, &first, &format!("in run {run}\ncase {case}"))?;
        }
        Ok(())
    })?;
    println!("{} cases repeat their bits {RUNS} times", cases.len());
    Ok(())
}

/// Many packed sequences that are shorter than a tile of queries: in dq_accum each begins at the next row group. A kernel that added past
/// the end of a sequence would change the next one.
#[test]
#[cfg_attr(not(feature = "cuda"), ignore = "needs the feature cuda")]
fn many_short_sequences() -> Result<()> {
    // Every pair of lengths from 0 to 9, in an order in which the lengths of neighbours differ.
    let lengths: Vec<(usize, usize)> = (0..300).map(|n| (n * 7 % 10, n / 10 * 3 % 10)).collect();
    let mut cases = Vec::new();
    for tiled in tiled_kernels()?.into_iter().filter(|tiled| tiled.kernel.pass == Pass::Backward) {
        for (variant, mask) in [Mask::None, Mask::Causal, Mask::None, Mask::Causal].into_iter().enumerate() {
            let case = tiled.case(variant).heads(2, 1).packed(&lengths).mask(mask);
            cases.push((tiled.clone(), Case { deterministic: variant > 1, ..case }));
        }
    }
    cases.par_iter().try_for_each(|(tiled, case)| tiled.check(case).map(drop))?;
    println!("{} cases of short sequences match the reference", cases.len());
    Ok(())
}

/// With more sequences than one grid holds, each kernel with a grid axis of sequences is launched twice. The bits equal those of
/// two calls with half of the sequences each.
#[test]
#[cfg_attr(not(feature = "cuda"), ignore = "needs the feature cuda")]
fn more_sequences_than_a_grid_holds() -> Result<()> {
    const HALF: usize = 33_000;
    for target in &gpu_targets_or_skip() {
        let case = || Case::new(target).head_dim(64).heads(2, 1).deterministic().dlse().mask(Mask::Causal);
        let mut lengths = [(1, 2), (0, 1), (3, 3), (2, 0)].repeat(HALF / 4);
        halves_give_the_bits(&case().packed(&lengths), &lengths)?;
        // On Hopper, a longer sequence selects the sm90 kernels.
        lengths[HALF / 4] = (40, 50);
        halves_give_the_bits(&case().packed(&lengths), &lengths)?;

        let case = case().alibi(Alibi::PerBatchAndHead);
        let whole = case.clone().batch(2 * HALF, 2, 3);
        let input = whole.draw();
        let got = whole.run(&input)?;
        let case = case.batch(HALF, 2, 3);
        let halves: Vec<Input> = (0..2).map(|half| half_of(&input, half)).collect();
        same_as_halves(&got, [&case.run(&halves[0])?, &case.run(&halves[1])?], &whole)?;
    }
    Ok(())
}

/// Runs `half`, a packed case of `lengths`, twice in one call and once in each of two calls. The bits must be equal.
fn halves_give_the_bits(half: &Case, lengths: &[(usize, usize)]) -> Result<()> {
    let whole = half.clone().packed(&lengths.repeat(2));
    let input = whole.draw();
    let got = whole.run(&input)?;
    same_as_halves(&got, [&half.run(&half_of(&input, 0))?, &half.run(&half_of(&input, 1))?], &whole)
}

/// The first or the second half of the sequences of `input`. Both halves have the same lengths.
fn half_of(input: &Input, half: usize) -> Input {
    let of = |values: &[f64]| values[half * values.len() / 2..][..values.len() / 2].to_vec();
    Input {
        lengths: input.lengths[half * input.lengths.len() / 2..][..input.lengths.len() / 2].to_vec(),
        alibi_slopes: input.alibi_slopes.as_deref().map(of),
        q: of(&input.q),
        k: of(&input.k),
        v: of(&input.v),
        do_: of(&input.do_),
        dlse: of(&input.dlse),
        ..input.clone()
    }
}

fn same_as_halves(whole: &Output, halves: [&Output; 2], case: &Case) -> Result<()> {
    let [first, second] = halves.map(Output::named);
    for (((name, whole), (_, first)), (_, second)) in whole.named().into_iter().zip(first).zip(second) {
        let halves = [&first.values[..], &second.values].concat();
        compare::same_rows(name, &whole.values, &halves, &format!("from those of two calls\ncase {case}"))?;
    }
    Ok(())
}

/// A call that no CUDA kernel supports returns an error that says what to do, before anything is queued.
/// [`Attention::supports`] returns the same error.
#[test]
#[cfg_attr(not(feature = "cuda"), ignore = "needs the feature cuda")]
fn refusals_on_the_device() -> Result<()> {
    for Target { device, .. } in gpu_targets_or_skip() {
        let text = |dtype: DType, head_dim: usize| -> Result<String> {
            let x = Tensor::zeros((1, 5, 2, head_dim), dtype, &device)?;
            let error = Attention::new().forward(&x, &x, &x).expect_err("has no kernel").to_string();
            let asked = Attention::new().supports(&x, &x, &x).expect_err("has no kernel").to_string();
            ensure!(error == asked, "forward returns {error:?}, supports returns {asked:?}");
            Ok(error)
        };
        assert_eq!(
            text(DType::F64, 64)?,
            "q: dtype F64 is not supported on CUDA (supported: F32, F16, BF16); convert q, k and v with \
             to_dtype(DType::F32), or move them with to_device(&Device::Cpu)"
        );
    }
    Ok(())
}

/// A plan without a backward gives the same bits of o, for inputs that are not tracked.
#[test]
#[cfg_attr(not(feature = "cuda"), ignore = "needs the feature cuda")]
fn a_forward_runs_without_a_backward() -> Result<()> {
    for target in &gpu_targets_or_skip() {
        let case = Case::new(target).heads(4, 2).batch(2, 70, 150).mask(Mask::Causal);
        let call = case.call(&case.draw())?;
        let (q, k, v) = (call.q.detach(), call.k.detach(), call.v.detach());
        let problem = testing::problem(&call.attention, &q, &k, &v)?;
        let no_backward = |kernel: &Kernel| kernel.pass != Pass::Backward;
        let plan = CudaPlan::choose(&problem, &testing::device_caps(&target.device)?, no_backward)?;
        ensure!(plan.backward.is_none(), "{plan:?}");
        let alone = testing::Call::with_plan(&call.attention, problem, (&q, &k, &v), Plan::Cuda(plan))?.forward()?;
        compare::same_bits("o without a backward", &alone, &call.attention.forward(&q, &k, &v)?, &case)?;
    }
    Ok(())
}

/// Empty views of tensors with elements. Rows without keys have o = 0 and lse = -inf, gradients are 0, and no kernel is
/// launched with an empty grid.
#[test]
#[cfg_attr(not(feature = "cuda"), ignore = "needs the feature cuda")]
fn views_without_tokens() -> Result<()> {
    for Target { device, dtype } in gpu_targets_or_skip() {
        let full = Var::from_tensor(&Tensor::ones((2, 5, 4, 64), dtype, &device)?)?;
        let none = full.narrow(1, 0, 0)?;
        let numbers = |x: &Tensor| -> Result<Vec<f32>> { Ok(x.to_dtype(DType::F32)?.flatten_all()?.to_vec1()?) };
        for mask in [Mask::None, Mask::Causal, window(2, 1)] {
            let attention = Attention::new().mask(mask);
            let (o, lse) = attention.forward_with_lse(&full, &none, &none)?;
            ensure!(numbers(&o)?.iter().all(|&x| x == 0.0), "o is {:?}", numbers(&o)?);
            ensure!(numbers(&lse)?.iter().all(|&x| x == f32::NEG_INFINITY), "lse is {:?}", numbers(&lse)?);
            let call = testing::Call::new(&attention, &full, &none, &none)?;
            let (dq, dk, dv) = call.backward(&call.forward()?, &full)?;
            ensure!(numbers(&dq.context("no dq")?)?.iter().all(|&x| x == 0.0), "dq is not 0");
            for (name, grad) in [("dk", dk), ("dv", dv)] {
                ensure!(grad.with_context(|| format!("no {name}"))?.dims() == [2, 0, 4, 64], "{name}");
            }
            let call = testing::Call::new(&attention, &none, &full, &full)?;
            let o = call.forward()?;
            ensure!(o.dims() == [2, 0, 4, 64], "o is {o:?}");
            let (_, dk, dv) = call.backward(&o, &none)?;
            for (name, grad) in [("dk", dk), ("dv", dv)] {
                let grad = numbers(&grad.with_context(|| format!("no {name}"))?)?;
                ensure!(grad.len() == 2 * 5 * 4 * 64 && grad.iter().all(|&x| x == 0.0), "{name} is not 0");
            }
        }
    }
    Ok(())
}
