//! The tables of measurements. A table is empty if the record has no rows for it.

use super::records::Machine;
use anyhow::{Context, Result};
use figures::chart::mib;
use figures::claims::{product, spread};
use figures::record::{median, Call, Cost};
use figures::{
    baseline, batches, geometric_mean, ratios, variant_name, variants, ABLATION, BY_HEADS, HEADS_ONLY, HEAD_DIMS,
    SEQLENS,
};
use std::collections::{BTreeMap, BTreeSet, HashMap};

const PASSES: [(&str, &str); 2] = [("fwd", "forward"), ("bwd", "backward")];
const MASKS: [(bool, &str); 2] = [(false, "full"), (true, "causal")];

/// Every head_dim that a Hopper record has. The papers' grid has no 96 and 192.
const HOPPER_HEAD_DIMS: [usize; 5] = [64, 96, 128, 192, 256];

/// The first columns of [`rows_with_the_fastest`].
const COLUMNS: [&str; 4] = ["pass", "device", "head_dim", "mask"];

/// The other implementations: the name in the rows, and the name in a table.
pub const PEERS: [(&str, &str); 4] = [
    ("flash", "FlashAttention-2"),
    ("cudnn", "cuDNN"),
    ("fa3", "FlashAttention-3"),
    ("efficient", "PyTorch's memory-efficient attention"),
];

/// The first two lines of a table: the names of the columns, and the line below them.
pub fn head(columns: &[&str]) -> String {
    format!("| {} |\n|{}\n", columns.join(" | "), " --- |".repeat(columns.len()))
}

/// As [`head`], with a column for each sequence length after `columns`.
fn head_by_seqlen(columns: &[&str], seqlens: &[usize]) -> String {
    let seqlens: Vec<String> = seqlens.iter().map(usize::to_string).collect();
    head(&columns.iter().copied().chain(seqlens.iter().map(String::as_str)).collect::<Vec<_>>())
}

/// The line below a table. `to_root` is the path from the document to the repository.
fn measured_on(Machine { folder, origin, .. }: &Machine, to_root: &str) -> String {
    format!("Measured on: {origin} ([the runs]({to_root}{folder})).\n")
}

/// Times of one call on a CPU: ours and Candle's two implementations.
pub fn cpu(cpu: &Machine, to_root: &str) -> Result<String> {
    let call = Call {
        kind: "mha".to_string(),
        pass: String::new(),
        head_dim: 64,
        causal: true,
        batch: 1,
        seqlen: 2048,
        num_heads: 8,
        num_heads_k: 8,
    };
    let ms = |peer: &str, pass: &str| cpu.record.get(peer, &call.with_pass(pass))?.ms;
    let cell = |peer: &str, pass: &str| match (ms(peer, pass), ms("ours", pass)) {
        (Some(ms), _) if peer == "ours" => format!("{ms:.1} ms"),
        (Some(ms), Some(ours)) => format!("{ms:.0} ms, {:.1}x as long", ms / ours),
        _ => "has no backward".to_string(),
    };
    let mut table = head(&["causal, 2048 tokens, 8 heads of 64, f32", "forward", "forward + backward"]);
    for (peer, name) in [
        ("ours", "candle-fa2"),
        ("standard", "Candle: matmul, softmax, matmul"),
        ("candle_flash", "`candle_nn::attention::flash_attn`"),
    ] {
        table += &format!("| {name} | {} | {} |\n", cell(peer, "fwd"), cell(peer, "fwd+bwd"));
    }
    Ok(table + "\n" + &measured_on(cpu, to_root))
}

