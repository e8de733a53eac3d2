//! The CUDA kernels and grids that a plan chooses, and the calls that it refuses. No GPU is needed, because a plan is made from
//! capabilities.

use std::cmp::Reverse;

use anyhow::Result;
use candle_core::{DType, Device, DeviceLocation, Tensor};
use candle_fa2::testing::{
    self, Arch, BackwardPlan, CudaCaps, CudaPlan, DeviceCaps, Kernel, Launch, Pass, Plan, Problem, RowBlocks, Schedule,
    DQ_GROUP_ROWS, KERNELS,
};
use candle_fa2::{Attention, CuSeqlens, Error, Mask};

const fn caps(compute_cap: (u32, u32), multiprocessors: usize, shared_bytes_per_block: usize) -> DeviceCaps {
    DeviceCaps::Cuda(CudaCaps { compute_cap, multiprocessors, shared_bytes_per_block })
}

const A100: DeviceCaps = caps((8, 0), 108, 163 * 1024);
const H100: DeviceCaps = caps((9, 0), 132, 227 * 1024);
const B200: DeviceCaps = caps((10, 0), 148, 227 * 1024);
/// The smallest capabilities of a GPU from Ampere on.
const RTX_3090: DeviceCaps = caps((8, 6), 82, 99 * 1024);

fn zeros(shape: &[usize], dtype: DType) -> Result<Tensor> {
    Ok(Tensor::zeros(shape, dtype, &Device::Cpu)?)
}

fn problem(attention: &Attention, head_dim: usize, dtype: DType) -> Result<Problem> {
    let x = zeros(&[1, 2, 1, head_dim], dtype)?;
    Ok(testing::problem(attention, &x, &x, &x)?)
}

fn plan(problem: &Problem, caps: &DeviceCaps) -> candle_fa2::Result<CudaPlan> {
    match Plan::choose(problem, caps)? {
        Plan::Cuda(plan) => Ok(plan),
        Plan::Cpu { .. } => panic!("a GPU got the plan of the CPU"),
    }
}

fn launch(plan: &CudaPlan, pass: Pass) -> Launch {
    *plan.launch(pass).expect("every pass has a kernel")
}

fn forward(plan: &CudaPlan) -> Launch {
    launch(plan, Pass::Forward)
}

fn backward(plan: &CudaPlan) -> Launch {
    launch(plan, Pass::Backward)
}

/// For every head_dim that the README promises, in both types, with and without a score_mod, each pass has the kernel of the
/// smallest sufficient head_dim.
#[test]
fn every_head_dim_has_kernels() -> Result<()> {
    for (caps, shared_limit) in [(A100, 163 * 1024), (H100, 227 * 1024), (B200, 227 * 1024), (RTX_3090, 99 * 1024)] {
        for head_dim in (8..=256).step_by(8) {
            for dtype in [DType::F16, DType::BF16] {
                for attention in [Attention::new(), Attention::new().softcap(30.0)] {
                    let plan = plan(&problem(&attention, head_dim, dtype)?, &caps)?;
                    for pass in [Pass::Forward, Pass::Delta, Pass::Backward, Pass::Convert] {
                        let kernel = launch(&plan, pass).kernel;
                        let context = format!("{} for head_dim {head_dim} {dtype:?}", kernel.name);
                        assert_eq!((kernel.pass, kernel.dtype), (pass, dtype), "{context}");
                        assert!(kernel.shared_bytes <= shared_limit, "{context}");
                        if matches!(pass, Pass::Forward | Pass::Backward) {
                            let sufficient = KERNELS.iter().filter(|k| k.pass == pass && k.head_dim >= head_dim);
                            assert_eq!(Some(kernel.head_dim), sufficient.map(|k| k.head_dim).min(), "{context}");
                        }
                    }
                }
            }
        }
    }
    Ok(())
}

/// If several kernels have one head_dim, the plan takes the first whose shared memory fits the GPU.
#[test]
fn more_shared_memory_brings_larger_kernels() -> Result<()> {
    for dtype in [DType::F16, DType::BF16] {
        let bytes = |caps| -> Result<usize> {
            Ok(backward(&plan(&problem(&Attention::new(), 256, dtype)?, caps)?).kernel.shared_bytes)
        };
        let (b200, a100, rtx_3090) = (bytes(&B200)?, bytes(&A100)?, bytes(&RTX_3090)?);
        assert!(b200 > a100 && a100 > rtx_3090, "{b200}, {a100} and {rtx_3090} bytes");
    }
    Ok(())
}

/// The forward has a block for every query tile of the longest sequence, every head and every sequence. The backward has a
/// block for every key tile of every key head. The conversion has a warp for every 8 queries and 32 columns.
#[test]
fn grids_cover_the_call() -> Result<()> {
    let (q, k) = (zeros(&[3, 1000, 12, 72], DType::BF16)?, zeros(&[3, 700, 4, 72], DType::BF16)?);
    let padded = testing::problem(&Attention::new(), &q, &k, &k)?;
    let lengths = |lengths: &[usize]| CuSeqlens::from_lengths(lengths, &Device::Cpu);
    let (q, k) = (q.flatten(0, 1)?, k.flatten(0, 1)?);
    let (lengths_q, lengths_k) = (lengths(&[1000, 0, 900, 1100])?, lengths(&[700, 100, 1300, 0])?);
    let packed = testing::problem_packed(&Attention::new(), (&q, &k, &k), &lengths_q, &lengths_k)?;
    for (problem, batch, seqlen_q, seqlen_k) in [(padded, 3, 1000, 700), (packed, 4, 1100, 1300)] {
        let plan = plan(&problem, &A100)?;
        let tiles = |seqlen: usize, block: usize| seqlen.div_ceil(block) as u32;
        assert_eq!(forward(&plan).grid, (tiles(seqlen_q, forward(&plan).kernel.block_m), 12, batch));
        assert_eq!(backward(&plan).grid, (tiles(seqlen_k, backward(&plan).kernel.block_n), 4, batch));
        assert_eq!((launch(&plan, Pass::Delta).grid.1, launch(&plan, Pass::Delta).grid.2), (12, batch));
        // A warp of the conversion takes 8 queries and 32 columns, a third of 72.
        let warps = launch(&plan, Pass::Convert).kernel.warps;
        assert_eq!(launch(&plan, Pass::Convert).grid, (tiles(3 * seqlen_q.div_ceil(8), warps), 12, batch));
    }
    Ok(())
}

