//! What the FlashAttention-2 paper (arXiv 2307.08691) claims, and what a record says about it.

use crate::record::{Call, Record};
use crate::{geometric_mean, ratios, ABLATION, BY_HEADS, HEADS_ONLY, HEAD_DIMS, SEQLENS};

/// Section 4: 1.7 to 3.0 times as fast as FlashAttention.
const OVER_FLASH1: [f64; 2] = [1.7, 3.0];

/// Section 4: 3 to 10 times as fast as standard attention.
const OVER_STANDARD: [f64; 2] = [3.0, 10.0];

/// An aim of this crate, from [`LONG`] tokens on.
const OVER_CANDLE: f64 = 10.0;
const LONG: usize = 2048;

/// Section 4.1: the highest rate of forward + backward on an H100, in TFLOP/s.
const BOTH_TFLOPS: f64 = 335.0;

/// Section 1: the highest shares of an A100's peak rate, in the forward and in the backward.
const PAPER_FORWARD_SHARE: f64 = 0.73;
const PAPER_BACKWARD_SHARE: f64 = 0.63;

/// Section 3.1.1: 1.7 to 1.8 times as fast with a causal mask as without one.
const CAUSAL_OVER_FULL: [f64; 2] = [1.7, 1.8];

/// Section 3.1.1: memory is linear in the sequence. The longest sequence may take this many times the bytes per token of the
/// shortest; tiles that are not full count more at the shortest.
const BYTES_PER_TOKEN: f64 = 1.05;

/// From this batch x heads on, one thread block per head keeps all multiprocessors of any GPU so far busy. With fewer heads,
/// a comparison with FlashAttention-1 mostly measures idle multiprocessors.
const FULL_GPU: usize = 256;

/// A claim, and its counterpart in a record.
pub struct Claim {
    /// The claim of the paper, or an aim of this crate.
    pub paper: String,
    /// What the record has in its place.
    pub here: String,
    /// The calls that `here` is about.
    pub place: String,
    /// `None` if the paper has no number, or if the peak of the GPU is not known.
    pub holds: Option<bool>,
}

/// A line for each claim that the record has rows for. `peak` is the TFLOP/s of the GPU's data sheet.
pub fn claims(record: &Record, peak: Option<f64>) -> Vec<Claim> {
    let mut claims = Vec::new();
    claims.extend(flash1(record, "fwd", "forward"));
    claims.extend(flash1(record, "bwd", "backward, the main kernel alone"));
    claims.extend(standard(record));
    claims.extend(long_standard(record));
    claims.extend(both_passes(record));
    claims.extend(share(record, ("fwd", "forward"), PAPER_FORWARD_SHARE, peak));
    claims.extend(share(record, ("bwd", "backward"), PAPER_BACKWARD_SHARE, peak));
    claims.extend(causal(record));
    claims.extend(heads(record));
    claims.extend(memory(record));
    claims.extend(standard_memory(record));
    claims
}

/// The geometric mean, and a text with the mean, and with the smallest and the largest value if they differ.
pub fn spread(values: &[f64]) -> Option<(f64, String)> {
    let mean = geometric_mean(values.iter().copied())?;
    let (least, most) =
        (values.iter().fold(f64::MAX, |a, &b| a.min(b)), values.iter().fold(f64::MIN, |a, &b| a.max(b)));
    let text = if most - least < 0.1 { format!("{mean:.1}x") } else { format!("{mean:.1}x ({least:.1} to {most:.1})") };
    Some((mean, text))
}

fn blocks(call: &Call) -> usize {
    call.batch * call.num_heads
}

