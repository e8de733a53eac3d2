//! Times each operator on the first NVIDIA GPU, next to the bytes it must move, at the shapes of training runs.
//!
//! ```sh
//! cargo bench --features cuda --bench operators -- --csv ours.csv
//! cargo bench --features cuda --bench operators -- norm bf16      # the cells whose name contains both words
//! ```
//!
//! A time is the median of several samples between CUDA events. A sample is some milliseconds of calls one after another, so that
//! neither the events nor the launches count. Every cell moves more bytes than an L2 cache holds. `share` is the share of the rate
//! of a copy of 1 GiB in the same run: the bytes that the operator must move, over its time, over that rate. `of_copy` is the time of
//! a copy of the same bytes, divided by the time of the operator. It is the fairer number for short calls: a copy of 20 us also loses
//! time at its start and its end. The backward is that of the operator alone, without what Candle does with the gradients.
//! benches/peers_ops.py has the same cells in PyTorch.

use std::collections::HashMap;
use std::fs::File;
use std::io::Write;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, Result};
use candle_core::cuda::cudarc::driver::sys::CUevent_flags_enum::CU_EVENT_DEFAULT;
use candle_core::cuda::cudarc::driver::CudaStream;
use candle_core::{DType, Device, Tensor, Var};
use candle_fused_ops::testing::{recorded, Recorded};
use candle_fused_ops::{
    add_layer_norm, add_rms_norm, cross_entropy, embedding, geglu, gelu, layer_norm, linear_cross_entropy, rms_norm,
    rotary, swiglu, AdamW, AdamWConfig, ParameterGroup, RotaryOrder,
};

/// GPT-2 124M at 32 x 1024 tokens, 355M at 16 x 1024, and the widths of larger models.
const NORMS: [(usize, usize); 5] = [(32768, 768), (16384, 1024), (8192, 2048), (8192, 4096), (4096, 8192)];
/// The last two need accesses of one element, or more shared memory than a block has.
const LOGITS: [(usize, usize); 3] = [(8192, 50304), (8192, 50257), (4096, 128256)];
const LINEARS: [(usize, usize, usize); 3] = [(32768, 768, 50304), (16384, 1024, 50304), (8192, 2048, 50304)];

fn main() -> Result<()> {
    let options = Options::parse()?;
    let mut bench = Bench::new(&options)?;
    for dtype in [DType::BF16, DType::F32] {
        for shape in NORMS {
            norms(&mut bench, dtype, shape)?;
        }
        for shape in LOGITS {
            losses(&mut bench, dtype, shape)?;
        }
        for shape in LINEARS {
            linear_losses(&mut bench, dtype, shape)?;
        }
        activations(&mut bench, dtype, (32768, 3072))?;
        positions(&mut bench, dtype)?;
        optimizer(&mut bench, dtype)?;
    }
    Ok(())
}

fn norms(bench: &mut Bench, dtype: DType, (rows, width): (usize, usize)) -> Result<()> {
    const EPS: f64 = 1e-5;
    let shape = format!("{rows}x{width}");
    let row_tensor = rows * width * dtype.size_in_bytes();
    let [x, residual] = [(); 2].map(|()| bench.random(&[rows, width], dtype));
    let [weight, bias] = [(); 2].map(|()| bench.random(&[width], dtype));
    let (x, residual, weight, bias) = (x?, residual?, weight?, bias?);
    let cell = |operator| Cell { operator, dtype, shape: &shape, forward: 2 * row_tensor, backward: 3 * row_tensor };
    bench.operator(cell("layer_norm"), || Ok(vec![layer_norm(&x, &weight, Some(&bias), EPS)?]))?;
    bench.operator(cell("rms_norm"), || Ok(vec![rms_norm(&x, &weight, EPS)?]))?;
    // The backward of the sum is Candle's. So these cells have the backward of the norm.
    let added = |operator| Cell { forward: 4 * row_tensor, ..cell(operator) };
    bench.operator(added("add_layer_norm"), || {
        let (sum, y) = add_layer_norm(&x, &residual, &weight, Some(&bias), EPS)?;
        Ok(vec![sum, y])
    })?;
    bench.operator(added("add_rms_norm"), || {
        let (sum, y) = add_rms_norm(&x, &residual, &weight, EPS)?;
        Ok(vec![sum, y])
    })
}

