//! The formulas in f64, one row after another. They share no line with the crate.

/// A sum in f64, and the sum of the absolute values of its terms.
#[derive(Clone, Copy, Debug, Default)]
pub struct Sum {
    pub value: f64,
    pub magnitude: f64,
}

impl Sum {
    pub fn add(&mut self, term: f64) {
        self.value += term;
        self.magnitude += term.abs();
    }

    pub fn of(terms: impl IntoIterator<Item = f64>) -> Self {
        let mut sum = Self::default();
        terms.into_iter().for_each(|term| sum.add(term));
        sum
    }

    pub fn plus(self, other: Self) -> Self {
        Self { value: self.value + other.value, magnitude: self.magnitude + other.magnitude }
    }
}

/// The right result of a tensor, in rows of `width`.
pub struct Want {
    pub width: usize,
    pub values: Vec<Sum>,
}

impl Want {
    pub fn new(width: usize, values: Vec<Sum>) -> Self {
        Self { width, values }
    }
}

/// The right results of a call, and the gradient of each input.
pub struct Reference {
    pub results: Vec<Want>,
    pub gradients: Vec<Want>,
}

/// Layer norm, or RMS norm if `centre` is false: x (rows, width), weight, bias.
pub fn norm(inputs: &[Vec<f64>], upstream: &[Vec<f64>], width: usize, centre: bool, eps: f64) -> Reference {
    let (x, weight) = (&inputs[0], &inputs[1]);
    let zeros = vec![0.0; width];
    let bias = inputs.get(2).unwrap_or(&zeros);
    let (mut y, mut dx) = (Vec::new(), Vec::new());
    let (mut dweight, mut dbias) = (vec![Sum::default(); width], vec![Sum::default(); width]);
    for (x, dy) in x.chunks(width).zip(upstream[0].chunks(width)) {
        let n = width as f64;
        let mean = if centre { x.iter().sum::<f64>() / n } else { 0.0 };
        let variance = x.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / n;
        let rstd = 1.0 / (variance + eps).sqrt();
        let xhat: Vec<f64> = x.iter().map(|x| (x - mean) * rstd).collect();
        // x and mean are terms of xhat, and so of every product with it.
        let xhat_size: Vec<f64> = x.iter().map(|x| (x.abs() + mean.abs()) * rstd).collect();
        let g: Vec<f64> = dy.iter().zip(weight).map(|(dy, weight)| dy * weight).collect();
        let g_sum = if centre { Sum::of(g.iter().copied()) } else { Sum::default() };
        let g_xhat: f64 = g.iter().zip(&xhat).map(|(g, xhat)| g * xhat).sum();
        let g_xhat_size: f64 = g.iter().zip(&xhat_size).map(|(g, size)| g.abs() * size).sum();
        for j in 0..width {
            y.push(Sum {
                value: xhat[j] * weight[j] + bias[j],
                magnitude: xhat_size[j] * weight[j].abs() + bias[j].abs(),
            });
            dx.push(Sum {
                value: rstd * (g[j] - g_sum.value / n - xhat[j] * g_xhat / n),
                magnitude: rstd * (g[j].abs() + g_sum.magnitude / n + xhat_size[j] * g_xhat_size / n),
            });
            dweight[j] = dweight[j].plus(Sum { value: dy[j] * xhat[j], magnitude: dy[j].abs() * xhat_size[j] });
            dbias[j].add(dy[j]);
        }
    }
    let vector = |values| Want::new(width, values);
    let mut gradients = vec![vector(dx), vector(dweight)];
    if inputs.len() > 2 {
        gradients.push(vector(dbias));
    }
    Reference { results: vec![vector(y)], gradients }
}

/// [`norm`] of x + residual, both (rows, width). `sum` is the rounded sum, because the norm reads that.
pub fn add_norm(
    inputs: &[Vec<f64>],
    sum: Vec<f64>,
    upstream: &[Vec<f64>],
    width: usize,
    centre: bool,
    eps: f64,
) -> Reference {
    let exact = inputs[0].iter().zip(&inputs[1]).map(|(x, residual)| Sum::of([*x, *residual])).collect();
    let of_norm: Vec<Vec<f64>> = [&[sum], &inputs[2..]].concat();
    let Reference { results, mut gradients } = norm(&of_norm, &upstream[1..], width, centre, eps);
    let dsum: Vec<Sum> = upstream[0].iter().zip(&gradients[0].values).map(|(d, g)| Sum::of([*d]).plus(*g)).collect();
    gradients.splice(0..1, [Want::new(width, dsum.clone()), Want::new(width, dsum)]);
    Reference { results: [Want::new(width, exact)].into_iter().chain(results).collect(), gradients }
}
