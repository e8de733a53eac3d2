//! Ctrl-C and SIGTERM: the run saves a checkpoint and says how to continue.
#![cfg(unix)]

use super::resume::assert_same_run;
use super::{begin, child_command, run, small_config, train, wait_for, Room};
use crate::checkpoint;
use crate::config::Config;
use anyhow::Result;
use candle_core::Device;
use std::fs;
use std::process::{Child, Command, Stdio};

fn send(signal: &str, child: &Child) {
    assert!(Command::new("kill").args([signal, &child.id().to_string()]).status().unwrap().success());
}

/// The signal comes between two checkpoints. The run saves a checkpoint of its last recorded step. After a resume its files
/// are those of a run that never stopped.
#[test]
fn a_signal_saves_a_checkpoint() -> Result<()> {
    let room = Room::new();
    let config = Config { eval_interval: 1000, ..small_config(&room, 500) };
    let uninterrupted = train(&room, "uninterrupted", &config)?;
    for (signal, code) in [("-INT", 130), ("-TERM", 143)] {
        let dir = begin(&room, signal, &config)?;
        let path = room.string(signal);
        let mut command = child_command(&["train", "--resume", &path], room.folder.path());
        let child = command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn()?;
        wait_for(&dir.join("metrics.csv"), "\n20,");
        send(signal, &child);
        let output = child.wait_with_output()?;
        let step = checkpoint::load(&dir.join(checkpoint::FILE_NAME), &Device::Cpu)?.state.step;
        assert!((20..1000).contains(&step), "{step}");
        assert_eq!(
            String::from_utf8_lossy(&output.stderr),
            format!(
                "\nfinishing this step and saving a checkpoint; press Ctrl-C again to end at once\n\
                 stopped after step {step}; continue with: train --resume {path}\n"
            )
        );
        assert_eq!(output.status.code(), Some(code));
        assert_eq!(super::rows(&dir).len(), step);
        run(&["train", "--resume", &path])?;
        assert_same_run(&dir, &uninterrupted, signal);
    }
    Ok(())
}

/// The second signal ends the process during a step. The last checkpoint stays.
#[test]
fn a_second_signal_ends_at_once() -> Result<()> {
    let room = Room::new();
    // A step of many seconds.
    let config = Config { accumulation: 20_000, ..small_config(&room, 2) };
    let dir = begin(&room, "run", &config)?;
    let before = fs::read(dir.join(checkpoint::FILE_NAME))?;
    let said = room.path("said");
    let mut command = child_command(&["train", "--resume", &room.string("run")], room.folder.path());
    let mut child =
        command.stdout(fs::File::create(room.path("described"))?).stderr(fs::File::create(&said)?).spawn()?;
    wait_for(&room.path("described"), "steps  1 to 2");
    send("-INT", &child);
    wait_for(&said, "press Ctrl-C again to end at once");
    send("-INT", &child);
    assert_eq!(child.wait()?.code(), Some(130));
    assert!(fs::read(dir.join(checkpoint::FILE_NAME))? == before);
    Ok(())
}
