//! A case: one call of the operator as a value. It can be printed, and it draws its own inputs. It does not depend on the
//! implementation. A device that is added to [`targets`] runs in all tests of the suite.

use anyhow::Result;
use attention_reference::draw::{generator, normal};
use attention_reference::{Input, Precision};
use candle_core::{DType, Device, Tensor};
use candle_fa2::testing::{self, CudaCaps, DeviceCaps, Kernel, Pass, Plan, Tile};
use candle_fa2::{Attention, CuSeqlens, KeyLengths, Mask, PaddingSide, TensorLayout};
use rand::Rng;
use std::fmt;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::OnceLock;

/// The device and the type of a case.
#[derive(Clone, Debug)]
pub struct Target {
    pub device: Device,
    pub dtype: DType,
}

/// All devices and types of the suite.
pub fn targets() -> Vec<Target> {
    [cpu_targets(), gpu_targets()].concat()
}

/// The CPU with every type.
pub fn cpu_targets() -> Vec<Target> {
    [DType::F64, DType::F32, DType::F16, DType::BF16].map(cpu).to_vec()
}

/// The types that the GPU kernels support.
pub const GPU_DTYPES: [DType; 3] = [DType::F32, DType::F16, DType::BF16];

/// The first GPU with each of its types. Empty without the feature `cuda` or without a GPU.
///
/// If `CANDLE_FA2_REQUIRE_GPU` is set and there is no GPU, this panics. So a machine with a GPU does not skip its tests.
pub fn gpu_targets() -> Vec<Target> {
    static GPU: OnceLock<Option<Device>> = OnceLock::new();
    let find = || match Device::new_cuda(0) {
        Ok(gpu) => Some(gpu),
        Err(error) if std::env::var_os("CANDLE_FA2_REQUIRE_GPU").is_some() => panic!("no CUDA device: {error}"),
        Err(_) => None,
    };
    let target = |dtype| GPU.get_or_init(find).clone().map(|device| Target { device, dtype });
    GPU_DTYPES.into_iter().filter_map(target).collect()
}

/// [`gpu_targets`]. Prints SKIPPED if the list is empty.
pub fn gpu_targets_or_skip() -> Vec<Target> {
    let targets = gpu_targets();
    if targets.is_empty() {
        println!("SKIPPED: no CUDA device");
    }
    targets
}

/// The first GPU, as a separate device. It has its own cuBLAS handle, because threads of one device share the workspace of the
/// handle. Its errors do not reach other tests.
pub fn own_gpu() -> Option<Device> {
    let found = !gpu_targets_or_skip().is_empty();
    found.then(|| Device::new_cuda(0).expect("gpu_targets has found this GPU"))
}

/// The target of one type on the CPU, for tests that do not depend on the type.
pub fn cpu(dtype: DType) -> Target {
    Target { device: Device::Cpu, dtype }
}

/// A multiple of what a kernel reads at once: 8 on a GPU (f32 reads 4). Tensors whose head_dim, offsets and strides are multiples of
/// it are read in place.
pub fn chunk(device: &Device) -> usize {
    if device.is_cpu() {
        1
    } else {
        8
    }
}

/// The largest head_dim that `device` has gradients for. It depends on the type: f32 needs more shared memory.
pub fn max_head_dim(device: &Device, dtype: DType) -> usize {
    widest(device, dtype, Pass::Backward)
}

/// The largest head_dim that `device` has a kernel of `pass` for.
pub fn widest(device: &Device, dtype: DType, pass: Pass) -> usize {
    let DeviceCaps::Cuda(caps) = testing::device_caps(device).expect("the device answers") else {
        return testing::MAX_HEAD_DIM;
    };
    let of_pass = testing::KERNELS.iter().filter(|kernel| (kernel.pass, kernel.dtype) == (pass, dtype));
    of_pass.filter(|kernel| fits(kernel, &caps)).map(|kernel| kernel.head_dim).max().unwrap_or(0)
}

/// Whether a GPU with these capabilities runs `kernel`.
pub fn fits(kernel: &Kernel, caps: &CudaCaps) -> bool {
    kernel.arch.runs_on(caps.compute_cap) && kernel.shared_bytes <= caps.shared_bytes_per_block
}