/// Ours and its ratio to FlashAttention-2, by head_dim, mask and pass, over the papers' grid.
pub fn speed(gpu: &Machine, seqlens: &[usize], to_root: &str) -> Result<String> {
    let mut table = head_by_seqlen(&["head_dim", "mask", "pass"], seqlens);
    for (pass, title) in PASSES {
        for head_dim in HEAD_DIMS {
            for (causal, mask) in MASKS {
                table += &format!("| {head_dim} | {mask} | {title} |");
                for &seqlen in seqlens {
                    let call = Call::of_the_grid(pass, head_dim, causal, seqlen);
                    let cell = gpu.record.tflops("ours", &call).zip(gpu.ratio("flash", &call));
                    let (ours, ratio) = cell.with_context(|| format!("no run has {call:?}"))?;
                    table += &format!(" {ours:.0}, {ratio:.2}x |");
                }
                table += "\n";
            }
        }
    }
    let means = PASSES.map(|(pass, _)| mean(&gpu.compared("flash", &["mha"], pass)).unwrap_or(f64::NAN));
    let shapes = gpu.compared("flash", &["mha"], "fwd").len();
    table += &format!(
        "\nGeometric mean of the ratios over the papers' grid, {shapes} shapes: {:.2} forward, {:.2} backward.\n",
        means[0], means[1]
    );
    Ok(table + &measured_on(gpu, to_root))
}

/// The table of README.md: both passes on a Hopper GPU.
pub fn front_page(gpu: &Machine) -> Result<String> {
    let seqlens = [1024, 4096, 16384];
    let mut table = head_by_seqlen(&COLUMNS, &seqlens);
    let mut notes = String::new();
    for pass in PASSES {
        table += &rows_with_the_fastest(gpu, pass, &HEAD_DIMS, &seqlens)?;
        let to = |(peer, name): (&str, &str)| {
            let mean = mean(&gpu.compared(peer, &["mha"], pass.0))?;
            Some(format!("{mean:.2}x {name}"))
        };
        let means: Vec<String> = PEERS.into_iter().filter_map(to).collect();
        notes += &format!("- {}: {}\n", pass.1, means.join(", "));
    }
    let shapes = gpu.compared("flash", &["mha"], "fwd").len();
    Ok(format!(
        "{table}\nOur speed relative to the fastest, geometric means over 512 to 16,384 tokens, by head_dim:\n\n{}\n\
         Our speed relative to each, geometric means over the {shapes} shapes of the papers' grid:\n\n{notes}\n{}",
        means_by_head_dim(gpu),
        measured_on(gpu, "")
    ))
}

/// Geometric means over all lengths of our speed relative to the fastest of the others.
fn means_by_head_dim(gpu: &Machine) -> String {
    let head_dims = HOPPER_HEAD_DIMS.map(|head_dim| head_dim.to_string());
    let columns: Vec<&str> = ["pass", "mask"].into_iter().chain(head_dims.iter().map(String::as_str)).collect();
    let mut table = head(&columns);
    for (pass, title) in PASSES {
        for (causal, mask) in MASKS {
            let cells = HOPPER_HEAD_DIMS.map(|head_dim| {
                let ratio = |seqlen| fastest(gpu, &call(pass, head_dim, causal, seqlen));
                let mean = geometric_mean(SEQLENS.into_iter().filter_map(ratio));
                mean.map_or("-".to_string(), |mean| format!("{mean:.2}x"))
            });
            table += &format!("| {title} | {mask} | {} |\n", cells.join(" | "));
        }
    }
    table
}

/// The highest rate of each head_dim in the forward as a share of the data sheet's, and the rate of a matrix product.
pub fn shares(gpu: &Machine) -> Result<String> {
    let peak = gpu.peak()?;
    let highest = |head_dim| {
        let calls =
            MASKS.into_iter().flat_map(|(causal, _)| SEQLENS.map(|seqlen| call("fwd", head_dim, causal, seqlen)));
        calls.filter_map(|call| gpu.record.tflops("ours", &call)).reduce(f64::max)
    };
    let share = |head_dim| Some(format!("{:.0}% at {head_dim}", 100.0 * highest(head_dim)? / peak));
    let shares: Vec<String> = HOPPER_HEAD_DIMS.into_iter().filter_map(share).collect();
    let (product, rows) = product(&gpu.record).context("no run has a matrix product")?;
    Ok(format!(
        "Of the data sheet's {peak:.0} TFLOP/s, the fastest call of each head_dim reaches {}. In the same run a product of two \
         matrices of {rows} x {rows} reached {product:.0} TFLOP/s (cuBLAS).\n",
        shares.join(", ")
    ))
}

