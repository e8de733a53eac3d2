//! Reads CSV files with the columns of benches/record: costs by implementation and call.

use std::collections::BTreeMap;

use anyhow::Result;
use serde::Deserialize;

/// Every call of the papers' grid has this many tokens.
pub const GRID_TOKENS: usize = 16384;

/// The number of heads times head_dim in the papers' grid.
pub const GRID_WIDTH: usize = 2048;

/// One call, of any implementation. `seqlen` counts keys; in a packed call it is the longest.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Call {
    pub kind: String,
    pub pass: String,
    pub head_dim: usize,
    pub causal: bool,
    pub batch: usize,
    pub seqlen: usize,
    pub num_heads: usize,
    pub num_heads_k: usize,
}

impl Call {
    /// A call of the papers' grid.
    pub fn of_the_grid(pass: &str, head_dim: usize, causal: bool, seqlen: usize) -> Self {
        let (kind, pass) = ("mha".to_string(), pass.to_string());
        let num_heads = GRID_WIDTH / head_dim;
        Self { kind, pass, head_dim, causal, batch: GRID_TOKENS / seqlen, seqlen, num_heads, num_heads_k: num_heads }
    }

    pub fn with_pass(&self, pass: &str) -> Self {
        Self { pass: pass.to_string(), ..self.clone() }
    }

    pub fn with_kind(&self, kind: &str) -> Self {
        Self { kind: kind.to_string(), ..self.clone() }
    }

    pub fn mask(&self) -> &'static str {
        if self.causal {
            "causal"
        } else {
            "full"
        }
    }
}

/// The cost of one call for one implementation: medians over the runs that were read.
#[derive(Clone, Copy)]
pub struct Cost {
    pub ms: Option<f64>,
    pub tflops: Option<f64>,
    pub peak_mib: Option<f64>,
    /// Why the numbers are missing.
    pub failure: Option<&'static str>,
}

/// The rows of one or several files.
#[derive(Default)]
pub struct Record {
    costs: BTreeMap<(String, Call), Cost>,
    /// The type of most rows. Rows of other types are left out.
    pub dtype: String,
}

/// A row of a file. Older files and those of other tools lack some columns.
#[derive(Deserialize)]
struct Row {
    peer: String,
    kind: String,
    #[serde(rename = "dir")]
    pass: String,
    #[serde(default)]
    dtype: String,
    hdim: Option<usize>,
    causal: Option<u8>,
    batch: Option<usize>,
    seqlen_k: Option<usize>,
    hq: Option<usize>,
    hkv: Option<usize>,
    ms: Option<f64>,
    tflops: Option<f64>,
    /// A number, or the reason why it is missing.
    #[serde(default)]
    peak_mib: String,
}

/// The name of Candle's standard attention in older files.
const OLD_STANDARD: &str = "unfused";

/// In the column `peak_mib`: the pass needs more memory than there is.
pub const OUT_OF_MEMORY: &str = "oom";

/// In the column `peak_mib`: Candle's kernels cannot count the scores.
pub const UNCOUNTABLE: &str = "uncountable";

/// The reasons in the column `peak_mib`, and their meaning.
const FAILURES: [(&str, &str); 2] = [(OUT_OF_MEMORY, "out of memory"), (UNCOUNTABLE, "too many scores")];