fn backward_plan(plan: &CudaPlan) -> &BackwardPlan {
    plan.backward.as_ref().expect("a kernel fits")
}

/// Every sequence and head has row groups of its own in dq_accum, and tiles of its own among the semaphores, for any lengths.
#[test]
fn rows_of_dq_do_not_overlap() -> Result<()> {
    for lengths_q in
        [&[1000usize, 0, 900, 1100][..], &[1, 1, 1], &[63, 65, 64, 1, 0, 0, 127], &[7, 9, 8, 0, 15, 1], &[0], &[5000]]
    {
        let q = zeros(&[lengths_q.iter().sum(), 2, 64], DType::F16)?;
        let cu_seqlens = CuSeqlens::from_lengths(lengths_q, &Device::Cpu)?;
        let problem = testing::problem_packed(&Attention::new(), (&q, &q, &q), &cu_seqlens, &cu_seqlens)?;
        let plan = plan(&problem, &H100)?;
        let (kernel, &BackwardPlan { dq_accum, dq_tiles, .. }) = (backward(&plan).kernel, backward_plan(&plan));
        for (rows, blocks) in [(DQ_GROUP_ROWS, dq_accum.groups), (kernel.block_m, dq_tiles)] {
            // The formula of the kernels: a packed sequence begins at the block of its first row, plus one for each sequence before.
            let first = |batch: usize| cu_seqlens.offsets()[batch] as usize / rows + batch;
            for (batch, seqlen_q) in lengths_q.iter().enumerate() {
                let end = first(batch) + seqlen_q.div_ceil(rows);
                let limit = if batch + 1 < lengths_q.len() { first(batch + 1) } else { blocks.head };
                assert!(end <= limit, "sequence {batch} of {lengths_q:?} ends at {end}, the next begins at {limit}");
            }
            assert_eq!((blocks.batch, blocks.count), (0, 2 * blocks.head));
        }
        assert_eq!(dq_accum.elements(), dq_accum.groups.count * 8 * kernel.head_dim);
    }
    let q = zeros(&[3, 1000, 12, 72], DType::BF16)?;
    let plan = plan(&testing::problem(&Attention::new(), &q, &q, &q)?, &H100)?;
    let (kernel, &BackwardPlan { dq_accum, dq_tiles, .. }) = (backward(&plan).kernel, backward_plan(&plan));
    for (blocks, head) in [(dq_accum.groups, 125), (dq_tiles, 1000usize.div_ceil(kernel.block_m))] {
        assert_eq!(blocks, RowBlocks { head, batch: 12 * head, count: 3 * 12 * head });
    }
    Ok(())
}

/// 4,096 packed sequences of 8 tokens: each has a row group, and the numbering leaves one more. So dq_accum has two f32 for each element
/// of q: four times the bytes of q in bf16.
#[test]
fn short_sequences_need_little_memory() -> Result<()> {
    const SEQUENCES: usize = 4096;
    let q = zeros(&[8 * SEQUENCES, 2, 128], DType::BF16)?;
    let lengths = CuSeqlens::from_lengths(&[8; SEQUENCES], &Device::Cpu)?;
    let problem = testing::problem_packed(&Attention::new(), (&q, &q, &q), &lengths, &lengths)?;
    for caps in [A100, H100, B200, RTX_3090] {
        let plan = plan(&problem, &caps)?;
        let bytes = backward_plan(&plan).dq_accum.elements() * size_of::<f32>();
        assert_eq!(bytes, 4 * q.elem_count() * DType::BF16.size_in_bytes());
    }
    Ok(())
}

/// Calls that need a kernel with score_mod: softcap, ALiBi, and scales that do not keep the order of the scores.
#[test]
fn kernels_with_a_score_mod_where_needed() -> Result<()> {
    let slopes = Tensor::zeros(1, DType::F32, &Device::Cpu)?;
    for (attention, score_mod) in [
        (Attention::new(), false),
        (Attention::new().softmax_scale(1e-9), false),
        (Attention::new().softmax_scale(5e-39), true), // flushed to 0
        (Attention::new().softmax_scale(1e-50), true),
        (Attention::new().softmax_scale(0.0), true),
        (Attention::new().softmax_scale(-0.5), true),
        (Attention::new().softcap(20.0), true),
        (Attention::new().alibi_slopes(&slopes), true),
    ] {
        let plan = plan(&problem(&attention, 64, DType::F16)?, &H100)?;
        assert_eq!(
            (forward(&plan).kernel.score_mod, backward(&plan).kernel.score_mod),
            (score_mod, score_mod),
            "{attention:?}"
        );
    }
    Ok(())
}

/// Tests choose a kernel of the table by disallowing the others.
#[test]
fn one_kernel_can_be_asked_for() -> Result<()> {
    let problem = problem(&Attention::new(), 64, DType::BF16)?;
    let wanted = |kernel: &Kernel| kernel.pass != Pass::Forward || kernel.head_dim == 96;
    assert_eq!(forward(&CudaPlan::choose(&problem, &H100, wanted)?).kernel.head_dim, 96);
    Ok(())
}

/// Kernels for Hopper. A build for other GPUs only does not have them.
fn has_hopper() -> bool {
    KERNELS.iter().any(|kernel| kernel.arch == Arch::Sm90)
}

