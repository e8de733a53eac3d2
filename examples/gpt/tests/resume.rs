//! A run that was stopped and resumed writes the same files as a run that never stopped.

use super::{child_process, names, rows, run, short_config, Room};
use crate::checkpoint;
use crate::config::{AttentionKind, Config};
use crate::files::RunFolder;
use crate::train::Run;
use anyhow::Result;
use candle_core::Device;
use std::fs;
use std::path::Path;

const STEPS: usize = 8;

/// Eight steps of two batches each, with checkpoints before the first and after steps 1, 3, 6 and 8.
fn train_args<'a>(text: &'a str, out: &'a str) -> Vec<&'a str> {
    let mut args = vec!["train", "--data", text, "--out", out, "--steps", "8", "--eval-interval", "3"];
    args.extend(["--context", "16", "--batch", "2", "--accumulation", "2", "--eval-windows", "2", "--seed", "7"]);
    args
}

fn bytes(dir: &Path, name: &str) -> Vec<u8> {
    fs::read(dir.join(name)).unwrap()
}

/// Checks that both folders hold the same run: the metrics without the measured speed, and all bytes of the last checkpoint
/// and of the loss curve. No other file must be in `dir`.
pub fn assert_same_run(dir: &Path, uninterrupted: &Path, point: &str) {
    assert_eq!(rows(dir), rows(uninterrupted), "metrics after {point}");
    assert!(
        bytes(dir, checkpoint::FILE_NAME) == bytes(uninterrupted, checkpoint::FILE_NAME),
        "the checkpoint differs after {point}"
    );
    assert!(
        bytes(dir, crate::plot::FILE_NAME) == bytes(uninterrupted, crate::plot::FILE_NAME),
        "the loss curve differs after {point}"
    );
    assert_eq!(names(dir), ["checkpoint.safetensors", "loss.svg", "metrics.csv", "train.lock"], "files after {point}");
}

#[test]
fn a_run_aborted_anywhere_resumes_bit_for_bit() -> Result<()> {
    let room = Room::new();
    let text = room.string("text.txt");
    let uninterrupted = room.string("uninterrupted");
    run(&train_args(&text, &uninterrupted))?;
    assert_eq!(rows(&room.path("uninterrupted")).len(), STEPS);

    // The point of the abort, and the step of the checkpoint that must be there.
    let points = [
        ("inside a step#2", 1),
        ("inside a step#6", 3),
        ("before checkpoint.safetensors#3", 1),
        ("after checkpoint.safetensors#4", 6),
        ("after checkpoint.safetensors#1", 0),
    ];
    for (number, (point, step)) in points.into_iter().enumerate() {
        let out = room.string(&number.to_string());
        let dir = room.path(&number.to_string());
        let aborted = child_process(&train_args(&text, &out), room.folder.path(), Some(point));
        let said = String::from_utf8_lossy(&aborted.stderr).into_owned();
        assert!(!aborted.status.success() && said.contains("aborted"), "{point}: {said}");
        let reached = checkpoint::load(&dir.join(checkpoint::FILE_NAME), &Device::Cpu)?.state.step;
        assert_eq!(reached, step, "the checkpoint after {point}");

        run(&["train", "--resume", &out])?;
        assert_same_run(&dir, &room.path("uninterrupted"), point);
    }
    Ok(())
}

/// In bf16 the parameters are rounded, and the checkpoint has the f32 weights of the optimizer.
#[test]
fn a_run_in_bf16_resumes_bit_for_bit() -> Result<()> {
    let room = Room::new();
    let (text, uninterrupted, aborted) =
        (room.string("text.txt"), room.string("uninterrupted"), room.string("aborted"));
    let args = |out| [&train_args(&text, out)[..], &["--dtype", "bf16", "--checkpoint-activations"]].concat();
    run(&args(&uninterrupted))?;
    child_process(&args(&aborted), room.folder.path(), Some("inside a step#6"));
    run(&["train", "--resume", &aborted])?;
    assert_same_run(&room.path("aborted"), &room.path("uninterrupted"), "an abort");
    Ok(())
}