/// The lengths of the sequences of a batch.
#[derive(Clone, Debug, PartialEq)]
pub enum Lengths {
    Padded {
        batch: usize,
        seqlen_q: usize,
        seqlen_k: usize,
    },
    /// `(seqlen_q, seqlen_k)` of each sequence, laid end to end.
    Packed(Vec<(usize, usize)>),
}

/// ALiBi slopes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Alibi {
    Off,
    PerHead,
    PerBatchAndHead,
}

/// One call of the operator.
#[derive(Clone, Debug)]
pub struct Case {
    pub device: Device,
    pub dtype: DType,
    pub lengths: Lengths,
    /// The number of keys in each padded sequence, and the side of its padding.
    pub key_lengths: Option<(Vec<usize>, PaddingSide)>,
    /// Layout of q, k and v, and layout of o.
    pub layouts: (TensorLayout, TensorLayout),
    pub num_heads: usize,
    pub num_heads_k: usize,
    /// The head_dim of q and k.
    pub head_dim: usize,
    /// The head_dim of v and o.
    pub head_dim_v: usize,
    pub mask: Mask,
    /// `None` is the default, `1/sqrt(head_dim)`.
    pub softmax_scale: Option<f64>,
    pub softcap: Option<f64>,
    pub alibi: Alibi,
    /// Whether the loss also depends on lse.
    pub dlse: bool,
    /// Whether every backward must give the same bits. On the CPU it always does.
    pub deterministic: bool,
    /// Whether a GPU computes products of f32 as one product of TF32. The input is then drawn in TF32.
    pub tf32: bool,
}

impl Case {
    /// One sequence of 17 queries and keys, two heads of size 16, no options.
    pub fn new(target: &Target) -> Self {
        Self {
            device: target.device.clone(),
            dtype: target.dtype,
            lengths: Lengths::Padded { batch: 1, seqlen_q: 17, seqlen_k: 17 },
            key_lengths: None,
            layouts: (TensorLayout::Bshd, TensorLayout::Bshd),
            num_heads: 2,
            num_heads_k: 2,
            head_dim: 16,
            head_dim_v: 16,
            mask: Mask::None,
            softmax_scale: None,
            softcap: None,
            alibi: Alibi::Off,
            dlse: false,
            deterministic: false,
            tf32: false,
        }
    }

    pub fn batch(mut self, batch: usize, seqlen_q: usize, seqlen_k: usize) -> Self {
        self.lengths = Lengths::Padded { batch, seqlen_q, seqlen_k };
        self
    }

    pub fn packed(mut self, lengths: &[(usize, usize)]) -> Self {
        self.lengths = Lengths::Packed(lengths.to_vec());
        self
    }

    /// Each sequence has this many keys, and padding on `side`.
    pub fn key_lengths(mut self, lengths: &[usize], side: PaddingSide) -> Self {
        self.key_lengths = Some((lengths.to_vec(), side));
        self
    }

    pub fn layouts(mut self, inputs: TensorLayout, output: TensorLayout) -> Self {
        self.layouts = (inputs, output);
        self
    }

    pub fn heads(mut self, num_heads: usize, num_heads_k: usize) -> Self {
        (self.num_heads, self.num_heads_k) = (num_heads, num_heads_k);
        self
    }

    /// Sets the head_dim of q, k and v, or on a GPU the largest supported value. So all devices can use one list of cases.
    pub fn head_dim(mut self, head_dim: usize) -> Self {
        self.head_dim = head_dim.min(max_head_dim(&self.device, self.dtype));
        self.head_dim_v = self.head_dim;
        self
    }

    /// Sets the head_dim of v after that of q and k, or on a GPU the largest supported value.
    pub fn head_dim_v(mut self, head_dim_v: usize) -> Self {
        self.head_dim_v = head_dim_v.min(max_head_dim(&self.device, self.dtype));
        self
    }

    pub fn mask(mut self, mask: Mask) -> Self {
        self.mask = mask;
        self
    }

    pub fn softmax_scale(mut self, softmax_scale: f64) -> Self {
        self.softmax_scale = Some(softmax_scale);
        self
    }

    pub fn softcap(mut self, softcap: f64) -> Self {
        self.softcap = Some(softcap);
        self
    }

    pub fn alibi(mut self, alibi: Alibi) -> Self {
        self.alibi = alibi;
        self
    }

    pub fn dlse(mut self) -> Self {
        self.dlse = true;
        self
    }

    pub fn deterministic(mut self) -> Self {
        self.deterministic = true;
        self
    }

