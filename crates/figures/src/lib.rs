//! Figures, records of runs and rates of GPUs, for the bench, the documents and the GPT example.
//!
//! This crate measures nothing. [`of_record`] draws CSV files with the columns of benches/record as SVG: speed by seqlen as in the
//! papers, speed on a CPU, memory, and the gain of each idea. [`curves`] draws the loss of a training. [`claims`] compares a record with
//! what the papers claim.

pub mod chart;
pub mod claims;
pub mod curves;
pub mod data_sheet;
pub mod record;

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};

use self::chart::{Chart, Marks, Panel, Series, Value};
use self::record::{Call, Cost, Record, GRID_TOKENS, GRID_WIDTH};

/// The name of the file without its extension, and the SVG.
pub type Figure = (&'static str, String);

/// The implementations that are compared, in the order of the bars. A colour means the same in every figure.
const OURS: Series = Series { name: "candle-fa2", colour: (232, 113, 26) };
const STANDARD: Series = Series { name: "standard attention (Candle)", colour: (150, 150, 150) };
const CANDLE_FLASH: Series = Series { name: "candle_nn::attention::flash_attn", colour: (180, 90, 80) };
const ONE_BLOCK_A_HEAD: Series = Series { name: "parallel over batch and heads only", colour: (176, 128, 76) };
const PEERS: [(&str, &str, Series); 6] = [
    ("standard", "standard", STANDARD),
    ("ablation_flash1", "ablation", Series { name: "FlashAttention-1 style", colour: (176, 128, 76) }),
    ("flash", "mha", Series { name: "FlashAttention-2", colour: (62, 137, 214) }),
    ("cudnn", "mha", Series { name: "cuDNN", colour: (70, 160, 100) }),
    ("fa3", "mha", Series { name: "FlashAttention-3", colour: (150, 105, 205) }),
    ("ours", "mha", OURS),
];

pub const HEAD_DIMS: [usize; 3] = [64, 128, 256];
pub const SEQLENS: [usize; 6] = [512, 1024, 2048, 4096, 8192, 16384];

/// Draws every figure that `record` has rows for. `source` says where the rows are from.
///
/// # Errors
/// If a figure cannot be drawn.
pub fn of_record(record: &Record, source: &str) -> Result<Vec<Figure>> {
    let mut figures = Vec::new();
    for (name, pass, title) in [
        ("forward", "fwd", "Forward"),
        ("backward", "bwd", "Backward"),
        ("forward-backward", "fwd+bwd", "Forward + backward"),
    ] {
        figures.extend(speed(record, pass, title, source).map(|chart| (name, chart)));
    }
    figures.extend(cpu(record, source).map(|chart| ("cpu", chart)));
    figures.extend(memory(record, source).map(|chart| ("memory", chart)));
    figures.extend(ablations(record, source).map(|chart| ("ablations", chart)));
    figures.extend(heads(record, source).map(|chart| ("heads", chart)));
    let draw = |(name, chart): (&'static str, Chart)| {
        let svg = chart.svg().with_context(|| format!("the figure {name}"))?;
        Ok((name, svg))
    };
    figures.into_iter().map(draw).collect()
}

/// Writes each figure into `folder`, and makes the folder if it is missing.
///
/// # Errors
/// If a file cannot be written.
pub fn save(folder: &Path, figures: &[Figure]) -> Result<()> {
    fs::create_dir_all(folder).with_context(|| folder.display().to_string())?;
    for (name, svg) in figures {
        let path = folder.join(name).with_extension("svg");
        fs::write(&path, svg).with_context(|| path.display().to_string())?;
    }
    Ok(())
}

/// The chart's value of a cost.
fn value(cost: Option<Cost>, of: fn(&Cost) -> Option<f64>) -> Value {
    let Some(cost) = cost else { return Value::Missing };
    of(&cost).map(Value::Of).or(cost.failure.map(Value::Failed)).unwrap_or(Value::Missing)
}

/// TFLOP/s by seqlen of every implementation that ran one pass of the papers' grid, a panel for each head_dim and mask.
fn speed(record: &Record, pass: &str, title: &str, source: &str) -> Option<Chart> {
    let value = |peer: &str, kind: &str, head_dim: usize, causal: bool, seqlen: usize| {
        let call = Call::of_the_grid(pass, head_dim, causal, seqlen);
        if kind == "ablation" && pass != "fwd" {
            return Value::Missing; // the ablations time the main kernel alone, not the whole backward
        }
        // Rows of PyTorch's standard attention have the kind of the grid.
        let cost = record.get(peer, &call.with_kind(kind)).or_else(|| record.get(peer, &call));
        value(cost, |cost| cost.tflops)
    };
    let mut panels = Vec::new();
    for head_dim in HEAD_DIMS {
        for (causal, mask) in [(false, "full"), (true, "causal")] {
            let of = |(peer, kind, _): &(&str, &str, Series)| {
                SEQLENS.map(|seqlen| value(peer, kind, head_dim, causal, seqlen)).to_vec()
            };
            let title = format!("head_dim {head_dim}, {mask} mask");
            panels.push(Panel {
                title,
                groups: SEQLENS.map(seqlen_name).to_vec(),
                rows: PEERS.iter().map(of).collect(),
            });
        }
    }
    let about = format!("{}, {GRID_TOKENS} tokens, heads x head_dim = {GRID_WIDTH}", record.dtype);
    let title = format!("{title}: TFLOP/s by sequence length");
    let chart = Chart::new(title, [&about, source], PEERS.map(|(.., series)| series), panels)?;
    Some(Chart { units: ["TFLOP/s", "seqlen"], ..chart })
}

/// GFLOP/s on a CPU by call, a panel for each pass. The line across a panel is the rate of a matrix product on the same CPU.
fn cpu(record: &Record, source: &str) -> Option<Chart> {
    const SEQLEN: usize = 2048;
    const WIDTH: usize = 512; // num_heads times head_dim; on a GPU it is GRID_WIDTH
    let peers = [("standard", STANDARD), ("candle_flash", CANDLE_FLASH), ("ours", OURS)];
    let drawn = |call: &&Call| {
        let kind = ["mha", "gqa", "varlen"].contains(&call.kind.as_str());
        kind && call.seqlen == SEQLEN && call.num_heads * call.head_dim == WIDTH
    };
    let panel = |(pass, title): (&str, &str)| {
        let mut calls: Vec<&Call> = record.calls("ours").filter(|call| call.pass == pass).filter(drawn).collect();
        calls.sort_by_key(|call| (call.kind != "mha", *call));
        let name = |call: &&Call| {
            let what = match call.kind.as_str() {
                "gqa" => ", GQA",
                "varlen" => ", packed",
                _ => "",
            };
            format!("{}, {}{what}", call.head_dim, call.mask())
        };
        let gflops = |peer: &str, call: &Call| value(record.get(peer, call), |cost| Some(1000.0 * cost.tflops?));
        Panel {
            title: title.to_string(),
            groups: calls.iter().map(name).collect(),
            rows: peers.iter().map(|(peer, _)| calls.iter().map(|call| gflops(peer, call)).collect()).collect(),
        }
    };
    let panels = [("fwd", "forward"), ("fwd+bwd", "forward + backward")].map(panel).to_vec();
    let product = record.calls("ceiling").find(|call| call.kind == "matmul1024")?;
    let level = 1000.0 * record.tflops("ceiling", product)?;
    let about = format!(
        "{}, {SEQLEN} tokens, heads x head_dim = {WIDTH}. Line: matrix product, {level:.0} GFLOP/s",
        record.dtype
    );
    let title = "On a CPU: GFLOP/s by head_dim and mask".to_string();
    let chart = Chart::new(title, [&about, source], peers.map(|(_, series)| series), panels)?;
    Some(Chart { columns: 1, level: Some(level), units: ["GFLOP/s", ""], ..chart })
}

/// Peak memory of a forward + backward by seqlen, a panel for each kind of call.
fn memory(record: &Record, source: &str) -> Option<Chart> {
    let peers = [("standard", STANDARD), ("ours", OURS)];
    let calls = || peers.iter().flat_map(|(peer, _)| record.calls(peer)).filter(|call| call.kind == "memory");
    let mut panels: Vec<Panel> = Vec::new();
    for one in once(calls().map(|call| Call { seqlen: 0, batch: 0, ..call.clone() })) {
        let here = once(calls().filter(|call| Call { seqlen: 0, batch: 0, ..(*call).clone() } == one).cloned());
        let mut here: Vec<Call> = here.into_iter().filter(|call| call.pass == "fwd+bwd").collect();
        here.sort_by_key(|call| (call.seqlen, call.batch));
        let value = |peer: &str, call: &Call| value(record.get(peer, call), |cost| cost.peak_mib);
        panels.push(Panel {
            title: format!("{} heads of {}, {} mask{}", one.num_heads, one.head_dim, one.mask(), batches(&here)),
            groups: here.iter().map(|call| seqlen_name(call.seqlen)).collect(),
            rows: peers.iter().map(|(peer, _)| here.iter().map(|call| value(peer, call)).collect()).collect(),
        });
    }
    let about = format!("{}, with results and gradients, without inputs", record.dtype);
    let title = "Forward + backward: peak memory by sequence length".to_string();
    let chart = Chart::new(title, [&about, source], peers.map(|(_, series)| series), panels)?;
    let columns = chart.panels.len().min(2);
    Some(Chart { marks: Marks::Lines, columns, units: ["", "seqlen"], ..chart })
}

/// The batch or the number of tokens, if it is the same in all calls; for the end of a title.
pub fn batches(calls: &[Call]) -> String {
    let all = |value: &dyn Fn(&Call) -> usize| {
        let first = calls.first().map(value)?;
        calls.iter().all(|call| value(call) == first).then_some(first)
    };
    match (all(&|call| call.batch), all(&|call| call.batch * call.seqlen)) {
        (Some(batch), _) => format!(", batch {batch}"),
        (None, Some(tokens)) => format!(", {tokens} tokens"),
        (None, None) => String::new(),
    }
}

/// The gain of each idea of the paper: speed with it over speed without it, a panel for each pass.
fn ablations(record: &Record, source: &str) -> Option<Chart> {
    let variants = variants(record);
    let series: Vec<(usize, bool, Series)> = [
        (64, false, "head_dim 64, full", (32, 155, 160)),
        (64, true, "64, causal", (125, 185, 190)),
        (128, false, "128, full", (200, 85, 135)),
        (128, true, "128, causal", (205, 150, 175)),
        (256, false, "256, full", (145, 145, 45)),
        (256, true, "256, causal", (180, 180, 120)),
    ]
    .map(|(head_dim, causal, name, colour)| (head_dim, causal, Series { name, colour }))
    .to_vec();
    let panel = |(pass, title): (&str, &str)| {
        let value = |variant: &str, head_dim: usize, causal: bool| {
            let calls = ratios(record, variant, ABLATION).filter(|(call, _)| call.pass == pass);
            let of_it = calls.filter(|(call, _)| call.head_dim == head_dim && call.causal == causal);
            geometric_mean(of_it.map(|(_, ratio)| ratio)).map_or(Value::Missing, Value::Of)
        };
        let row = |(head_dim, causal, _): &(usize, bool, Series)| {
            variants.iter().map(|variant| value(variant, *head_dim, *causal)).collect()
        };
        Panel {
            title: title.to_string(),
            groups: variants.iter().map(|variant| variant_name(variant)).collect(),
            rows: series.iter().map(row).collect(),
        }
    };
    let panels = [("fwd", "forward"), ("bwd", "backward")].map(panel).to_vec();
    let about = format!(
        "{}, papers' grid, geometric mean over the sequence lengths. First group: ours over it. Others: the first over each",
        record.dtype
    );
    let title = "What each idea brings: speed over the same kernel that does this instead".to_string();
    let chart = Chart::new(title, [&about, source], series.into_iter().map(|(.., series)| series), panels)?;
    Some(Chart { marks: Marks::Bars { digits: 2 }, columns: 1, level: Some(1.0), units: ["ratio", ""], ..chart })
}

/// Few heads: a thread block per tile of queries (backward: of keys), and a thread block per head. A panel for each pass, mask and
/// head_dim.
fn heads(record: &Record, source: &str) -> Option<Chart> {
    let calls: Vec<&Call> =
        record.calls(HEADS_ONLY).filter(|call| call.kind == BY_HEADS && call.pass != "fwd+bwd").collect();
    let blocks = |call: &Call| call.batch * call.num_heads;
    let one_panel = |call: &Call| (call.pass == "bwd", call.head_dim, call.causal, call.seqlen);
    let mut panels = Vec::new();
    for key in once(calls.iter().map(|call| one_panel(call))) {
        let mut here: Vec<&Call> = calls.iter().copied().filter(|call| one_panel(call) == key).collect();
        here.sort_by_key(|call| blocks(call));
        let values = |cost: &dyn Fn(&Call) -> Option<f64>| {
            here.iter().map(|call| cost(call).map_or(Value::Missing, Value::Of)).collect()
        };
        let pass = if key.0 { "backward" } else { "forward" };
        panels.push(Panel {
            title: format!("{pass}, head_dim {}, {} mask, {} tokens", key.1, here[0].mask(), key.3),
            groups: here.iter().map(|call| blocks(call).to_string()).collect(),
            rows: vec![values(&|call| record.tflops(HEADS_ONLY, call)), values(&|call| record.ours_for(call)?.tflops)],
        });
    }
    let title = "Few heads: TFLOP/s by batch x heads".to_string();
    let chart = Chart::new(title, [&record.dtype, source], [ONE_BLOCK_A_HEAD, OURS], panels)?;
    Some(Chart { units: ["TFLOP/s", "heads"], ..chart })
}

/// Our kernel with one thread block per head. It has a figure of its own, by the number of heads.
pub const HEADS_ONLY: &str = "ablation_heads_only";

/// Our kernel in the frame that all variants share, without our handling of non-finite numbers.
const LACKS_NOTHING: &str = "ablation_none";

/// The kinds of the variants' rows: over the papers' grid, and by number of heads.
pub const ABLATION: &str = "ablation";
pub const BY_HEADS: &str = "ablation_heads";

/// Variants of our kernels, each without one idea of the paper, in the paper's order; and what each does instead.
const VARIANTS: [(&str, &str); 6] = [
    (LACKS_NOTHING, "nothing: ours in this frame"),
    ("ablation_rescale", "rescale at every step"),
    ("ablation_max_and_sum", "maximum and sum for lse"),
    (HEADS_ONLY, "a thread block a head"),
    ("ablation_split_k", "warps split the keys"),
    ("ablation_flash1", "all of it: FlashAttention-1"),
];

/// The variants that the record has timed.
pub fn variants(record: &Record) -> Vec<&str> {
    let place = |peer: &str| VARIANTS.iter().position(|(variant, _)| *variant == peer).unwrap_or(VARIANTS.len());
    let mut variants = record.peers();
    variants.retain(|peer| peer.starts_with("ablation_"));
    variants.sort_by_key(|peer| place(peer));
    variants
}

/// The name of a variant in figures and tables.
pub fn variant_name(variant: &str) -> String {
    let known = VARIANTS.iter().find(|(name, _)| *name == variant).map(|(_, what)| what.to_string());
    known.unwrap_or_else(|| variant.trim_start_matches("ablation_").replace('_', " "))
}

/// The speed of a variant's baseline. The baseline of a variant is `none`: our kernel in the same frame. The baseline of `none`, and of
/// calls that `none` did not run, is our real kernel.
pub fn baseline(record: &Record, variant: &str, call: &Call) -> Option<f64> {
    let frame = if variant == LACKS_NOTHING { None } else { record.tflops(LACKS_NOTHING, call) };
    frame.or_else(|| record.ours_for(call)?.tflops)
}

/// For each call of `kind`, one pass each: the speed of the baseline over that of the variant.
pub fn ratios<'a>(record: &'a Record, variant: &'a str, kind: &'a str) -> impl Iterator<Item = (&'a Call, f64)> {
    record
        .calls(variant)
        .filter(move |call| call.pass != "fwd+bwd" && call.kind == kind)
        .filter_map(move |call| Some((call, baseline(record, variant, call)? / record.tflops(variant, call)?)))
}

