//! New runs that are refused, and cases that must work (non-UTF-8 paths, lost metrics).

use super::{child_process, message, names, rows, run, small_config, train, Room};
use crate::checkpoint;
use crate::config::Config;
use crate::files;
use crate::metrics::{self, Row};
use crate::sample::Trained;
use anyhow::Result;
use candle_core::Device;
use std::fs;

/// A path that is not UTF-8 can name everything but the text, because checkpoints are JSON.
#[cfg(unix)]
#[test]
fn paths_of_runs_need_not_be_utf8() -> Result<()> {
    use std::ffi::{OsStr, OsString};
    use std::os::unix::ffi::OsStrExt;

    let room = Room::new();
    let out = room.folder.path().join(OsStr::from_bytes(b"r\xfen"));
    let gpt = |args: &[&OsStr]| crate::run([OsStr::new("gpt")].iter().chain(args).map(OsString::from));
    let os = OsStr::new;
    let text = OsStr::from_bytes(b"te\xffxt.txt");
    let said = gpt(&[os("--data"), text, os("--out"), out.as_os_str()]).unwrap_err().to_string();
    assert!(said.starts_with("error: invalid UTF-8 was detected in one or more arguments"), "{said}");
    assert!(!out.exists());
    if let Err(error) = fs::create_dir(&out) {
        eprintln!("this file system does not allow such a name: {error}");
        return Ok(());
    }
    let text = room.path("text.txt");
    let train = [os("--data"), text.as_os_str(), os("--out"), out.as_os_str(), os("--steps"), os("1")];
    gpt(&[&train[..], &[os("--context"), os("8"), os("--batch"), os("1")]].concat())?;
    gpt(&[os("--resume"), out.as_os_str(), os("--steps"), os("2")])?;
    gpt(&[os("eval"), os("--checkpoint"), out.as_os_str()])
}

/// A new run that is refused, or that cannot create its folder, leaves no file and no folder.
#[test]
fn a_refused_run_leaves_no_folder() -> Result<()> {
    let room = Room::new();
    fs::write(room.path("empty.txt"), "")?;
    let (text, empty, out) = (room.string("text.txt"), room.string("empty.txt"), room.string("a/b"));
    let before = names(room.folder.path());
    for args in [
        &["--data", &empty][..],
        &["--data", &text, "--context", "600"],
        &["--data", &text, "--steps", "10", "--warmup", "10"],
        &["--data", &text, "--lr", "1e-3", "--min-lr", "1"],
    ] {
        message(&[args, &["--out", &out]].concat());
        assert_eq!(names(room.folder.path()), before, "{args:?}");
    }
    // No folder can be created here.
    let below = room.string("text.txt/a/b");
    let said = message(&["--data", &text, "--context", "8", "--out", &below]);
    assert_eq!(
        said,
        format!("--out {below} cannot be the folder of a run: Not a directory (os error 20); choose another")
    );
    assert_eq!(names(room.folder.path()), before);
    #[cfg(target_os = "linux")]
    assert_eq!(
        message(&["--data", &text, "--context", "8", "--out", "/proc/a/b"]),
        "cannot create the folder /proc/a/b: No such file or directory (os error 2); choose another with --out"
    );
    Ok(())
}

/// The model fits its text perfectly, so all gradients are exactly 0. The run must still resume.
#[test]
fn a_perfectly_fitted_run_is_resumed() -> Result<()> {
    let room = Room::new();
    fs::write(room.path("text.txt"), "a".repeat(20_000))?;
    let config = Config { lr: 0.1, weight_decay: 0.0, beta2: 0.9, eval_interval: 500, ..small_config(&room, 600) };
    let dir = train(&room, "run", &config)?;
    let last = rows(&dir).pop().unwrap();
    assert_eq!((last.grad_norm, last.val_loss), (0.0, Some(0.0)), "a perfect fit");
    run(&["--resume", &room.string("run"), "--steps", "602"])?;
    assert_eq!(rows(&dir).len(), 602);
    Ok(())
}