    pub fn tf32(mut self) -> Self {
        self.tf32 = true;
        self
    }

    /// Whether Candle can allocate the tensors of the case: on a GPU it cannot allocate an empty tensor. The test prints a case
    /// that is skipped for this reason, with a running count.
    pub fn fits(&self) -> bool {
        static LEFT_OUT: AtomicUsize = AtomicUsize::new(0);
        let empty = [self.shape_q(), self.shape_k(), self.shape_v()].concat().contains(&0);
        let fits = self.device.is_cpu() || !empty;
        if !fits {
            let count = LEFT_OUT.fetch_add(1, Ordering::Relaxed) + 1;
            println!("skipped, because Candle allocates no empty tensor on a GPU ({count} so far): {self}");
        }
        fits
    }

    /// `(seqlen_q, seqlen_k)` of each sequence, without padding.
    pub fn sequences(&self) -> Vec<(usize, usize)> {
        match &self.lengths {
            &Lengths::Padded { batch, seqlen_q, seqlen_k } => match &self.key_lengths {
                Some((lengths, _)) => lengths.iter().map(|&length| (seqlen_q, length)).collect(),
                None => vec![(seqlen_q, seqlen_k); batch],
            },
            Lengths::Packed(lengths) => lengths.clone(),
        }
    }

    /// Draws q, k, v, do and dlse from the standard normal distribution, and slopes between 0 and 1/2, all rounded to their
    /// types. The seed is the name of the case, so a failure repeats on every machine.
    pub fn draw(&self) -> Input {
        let mut rng = generator(&self.to_string());
        let lengths = self.sequences();
        let total_q: usize = lengths.iter().map(|l| l.0).sum();
        let total_k: usize = lengths.iter().map(|l| l.1).sum();
        let precision = self.precision();
        let (rows_q, rows_k) = (total_q * self.num_heads, total_k * self.num_heads_k);
        let q = normal(&mut rng, precision, rows_q * self.head_dim);
        let k = normal(&mut rng, precision, rows_k * self.head_dim);
        let v = normal(&mut rng, precision, rows_k * self.head_dim_v);
        let do_ = normal(&mut rng, precision, rows_q * self.head_dim_v);
        let dlse = match self.dlse {
            true => normal(&mut rng, precision.accumulator(), rows_q),
            false => vec![0.0; rows_q],
        };
        let mut slopes = |count: usize| -> Vec<f64> {
            (0..count).map(|_| Precision::F32.round(rng.random_range(0.0..0.5))).collect()
        };
        let alibi_slopes = match self.alibi {
            Alibi::Off => None,
            Alibi::PerHead => Some(slopes(self.num_heads).repeat(lengths.len())),
            Alibi::PerBatchAndHead => Some(slopes(self.num_heads * lengths.len())),
        };
        let window = match self.mask {
            Mask::None => (None, None),
            Mask::Causal => (None, Some(0)),
            Mask::Window { left, right } => (left, right),
        };
        Input {
            precision,
            lengths,
            num_heads: self.num_heads,
            num_heads_k: self.num_heads_k,
            head_dim: self.head_dim,
            head_dim_v: self.head_dim_v,
            window,
            softmax_scale: self.softmax_scale.unwrap_or(1.0 / (self.head_dim as f64).sqrt()),
            softcap: self.softcap,
            alibi_slopes,
            q,
            k,
            v,
            do_,
            dlse,
            queries: None,
        }
    }

    /// The type of the case, as the reference's type.
    pub fn precision(&self) -> Precision {
        if self.tf32 {
            Precision::Tf32
        } else {
            precision(self.dtype)
        }
    }

    /// The options of the call, with the slopes of `input`.
    pub fn attention(&self, input: &Input) -> Result<Attention> {
        let (inputs, output) = self.layouts;
        let mut attention =
            Attention::new().mask(self.mask).deterministic(self.deterministic).tf32(self.tf32).layout(inputs);
        if output != inputs {
            attention = attention.output_layout(output);
        }
        if let Some((lengths, side)) = &self.key_lengths {
            attention = attention.key_lengths(&KeyLengths::new(lengths, *side, &self.device)?);
        }
        if let Some(softmax_scale) = self.softmax_scale {
            attention = attention.softmax_scale(softmax_scale);
        }
        if let Some(softcap) = self.softcap {
            attention = attention.softcap(softcap);
        }
        if let Some(slopes) = &input.alibi_slopes {
            let batch = input.lengths.len();
            let shape: &[usize] = match self.alibi {
                Alibi::PerBatchAndHead => &[batch, self.num_heads],
                _ => &[self.num_heads],
            };
            // With batch 0 the reference has no slopes. But the shape `(num_heads)` still needs values, so zeros fill it.
            let slopes: Vec<f64> =
                slopes.iter().copied().chain(std::iter::repeat(0.0)).take(shape.iter().product()).collect();
            let slopes = Tensor::from_vec(slopes, shape, &Device::Cpu)?.to_dtype(DType::F32)?;
            attention = attention.alibi_slopes(&slopes.to_device(&self.device)?);
        }
        Ok(attention)
    }