/// The problem with these shapes of q and k, `(batch, seqlen, num_heads, head_dim)`. The bf16 zeros use no memory.
fn long_problem(attention: &Attention, q: [usize; 4], k: [usize; 4]) -> Result<Problem> {
    let x = |shape: [usize; 4]| -> Result<Tensor> { Ok(zeros(&[1, 1, 1, shape[3]], DType::BF16)?.expand(&shape)?) };
    let (q, k) = (x(q)?, x(k)?);
    Ok(testing::problem(attention, &q, &k, &k)?)
}

/// Architecture and head_dim of the kernel with the smallest sufficient head_dim, the newest of them.
fn tightest(pass: Pass, head_dim: usize) -> (Arch, usize) {
    let sufficient = KERNELS.iter().filter(|kernel| kernel.pass == pass && kernel.head_dim >= head_dim);
    let best = sufficient.min_by_key(|kernel| (kernel.head_dim, Reverse(kernel.arch)));
    best.map(|kernel| (kernel.arch, kernel.head_dim)).expect("the table has a kernel for head_dim 256")
}

/// Whether the head_dim is above those of all lines before the first sm90 line. From there on an sm90 kernel runs every head_dim.
fn is_for_hopper(pass: Pass, head_dim: usize) -> bool {
    let lines = || KERNELS.iter().filter(move |kernel| kernel.pass == pass);
    let Some(first) = lines().filter(|kernel| kernel.arch == Arch::Sm90).map(|kernel| kernel.head_dim).min() else {
        return false;
    };
    lines().filter(|kernel| kernel.head_dim < first).all(|kernel| kernel.head_dim < head_dim)
}

/// head_dims below, between and at those of the sm90 kernels.
const HEAD_DIMS: [usize; 6] = [32, 40, 80, 128, 160, 256];

/// Two calls with `seqlen` queries: one without a score_mod, one with.
fn plain_and_score_mod(seqlen: usize, head_dim: usize) -> Result<[Problem; 2]> {
    let of = |attention: Attention| long_problem(&attention, [1, seqlen, 2, head_dim], [1, 100, 2, head_dim]);
    Ok([of(Attention::new())?, of(Attention::new().softcap(20.0))?])
}

/// On Hopper each pass has the tightest kernel of the whole table. From the first sm90 line on, that is always an sm90 kernel.
#[test]
fn hopper_takes_the_tightest_kernel() -> Result<()> {
    for head_dim in HEAD_DIMS {
        for problem in plain_and_score_mod(17, head_dim)? {
            let plan = plan(&problem, &H100)?;
            for pass in [Pass::Forward, Pass::Backward] {
                let kernel = launch(&plan, pass).kernel;
                assert_eq!((kernel.arch, kernel.head_dim), tightest(pass, head_dim), "{pass:?} of head_dim {head_dim}");
                let is_sm90 = kernel.arch == Arch::Sm90;
                assert_eq!(is_sm90, is_for_hopper(pass, head_dim), "{pass:?} of head_dim {head_dim}");
            }
        }
    }
    Ok(())
}

/// A call with at most 16 queries is decoding. They fill little of an sm90 tile, so an sm80 kernel runs it.
#[test]
fn hopper_decodes_with_sm80_kernels() -> Result<()> {
    for head_dim in HEAD_DIMS {
        for problem in plain_and_score_mod(16, head_dim)? {
            assert_eq!(forward(&plan(&problem, &H100)?).kernel.arch, Arch::Sm80, "head_dim {head_dim}");
        }
    }
    Ok(())
}

/// sm90 kernels need exactly compute capability 9.0, and all of its shared memory. Elsewhere the plan takes sm80 kernels, which have no
/// schedule.
#[test]
fn other_gpus_take_sm80_kernels() -> Result<()> {
    let little_shared_memory = caps((9, 0), 132, 99 * 1024);
    for caps in [A100, caps((8, 9), 128, 99 * 1024), B200, caps((12, 0), 170, 99 * 1024), little_shared_memory] {
        for head_dim in HEAD_DIMS {
            for problem in plain_and_score_mod(100, head_dim)? {
                let plan = plan(&problem, &caps)?;
                let Launch { kernel, schedule, .. } = forward(&plan);
                assert_eq!((kernel.arch, schedule), (Arch::Sm80, None), "{caps:?}");
                assert_eq!(backward(&plan).kernel.arch, Arch::Sm80, "{caps:?}");
            }
        }
    }
    Ok(())
}

/// Only sm90 kernels are allowed. On another GPU the error says which GPU they need, and decoding uses them too.
#[test]
fn hopper_kernels_can_be_asked_for() -> Result<()> {
    let only = |kernel: &Kernel| kernel.pass != Pass::Forward || kernel.arch == Arch::Sm90;
    let decoding = long_problem(&Attention::new(), [1, 1, 2, 128], [1, 100, 2, 128])?;
    let refused = CudaPlan::choose(&decoding, &B200, only).expect_err("has other instructions").to_string();
    if !has_hopper() {
        return Ok(());
    }
    let needs =
        |text: &str| text.starts_with("fwd_sm90_bf16_d128_") && text.contains("needs compute capability 9.0 exactly");
    assert!(refused.split(['(', ',']).any(|text| needs(text.trim())), "{refused}");
    assert_eq!(forward(&CudaPlan::choose(&decoding, &H100, only)?).kernel.arch, Arch::Sm90);
    Ok(())
}

