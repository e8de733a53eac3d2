//! All operators of the crate, for tests that every one of them must pass.

use candle_core::{DType, Result, Tensor};
use candle_fused_ops::{self as fused, composed, CrossEntropy, RotaryOrder};

use crate::reference::{self, Loss, Reference, Sum, Want};
use crate::run::precision;

/// The shapes of the inputs, for a number of rows and their width.
pub type Shapes = fn(usize, usize) -> Vec<Vec<usize>>;

/// From inputs to results.
pub type Call = fn(&[Tensor]) -> Result<Vec<Tensor>>;

/// Computes the right answer from the numbers of the inputs and of the gradients of the results.
pub type Formula = fn(&Numbers) -> Reference;

pub struct Numbers {
    pub inputs: Vec<Vec<f64>>,
    pub upstream: Vec<Vec<f64>>,
    pub width: usize,
    pub dtype: DType,
    /// Whether logits of a linear layer, and their gradient, are rounded to `dtype`. On the CPU they are in f32.
    pub narrow_logits: bool,
}

#[derive(Clone, Copy)]
pub struct Operator {
    pub name: &'static str,
    pub shapes: Shapes,
    pub fused: Call,
    pub composed: Call,
    pub formula: Formula,
}

const EPS: f64 = 1e-5;

const MORE_COLUMNS: usize = 3;

fn wider(x: &Tensor) -> usize {
    x.dims()[1] + MORE_COLUMNS
}

fn narrower(x: &Tensor) -> usize {
    x.dims()[1].div_ceil(2)
}