    pub fn cu_seqlens(&self) -> Result<(CuSeqlens, CuSeqlens)> {
        let (lengths_q, lengths_k): (Vec<usize>, Vec<usize>) = self.sequences().into_iter().unzip();
        Ok((CuSeqlens::from_lengths(&lengths_q, &self.device)?, CuSeqlens::from_lengths(&lengths_k, &self.device)?))
    }

    /// Shape of q and its gradient, with the tokens before the heads.
    pub fn shape_q(&self) -> Vec<usize> {
        self.shape_of_queries(self.head_dim)
    }

    /// Shape of k and its gradient, with the tokens before the heads.
    pub fn shape_k(&self) -> Vec<usize> {
        self.shape_of_keys(self.head_dim)
    }

    /// Shape of v and its gradient, with the tokens before the heads.
    pub fn shape_v(&self) -> Vec<usize> {
        self.shape_of_keys(self.head_dim_v)
    }

    /// Shape of o and its gradient, with the tokens before the heads.
    pub fn shape_o(&self) -> Vec<usize> {
        self.shape_of_queries(self.head_dim_v)
    }

    fn shape_of_queries(&self, width: usize) -> Vec<usize> {
        match &self.lengths {
            &Lengths::Padded { batch, seqlen_q, .. } => vec![batch, seqlen_q, self.num_heads, width],
            Lengths::Packed(lengths) => vec![lengths.iter().map(|l| l.0).sum(), self.num_heads, width],
        }
    }

    fn shape_of_keys(&self, width: usize) -> Vec<usize> {
        match &self.lengths {
            &Lengths::Padded { batch, seqlen_k, .. } => vec![batch, seqlen_k, self.num_heads_k, width],
            Lengths::Packed(lengths) => vec![lengths.iter().map(|l| l.1).sum(), self.num_heads_k, width],
        }
    }

    /// q as the call takes it, from the values of an [`Input`].
    pub fn query_tensor(&self, values: &[f64]) -> Result<Tensor> {
        in_layout(&self.tensor(values, &self.shape_q())?, self.layouts.0)
    }

    /// k as the call takes it. Invalid keys are NaN in every second sequence, and large numbers in the others.
    pub fn key_tensor(&self, values: &[f64]) -> Result<Tensor> {
        self.with_invalid_keys(values, &self.shape_k())
    }

    /// v as the call takes it, with invalid keys as in k.
    pub fn value_tensor(&self, values: &[f64]) -> Result<Tensor> {
        self.with_invalid_keys(values, &self.shape_v())
    }

    fn with_invalid_keys(&self, values: &[f64], shape: &[usize]) -> Result<Tensor> {
        let row = shape.iter().rev().take(2).product::<usize>();
        let all = match (&self.lengths, &self.key_lengths) {
            (&Lengths::Padded { batch, seqlen_k, .. }, Some((lengths, side))) => {
                let filler = |sequence: usize| [1000.0, f64::NAN][sequence % 2];
                let mut all: Vec<f64> = (0..batch).flat_map(|n| vec![filler(n); seqlen_k * row]).collect();
                let mut from = values;
                for (sequence, &length) in lengths.iter().enumerate() {
                    let first = sequence * seqlen_k + first_token(*side, length, seqlen_k);
                    let (these, rest) = from.split_at(length * row);
                    all[first * row..][..length * row].copy_from_slice(these);
                    from = rest;
                }
                all
            }
            _ => values.to_vec(),
        };
        in_layout(&self.tensor(&all, shape)?, self.layouts.0)
    }

    /// The gradient of o.
    pub fn output_tensor(&self, values: &[f64]) -> Result<Tensor> {
        in_layout(&self.tensor(values, &self.shape_o())?, self.layouts.1)
    }