/// A tile has block_m queries. There is at most one block per multiprocessor, unless a block would have more than 256 tiles.
#[test]
fn schedules_cover_the_call() -> Result<()> {
    if !has_hopper() {
        return Ok(());
    }
    let of = |problem: &Problem| -> Result<(Schedule, u32, usize)> {
        let Launch { kernel, grid: (blocks, y, z), schedule } = forward(&plan(problem, &H100)?);
        assert_eq!((y, z), (1, 1));
        Ok((schedule.expect("on Hopper"), blocks, kernel.block_m))
    };
    let causal = Attention::new().mask(Mask::Causal);
    // Few tiles: one block per tile.
    let (schedule, blocks, block_m) = of(&long_problem(&Attention::new(), [2, 1000, 6, 128], [2, 700, 2, 128])?)?;
    let m_blocks = 1000usize.div_ceil(block_m);
    assert_eq!(schedule, Schedule { tiles: 12 * m_blocks, head_tiles: m_blocks, section_heads: 1 });
    assert_eq!(blocks, 12 * m_blocks as u32);
    // Many tiles: one block per multiprocessor. More tiles than these blocks can list: more blocks.
    // 17 queries, more than a decoding call has, fill no tile of any kernel.
    for (batch, want) in [(8, 64), (20, 132), (60_000, 1875)] {
        let (schedule, blocks, _) = of(&long_problem(&causal, [batch, 17, 8, 64], [batch, 17, 8, 64])?)?;
        assert_eq!((schedule.tiles, schedule.head_tiles), (8 * batch, 1));
        assert_eq!(blocks, want);
    }
    let (_, blocks, _) = of(&long_problem(&causal, [1, 16_384, 16, 128], [1, 16_384, 16, 128])?)?;
    assert_eq!(blocks, 132);
    // With a mask, sections have one size: about four tiles per multiprocessor, at most 32 heads, at most all heads.
    let sections = [(4, 64, 32), (8, 80, 27), (32, 64, 16), (128, 16, 4), (128, 7, 4), (8, 4, 4), (1024, 4, 1)];
    for (m_blocks, heads, want) in sections {
        let shape = [1, m_blocks * block_m, heads, 128];
        for attention in [&causal, &Attention::new().mask(Mask::Window { left: Some(100), right: None })] {
            assert_eq!(of(&long_problem(attention, shape, shape)?)?.0.section_heads, want, "{shape:?}");
        }
        assert_eq!(of(&long_problem(&Attention::new(), shape, shape)?)?.0.section_heads, 1);
    }
    // Packed: total_q / block_m + batch is an upper bound of the number of query tiles, for any lengths.
    let lengths = CuSeqlens::from_lengths(&[1000, 0, 900, 1100], &Device::Cpu)?;
    let q = zeros(&[3000, 12, 128], DType::BF16)?;
    let packed = testing::problem_packed(&Attention::new(), (&q, &q, &q), &lengths, &lengths)?;
    let (schedule, _, block_m) = of(&packed)?;
    assert_eq!((schedule.head_tiles, schedule.tiles), (3000 / block_m + 4, 12 * (3000 / block_m + 4)));
    Ok(())
}

/// In a backward, a tile has the keys of a block or cluster, and the heads are those of k. There is at most one block per multiprocessor.
#[test]
fn backward_schedules_cover_the_call() -> Result<()> {
    if !has_hopper() {
        return Ok(());
    }
    let of = |problem: &Problem| -> Result<(Schedule, u32, &'static Kernel)> {
        let plan = plan(problem, &H100)?;
        let Launch { kernel, grid: (blocks, y, z), schedule } = launch(&plan, Pass::Backward);
        assert_eq!((y, z), (1, 1));
        Ok((schedule.expect("on Hopper"), blocks, kernel))
    };
    for head_dim in [64, 128, 192, 256] {
        // Few tiles: one block, or cluster, for each.
        let few = long_problem(&Attention::new(), [2, 1000, 6, head_dim], [2, 700, 2, head_dim])?;
        let (schedule, blocks, kernel) = of(&few)?;
        let keys = kernel.cluster * kernel.block_n;
        assert_eq!(keys, 128);
        assert_eq!((schedule.tiles, schedule.head_tiles), (4 * 6, 6), "{}", kernel.name);
        assert_eq!(blocks as usize, 4 * 6 * kernel.cluster);
        // Many: a block for each multiprocessor. 70,000 sequences need one launch.
        let many = long_problem(&Attention::new(), [70_000, 17, 2, head_dim], [70_000, 129, 1, head_dim])?;
        let (schedule, blocks, _) = of(&many)?;
        assert_eq!((schedule.tiles, blocks), (140_000, 132));
        // A section has about one tile for each block or cluster that runs at the same time.
        let shape = [1, 8 * keys, 33, head_dim];
        let (schedule, ..) = of(&long_problem(&Attention::new(), shape, shape)?)?;
        assert_eq!(schedule.section_heads, if kernel.cluster == 1 { 17 } else { 11 }, "{}", kernel.name);
    }
    // Packed: an upper bound for any lengths, as in the forward.
    let lengths = CuSeqlens::from_lengths(&[1000, 0, 900, 1100], &Device::Cpu)?;
    let (q, k) = (zeros(&[3000, 12, 128], DType::BF16)?, zeros(&[3000, 4, 128], DType::BF16)?);
    let (schedule, ..) = of(&testing::problem_packed(&Attention::new(), (&q, &k, &k), &lengths, &lengths)?)?;
    assert_eq!((schedule.head_tiles, schedule.tiles), (3000 / 128 + 4, 4 * (3000 / 128 + 4)));
    Ok(())
}

/// Without queries there is no work. Without keys there is: o is 0 and lse is -inf.
#[test]
fn schedules_of_calls_without_rows() -> Result<()> {
    let x = |seqlen| zeros(&[2, seqlen, 3, 64], DType::F16);
    for (seqlen_q, seqlen_k, tiles) in [(0, 40, 0), (40, 0, 6)] {
        let (q, k) = (x(seqlen_q)?, x(seqlen_k)?);
        let problem = testing::problem(&Attention::new(), &q, &k, &k)?;
        let on_hopper = |kernel: &Kernel| kernel.arch == Arch::Sm90 || !has_hopper() || kernel.pass != Pass::Forward;
        let Launch { grid, schedule, .. } = forward(&CudaPlan::choose(&problem, &H100, on_hopper)?);
        if let Some(schedule) = schedule {
            assert_eq!((schedule.tiles, grid), (tiles, (tiles as u32, 1, 1)));
        }
    }
    Ok(())
}

