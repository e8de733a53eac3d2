//! A case: one call of attention, the passes of it that are measured, and who computes them.

use std::collections::BTreeSet;
use std::ops::Range;

use anyhow::{ensure, Context, Result};
use attention_reference::Precision;
use candle_core::DType;
use serde::{Deserialize, Deserializer};

#[derive(Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Case {
    pub name: String,
    pub why: String,
    #[serde(default = "one")]
    pub batch: usize,
    #[serde(default)]
    pub seqlen_q: Option<usize>,
    #[serde(default)]
    pub seqlen_k: Option<usize>,
    #[serde(default)]
    pub lengths: Vec<usize>,
    pub num_heads: usize,
    #[serde(default)]
    pub num_heads_k: Option<usize>,
    pub head_dim: usize,
    #[serde(default)]
    pub head_dim_v: Option<usize>,
    #[serde(default = "f32_type", deserialize_with = "dtype")]
    pub dtype: DType,
    /// Whether products of f32 are plain TF32, on a GPU.
    #[serde(skip)]
    pub tf32: bool,
    #[serde(default)]
    pub mask: Mask,
    #[serde(default = "ours")]
    pub peers: Vec<Peer>,
    #[serde(default = "forward_and_both")]
    pub passes: Vec<Pass>,
    #[serde(default)]
    pub threads: Vec<usize>,
    #[serde(default = "some_rows")]
    pub checked_rows: usize,
    #[serde(default)]
    pub quick: bool,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Mask {
    #[default]
    None,
    Causal,
    Window {
        left: Option<usize>,
        right: Option<usize>,
    },
}

/// A pass of a case that is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
pub enum Pass {
    #[serde(rename = "fwd")]
    Forward,
    /// The backward alone. The graph of its forward is built before the clock starts.
    #[serde(rename = "bwd")]
    Backward,
    #[serde(rename = "fwd+bwd")]
    Both,
    /// Forward and backward of the operator alone. Candle's autograd also adds each gradient to a tensor of zeros.
    #[serde(rename = "op")]
    Operator,
    /// Bytes allocated at the peak of forward and backward.
    #[serde(rename = "memory")]
    Memory,
}

/// Who computes attention.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Peer {
    Ours,
    /// Candle's matmul, mask added, softmax, matmul.
    Standard,
    /// `candle_nn::attention::flash_attn`.
    CandleFlash,
}

/// One sequence of a case: where its rows begin among all rows of q, and of k and v.
#[derive(Clone, Copy)]
pub struct Sequence {
    pub first_q: usize,
    pub seqlen_q: usize,
    pub first_k: usize,
    pub seqlen_k: usize,
}

fn one() -> usize {
    1
}

fn f32_type() -> DType {
    DType::F32
}

pub fn dtype<'de, D: Deserializer<'de>>(from: D) -> Result<DType, D::Error> {
    String::deserialize(from)?.parse().map_err(serde::de::Error::custom)
}

pub fn ours() -> Vec<Peer> {
    vec![Peer::Ours]
}

fn forward_and_both() -> Vec<Pass> {
    vec![Pass::Forward, Pass::Both]
}

/// Reaches every tile of 128 queries at 8k tokens, and costs plain f64 loops about a second at 32k.
fn some_rows() -> usize {
    64
}

/// `dtype` as the reference names it.
pub fn precision(dtype: DType) -> Precision {
    dtype.as_str().parse().expect("a type that attention has")
}

/// Validates the cases of a file.
///
/// # Errors
/// If a case makes no sense, or two have the same name.
pub fn validate<'a>(cases: impl IntoIterator<Item = &'a Case>) -> Result<()> {
    let mut names = BTreeSet::new();
    for case in cases {
        case.validate().with_context(|| format!("case {}", case.name))?;
        ensure!(names.insert(&case.name), "two cases are named {}", case.name);
    }
    Ok(())
}