fn losses(bench: &mut Bench, dtype: DType, (rows, vocab): (usize, usize)) -> Result<()> {
    let shape = format!("{rows}x{vocab}");
    let bytes = rows * vocab * dtype.size_in_bytes();
    let cell = Cell { operator: "cross_entropy", dtype, shape: &shape, forward: bytes, backward: 2 * bytes };
    if !bench.wants(&cell) {
        return Ok(());
    }
    let (logits, targets) = (bench.random(&[rows, vocab], dtype)?, bench.ids(rows, vocab)?);
    bench.operator(cell, || Ok(vec![cross_entropy(&logits, &targets)?]))
}

/// The share of these cells is that of the three matrix products alone, by Candle's matmul over all rows at once.
fn linear_losses(bench: &mut Bench, dtype: DType, (rows, width, vocab): (usize, usize, usize)) -> Result<()> {
    let shape = format!("{rows}x{width}x{vocab}");
    let cell = Cell { operator: "linear_cross_entropy", dtype, shape: &shape, forward: 0, backward: 0 };
    if !bench.wants(&cell) {
        return Ok(());
    }
    let (x, weight, targets) =
        (bench.random(&[rows, width], dtype)?, bench.random(&[vocab, width], dtype)?, bench.ids(rows, vocab)?);
    let (x_alone, weight_alone) = (x.detach(), weight.detach());
    let logits = bench.time(|| Ok(x_alone.matmul(&weight_alone.t()?)?))?;
    let dlogits = x_alone.matmul(&weight_alone.t()?)?;
    let dx = bench.time(|| Ok(dlogits.matmul(&weight_alone)?))?;
    let dweight = bench.time(|| Ok(dlogits.t()?.matmul(&x_alone)?))?;
    drop(dlogits);
    let products = logits.median + dx.median + dweight.median;
    let (y, nodes) = recorded(|| linear_cross_entropy(&x, &weight, &targets));
    let (dloss, node) = (y?.ones_like()?, nodes.last().context("a node")?);
    let time = bench.time(|| {
        let loss = linear_cross_entropy(&x, &weight, &targets)?;
        Ok((loss, node.run(&dloss)?))
    })?;
    bench.print(&cell, "both", &time, 0, [Some(products / time.median), None])
}

fn activations(bench: &mut Bench, dtype: DType, (rows, width): (usize, usize)) -> Result<()> {
    let shape = format!("{rows}x{width}");
    let bytes = rows * width * dtype.size_in_bytes();
    let (x, up) = (bench.random(&[rows, width], dtype)?, bench.random(&[rows, width], dtype)?);
    let cell = |operator| Cell { operator, dtype, shape: &shape, forward: 2 * bytes, backward: 3 * bytes };
    bench.operator(cell("gelu"), || Ok(vec![gelu(&x)?]))?;
    let gated = |operator| Cell { forward: 3 * bytes, backward: 5 * bytes, ..cell(operator) };
    bench.operator(gated("swiglu"), || Ok(vec![swiglu(&x, &up)?]))?;
    bench.operator(gated("geglu"), || Ok(vec![geglu(&x, &up)?]))
}

fn positions(bench: &mut Bench, dtype: DType) -> Result<()> {
    let (batch, seqlen, heads, head_dim, vocab) = (32, 1024, 12, 64, 50304);
    let bytes = batch * seqlen * heads * head_dim * dtype.size_in_bytes();
    let shape = format!("{batch}x{seqlen}x{heads}x{head_dim}");
    let x = bench.random(&[batch, seqlen, heads, head_dim], dtype)?;
    let angles = Tensor::randn(0f32, 1f32, (seqlen, head_dim / 2), &bench.device)?;
    let (cos, sin) = (angles.cos()?, angles.sin()?); // in f32, which the kernels read; other types are cast at each call
    for (operator, order) in [("rotary", RotaryOrder::HalfSplit), ("rotary_interleaved", RotaryOrder::Interleaved)] {
        let cell = Cell { operator, dtype, shape: &shape, forward: 2 * bytes, backward: 2 * bytes };
        bench.operator(cell, || Ok(vec![rotary(&x, &cos, &sin, order)?]))?;
    }
    let width = heads * head_dim;
    let (weight, ids) = (bench.random(&[vocab, width], dtype)?, bench.ids(batch * seqlen, vocab)?);
    let table = vocab * width * dtype.size_in_bytes();
    let shape = format!("{}x{width}x{vocab}", batch * seqlen);
    let cell = Cell { operator: "embedding", dtype, shape: &shape, forward: 2 * bytes, backward: bytes + table };
    bench.operator(cell, || Ok(vec![embedding(&ids, &weight)?]))
}