/// If a stride is too large for TMA, or there are too many tiles, the plan takes an sm80 kernel.
#[test]
fn hopper_leaves_what_it_cannot_hold() -> Result<()> {
    let shape = [2, 20, 2, 64];
    let mut problem = long_problem(&Attention::new(), shape, shape)?;
    problem.k.batch = (1 << 39) - 8;
    assert_eq!(forward(&plan(&problem, &H100)?).schedule.is_some(), has_hopper());
    problem.k.batch = 1 << 39;
    assert_eq!(forward(&plan(&problem, &H100)?).kernel.arch, Arch::Sm80);
    // 65,535 sequences, all empty except for one, and as many heads: each sequence counts as a query tile.
    let mut lengths = vec![0; 65_535];
    lengths[7] = 20;
    let lengths = CuSeqlens::from_lengths(&lengths, &Device::Cpu)?;
    let q = zeros(&[20, 1, 64], DType::BF16)?.expand(&[20, 65_535, 64])?;
    let problem = testing::problem_packed(&Attention::new(), (&q, &q, &q), &lengths, &lengths)?;
    assert_eq!(forward(&plan(&problem, &H100)?).kernel.arch, Arch::Sm80);
    Ok(())
}

/// A printed plan contains its kernels and their launch configurations.
#[test]
fn a_cuda_plan_prints() -> Result<()> {
    let plan = plan(&problem(&Attention::new(), 64, DType::BF16)?, &H100)?;
    let Launch { kernel, .. } = forward(&plan);
    let (threads, bytes) = (kernel.threads(), kernel.shared_bytes);
    let want = format!("{} (grid (1, 1, 1), block {threads}, shared {bytes} bytes)", kernel.name);
    assert_eq!(format!("{:?}", forward(&plan)), want);
    assert!(format!("{plan:?}").contains(&want));
    if has_hopper() {
        let problem = long_problem(&Attention::new(), [1, 100, 6, 128], [1, 100, 6, 128])?;
        let text = format!("{:?}", self::plan(&problem, &H100)?);
        let want = "bytes, Schedule { tiles: 6, head_tiles: 1, section_heads: 1 })";
        assert!(text.contains(want), "{text}");
    }
    Ok(())
}

/// A plan prints each kernel that it did not take, with the reason.
#[test]
fn a_plan_says_why_kernels_were_not_taken() -> Result<()> {
    let rejected = |head_dim, seqlen, caps: &DeviceCaps| -> Result<Vec<String>> {
        let shape = [1, seqlen, 2, head_dim];
        let plan = plan(&long_problem(&Attention::new(), shape, shape)?, caps)?;
        let text = format!("{plan:?}");
        let rejected: Vec<String> = plan.rejected.iter().map(|rejection| rejection.to_string()).collect();
        assert!(rejected.iter().all(|rejection| text.contains(rejection)), "{text}");
        // Each kernel of the call's type is either launched or rejected.
        let computes = |kernel: &&Kernel| {
            matches!(kernel.pass, Pass::Forward | Pass::Backward)
                && (kernel.dtype, kernel.score_mod) == (DType::BF16, false)
                && kernel.head_dim >= head_dim
        };
        assert_eq!(rejected.len() + 2, KERNELS.iter().filter(computes).count());
        Ok(rejected)
    };
    let has = |rejected: &[String], kernel: &str, reason: &str| {
        let found = rejected.iter().any(|text| text.starts_with(kernel) && text.ends_with(reason));
        assert!(found, "no {kernel} {reason} in {rejected:#?}");
    };
    let ampere = rejected(64, 100, &A100)?;
    has(&ampere, "fwd_sm80_bf16_d96_", " pads head_dim more");
    has(&rejected(256, 100, &RTX_3090)?, "bwd_sm80_bf16_d256_", " bytes of shared memory");
    has(&rejected(256, 100, &A100)?, "bwd_sm80_bf16_d256_", " comes later in the table");
    if has_hopper() {
        has(&ampere, "fwd_sm90_bf16_d64_", " needs compute capability 9.0 exactly");
        has(&rejected(64, 100, &H100)?, "fwd_sm80_bf16_d64_", " is for older GPUs");
        has(
            &rejected(64, 1, &H100)?,
            "fwd_sm90_bf16_d64_",
            " has large tiles, and decoding would leave most of their rows empty",
        );
    }
    Ok(())
}

/// f32 runs on the kernels of sm80, on Hopper too. It has a forward for every head_dim and GPU. Above 128 its backward needs 163 KB.
#[test]
fn f32_has_kernels_of_its_own() -> Result<()> {
    for caps in [H100, A100, RTX_3090] {
        for head_dim in (8..=256).step_by(8) {
            for attention in [Attention::new(), Attention::new().softcap(5.0)] {
                let plan = plan(&problem(&attention, head_dim, DType::F32)?, &caps)?;
                assert!(plan.launches().all(|launch| launch.kernel.dtype == DType::F32), "{plan:?}");
                assert_eq!(forward(&plan).kernel.arch, Arch::Sm80);
                assert_eq!(
                    plan.backward.is_some(),
                    caps != RTX_3090 || head_dim <= 128,
                    "head_dim {head_dim}, {caps:?}"
                );
            }
        }
    }
    Ok(())
}