pub fn all() -> Vec<Operator> {
    vec![
        Operator {
            name: "layer_norm",
            shapes: |rows, width| vec![vec![rows, width], vec![width], vec![width]],
            fused: |t| Ok(vec![fused::layer_norm(&t[0], &t[1], Some(&t[2]), EPS)?]),
            composed: |t| Ok(vec![composed::layer_norm(&t[0], &t[1], Some(&t[2]), EPS)?]),
            formula: |n| reference::norm(&n.inputs, &n.upstream, n.width, true, EPS),
        },
        Operator {
            name: "layer_norm without bias",
            shapes: |rows, width| vec![vec![rows, width], vec![width]],
            fused: |t| Ok(vec![fused::layer_norm(&t[0], &t[1], None, EPS)?]),
            composed: |t| Ok(vec![composed::layer_norm(&t[0], &t[1], None, EPS)?]),
            formula: |n| reference::norm(&n.inputs, &n.upstream, n.width, true, EPS),
        },
        Operator {
            name: "rms_norm",
            shapes: |rows, width| vec![vec![rows, width], vec![width]],
            fused: |t| Ok(vec![fused::rms_norm(&t[0], &t[1], EPS)?]),
            composed: |t| Ok(vec![composed::rms_norm(&t[0], &t[1], EPS)?]),
            formula: |n| reference::norm(&n.inputs, &n.upstream, n.width, false, EPS),
        },
        Operator {
            name: "add_layer_norm",
            shapes: |rows, width| vec![vec![rows, width], vec![rows, width], vec![width], vec![width]],
            fused: |t| fused::add_layer_norm(&t[0], &t[1], &t[2], Some(&t[3]), EPS).map(pair),
            composed: |t| {
                let sum = (&t[0] + &t[1])?;
                let norm = composed::layer_norm(&sum, &t[2], Some(&t[3]), EPS)?;
                Ok(vec![sum, norm])
            },
            formula: |n| reference::add_norm(&n.inputs, rounded_sum(n), &n.upstream, n.width, true, EPS),
        },
        Operator {
            name: "add_rms_norm",
            shapes: |rows, width| vec![vec![rows, width], vec![rows, width], vec![width]],
            fused: |t| fused::add_rms_norm(&t[0], &t[1], &t[2], EPS).map(pair),
            composed: |t| {
                let sum = (&t[0] + &t[1])?;
                let norm = composed::rms_norm(&sum, &t[2], EPS)?;
                Ok(vec![sum, norm])
            },
            formula: |n| reference::add_norm(&n.inputs, rounded_sum(n), &n.upstream, n.width, false, EPS),
        },
        Operator {
            name: "cross_entropy",
            shapes: |rows, vocab| vec![vec![rows, vocab]],
            fused: |t| Ok(vec![fused::cross_entropy(&t[0], &targets(&t[0], t[0].dim(1)?)?)?]),
            composed: |t| {
                let targets = targets(&t[0], t[0].dim(1)?)?;
                Ok(vec![composed::cross_entropy(&CrossEntropy::new(), &t[0], &targets)?])
            },
            formula: |n| cross_entropy(n, &PLAIN, false),
        },
        Operator {
            name: "cross_entropy with options",
            shapes: |rows, vocab| vec![vec![rows, vocab]],
            fused: |t| Ok(vec![options().forward(&t[0], &some_ignored(&t[0], t[0].dim(1)?)?)?]),
            composed: |t| Ok(vec![composed::cross_entropy(&options(), &t[0], &some_ignored(&t[0], t[0].dim(1)?)?)?]),
            formula: |n| cross_entropy(n, &OPTIONS, true),
        },
        Operator {
            name: "linear_cross_entropy",
            shapes: |rows, width| vec![vec![rows, width], vec![2 * width + 3, width]],
            fused: |t| Ok(vec![fused::linear_cross_entropy(&t[0], &t[1], &targets(&t[0], t[1].dim(0)?)?)?]),
            composed: |t| {
                let (x, weight) = (widened(&t[0])?, widened(&t[1])?);
                let targets = targets(&x, weight.dim(0)?)?;
                Ok(vec![composed::linear_cross_entropy(&CrossEntropy::new(), &x, &weight, &targets)?])
            },
            formula: |n| linear_cross_entropy(n, &PLAIN, false),
        },
        Operator {
            name: "linear_cross_entropy with options, in chunks",
            shapes: |rows, width| vec![vec![rows, width], vec![2 * width + 3, width]],
            fused: |t| {
                let loss = options().chunk_bytes(7 * 4 * t[1].dim(0)?);
                Ok(vec![loss.forward_linear(&t[0], &t[1], &some_ignored(&t[0], t[1].dim(0)?)?)?])
            },
            composed: |t| {
                let (x, weight) = (widened(&t[0])?, widened(&t[1])?);
                let loss = options().chunk_bytes(11 * 4 * weight.dim(0)?);
                let targets = some_ignored(&x, weight.dim(0)?)?;
                Ok(vec![composed::linear_cross_entropy(&loss, &x, &weight, &targets)?])
            },
            formula: |n| linear_cross_entropy(n, &OPTIONS, true),
        },
        Operator {
            name: "gelu",
            shapes: |rows, width| vec![vec![rows, width]],
            fused: |t| Ok(vec![fused::gelu(&t[0])?]),
            composed: |t| Ok(vec![composed::gelu(&t[0])?]),
            formula: |n| reference::activation(&n.inputs, &n.upstream[0], n.width, reference::gelu),
        },
        Operator {
            name: "gelu_erf",
            shapes: |rows, width| vec![vec![rows, width]],
            fused: |t| Ok(vec![fused::gelu_erf(&t[0])?]),
            composed: |t| Ok(vec![composed::gelu_erf(&t[0])?]),
            formula: |n| reference::activation(&n.inputs, &n.upstream[0], n.width, reference::gelu_erf),
        },
        Operator {
            name: "swiglu",
            shapes: |rows, width| vec![vec![rows, width], vec![rows, width]],
            fused: |t| Ok(vec![fused::swiglu(&t[0], &t[1])?]),
            composed: |t| Ok(vec![composed::swiglu(&t[0], &t[1])?]),
            formula: |n| reference::activation(&n.inputs, &n.upstream[0], n.width, reference::silu),
        },
        Operator {
            name: "geglu",
            shapes: |rows, width| vec![vec![rows, width], vec![rows, width]],
            fused: |t| Ok(vec![fused::geglu(&t[0], &t[1])?]),
            composed: |t| Ok(vec![composed::geglu(&t[0], &t[1])?]),
            formula: |n| reference::activation(&n.inputs, &n.upstream[0], n.width, reference::gelu),
        },
        Operator {
            name: "embedding",
            shapes: |rows, width| vec![vec![rows, width]],
            fused: |t| Ok(vec![fused::embedding(&ids(&t[0])?, &t[0])?]),
            composed: |t| {
                let weight = widened(&t[0])?;
                Ok(vec![composed::embedding(&ids(&t[0])?, &weight)?.to_dtype(t[0].dtype())?])
            },
            formula: |n| {
                reference::embedding(&n.inputs[0], &positions(n.inputs[0].len() / n.width), &n.upstream[0], n.width)
            },
        },
        Operator {
            name: "resize_columns, wider",
            shapes: |rows, width| vec![vec![rows, width]],
            fused: |t| Ok(vec![fused::resize_columns(&t[0], wider(&t[0]))?]),
            composed: |t| Ok(vec![composed::resize_columns(&t[0], wider(&t[0]))?]),
            formula: |n| reference::resize_columns(&n.inputs[0], &n.upstream[0], n.width, n.width + MORE_COLUMNS),
        },
        Operator {
            name: "resize_columns, narrower",
            shapes: |rows, width| vec![vec![rows, width]],
            fused: |t| Ok(vec![fused::resize_columns(&t[0], narrower(&t[0]))?]),
            composed: |t| Ok(vec![composed::resize_columns(&t[0], narrower(&t[0]))?]),
            formula: |n| reference::resize_columns(&n.inputs[0], &n.upstream[0], n.width, n.width.div_ceil(2)),
        },
        Operator {
            name: "rotary, half split",
            shapes: |rows, width| vec![vec![2, rows, 3, 2 * width + 1]],
            fused: |t| {
                let [cos, sin] = tables(&t[0])?;
                Ok(vec![fused::rotary(&t[0], &cos, &sin, RotaryOrder::HalfSplit)?])
            },
            composed: |t| {
                let [cos, sin] = tables(&t[0])?;
                Ok(vec![composed::rotary(&t[0], &cos, &sin, RotaryOrder::HalfSplit)?])
            },
            formula: |n| rotary(n, RotaryOrder::HalfSplit),
        },
        Operator {
            name: "rotary, interleaved",
            shapes: |rows, width| vec![vec![2, rows, 3, 2 * width + 1]],
            fused: |t| {
                let [cos, sin] = tables(&t[0])?;
                Ok(vec![fused::rotary(&t[0], &cos, &sin, RotaryOrder::Interleaved)?])
            },
            composed: |t| {
                let [cos, sin] = tables(&t[0])?;
                Ok(vec![composed::rotary(&t[0], &cos, &sin, RotaryOrder::Interleaved)?])
            },
            formula: |n| rotary(n, RotaryOrder::Interleaved),
        },
        Operator {
            name: "linear",
            shapes: |rows, width| vec![vec![rows, width], vec![width / 2 + 3, width], vec![width / 2 + 3]],
            fused: |t| Ok(vec![fused::linear(&t[0], &t[1], &t[2])?]),
            composed: |t| {
                let x = composed::linear(&widened(&t[0])?, &widened(&t[1])?, &widened(&t[2])?)?;
                Ok(vec![x.to_dtype(t[0].dtype())?])
            },
            formula: |n| reference::linear(&n.inputs, &n.upstream[0], n.width, reference::identity),
        },
        Operator {
            name: "linear_gelu",
            shapes: |rows, width| vec![vec![rows, width], vec![width / 2 + 3, width], vec![width / 2 + 3]],
            fused: |t| Ok(vec![fused::linear_gelu(&t[0], &t[1], &t[2])?]),
            composed: |t| {
                let x = composed::linear(&widened(&t[0])?, &widened(&t[1])?, &widened(&t[2])?)?;
                Ok(vec![composed::gelu(&x)?.to_dtype(t[0].dtype())?])
            },
            formula: |n| reference::linear(&n.inputs, &n.upstream[0], n.width, reference::gelu),
        },
        Operator {
            name: "linear_add",
            shapes: |rows, width| {
                let outputs = width / 2 + 3;
                vec![vec![rows, width], vec![outputs, width], vec![outputs], vec![rows, outputs]]
            },
            fused: |t| Ok(vec![fused::linear_add(&t[0], &t[1], &t[2], &t[3])?]),
            composed: |t| {
                let x = composed::linear(&widened(&t[0])?, &widened(&t[1])?, &widened(&t[2])?)?;
                Ok(vec![(x + widened(&t[3])?)?.to_dtype(t[0].dtype())?])
            },
            formula: |n| {
                let linear = reference::linear(&n.inputs[..3], &n.upstream[0], n.width, reference::identity);
                reference::plus(linear, &n.inputs[3], &n.upstream[0])
            },
        },
        Operator {
            name: "mlp_add, GELU between",
            shapes: |rows, width| {
                let (hidden, outputs) = (width / 2 + 3, width / 3 + 2);
                let (fc, proj) = (vec![hidden, width], vec![outputs, hidden]);
                vec![vec![rows, width], fc, vec![hidden], proj, vec![outputs], vec![rows, outputs]]
            },
            fused: |t| Ok(vec![fused::mlp_add(&t[0], [&t[1], &t[2]], [&t[3], &t[4]], &t[5])?]),
            composed: |t| {
                let g = composed::gelu(&composed::linear(&widened(&t[0])?, &widened(&t[1])?, &widened(&t[2])?)?)?;
                let g = g.to_dtype(t[0].dtype())?; // as the fused operator rounds it
                let y = composed::linear(&widened(&g)?, &widened(&t[3])?, &widened(&t[4])?)?;
                Ok(vec![(y + widened(&t[5])?)?.to_dtype(t[0].dtype())?])
            },
            formula: |n| reference::mlp_add(&n.inputs, &n.upstream[0], n.width),
        },
    ]
}