pub fn geometric_mean(values: impl IntoIterator<Item = f64>) -> Option<f64> {
    let logs: Vec<f64> = values.into_iter().map(f64::ln).collect();
    (!logs.is_empty()).then(|| (logs.iter().sum::<f64>() / logs.len() as f64).exp())
}

/// Sorts the values and removes duplicates.
fn once<T: Ord>(values: impl Iterator<Item = T>) -> Vec<T> {
    let mut values: Vec<T> = values.collect();
    values.sort();
    values.dedup();
    values
}

/// As the papers write it: 512, 1k, 16k.
fn seqlen_name(seqlen: usize) -> String {
    if seqlen.is_multiple_of(1024) {
        format!("{}k", seqlen / 1024)
    } else {
        seqlen.to_string()
    }
}

#[cfg(test)]
mod tests {
    use anyhow::ensure;

    use super::*;

    /// Files of any age and author: columns by name, medians over runs, forward + backward as their sum, failures, one type.
    #[test]
    fn rows_are_read_by_their_columns() -> Result<()> {
        let grid = "mha,bf16,128,0,4,4096,4096,16,16";
        let head = "peer,dir,kind,dtype,hdim,causal,batch,seqlen_q,seqlen_k,hq,hkv,ms,tflops";
        let run = |ms: u32| format!("{head}\nours,fwd,{grid},{ms},{}\nours,bwd,{grid},6,250\n", 600 / ms);
        let others = format!(
            "# a remark\n{head},peak_mib\nours,fwd,{},1,900,\nceiling,fwd,matmul8192,bf16,,0,,8192,8192,,,1,700,\n\
             standard,fwd+bwd,{},,,oom\n",
            grid.replace("bf16", "fp16"),
            grid.replace("mha", "standard"),
        );
        let texts = [run(1), run(3), run(2), others, "head_dim,error\n128,0.1\n".to_string()];
        let record = Record::read(texts.iter().map(String::as_str))?;
        let call = Call::of_the_grid("fwd", 128, false, 4096);
        ensure!(
            record.dtype == "bf16" && record.tflops("ours", &call) == Some(300.0),
            "the median of three runs is 300"
        );
        let both = call.with_pass("fwd+bwd");
        ensure!(record.tflops("ours", &both) == Some((300.0 * 2.0 + 250.0 * 6.0) / 8.0), "the sum of 2 ms and 6 ms");
        let standard = record.get("standard", &both.with_kind("standard")).context("a row that failed is a row")?;
        ensure!(standard.failure == Some("out of memory") && standard.ms.is_none());
        let figures = of_record(&record, "here")?;
        ensure!(figures.iter().map(|(name, _)| *name).eq(["forward", "backward", "forward-backward"]));
        ensure!(
            figures[2].1.contains("out of memory") && figures[2].1.contains("here") && !figures[0].1.contains("cuDNN")
        );
        Ok(())
    }
}