/// Plain TF32 has kernels of its own, which run only if a call asks for them. They have every pass and option that f32 has.
#[test]
fn plain_tf32_runs_only_by_name() -> Result<()> {
    for caps in [H100, A100, RTX_3090] {
        for head_dim in [8, 64, 100, 160, 256] {
            for attention in [Attention::new(), Attention::new().softcap(5.0)] {
                for tf32 in [false, true] {
                    let plan = plan(&problem(&attention.clone().tf32(tf32), head_dim, DType::F32)?, &caps)?;
                    let tiled = [Pass::Forward, Pass::Backward].into_iter().filter_map(|pass| plan.launch(pass));
                    assert!(tiled.clone().all(|launch| launch.kernel.tf32 == tf32), "{plan:?}");
                    assert!(tiled.count() == 2 || caps == RTX_3090 && head_dim > 128, "{plan:?}");
                    assert_eq!(format!("{plan:?}").contains("fwd_sm80_tf32_d"), tf32, "{plan:?}");
                }
            }
        }
    }
    let refused = problem(&Attention::new().tf32(true), 64, DType::BF16).expect_err("must be refused").to_string();
    let text =
        "tf32: q, k and v must be F32, got BF16; leave the option out, or convert them with to_dtype(DType::F32)";
    assert_eq!(refused, text);
    Ok(())
}

/// Above head_dim 256 two thread blocks share the columns of a tile. Gradients need 163 KB of shared memory, those of f32 201 KB.
#[test]
fn wide_heads_are_split_into_parts() -> Result<()> {
    for (caps, backwards) in [(H100, true), (A100, true), (RTX_3090, false)] {
        for problem in plain_and_score_mod(100, 512)? {
            let plan = plan(&problem, &caps)?;
            let Launch { kernel, grid, .. } = forward(&plan);
            assert_eq!((kernel.head_dim, kernel.parts()), (512, 2));
            assert_eq!(grid, (2 * 100usize.div_ceil(kernel.block_m) as u32, 2, 1), "{plan:?}");
            assert_eq!(plan.backward.is_some(), backwards, "{plan:?}");
            if let Some(of_backward) = &plan.backward {
                let Launch { kernel, grid, .. } = backward(&plan);
                assert_eq!(grid, (2 * 100usize.div_ceil(kernel.block_n) as u32, 2, 1), "{plan:?}");
                assert_eq!(of_backward.semaphores, 2 * of_backward.dq_tiles.count + 1);
            }
        }
    }
    let mut problem = problem(&Attention::new(), 512, DType::F32)?;
    assert_eq!(backward(&plan(&problem, &H100)?).kernel.parts(), 2);
    let less_memory = caps((9, 0), 132, 200 * 1024);
    assert_eq!(plan(&problem, &less_memory)?.backward, None);
    problem.tracked = Some("v");
    let refused = plan(&problem, &less_memory).expect_err("must be refused").to_string();
    assert!(
        refused.starts_with("v: tracked for gradients, but head_dim 512 has no F32 backward kernel for"),
        "{refused}"
    );
    Ok(())
}

/// On a GPU whose shared memory holds a forward and no backward, calls run whose inputs are not tracked for gradients. A
/// tracked one is refused by the forward, with the reasons.
#[test]
fn a_backward_may_be_missing() -> Result<()> {
    let smallest = |pass| {
        let kernels = KERNELS.iter().filter(|kernel| kernel.pass == pass && kernel.head_dim >= 128);
        kernels.map(|kernel| kernel.shared_bytes).min().expect("both passes have kernels")
    };
    let bytes = smallest(Pass::Forward);
    assert!(bytes < smallest(Pass::Backward));
    let caps = caps((8, 6), 84, bytes);
    let mut problem = problem(&Attention::new(), 128, DType::BF16)?;
    let inference = plan(&problem, &caps)?;
    assert_eq!((forward(&inference).kernel.shared_bytes, &inference.backward), (bytes, &None));
    assert!(inference.launch(Pass::Delta).is_none());

    problem.tracked = Some("k");
    let refused = plan(&problem, &caps).expect_err("must be refused").to_string();
    let start = format!(
        "k: tracked for gradients, but head_dim 128 has no BF16 backward kernel for compute capability 8.6 with {bytes} bytes \
         of shared memory per block (bwd_sm80_bf16_d128_"
    );
    assert!(refused.contains(" bytes of shared memory, bwd_sm80_bf16_d"), "{refused}");
    let end = "); use another head_dim, or move q, k and v with to_device(&Device::Cpu); for inference, \
               call .detach() on the inputs";
    assert!(refused.starts_with(&start) && refused.ends_with(end), "{refused}");
    plan(&problem, &RTX_3090)?;

    // The same where a build has no backward.
    let no_backward = |kernel: &Kernel| kernel.pass != Pass::Backward;
    let refused = CudaPlan::choose(&problem, &H100, no_backward).expect_err("must be refused").to_string();
    assert!(refused.contains("shared memory per block (none was built); use another head_dim"), "{refused}");
    problem.tracked = None;
    assert_eq!(CudaPlan::choose(&problem, &H100, no_backward)?.backward, None);
    Ok(())
}

#[test]
fn refusals_by_dtype_head_dim_and_gpu() -> Result<()> {
    let refused = |head_dim, dtype, caps: &DeviceCaps| -> Result<String> {
        let problem = problem(&Attention::new(), head_dim, dtype)?;
        Ok(plan(&problem, caps).expect_err("must be refused").to_string())
    };
    assert_eq!(
        refused(64, DType::F64, &H100)?,
        "q: dtype F64 is not supported on CUDA (supported: F32, F16, BF16); convert q, k and v with to_dtype(DType::F32), \
         or move them with to_device(&Device::Cpu)"
    );
    assert_eq!(
        refused(64, DType::F16, &caps((7, 5), 40, 64 * 1024))?,
        "compute capability 7.5 of this GPU is not supported (supported: 8.0 and newer); \
         move q, k and v with to_device(&Device::Cpu)"
    );
    let small = refused(256, DType::BF16, &caps((8, 6), 84, 20_000))?;
    let start =
        "head_dim 256 has no BF16 forward kernel for compute capability 8.6 with 20000 bytes of shared memory per block \
         (fwd_sm80_bf16_d256_";
    assert!(
        small.starts_with(start)
            && small.ends_with("; use another head_dim, or move q, k and v with to_device(&Device::Cpu)"),
        "{small}"
    );
    Ok(())
}