fn pair((a, b): (Tensor, Tensor)) -> Vec<Tensor> {
    vec![a, b]
}

/// x + residual as a tensor of the case's type.
fn rounded_sum(numbers: &Numbers) -> Vec<f64> {
    let precision = precision(numbers.dtype);
    numbers.inputs[0].iter().zip(&numbers.inputs[1]).map(|(x, y)| precision.round(x + y)).collect()
}

/// In f32, or f64. On the CPU the fused losses compute their logits in it.
fn widened(tensor: &Tensor) -> Result<Tensor> {
    match tensor.dtype() {
        DType::F64 => Ok(tensor.clone()),
        _ => tensor.to_dtype(DType::F32),
    }
}

const PLAIN: Loss = Loss { label_smoothing: 0.0, z_loss: 0.0, softcap: f64::INFINITY };
const OPTIONS: Loss = Loss { label_smoothing: 0.1, z_loss: 0.01, softcap: 3.0 };
const IGNORED: i64 = -100;

fn options() -> CrossEntropy {
    let Loss { label_smoothing, z_loss, softcap } = OPTIONS;
    CrossEntropy::new().ignore_index(IGNORED).label_smoothing(label_smoothing).z_loss(z_loss).softcap(softcap)
}

/// Every third row is ignored if `some_ignored` is set.
fn classes(rows: usize, vocab: usize, some_ignored: bool) -> Vec<Option<usize>> {
    (0..rows).map(|row| (!some_ignored || row % 3 != 1).then_some((7 * row + 3) % vocab)).collect()
}

