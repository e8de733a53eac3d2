//! Captures a forward and a backward in a CUDA graph and replays them with other inputs.
//!
//! This also proves that the calls never wait for the device or copy from it. A stream refuses both during a capture, and the
//! capture fails.
//!
//! Each test opens its own device, because an error inside a capture makes all later calls of cudarc's context fail. The other
//! tests share another context. Candle has one stream per thread, so no other test queues work into the capture.

use crate::common::cases::{own_gpu, window, Alibi, Case, Lengths, Target, GPU_DTYPES};
use crate::common::compare;
use crate::common::reference::{Input, Output};
use crate::common::run::Call;
use anyhow::{ensure, Context, Result};
use candle_core::cuda::cudarc::driver::sys::{self, CUgraphInstantiate_flags, CUstreamCaptureMode};
use candle_core::cuda::cudarc::driver::CudaGraph;
use candle_core::{DType, Device, Tensor, Var};
use candle_fa2::testing::{self, Plan};
use candle_fa2::{Attention, Mask};

/// A new device for this test, once for each type.
fn own_targets() -> Vec<Target> {
    let Some(device) = own_gpu() else { return Vec::new() };
    GPU_DTYPES.map(|dtype| Target { device: device.clone(), dtype }).to_vec()
}

/// Captures the work that `work` queues as a graph.
///
/// Memory that `work` allocates belongs to the graph. It can be read after a launch. The next launch frees it and allocates it
/// again at the same addresses.
fn capture<T>(device: &Device, work: impl FnOnce() -> Result<T>) -> Result<(T, CudaGraph)> {
    let stream = device.as_cuda_device()?.cuda_stream();
    stream.begin_capture(CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL)?;
    let done = work();
    // End the capture of the stream also after an error.
    let graph = stream.end_capture(CUgraphInstantiate_flags::CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH);
    Ok((done?, graph?.context("nothing was captured")?))
}

/// Number of kernels, copies, allocations and frees of a graph.
fn nodes(graph: &CudaGraph) -> Result<usize> {
    let mut count = 0;
    // SAFETY: the graph is alive. Without an array for the nodes, the driver writes only their number.
    unsafe { sys::cuGraphGetNodes(graph.cu_graph(), std::ptr::null_mut(), &mut count) }.result()?;
    Ok(count)
}

/// Each kind of call, with and without `deterministic`.
fn cases(target: &Target) -> Vec<Case> {
    let case = || Case::new(target).heads(4, 2).head_dim(64).mask(Mask::Causal);
    let kinds = [
        case().batch(2, 200, 300),
        case().batch(1, 300, 270).head_dim(128).mask(window(100, 20)).softcap(20.0),
        case().batch(2, 150, 150).head_dim(40).alibi(Alibi::PerHead),
        case().packed(&[(130, 140), (0, 4), (33, 200)]),
        case().batch(4, 100, 60).heads(48, 6), // more tiles than multiprocessors: a persistent kernel uses its tile counter
    ];
    kinds.into_iter().flat_map(|case| [case.clone(), case.deterministic()]).collect()
}

/// q, k, v and do of a case, at fixed addresses.
struct Inputs {
    attention: Attention,
    q: Var,
    k: Var,
    v: Var,
    do_: Var,
}

impl Inputs {
    fn new(case: &Case, input: &Input) -> Result<Self> {
        let Call { attention, q, k, v } = case.call(input)?;
        Ok(Self { attention, q, k, v, do_: Var::from_tensor(&case.tensor(&input.do_, &case.shape_o())?)? })
    }

    /// Copies other values to the same addresses.
    fn set(&self, case: &Case, input: &Input) -> Result<()> {
        for (var, values) in [(&self.q, &input.q), (&self.k, &input.k), (&self.v, &input.v), (&self.do_, &input.do_)] {
            var.set(&case.tensor(values, var.dims())?)?;
        }
        Ok(())
    }
}

/// o, lse, dq, dk and dv on the device.
type Results = [Tensor; 5];

/// Waits for `results` and returns their elements.
fn read(case: &Case, [o, lse, dq, dk, dv]: &Results) -> Result<Output> {
    Ok(Output {
        o: case.output_rows(o)?,
        lse: case.lse_rows(lse)?,
        dq: case.input_rows(dq, true)?,
        dk: case.input_rows(dk, false)?,
        dv: case.input_rows(dv, false)?,
    })
}