    /// `values` as a tensor of the case's type, on its device.
    pub fn tensor(&self, values: &[f64], shape: &[usize]) -> Result<Tensor> {
        Ok(Tensor::from_slice(values, shape, &Device::Cpu)?.to_dtype(self.dtype)?.to_device(&self.device)?)
    }

    /// The score tiles of the forward and of the backward for this case.
    pub fn tiles(&self) -> Result<Vec<Tile>> {
        // Long sequences, because a plan reduces its tiles to the length of short ones. All rows share one row of memory.
        let zeros = |num_heads| -> Result<Tensor> {
            let row = Tensor::zeros((1, 1, num_heads, self.head_dim), self.dtype, &self.device)?;
            Ok(row.expand((1, LONGEST, num_heads, self.head_dim))?)
        };
        let (q, k) = (zeros(self.num_heads)?, zeros(self.num_heads_k)?);
        let problem = testing::problem(&Attention::new(), &q, &k, &k)?;
        Ok(Plan::choose(&problem, &testing::device_caps(&self.device)?)?.tiles())
    }
}

impl fmt::Display for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let device = if self.device.is_cpu() { "cpu".to_string() } else { format!("{:?}", self.device.location()) };
        write!(f, "{device} {} d{} ", self.dtype.as_str(), self.head_dim)?;
        if self.head_dim_v != self.head_dim {
            write!(f, "v{} ", self.head_dim_v)?;
        }
        let side = |side: Option<usize>| side.map_or("all".to_string(), |size| size.to_string());
        match self.mask {
            Mask::None => write!(f, "full")?,
            Mask::Causal => write!(f, "causal")?,
            Mask::Window { left, right } => write!(f, "window {}/{}", side(left), side(right))?,
        }
        let heads = format!("heads {}/{}", self.num_heads, self.num_heads_k);
        match &self.lengths {
            Lengths::Padded { batch, seqlen_q, seqlen_k } => {
                write!(f, ", batch {batch}, {heads}, seqlen {seqlen_q}/{seqlen_k}")?
            }
            Lengths::Packed(lengths) => {
                const MOST_NAMED: usize = 64;
                let named = lengths.iter().take(MOST_NAMED).map(|(q, k)| format!("{q}/{k}"));
                let named: Vec<String> = named.collect();
                write!(f, ", packed, {heads}, seqlens [{}]", named.join(" "))?;
                if lengths.len() > MOST_NAMED {
                    write!(f, " and {} more", lengths.len() - MOST_NAMED)?;
                }
            }
        }
        if let Some(softmax_scale) = self.softmax_scale {
            write!(f, ", scale {softmax_scale}")?;
        }
        if let Some(softcap) = self.softcap {
            write!(f, ", softcap {softcap}")?;
        }
        match self.alibi {
            Alibi::Off => {}
            Alibi::PerHead => write!(f, ", alibi per head")?,
            Alibi::PerBatchAndHead => write!(f, ", alibi per batch and head")?,
        }
        if let Some((lengths, side)) = &self.key_lengths {
            write!(f, ", keys {lengths:?} padded {side}")?;
        }
        if self.layouts != (TensorLayout::Bshd, TensorLayout::Bshd) {
            write!(f, ", layouts {:?} to {:?}", self.layouts.0, self.layouts.1)?;
        }
        if self.dlse {
            write!(f, ", dlse")?;
        }
        if self.deterministic {
            write!(f, ", deterministic")?;
        }
        if self.tf32 {
            write!(f, ", tf32")?;
        }
        Ok(())
    }
}

/// `dtype` as the reference's type.
pub fn precision(dtype: DType) -> Precision {
    dtype.as_str().parse().expect("a supported type")
}

/// The type of lse and of all sums, for inputs of `dtype`.
pub fn accumulator(dtype: DType) -> DType {
    match dtype {
        DType::F64 => DType::F64,
        _ => DType::F32,
    }
}

/// The position of the first of `length` tokens in `seqlen` positions.
pub fn first_token(side: PaddingSide, length: usize, seqlen: usize) -> usize {
    match side {
        PaddingSide::Left => seqlen - length,
        PaddingSide::Right => 0,
    }
}

/// Converts a tensor with the tokens before the heads to a contiguous tensor in `layout`, or the other way round.
pub fn in_layout(tensor: &Tensor, layout: TensorLayout) -> Result<Tensor> {
    Ok(match layout {
        TensorLayout::Bshd => tensor.clone(),
        TensorLayout::Bhsd => tensor.transpose(tensor.rank() - 3, tensor.rank() - 2)?.contiguous()?,
    })
}

