//! Makes a `Problem` from tensors and a `Plan` from a `Problem`, without computing anything.

use anyhow::Result;
use candle_core::{DType, Device, DeviceLocation, Tensor, Var};
use candle_fa2::testing::{self, Alibi, DeviceCaps, Lengths, Plan, Problem, Strides};
use candle_fa2::{Attention, CuSeqlens, Error, Mask};
use std::process::Command;

fn zeros(shape: &[usize]) -> Result<Tensor> {
    Ok(Tensor::zeros(shape, DType::BF16, &Device::Cpu)?)
}

/// Every field has the requested value. All values differ.
#[test]
fn a_problem_says_what_was_asked() -> Result<()> {
    let q = zeros(&[2, 3, 8, 16])?;
    // The storage has the heads first. The view begins at the second sequence.
    let k = zeros(&[3, 4, 5, 16])?.narrow(0, 1, 2)?.transpose(1, 2)?;
    let v = zeros(&[2, 5, 1, 20])?.narrow(3, 4, 12)?.expand((2, 5, 4, 12))?;
    let slopes = Tensor::zeros((2, 8), DType::F32, &Device::Cpu)?;
    let mask = Mask::Window { left: Some(7), right: None };
    let attention = Attention::new().mask(mask).softmax_scale(0.25).softcap(30.0).alibi_slopes(&slopes);
    let problem = testing::problem(&attention, &q, &k, &v)?;
    assert_eq!((problem.dtype, problem.device), (DType::BF16, DeviceLocation::Cpu));
    assert_eq!((problem.num_heads, problem.num_heads_k, problem.head_dim, problem.group_size()), (8, 4, 16, 2));
    assert_eq!(problem.head_dim_v, 12);
    assert_eq!((problem.mask, problem.softmax_scale, problem.softcap), (mask, 0.25, Some(30.0)));
    assert_eq!(problem.alibi, Some(Alibi::PerBatchAndHead));
    assert_eq!(problem.q, Strides { offset: 0, batch: 384, row: 128, head: 16 });
    assert_eq!(problem.k, Strides { offset: 320, batch: 320, row: 16, head: 80 });
    assert_eq!(problem.v, Strides { offset: 4, batch: 100, row: 20, head: 0 });
    assert!(matches!(problem.lengths, Lengths::Padded { batch: 2, seqlen_q: 3, seqlen_k: 5, .. }));
    assert_eq!((problem.batch(), problem.rows_q(), problem.rows_k()), (2, 6, 10));
    assert_eq!((problem.shape_q(), problem.shape_k()), (vec![2, 3, 8, 16], vec![2, 5, 4, 16]));
    assert_eq!((problem.shape_v(), problem.shape_o()), (vec![2, 5, 4, 12], vec![2, 3, 8, 12]));
    assert_eq!(problem.contiguous_v(), Strides { offset: 0, batch: 240, row: 48, head: 12 });
    assert_eq!(problem.contiguous_o(), Strides { offset: 0, batch: 288, row: 96, head: 12 });
    assert_eq!(problem.shape_lse(), [2, 8, 3]);
    Ok(())
}

/// The first input that is tracked, by the name that the caller gave it.
#[test]
fn a_problem_knows_whether_gradients_are_asked_for() -> Result<()> {
    let x = zeros(&[1, 2, 6, 40])?;
    let tracked = Var::from_tensor(&x)?;
    let attention = Attention::new();
    let of = |q: &Tensor, k: &Tensor, v: &Tensor| -> Result<_> { Ok(testing::problem(&attention, q, k, v)?.tracked) };
    assert_eq!(of(&x, &x, &x)?, None);
    assert_eq!(of(&x, &x, &tracked)?, Some("v"));
    assert_eq!(of(&x, &(tracked.as_tensor() * 2.0)?, &tracked)?, Some("k"));
    assert_eq!(of(&tracked.detach(), &x, &x)?, None);
    assert_eq!(testing::problem_qkv(&attention, &tracked, 2)?.tracked, Some("qkv"));
    assert_eq!(testing::problem_qkv(&attention, &x, 2)?.tracked, None);
    Ok(())
}

#[test]
fn options_left_out_have_defaults() -> Result<()> {
    let x = zeros(&[1, 2, 3, 40])?;
    let problem = testing::problem(&Attention::new(), &x, &x, &x)?;
    assert_eq!((problem.mask, problem.softcap, problem.alibi), (Mask::None, None, None));
    assert_eq!((problem.head_dim_v, problem.softmax_scale), (40, 1.0 / 40f64.sqrt()));
    // The default scale does not depend on v.
    let problem = testing::problem(&Attention::new(), &x, &x, &zeros(&[1, 2, 3, 24])?)?;
    assert_eq!((problem.head_dim_v, problem.softmax_scale), (24, 1.0 / 40f64.sqrt()));
    Ok(())
}