/// One pass, every head_dim and length.
fn pass(gpu: &Machine, pass: (&str, &str), to_root: &str) -> Result<String> {
    let rows = rows_with_the_fastest(gpu, pass, &HOPPER_HEAD_DIMS, &SEQLENS)?;
    Ok(head_by_seqlen(&COLUMNS, &SEQLENS) + &rows + "\n" + &measured_on(gpu, to_root))
}

/// The forward of every head_dim and length.
pub fn forward(gpu: &Machine, to_root: &str) -> Result<String> {
    pass(gpu, PASSES[0], to_root)
}

/// The backward of every head_dim and length.
pub fn backward(gpu: &Machine, to_root: &str) -> Result<String> {
    pass(gpu, PASSES[1], to_root)
}

/// Both passes in f32.
pub fn f32(gpu: &Machine, to_root: &str) -> Result<String> {
    let mut table = head_by_seqlen(&COLUMNS, &SEQLENS);
    for pass in PASSES {
        table += &rows_with_the_fastest(gpu, pass, &HEAD_DIMS, &SEQLENS)?;
    }
    Ok(format!("{table}\n{}\n{}", ratios_to_each(gpu), measured_on(gpu, to_root)))
}

/// A call of the papers' grid; with 16 heads at head_dim 96 and 192, which the grid does not have.
fn call(pass: &str, head_dim: usize, causal: bool, seqlen: usize) -> Call {
    let of_grid = Call::of_the_grid(pass, head_dim, causal, seqlen);
    let num_heads = if HEAD_DIMS.contains(&head_dim) { of_grid.num_heads } else { 16 };
    Call { num_heads, num_heads_k: num_heads, ..of_grid }
}

/// Ours and its ratio to the fastest of the others.
fn rows_with_the_fastest(
    gpu: &Machine,
    (pass, title): (&str, &str),
    head_dims: &[usize],
    seqlens: &[usize],
) -> Result<String> {
    let mut rows = String::new();
    for &head_dim in head_dims {
        for (causal, mask) in MASKS {
            rows += &format!("| {title} | {} | {head_dim} | {mask} |", gpu.name);
            for &seqlen in seqlens {
                let call = call(pass, head_dim, causal, seqlen);
                let ours = gpu.record.tflops("ours", &call).with_context(|| format!("no run has {call:?}"))?;
                let ratio = fastest(gpu, &call).map_or(String::new(), |ratio| format!(", {ratio:.2}x"));
                rows += &format!(" {ours:.0}{ratio} |");
            }
            rows += "\n";
        }
    }
    Ok(rows)
}

/// Our speed relative to the fastest of the others that timed a call.
fn fastest(gpu: &Machine, call: &Call) -> Option<f64> {
    PEERS.iter().filter_map(|(peer, _)| gpu.ratio(peer, call)).min_by(f64::total_cmp)
}

/// Geometric mean and minimum of the ratios of `pass` to each of the others and to the fastest, by kind of call.
pub fn pass_summary(gpu: &Machine, pass: &str) -> Result<String> {
    let kinds = [
        (&["mha"][..], "papers' grid"),
        (&["gqa"], "GQA 32/8"),
        (&["varlen"], "packed, 29 sequences"),
        (&["varlen_gqa"], "packed and GQA"),
    ];
    let mut table = head(&[&["ours over, geometric mean (smallest)"][..], &kinds.map(|(_, name)| name)].concat());
    let cell = |compared: Vec<(Call, f64)>| {
        let text = |mean: f64| format!("{mean:.2} ({:.2}) of {}", smallest(&compared), compared.len());
        mean(&compared).map_or(String::new(), text)
    };
    for (peer, name) in PEERS {
        let cells = kinds.map(|(kinds, _)| cell(gpu.compared(peer, kinds, pass)));
        if cells.iter().any(|cell| !cell.is_empty()) {
            table += &format!("| {name} | {} |\n", cells.join(" | "));
        }
    }
    let of_fastest = |kinds: &[&str]| {
        let calls: BTreeSet<Call> =
            PEERS.iter().flat_map(|(peer, _)| gpu.compared(peer, kinds, pass)).map(|(call, _)| call).collect();
        cell(calls.into_iter().filter_map(|call| Some((call.clone(), fastest(gpu, &call)?))).collect())
    };
    table += &format!("| the fastest | {} |\n", kinds.map(|(kinds, _)| of_fastest(kinds)).join(" | "));
    Ok(table)
}

