//! Bad input: the error is one sentence, pinned as text, and no file is written.

use super::{child_process, message, rows, run, short_config, Room};
use crate::checkpoint;
use crate::config::{AttentionKind, Config};
use crate::files::RunFolder;
use crate::train::Run;
use anyhow::Result;
use candle_core::Device;
use std::fs;

/// The first line of clap's error.
fn usage(args: &[&str]) -> String {
    message(args).lines().next().unwrap().to_string()
}

/// Texts that `--data` cannot use. No folder is created.
#[test]
fn texts_that_cannot_be_used() -> Result<()> {
    let room = Room::new();
    fs::write(room.path("empty.txt"), "")?;
    fs::write(room.path("short.txt"), "a short text")?;
    fs::write(room.path("latin1.txt"), b"caf\xe9 ".repeat(2000))?;
    let out = room.string("out");
    let path = |name: &str| room.string(name);
    let say = |args: &[&str]| message(&[args, &["--out", &out]].concat());

    assert_eq!(
        say(&["--data", &path("absent.txt")]),
        format!(
            "cannot read --data {}: No such file or directory (os error 2); give the path of a readable text file",
            path("absent.txt")
        )
    );
    assert_eq!(
        say(&["--data", &path("")]),
        format!("cannot read --data {}: Is a directory (os error 21); give the path of a readable text file", path(""))
    );
    assert_eq!(
        say(&["--data", &path("empty.txt")]),
        format!("--data {} is empty; give a file with text", path("empty.txt"))
    );
    assert_eq!(
        say(&["--data", &path("text.txt"), "--context", "600"]),
        format!(
            "{} is too short for --context 600: its held-out tenth has 600 of 6000 tokens and needs 601; give a longer \
             text, or --context 599 or less",
            path("text.txt")
        )
    );
    assert_eq!(
        say(&["--data", &path("short.txt"), "--context", "128"]),
        format!(
            "{} is too short for --context 128: its held-out tenth has 1 of 12 tokens and needs 129; give a longer text",
            path("short.txt")
        )
    );
    assert_eq!(
        say(&["--data", &path("latin1.txt"), "--tokenizer", "gpt2"]),
        format!(
            "{} is not UTF-8 text (byte 3 is the first that is not), which --tokenizer gpt2 needs; use --tokenizer bytes",
            path("latin1.txt")
        )
    );
    assert!(!room.path("out").exists());
    Ok(())
}

#[test]
fn nothing_is_overwritten() -> Result<()> {
    let room = Room::new();
    fs::create_dir(room.path("full"))?;
    fs::write(room.path("full/notes.md"), "mine")?;
    let full = room.string("full");
    let text = room.string("text.txt");
    assert_eq!(
        message(&["--data", &text, "--out", &full]),
        format!(
            "--out {full} is not empty (it holds notes.md), and nothing is ever overwritten; choose another folder, or \
             continue that run with --resume {full}"
        )
    );
    assert_eq!(fs::read_to_string(room.path("full/notes.md"))?, "mine");
    assert_eq!(
        message(&["--data", &text, "--out", &text]),
        format!("--out {text} cannot be the folder of a run: Not a directory (os error 20); choose another")
    );
    Ok(())
}

#[test]
fn options_that_make_no_sense() {
    let bad = "error: invalid value";
    assert_eq!(usage(&["--stepz", "3"]), "error: unexpected argument '--stepz' found");
    assert_eq!(usage(&["trial"]), "error: unrecognized subcommand 'trial'");
    assert_eq!(usage(&["--steps", "0"]), format!("{bad} '0' for '--steps <N>': a whole number from 1 is needed"));
    assert_eq!(usage(&["--lr", "0"]), format!("{bad} '0' for '--lr <RATE>': a finite number above 0 is needed"));
    assert_eq!(usage(&["time", "--steps", "-1"]), "error: unexpected argument '-1' found");
    assert_eq!(usage(&["--lr", "nan"]), format!("{bad} 'nan' for '--lr <RATE>': a finite number above 0 is needed"));
    assert_eq!(
        usage(&["--weight-decay", "inf"]),
        format!("{bad} 'inf' for '--weight-decay <RATE>': a finite number, 0 or above, is needed")
    );
    assert_eq!(
        usage(&["--beta2", "1"]),
        format!("{bad} '1' for '--beta2 <RATE>': a number from 0 to below 1 is needed")
    );
    assert_eq!(usage(&["--preset", "huge"]), format!("{bad} 'huge' for '--preset <PRESET>'"));
    assert_eq!(usage(&["--dtype", "f16"]), format!("{bad} 'f16' for '--dtype <DTYPE>'"));
    assert_eq!(
        usage(&["--resume", "runs/0001", "--lr", "1"]),
        "error: the argument '--resume <DIR>' cannot be used with '--lr <RATE>'"
    );
    assert_eq!(
        message(&["--steps", "10", "--warmup", "10"]),
        "--warmup 10 must be below --steps 10; lower --warmup or raise --steps"
    );
    assert_eq!(
        message(&["--lr", "1e-3", "--min-lr", "1e-2"]),
        "--min-lr 0.01 is above --lr 0.001, but the learning rate falls from --lr to --min-lr; lower --min-lr"
    );
}