#[test]
fn a_packed_problem_knows_its_sequences() -> Result<()> {
    let (lengths_q, lengths_k) = ([3, 0, 4], [5, 2, 1]);
    let cu_seqlens_q = CuSeqlens::from_lengths(&lengths_q, &Device::Cpu)?;
    let cu_seqlens_k = CuSeqlens::from_lengths(&lengths_k, &Device::Cpu)?;
    let (q, k) = (zeros(&[7, 6, 16])?, zeros(&[8, 2, 16])?);
    let problem = testing::problem_packed(&Attention::new(), (&q, &k, &k), &cu_seqlens_q, &cu_seqlens_k)?;
    assert_eq!((problem.batch(), problem.rows_q(), problem.rows_k()), (3, 7, 8));
    assert_eq!((problem.shape_q(), problem.shape_k()), (vec![7, 6, 16], vec![8, 2, 16]));
    assert_eq!(problem.shape_lse(), [6, 7]);
    let sequences: Vec<_> =
        problem.sequences().map(|s| (s.batch, s.seqlen_q, s.seqlen_k, s.first_q, s.first_k)).collect();
    assert_eq!(sequences, [(0, 3, 5, 0, 0), (1, 0, 2, 3, 5), (2, 4, 1, 3, 7)]);
    // Heads first: head 2 of the third sequence begins after two heads of 7 rows and the 3 rows of the first sequence.
    assert_eq!(problem.lse_start(&problem.sequence(2), 2), 2 * 7 + 3);
    Ok(())
}

/// A printed problem and plan contain the words that a reader of `CANDLE_FA2_LOG=plan` needs.
#[test]
fn problem_and_plan_print() -> Result<()> {
    let x = zeros(&[1, 2, 3, 40])?;
    let problem = testing::problem(&Attention::new().mask(Mask::Causal), &x, &x, &x)?;
    let plan = Plan::choose(&problem, &testing::device_caps(&Device::Cpu)?)?;
    let text = format!("{problem:?} -> {plan:?}");
    for word in
        ["BF16", "Causal", "head_dim: 40", "head_dim_v: 40", "seqlen_q: 2", "num_heads: 3", "block_m", "block_n"]
    {
        assert!(text.contains(word), "{word} is missing in {text}");
    }
    Ok(())
}

/// Two calls with one problem and one call with another. [`the_log_prints_each_problem_once`] runs this as a child process.
#[test]
fn three_calls_of_two_problems() -> Result<()> {
    let (short, long) = (zeros(&[1, 2, 3, 40])?, zeros(&[1, 6, 3, 40])?);
    for x in [&short, &short, &long] {
        Attention::new().forward(x, x, x)?;
    }
    Ok(())
}

/// `CANDLE_FA2_LOG=plan` prints one line to stderr for each distinct problem. Without it nothing is printed.
#[test]
fn the_log_prints_each_problem_once() -> Result<()> {
    let lines = |log: Option<&str>| -> Result<Vec<String>> {
        let mut child = Command::new(std::env::current_exe()?);
        child
            .args(["problem_plan::three_calls_of_two_problems", "--exact", "--nocapture"])
            .env_remove("CANDLE_FA2_LOG");
        if let Some(log) = log {
            child.env("CANDLE_FA2_LOG", log);
        }
        let output = child.output()?;
        anyhow::ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
        let text = String::from_utf8(output.stderr)?;
        Ok(text.lines().filter(|line| line.starts_with("candle-fa2: ")).map(String::from).collect())
    };
    let logged = lines(Some("plan"))?;
    assert_eq!(logged.len(), 2, "{logged:?}");
    assert!(logged[0].contains("seqlen_q: 2") && logged[1].contains("seqlen_q: 6"), "{logged:?}");
    assert_eq!(lines(None)?, [""; 0]);
    Ok(())
}

/// The same problem always gives the same plan. Tiles are never empty.
#[test]
fn a_plan_is_a_function_of_its_problem() -> Result<()> {
    for head_dim in [1, 64, 128, 129, 512] {
        let x = zeros(&[1, 2, 1, head_dim])?;
        let problem = testing::problem(&Attention::new(), &x, &x, &x)?;
        let plan = Plan::choose(&problem, &DeviceCaps::Cpu)?;
        assert_eq!(plan, Plan::choose(&Problem::clone(&problem), &DeviceCaps::Cpu)?);
        for tile in plan.tiles() {
            assert!(tile.block_m > 0 && tile.block_n > 0, "{tile:?}");
        }
    }
    Ok(())
}

#[test]
fn a_device_without_kernels_is_refused() -> Result<()> {
    let x = zeros(&[1, 2, 3, 40])?;
    let problem = testing::problem(&Attention::new(), &x, &x, &x)?;
    let location = DeviceLocation::Metal { gpu_id: 0 };
    let error = Plan::choose(&problem, &DeviceCaps::Other(location)).expect_err("no kernel runs on Metal");
    assert!(matches!(error, Error::NoKernel { dtype: DType::BF16, device } if device == location), "{error}");
    Ok(())
}
