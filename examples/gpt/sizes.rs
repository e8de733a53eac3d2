//! Refuses recipes that need more memory than the machine has, before anything is allocated. A failed allocation would end
//! the process.
//!
//! The estimate is a lower bound, so a recipe that fits is never refused. In five measurements the estimate was a sixth to a
//! half of the peak. It is computed in f64, so it does not overflow.

use crate::config::{AttentionKind, Config};
use crate::model::parameter_shapes;
use anyhow::{bail, Result};
use candle_core::Device;
use std::fs;

/// More bytes than a process can address on any machine.
const ADDRESSABLE: f64 = (1u64 << 48) as f64;

/// A parameter and its two moments, f32.
const BYTES_PER_PARAMETER: f64 = 12.0;

/// A token and its target, u32.
const BYTES_PER_TOKEN: f64 = 8.0;

/// Elements that a block keeps per token for the backward, in units of the model's width. These are its input, q, k, v, and
/// four each before and after the GELU. The real number is a bit larger.
const KEPT_WIDTHS: f64 = 12.0;

const GIB: f64 = (1u64 << 30) as f64;

/// Checks that training with `config` can fit into `memory` bytes.
pub fn check(config: &Config, memory: f64) -> Result<()> {
    let needed = needed(config);
    if needed > memory {
        let Config { batch, context, accumulation, .. } = config;
        bail!(
            "this needs at least {:.1} GiB of memory, but only {:.1} GiB can be used; lower --batch {batch}, --context \
             {context} or --accumulation {accumulation}, or take a smaller --preset",
            needed / GIB,
            memory / GIB
        );
    }
    Ok(())
}

/// The bytes that training with `config` needs at once: parameters, tokens of a step, and activations of a batch.
fn needed(config: &Config) -> f64 {
    let [context, batch, accumulation, num_layers, num_heads, embed_dim] =
        [config.context, config.batch, config.accumulation, config.num_layers, config.num_heads, config.embed_dim]
            .map(|size| size as f64);
    let shapes = parameter_shapes(config, config.tokenizer.padded_vocab_size());
    let parameters: f64 = shapes.values().map(|shape| shape.iter().map(|&size| size as f64).product::<f64>()).sum();
    let scores = match config.attention {
        AttentionKind::Standard => num_heads * context,
        AttentionKind::Flash | AttentionKind::None => 0.0,
    };
    let of_block = KEPT_WIDTHS * embed_dim + scores;
    let kept_per_token = match config.checkpoint_activations {
        true => num_layers * embed_dim + of_block, // the inputs of all blocks, and the block that is computed again
        false => num_layers * of_block,
    };
    BYTES_PER_PARAMETER * parameters
        + BYTES_PER_TOKEN * accumulation * batch * context
        + config.precision.dtype().size_in_bytes() as f64 * kept_per_token * batch * context
}

/// Bytes that a run on `device` cannot exceed: on a CPU the memory and swap that this process can use. For a GPU, or if the
/// system does not say, this is only the limit of addresses. The driver of a GPU reports an error when memory runs out.
pub fn memory_of(device: &Device) -> f64 {
    let read = |path| fs::read_to_string(path).unwrap_or_default();
    // The limits of a container: cgroups version 2, then version 1.
    let limits = ["/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"].map(read);
    match device.is_cpu() {
        true => memory_said(&read("/proc/meminfo"), &limits),
        false => ADDRESSABLE,
    }
}

/// The memory of this process, from the text of `/proc/meminfo` and the texts of the files with a container's limits.
pub fn memory_said(meminfo: &str, limits: &[String]) -> f64 {
    let kib = |name: &str| -> Option<f64> {
        meminfo.lines().find_map(|line| line.strip_prefix(name))?.trim().strip_suffix("kB")?.trim().parse().ok()
    };
    let Some(total) = kib("MemTotal:") else { return ADDRESSABLE };
    let limits = limits.iter().filter_map(|limit| limit.trim().parse::<f64>().ok()); // "max" is not a number: no limit
    limits.fold(1024.0 * total, f64::min) + 1024.0 * kib("SwapTotal:").unwrap_or(0.0)
}