#[test]
fn refusals_by_size() -> Result<()> {
    // Views that repeat one element, so no memory of these sizes is allocated.
    let x = |shape: [usize; 4]| -> Result<Tensor> { Ok(zeros(&[1, 1, 1, 8], DType::F16)?.expand(&shape)?) };
    for (q, k, text) in [
        (
            [(1 << 29) + 1, 1, 1, 8],
            [(1 << 29) + 1, 1, 1, 8],
            "batch is 536870913, but a CUDA kernel takes at most 536870912; split the call",
        ),
        ([1, 1, 65_536, 8], [1, 1, 1, 8], "num_heads is 65536, but a CUDA kernel takes at most 65535; split the call"),
        (
            [1, (1 << 29) + 1, 1, 8],
            [1, 1, 1, 8],
            "seqlen_q is 536870913, but a CUDA kernel takes at most 536870912; split the call",
        ),
        (
            [8, 1, 1, 8],
            [8, 1 << 28, 1, 8],
            "rows of k is 2147483648, but a CUDA kernel takes at most 2147483647; split the call",
        ),
    ] {
        let (q, k) = (x(q)?, x(k)?);
        let problem = testing::problem(&Attention::new(), &q, &k, &k)?;
        assert_eq!(plan(&problem, &H100).expect_err("must be refused").to_string(), text);
    }
    Ok(())
}

/// A deterministic backward numbers its blocks in 32 bits.
#[test]
fn more_blocks_than_a_semaphore_counts() -> Result<()> {
    // 600,000 sequences, all empty except for one. Each has as many blocks as the longest.
    let mut lengths = vec![0; 600_000];
    lengths[7] = 1 << 20;
    let lengths = CuSeqlens::from_lengths(&lengths, &Device::Cpu)?;
    let x = zeros(&[1, 1, 32], DType::BF16)?.expand(&[1 << 20, 1, 32])?;
    let plan = |deterministic| -> Result<_> {
        let attention = Attention::new().deterministic(deterministic);
        Ok(plan(&testing::problem_packed(&attention, (&x, &x, &x), &lengths, &lengths)?, &H100))
    };
    let blocks = 600_000 * (1usize << 20).div_ceil(backward(&plan(false)??).kernel.block_n);
    assert!(blocks > u32::MAX as usize);
    let refused = plan(true)?.expect_err("must be refused").to_string();
    let start = format!(
        "number of thread blocks of a deterministic backward is {blocks}, but a CUDA kernel takes at most 4294967295"
    );
    assert!(refused.starts_with(&start), "{refused}");
    Ok(())
}

/// Inputs whose rows are not 16-byte aligned are copied. A stride that is never used may have any value.
#[test]
fn unaligned_inputs_are_copied() -> Result<()> {
    let copied = |[q, k, v]: [&Tensor; 3]| -> Result<Vec<&'static str>> {
        Ok(plan(&testing::problem(&Attention::new(), q, k, v)?, &H100)?.copied)
    };
    let wide = zeros(&[2, 5, 4, 20], DType::BF16)?;
    let fine = zeros(&[2, 5, 4, 16], DType::BF16)?;
    let (start, end) = (wide.narrow(3, 0, 16)?, wide.narrow(3, 4, 16)?);
    assert_eq!(copied([&fine, &fine, &fine])?, [""; 0]);
    assert_eq!(copied([&start, &fine, &fine])?, ["q"]);
    assert_eq!(copied([&fine, &end, &start])?, ["k", "v"]);
    // A contiguous tensor with an odd offset.
    let shifted = zeros(&[2 * 5 * 4 * 16 + 4], DType::BF16)?.narrow(0, 4, 640)?.reshape((2, 5, 4, 16))?;
    assert_eq!(copied([&fine, &shifted, &fine])?, ["k"]);
    // Broadcast heads, and an axis of one head whose stride is odd.
    let one_head = zeros(&[2, 5, 1, 16], DType::BF16)?;
    assert_eq!(copied([&fine, &one_head.expand((2, 5, 4, 16))?, &fine])?, [""; 0]);
    let odd = wide.narrow(2, 0, 2)?.narrow(3, 0, 16)?.narrow(2, 0, 1)?.narrow(1, 0, 1)?;
    let query = zeros(&[2, 1, 1, 16], DType::BF16)?;
    assert_eq!(odd.stride(), [400, 80, 20, 1]);
    assert_eq!(copied([&query, &odd, &odd])?, [""; 0]);
    // Alone, k could be read in place. But a call copies a tensor of q, k and v as a whole.
    let problem = testing::problem_qkv(&Attention::new(), &start, 1)?;
    assert_eq!((problem.k.offset, problem.v.offset), (40, 60));
    assert_eq!(plan(&problem, &H100)?.copied, ["q", "k", "v"]);
    // 16 bytes are 4 elements of f32.
    let wide = zeros(&[2, 5, 4, 20], DType::F32)?;
    let (fine, shifted) = (wide.narrow(3, 4, 16)?, wide.narrow(3, 2, 16)?);
    assert_eq!(copied([&fine, &fine, &fine])?, [""; 0]);
    assert_eq!(copied([&fine, &shifted, &fine])?, ["k"]);
    Ok(())
}