impl Case {
    /// Forward and backward of ours alone, with a batch of one. The caller sets the lengths.
    pub fn new(name: String, why: &str, (num_heads, head_dim): (usize, usize), dtype: DType) -> Self {
        Self {
            name,
            why: why.to_string(),
            batch: one(),
            seqlen_q: None,
            seqlen_k: None,
            lengths: Vec::new(),
            num_heads,
            num_heads_k: None,
            head_dim,
            head_dim_v: None,
            dtype,
            tf32: false,
            mask: Mask::default(),
            peers: ours(),
            passes: vec![Pass::Forward, Pass::Backward],
            threads: Vec::new(),
            checked_rows: some_rows(),
            quick: false,
        }
    }

    /// # Errors
    /// If its fields contradict each other.
    fn validate(&self) -> Result<()> {
        let packed = !self.lengths.is_empty();
        let padded = self.seqlen_q.is_some();
        ensure!(packed != padded, "give either seqlen_q or lengths");
        ensure!(!packed || (self.batch == 1 && self.seqlen_k.is_none()), "lengths already say batch and seqlen_k");
        ensure!(
            self.num_heads_k() > 0 && self.num_heads.is_multiple_of(self.num_heads_k()),
            "num_heads {} is not a multiple of num_heads_k {}",
            self.num_heads,
            self.num_heads_k()
        );
        ensure!(!self.threads.contains(&0), "a pool of 0 threads cannot run anything");
        for peer in &self.peers {
            peer.accepts(self).with_context(|| format!("peer {peer}"))?;
        }
        ensure!(!self.rows().is_empty(), "no peer computes any of its passes");
        Ok(())
    }

    /// The first part of the name. Cases of one family are timed alternately.
    pub fn family(&self) -> &str {
        self.name.split('/').next().unwrap_or(&self.name)
    }

    pub fn num_heads_k(&self) -> usize {
        self.num_heads_k.unwrap_or(self.num_heads)
    }

    pub fn head_dim_v(&self) -> usize {
        self.head_dim_v.unwrap_or(self.head_dim)
    }

    /// The precision of its products, as the reference names it.
    pub fn precision(&self) -> Precision {
        if self.tf32 {
            Precision::Tf32
        } else {
            precision(self.dtype)
        }
    }

    /// The operator's default.
    pub fn softmax_scale(&self) -> f64 {
        1.0 / (self.head_dim as f64).sqrt()
    }

    /// Thread counts to run on; `None` stands for the threads that a user gets.
    pub fn pools(&self) -> Vec<Option<usize>> {
        if self.threads.is_empty() {
            vec![None]
        } else {
            self.threads.iter().copied().map(Some).collect()
        }
    }

    /// Whether any pass goes through the backward.
    pub fn has_backward(&self) -> bool {
        self.passes.iter().any(|&pass| pass != Pass::Forward)
    }

    /// `seqlen_q` and `seqlen_k`: the padded length, or the longest of the packed ones.
    pub fn seqlens(&self) -> (usize, usize) {
        let seqlen_q = self.seqlen_q.or(self.lengths.iter().max().copied()).unwrap_or(0);
        (seqlen_q, self.seqlen_k.unwrap_or(seqlen_q))
    }

    pub fn sequences(&self) -> Vec<Sequence> {
        let (seqlen_q, seqlen_k) = self.seqlens();
        let padded = || vec![(seqlen_q, seqlen_k); self.batch];
        let packed = || self.lengths.iter().map(|&length| (length, length)).collect();
        let pairs: Vec<(usize, usize)> = if self.lengths.is_empty() { padded() } else { packed() };
        let (mut first_q, mut first_k) = (0, 0);
        let sequence = |(seqlen_q, seqlen_k)| {
            let sequence = Sequence { first_q, seqlen_q, first_k, seqlen_k };
            first_q += seqlen_q;
            first_k += seqlen_k;
            sequence
        };
        pairs.into_iter().map(sequence).collect()
    }

    /// How many keys a query sees before and after the aligned one; `None` is all of them.
    pub fn window(&self) -> (Option<usize>, Option<usize>) {
        match self.mask {
            Mask::None => (None, None),
            Mask::Causal => (None, Some(0)),
            Mask::Window { left, right } => (left, right),
        }
    }