/// Every option of a recipe is fixed by the checkpoint, except the number of steps.
#[test]
fn resume_takes_no_recipe() {
    use clap::CommandFactory;
    let command = crate::cli::Cli::command();
    for argument in command.get_arguments() {
        let Some(option) = argument.get_long() else { continue };
        if ["resume", "data", "device", "steps", "help"].contains(&option) {
            continue;
        }
        let number = if option.starts_with("beta") { "0.5" } else { "1" };
        let value =
            argument.get_possible_values().first().map_or(number.to_string(), |value| value.get_name().to_string());
        let option_and_value = [format!("--{option}"), value];
        let given = if argument.get_action().takes_values() { 2 } else { 1 };
        let option_and_value = option_and_value[..given].iter().map(String::as_str);
        let said = usage(&["--resume", "runs/0001"].into_iter().chain(option_and_value).collect::<Vec<_>>());
        assert!(said.starts_with("error: the argument '--resume <DIR>' cannot be used with"), "--{option}: {said}");
    }
}

#[cfg(not(feature = "cuda"))]
#[test]
fn cuda_needs_its_feature() {
    let sentence =
        "--device cuda found no usable GPU: the candle crate has not been built with cuda support; build with \
                    --features cuda, or use --device cpu";
    assert_eq!(message(&["--device", "cuda"]), sentence);
    let room = Room::new();
    run(&["--data", &room.string("text.txt"), "--out", &room.string("out"), "--steps", "1", "--context", "8"]).unwrap();
    assert_eq!(message(&["sample", "--checkpoint", &room.string("out"), "--device", "cuda"]), sentence);
}

#[test]
fn a_loss_that_is_not_finite_stops_the_run() {
    let room = Room::new();
    let args = ["--data", &room.string("text.txt"), "--out", &room.string("out"), "--context", "8", "--steps", "20"];
    assert_eq!(
        message(&[&args[..], &["--lr", "1e30"]].concat()),
        "step 1: the held-out loss after it is NaN; the last checkpoint is older; a smaller --lr or a longer \
         --warmup may help"
    );
    // The checkpoint from before it stays.
    let checkpoint = checkpoint::load(&room.path("out").join(checkpoint::FILE_NAME), &Device::Cpu).unwrap();
    assert_eq!(checkpoint.state.step, 0);
}

/// All steps before the non-finite one are in the metrics, also if the host reads several steps at once.
#[test]
fn steps_before_a_loss_that_is_not_finite_are_recorded() -> Result<()> {
    let room = Room::new();
    // With this decay, each step makes the matrices several times as large, until their products overflow f32.
    let config = short_config(&room, AttentionKind::Flash);
    let config = Config { lr: 1e-3, weight_decay: 1e5, warmup: 20, eval_interval: 40, ..config };
    let mut said = Vec::new();
    for (name, steps_ahead) in [("1", 1), ("10", 10)] {
        let mut run = Run::new(config.clone(), Device::Cpu)?;
        run.steps_ahead = steps_ahead;
        let error = run.train(&RunFolder::create(&room.path(name))?).unwrap_err().to_string();
        let rows: Vec<_> =
            rows(&room.path(name)).into_iter().map(|row| (row.step, row.train_loss, row.grad_norm)).collect();
        assert!(error.starts_with(&format!("step {}: the loss is ", rows.len() + 1)), "{error}");
        assert!(rows.len() > 2, "the first of several that are read at once: {error}");
        said.push((error, rows));
    }
    assert_eq!(said[0], said[1]);
    Ok(())
}

/// A run of one step, and its folder.
fn trained(room: &Room) -> String {
    let out = room.string("out");
    run(&["--data", &room.string("text.txt"), "--out", &out, "--steps", "1", "--context", "8", "--batch", "1"])
        .unwrap();
    out
}