/// Captures `pass`, replays it with the same input and with another one, and compares both with direct calls.
fn replay(case: &Case, pass: impl Fn(&Inputs) -> Result<Results>) -> Result<()> {
    let first = case.draw();
    // Another random input of the same shapes; the name of a case is its seed. Slopes are options, so they stay the same. lse
    // has no gradient here.
    let (dlse, alibi_slopes) = (first.dlse.clone(), first.alibi_slopes.clone());
    let second = Input { dlse, alibi_slopes, ..case.clone().dlse().draw() };
    let inputs = Inputs::new(case, &first)?;
    // Load all kernels first, because a module cannot be loaded during a capture.
    drop(pass(&inputs)?);
    let (results, graph) = capture(&case.device, || pass(&inputs))?;
    for input in [&first, &second] {
        inputs.set(case, input)?;
        graph.launch()?;
        let replayed = read(case, &results)?;
        case.check_output(input, &replayed).context("replayed")?;
        let direct = read(case, &pass(&inputs)?)?;
        for ((name, got), (_, want)) in replayed.named().into_iter().zip(direct.named()) {
            // Without `deterministic` dq is summed in another order each time.
            if name != "dq" || case.deterministic {
                let what = format!("from those of a direct call\ncase {case}");
                compare::same_rows(name, &got.values, &want.values, &what)?;
            }
        }
    }
    // Free the memory of the last launch before the graph that owns it.
    drop(results);
    case.device.synchronize()?;
    drop(graph);
    Ok(())
}

// Lengths are copied to the device before the capture, because that copy waits for the host.

/// The operator without autograd.
#[test]
fn a_graph_of_the_operator_replays_on_new_numbers() -> Result<()> {
    for target in own_targets() {
        for case in cases(&target) {
            let cu_seqlens = case.cu_seqlens()?;
            replay(&case, |Inputs { attention, q, k, v, do_ }| {
                let problem = match case.lengths {
                    Lengths::Padded { .. } => testing::problem(attention, q, k, v)?,
                    Lengths::Packed(_) => testing::problem_packed(attention, (q, k, v), &cu_seqlens.0, &cu_seqlens.1)?,
                };
                let plan = Plan::choose(&problem, &testing::device_caps(&case.device)?)?;
                let call = testing::Call::with_plan(attention, problem, (q, k, v), plan)?;
                let o = call.forward()?;
                let (_, lse) = call.forward_with_lse()?;
                let (dq, dk, dv) = call.backward(&o, do_)?;
                Ok([o, lse, dq.context("dq")?, dk.context("dk")?, dv.context("dv")?])
            })?;
        }
    }
    Ok(())
}

/// The public call with Candle's autograd, as in a training step.
#[test]
fn a_graph_of_forward_and_autograd_replays_on_new_numbers() -> Result<()> {
    for target in own_targets() {
        for case in cases(&target) {
            let cu_seqlens = case.cu_seqlens()?;
            replay(&case, |Inputs { attention, q, k, v, do_ }| {
                let (o, lse) = match case.lengths {
                    Lengths::Padded { .. } => attention.forward_with_lse(q, k, v)?,
                    Lengths::Packed(_) => attention.forward_packed_with_lse(q, k, v, &cu_seqlens.0, &cu_seqlens.1)?,
                };
                // The gradient of sum(o * do) with respect to o is do.
                let grads = (&o * do_.as_tensor())?.backward()?;
                let grad = |var: &Var| grads.get(var).cloned().context("no gradient");
                // Detach o. Its graph would keep memory that the capture must free.
                Ok([o.detach(), lse.detach(), grad(q)?, grad(k)?, grad(v)?])
            })?;
        }
    }
    Ok(())
}

/// A refused call queues nothing, so its graph is empty. An accepted call queues work.
#[test]
fn a_refused_call_queues_nothing() -> Result<()> {
    for Target { device, dtype } in own_targets() {
        let zeros = |dtype: DType, head_dim: usize| Tensor::zeros((1, 5, 2, head_dim), dtype, &device);
        let fine = zeros(dtype, 64)?;
        Attention::new().forward(&fine, &fine, &fine)?;
        let f64 = zeros(DType::F64, 64)?;
        let ((), graph) = capture(&device, || {
            Attention::new().forward(&f64, &f64, &f64).expect_err("has no kernel");
            Ok(())
        })?;
        ensure!(nodes(&graph)? == 0, "a call was refused, but {} nodes are queued", nodes(&graph)?);
        let (o, graph) = capture(&device, || Ok(Attention::new().forward(&fine, &fine, &fine)?))?;
        ensure!(nodes(&graph)? > 0, "the graph of a forward is empty");
        graph.launch()?;
        drop(o);
        device.synchronize()?;
    }
    Ok(())
}
