//! Refuses recipes that need more memory than the machine has, before anything is allocated. A failed allocation would end
//! the process.
//!
//! The estimate is a lower bound, so a recipe that fits is never refused. In five measurements the estimate was a sixth to a
//! half of the peak. It is computed in f64, so it does not overflow. An accepted recipe needs at most `ADDRESSABLE` bytes, so
//! the products of its sizes fit a usize.

use crate::config::{AttentionKind, Config};
use crate::model::parameter_shapes;
use crate::time::Plan;
use crate::tokenizer::Tokenizer;
use anyhow::{bail, Result};
use candle_core::Device;
use std::fs;

/// More bytes than a process can address on any machine.
const ADDRESSABLE: f64 = (1u64 << 48) as f64;

/// A parameter and its two moments, f32.
const BYTES_PER_PARAMETER: f64 = 12.0;

/// A token and its target, u32.
const BYTES_PER_TOKEN: f64 = 8.0;

/// A sampled token is stored twice as u32: in the list of tokens, and in the result.
const BYTES_PER_SAMPLED_TOKEN: f64 = 8.0;

/// Elements that a block keeps per token for the backward, in units of the model's width. These are its input, q, k, v, and
/// four each before and after the GELU. The real number is a bit larger.
const KEPT_WIDTHS: f64 = 12.0;

/// Memory for one purpose, and how the user can reduce it.
struct Need {
    bytes: f64,
    what: &'static str,
    way_out: String,
}

/// Checks that training with `config` can fit into `memory` bytes.
pub fn check_training(config: &Config, memory: f64) -> Result<()> {
    fits(&training(config, &[]), memory)
}

/// Checks that a measurement can fit into `memory` bytes. A measurement draws the tokens of all steps first.
pub fn check_timing(config: &Config, plan: &Plan, memory: f64) -> Result<()> {
    fits(&training(config, &[("--steps", plan.steps), ("--warmup", plan.warmup)]), memory)
}

/// Checks that `tokens` sampled tokens can fit into `memory` bytes.
pub fn check_sampling(tokens: usize, memory: f64) -> Result<()> {
    let bytes = BYTES_PER_SAMPLED_TOKEN * tokens as f64;
    fits(&[Need { bytes, what: "the text", way_out: format!("lower --tokens {tokens}") }], memory)
}

/// The memory that training needs at once. A measurement draws the tokens of all steps first; `steps` are the options with
/// the number of these steps. If `steps` is empty, the tokens of one step are in memory.
fn training(config: &Config, steps: &[(&str, usize)]) -> Vec<Need> {
    let number = |number: usize| number as f64;
    let Config { context, batch, accumulation, num_layers, num_heads, embed_dim, .. } = *config;
    let vocab_size = Tokenizer::new(config.tokenizer).padded_vocab_size();
    let shapes = parameter_shapes(config, vocab_size);
    let parameters: f64 = shapes.values().map(|shape| shape.iter().map(|&n| number(n)).product::<f64>()).sum();

    let steps_at_once = steps.iter().map(|&(_, steps)| number(steps)).sum::<f64>().max(1.0);
    let batch_tokens = number(batch) * number(context);
    let scores = match config.attention {
        AttentionKind::Standard => number(num_heads) * number(context),
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
            "this needs at least {} of memory ({} for {what}), but only {} can be used; {way_out}",
            gib(total),
            gib(*bytes),
            gib(memory)
        ),
        _ => Ok(()),
    }
}

/// `bytes` as text for an error.
fn gib(bytes: f64) -> String {
    match bytes / f64::from(1 << 30) {
        gib if gib < 1e6 => format!("{gib:.1} GiB"),
        gib => format!("{gib:.0e} GiB"),
    }
}

/// Bytes that a run on `device` cannot exceed. For a GPU this is only the limit of addresses, because its driver reports an
/// error when memory runs out.
pub fn memory_of(device: &Device) -> f64 {
    match device.is_cpu() {
        true => memory(),
        false => ADDRESSABLE,
    }
}

/// Bytes of memory and swap that this process can use, or `ADDRESSABLE` if the system does not say.
pub fn memory() -> f64 {
    let read = |path| fs::read_to_string(path).unwrap_or_default();
    // The limits of a container: cgroups version 2, then version 1.
    let limits = ["/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"].map(read);
    memory_said(&read("/proc/meminfo"), &limits)
}

/// [`memory`], from the text of `/proc/meminfo` and the texts of the files with a container's limits.
pub fn memory_said(meminfo: &str, limits: &[String]) -> f64 {
    let kib = |name: &str| -> Option<f64> {
        meminfo.lines().find_map(|line| line.strip_prefix(name))?.trim().strip_suffix("kB")?.trim().parse().ok()
    };
    let Some(total) = kib("MemTotal:") else { return ADDRESSABLE };
    let limits = limits.iter().filter_map(|limit| limit.trim().parse::<f64>().ok()); // "max" is not a number: no limit
    limits.fold(1024.0 * total, f64::min) + 1024.0 * kib("SwapTotal:").unwrap_or(0.0)
}
