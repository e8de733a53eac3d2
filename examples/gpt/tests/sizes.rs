//! Recipes that need too much memory are refused with one sentence. Recipes that fit are not refused.

use super::{message, Room};
use crate::config::{AttentionKind, Config, Precision, Preset};
use crate::sizes::{check, memory_said};
use anyhow::Result;

const MIB: f64 = (1 << 20) as f64;
const GIB: f64 = (1 << 30) as f64;
const MOST: &str = "18446744073709551615";

#[test]
fn too_much_memory_is_an_error() {
    let say = |config: Config, gib: f64| check(&config, gib * GIB).unwrap_err().to_string();
    let tiny = Config::preset(Preset::Tiny);
    assert_eq!(
        say(Config { batch: 1_000_000, ..tiny.clone() }, 16.0),
        "this needs at least 2930.7 GiB of memory, but only 16.0 GiB can be used; lower --batch 1000000, --context 128 or \
         --accumulation 1, or take a smaller --preset"
    );
    let checkpointed = Config { batch: 1_000_000, checkpoint_activations: true, ..tiny.clone() };
    assert!(say(checkpointed, 16.0).starts_with("this needs at least 977.5 GiB of memory, but"));
    let parameters = Config { batch: 1, context: 128, accumulation: 1, ..Config::preset(Preset::Gpt1300m) };
    assert!(say(parameters, 8.0).starts_with("this needs at least 14.9 GiB of memory, but"));
    let standard = Config { attention: AttentionKind::Standard, batch: 1, context: 65_536, ..tiny };
    // Standard attention stores the scores of all queries and keys. Flash attention does not.
    assert!(say(standard.clone(), 16.0).starts_with("this needs at least 257.6 GiB of memory, but"));
    check(&Config { attention: AttentionKind::Flash, ..standard.clone() }, 16.0 * GIB).unwrap();
    say(Config { context: usize::MAX, batch: usize::MAX, accumulation: usize::MAX, ..standard }, 16.0);
}

/// The command line refuses them too, before anything is allocated or written.
#[test]
fn absurd_options_are_refused() {
    let room = Room::new();
    let (text, out) = (room.string("text.txt"), room.string("out"));
    let train = ["train", "--data", &text, "--out", &out];
    for command in [&train[..], &["time"]] {
        for option in ["--batch", "--context", "--accumulation"] {
            let said = message(&[command, &[option, MOST]].concat());
            assert!(
                said.starts_with("this needs at least ") && said.contains(&format!("{option} {MOST}")),
                "{option}: {said}"
            );
        }
    }
    assert!(!room.path("out").exists());
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
        check(config, mib * MIB)?;
        assert!(check(config, 0.15 * mib * MIB).is_err(), "{config:?}");
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