fn flash1(record: &Record, pass: &str, title: &str) -> Option<Claim> {
    let all: Vec<(&Call, f64)> =
        ratios(record, "ablation_flash1", ABLATION).filter(|(call, _)| call.pass == pass).collect();
    let full = all.iter().filter(|(call, _)| blocks(call) >= FULL_GPU);
    let (mean, here) = spread(&full.map(|&(_, ratio)| ratio).collect::<Vec<_>>())?;
    let (_, any) = spread(&all.iter().map(|&(_, ratio)| ratio).collect::<Vec<_>>())?;
    let [least, most] = OVER_FLASH1;
    Some(Claim {
        paper: format!("{least:.1} to {most:.1} times as fast as FlashAttention"),
        here,
        place: format!(
            "{title}, over our kernels in the manner of FlashAttention-1, batch x heads of {FULL_GPU} and more; {any} over all \
             lengths"
        ),
        holds: Some(mean >= least),
    })
}

/// The calls of the papers' grid.
fn grid(pass: &'static str) -> impl Iterator<Item = Call> {
    let shapes = HEAD_DIMS.into_iter().flat_map(|head_dim| [(head_dim, false), (head_dim, true)]);
    shapes.flat_map(move |(head_dim, causal)| SEQLENS.map(|seqlen| Call::of_the_grid(pass, head_dim, causal, seqlen)))
}

/// The time of Candle's standard attention over ours, by call of the papers' grid.
fn over_standard(record: &Record) -> Vec<(Call, f64)> {
    let ratio = |call: Call| {
        let call = call.with_kind("standard");
        let ratio = record.get("standard", &call)?.ms? / record.ours_for(&call)?.ms?;
        Some((call, ratio))
    };
    grid("fwd+bwd").filter_map(ratio).collect()
}

fn standard(record: &Record) -> Option<Claim> {
    let ratios: Vec<f64> = over_standard(record).into_iter().map(|(_, ratio)| ratio).collect();
    let (mean, here) = spread(&ratios)?;
    let [least, most] = OVER_STANDARD;
    Some(Claim {
        paper: format!("{least} to {most} times as fast as standard attention"),
        here,
        place: format!("over Candle's, forward + backward, {} shapes", ratios.len()),
        holds: Some(mean >= least),
    })
}

fn long_standard(record: &Record) -> Option<Claim> {
    let long = over_standard(record).into_iter().filter(|(call, _)| call.seqlen >= LONG);
    let (call, ratio) = long.min_by(|a, b| a.1.total_cmp(&b.1))?;
    Some(Claim {
        paper: format!(
            "(our aim) at least {OVER_CANDLE} times as fast as Candle's standard attention from {}k tokens on",
            LONG / 1024
        ),
        here: format!("{ratio:.1}x"),
        place: format!("forward + backward, head_dim {}, {}, {} tokens", call.head_dim, call.mask(), call.seqlen),
        holds: Some(ratio >= OVER_CANDLE),
    })
}

/// Our highest rate over the papers' grid, and its call.
fn highest(record: &Record, pass: &'static str) -> Option<(f64, String)> {
    let rates = grid(pass).filter_map(|call| Some((record.tflops("ours", &call)?, call)));
    let (rate, call) = rates.max_by(|a, b| a.0.total_cmp(&b.0))?;
    Some((rate, format!("head_dim {}, {}, {} tokens", call.head_dim, call.mask(), call.seqlen)))
}

fn both_passes(record: &Record) -> Option<Claim> {
    let (rate, place) = highest(record, "fwd+bwd")?;
    let paper = format!("up to {BOTH_TFLOPS} TFLOP/s forward + backward on an H100");
    Some(Claim { paper, here: format!("{rate:.0} TFLOP/s"), place, holds: Some(rate.round() >= BOTH_TFLOPS) })
}

/// The rate of a product of two large matrices in TFLOP/s, and how many rows they have.
pub fn product(record: &Record) -> Option<(f64, usize)> {
    let call = record.calls("ceiling").find(|call| call.kind.starts_with("matmul"))?;
    Some((record.tflops("ceiling", call)?, call.seqlen))
}

