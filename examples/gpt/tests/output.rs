//! Output that cannot be written (closed or full stdout), and the table of `gpt time --csv`.

use super::{child_command, message, rows, run, Room, STDOUT};
use crate::checkpoint;
use crate::metrics::Row;
use crate::progress::Progress;
use anyhow::Result;
use candle_core::Device;
use std::fs::{self, File};
use std::io::Read;
use std::path::Path;
use std::process::{Command, Output, Stdio};

const STEPS: usize = 12;

fn train_args<'a>(text: &'a str, out: &'a str) -> Vec<&'a str> {
    let mut args = vec!["train", "--data", text, "--out", out, "--steps", "12", "--eval-interval", "2"];
    args.extend(["--context", "16", "--batch", "2", "--eval-windows", "2"]);
    args
}

/// The smallest measurement.
const TIME: [&str; 9] = ["time", "--context", "8", "--batch", "1", "--steps", "1", "--warmup", "0"];

/// Reads the stdout of a child until it ends with `last_read`, then closes the pipe. Returns the output at the end.
fn read_up_to(last_read: &str, command: &mut Command) -> Output {
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut stdout = child.stdout.take().unwrap();
    let mut read = String::new();
    while !read.ends_with(last_read) {
        let mut byte = [0];
        stdout.read_exact(&mut byte).unwrap();
        read.push(char::from(byte[0]));
    }
    drop(stdout);
    child.wait_with_output().unwrap()
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn assert_trained(dir: &Path) {
    assert_eq!(rows(dir).len(), STEPS);
    let checkpoint = checkpoint::load(&dir.join(checkpoint::FILE_NAME), &Device::Cpu).unwrap();
    assert_eq!(checkpoint.state.step, STEPS);
    assert!(dir.join(crate::plot::FILE_NAME).is_file());
}

/// `gpt train | head -1`: training continues after the reader has gone.
#[test]
fn a_run_outlives_the_reader_of_its_progress() {
    let room = Room::new();
    let args = (room.string("text.txt"), room.string("out"));
    let output = read_up_to("text   ", &mut child_command(&train_args(&args.0, &args.1), room.folder.path()));
    assert!(output.status.success(), "{}", stderr(&output));
    assert_eq!(stderr(&output), "");
    assert_trained(&room.path("out"));
}

/// `gpt eval | true`: a closed pipe is not an error.
#[test]
fn a_result_that_nobody_reads_is_no_error() -> Result<()> {
    let room = Room::new();
    let out = room.string("out");
    run(&train_args(&room.string("text.txt"), &out))?;
    let of_the_harness = "child ... ";
    for args in [&["eval", "--checkpoint", &out][..], &["sample", "--checkpoint", &out], &["--help"], &TIME] {
        let output = read_up_to(of_the_harness, &mut child_command(args, room.folder.path()));
        assert!(output.status.success(), "{args:?}: {}", stderr(&output));
        assert_eq!(stderr(&output), "", "{args:?}");
    }
    Ok(())
}

#[cfg(target_os = "linux")]
#[test]
fn a_full_device_takes_no_result() {
    let room = Room::new();
    let (text, out, csv) = (room.string("text.txt"), room.string("out"), room.string("time.csv"));
    let full = |args: &[&str]| child_command(args, room.folder.path()).env(STDOUT, "/dev/full").output().unwrap();

    let trained = full(&train_args(&text, &out));
    assert!(trained.status.success(), "{}", stderr(&trained));
    assert_eq!(stderr(&trained), "");
    assert_trained(&room.path("out"));

    let time = [&TIME[..], &["--csv", &csv]].concat();
    for args in [&["eval", "--checkpoint", &out][..], &["sample", "--checkpoint", &out], &time] {
        let output = full(args);
        assert_eq!(output.status.code(), Some(1), "{args:?}");
        assert_eq!(
            stderr(&output),
            "error: cannot write the result to stdout: No space left on device (os error 28); make room there, or redirect \
             stdout\n"
        );
    }
    // The table has the measurement, although printing it failed.
    assert_eq!(fs::read_to_string(csv).unwrap().lines().count(), 2);
}

#[cfg(target_os = "linux")]
#[test]
fn a_full_stderr_takes_no_message() {
    let room = Room::new();
    let (text, out) = (room.string("text.txt"), room.string("out"));
    let full = || File::options().append(true).open("/dev/full").unwrap();
    let status = |args: &[&str]| {
        let mut command = child_command(args, room.folder.path());
        command.env(STDOUT, "/dev/full").stdout(Stdio::null()).stderr(full()).status().unwrap()
    };
    assert!(status(&train_args(&text, &out)).success());
    assert_trained(&room.path("out"));
    assert_eq!(status(&["eval", "--checkpoint", &out]).code(), Some(1), "the result could not be printed");
    assert_eq!(status(&["eval", "--checkpoint", &text]).code(), Some(1), "no checkpoint");
    assert_eq!(status(&["--stepz"]).code(), Some(2), "a usage error, with the exit code of clap");
}

/// The remaining time can be too long for a `Duration`.
#[test]
fn progress_of_endless_runs() {
    let row = Row { step: 1, train_loss: 1.0, val_loss: Some(1.0), lr: 1.0, grad_norm: 1.0, tokens_per_s: 1 };
    let mut progress = Progress::new(0, usize::MAX);
    std::thread::sleep(std::time::Duration::from_millis(20));
    progress.step(&row);
}

#[test]
fn rows_are_added_only_to_tables_of_measurements() -> Result<()> {
    let room = Room::new();
    let path = |name: &str| room.string(name);
    let time = |csv: &str| run(&[&TIME[..], &["--csv", csv]].concat());
    // The error must come before the measurement, because these steps would take hours.
    let say = |csv: &str| message(&["time", "--steps", "1000000", "--csv", csv]);

    fs::write(path("notes.md"), "# Notes\n")?;
    assert_eq!(
        say(&path("notes.md")),
        format!("--csv {} is not a table of measurements; name another file", path("notes.md"))
    );
    assert_eq!(
        say(&path("absent/time.csv")),
        format!(
            "cannot write --csv {}: No such file or directory (os error 2); name another file",
            path("absent/time.csv")
        )
    );
    assert_eq!(fs::read_to_string(path("notes.md"))?, "# Notes\n");

    fs::write(path("time.csv"), "")?;
    time(&path("time.csv"))?;
    let first = fs::read_to_string(path("time.csv"))?;
    time(&path("time.csv"))?;
    // An editor may drop the last line break.
    fs::write(path("time.csv"), fs::read_to_string(path("time.csv"))?.trim_end())?;
    time(&path("time.csv"))?;
    let all = fs::read_to_string(path("time.csv"))?;
    assert!(all.starts_with(&first), "{all}");
    assert!(all.ends_with('\n'), "{all}");
    let rows: Vec<usize> = all.lines().map(|row| row.split(',').count()).collect();
    assert_eq!(rows, [17; 4], "{all}");
    Ok(())
}
