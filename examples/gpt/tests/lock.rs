//! Only one process at a time can write into the folder of a run.

use super::{begin, child_command, message, names, rows, run, small_config, wait_for, Room, ONCE_FIXED};
use crate::checkpoint;
use crate::config::Config;
use crate::files::RunFolder;
use crate::train::Run;
use anyhow::Result;
use candle_core::Device;
use std::fs;
use std::io::Read;
use std::path::Path;
use std::process::{Child, Stdio};
use std::time::Duration;

const PAIRS: usize = 20;

fn spawn(args: &[&str], room: &Room) -> Child {
    let mut command = child_command(args, room.folder.path());
    command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap()
}

/// The two child processes: first the one that ends first, then the other.
fn first_to_end([mut a, mut b]: [Child; 2]) -> [Child; 2] {
    loop {
        if a.try_wait().unwrap().is_some() {
            return [a, b];
        }
        if b.try_wait().unwrap().is_some() {
            return [b, a];
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Two processes resume one run. One trains, the other is refused. Then the first is killed; its lock must not block the
/// next pair.
#[test]
fn of_two_processes_one_is_refused() -> Result<()> {
    let room = Room::new();
    let config = Config { checkpoint_interval: Some(1), eval_interval: 10, ..small_config(&room, 1_000_000) };
    let dir = begin(&room, "run", &config)?;
    let path = room.string("run");
    for pair in 0..PAIRS {
        let [mut refused, mut trains] = first_to_end([(); 2].map(|()| spawn(&["train", "--resume", &path], &room)));
        let mut said = String::new();
        refused.stderr.take().unwrap().read_to_string(&mut said)?;
        assert_eq!(refused.wait()?.code(), Some(1), "pair {pair}: {said}");
        assert_eq!(
            said.trim_end(),
            format!("error: {path} is in use: another process is training there; wait for it to end, or stop it"),
            "pair {pair}"
        );
        // Readers need no lock: at any time they find a complete checkpoint.
        checkpoint::load(&dir.join(checkpoint::FILE_NAME), &Device::Cpu)?;
        if pair == 0 {
            wait_for(&dir.join("metrics.csv"), "\n2,");
            run(&["sample", "--checkpoint", &path, "--tokens", "3"])?;
            run(&["eval", "--checkpoint", &path])?;
        }
        assert!(trains.try_wait()?.is_none(), "pair {pair}: the other trains");
        trains.kill()?;
        trains.wait()?;
    }
    // All processes together ran the same steps as one process.
    let trained = rows(&dir);
    assert!(trained.len() > 1);
    let mut alone = Run::new(config, Device::Cpu)?;
    for row in trained {
        assert_eq!(crate::metrics::Row { tokens_per_s: 0, ..alone.one_step()? }, row);
    }
    Ok(())
}

/// Two new runs start in one folder. One trains, the other is refused and deletes no file of the first.
#[test]
fn of_two_new_runs_one_is_refused() -> Result<()> {
    let room = Room::new();
    let (text, out) = (room.string("text.txt"), room.string("out"));
    let args = ["--data", &text, "--out", &out, "--steps", "100000", "--context", "8", "--batch", "1"];
    let [mut refused, mut trains] = first_to_end([(); 2].map(|()| spawn(&args, &room)));
    let mut said = String::new();
    refused.stderr.take().unwrap().read_to_string(&mut said)?;
    assert_eq!(refused.wait()?.code(), Some(1), "{said}");
    let in_use = format!("error: {out} is in use: another process is training there; ");
    assert!(said.starts_with(&in_use) || said.starts_with(&format!("error: --out {out} is not empty")), "{said}");
    wait_for(&room.path("out/metrics.csv"), "\n1,");
    trains.kill()?;
    trains.wait()?;
    run(&["sample", "--checkpoint", &out, "--tokens", "3"])
}

/// A resume removes the temporary files of killed processes. All other files stay.
#[test]
fn leftovers_are_removed() -> Result<()> {
    let room = Room::new();
    let dir = begin(&room, "run", &small_config(&room, 2))?;
    for name in ["checkpoint.safetensors.tmp", ".tmpx7LmQ2", "notes.tmp", ".tmp"] {
        fs::write(dir.join(name), "left")?;
    }
    run(&["--resume", &room.string("run")])?;
    assert_eq!(names(&dir), [".tmp", "checkpoint.safetensors", "loss.svg", "metrics.csv", "notes.tmp", "train.lock"]);
    Ok(())
}

/// A folder is locked until its holder is dropped, also within one process.
#[test]
fn a_folder_in_use_is_refused() -> Result<()> {
    let room = Room::new();
    let dir = begin(&room, "run", &small_config(&room, 1))?;
    let refusal = |dir: &Path| {
        format!("{} is in use: another process is training there; wait for it to end, or stop it", dir.display())
    };
    let folder = RunFolder::open(&dir)?;
    assert_eq!(message(&["--resume", &room.string("run")]), refusal(&dir));
    drop(folder);
    run(&["--resume", &room.string("run")])?;

    let new = room.path("new");
    let folder = RunFolder::create(&new)?;
    let args = ["--data", &room.string("text.txt"), "--out", &room.string("new"), "--context", "8", "--steps", "1"];
    assert_eq!(message(&args), refusal(&new));
    drop(folder);
    run(&args)?;
    assert_eq!(
        message(&["--resume", &room.string("run/checkpoint.safetensors")]),
        format!("--resume {} is a file; give the folder of the run", room.string("run/checkpoint.safetensors"))
    );
    fs::remove_file(dir.join("train.lock"))?;
    fs::create_dir(dir.join("train.lock"))?;
    assert_eq!(
        message(&["--resume", &room.string("run")]),
        format!("cannot write {}/train.lock: Is a directory (os error 21); {ONCE_FIXED}", room.string("run"))
    );
    Ok(())
}

/// The user removes the folder of a run and another run gets its name. The first run ends and overwrites nothing.
#[cfg(unix)]
#[test]
fn a_run_leaves_the_folder_of_another_alone() -> Result<()> {
    let room = Room::new();
    // Only the first step saves.
    let config =
        Config { checkpoint_interval: Some(1_000_000), eval_interval: 1_000_000, ..small_config(&room, 999_999) };
    let dir = begin(&room, "run", &config)?;
    let first = spawn(&["train", "--resume", &room.string("run")], &room);
    wait_for(&dir.join("metrics.csv"), "\n2,");
    // Not `?`: a child process must be waited for.
    fs::rename(&dir, room.path("removed")).unwrap();
    begin(&room, "run", &config).unwrap();
    let before = fs::read(dir.join(checkpoint::FILE_NAME)).unwrap();
    let output = first.wait_with_output()?;
    assert_eq!(output.status.code(), Some(1));
    let said = String::from_utf8(output.stderr)?;
    assert_eq!(
        said.lines().last(),
        Some(&*format!(
            "error: {} is no longer the folder of this run: somebody has removed or replaced its train.lock; nothing more is \
             written there, so start a new run",
            room.string("run")
        ))
    );
    assert!(fs::read(dir.join(checkpoint::FILE_NAME))? == before);
    assert_eq!(names(&dir), ["checkpoint.safetensors", "train.lock"]);
    Ok(())
}
