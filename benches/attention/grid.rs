//! The cases of `benches/cuda.toml`, which explains every field.

use anyhow::{bail, ensure, Context, Result};
use candle_core::DType;
use serde::Deserialize;

use crate::cases::{Case, Mask};

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Grids {
    quick: Vec<String>,
    #[serde(rename = "grid")]
    grids: Vec<Grid>,
}

/// Many cases in one.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Grid {
    why: String,
    heads: Vec<Heads>,
    #[serde(default = "none_and_causal")]
    masks: Vec<Mask>,
    #[serde(default)]
    tokens: usize,
    #[serde(default)]
    seqlens: Vec<usize>,
    #[serde(default)]
    lengths: Vec<usize>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Heads {
    head_dim: usize,
    num_heads: usize,
    num_heads_k: Option<usize>,
}

fn none_and_causal() -> Vec<Mask> {
    vec![Mask::None, Mask::Causal]
}

/// All cases, in tensors of `dtype`.
///
/// # Errors
/// If the file is not TOML of that form, or a case makes no sense.
pub fn cases(dtype: DType) -> Result<Vec<Case>> {
    let Grids { quick, grids } = toml::from_str(include_str!("../cuda.toml"))?;
    let mut cases: Vec<Case> = Vec::new();
    for grid in &grids {
        let padded = !grid.seqlens.is_empty() && grid.tokens > 0;
        ensure!(padded == grid.lengths.is_empty(), "grid {:?}: give either tokens and seqlens, or lengths", grid.why);
        if let Some(seqlen) = grid.seqlens.iter().find(|&&seqlen| seqlen == 0 || !grid.tokens.is_multiple_of(seqlen)) {
            bail!("grid {:?}: {} tokens are no whole number of sequences of {seqlen}", grid.why, grid.tokens);
        }
        let seqlens: Vec<Option<usize>> =
            if padded { grid.seqlens.iter().copied().map(Some).collect() } else { vec![None] };
        for heads in &grid.heads {
            for &mask in &grid.masks {
                cases.extend(seqlens.iter().map(|&seqlen| grid.case(heads, mask, seqlen, dtype)));
            }
        }
    }
    for index in 0..cases.len() {
        let (before, case) = (&cases[..index], &cases[index]);
        case.validate().with_context(|| format!("case {}", case.name))?;
        ensure!(before.iter().all(|other| other.name != case.name), "two cases are named {}", case.name);
    }
    for name in &quick {
        let case = cases.iter_mut().find(|case| case.name == *name);
        case.with_context(|| format!("quick names {name}, which no grid gives"))?.quick = true;
    }
    Ok(cases)
}

impl Grid {
    /// One case; packed without a `seqlen`.
    fn case(&self, heads: &Heads, mask: Mask, seqlen: Option<usize>, dtype: DType) -> Case {
        let mut case = Case {
            batch: seqlen.map_or(1, |seqlen| self.tokens / seqlen),
            seqlen_q: seqlen,
            lengths: self.lengths.clone(),
            num_heads_k: heads.num_heads_k,
            mask,
            checked_rows: CHECKED_ROWS,
            ..Case::new(String::new(), &self.why, (heads.num_heads, heads.head_dim), dtype)
        };
        let seqlen = seqlen.map_or(String::new(), |seqlen| format!("/s{seqlen}"));
        case.name = format!("{}/d{}/{mask}{seqlen}", case.kind(), case.head_dim);
        case
    }
}

/// Queries of each sampled head that are checked. Over 4 heads of 16k keys and head_dim 128 that is 1 GFLOP.
const CHECKED_ROWS: usize = 16;
