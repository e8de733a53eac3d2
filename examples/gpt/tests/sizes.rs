//! Recipes that need too much memory are refused with one sentence. Recipes that fit are not refused.

use super::{message, Room};
use crate::config::{AttentionKind, Config, Precision, Preset};
use crate::sizes::{check_sampling, check_timing, check_training, memory_said};
use crate::time::Plan;
use anyhow::Result;

const MIB: f64 = (1 << 20) as f64;
const GIB: f64 = (1 << 30) as f64;
const MOST: &str = "18446744073709551615";

fn plan(warmup: usize, steps: usize) -> Plan {
    Plan { steps, warmup, peak_tflops: None, profile: false }
}

#[test]
fn too_much_memory_is_an_error() {
    let say = |checked: Result<()>| checked.unwrap_err().to_string();
    let tiny = Config::preset(Preset::Tiny);
    assert_eq!(
        say(check_training(&Config { batch: 1_000_000, ..tiny.clone() }, 16.0 * GIB)),
        "this needs at least 2930.7 GiB of memory (2929.7 GiB for the activations), but only 16.0 GiB can be used; \
         lower --batch 1000000 or --context 128, or take a smaller --preset"
    );
    assert_eq!(
        say(check_training(&Config { accumulation: usize::MAX, ..tiny.clone() }, 16.0 * GIB)),
        "this needs at least 1e14 GiB of memory (1e14 GiB for the tokens), but only 16.0 GiB can be used; \
         lower --accumulation 18446744073709551615 or --batch 8 or --context 128"
    );
    assert_eq!(
        say(check_training(&Config { batch: 1, context: 128, ..Config::preset(Preset::Gpt1300m) }, 8.0 * GIB)),
        "this needs at least 14.9 GiB of memory (14.7 GiB for the parameters), but only 8.0 GiB can be used; \
         lower --context 128, or take a smaller --preset"
    );
    assert_eq!(
        say(check_timing(&tiny, &plan(usize::MAX, usize::MAX), 16.0 * GIB)),
        "this needs at least 3e14 GiB of memory (3e14 GiB for the tokens), but only 16.0 GiB can be used; \
         lower --steps 18446744073709551615 or --warmup 18446744073709551615 or --accumulation 1 or --batch 8 or \
         --context 128"
    );
    assert_eq!(
        say(check_sampling(usize::MAX, 16.0 * GIB)),
        "this needs at least 1e11 GiB of memory (1e11 GiB for the text), but only 16.0 GiB can be used; \
         lower --tokens 18446744073709551615"
    );
    let standard = Config { attention: AttentionKind::Standard, batch: 1, context: 65_536, ..tiny.clone() };
    // Standard attention stores the scores of all queries and keys. Flash attention does not.
    assert_eq!(
        say(check_training(&standard, 16.0 * GIB)),
        "this needs at least 257.6 GiB of memory (257.5 GiB for the activations), but only 16.0 GiB can be used; \
         lower --batch 1 or --context 65536, or take a smaller --preset"
    );
    let flash = Config { attention: AttentionKind::Flash, ..standard.clone() };
    check_training(&flash, 16.0 * GIB).unwrap();
    let all = Config { context: usize::MAX, batch: usize::MAX, accumulation: usize::MAX, ..standard };
    assert!(say(check_timing(&all, &plan(usize::MAX, usize::MAX), 16.0 * GIB)).contains("for the tokens"));
}

/// The command line refuses them too, before anything is allocated or written.
#[test]
fn absurd_options_are_refused() {
    let room = Room::new();
    let (text, out) = (room.string("text.txt"), room.string("out"));
    let train = ["train", "--data", &text, "--out", &out];
    let refused = |args: &[&str], way_out: &str| {
        let said = message(args);
        assert!(said.starts_with("this needs at least ") && said.contains(way_out), "{args:?}: {said}");
    };
    for option in ["--batch", "--context", "--accumulation"] {
        refused(&[&train[..], &[option, MOST]].concat(), &format!("{option} {MOST}"));
    }
    assert!(!room.path("out").exists());
    for option in ["--batch", "--context", "--accumulation", "--steps", "--warmup"] {
        refused(&["time", option, MOST], &format!("{option} {MOST}"));
    }
    refused(&["sample", "--tokens", MOST], &format!("lower --tokens {MOST}"));
}

/// The estimate is below the measured peak of resident memory, but not far below: `gpt time --steps 1 --warmup 1` on a CPU.
#[test]
fn what_fits_is_not_refused() -> Result<()> {
    let tiny = Config::preset(Preset::Tiny);
    let standard = Config { attention: AttentionKind::Standard, batch: 4, context: 512, ..tiny.clone() };
    let bf16 = Config { attention: AttentionKind::None, precision: Precision::Bf16, batch: 64, ..tiny.clone() };
    let small = Config { batch: 1, accumulation: 1, context: 256, ..Config::preset(Preset::Gpt124m) };
    let peaks = [
        (Config { batch: 64, ..tiny.clone() }, 415.7),
        (Config { batch: 8, context: 1024, ..tiny }, 415.4),
        (standard, 676.7),
        (bf16, 226.8),
        (small, 4934.8),
    ];
    for (config, mib) in &peaks {
        check_timing(config, &plan(1, 1), mib * MIB)?;
        assert!(check_timing(config, &plan(1, 1), 0.15 * mib * MIB).is_err(), "{config:?}");
    }
    Ok(())
}

#[test]
fn memory_is_what_the_system_and_the_container_allow() {
    let meminfo = "MemTotal:       16777216 kB\nMemFree:  1 kB\nSwapTotal:       1048576 kB\n";
    let limits = |limit: &str| [limit.to_string(), String::new()];
    assert_eq!(memory_said(meminfo, &limits("")), 17.0 * GIB);
    assert_eq!(memory_said(meminfo, &limits("max\n")), 17.0 * GIB);
    assert_eq!(memory_said(meminfo, &limits("4294967296\n")), 5.0 * GIB);
    assert_eq!(memory_said(meminfo, &limits("9223372036854771712\n")), 17.0 * GIB);
    assert_eq!(memory_said("", &limits("4294967296\n")), (1u64 << 48) as f64, "the system does not say");
}
