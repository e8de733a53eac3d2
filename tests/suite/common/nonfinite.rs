//! The rule for gradients if an input has a non-finite number.
//!
//! In the backward on a GPU, a non-finite number may spread within its sequence and its group of heads. Any gradient there may
//! be NaN. Gradients of other sequences and groups do not change. A gradient that is NaN in the reference is never finite.

use super::reference::{Input, Rows};

/// The sequences and key heads of an input that hold a non-finite number in q, k, v, do or dlse.
pub struct Nonfinite {
    num_heads_k: usize,
    /// Whether a sequence and key head have one, `(batch, num_heads_k)`.
    regions: Vec<bool>,
}

impl Nonfinite {
    pub fn of(input: &Input) -> Self {
        let &Input { num_heads, num_heads_k, head_dim, head_dim_v, .. } = input;
        let mut found = Self { num_heads_k, regions: vec![false; input.lengths.len() * num_heads_k] };
        let (of_q, of_k): (Vec<usize>, Vec<usize>) = input.lengths.iter().copied().unzip();
        for (values, lengths, heads, width) in [
            (&input.q, &of_q, num_heads, head_dim),
            (&input.k, &of_k, num_heads_k, head_dim),
            (&input.v, &of_k, num_heads_k, head_dim_v),
            (&input.do_, &of_q, num_heads, head_dim_v),
            (&input.dlse, &of_q, num_heads, 1),
        ] {
            for (row, region) in values.chunks(width).zip(regions(lengths, heads, num_heads_k)) {
                found.regions[region] |= row.iter().any(|x| !x.is_finite());
            }
        }
        found
    }

    /// For each row of `rows`, whether its gradients may be NaN.
    pub fn reaches(&self, rows: &Rows) -> Vec<bool> {
        regions(&rows.lengths, rows.heads, self.num_heads_k).map(|region| self.regions[region]).collect()
    }

    /// A copy of `got`. If the rule allows a NaN, the copy has the element of `want` instead.
    pub fn without_spread(&self, got: &Rows, want: &Rows) -> Rows {
        let mut allowed = got.clone();
        for (row, reached) in self.reaches(got).into_iter().enumerate() {
            for at in row * got.width..(row + 1) * got.width {
                if reached && got.values[at].is_nan() {
                    allowed.values[at] = want.values[at];
                }
            }
        }
        allowed
    }
}

/// For each row of token-major tensors: the index of its sequence and key head.
fn regions(lengths: &[usize], heads: usize, num_heads_k: usize) -> impl Iterator<Item = usize> + '_ {
    let tokens = lengths.iter().enumerate().flat_map(|(batch, &length)| std::iter::repeat_n(batch, length));
    tokens.flat_map(move |batch| (0..heads).map(move |head| batch * num_heads_k + head * num_heads_k / heads))
}
