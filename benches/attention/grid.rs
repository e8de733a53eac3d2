//! The cases of `benches/cuda.toml`, which explains every field.

use anyhow::{bail, ensure, Context, Result};
use candle_core::DType;
use serde::{Deserialize, Deserializer};

use crate::cases::{self, Case, Mask, Pass, Peer};

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Grids {
    quick: Vec<String>,
    #[serde(rename = "grid")]
    grids: Vec<Grid>,
}

/// A part of the GPU's bench, which the command line can name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Part {
    Grid,
    Gqa,
    Packed,
    Sizes,
    F16,
    Decode,
    Standard,
    Memory,
    /// Ours next to kernels that lack one of FlashAttention-2's contributions. benches/cuda.toml has no case of this part.
    #[cfg(feature = "cuda")]
    #[serde(skip)]
    Ablations,
    /// The host's time for a call. benches/cuda.toml has no case of this part.
    #[cfg(feature = "cuda")]
    #[serde(skip)]
    Host,
    /// The rates that the GPU can reach. benches/cuda.toml has no case of this part.
    #[cfg(feature = "cuda")]
    #[serde(skip)]
    Ceiling,
}

#[cfg(feature = "cuda")]
impl Part {
    /// In the order of the run. `Host` times the first calls of the process, so it comes first. `Memory` fills the GPU,
    /// so it comes last.
    pub const ALL: [Part; 11] = [
        Part::Host,
        Part::Ceiling,
        Part::Grid,
        Part::Gqa,
        Part::Packed,
        Part::Sizes,
        Part::F16,
        Part::Decode,
        Part::Ablations,
        Part::Standard,
        Part::Memory,
    ];

    pub fn name(self) -> &'static str {
        match self {
            Part::Host => "host",
            Part::Ceiling => "ceiling",
            Part::Grid => "grid",
            Part::Gqa => "gqa",
            Part::Packed => "packed",
            Part::Sizes => "sizes",
            Part::F16 => "f16",
            Part::Decode => "decode",
            Part::Ablations => "ablations",
            Part::Standard => "standard",
            Part::Memory => "memory",
        }
    }

    /// Describes a part that measures more than the cases of the file.
    pub fn what(self) -> Option<&'static str> {
        match self {
            Part::Host => Some("the first calls of the process, and what queueing a small call takes"),
            Part::Ceiling => Some("a large matrix product, and a copy in the GPU's memory"),
            Part::Ablations => Some("ours next to kernels without FlashAttention-2's contributions; needs nvcc"),
            _ => None,
        }
    }

    /// Whether the part is one measurement instead of a list of cases.
    pub fn has_no_cases(self) -> bool {
        matches!(self, Part::Host | Part::Ceiling)
    }
}

/// A grid of cases: one for each combination of its fields.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Grid {
    part: Part,
    why: String,
    heads: Vec<Heads>,
    #[serde(default = "none_and_causal")]
    masks: Vec<Mask>,
    tokens: Option<usize>,
    #[serde(default)]
    batches: Vec<usize>,
    #[serde(default)]
    seqlens: Vec<usize>,
    #[serde(default)]
    lengths: Vec<usize>,
    seqlen_q: Option<usize>,
    most_keys: Option<usize>,
    #[serde(default, deserialize_with = "dtype")]
    dtype: Option<DType>,
    #[serde(default = "cases::ours")]
    peers: Vec<Peer>,
    #[serde(default = "forward_and_backward")]
    passes: Vec<Pass>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Heads {
    head_dim: usize,
    head_dim_v: Option<usize>,
    num_heads: usize,
    num_heads_k: Option<usize>,
}

fn none_and_causal() -> Vec<Mask> {
    vec![Mask::None, Mask::Causal]
}

fn forward_and_backward() -> Vec<Pass> {
    vec![Pass::Forward, Pass::Backward]
}

fn dtype<'de, D: Deserializer<'de>>(from: D) -> Result<Option<DType>, D::Error> {
    cases::dtype(from).map(Some)
}