impl Record {
    /// Reads the texts of CSV files. Files without the columns `peer`, `kind` and `dir` hold something else and are skipped.
    ///
    /// # Errors
    /// If a number cannot be parsed.
    pub fn read<'a>(texts: impl IntoIterator<Item = &'a str>) -> Result<Self> {
        let mut rows: Vec<Row> = Vec::new();
        for text in texts {
            let mut reader = csv::ReaderBuilder::new().comment(Some(b'#')).from_reader(text.as_bytes());
            let headers = reader.headers()?.clone();
            if ["peer", "kind", "dir"].iter().all(|column| headers.iter().any(|header| header == *column)) {
                for row in reader.deserialize() {
                    let mut row: Row = row?;
                    if row.peer == OLD_STANDARD {
                        row.peer = "standard".to_string();
                    }
                    rows.push(row);
                }
            }
        }
        let mut rows_of: BTreeMap<&str, usize> = BTreeMap::new();
        rows.iter().for_each(|row| *rows_of.entry(&row.dtype).or_default() += 1);
        let dtype = rows_of.into_iter().max_by_key(|&(_, count)| count).map_or(String::new(), |(name, _)| name.into());
        let mut runs: BTreeMap<(String, Call), Vec<&Row>> = BTreeMap::new();
        for row in rows.iter().filter(|row| row.dtype == dtype) {
            runs.entry((row.peer.clone(), row.call())).or_default().push(row);
        }
        let costs = runs.into_iter().map(|(key, rows)| (key, Cost::of(&rows))).collect();
        let mut record = Self { costs, dtype };
        record.add_up_passes();
        Ok(record)
    }

    /// Adds rows for forward + backward: the sum of the two, where both were timed. Candle's standard attention needs none: its
    /// forward + backward is timed as one, through autograd.
    fn add_up_passes(&mut self) {
        let forward: Vec<_> = self.costs.iter().filter(|((_, call), _)| call.pass == "fwd").collect();
        let sums: Vec<_> = forward
            .into_iter()
            .filter_map(|((peer, call), forward)| {
                let backward = self.get(peer, &call.with_pass("bwd"))?;
                Some(((peer.clone(), call.with_pass("fwd+bwd")), forward.and_then(backward)))
            })
            .collect();
        for (key, sum) in sums {
            let peak_mib = self.costs.get(&key).and_then(|cost| cost.peak_mib);
            self.costs.insert(key, Cost { peak_mib, ..sum });
        }
    }

    pub fn get(&self, peer: &str, call: &Call) -> Option<Cost> {
        self.costs.get(&(peer.to_string(), call.clone())).copied()
    }

    pub fn tflops(&self, peer: &str, call: &Call) -> Option<f64> {
        self.get(peer, call)?.tflops
    }

    /// The calls of `peer`, sorted.
    pub fn calls<'a>(&'a self, peer: &'a str) -> impl Iterator<Item = &'a Call> {
        self.costs.keys().filter(move |(name, _)| name == peer).map(|(_, call)| call)
    }

    /// Every implementation, once.
    pub fn peers(&self) -> Vec<&str> {
        let mut peers: Vec<&str> = self.costs.keys().map(|(peer, _)| peer.as_str()).collect();
        peers.dedup();
        peers
    }

    /// Our cost for a call of a variant: of the same kind if there is such a row, otherwise of the grid.
    pub fn ours_for(&self, call: &Call) -> Option<Cost> {
        self.get("ours", call).or_else(|| self.get("ours", &call.with_kind("mha")))
    }
}

impl Row {
    fn call(&self) -> Call {
        let or_none = |value: Option<usize>| value.unwrap_or_default();
        Call {
            kind: self.kind.clone(),
            pass: self.pass.clone(),
            head_dim: or_none(self.hdim),
            causal: self.causal == Some(1),
            batch: or_none(self.batch),
            seqlen: or_none(self.seqlen_k),
            num_heads: or_none(self.hq),
            num_heads_k: or_none(self.hkv),
        }
    }
}

impl Cost {
    fn of(rows: &[&Row]) -> Self {
        let of = |column: fn(&Row) -> Option<f64>| median(rows.iter().filter_map(|row| column(row)).collect());
        let why = |row: &&Row| FAILURES.iter().find(|(word, _)| *word == row.peak_mib).map(|&(_, why)| why);
        Self {
            ms: of(|row| row.ms),
            tflops: of(|row| row.tflops),
            peak_mib: of(|row| row.peak_mib.parse().ok()),
            failure: rows.iter().find_map(why),
        }
    }

    /// The cost of this call followed by `next`.
    fn and_then(&self, next: Self) -> Self {
        let ms = self.ms.zip(next.ms).map(|(first, second)| first + second);
        let work = |cost: &Self| Some(cost.tflops? * cost.ms?);
        let work = work(self).zip(work(&next)).map(|(first, second)| first + second);
        let tflops = work.zip(ms).map(|(work, ms)| work / ms);
        Self { ms, tflops, peak_mib: None, failure: self.failure.or(next.failure) }
    }
}

/// The middle value, or the mean of the two in the middle. `None` if there are no values.
pub fn median(mut values: Vec<f64>) -> Option<f64> {
    values.sort_by(f64::total_cmp);
    let (low, high) = (values.len().checked_sub(1)? / 2, values.len() / 2);
    Some((values[low] + values[high]) / 2.0)
}
