//! Only one process at a time can write into the folder of a run.

use super::{begin, child_command, message, names, rows, run, small_config, wait_for, Room};
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
            format!(
                "error: {path} is in use: process {} is training there; wait for it to end, or stop it",
                trains.id()
            ),
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
    let in_use = format!("error: {out} is in use: process {} is training there; ", trains.id());
    assert!(said.starts_with(&in_use) || said.starts_with(&format!("error: --out {out} is not empty")), "{said}");
    wait_for(&room.path("out/metrics.csv"), "\n1,");
    trains.kill()?;
    trains.wait()?;
    run(&["sample", "--checkpoint", &out, "--tokens", "3"])
}

/// A resume removes the temporary files and the lock file of killed processes. All other files stay.
#[test]
fn leftovers_are_removed() -> Result<()> {
    let room = Room::new();
    let dir = begin(&room, "run", &small_config(&room, 2))?;
    for name in ["checkpoint.safetensors.4711.gpt-tmp", "metrics.csv.1.gpt-tmp", "notes.tmp", "a.b.gpt-tmp"] {
        fs::write(dir.join(name), "left")?;
    }
    fs::write(dir.join("train.lock"), "4711")?;
    run(&["--resume", &room.string("run")])?;
    assert_eq!(names(&dir), ["a.b.gpt-tmp", "checkpoint.safetensors", "loss.svg", "metrics.csv", "notes.tmp"]);
    Ok(())
}

/// A user deletes the folder of a run, and another run takes its name. The first writes nothing there, and leaves the lock.
#[test]
#[cfg(unix)]
fn a_run_whose_folder_was_replaced_writes_nothing() -> Result<()> {
    let room = Room::new();
    let config = small_config(&room, 4);
    let dir = room.path("run");
    let first = RunFolder::create(&dir)?;
    fs::remove_dir_all(&dir)?;
    let second = RunFolder::create(&dir)?;
    let error = Run::new(config.clone(), Device::Cpu)?.train(&first).expect_err("its folder is gone");
    let replaced = format!("{} was removed or replaced while it trained; nothing more is written there", dir.display());
    assert_eq!(error.to_string(), replaced);
    assert_eq!(names(&dir), ["train.lock"]);
    drop(first);
    assert_eq!(names(&dir), ["train.lock"], "the lock belongs to the second run");
    Run::new(config, Device::Cpu)?.train(&second)?;
    assert_eq!(rows(&dir).len(), 4);
    Ok(())
}

/// A user's file with the name of the lock file is not changed.
#[test]
#[cfg(unix)]
fn a_file_of_the_user_is_no_lock() -> Result<()> {
    let room = Room::new();
    let (lock, precious) = (room.path("new/train.lock"), room.path("precious"));
    fs::create_dir(room.path("new"))?;
    let refused = || {
        let error = RunFolder::create(&room.path("new")).err().expect("it is not a lock file").to_string();
        assert_eq!(error, format!("{} is not a lock file of this program; move it away", lock.display()));
    };
    fs::write(&precious, "my notes")?;
    std::os::unix::fs::symlink(&precious, &lock)?;
    refused();
    fs::remove_file(&lock)?;
    fs::hard_link(&precious, &lock)?;
    refused();
    assert_eq!(fs::read_to_string(&precious)?, "my notes");
    Ok(())
}

/// A folder is locked until its holder is dropped, also within one process.
#[test]
fn a_folder_in_use_is_refused() -> Result<()> {
    let room = Room::new();
    let dir = begin(&room, "run", &small_config(&room, 1))?;
    let refusal = |dir: &Path| {
        let holder = std::process::id();
        let dir = dir.display();
        format!("{dir} is in use: process {holder} is training there; wait for it to end, or stop it")
    };
    let folder = RunFolder::open(&dir)?;
    assert_eq!(message(&["--resume", &room.string("run")]), refusal(&dir));
    drop(folder);
    run(&["--resume", &room.string("run")])?;

    let new = room.path("new");
    let folder = RunFolder::create(&new)?;
    let args = ["--data", &room.string("text.txt"), "--out", &room.string("new"), "--context", "8", "--steps", "1"];
    assert_eq!(message(&args), refusal(&new));
    assert!(new.exists(), "the folder belongs to the first run");
    drop(folder);
    assert!(!new.exists());
    assert_eq!(
        message(&["--resume", &room.string("run/checkpoint.safetensors")]),
        format!("--resume {} is a file; give the folder of the run", room.string("run/checkpoint.safetensors"))
    );
    fs::create_dir(dir.join("train.lock"))?;
    assert_eq!(
        message(&["--resume", &room.string("run")]),
        format!(
            "cannot write {0}/train.lock: Is a directory (os error 21); fix the cause, then continue from the last \
             checkpoint with --resume {0}",
            room.string("run")
        )
    );
    Ok(())
}