/// A run aborts while it resumes. It can still be resumed.
#[test]
fn a_resumed_run_that_aborts_resumes_bit_for_bit() -> Result<()> {
    let room = Room::new();
    let text = room.string("text.txt");
    run(&train_args(&text, &room.string("uninterrupted")))?;
    let out = room.string("aborted");
    child_process(&train_args(&text, &out), room.folder.path(), Some("inside a step#6"));
    for point in ["inside a step#1", "inside a step#2"] {
        let resumed = child_process(&["--resume", &out], room.folder.path(), Some(point));
        assert!(!resumed.status.success(), "{point}: {}", String::from_utf8_lossy(&resumed.stdout));
    }
    let resumed = child_process(&["--resume", &out], room.folder.path(), None);
    assert!(resumed.status.success(), "{}", String::from_utf8_lossy(&resumed.stderr));
    assert_same_run(&room.path("aborted"), &room.path("uninterrupted"), "three aborts");
    Ok(())
}

/// Queues several steps before reading their outcomes, as on a GPU. The results must be the same as with one.
#[test]
fn steps_ahead_change_nothing() -> Result<()> {
    let room = Room::new();
    let config = Config { steps: 27, eval_interval: 13, context: 16, ..short_config(&room, AttentionKind::Flash) };
    for (name, steps_ahead) in [("1", 1), ("10", 10)] {
        let mut run = Run::new(config.clone(), Device::Cpu)?;
        run.steps_ahead = steps_ahead;
        run.train(&RunFolder::create(&room.path(name))?)?;
    }
    assert_eq!(rows(&room.path("10")).len(), 27);
    assert_same_run(&room.path("10"), &room.path("1"), "steps ahead");
    Ok(())
}

/// The process dies before its first checkpoint is complete. A resume is an error that says so. The same new run can be
/// started again in the folder.
#[test]
fn a_run_without_a_checkpoint_is_not_resumed() -> Result<()> {
    let room = Room::new();
    let out = room.string("out");
    let text = room.string("text.txt");
    let args = train_args(&text, &out);
    child_process(&args, room.folder.path(), Some("before checkpoint.safetensors#1"));
    assert_eq!(names(&room.path("out")), ["train.lock"]);
    fs::write(room.path("out/checkpoint.safetensors.tmp"), "a part")?;
    fs::write(room.path("out/.tmpAbC123"), "a part")?;
    assert_eq!(
        super::message(&["--resume", &out]),
        format!("there is no run in {out}: no checkpoint.safetensors; give the folder of a run, such as runs/0001")
    );
    run(&args)?;
    assert_eq!(names(&room.path("out")), ["checkpoint.safetensors", "loss.svg", "metrics.csv", "train.lock"]);
    Ok(())
}

/// The process dies after its last checkpoint. All files of the run must be complete.
#[test]
fn a_run_aborted_after_its_last_checkpoint_is_whole() -> Result<()> {
    let room = Room::new();
    let text = room.string("text.txt");
    run(&train_args(&text, &room.string("uninterrupted")))?;
    let point = "after checkpoint.safetensors#5";
    child_process(&train_args(&text, &room.string("aborted")), room.folder.path(), Some(point));
    assert_same_run(&room.path("aborted"), &room.path("uninterrupted"), point);
    Ok(())
}

/// A finished run can be trained for more steps. The rows of the earlier steps stay.
#[test]
fn a_finished_run_goes_on_with_more_steps() -> Result<()> {
    let room = Room::new();
    let out = room.string("out");
    run(&train_args(&room.string("text.txt"), &out))?;
    assert_eq!(
        super::message(&["--resume", &out]),
        format!("the run in {out} has done its 8 steps; add --steps N with N above 8 to train it further")
    );
    let before = rows(&room.path("out"));
    run(&["train", "--resume", &out, "--steps", "10"])?;
    let after = rows(&room.path("out"));
    assert_eq!(after.len(), 10);
    assert_eq!(after[..STEPS], before);
    Ok(())
}

/// A resume accepts the same text at another path, and refuses another text.
#[test]
fn a_moved_text_is_found_and_another_is_refused() -> Result<()> {
    let room = Room::new();
    let (text, out) = (room.string("text.txt"), room.string("out"));
    child_process(&train_args(&text, &out), room.folder.path(), Some("inside a step#6"));
    fs::rename(&text, room.path("moved.txt"))?;
    fs::write(&text, super::story(5999))?;
    assert_eq!(
        super::message(&["--resume", &out]),
        format!(
            "{text} is not the text that the run was trained on (SHA-256 2d894f9891e9 instead of 0cdd693b159c); name the \
             same text with --data FILE"
        )
    );
    run(&["--resume", &out, "--data", &room.string("moved.txt")])?;
    assert_eq!(rows(&room.path("out")).len(), STEPS);
    Ok(())
}