fn mean(compared: &[(Call, f64)]) -> Option<f64> {
    geometric_mean(compared.iter().map(|&(_, ratio)| ratio))
}

fn smallest(compared: &[(Call, f64)]) -> f64 {
    compared.iter().map(|&(_, ratio)| ratio).fold(f64::INFINITY, f64::min)
}

/// Geometric mean and minimum of the ratios to FlashAttention-2, by kind of call and pass.
pub fn summary(gpu: &Machine) -> Result<String> {
    let mut table = head(&["calls", "pass", "cells", "geometric mean", "smallest"]);
    for (kinds, name) in [
        (&["mha"][..], "the papers' grid"),
        (&["gqa"], "GQA 32/8"),
        (&["varlen", "varlen_gqa"], "packed, 29 sequences"),
    ] {
        table += &ratios_to(gpu, "flash", kinds, name);
    }
    Ok(table)
}

/// A line for each pass.
fn ratios_to(gpu: &Machine, peer: &str, kinds: &[&str], name: &str) -> String {
    let line = |(pass, title): (&str, &str)| {
        let compared = gpu.compared(peer, kinds, pass);
        let smallest = smallest(&compared);
        let line = |mean: f64| format!("| {name} | {title} | {} | {mean:.2} | {smallest:.2} |\n", compared.len());
        mean(&compared).map(line)
    };
    PASSES.into_iter().filter_map(line).collect()
}

/// The figures of the papers' grid, and our speed relative to each peer.
pub fn peers(gpu: &Machine) -> Result<String> {
    let figures = ["forward", "backward", "forward-backward"].map(|name| gpu.figure(name, ""));
    Ok(format!("{}\n{}", figures.join("\n"), ratios_to_each(gpu)))
}

/// Our speed over the papers' grid, relative to each of the others that ran.
fn ratios_to_each(gpu: &Machine) -> String {
    let lines: String = PEERS.iter().map(|(peer, name)| ratios_to(gpu, peer, &["mha"], name)).collect();
    head(&["ours over", "pass", "shapes", "geometric mean", "smallest"]) + &lines
}

/// Time of a forward + backward: ours, and standard attention's. Then means of time and memory.
pub fn standard(gpu: &Machine) -> Result<String> {
    let seqlens = SEQLENS.map(|seqlen| seqlen.to_string());
    let mut columns = vec!["head_dim", "mask"];
    columns.extend(seqlens.iter().map(String::as_str));
    let (mut table, mut times, mut peaks) = (String::new(), Vec::new(), Vec::new());
    for head_dim in HEAD_DIMS {
        for (causal, mask) in MASKS {
            let cells = SEQLENS.map(|seqlen| {
                let call = Call::of_the_grid("fwd+bwd", head_dim, causal, seqlen).with_kind("standard");
                let (ours, standard) = (gpu.record.ours_for(&call)?, gpu.record.get("standard", &call)?);
                let ours_ms = ours.ms?;
                let Some(ms) = standard.ms else { return Some(format!("{ours_ms:.2}, {}", standard.failure?)) };
                times.push(ms / ours_ms);
                peaks.extend(standard.peak_mib.zip(ours.peak_mib).map(|(theirs, ours)| theirs / ours));
                Some(format!("{ours_ms:.2}, {ms:.2}: {:.1}x", ms / ours_ms))
            });
            if cells.iter().any(Option::is_some) {
                let cells = cells.map(|cell| cell.unwrap_or_else(|| "-".to_string()));
                table += &format!("| {head_dim} | {mask} | {} |\n", cells.join(" | "));
            }
        }
    }
    let shapes = times.len();
    let Some((_, times)) = spread(&times) else { return Ok(String::new()) };
    let memory = spread(&peaks).map_or(String::new(), |(_, peaks)| format!(" and {peaks} as much memory"));
    Ok(format!(
        "{}{table}\nStandard attention takes {times} as long as ours{memory}: geometric mean (smallest to largest) over the {shapes} \
         shapes in which it ran.\n",
        head(&columns)
    ))
}