/// Rows that are not whole 16 bytes are copied and padded with zeros to whole 32. The tightest kernel for both head_dims runs, and a smaller v alone is
/// read in place. The scale stays that of the call.
#[test]
fn any_head_dim_has_a_plan() -> Result<()> {
    // dtype, head_dim and head_dim_v, those of the kernels, the copied inputs, and the head_dim of the kernel
    for (dtype, dims, padded, copied, kernel_dim) in [
        (DType::BF16, (64, 64), (64, 64), vec![], 64),
        (DType::BF16, (36, 36), (48, 48), vec!["q", "k", "v"], 64),
        (DType::F32, (36, 36), (36, 36), vec![], 64),
        (DType::F32, (1, 37), (8, 40), vec!["q", "k", "v"], 64),
        (DType::F16, (192, 128), (192, 128), vec![], 192),
        (DType::F16, (128, 192), (128, 192), vec![], 192),
        (DType::F16, (100, 256), (112, 256), vec!["q", "k"], 256),
        (DType::BF16, (40, 1), (40, 16), vec!["v"], 64),
        (DType::BF16, (257, 512), (272, 512), vec!["q", "k"], 512),
    ] {
        let (q, v) = (zeros(&[1, 20, 2, dims.0], dtype)?, zeros(&[1, 20, 2, dims.1], dtype)?);
        let plan = plan(&testing::problem(&Attention::new(), &q, &q, &v)?, &H100)?;
        let text = format!("{dtype:?} {dims:?}: {plan:?}");
        assert_eq!((plan.head_dim, plan.head_dim_v), padded, "{text}");
        assert_eq!(plan.copied, copied, "{text}");
        for pass in [Pass::Forward, Pass::Backward] {
            assert_eq!(launch(&plan, pass).kernel.head_dim, kernel_dim, "{text}");
        }
        let names = format!("head_dim: {}, head_dim_v: {}", padded.0, padded.1);
        assert!(format!("{plan:?}").contains(&names), "{text}");
    }
    Ok(())
}

/// Kernels compute offsets between rows in 32 bits. Inputs whose rows are too far apart are copied.
#[test]
fn inputs_with_distant_rows_are_copied() -> Result<()> {
    let x = zeros(&[1, 33, 1, 64], DType::BF16)?;
    let mut problem = testing::problem(&Attention::new(), &x, &x, &x)?;
    problem.v.row = i32::MAX as usize / 32 / 8 * 8;
    assert_eq!(plan(&problem, &H100)?.copied, [""; 0]);
    problem.v.row += 8;
    assert_eq!(plan(&problem, &H100)?.copied, ["v"]);
    // With a single row the stride is not used.
    let x = zeros(&[2, 1, 1, 64], DType::BF16)?;
    let mut problem = testing::problem(&Attention::new(), &x, &x, &x)?;
    problem.q.row = 1 << 40;
    assert_eq!(plan(&problem, &H100)?.copied, [""; 0]);
    Ok(())
}

/// A copy does not help if q, k and v in one tensor have so many heads that rows of the copy are too far apart.
#[test]
fn copies_with_distant_rows_are_refused() -> Result<()> {
    let heads = 50_000;
    let qkv = zeros(&[1, 1, 1, 512], DType::BF16)?.broadcast_as((1, 2, 3 * heads, 512))?;
    let mut problem = testing::problem_qkv(&Attention::new(), &qkv, heads)?;
    problem.q.row = 1 << 40;
    let refused = plan(&problem, &H100).expect_err("must be refused").to_string();
    assert!(
        refused.starts_with("stride of rows in a copy is 76800000, but a CUDA kernel takes at most 67108863;"),
        "{refused}"
    );
    Ok(())
}

/// If an axis of a grid is empty, its kernel does not run, and the other kernels do.
#[test]
fn calls_without_rows_have_empty_grids() -> Result<()> {
    let x = |seqlen: usize| zeros(&[2, seqlen, 3, 64], DType::F16);
    let of = |seqlen_q, seqlen_k| -> Result<CudaPlan> {
        let (q, k) = (x(seqlen_q)?, x(seqlen_k)?);
        Ok(plan(&testing::problem(&Attention::new(), &q, &k, &k)?, &A100)?)
    };
    let without_keys = of(5, 0)?;
    assert_eq!((forward(&without_keys).grid, backward(&without_keys).grid), ((1, 3, 2), (0, 3, 2)));
    let without_queries = of(0, 5)?;
    assert_eq!((forward(&without_queries).grid, backward(&without_queries).grid), ((0, 3, 2), (1, 3, 2)));
    let delta_and_convert = [Pass::Delta, Pass::Convert].map(|pass| launch(&without_queries, pass).grid.0);
    assert_eq!(delta_and_convert, [0, 0]);
    Ok(())
}

/// The table of kernels equals the lines of cuda/instances.def.
#[test]
fn the_table_has_every_variant_once() {
    let variant = |kernel: &Kernel| (kernel.dtype, kernel.score_mod);
    for kernel in &KERNELS {
        assert_eq!(KERNELS.iter().filter(|other| other.name == kernel.name).count(), 1, "{}", kernel.name);
        let of_line = |other: &&Kernel| (other.image, other.pass) == (kernel.image, kernel.pass);
        let variants: Vec<_> = KERNELS.iter().filter(of_line).map(variant).collect();
        let want: Vec<_> = match (kernel.pass, kernel.dtype) {
            (Pass::Delta | Pass::Convert, _) => {
                [DType::F16, DType::BF16, DType::F32].map(|dtype| (dtype, false)).to_vec()
            }
            // Lines of f32 have tiles of their own.
            (_, DType::F32) => vec![(DType::F32, false), (DType::F32, true)],
            _ => vec![(DType::F16, false), (DType::F16, true), (DType::BF16, false), (DType::BF16, true)],
        };
        assert_eq!(variants, want, "{}", kernel.name);
    }
}

#[test]
fn capabilities_of_another_device_make_no_cuda_plan() -> Result<()> {
    let problem = problem(&Attention::new(), 64, DType::F16)?;
    let error = CudaPlan::choose(&problem, &DeviceCaps::Cpu, |_| true).expect_err("the CPU runs no CUDA kernel");
    assert!(matches!(error, Error::NoKernel { dtype: DType::F16, device: DeviceLocation::Cpu }), "{error}");
    Ok(())
}