fn share(record: &Record, (pass, title): (&'static str, &str), of_a100: f64, peak: Option<f64>) -> Option<Claim> {
    let (rate, call) = highest(record, pass)?;
    let percent = |whole: f64| format!("{:.0}%", 100.0 * rate / whole);
    let of_peak = peak.map_or(String::new(), |peak| format!(" of {peak:.0}"));
    let of_product = product(record).map_or(String::new(), |(product, _)| {
        format!("; {} of the rate of a matrix product, {product:.0}", percent(product))
    });
    Some(Claim {
        paper: format!("{title} up to {:.0}% of an A100's peak", 100.0 * of_a100),
        here: peak.map_or("-".to_string(), percent),
        place: format!("{call}: {rate:.0}{of_peak} TFLOP/s{of_product}"),
        holds: peak.map(|peak| rate >= of_a100 * peak),
    })
}

fn causal(record: &Record) -> Option<Claim> {
    let seqlen = SEQLENS[SEQLENS.len() - 1];
    let ms = |head_dim, causal| record.get("ours", &Call::of_the_grid("fwd", head_dim, causal, seqlen))?.ms;
    let ratio = |head_dim| Some(ms(head_dim, false)? / ms(head_dim, true)?);
    let (mean, here) = spread(&HEAD_DIMS.into_iter().filter_map(ratio).collect::<Vec<_>>())?;
    let [least, most] = CAUSAL_OVER_FULL;
    Some(Claim {
        paper: format!("a causal mask, by skipping hidden blocks, is {least} to {most} times as fast as none"),
        here,
        place: format!("forward, {seqlen} tokens"),
        holds: Some(mean >= least),
    })
}

fn heads(record: &Record) -> Option<Claim> {
    let all: Vec<(usize, f64)> =
        ratios(record, HEADS_ONLY, BY_HEADS).map(|(call, ratio)| (blocks(call), ratio)).collect();
    let fewest = all.iter().map(|&(blocks, _)| blocks).min()?;
    let of_few = all.iter().filter(|&&(blocks, _)| blocks == fewest);
    let (mean, here) = spread(&of_few.map(|&(_, ratio)| ratio).collect::<Vec<_>>())?;
    Some(Claim {
        paper: "parallel over the sequence too: faster where batch x heads is small".to_string(),
        here,
        place: format!("batch x heads = {fewest}"),
        holds: Some(mean > 1.0),
    })
}

/// Peak memory in MiB by seqlen, of a batch that does not change.
fn peaks(record: &Record, peer: &str) -> Vec<(usize, f64)> {
    let calls = record.calls(peer).filter(|call| call.kind == "memory");
    calls.filter_map(|call| Some((call.seqlen, record.get(peer, call)?.peak_mib?))).collect()
}

fn memory(record: &Record) -> Option<Claim> {
    let [(short, few), .., (long, many)] = peaks(record, "ours")[..] else { return None };
    let growth = (many / few) / (long as f64 / short as f64);
    Some(Claim {
        paper: "memory grows with the sequence, not with its square".to_string(),
        here: format!("{growth:.2}x"),
        place: format!("forward + backward, bytes per token at {long} tokens over those at {short}"),
        holds: Some(growth <= BYTES_PER_TOKEN),
    })
}

fn standard_memory(record: &Record) -> Option<Claim> {
    let (ours, theirs) = (peaks(record, "ours"), peaks(record, "standard"));
    let &(seqlen, most) = theirs.last()?;
    let &(_, least) = ours.iter().find(|(other, _)| *other == seqlen)?;
    let fails =
        |call: &&Call| call.kind == "memory" && record.get("standard", call).is_some_and(|cost| cost.failure.is_some());
    let failed = record.calls("standard").find(fails);
    let end = failed.map_or(String::new(), |call| format!("; it fails at {}", call.seqlen));
    Some(Claim {
        paper: "(no number) memory of standard attention over ours".to_string(),
        here: format!("{:.0}x", most / least),
        place: format!("forward + backward, {seqlen} tokens{end}"),
        holds: None,
    })
}