#[test]
fn checkpoints_that_cannot_be_used() -> Result<()> {
    let room = Room::new();
    let out = trained(&room);
    let file = room.path("out").join(checkpoint::FILE_NAME);
    let name = file.display().to_string();
    let good = fs::read(&file)?;
    let say = |bytes: &[u8]| {
        fs::write(&file, bytes).unwrap();
        let said = message(&["sample", "--checkpoint", &out]);
        assert_eq!(message(&["eval", "--checkpoint", &out]), said);
        assert_eq!(message(&["--resume", &out, "--steps", "2"]), said);
        said
    };
    let refused = |reason: &str| format!("{name} cannot be used: {reason}; restore it from a copy or start a new run");

    assert_eq!(say(b""), refused("it is incomplete, damaged or not a safetensors file (header too small)"));
    assert_eq!(
        say(&good[..good.len() / 2]),
        refused("it is incomplete, damaged or not a safetensors file (incomplete metadata, file not fully covered)")
    );
    assert_eq!(
        say(&good[..100]),
        refused("it is incomplete, damaged or not a safetensors file (invalid header length)")
    );
    assert_eq!(
        say("not what you think. ".repeat(50).as_bytes()),
        refused("it is incomplete, damaged or not a safetensors file (header too large)")
    );
    let foreign = candle_core::Tensor::zeros((2, 3), candle_core::DType::F32, &candle_core::Device::Cpu)?;
    let foreign = safetensors::serialize([("wte", &foreign)], None)?;
    assert_eq!(say(&foreign), refused("another program or version wrote it (no candle-fa2-gpt-3 in its metadata)"));
    Ok(())
}

#[test]
fn runs_that_are_not_there() {
    let room = Room::new();
    let absent = room.string("absent");
    assert_eq!(
        message(&["sample", "--checkpoint", &absent]),
        format!("there is no run in {absent}: no checkpoint.safetensors; give the folder of a run, such as runs/0001")
    );
    let room_itself = room.folder.path().display().to_string();
    assert_eq!(
        message(&["eval", "--checkpoint", &room_itself]),
        format!(
            "there is no run in {room_itself}: no checkpoint.safetensors; give the folder of a run, such as runs/0001"
        )
    );
    let output = child_process(&["sample"], room.folder.path(), None);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(
        said.contains("error: no run with a checkpoint in runs; train one first, or name it with --checkpoint"),
        "{said}"
    );
}

/// A damaged metrics file is an error. After it is moved away, the run resumes and starts a new file.
#[test]
fn metrics_that_are_damaged() -> Result<()> {
    let room = Room::new();
    let out = trained(&room);
    let metrics = room.path("out/metrics.csv");
    let good = fs::read_to_string(&metrics)?;
    let heading = good.lines().next().unwrap();
    for (text, reason) in [
        (format!("{heading}\n1,what,,1,1,1\n"), "CSV deserialize error: record 1 (line: 2"),
        ("my notes\n".to_string(), "its first line is not step,train_loss,val_loss,lr,grad_norm,tokens_per_s; "),
    ] {
        fs::write(&metrics, &text)?;
        let said = message(&["--resume", &out, "--steps", "2"]);
        assert!(said.starts_with(&format!("{} is damaged: {reason}", metrics.display())), "{said}");
        assert!(said.ends_with("; restore it from a copy, or move it away to start a new one"), "{said}");
        assert_eq!(fs::read_to_string(&metrics)?, text);
    }
    fs::remove_file(&metrics)?;
    run(&["--resume", &out, "--steps", "2"])?;
    assert_eq!(rows(&room.path("out")).iter().map(|row| row.step).collect::<Vec<_>>(), [2]);
    Ok(())
}

/// The repository changes. So a run on its text keeps a copy, and uses it.
#[test]
fn the_default_text_may_have_changed() -> Result<()> {
    let room = Room::new();
    let sources = room.path("sources");
    fs::create_dir_all(&sources)?;
    fs::write(sources.join("Cargo.toml"), "")?;
    fs::write(sources.join("lib.rs"), super::story(3000))?;
    let say = |args: &[&str]| {
        let output = child_process(args, &sources, None);
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8_lossy(&output.stdout).into_owned()
    };
    say(&["--steps", "2", "--context", "16", "--batch", "2"]);
    fs::write(sources.join("README.md"), "New.")?;
    let evaluated = say(&["eval"]);
    assert!(evaluated.contains("of the held-out part of runs/0001/corpus.txt"), "{evaluated}");
    say(&["--resume", "runs/0001", "--steps", "3"]);
    Ok(())
}

/// Another text than that of the training is evaluated only if it is named.
#[test]
fn a_text_may_have_changed() -> Result<()> {
    let room = Room::new();
    let out = trained(&room);
    let text = room.string("text.txt");
    fs::write(&text, super::story(5999))?;
    assert_eq!(
        message(&["eval", "--checkpoint", &out]),
        format!(
            "{text} is not the text that the run was trained on (SHA-256 2d894f9891e9 instead of 0cdd693b159c); name the \
             same text with --data FILE"
        )
    );
    run(&["eval", "--checkpoint", &out, "--data", &text])
}