/// `Mask::Window` without the field names.
pub fn window(left: impl Into<Option<usize>>, right: impl Into<Option<usize>>) -> Mask {
    Mask::Window { left: left.into(), right: right.into() }
}

/// One small case of each kind. The whole list runs in about a second.
pub fn smoke(target: &Target) -> Vec<Case> {
    let case = || Case::new(target);
    vec![
        case(),
        case().mask(Mask::Causal).batch(2, 33, 65).heads(4, 2).head_dim(64),
        case().mask(window(5, 3)).batch(1, 40, 29).softcap(2.0),
        case().alibi(Alibi::PerHead).mask(Mask::Causal).dlse(),
        case().packed(&[(5, 9), (0, 4), (12, 3)]).mask(Mask::Causal).heads(2, 1),
    ]
}

/// Every mask with equal, longer, shorter and one-token sequences, each with every other option.
pub fn options(target: &Target) -> Vec<Case> {
    let masks = [
        Mask::None,
        Mask::Causal,
        window(0, 0),
        window(3, 0),
        window(2, 5),
        window(None, 2),
        window(4, None),
        window(0, None),
        window(None, None),
        window(usize::MAX, usize::MAX),
    ];
    let lengths = [(7, 7), (5, 19), (19, 5), (1, 17), (17, 1), (33, 40)];
    let heads = [(1, 1), (2, 2), (4, 2), (6, 2), (3, 1)];
    let head_dims = [4, 8, 16, 24, 32];
    let softcap = |case: Case| case.softcap(1.5);
    let per_head = |case: Case| case.alibi(Alibi::PerHead);
    let per_batch_and_head = |case: Case| case.alibi(Alibi::PerBatchAndHead);
    let options: [&dyn Fn(Case) -> Case; 8] = [
        &|case| case,
        &|case| case.dlse(),
        &softcap,
        &per_head,
        &per_batch_and_head,
        &|case| softcap(per_head(case)).dlse(),
        &|case| softcap(per_batch_and_head(case)).softmax_scale(0.8),
        // With a negative scale, the largest product is the smallest score.
        &|case| case.softmax_scale(-0.6),
    ];
    let mut cases = Vec::new();
    for (m, &mask) in masks.iter().enumerate() {
        for (l, &(seqlen_q, seqlen_k)) in lengths.iter().enumerate() {
            for (n, option) in options.iter().enumerate() {
                // Heads, head_dim and batch change with different periods, so that each is combined with each mask and option.
                let (num_heads, num_heads_k) = heads[(m + l + n) % heads.len()];
                let head_dim = head_dims[(2 * m + l + 3 * n) % head_dims.len()];
                let case = Case::new(target).batch(1 + (l + n) % 2, seqlen_q, seqlen_k).heads(num_heads, num_heads_k);
                cases.push(option(case.head_dim(head_dim).mask(mask)));
            }
        }
    }
    cases
}

/// Lengths one row or column before, at, and after the edges of the tiles of both passes, for every kind of mask.
pub fn around_tiles(target: &Target, head_dim: usize) -> Result<Vec<Case>> {
    let case = Case::new(target).heads(1, 1).head_dim(head_dim);
    let mut edges = Vec::new();
    for tile in case.tiles()? {
        for seqlen_q in [tile.block_m - 1, tile.block_m, tile.block_m + 1] {
            for seqlen_k in [tile.block_n - 1, tile.block_n, tile.block_n + 1] {
                edges.push((seqlen_q, seqlen_k));
            }
        }
    }
    edges.sort_unstable();
    edges.dedup();
    let masks = [Mask::None, Mask::Causal, window(40, 9)];
    let with_masks = |&(seqlen_q, seqlen_k): &(usize, usize)| {
        let case = case.clone().batch(1, seqlen_q, seqlen_k);
        masks.map(|mask| case.clone().mask(mask))
    };
    Ok(edges.iter().flat_map(with_masks).collect())
}

