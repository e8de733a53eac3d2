//! Full disk: existing files stay, partial files are removed, the error names the cause.
#![cfg(unix)]

use super::resume::assert_same_run;
use super::{begin, child_command, child_process, names, run, small_config, train, Room, ONCE_FIXED};
use crate::checkpoint;
use crate::config::Config;
use anyhow::Result;
use std::fs;
use std::io::{self, stderr, Write};
use std::path::PathBuf;
use std::process::{Command, Output};

/// Runs `script` with the shell in the folder of `room`. `"$@"` in the script runs the program with `args`.
fn shell(shell: &[&str], script: &str, args: &[&str], room: &Room) -> io::Result<Output> {
    let program = child_command(args, room.folder.path());
    let mut command = Command::new(shell[0]);
    command.args(&shell[1..]).args(["-c", script, "sh"]).arg(program.get_program()).args(program.get_args());
    command.current_dir(room.folder.path());
    for (name, value) in program.get_envs() {
        match value {
            Some(value) => command.env(name, value),
            None => command.env_remove(name),
        };
    }
    command.output()
}

/// Runs the program with a limit for the size of each file: `blocks` of 512 bytes. Returns its stderr.
fn limited(blocks: usize, args: &[&str], room: &Room) -> String {
    let output = shell(&["sh"], &format!("trap '' XFSZ; ulimit -f {blocks}; exec \"$@\""), args, room).unwrap();
    assert_eq!(output.status.code(), Some(1));
    String::from_utf8(output.stderr).unwrap()
}

/// A run in the folder `run` that was aborted in step 25. Its last checkpoint is of step 20.
fn aborted(room: &Room, config: &Config) -> Result<PathBuf> {
    let dir = begin(room, "run", config)?;
    child_process(&["train", "--resume", &room.string("run")], room.folder.path(), Some("inside a step#25"));
    Ok(dir)
}

#[test]
fn a_checkpoint_that_cannot_be_written_leaves_the_one_before() -> Result<()> {
    let room = Room::new();
    let config = Config { eval_interval: 20, ..small_config(&room, 40) };
    let uninterrupted = train(&room, "uninterrupted", &config)?;
    let dir = aborted(&room, &config)?;
    let path = room.string("run");
    let before = fs::read(dir.join(checkpoint::FILE_NAME))?;
    for _ in 0..2 {
        assert_eq!(
            limited(100, &["train", "--resume", &path], &room),
            format!("error: cannot write {path}/checkpoint.safetensors: File too large (os error 27); {ONCE_FIXED}\n")
        );
        assert!(fs::read(dir.join(checkpoint::FILE_NAME))? == before);
        assert_eq!(names(&dir), ["checkpoint.safetensors", "loss.svg", "metrics.csv", "train.lock"]);
    }
    run(&["train", "--resume", &path])?;
    assert_same_run(&dir, &uninterrupted, "two full disks");
    Ok(())
}

#[test]
fn metrics_that_cannot_be_written_stay() -> Result<()> {
    let room = Room::new();
    let dir = train(&room, "run", &small_config(&room, 40))?;
    let path = room.string("run");
    let before = fs::read(dir.join("metrics.csv"))?;
    assert_eq!(
        limited(1, &["train", "--resume", &path, "--steps", "50"], &room),
        format!("error: cannot write {path}/metrics.csv: File too large (os error 27); {ONCE_FIXED}\n")
    );
    assert!(fs::read(dir.join("metrics.csv"))? == before);
    run(&["train", "--resume", &path, "--steps", "50"])
}

/// A new run cannot write its first checkpoint. It leaves only its lock file, and the folder can be used again.
#[test]
fn a_run_without_room_for_a_checkpoint_leaves_its_lock() {
    let room = Room::new();
    let out = room.string("a/b/run");
    let args = ["--data", &room.string("text.txt"), "--out", &out, "--context", "8", "--steps", "1"];
    let said =
        format!("error: cannot write {out}/checkpoint.safetensors: File too large (os error 27); {ONCE_FIXED}\n");
    for _ in 0..2 {
        assert_eq!(limited(100, &args, &room), said);
        assert_eq!(names(&room.path("a/b/run")), ["train.lock"]);
    }
}

/// A real full disk: a small tmpfs, mounted in a namespace of this test only.
#[test]
fn a_full_disk_is_named_and_does_not_stay_full() -> Result<()> {
    let room = Room::new();
    let config = Config { eval_interval: 20, ..small_config(&room, 40) };
    let uninterrupted = train(&room, "uninterrupted", &config)?;
    let dir = aborted(&room, &config)?;
    fs::create_dir(room.path("disk"))?;
    // A checkpoint has 255 kB, so two of them do not fit.
    let script = r#"
        mount -t tmpfs -o size=400k tmpfs disk && cp -r run disk/run && touch mounted || exit
        "$@"; code=$?
        ls -A disk/run > listing; cp disk/run/checkpoint.safetensors kept
        mount -o remount,size=4m disk && "$@" && cp -r disk/run resumed
        exit $code"#;
    let output = shell(&["unshare", "-rm", "sh"], script, &["train", "--resume", "disk/run"], &room);
    if !room.path("mounted").exists() {
        // Not eprintln!, because the test harness captures that.
        writeln!(stderr(), "SKIPPED a_full_disk_is_named_and_does_not_stay_full: no tmpfs can be mounted: {output:?}")?;
        return Ok(());
    }
    let output = output?;
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(
        said,
        format!(
            "error: cannot write disk/run/checkpoint.safetensors: No space left on device (os error 28); {ONCE_FIXED}\n"
        )
    );
    assert_eq!(
        fs::read_to_string(room.path("listing"))?,
        "checkpoint.safetensors\nloss.svg\nmetrics.csv\ntrain.lock\n"
    );
    assert!(fs::read(room.path("kept"))? == fs::read(dir.join(checkpoint::FILE_NAME))?);
    assert_same_run(&room.path("resumed"), &uninterrupted, "a full disk");
    Ok(())
}