    /// The keys of `sequence` that its query `row` sees.
    pub fn visible_keys(&self, sequence: &Sequence, row: usize) -> Range<usize> {
        let (left, right) = self.window();
        let aligned = (row + sequence.seqlen_k) as isize - sequence.seqlen_q as isize;
        let within = |key: isize| key.clamp(0, sequence.seqlen_k as isize) as usize;
        let start = left.map_or(0, |left| within(aligned - left as isize));
        let end = right.map_or(sequence.seqlen_k, |right| within(aligned + right as isize + 1));
        start..end.max(start)
    }

    /// Visible pairs of query and key, of one head.
    fn visible_pairs(&self) -> f64 {
        let pairs = |sequence: &Sequence| -> usize {
            (0..sequence.seqlen_q).map(|row| self.visible_keys(sequence, row).len()).sum()
        };
        self.sequences().iter().map(pairs).sum::<usize>() as f64
    }

    /// Floating-point operations of `pass`, of the visible pairs of query and key.
    pub fn flop(&self, pass: Pass) -> f64 {
        self.flop_of(self.visible_pairs(), pass)
    }

    /// Floating-point operations of `pass` as the papers count them: of all pairs of query and key of a sequence, or of
    /// half of them under a causal mask. Half of the pairs is half a diagonal less than the visible pairs.
    #[cfg(feature = "cuda")]
    pub fn papers_flop(&self, pass: Pass) -> f64 {
        let all: usize = self.sequences().iter().map(|sequence| sequence.seqlen_q * sequence.seqlen_k).sum();
        let pairs = match self.mask {
            Mask::None => all as f64,
            Mask::Causal => 0.5 * all as f64,
            Mask::Window { .. } => self.visible_pairs(),
        };
        self.flop_of(pairs, pass)
    }

    /// A product costs 2 * head_dim or 2 * head_dim_v operations for each pair and head. The forward has one of each, for S
    /// and O. The backward has three of the first, for S, dQ and dK, and two of the second, for dP and dV.
    fn flop_of(&self, pairs: f64, pass: Pass) -> f64 {
        let (head_dim, head_dim_v) = (self.head_dim as f64, self.head_dim_v() as f64);
        let columns = match pass {
            Pass::Forward => head_dim + head_dim_v,
            Pass::Backward => 3.0 * head_dim + 2.0 * head_dim_v,
            Pass::Both | Pass::Operator | Pass::Memory => 4.0 * head_dim + 3.0 * head_dim_v,
        };
        2.0 * columns * self.num_heads as f64 * pairs
    }

    /// Pairs of query and key of all heads of a padded case, visible or not.
    pub fn scores(&self) -> usize {
        let (seqlen_q, seqlen_k) = self.seqlens();
        self.batch * self.num_heads * seqlen_q * seqlen_k
    }

    /// Bytes of q, k, v and o. A forward reads and writes each of them at least once.
    pub fn forward_bytes(&self) -> f64 {
        let (rows_q, rows_k) = self.sequences().iter().fold((0, 0), |(q, k), s| (q + s.seqlen_q, k + s.seqlen_k));
        let rows = rows_q * self.num_heads + rows_k * self.num_heads_k();
        (rows * (self.head_dim + self.head_dim_v()) * self.dtype.size_in_bytes()) as f64
    }

    /// The column `kind` of a record.
    pub fn kind(&self) -> String {
        let shared_heads = self.num_heads != self.num_heads_k();
        let kind = match (!self.lengths.is_empty(), shared_heads) {
            _ if self.seqlens().0 == 1 => "decode",
            (true, false) => "varlen",
            (true, true) => "varlen_gqa",
            (false, false) => "mha",
            (false, true) => "gqa",
        };
        // A record has no column for head_dim_v and for a window.
        let of_v = self.head_dim_v.map_or(String::new(), |head_dim_v| format!("_v{head_dim_v}"));
        let window = if matches!(self.mask, Mask::Window { .. }) { "_window" } else { "" };
        format!("{kind}{of_v}{window}")
    }

    /// Query heads, and key heads if they are fewer.
    pub fn heads(&self) -> String {
        slashed(self.num_heads, self.num_heads_k())
    }

    /// head_dim, and head_dim_v if it differs.
    pub fn head_dims(&self) -> String {
        slashed(self.head_dim, self.head_dim_v())
    }

