//! Recipes that no memory holds are refused before anything is allocated: an allocation that fails ends the process.
//!
//! What is counted here is a lower bound, so that nothing is refused that fits: a sixth to a half of five measured peaks.
//! Sums and products are f64, which do not overflow. A recipe that passes has at most `ADDRESSABLE` bytes of anything, so
//! that its products of sizes fit a usize.

use crate::config::{AttentionKind, Config};
use crate::model::parameter_shapes;
use crate::time::Plan;
use crate::tokenizer::Tokenizer;
use anyhow::{bail, Result};
use candle_core::Device;
use std::fs;

/// More than a process can address on any machine.
const ADDRESSABLE: f64 = (1u64 << 48) as f64;

/// A parameter and its two moments, f32.
const BYTES_PER_PARAMETER: f64 = 12.0;

/// A token and its target, u32.
const BYTES_PER_TOKEN: f64 = 8.0;

/// A sampled token is there twice: where it was drawn, and in the answer, u32 both.
const BYTES_PER_SAMPLED_TOKEN: f64 = 8.0;

/// Numbers, in units of the model's width, that a block keeps for the backward of one token: its input, q, k, v, and four
/// each before and after the GELU. It keeps a few more.
const KEPT_WIDTHS: f64 = 12.0;

/// Memory that something takes, and how the user can make it less.
struct Need {
    bytes: f64,
    what: &'static str,
    way_out: String,
}

/// Checks that training by `config` can fit into `memory` bytes.
pub fn check_training(config: &Config, memory: f64) -> Result<()> {
    fits(&training(config, &[]), memory)
}

/// Checks that a measurement can fit into `memory` bytes: all its tokens are drawn beforehand.
pub fn check_timing(config: &Config, plan: &Plan, memory: f64) -> Result<()> {
    fits(&training(config, &[("--steps", plan.steps), ("--warmup", plan.warmup)]), memory)
}

/// Checks that `tokens` sampled tokens can fit into `memory` bytes.
pub fn check_sampling(tokens: usize, memory: f64) -> Result<()> {
    let bytes = BYTES_PER_SAMPLED_TOKEN * tokens as f64;
    fits(&[Need { bytes, what: "the text", way_out: format!("lower --tokens {tokens}") }], memory)
}

/// What training keeps in memory at once. `steps` are those whose tokens are there together, one if there are none.
fn training(config: &Config, steps: &[(&str, usize)]) -> Vec<Need> {
    let number = |number: usize| number as f64;
    let Config { context, batch, accumulation, num_layers, num_heads, embed_dim, .. } = *config;
    let vocab_size = Tokenizer::new(config.tokenizer).padded_vocab_size();
    let shapes = parameter_shapes(config, vocab_size);
    let parameters: f64 = shapes.values().map(|shape| shape.iter().map(|&n| number(n)).product::<f64>()).sum();

    let steps_at_once = steps.iter().map(|&(_, steps)| number(steps)).sum::<f64>().max(1.0);
    let batch_tokens = number(batch) * number(context);
    let scores = match config.attention {
        AttentionKind::Standard | AttentionKind::StandardFused => number(num_heads) * number(context),
        AttentionKind::Flash | AttentionKind::None => 0.0,
    };
    let kept = number(num_layers) * (KEPT_WIDTHS * number(embed_dim) + scores); // numbers per token

    let window = format!("--batch {batch} or --context {context}");
    let steps: String = steps.iter().map(|(option, steps)| format!("{option} {steps} or ")).collect();
    vec![
        Need {
            bytes: BYTES_PER_PARAMETER * parameters,
            what: "the parameters",
            way_out: format!("lower --context {context}, or take a smaller --preset"),
        },
        Need {
            bytes: BYTES_PER_TOKEN * steps_at_once * number(accumulation) * batch_tokens,
            what: "the tokens",
            way_out: format!("lower {steps}--accumulation {accumulation} or {window}"),
        },
        Need {
            bytes: config.precision.dtype().size_in_bytes() as f64 * kept * batch_tokens,
            what: "the activations",
            way_out: format!("lower {window}, or take a smaller --preset"),
        },
    ]
}

/// Fails if `needs` together exceed `memory` bytes.
fn fits(needs: &[Need], memory: f64) -> Result<()> {
    let total: f64 = needs.iter().map(|need| need.bytes).sum();
    match needs.iter().max_by(|a, b| a.bytes.total_cmp(&b.bytes)) {
        Some(Need { bytes, what, way_out }) if total > memory => bail!(
            "this takes at least {} of memory, {} of them for {what}, and there are {}; {way_out}",
            gib(total),
            gib(*bytes),
            gib(memory)
        ),
        _ => Ok(()),
    }
}

/// As an error shows it.
fn gib(bytes: f64) -> String {
    match bytes / f64::from(1 << 30) {
        gib if gib < 1e6 => format!("{gib:.1} GiB"),
        gib => format!("{gib:.0e} GiB"),
    }
}

/// Bytes that a run on `device` cannot exceed. A GPU's driver says itself when its memory does not suffice.
pub fn memory_of(device: &Device) -> f64 {
    match device.is_cpu() {
        true => memory(),
        false => ADDRESSABLE,
    }
}

/// Bytes of memory and swap that this process may use, where the system says so.
pub fn memory() -> f64 {
    let read = |path| fs::read_to_string(path).unwrap_or_default();
    // Of a container: cgroups of version 2, then of version 1.
    let limits = ["/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"].map(read);
    memory_said(&read("/proc/meminfo"), &limits)
}

/// [`memory`], of what the system says: the text of `/proc/meminfo`, and those that hold a container's limit.
pub fn memory_said(meminfo: &str, limits: &[String]) -> f64 {
    let kib = |name: &str| -> Option<f64> {
        meminfo.lines().find_map(|line| line.strip_prefix(name))?.trim().strip_suffix("kB")?.trim().parse().ok()
    };
    let Some(total) = kib("MemTotal:") else { return ADDRESSABLE };
    let limits = limits.iter().filter_map(|limit| limit.trim().parse::<f64>().ok()); // "max" is no number
    limits.fold(1024.0 * total, f64::min) + 1024.0 * kib("SwapTotal:").unwrap_or(0.0)
}