/// Values of head_dim that fill vectors and tiles, that are one less or one more, and the smallest and largest supported ones.
pub fn head_dims(target: &Target) -> Vec<Case> {
    let dims = [1, 2, 3, 7, 8, 9, 31, 32, 33, 40, 64, 80, 96, 128, 129, 192, 256, 257, 511, 512];
    let case = |head_dim| Case::new(target).batch(1, 13, 21).heads(2, 1).mask(Mask::Causal).head_dim(head_dim);
    let mut cases = dims.map(case).to_vec();
    cases.dedup_by_key(|case| case.head_dim);
    cases
}

/// A head_dim of v other than that of q and k: smaller and larger, the smallest and the largest, at sizes of thin matrix products, and
/// with every option.
pub fn head_dims_v(target: &Target) -> Vec<Case> {
    let dims =
        [(192, 128), (128, 192), (64, 65), (65, 64), (1, 512), (512, 1), (1, 2), (2, 1), (2, 9), (7, 2), (40, 8)];
    let case = |(head_dim, head_dim_v)| Case::new(target).heads(4, 2).head_dim(head_dim).head_dim_v(head_dim_v);
    let mut cases = dims.map(|dims| case(dims).batch(1, 13, 21).mask(Mask::Causal)).to_vec();
    cases.dedup_by_key(|case| (case.head_dim, case.head_dim_v));
    for dims in [(24, 16), (8, 20)] {
        let case = || case(dims).batch(2, 9, 14);
        let (bshd, bhsd) = (TensorLayout::Bshd, TensorLayout::Bhsd);
        cases.extend([
            case().dlse(),
            case().mask(window(3, 1)).softcap(1.5).dlse(),
            case().mask(Mask::Causal).alibi(Alibi::PerHead),
            case().alibi(Alibi::PerBatchAndHead).softcap(2.0).softmax_scale(-0.6).dlse(),
            case().batch(2, 1, 30),
            case().batch(2, 30, 1).mask(Mask::Causal).dlse(),
            case().batch(1, 150, 280).mask(Mask::Causal).dlse(),
            case().key_lengths(&[14, 10], PaddingSide::Right).mask(Mask::Causal),
            case().key_lengths(&[3, 12], PaddingSide::Left).mask(Mask::Causal).layouts(bhsd, bhsd),
            case().layouts(bhsd, bshd).dlse(),
            case().layouts(bshd, bhsd).mask(Mask::Causal),
            case().packed(&[(5, 9), (0, 4), (12, 3)]).mask(Mask::Causal).dlse(),
            case().packed(&[(7, 7), (140, 270)]).layouts(bhsd, bshd).softcap(2.0),
        ]);
    }
    cases
}

/// Packed batches: sequences of different lengths, sequences without queries or keys, one sequence, no sequence.
pub fn packed(target: &Target) -> Vec<Case> {
    let batches: [&[(usize, usize)]; 7] = [
        &[(7, 7), (1, 1), (30, 30), (2, 2)],
        &[(5, 19), (19, 5), (1, 40)],
        &[(0, 0), (4, 0), (0, 4), (6, 6), (0, 0)],
        &[(23, 31)],
        &[(0, 0)],
        &[],
        &[(140, 140), (3, 270), (131, 129)],
    ];
    let masks = [Mask::None, Mask::Causal, window(3, 1)];
    let mut cases = Vec::new();
    for (b, lengths) in batches.iter().enumerate() {
        for (m, mask) in masks.into_iter().enumerate() {
            let case = Case::new(target).packed(lengths).mask(mask).heads(4, [1, 2, 4][(b + m) % 3]).head_dim(24);
            cases.push(match (b + 2 * m) % 4 {
                0 => case,
                1 => case.dlse().softcap(1.5),
                2 => case.alibi(Alibi::PerHead),
                _ => case.alibi(Alibi::PerBatchAndHead).dlse(),
            });
        }
    }
    cases
}

/// Many tiles of queries and keys, to find a tile that is lost or counted twice. The longest length is [`LONGEST`].
pub fn long(target: &Target) -> Vec<Case> {
    let case = || Case::new(target).heads(1, 1).head_dim(32);
    // For f64 inputs the reference computes in pairs of f64 and is about twenty times slower.
    let longest = if target.dtype == DType::F64 { LONGEST / 4 } else { LONGEST };
    vec![
        case().batch(1, longest, longest).mask(Mask::Causal),
        case().batch(1, longest / 2 + 3, longest - 5),
        case().batch(1, longest - 1, longest / 2 + 1).mask(window(300, 20)),
    ]
}

/// The longest length that the suite compares with the reference.
pub const LONGEST: usize = 2048;