    /// Its call in one line, such as `causal f32 d64 b1 h8/2 s2048`.
    pub fn label(&self) -> String {
        let mask = self.mask;
        let (seqlen_q, seqlen_k) = self.seqlens();
        let heads = self.heads();
        let (batch, seqlen) = match self.lengths.len() {
            0 => (format!("b{}", self.batch), format!("s{}", slashed(seqlen_q, seqlen_k))),
            count => (format!("packed {count}"), format!("s<={seqlen_q}")),
        };
        format!("{mask} {} d{} {batch} h{heads} {seqlen}", self.dtype.as_str(), self.head_dims())
    }

    /// Whether the word of the command line chooses the case.
    pub fn contains(&self, word: &str) -> bool {
        self.name.contains(word) || self.label().contains(word)
    }

    /// The names of its rows, by which the targets of cases.toml find them.
    pub fn rows(&self) -> Vec<String> {
        let mut rows = Vec::new();
        for &peer in &self.peers {
            for &pass in self.passes.iter().filter(|&&pass| peer.computes(pass)) {
                rows.extend(self.pools().into_iter().map(|threads| row_name(&self.name, peer, pass, threads)));
            }
        }
        rows
    }
}

impl Peer {
    pub fn computes(self, pass: Pass) -> bool {
        match self {
            Peer::Ours => true,
            Peer::Standard => pass != Pass::Operator,
            Peer::CandleFlash => pass == Pass::Forward,
        }
    }

    /// Whether it can run `case` at all.
    ///
    /// # Errors
    /// The reason, if it cannot.
    pub fn accepts(self, case: &Case) -> Result<()> {
        let packed = !case.lengths.is_empty();
        let types: &[DType] = match self {
            Peer::Ours => &[DType::F64, DType::F32, DType::F16, DType::BF16],
            Peer::Standard => &[DType::F64, DType::F32, DType::F16, DType::BF16],
            Peer::CandleFlash => &[DType::F32, DType::F16],
        };
        ensure!(types.contains(&case.dtype), "has no {:?}", case.dtype);
        ensure!(self != Peer::Standard || !packed, "has no packed form");
        let window = matches!(case.mask, Mask::Window { .. });
        ensure!(self != Peer::CandleFlash || !window, "has no window");
        Ok(())
    }

    /// Bytes that it needs at least for the passes of `case`, without its inputs.
    pub fn needed_bytes(self, case: &Case) -> usize {
        // Matrices of scores that live at once. A forward holds two: the input and the result of a step. Candle's
        // autograd was measured to hold 17.1 in memory/2k and 17.0 in memory/8k.
        let matrices = if case.has_backward() { 17 } else { 2 };
        match self {
            Peer::Standard => matrices * case.scores() * case.dtype.size_in_bytes(),
            Peer::Ours | Peer::CandleFlash => 0,
        }
    }
}

impl std::fmt::Display for Peer {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        f.pad(match self {
            Peer::Ours => "ours",
            Peer::Standard => "standard",
            Peer::CandleFlash => "candle_flash",
        })
    }
}

/// Two sizes as `a/b`, or the one if they are equal.
fn slashed(a: usize, b: usize) -> String {
    if a == b {
        a.to_string()
    } else {
        format!("{a}/{b}")
    }
}

impl std::fmt::Display for Mask {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        match self {
            Mask::None => f.pad("full"),
            Mask::Causal => f.pad("causal"),
            Mask::Window { left, right } => {
                let side = |size: &Option<usize>| size.map_or("open".into(), |size| size.to_string());
                f.pad(&format!("window({},{})", side(left), side(right)))
            }
        }
    }
}

/// The name of a row, by which a target finds it.
pub fn row_name(case: &str, peer: Peer, pass: Pass, threads: Option<usize>) -> String {
    let threads = threads.map_or(String::new(), |threads| format!(" threads={threads}"));
    format!("{case} {peer} {pass}{threads}")
}

impl std::fmt::Display for Pass {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        f.pad(match self {
            Pass::Forward => "fwd",
            Pass::Backward => "bwd",
            Pass::Both => "fwd+bwd",
            Pass::Operator => "op",
            Pass::Memory => "memory",
        })
    }
}
