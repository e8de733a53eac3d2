//! Errors of run folders (invalid checkpoints), and cases that must work (non-UTF-8 paths, lost metrics).

use super::{begin, child_process, message, names, rows, run, small_config, story, train, Room};
use crate::checkpoint;
use crate::config::{Config, Preset};
use crate::files;
use crate::metrics::{self, Row};
use crate::sample::Trained;
use anyhow::Result;
use candle_core::Device;
use serde_json::{json, Value};
use sha2::{Digest, Sha256};
use std::fs;
use std::path::{Path, PathBuf};

/// Changes the state in the checkpoint `file` and updates its hash.
fn forge(file: &Path, change: impl Fn(&mut Value)) {
    const KEY: &str = "candle-fa2-gpt-2";
    let bytes = fs::read(file).unwrap();
    let end = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let mut header: Value = serde_json::from_slice(&bytes[8..end]).unwrap();
    let entry = &mut header["__metadata__"][KEY];
    let mut state: Value = serde_json::from_str(entry.as_str().unwrap()).unwrap();
    change(&mut state);
    *entry = state.to_string().into();
    let mut header = header.to_string().into_bytes();
    header.resize(header.len().next_multiple_of(8), b' ');
    let body = [&(header.len() as u64).to_le_bytes()[..], &header, &bytes[end..bytes.len() - 32]].concat();
    fs::write(file, [&body[..], &Sha256::digest(&body)].concat()).unwrap();
}

#[test]
fn a_checkpoint_with_an_invalid_field_is_refused() -> Result<()> {
    let room = Room::new();
    let dir = begin(&room, "run", &small_config(&room, 2))?;
    let (path, file) = (room.string("run"), dir.join(checkpoint::FILE_NAME));
    let good = fs::read(&file)?;
    let say = |field: &str, value: Value, args: &[&str]| {
        fs::write(&file, &good).unwrap();
        forge(&file, |state| *state.pointer_mut(field).unwrap() = value.clone());
        message(&[args, &[&path]].concat())
    };
    let refusal = |reason: &str| {
        format!("{} cannot be used: {reason}; restore it from a copy or start a new run", file.display())
    };
    for (field, value, reason) in [
        ("/config/num_layers", json!(0), "num_layers is 0, but must be from 1 to 4294967295"),
        ("/config/num_layers", json!(1000), "num_layers is 1000, but the file has only 49 tensors"),
        ("/config/num_heads", json!(0), "num_heads is 0, but must be from 1 to 4294967295"),
        ("/config/num_heads", json!(3), "embed_dim is 32, but must be a multiple of num_heads 3"),
        ("/config/embed_dim", json!(64), "it has no f32 tensor h.0.attn.c_attn.bias of shape [192]"),
        ("/config/embed_dim", json!(u64::MAX), "embed_dim is 18446744073709551615, but must be from 1 to 4294967295"),
        ("/config/context", json!(0), "context is 0, but must be from 1 to 4294967295"),
        ("/config/context", json!(9), "it has no f32 tensor wpe of shape [9, 32]"),
        ("/config/batch", json!(0), "batch is 0, but must be from 1 to 4294967295"),
        ("/config/accumulation", json!(0), "accumulation is 0, but must be from 1 to 4294967295"),
        (
            "/config/accumulation",
            json!(u32::MAX),
            "batch * accumulation * context is 68719476720, but must be at most 4294967295",
        ),
        ("/config/steps", json!(0), "steps is 0, but must be at least 1"),
        ("/config/eval_interval", json!(0), "eval_interval is 0, but must be at least 1"),
        ("/config/eval_windows", json!(0), "eval_windows is 0, but must be at least 1"),
        ("/config/checkpoint_interval", json!(0), "checkpoint_interval is 0, but must be at least 1"),
        ("/config/lr", json!(0.0), "lr is 0, but must be above 0"),
        ("/config/min_lr", json!(1), "min_lr is 1, but must be from 0 to lr 0.002"),
        ("/config/weight_decay", json!(-1), "weight_decay is -1, but must be 0 or above"),
        ("/config/beta1", json!(1), "beta1 is 1, but must be from 0 to below 1"),
        ("/config/beta2", json!(2), "beta2 is 2, but must be from 0 to below 1"),
        ("/config/clip", json!(0), "clip is 0, but must be above 0"),
        ("/step", json!(3), "step is 3, but must be at most 2, the steps of the run"),
        ("/vocab_size", json!(100), "vocab_size is 100, but must be at least 256 for the tokenizer bytes"),
        ("/vocab_size", json!(320), "it has no f32 tensor wte of shape [320, 32]"),
        ("/config/tokenizer", json!("Gpt2"), "vocab_size is 256, but must be at least 50257 for the tokenizer gpt2"),
        ("/text_sha256", json!("short"), "text_sha256 is \"short\", but must be 64 hexadecimal digits"),
    ] {
        for args in [&["--resume"][..], &["sample", "--checkpoint"], &["eval", "--checkpoint"]] {
            assert_eq!(say(field, value.clone(), args), refusal(reason), "{args:?}");
        }
    }
    // This field is checked when the text is read, so only by a resume.
    assert_eq!(
        say("/cursor/used", json!(675), &["--resume"]),
        refusal("cursor.used is 675, but must be at most 674, the windows of the text")
    );
    assert_eq!(names(&dir), ["checkpoint.safetensors", "metrics.csv"]);
    Ok(())
}

