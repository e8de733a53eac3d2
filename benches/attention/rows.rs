//! The rows of a record, and the format of numbers.

use std::fs::File;
use std::path::Path;

use anyhow::{Context, Result};
use serde::Serialize;

use crate::cases::{Case, Mask};
use crate::timing::Timing;

/// A file of rows, if one was asked for.
pub struct Csv(Option<csv::Writer<File>>);

/// A row in the columns of benches/record. Only our rows fill `autograd_ms` and `host_us`. FLOP/s are in units of 10^12,
/// bytes per second in units of 10^9.
#[derive(Default, Serialize)]
pub struct CsvRow<'a> {
    pub peer: &'a str,
    pub kind: String,
    #[serde(rename = "dir")]
    pub pass: &'a str,
    pub dtype: &'a str,
    pub hdim: Option<usize>,
    pub causal: u8,
    /// Number of sequences.
    pub batch: Option<usize>,
    /// Of a packed case, the longest.
    pub seqlen_q: usize,
    pub seqlen_k: usize,
    pub hq: Option<usize>,
    pub hkv: Option<usize>,
    pub ms: String,
    pub tflops: String,
    pub gbps: String,
    pub ms_min: String,
    pub reps: Option<usize>,
    pub sm_mhz: String,
    pub watts: String,
    pub err: String,
    /// The backward through Candle's autograd.
    pub autograd_ms: String,
    /// Time that the host takes to queue the call.
    pub host_us: String,
    /// Peak memory of the pass in MiB, without the bytes allocated before it. If there is none, the reason:
    /// [`figures::record::OUT_OF_MEMORY`] or [`figures::record::UNCOUNTABLE`].
    pub peak_mib: String,
}

impl Csv {
    /// # Errors
    /// If the file cannot be created; one that is already there is replaced.
    pub fn create(path: Option<&Path>) -> Result<Self> {
        let csv = path.map(|path| csv::Writer::from_path(path).with_context(|| format!("{}", path.display())));
        Ok(Self(csv.transpose()?))
    }

    /// Writes and flushes the row, so that an interrupted run keeps its measurements.
    pub fn write(&mut self, row: CsvRow) -> Result<()> {
        if let Some(csv) = &mut self.0 {
            csv.serialize(row)?;
            csv.flush()?;
        }
        Ok(())
    }
}

impl CsvRow<'_> {
    /// The call of `case`.
    pub fn of(case: &Case) -> Self {
        let (seqlen_q, seqlen_k) = case.seqlens();
        let packed = !case.lengths.is_empty();
        Self {
            kind: case.kind(),
            dtype: case.dtype.as_str(),
            hdim: Some(case.head_dim),
            causal: u8::from(case.mask == Mask::Causal),
            batch: Some(if packed { case.lengths.len() } else { case.batch }),
            seqlen_q,
            seqlen_k,
            hq: Some(case.num_heads),
            hkv: Some(case.num_heads_k()),
            ..Self::default()
        }
    }

    /// The same row with the times of `timing`.
    pub fn timed(self, timing: &Timing) -> Self {
        Self {
            ms: significant(timing.median() * 1e3),
            ms_min: significant(timing.min() * 1e3),
            reps: Some(timing.runs()),
            ..self
        }
    }
}

/// Median and spread in milliseconds.
pub fn spread(timing: &Timing) -> String {
    format!("{} ({} .. {})", ms(timing.median()), ms(timing.min()), ms(timing.max()))
}

/// Milliseconds, from seconds: three digits or so.
pub fn ms(seconds: f64) -> String {
    let ms = seconds * 1e3;
    match ms {
        ..1.0 => format!("{ms:.3}"),
        1.0..10.0 => format!("{ms:.2}"),
        10.0..100.0 => format!("{ms:.1}"),
        _ => format!("{ms:.0}"),
    }
}

/// Bytes in MiB.
pub fn mib(bytes: usize) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}

/// Bytes in GiB.
pub fn gib(bytes: usize) -> f64 {
    bytes as f64 / f64::from(1 << 30)
}

/// Five significant digits.
pub fn significant(value: f64) -> String {
    if value == 0.0 {
        return "0".into();
    }
    let digits = 4 - value.abs().log10().floor() as i32;
    format!("{value:.*}", digits.max(0) as usize)
}
