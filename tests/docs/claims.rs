//! Compares the papers' claims with the newest record of each GPU.

use super::records::Machine;
use anyhow::{Context, Result};
use figures::record::Call;
use figures::{data_sheet, geometric_mean, ratios, ABLATION, BY_HEADS, FULL_GPU, HEADS_ONLY, HEAD_DIMS};
use figures::{PAPER_BACKWARD_SHARE, PAPER_FORWARD_SHARE, SEQLENS};

struct Claim {
    paper: &'static str,
    here: String,
    holds: bool,
}

/// A line for each claim that the record has rows for.
pub fn table(gpu: &Machine) -> Result<String> {
    let mut claims = Vec::new();
    for (pass, title) in [("fwd", "forward"), ("bwd", "backward, the main kernel alone")] {
        let all = || ratios(&gpu.record, "ablation_flash1", ABLATION).filter(|(call, _)| call.pass == pass);
        let full = spread(all().filter(|(call, _)| call.batch * call.num_heads >= FULL_GPU).map(|(_, ratio)| ratio));
        let any = spread(all().map(|(_, ratio)| ratio));
        claims.extend(full.zip(any).map(|((mean, full), (_, any))| Claim {
            paper: "1.7 to 3.0 times as fast as FlashAttention",
            here: format!(
                "{full} over our kernels in the manner of FlashAttention-1 where batch x heads fills the GPU ({FULL_GPU} and \
                 more), {any} over all lengths; {title}"
            ),
            holds: mean >= 1.7,
        }));
    }
    claims.extend(standard(gpu));
    let name = format!("NVIDIA {}", gpu.name);
    let peak = data_sheet::tflops(&name).with_context(|| format!("crates/figures has no data sheet of {name}"))?;
    claims.extend(rates(gpu, peak));
    claims.extend(causal(gpu));
    claims.extend(heads(gpu));
    claims.extend(memory(gpu));
    claims.extend(training(gpu, peak)?);
    let lines = claims
        .iter()
        .map(|Claim { paper, here, holds }| format!("| {paper} | {here} | {} |\n", if *holds { "yes" } else { "no" }));
    let lines: String = lines.collect();
    let head = "| the paper | here | holds |\n| --- | --- | --- |\n";
    Ok(if lines.is_empty() { lines } else { head.to_string() + &lines })
}

/// The geometric mean, and a text with the mean, and with the smallest and the largest value if they differ.
fn spread(values: impl Iterator<Item = f64>) -> Option<(f64, String)> {
    let values: Vec<f64> = values.collect();
    let mean = geometric_mean(values.iter().copied())?;
    let (least, most) =
        (values.iter().fold(f64::MAX, |a, &b| a.min(b)), values.iter().fold(f64::MIN, |a, &b| a.max(b)));
    let words =
        if most - least < 0.1 { format!("{mean:.1}x") } else { format!("{mean:.1}x ({least:.1} to {most:.1})") };
    Some((mean, words))
}

/// The calls of the papers' grid.
fn grid(pass: &'static str) -> impl Iterator<Item = Call> {
    let masks = [false, true].into_iter();
    let shapes = masks.flat_map(|causal| HEAD_DIMS.map(|hdim| (causal, hdim)));
    shapes.flat_map(move |(causal, hdim)| SEQLENS.map(|seqlen| Call::of_the_grid(pass, hdim, causal, seqlen)))
}

fn standard(gpu: &Machine) -> Option<Claim> {
    let ratio = |call: Call| {
        let call = call.with_kind("standard");
        Some(gpu.record.get("standard", &call)?.ms? / gpu.record.ours_for(&call)?.ms?)
    };
    let times: Vec<f64> = grid("fwd+bwd").filter_map(ratio).collect();
    let shapes = times.len();
    let (mean, spread) = spread(times.into_iter())?;
    let paper = "3 to 10 times as fast as standard attention";
    let here = format!("{spread} over Candle's, forward + backward, {shapes} shapes");
    Some(Claim { paper, here, holds: mean >= 3.0 })
}

