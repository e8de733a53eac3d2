//! Tests of the example, and the functions that run it as a child process and end it at a named point.

mod disk;
mod errors;
mod kill;
mod lock;
mod losses;
mod output;
mod refused;
mod resume;
mod sizes;
mod stop;
mod tokenizer;
mod units;

use crate::config::{AttentionKind, Config, Preset};
use crate::files::RunFolder;
use crate::metrics::{self, Row};
use crate::train::Run;
use anyhow::Result;
use candle_core::Device;
use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;
use tempfile::TempDir;

/// Environment variable with the point where the process aborts: `POINT#TIME`. `TIME` is the number of the visit, from 1.
const ABORT_AT: &str = "GPT_TEST_ABORT_AT";
/// Environment variable with the command line of a child process, in JSON.
const ARGS: &str = "GPT_TEST_ARGS";
/// Environment variable with a file that replaces the stdout of a child process. A full stdout itself cannot be tested,
/// because the test harness would fail first.
const STDOUT: &str = "GPT_TEST_STDOUT";

/// The end of the error of a file that could not be written.
const ONCE_FIXED: &str = "once that is fixed, a run with a checkpoint continues with --resume";

/// Aborts the process if [`ABORT_AT`] names this point and this visit. The program calls it at its named points, in tests
/// only.
pub fn abort_at(point: &str, what: &Path) {
    static REACHED: AtomicUsize = AtomicUsize::new(0);
    let Ok(wanted) = std::env::var(ABORT_AT) else { return };
    let (wanted, time) = wanted.split_once('#').expect("POINT#TIME");
    let what = what.file_name().expect("a file or a thing").to_string_lossy();
    if wanted == format!("{point} {what}") && (REACHED.fetch_add(1, Ordering::SeqCst) + 1).to_string() == time {
        eprintln!("aborted {wanted}");
        std::process::abort();
    }
}

/// Runs the program in a child process. Cargo gives tests no path to the binary of an example. So tests that need a child
/// process start this test binary again, with this one test.
#[test]
#[ignore = "the program as a child process of other tests"]
fn child() {
    let args = std::env::var(ARGS).expect("only other tests start this one");
    let args: Vec<String> = serde_json::from_str(&args).unwrap();
    // Exit here. Otherwise the test harness prints its result, and fails if stdout is closed.
    let code = crate::exit_code(crate::run(args.into_iter().map(OsString::from)));
    std::process::exit(code.into());
}

/// The stdout of the program in tests.
pub fn stdout() -> io::Result<Box<dyn Write>> {
    /// Prints with `print!`. The test harness captures `print!`, but it does not capture writes to stdout.
    struct Captured;

    impl Write for Captured {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            print!("{}", String::from_utf8_lossy(bytes));
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    match std::env::var_os(STDOUT) {
        Some(path) => Ok(Box::new(File::options().append(true).open(path)?)),
        None if std::env::var_os(ARGS).is_some() => Ok(Box::new(io::stdout())),
        None => Ok(Box::new(Captured)),
    }
}

/// A command that runs the program as a child process in `repository`.
fn child_command(args: &[&str], repository: &Path) -> Command {
    let args: Vec<&str> = ["gpt"].iter().chain(args).copied().collect();
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["tests::child", "--exact", "--ignored", "--nocapture", "--test-threads=1"]);
    command.current_dir(repository).env("CARGO_MANIFEST_DIR", repository);
    command.env(ARGS, serde_json::to_string(&args).unwrap());
    command.env_remove(ABORT_AT).env_remove(STDOUT);
    command
}

/// Runs the program as a child process in `repository`, to its end or to `abort_at`.
fn child_process(args: &[&str], repository: &Path, abort_at: Option<&str>) -> Output {
    let mut command = child_command(args, repository);
    if let Some(point) = abort_at {
        command.env(ABORT_AT, point);
    }
    command.output().unwrap()
}

/// Runs the program in this process.
fn run(args: &[&str]) -> Result<()> {
    crate::run(["gpt"].iter().chain(args).map(OsString::from))
}

/// The text of the error that the program returns for `args`.
fn message(args: &[&str]) -> String {
    match run(args) {
        Ok(()) => panic!("{args:?} was accepted"),
        Err(error) => format!("{error:#}"),
    }
}

/// A folder for one test, with a text in it.
struct Room {
    folder: TempDir,
}

impl Room {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("text.txt"), story(6000)).unwrap();
        Self { folder }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn string(&self, name: &str) -> String {
        self.path(name).to_str().unwrap().to_string()
    }
}

/// The same text every time, of `len` bytes. A linear congruential generator chooses the words.
fn story(len: usize) -> String {
    const WORDS: [&str; 12] =
        ["the", "query", "key", "value", "row", "of", "a", "block", "attends", "to", "softmax", "tile"];
    let mut state = 1u32;
    let mut text = String::new();
    while text.len() < len {
        state = state.wrapping_mul(1664525).wrapping_add(1013904223);
        let word = state as usize >> 24;
        text += WORDS[word % WORDS.len()];
        text += if word.is_multiple_of(11) { ".\n" } else { " " };
    }
    text.truncate(len);
    text
}

/// The tiny model on `text.txt` of `room`, with short windows.
fn short_config(room: &Room, attention: AttentionKind) -> Config {
    Config {
        data: Some(room.path("text.txt")),
        attention,
        context: 32,
        batch: 4,
        steps: 40,
        lr: 2e-3,
        min_lr: 2e-4,
        warmup: 4,
        eval_windows: 4,
        ..Config::preset(Preset::Tiny)
    }
}

/// A model of 0.03 M parameters. Its steps and checkpoints take milliseconds.
fn small_config(room: &Room, steps: usize) -> Config {
    let config = short_config(room, AttentionKind::Flash);
    Config { num_layers: 1, num_heads: 2, embed_dim: 32, context: 8, batch: 2, steps, eval_windows: 2, ..config }
}

/// Starts a run of `config` in the folder `name` of `room`, without a step. Returns its folder.
fn begin(room: &Room, name: &str, config: &Config) -> Result<PathBuf> {
    let folder = RunFolder::create(&room.path(name))?;
    Run::new(config.clone(), Device::Cpu)?.begin(folder.path())?;
    Ok(folder.path().to_owned())
}

/// Trains a run of `config` in the folder `name` of `room` to its end. Returns its folder.
fn train(room: &Room, name: &str, config: &Config) -> Result<PathBuf> {
    let folder = RunFolder::create(&room.path(name))?;
    Run::new(config.clone(), Device::Cpu)?.train(&folder)?;
    Ok(folder.path().to_owned())
}

/// The rows of the run in `dir`. The measured speed is set to 0, because it differs each time.
fn rows(dir: &Path) -> Vec<Row> {
    let (rows, _) = metrics::read(&dir.join(metrics::FILE_NAME), usize::MAX).unwrap();
    rows.into_iter().map(|row| Row { tokens_per_s: 0, ..row }).collect()
}

/// The names of all files and folders in `dir`, sorted.
fn names(dir: &Path) -> Vec<String> {
    let name = |entry: std::io::Result<fs::DirEntry>| entry.unwrap().file_name().into_string().unwrap();
    let mut names: Vec<String> = fs::read_dir(dir).unwrap().map(name).collect();
    names.sort();
    names
}

/// Waits until the file `path` contains `what`.
fn wait_for(path: &Path, what: &str) {
    for _ in 0..3000 {
        if fs::read_to_string(path).is_ok_and(|text| text.contains(what)) {
            return;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    panic!("{} never contained {what:?}", path.display());
}