/// A step over the parameters of GPT-2 124M, in matrices of 768 x 3072, with clipping.
fn optimizer(bench: &mut Bench, dtype: DType) -> Result<()> {
    const COUNT: usize = 53;
    let (rows, columns) = (768, 3072);
    let elements = COUNT * rows * columns;
    // The weights, m and v in f32 are read and written. Gradients are read for the norm and again for the step. Parameters of
    // narrow types are written.
    let size = dtype.size_in_bytes();
    let bytes = elements * (24 + 2 * size + if dtype == DType::F32 { 0 } else { size });
    let shape = format!("{COUNT}x{rows}x{columns}");
    let cell = Cell { operator: "adamw", dtype, shape: &shape, forward: bytes, backward: 0 };
    if !bench.wants(&cell) {
        return Ok(());
    }
    let mut parameters = Vec::new();
    let mut loss = Tensor::zeros((), DType::F32, &bench.device)?;
    for index in 0..COUNT {
        let var = Var::randn(0f32, 1f32, (rows, columns), &bench.device)?.to_dtype(dtype)?;
        let var = Var::from_tensor(&var)?;
        loss = (loss + var.sqr()?.sum_all()?.to_dtype(DType::F32)?)?;
        parameters.push((format!("p{index}"), var));
    }
    let grads = loss.backward()?;
    let config = AdamWConfig { max_norm: Some(1.0), ..AdamWConfig::default() };
    let optimizer = AdamW::new([ParameterGroup { parameters, weight_decay: 0.1 }], config)?;
    let optimizer = std::cell::RefCell::new(optimizer);
    let time = bench.time(|| Ok(optimizer.borrow_mut().step(&grads, 1e-4)?))?;
    bench.row(&cell, "step", &time, bytes)
}

/// One operator at one shape, and the bytes that its passes must move.
struct Cell<'a> {
    operator: &'static str,
    dtype: DType,
    shape: &'a str,
    forward: usize,
    backward: usize,
}

/// Seconds of one call: on the GPU, and until the host has queued it.
struct Time {
    median: f64,
    min: f64,
    host: f64,
}

struct Bench {
    device: Device,
    stream: Arc<CudaStream>,
    words: Vec<String>,
    csv: Option<File>,
    /// Bytes per second of a copy of 1 GiB, read and written.
    copy: f64,
    /// Seconds of a copy, by the number of bytes that it moves.
    copies: HashMap<usize, f64>,
}

impl Bench {
    fn new(options: &Options) -> Result<Self> {
        let device = Device::new_cuda(0)?;
        let stream = device.as_cuda_device()?.cuda_stream();
        let csv = options.csv.as_ref().map(File::create).transpose()?;
        let mut bench = Self { device, stream, words: options.words.clone(), csv, copy: 1.0, copies: HashMap::new() };
        const MOVED: usize = 2 << 30;
        bench.copy = MOVED as f64 / bench.copy_of(MOVED)?;
        println!("{}: a copy of 1 GiB moves {:.0} GB/s", bench.stream.context().name()?, bench.copy / 1e9);
        let header = "peer,operator,pass,dtype,shape,us,us_min,mb,gbps,share,of_copy,host_us";
        if let Some(csv) = &mut bench.csv {
            writeln!(csv, "{header}")?;
        }
        println!(
            "{:<22} {:<8} {:<5} {:<18} {:>10} {:>8} {:>7} {:>7} {:>9}",
            "operator", "pass", "type", "shape", "us", "GB/s", "share", "of copy", "host us"
        );
        Ok(bench)
    }

    /// Normal numbers, tracked.
    fn random(&self, shape: &[usize], dtype: DType) -> Result<Tensor> {
        let numbers = Tensor::randn(0f32, 1f32, shape, &self.device)?.to_dtype(dtype)?;
        Ok(Var::from_tensor(&numbers)?.into_inner())
    }

    fn ids(&self, count: usize, below: usize) -> Result<Tensor> {
        let ids: Vec<u32> = (0..count).map(|index| ((index * 7919) % below) as u32).collect();
        Ok(Tensor::new(ids, &self.device)?)
    }

    fn wants(&self, cell: &Cell) -> bool {
        let name = format!("{} {} {}", cell.operator, cell.dtype.as_str(), cell.shape);
        self.words.iter().all(|word| name.contains(word))
    }

    /// Times both passes of an operator, and prints a line for each.
    fn operator(&mut self, cell: Cell, call: impl Fn() -> Result<Vec<Tensor>>) -> Result<()> {
        if !self.wants(&cell) {
            return Ok(());
        }
        let time = self.time(&call)?;
        self.row(&cell, "forward", &time, cell.forward)?;
        let (results, nodes): (_, Vec<Recorded>) = recorded(&call);
        let result = results?.pop().context("an operator has a result")?;
        // Composed operators have Candle's nodes.
        let Some(node) = nodes.last() else { return Ok(()) };
        let dy = result.randn_like(0.0, 1.0)?.detach();
        drop(result);
        let time = self.time(|| Ok(node.run(&dy)?))?;
        self.row(&cell, "backward", &time, cell.backward)
    }