/// Rows of metrics.csv, or the whole file, are lost. The run resumes and names the missing steps.
#[test]
fn a_run_goes_on_without_its_metrics() -> Result<()> {
    let room = Room::new();
    let dir = train(&room, "run", &small_config(&room, 6))?;
    let (path, file) = (room.string("run"), dir.join(metrics::FILE_NAME));
    let whole = fs::read_to_string(&file)?;
    let resumed = |steps: &str| {
        let child = child_process(&["--resume", &path, "--steps", steps], room.folder.path(), None);
        assert!(child.status.success());
        String::from_utf8(child.stderr).unwrap()
    };
    let steps = || rows(&dir).iter().map(|row| row.step).collect::<Vec<_>>();

    // Cut in the middle of the row of step 4.
    let cut = whole.find("\n4,").unwrap() + 5;
    fs::write(&file, &whole[..cut])?;
    let no_rows = |from, to| {
        let name = file.display();
        format!("{name} has no rows for steps {from} to {to}; new rows start at step {}\n", to + 1)
    };
    assert_eq!(resumed("8"), no_rows(4, 6));
    assert_eq!(steps(), [1, 2, 3, 7, 8]);
    assert_eq!(resumed("9"), "", "the gap was reported before");
    fs::remove_file(&file)?;
    assert_eq!(resumed("11"), no_rows(1, 9));
    assert_eq!(steps(), [10, 11]);
    fs::write(&file, "")?;
    assert_eq!(resumed("12"), no_rows(1, 11));
    assert_eq!(steps(), [12]);
    Ok(())
}

/// `--checkpoint-interval` sets the steps between checkpoints. The default is the evaluation interval.
#[test]
fn a_checkpoint_interval_is_kept() -> Result<()> {
    let room = Room::new();
    let text = room.string("text.txt");
    for (name, interval, reached) in [("own", &["--checkpoint-interval", "2"][..], 4), ("default", &[], 3)] {
        let out = room.string(name);
        let args = ["--data", &text, "--out", &out, "--context", "8", "--batch", "1", "--steps", "9"];
        let args = [&args[..], &["--eval-interval", "3", "--eval-windows", "1"], interval].concat();
        child_process(&args, room.folder.path(), Some("inside a step#6"));
        let state = checkpoint::load(&room.path(name).join(checkpoint::FILE_NAME), &Device::Cpu)?.state;
        assert_eq!(state.step, reached, "{name}");
        let evaluated = |rows: &[Row]| rows.iter().filter(|row| row.val_loss.is_some()).map(|row| row.step).collect();
        let evaluated: Vec<usize> = evaluated(&rows(&room.path(name)));
        assert_eq!(evaluated, [1, 3], "{name}");
    }
    Ok(())
}

/// The loss or its gradient overflows between evaluations. No checkpoint of that model is saved, so the last one has a finite loss.
#[test]
fn a_non_finite_model_is_never_saved() -> Result<()> {
    let room = Room::new();
    // With this decay, each step makes the matrices several times as large.
    let config = Config { lr: 1e-3, weight_decay: 1e5, warmup: 20, eval_interval: 40, ..small_config(&room, 40) };
    let config = Config { checkpoint_interval: Some(1), ..config };
    let error = train(&room, "run", &config).unwrap_err().to_string();
    let step = checkpoint::load(&room.path("run").join(checkpoint::FILE_NAME), &Device::Cpu)?.state.step;
    let rest = "the last checkpoint is older; a smaller --lr or a longer --warmup may help";
    assert!(error.starts_with(&format!("step {}: the ", step + 1)) && error.ends_with(rest), "{error}");
    assert!(step > 2, "its loss was finite before");
    let trained = Trained::load(&room.path("run"), &Device::Cpu)?;
    assert!(trained.evaluate(None)?.loss.is_finite());
    Ok(())
}

/// Names in `runs` that are not numbers of runs, or are very large numbers, stop neither a new run nor the search for the
/// newest run.
#[test]
fn any_name_in_runs() -> Result<()> {
    let room = Room::new();
    let runs = room.path("runs");
    for name in ["0007", "20261130", "20261130123456", "18446744073709551615", "7", "notes"] {
        fs::create_dir_all(runs.join(name))?;
    }
    fs::write(runs.join("0007/model"), "")?;
    assert_eq!(files::newest_run(&runs, "model")?, runs.join("0007"));
    assert_eq!(files::RunFolder::create_next(&runs)?.path(), runs.join("20261131"));
    Ok(())
}

/// A checkpoint restores every bit of its settings. With less precise numbers, these settings would change in the last bit.
#[test]
fn settings_survive_json() -> Result<()> {
    let room = Room::new();
    let config = Config { min_lr: 15e-4 / 10.0, beta1: 0.9999999999999999, ..small_config(&room, 1) };
    let again: Config = serde_json::from_str(&serde_json::to_string(&config)?)?;
    assert_eq!(again, config);
    Ok(())
}