fn targets(x: &Tensor, vocab: usize) -> Result<Tensor> {
    let classes = classes(x.dim(0)?, vocab, false);
    let ids: Vec<u32> = classes.into_iter().flatten().map(|class| class as u32).collect();
    Tensor::new(ids, x.device())
}

fn some_ignored(x: &Tensor, vocab: usize) -> Result<Tensor> {
    let classes = classes(x.dim(0)?, vocab, true);
    let ids: Vec<i64> = classes.into_iter().map(|class| class.map_or(IGNORED, |class| class as i64)).collect();
    Tensor::new(ids, x.device())
}

fn cross_entropy(n: &Numbers, loss: &Loss, some_ignored: bool) -> Reference {
    let logits: Vec<Sum> = n.inputs[0].iter().map(|&x| Sum::of([x])).collect();
    let classes = classes(logits.len() / n.width, n.width, some_ignored);
    let (value, dlogits) = reference::cross_entropy(&logits, &classes, n.width, loss, n.upstream[0][0]);
    Reference { results: vec![Want::new(1, vec![value])], gradients: vec![Want::new(n.width, dlogits)] }
}

fn linear_cross_entropy(n: &Numbers, loss: &Loss, some_ignored: bool) -> Reference {
    let (x, weight) = (&n.inputs[0], &n.inputs[1]);
    let classes = classes(x.len() / n.width, weight.len() / n.width, some_ignored);
    let rounding = if n.narrow_logits { precision(n.dtype).half_step() } else { 0.0 };
    reference::linear_cross_entropy(x, weight, &classes, n.width, loss, n.upstream[0][0], rounding)
}

