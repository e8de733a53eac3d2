//! All operators of the crate, for tests that every one of them must pass.

use candle_core::{Result, Tensor};
use candle_fused_ops::{self as fused, composed};

use crate::reference::{self, Reference};
use crate::run::precision;

/// From inputs to results.
pub type Call = fn(&[Tensor]) -> Result<Vec<Tensor>>;

/// Computes the right answer from the numbers of the inputs and of the gradients of the results.
pub type Formula = fn(&Numbers) -> Reference;

pub struct Numbers {
    pub inputs: Vec<Vec<f64>>,
    pub upstream: Vec<Vec<f64>>,
    pub width: usize,
    pub dtype: candle_core::DType,
}

#[derive(Clone, Copy)]
pub struct Operator {
    pub name: &'static str,
    /// The shapes of the inputs, for a number of rows and their width.
    pub shapes: fn(usize, usize) -> Vec<Vec<usize>>,
    pub fused: Call,
    pub composed: Call,
    pub formula: Formula,
}

const EPS: f64 = 1e-5;

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