    /// Seconds of a copy that reads and writes `moved` bytes together.
    fn copy_of(&mut self, moved: usize) -> Result<f64> {
        if let Some(seconds) = self.copies.get(&moved) {
            return Ok(*seconds);
        }
        let source = Tensor::zeros(moved / 2, DType::U8, &self.device)?;
        let seconds = self.time(|| Ok(source.copy()?))?.median;
        self.copies.insert(moved, seconds);
        Ok(seconds)
    }

    fn time<R>(&self, call: impl Fn() -> Result<R>) -> Result<Time> {
        const SAMPLES: usize = 9;
        const SAMPLE_MS: f64 = 3.0;
        const MOST_CALLS: f64 = 64.0; // fewer launches than the queue holds, so that the host's time is its own
        let event = || self.stream.context().new_event(Some(CU_EVENT_DEFAULT));
        let (start, end) = (event()?, event()?);
        call()?;
        call()?;
        start.record(&self.stream)?;
        call()?;
        end.record(&self.stream)?;
        self.stream.synchronize()?;
        let calls = (SAMPLE_MS / f64::from(start.elapsed_ms(&end)?)).clamp(1.0, MOST_CALLS) as usize;

        // A synchronisation gives freed memory back to the driver, so there is none between the samples. The first calls allocate
        // it again.
        call()?;
        call()?;
        let mut marks = vec![event()?];
        marks[0].record(&self.stream)?;
        let begun = Instant::now();
        let mut host = 0.0;
        for sample in 0..SAMPLES {
            for _ in 0..calls {
                call()?;
            }
            if sample == 0 {
                host = begun.elapsed().as_secs_f64() / calls as f64;
            }
            let mark = event()?;
            mark.record(&self.stream)?;
            marks.push(mark);
        }
        self.stream.synchronize()?;
        let mut seconds = Vec::new();
        for pair in marks.windows(2) {
            seconds.push(f64::from(pair[0].elapsed_ms(&pair[1])?) / 1e3 / calls as f64);
        }
        seconds.sort_by(f64::total_cmp);
        Ok(Time { median: seconds[SAMPLES / 2], min: seconds[0], host })
    }

    /// Prints the line of a pass that moves `bytes`.
    fn row(&mut self, cell: &Cell, pass: &str, time: &Time, bytes: usize) -> Result<()> {
        let of_copy = self.copy_of(bytes)? / time.median;
        self.print(cell, pass, time, bytes, [Some(bytes as f64 / time.median / self.copy), Some(of_copy)])
    }

    fn print(&mut self, cell: &Cell, pass: &str, time: &Time, bytes: usize, shares: [Option<f64>; 2]) -> Result<()> {
        let Cell { operator, dtype, shape, .. } = cell;
        let (dtype, us, host) = (dtype.as_str(), time.median * 1e6, time.host * 1e6);
        let rate = bytes as f64 / time.median / 1e9;
        let [percent, percent_of_copy] =
            shares.map(|share| share.map_or(String::new(), |s| format!("{:.1}%", 100.0 * s)));
        println!(
            "{operator:<22} {pass:<8} {dtype:<5} {shape:<18} {us:>10.1} {rate:>8.0} {percent:>7} {percent_of_copy:>7} {host:>9.1}"
        );
        if let Some(csv) = &mut self.csv {
            let (us_min, mb) = (time.min * 1e6, bytes as f64 / 1e6);
            let [share, of_copy] = shares.map(|share| share.map_or(String::new(), |share| format!("{share:.4}")));
            writeln!(
                csv,
                "ours,{operator},{pass},{dtype},{shape},{us:.2},{us_min:.2},{mb:.1},{rate:.0},{share},{of_copy},{host:.1}"
            )?;
        }
        Ok(())
    }
}

struct Options {
    words: Vec<String>,
    csv: Option<PathBuf>,
}

impl Options {
    fn parse() -> Result<Self> {
        let (mut words, mut csv) = (Vec::new(), None);
        let mut arguments = std::env::args().skip(1);
        while let Some(argument) = arguments.next() {
            match argument.as_str() {
                "--bench" => {} // cargo adds it
                "--csv" => csv = Some(arguments.next().context("--csv needs a file")?.into()),
                _ => words.push(argument),
            }
        }
        Ok(Self { words, csv })
    }
}