/// Peak memory of a forward + backward: ours, and standard attention's.
pub fn memory(gpu: &Machine) -> Result<String> {
    let alike = |call: &Call| (call.head_dim, call.causal, call.num_heads);
    let calls = || gpu.record.calls("ours").filter(|call| call.kind == "memory" && call.pass == "fwd+bwd");
    let seqlens: BTreeSet<usize> = calls().map(|call| call.seqlen).collect();
    let shapes: Vec<_> = calls().map(alike).collect::<BTreeSet<_>>().into_iter().collect();
    let here = |shape| calls().filter(|call| alike(call) == shape).cloned().collect::<Vec<Call>>();
    let cell = |seqlen: usize, shape| {
        let here = here(shape);
        let call = here.iter().find(|call| call.seqlen == seqlen)?;
        let (ours, standard) = (gpu.record.get("ours", call)?.peak_mib?, gpu.record.get("standard", call));
        // After a sequence has run out of memory, the bench tries no longer ones.
        let standard = match standard.map(|cost| (cost.peak_mib, cost.failure)) {
            Some((Some(peak), _)) => format!("{}: {:.1}x", mib(peak), peak / ours),
            Some((None, why)) => why?.to_string(),
            None => "-".to_string(),
        };
        Some(format!("{}, {standard}", mib(ours)))
    };
    let line = |&seqlen: &usize| {
        let cells: Vec<String> = shapes.iter().map(|&shape| cell(seqlen, shape).unwrap_or_default()).collect();
        format!("| {seqlen} | {} |\n", cells.join(" | "))
    };
    let lines: String = seqlens.iter().map(line).collect();
    let name = |&shape: &(usize, bool, usize)| {
        let here = here(shape);
        format!("{} heads of {}, {}{}", shape.2, shape.0, here[0].mask(), batches(&here))
    };
    let names: Vec<String> = shapes.iter().map(name).collect();
    let columns: Vec<&str> = ["seqlen"].into_iter().chain(names.iter().map(String::as_str)).collect();
    Ok(if lines.is_empty() { lines } else { gpu.figure("memory", "") + "\n" + &head(&columns) + &lines })
}

/// Rates with and without each idea of the paper at the longest sequence, and the mean ratio over all lengths.
pub fn ablations(gpu: &Machine) -> Result<String> {
    let record = &gpu.record;
    let mut shapes: Vec<_> = HEAD_DIMS.into_iter().flat_map(|head_dim| MASKS.map(|mask| (head_dim, mask))).collect();
    shapes.retain(|&(head_dim, _)| {
        variants(record).iter().any(|name| record.calls(name).any(|call| call.head_dim == head_dim))
    });
    let mut table = String::new();
    for variant in variants(record) {
        for (pass, title) in PASSES {
            let cell = |&(head_dim, (causal, _)): &(usize, (bool, &str))| {
                let of_it = |call: &Call| call.pass == pass && (call.head_dim, call.causal) == (head_dim, causal);
                let ratios: Vec<_> = ratios(record, variant, ABLATION).filter(|(call, _)| of_it(call)).collect();
                let longest = ratios.iter().map(|&(call, _)| call).max_by_key(|call| call.seqlen)?;
                let ours = baseline(record, variant, longest)?;
                let theirs = record.tflops(variant, longest)?;
                let mean = geometric_mean(ratios.iter().map(|&(_, ratio)| ratio))?;
                Some(format!("{ours:.0}, {theirs:.0}: {mean:.2}x"))
            };
            let cells: Vec<Option<String>> = shapes.iter().map(cell).collect();
            if cells.iter().any(Option::is_some) {
                let cells: Vec<String> = cells.into_iter().map(Option::unwrap_or_default).collect();
                table += &format!("| {} | {title} | {} |\n", variant_name(variant), cells.join(" | "));
            }
        }
    }
    let shapes: Vec<String> = shapes.iter().map(|(head_dim, (_, mask))| format!("{head_dim}, {mask}")).collect();
    let columns: Vec<&str> = ["variant", "pass"].into_iter().chain(shapes.iter().map(String::as_str)).collect();
    Ok(if table.is_empty() { table } else { gpu.figure("ablations", "") + "\n" + &head(&columns) + &table })
}