/// Row ids of a batch: more than rows, so that some rows have several.
fn positions(rows: usize) -> Vec<usize> {
    (0..2 * rows + 3).map(|position| (position * position + 1) % rows).collect()
}

fn ids(weight: &Tensor) -> Result<Tensor> {
    let ids = positions(weight.dim(0)?).into_iter().map(|id| id as u32);
    Tensor::new(ids.collect::<Vec<_>>(), weight.device())
}

fn angle(token: usize, pair: usize) -> f64 {
    0.1 * (token + 1) as f64 / (pair + 1) as f64
}

/// cos and sin for x of shape (batch, seqlen, heads, 2 pairs + 1), in f64.
fn tables(x: &Tensor) -> Result<[Tensor; 2]> {
    let (seqlen, pairs) = (x.dim(1)?, x.dim(3)? / 2);
    let angles: Vec<f64> = (0..seqlen).flat_map(|token| (0..pairs).map(move |pair| angle(token, pair))).collect();
    let angles = Tensor::from_vec(angles, (seqlen, pairs), x.device())?;
    Ok([angles.cos()?, angles.sin()?])
}

fn rotary(n: &Numbers, order: RotaryOrder) -> Reference {
    let (pairs, head_dim) = (n.width, 2 * n.width + 1);
    let pair_of = |pair: usize| match order {
        RotaryOrder::HalfSplit => (pair, pair + pairs),
        RotaryOrder::Interleaved => (2 * pair, 2 * pair + 1),
    };
    let seqlen = n.inputs[0].len() / (2 * 3 * head_dim);
    let turned = |x: &[f64], sign: f64| {
        let mut y: Vec<Sum> = x.iter().map(|&x| Sum::of([x])).collect();
        for (row, (x, y)) in x.chunks(head_dim).zip(y.chunks_mut(head_dim)).enumerate() {
            for pair in 0..pairs {
                let (a, b) = pair_of(pair);
                let (sin, cos) = (sign * angle(row / 3 % seqlen, pair)).sin_cos();
                y[a] = Sum::of([x[a] * cos, -x[b] * sin]);
                y[b] = Sum::of([x[a] * sin, x[b] * cos]);
            }
        }
        Want::new(head_dim, y)
    };
    Reference { results: vec![turned(&n.inputs[0], 1.0)], gradients: vec![turned(&n.upstream[0], -1.0)] }
}