/// The claims about the highest rates.
fn rates(gpu: &Machine, peak: f64) -> Vec<Claim> {
    let highest = |pass| grid(pass).filter_map(|call| gpu.record.tflops("ours", &call)).reduce(f64::max);
    let of_product = |rate: f64| {
        let share =
            |product: f64| format!(", {:.0}% of the rate of a matrix product, {product:.0}", 100.0 * rate / product);
        let product = gpu.record.calls("ceiling").find(|call| call.kind == "matmul8192");
        product.and_then(|call| gpu.record.tflops("ceiling", call)).map_or(String::new(), share)
    };
    let share = |pass, least: f64, paper| {
        let claim = |rate: f64| Claim {
            paper,
            here: format!(
                "{rate:.0} TFLOP/s: {:.0}% of the data sheet's peak{}",
                100.0 * rate / peak,
                of_product(rate)
            ),
            holds: rate / peak >= least,
        };
        highest(pass).map(claim)
    };
    let both = highest("fwd+bwd").map(|rate| Claim {
        paper: "up to 335 TFLOP/s forward + backward on an H100",
        here: format!("up to {rate:.0} TFLOP/s"),
        holds: rate.round() >= 335.0,
    });
    let forward = share("fwd", PAPER_FORWARD_SHARE, "forward up to 73% of the peak (of an A100)");
    let backward = share("bwd", PAPER_BACKWARD_SHARE, "backward up to 63% of the peak (of an A100)");
    [both, forward, backward].into_iter().flatten().collect()
}

fn causal(gpu: &Machine) -> Option<Claim> {
    let ms = |hdim, causal| gpu.record.get("ours", &Call::of_the_grid("fwd", hdim, causal, 16384))?.ms;
    let (mean, spread) = spread(HEAD_DIMS.into_iter().filter_map(|hdim| Some(ms(hdim, false)? / ms(hdim, true)?)))?;
    Some(Claim {
        paper: "a causal mask, by skipping hidden blocks, is 1.7 to 1.8 times as fast as none",
        here: format!("{spread} at 16k tokens, forward"),
        holds: mean >= 1.7,
    })
}

fn heads(gpu: &Machine) -> Option<Claim> {
    let blocks = |call: &Call| call.batch * call.num_heads;
    let fewest = ratios(&gpu.record, HEADS_ONLY, BY_HEADS).map(|(call, _)| blocks(call)).min()?;
    let of_few =
        ratios(&gpu.record, HEADS_ONLY, BY_HEADS).filter(|(call, _)| blocks(call) == fewest).map(|(_, ratio)| ratio);
    let (mean, spread) = spread(of_few)?;
    Some(Claim {
        paper: "parallel over the sequence too: faster where batch x heads is small",
        here: format!("{spread} at batch x heads = {fewest}"),
        holds: mean > 1.0,
    })
}

fn memory(gpu: &Machine) -> Option<Claim> {
    let calls = gpu.record.calls("ours").filter(|call| call.kind == "memory" && call.pass == "fwd+bwd");
    let longer = calls.max_by_key(|call| call.seqlen)?;
    let shorter = Call { seqlen: longer.seqlen / 2, ..longer.clone() };
    let growth = |peer: &str, longer: &Call, shorter: &Call| {
        Some(gpu.record.get(peer, longer)?.peak_mib? / gpu.record.get(peer, shorter)?.peak_mib?)
    };
    let ours = growth("ours", longer, &shorter)?;
    Some(Claim {
        paper: "memory grows with the sequence, not with its square",
        here: format!("{ours:.2}x from {} to {} tokens", shorter.seqlen, longer.seqlen),
        holds: ours < 2.2,
    })
}

fn training(gpu: &Machine, peak: f64) -> Result<Vec<Claim>> {
    let rows = gpu.rows("gpt", &["parameters", "attention", "context", "batch", "tokens_per_s", "model_tflops"])?;
    let mut claims = Vec::new();
    let number = |row: &std::collections::HashMap<String, String>, column: &str| row[column].parse::<f64>().ok();
    let flash = rows.iter().filter(|row| row["attention"] == "flash");
    let ratios = flash.clone().filter_map(|row| {
        let alike = |other: &&std::collections::HashMap<String, String>| {
            other["attention"] == "standard"
                && ["parameters", "context", "batch"].iter().all(|column| other[*column] == row[*column])
        };
        let standard = rows.iter().filter(alike).filter_map(|row| number(row, "tokens_per_s")).reduce(f64::max)?;
        Some(number(row, "tokens_per_s")? / standard)
    });
    claims.extend(spread(ratios).map(|(mean, spread)| Claim {
        paper: "GPT training 2.8 times as fast as without it",
        here: format!("{spread} over Candle's standard attention, tokens/s"),
        holds: mean >= 2.8,
    }));
    let fastest = flash.filter_map(|row| number(row, "model_tflops")).reduce(f64::max);
    claims.extend(fastest.map(|rate| Claim {
        paper: "GPT training at up to 225 TFLOP/s, 72% of the peak (of an A100)",
        here: format!("up to {rate:.0} TFLOP/s, {:.0}% of the data sheet's peak", 100.0 * rate / peak),
        holds: rate >= 0.72 * peak,
    }));
    Ok(claims)
}