/// Rates with a thread block per tile of queries (backward: of keys), and with one per head.
pub fn heads(gpu: &Machine) -> Result<String> {
    let all: Vec<(&Call, f64)> = ratios(&gpu.record, HEADS_ONLY, BY_HEADS).collect();
    let Some(seqlen) = all.first().map(|(call, _)| call.seqlen) else { return Ok(String::new()) };
    let mut lines: BTreeMap<(bool, usize, bool), BTreeMap<usize, String>> = BTreeMap::new();
    for (call, ratio) in all.into_iter().filter(|(call, _)| call.seqlen == seqlen) {
        let tflops = |cost: Option<Cost>| cost.and_then(|cost| cost.tflops).unwrap_or(f64::NAN);
        let (ours, theirs) = (tflops(gpu.record.ours_for(call)), tflops(gpu.record.get(HEADS_ONLY, call)));
        let cells = lines.entry((call.pass == "bwd", call.head_dim, call.causal)).or_default();
        cells.insert(call.batch * call.num_heads, format!("{ours:.0}, {theirs:.0}: {ratio:.1}x"));
    }
    let blocks: BTreeSet<usize> = lines.values().flat_map(BTreeMap::keys).copied().collect();
    let mut columns = vec!["pass".to_string(), "head_dim".to_string(), "mask".to_string()];
    columns.extend(blocks.iter().map(usize::to_string));
    let mut table = head(&columns.iter().map(String::as_str).collect::<Vec<_>>());
    for ((backward, head_dim, causal), cells) in &lines {
        let (title, mask) = (if *backward { "backward" } else { "forward" }, if *causal { "causal" } else { "full" });
        let cells: String =
            blocks.iter().map(|at| format!(" {} |", cells.get(at).map_or("-", String::as_str))).collect();
        table += &format!("| {title} | {head_dim} | {mask} |{cells}\n");
    }
    Ok(gpu.figure("heads", "")
        + &format!("\nEach column is a number of batch x heads, at {seqlen} tokens:\n\n")
        + &table)
}

/// Whole training steps of the GPT example.
pub fn gpt(gpu: &Machine) -> Result<String> {
    const KINDS: [&str; 4] = ["flash", "standard", "standard-fused", "none"];
    const COLUMNS: [&str; 10] = [
        "layers",
        "width",
        "attention",
        "context",
        "batch",
        "ms_per_step",
        "tokens_per_s",
        "model_tflops",
        "mfu_percent",
        "peak_gib",
    ];
    type Row = HashMap<String, String>;
    let number = |row: &Row, column: &str| row[column].parse::<f64>().ok();
    let mut rows = gpu.rows("gpt", &COLUMNS)?;
    rows.sort_by_key(|row| {
        let size = |column: &str| row[column].parse::<usize>().unwrap_or_default();
        (size("layers"), size("context"), size("batch"), KINDS.iter().position(|kind| row["attention"] == *kind))
    });
    let line = |row: &Row| {
        let measured = |column: &str, digits: usize| {
            number(row, column).map_or(String::new(), |value| format!("{value:.digits$}"))
        };
        let ms = if number(row, "ms_per_step").is_some() { measured("ms_per_step", 1) } else { "out of memory".into() };
        let flash = rows.iter().find(|other| {
            other["attention"] == "flash" && ["layers", "context", "batch"].iter().all(|at| other[*at] == row[*at])
        });
        let ratio = flash
            .filter(|_| row["attention"] != "flash")
            .and_then(|flash| Some(format!("{:.1}x", number(flash, "tokens_per_s")? / number(row, "tokens_per_s")?)));
        format!(
            "| {} x {} | {} x {} | {} | {ms} | {} | {} | {} | {} | {} |\n",
            row["layers"],
            row["width"],
            row["batch"],
            row["context"],
            row["attention"],
            measured("tokens_per_s", 0),
            measured("model_tflops", 0),
            number(row, "mfu_percent").map_or(String::new(), |percent| format!("{percent:.0}%")),
            measured("peak_gib", 1),
            ratio.unwrap_or_default(),
        )
    };
    let lines: String = rows.iter().map(line).collect();
    let columns = [
        "layers x width",
        "batch x context",
        "attention",
        "ms a step",
        "tokens/s",
        "model TFLOP/s",
        "of the peak",
        "GiB at the peak",
        "flash over it",
    ];
    Ok(if lines.is_empty() { lines } else { head(&columns) + &lines })
}