/// All cases and their parts, in tensors of `dtype` where a grid asks for no other.
///
/// # Errors
/// If the file is not TOML of that form, or a case makes no sense.
pub fn cases(dtype: DType) -> Result<Vec<(Part, Case)>> {
    let Grids { quick, grids } = toml::from_str(include_str!("../cuda.toml"))?;
    let mut cases: Vec<(Part, Case)> = Vec::new();
    for grid in &grids {
        let batches = grid.batches().with_context(|| format!("grid {:?}", grid.why))?;
        for heads in &grid.heads {
            for &mask in &grid.masks {
                let case = |&(batch, seqlen): &_| grid.case(heads, mask, (batch, seqlen), dtype);
                let fits = |case: &Case| {
                    grid.most_keys.is_none_or(|most| case.batch * case.seqlens().1 * case.num_heads_k() <= most)
                };
                cases.extend(batches.iter().map(case).filter(fits).map(|case| (grid.part, case)));
            }
        }
    }
    cases::validate(cases.iter().map(|(_, case)| case))?;
    for name in &quick {
        let case = cases.iter_mut().find(|(_, case)| case.name == *name);
        case.with_context(|| format!("quick names {name}, which no grid gives"))?.1.quick = true;
    }
    Ok(cases)
}

impl Grid {
    /// Batch and seqlen of each case; no seqlen of a packed one.
    fn batches(&self) -> Result<Vec<(usize, Option<usize>)>> {
        let ways = [self.tokens.is_some(), !self.batches.is_empty(), !self.lengths.is_empty()];
        ensure!(ways.iter().filter(|&&way| way).count() == 1, "give one of tokens, batches and lengths");
        ensure!(self.seqlens.is_empty() != self.lengths.is_empty(), "seqlens go with tokens and batches");
        if let Some(tokens) = self.tokens {
            if let Some(seqlen) = self.seqlens.iter().find(|&&seqlen| seqlen == 0 || !tokens.is_multiple_of(seqlen)) {
                bail!("{tokens} tokens are no whole number of sequences of {seqlen}");
            }
            return Ok(self.seqlens.iter().map(|&seqlen| (tokens / seqlen, Some(seqlen))).collect());
        }
        if self.batches.is_empty() {
            return Ok(vec![(1, None)]);
        }
        let of_batch = |&batch: &usize| self.seqlens.iter().map(move |&seqlen| (batch, Some(seqlen)));
        Ok(self.batches.iter().flat_map(of_batch).collect())
    }

    /// One case; packed without a `seqlen`.
    fn case(&self, heads: &Heads, mask: Mask, (batch, seqlen): (usize, Option<usize>), dtype: DType) -> Case {
        let mut case = Case {
            batch,
            seqlen_q: self.seqlen_q.or(seqlen),
            seqlen_k: self.seqlen_q.and(seqlen),
            lengths: self.lengths.clone(),
            num_heads_k: heads.num_heads_k,
            head_dim_v: heads.head_dim_v,
            mask,
            peers: self.peers.clone(),
            passes: self.passes.clone(),
            checked_rows: CHECKED_ROWS,
            ..Case::new(String::new(), &self.why, (heads.num_heads, heads.head_dim), self.dtype.unwrap_or(dtype))
        };
        let dtype = self.dtype.map_or(String::new(), |dtype| format!("{}/", dtype.as_str()));
        let kind = match self.part {
            Part::Standard => "standard".to_string(),
            Part::Memory => "memory".to_string(),
            _ => case.kind(),
        };
        let heads = self.seqlen_q.map_or(String::new(), |_| format!("/h{}-{}", case.num_heads, case.num_heads_k()));
        let batch = if self.batches.is_empty() { String::new() } else { format!("/b{batch}") };
        let seqlen = seqlen.map_or(String::new(), |seqlen| format!("/s{seqlen}"));
        case.name = format!("{dtype}{kind}/d{}/{mask}{heads}{batch}{seqlen}", case.head_dim);
        case
    }
}

/// Number of queries checked in each sampled head. With 4 heads, 16k keys and head_dim 128 the check takes 1 GFLOP.
pub const CHECKED_ROWS: usize = 16;