/// Older checkpoints have no `checkpoint_interval`. Then a checkpoint is saved with each evaluation, as before.
#[test]
fn a_checkpoint_without_new_fields_is_read() -> Result<()> {
    let room = Room::new();
    let dir = begin(&room, "run", &small_config(&room, 2))?;
    let file = dir.join(checkpoint::FILE_NAME);
    forge(&file, |state| assert!(state["config"].as_object_mut().unwrap().remove("checkpoint_interval").is_some()));
    let config = checkpoint::load(&file, &Device::Cpu)?.state.config;
    assert_eq!(config, small_config(&room, 2));
    assert_eq!(config.checkpoint_interval(), config.eval_interval);
    run(&["--resume", &room.string("run")])
}

/// The whole program with a path that is not UTF-8.
#[cfg(unix)]
#[test]
fn paths_need_not_be_utf8() -> Result<()> {
    use std::ffi::{OsStr, OsString};
    use std::os::unix::ffi::OsStrExt;

    let room = Room::new();
    let text = room.folder.path().join(OsStr::from_bytes(b"te\xffxt.txt"));
    let out = room.folder.path().join(OsStr::from_bytes(b"r\xfen"));
    let gpt = |args: &[&OsStr]| crate::run([OsStr::new("gpt")].iter().chain(args).map(OsString::from));
    let os = OsStr::new;
    let train = [os("--data"), text.as_os_str(), os("--out"), out.as_os_str(), os("--steps"), os("1")];
    let train = [&train[..], &[os("--context"), os("8"), os("--batch"), os("1")]].concat();

    assert_eq!(
        gpt(&train).unwrap_err().to_string(),
        format!(
            "cannot read --data {}: No such file or directory (os error 2); give the path of a readable text file",
            text.display()
        )
    );
    assert!(!out.exists());
    if let Err(error) = fs::write(&text, story(6000)) {
        eprintln!("this file system does not allow such a name: {error}");
        return Ok(());
    }
    gpt(&train)?;
    let saved = checkpoint::load(&out.join(checkpoint::FILE_NAME), &Device::Cpu)?.state.config;
    assert_eq!(saved.data, Some(text));
    gpt(&[os("--resume"), out.as_os_str(), os("--steps"), os("2")])?; // finds the text by the path in the checkpoint
    gpt(&[os("eval"), os("--checkpoint"), out.as_os_str()])
}

#[test]
fn paths_survive_json() -> Result<()> {
    let survives = |path: &Path, json: &str| -> Result<()> {
        let config = Config { data: Some(path.to_owned()), ..Config::preset(Preset::Tiny) };
        let text = serde_json::to_string(&config)?;
        assert!(text.starts_with(&format!("{{\"data\":{json},")), "{text}");
        assert_eq!(serde_json::from_str::<Config>(&text)?, config);
        Ok(())
    };
    survives(Path::new("/tmp/größe.txt"), "\"/tmp/größe.txt\"")?;
    #[cfg(unix)]
    {
        use std::os::unix::ffi::OsStringExt;
        let all: Vec<u8> = (1..=255).collect();
        let json = format!("{{\"Unix\":{}}}", serde_json::to_string(&all)?);
        survives(&PathBuf::from(std::ffi::OsString::from_vec(all)), &json)?;
    }
    Ok(())
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
    let trained = Trained::load(&room.path("run"), None, &Device::Cpu)?;
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
    assert_eq!(files::fresh_folder(&runs)?, runs.join("20261131"));
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

/// Rows that the program cannot have written are an error. Otherwise it would plot them, or overwrite the file.
#[test]
fn rows_of_no_run_are_refused() -> Result<()> {
    let room = Room::new();
    let dir = train(&room, "run", &small_config(&room, 3))?;
    let file = dir.join(metrics::FILE_NAME);
    let whole = fs::read_to_string(&file)?;
    let resume = ["--resume", &room.string("run"), "--steps", "5"];
    let advice = "restore it from a copy, or move it away and a new file will start at step 4";
    let second = whole.find("\n2,").unwrap() + 3;
    let end = second + whole[second..].find(',').unwrap();
    let heading = whole.lines().next().unwrap();
    for (text, reason) in [
        (format!("{}inf{}", &whole[..second], &whole[end..]), "step 2 has a number that is not finite".to_string()),
        ("my notes".to_string(), format!("its first line is not {heading}")),
        (whole.replace('\n', "\r"), format!("its first line is not {heading}")),
    ] {
        fs::write(&file, &text)?;
        assert_eq!(message(&resume), format!("{} is damaged: {reason}; {advice}", file.display()));
        assert_eq!(fs::read_to_string(&file)?, text);
    }
    Ok(())
}