/// Training steps of a GPT next to PyTorch's: tokens/s, and GiB at the peak.
pub fn gpt_peers(gpu: &Machine) -> Result<String> {
    const SHAPE: [&str; 4] = ["layers", "width", "context", "batch"];
    type Row = HashMap<String, String>;
    let of_ours = ["attention", "parameters", "mfu_percent", "tokens_per_s", "peak_gib"];
    let ours = gpu.rows("gpt", &[&SHAPE[..], &of_ours].concat())?;
    let peers = gpu.rows("gpt-peers", &[&SHAPE[..], &["peer", "tokens_per_s", "peak_gib"]].concat())?;
    let number =
        |row: &Row, column: &str| row[column].parse::<f64>().with_context(|| format!("{column} is {:?}", row[column]));
    let shape = |row: &Row| SHAPE.map(|column| row[column].clone());
    let mut lines = String::new();
    for row in peers.iter().filter(|row| row["peer"] == "compiled") {
        let alike: Vec<&Row> =
            ours.iter().filter(|ours| ours["attention"] == "flash" && shape(ours) == shape(row)).collect();
        let rates = alike.iter().map(|row| number(row, "tokens_per_s")).collect::<Result<Vec<f64>>>()?;
        let (Some(first), Some(rate)) = (alike.first(), median(rates)) else { continue };
        let peer = |name: &str| -> Result<String> {
            let Some(peer) = peers.iter().find(|peer| peer["peer"] == name && shape(peer) == shape(row)) else {
                return Ok("-".to_string());
            };
            let of_peer = number(peer, "tokens_per_s")?;
            Ok(format!("{of_peer:.0}, {:.2}x, {:.1} GiB", rate / of_peer, number(peer, "peak_gib")?))
        };
        lines += &format!(
            "| {:.0}M | {} x {} | {rate:.0}, {:.1} GiB | {} | {} | {:.0}% |\n",
            number(first, "parameters")? / 1e6,
            row["batch"],
            row["context"],
            number(first, "peak_gib")?,
            peer("compiled")?,
            peer("eager")?,
            number(first, "mfu_percent")?,
        );
    }
    let columns = ["parameters", "batch x context", "candle-fa2", "PyTorch compiled", "PyTorch eager", "MFU"];
    Ok(if lines.is_empty() { lines } else { head(&columns) + &lines })
}

/// Head sizes without tiles of their own: the speed in TFLOP/s, and the share of the speed of the size whose tiles they use, if each call
/// did as much work as one of that size. Then the fastest other implementation of the other sizes.
pub fn sizes(gpu: &Machine) -> Result<String> {
    const SEQLENS: [usize; 2] = [2048, 8192];
    // The next size that has tiles of its own, if there is one.
    const SIZES: [(usize, Option<usize>); 8] = [
        (36, Some(64)),
        (40, Some(64)),
        (72, Some(96)),
        (80, Some(96)),
        (100, Some(128)),
        (112, Some(128)),
        (160, Some(192)),
        (512, None),
    ];
    let mut table = head_by_seqlen(&["head_dim", "pass", "mask"], &SEQLENS);
    let record = &gpu.record;
    let kinds = SIZES.into_iter().map(|(head_dim, next)| ("mha", head_dim, next)).chain([("mha_v128", 192, None)]);
    for (kind, head_dim, next) in kinds {
        for (pass, name) in PASSES {
            for (causal, mask) in MASKS {
                let find = |peer: &str, head_dim: usize, seqlen: usize| {
                    let alike = |call: &&Call| {
                        (call.kind.as_str(), call.pass.as_str(), call.head_dim) == (kind, pass, head_dim)
                            && (call.causal, call.seqlen) == (causal, seqlen)
                    };
                    let cost = record.get(peer, record.calls(peer).find(alike)?)?;
                    cost.ms.zip(cost.tflops)
                };
                let cells = SEQLENS.map(|seqlen| {
                    let Some((ms, tflops)) = find("ours", head_dim, seqlen) else { return String::new() };
                    let theirs =
                        PEERS.into_iter().filter_map(|(peer, name)| Some((find(peer, head_dim, seqlen)?.0, name)));
                    match (
                        next.and_then(|next| find("ours", next, seqlen)),
                        theirs.min_by(|(a, _), (b, _)| a.total_cmp(b)),
                    ) {
                        (Some((of_next, _)), _) => format!("{tflops:.0}, {:.2}", of_next / ms),
                        (None, Some((theirs, name))) => format!("{tflops:.0}, {:.2}x {name}", theirs / ms),
                        (None, None) => format!("{tflops:.0}"),
                    }
                });
                let size = if kind == "mha" { head_dim.to_string() } else { format!("{head_dim}, of v 128") };
                table += &format!("| {size} | {name} | {mask} | {} |\n", cells.join(" | "));
            }
        }
    }
    Ok(table)
}

