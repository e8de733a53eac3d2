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

    pub fn times(self, factor: f64) -> Self {
        Self { value: self.value * factor, magnitude: self.magnitude * factor.abs() }
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

/// The rows of x (rows, width) with `columns` columns.
pub fn resize_columns(x: &[f64], dy: &[f64], width: usize, columns: usize) -> Reference {
    let resized = |rows: &[f64], from: usize, to: usize| {
        let row = |row: &[f64]| (0..to).map(|col| Sum::of(row.get(col).copied())).collect::<Vec<_>>();
        Want::new(to, rows.chunks(from).flat_map(row).collect())
    };
    Reference { results: vec![resized(x, width, columns)], gradients: vec![resized(dy, columns, width)] }
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

/// Options of a cross-entropy.
pub struct Loss {
    pub label_smoothing: f64,
    pub z_loss: f64,
    pub softcap: f64, // infinite for none
}

/// Cross-entropy: logits (rows, vocab), whose magnitude is that of the terms they were summed from. Returns the loss and the
/// gradient of `upstream` times the loss.
///
/// The magnitudes follow the errors: an absolute error of z or lse is a relative error of p.
pub fn cross_entropy(
    logits: &[Sum],
    targets: &[Option<usize>],
    vocab: usize,
    loss: &Loss,
    upstream: f64,
) -> (Sum, Vec<Sum>) {
    let counted = targets.iter().flatten().count().max(1) as f64;
    let (mut total, mut dlogits) = (Sum::default(), Vec::new());
    for (row, target) in logits.chunks(vocab).zip(targets) {
        let Some(target) = *target else {
            dlogits.extend(vec![Sum::default(); vocab]);
            continue;
        };
        let capped = |x: &Sum| {
            let capped = loss.softcap * (x.value / loss.softcap).tanh();
            let value = if loss.softcap.is_finite() { capped } else { x.value };
            Sum { value, magnitude: x.magnitude + value.abs() }
        };
        let z: Vec<Sum> = row.iter().map(capped).collect();
        let largest = z.iter().fold(f64::NEG_INFINITY, |a, z| a.max(z.value));
        let lse = largest + z.iter().map(|z| (z.value - largest).exp()).sum::<f64>().ln();
        let lse_size = z.iter().fold(lse.abs(), |a, z| a.max(z.magnitude));
        let q = |j: usize| {
            let of_target = if j == target { 1.0 - loss.label_smoothing } else { 0.0 };
            of_target + loss.label_smoothing / vocab as f64
        };
        let mut of_row = Sum { value: lse, magnitude: lse_size };
        for (j, z) in z.iter().enumerate() {
            of_row = of_row.plus(z.times(-q(j)));
        }
        of_row = of_row.plus(Sum { value: lse, magnitude: lse_size }.times(loss.z_loss * lse));
        total = total.plus(of_row.times(1.0 / counted));
        for (j, z) in z.iter().enumerate() {
            let (p, of_p) = ((z.value - lse).exp(), 1.0 + 2.0 * loss.z_loss * lse);
            let d = Sum {
                value: p * of_p - q(j),
                magnitude: p * (1.0 + z.magnitude + lse_size) * (1.0 + 2.0 * loss.z_loss * lse_size) + q(j),
            };
            let slope = 1.0 - (z.value / loss.softcap).powi(2);
            let of_slope = 1.0 + 2.0 * z.value.abs() * z.magnitude / loss.softcap.powi(2);
            let d = Sum { value: d.value * slope, magnitude: d.magnitude * slope + d.value.abs() * of_slope };
            dlogits.push(d.times(upstream / counted));
        }
    }
    (total, dlogits)
}

/// [`cross_entropy`] of the logits x weight^T: x (rows, width), weight (vocab, width). `rounding`: the relative error of a rounding of
/// the logits and of their gradient to the type of x, or 0.
pub fn linear_cross_entropy(
    x: &[f64],
    weight: &[f64],
    targets: &[Option<usize>],
    width: usize,
    loss: &Loss,
    upstream: f64,
    rounding: f64,
) -> Reference {
    let vocab = weight.len() / width;
    // The rule of close.rs allows 4 steps of f32 at the magnitude, at least 2^-22 of it.
    let rounded = |sum: Sum| Sum { magnitude: sum.magnitude + rounding * 2f64.powi(22) * sum.value.abs(), ..sum };
    let logits: Vec<Sum> = x
        .chunks(width)
        .flat_map(|x| weight.chunks(width).map(|row| rounded(Sum::of(x.iter().zip(row).map(|(x, w)| x * w)))))
        .collect();
    let (total, dlogits) = cross_entropy(&logits, targets, vocab, loss, upstream);
    let dlogits: Vec<Sum> = dlogits.into_iter().map(rounded).collect();
    let (mut dx, mut dweight) = (vec![Sum::default(); x.len()], vec![Sum::default(); weight.len()]);
    for (i, d) in dlogits.iter().enumerate() {
        let (row, class) = (i / vocab * width, i % vocab * width);
        for k in 0..width {
            dx[row + k] = dx[row + k].plus(d.times(weight[class + k]));
            dweight[class + k] = dweight[class + k].plus(d.times(x[row + k]));
        }
    }
    let results = vec![Want::new(1, vec![total])];
    Reference { results, gradients: vec![Want::new(width, dx), Want::new(width, dweight)] }
}

/// An activation at x and its derivative.
pub type Curve = fn(f64) -> [Sum; 2];

/// GELU in its tanh form.
pub fn gelu(x: f64) -> [Sum; 2] {
    let linear = (2.0 / std::f64::consts::PI).sqrt();
    let u = linear * (x + 0.044715 * x.powi(3));
    let y = 0.5 * x * (1.0 + u.tanh());
    let slope = 0.5 * (1.0 + u.tanh()) + 0.5 * x * (1.0 - u.tanh().powi(2)) * linear * (1.0 + 3.0 * 0.044715 * x * x);
    // 1 + tanh is a difference for negative x, and rounding of u changes the tanh.
    [
        Sum { value: y, magnitude: x.abs() * (1.0 + u.abs()) },
        Sum { value: slope, magnitude: 1.0 + x.abs() * (1.0 + x * x) },
    ]
}

/// GELU with the error function.
pub fn gelu_erf(x: f64) -> [Sum; 2] {
    let c = 0.5 * (1.0 + erf(x * 0.5f64.sqrt()));
    let density = (-0.5 * x * x).exp() / (2.0 * std::f64::consts::PI).sqrt();
    [
        Sum { value: x * c, magnitude: x.abs() },
        Sum { value: c + x * density, magnitude: 1.0 + x.abs() * density * (1.0 + x * x) },
    ]
}

pub fn silu(x: f64) -> [Sum; 2] {
    let s = 1.0 / (1.0 + (-x).exp());
    let size = s * (1.0 + x.abs());
    [
        Sum { value: x * s, magnitude: x.abs() * size },
        Sum { value: s * (1.0 + x * (1.0 - s)), magnitude: size * (1.0 + x.abs()) },
    ]
}

/// The series whose terms are all positive: 2 / sqrt(pi) exp(-x^2) (x + 2 x^3 / 3 + 4 x^5 / 15 + ..).
fn erf(x: f64) -> f64 {
    let (mut term, mut sum) = (x, x);
    for n in 1..200 {
        term *= 2.0 * x * x / (2 * n + 1) as f64;
        sum += term;
    }
    2.0 / std::f64::consts::PI.sqrt() * (-x * x).exp() * sum
}

/// `curve(x)`, or `curve(x) up` if there is a second input.
pub fn activation(inputs: &[Vec<f64>], upstream: &[f64], width: usize, curve: Curve) -> Reference {
    let (x, mut y, mut dx, mut dup) = (&inputs[0], Vec::new(), Vec::new(), Vec::new());
    for (i, (&x, &dy)) in x.iter().zip(upstream).enumerate() {
        let [value, slope] = curve(x);
        let up = inputs.get(1).map_or(1.0, |up| up[i]);
        y.push(value.times(up));
        dx.push(slope.times(dy * up));
        dup.push(value.times(dy));
    }
    let mut gradients = vec![Want::new(width, dx)];
    if inputs.len() > 1 {
        gradients.push(Want::new(width, dup));
    }
    Reference { results: vec![Want::new(width, y)], gradients }
}

/// The rows of `weight` at `ids`.
pub fn embedding(weight: &[f64], ids: &[usize], upstream: &[f64], width: usize) -> Reference {
    let (mut y, mut dweight) = (Vec::new(), vec![Sum::default(); weight.len()]);
    for (&id, dy) in ids.iter().zip(upstream.chunks(width)) {
        for (k, &dy) in dy.iter().enumerate() {
            y.push(Sum::of([weight[id * width + k]]));
            dweight[id * width + k].add(dy);
        }
    }
    Reference { results: vec![Want::new(width, y)], gradients: vec![Want::new(width, dweight)] }
}

pub fn identity(x: f64) -> [Sum; 2] {
    [Sum::of([x]), Sum::of([1.0])]
}

/// `curve(x weight^T + bias)`: x (rows, width), weight (outputs, width), bias (outputs).
pub fn linear(inputs: &[Vec<f64>], upstream: &[f64], width: usize, curve: Curve) -> Reference {
    let [x, weight, bias] = inputs else { panic!("three inputs") };
    let outputs = bias.len();
    let (mut y, mut dx) = (Vec::new(), vec![Sum::default(); x.len()]);
    let (mut dweight, mut dbias) = (vec![Sum::default(); weight.len()], vec![Sum::default(); outputs]);
    for (row, x) in x.chunks(width).enumerate() {
        for (j, (weight, bias)) in weight.chunks(width).zip(bias).enumerate() {
            let h = Sum::of(x.iter().zip(weight).map(|(x, w)| x * w)).plus(Sum::of([*bias]));
            // The error of h adds to the errors of the curve at h, whose slope is at most 1.2 and changes by at most 0.9.
            let [value, slope] = curve(h.value).map(|at| at.plus(Sum { value: 0.0, magnitude: 1.2 * h.magnitude }));
            y.push(value);
            let dh = slope.times(upstream[row * outputs + j]);
            dbias[j] = dbias[j].plus(dh);
            for k in 0..width {
                dx[row * width + k] = dx[row * width + k].plus(dh.times(weight[k]));
                dweight[j * width + k] = dweight[j * width + k].plus(dh.times(x[k]));
            }
        }
    }
    let gradients = vec![Want::new(width, dx), Want::new(width, dweight), Want::new(outputs, dbias)];
    Reference { results: vec![Want::new(outputs, y)], gradients }
}

/// A layer with `residual` added to its only result.
pub fn plus(layer: Reference, residual: &[f64], upstream: &[f64]) -> Reference {
    let Reference { mut results, mut gradients } = layer;
    results[0].values.iter_mut().zip(residual).for_each(|(y, &residual)| y.add(residual));
    let dresidual = upstream.iter().map(|&dy| Sum::of([dy])).collect();
    gradients.push(Want::new(results[0].width, dresidual));
    Reference { results, gradients }
}

/// `residual + proj(gelu(fc(x)))`: x (rows, width), a weight and a bias of each layer, residual.
pub fn mlp_add(inputs: &[Vec<f64>], upstream: &[f64], width: usize) -> Reference {
    let (fc, hidden) = (&inputs[..3], inputs[2].len());
    let values = |want: &Want| want.values.iter().map(|sum| sum.value).collect::<Vec<f64>>();
    let unused = vec![0.0; inputs[0].len() / width * hidden];
    let g = linear(fc, &unused, width, gelu).results.remove(0);
    let proj = linear(&[values(&g), inputs[3].clone(), inputs[4].clone()], upstream, hidden, identity);
    let Reference { results, mut gradients } = plus(proj, &inputs[5], upstream);
    let dg = gradients.remove(0);
    let mut all = linear(fc, &values(&dg), width, gelu).gradients;
    all.extend(gradients);
    Reference { results, gradients: all }
}