/// Tokens/s of the smallest model by context, with either attention.
pub fn training(gpu: &Machine) -> Result<String> {
    let rows = gpu.rows("gpt", &["layers", "attention", "context", "batch", "tokens_per_s"])?;
    let number = |row: &HashMap<String, String>, column: &str| row[column].parse::<usize>().unwrap_or_default();
    let Some(layers) = rows.iter().map(|row| number(row, "layers")).min() else { return Ok(String::new()) };
    // The shortest context has several batches. Take the one with as many tokens as the other contexts.
    let tokens = rows.iter().map(|row| number(row, "batch") * number(row, "context")).min();
    let rate = |attention: &str, context: usize| {
        let of_shape = |row: &&HashMap<String, String>| {
            row["attention"] == attention
                && number(row, "layers") == layers
                && number(row, "context") == context
                && Some(number(row, "batch") * context) == tokens
        };
        rows.iter().find(of_shape).map(|row| row["tokens_per_s"].parse::<f64>().ok())
    };
    let contexts: BTreeSet<usize> = rows.iter().map(|row| number(row, "context")).collect();
    let contexts: Vec<usize> =
        contexts.into_iter().filter(|&at| rate("flash", at).is_some() && rate("standard", at).is_some()).collect();
    let mut columns = vec!["attention".to_string()];
    columns.extend(contexts.iter().map(usize::to_string));
    let mut table = head(&columns.iter().map(String::as_str).collect::<Vec<_>>());
    for (attention, name) in [("flash", "candle-fa2"), ("standard", "Candle: matmul, softmax, matmul")] {
        let cells = contexts.iter().map(|&at| match rate(attention, at).flatten() {
            Some(slower) if attention != "flash" => {
                let ratio =
                    rate("flash", at).flatten().map_or(String::new(), |flash| format!(", {:.1}x", flash / slower));
                format!(" {slower:.0}{ratio} |")
            }
            Some(rate) => format!(" {rate:.0} |"),
            None => " out of memory |".to_string(),
        });
        table += &format!("| {name} |{}\n", cells.collect::<String>());
    }
    Ok(table)
}

/// The speed of training after each change.
pub fn gpt_steps(gpu: &Machine) -> Result<String> {
    let rows = gpu.rows("gpt-steps", &["change", "expected", "tokens_per_s"])?;
    let (mut table, mut before) = (String::new(), None);
    for row in &rows {
        let rate: f64 = row["tokens_per_s"].parse().with_context(|| format!("tokens_per_s of {:?}", row["change"]))?;
        let ratio = before.map_or(String::new(), |before: f64| format!("{:.2}x", rate / before));
        table += &format!("| {} | {} | {rate:.0} | {ratio} |\n", row["change"], row["expected"]);
        before = Some(rate);
    }
    Ok(if table.is_empty() { table } else { head(&["change", "expected", "tokens/s", "over the line above"]) + &table })
}
