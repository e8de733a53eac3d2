//! Tests of single parts: text, batches, files, metrics, samples.

use super::{child_process, run, short_config, story, Room};
use crate::checkpoint;
use crate::config::{AttentionKind, Config, Preset};
use crate::data::{repository_files, Batches, Corpus, Text, KEPT_FILE_NAME};
use crate::files::{check_free, newest_run, RunFolder};
use crate::metrics::{self, Metrics, Row};
use crate::model::{init_parameters, parameter_shapes, Named};
use crate::plot;
use crate::rng::Rng;
use crate::sample::{sample, Sampling, Trained};
use crate::time::{measure, Plan};
use crate::tokenizer::Tokenizer;
use anyhow::Result;
use candle_core::Device;
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

#[test]
fn presets_have_the_sizes_they_are_named_after() {
    let parameters = |preset, vocab_size| -> usize {
        let shapes = parameter_shapes(&Config::preset(preset), vocab_size);
        shapes.values().map(|shape| shape.iter().product::<usize>()).sum()
    };
    assert_eq!(parameters(Preset::Gpt124m, 50_257), 124_439_808);
    assert_eq!(parameters(Preset::Gpt350m, 50_257), 354_823_168);
    assert_eq!(parameters(Preset::Gpt1300m, 50_257), 1_315_723_264);
    for preset in [Preset::Tiny, Preset::Gpt124m, Preset::Gpt350m, Preset::Gpt1300m] {
        let config = Config::preset(preset);
        assert_eq!(config.head_dim() * config.num_heads, config.embed_dim, "{preset:?}");
    }
}

#[test]
fn initial_weights_are_drawn_as_gpt2_draws_them() -> Result<()> {
    let draw = |seed| init_parameters(&Config::preset(Preset::Tiny), 256, &mut Rng::new(seed), &Device::Cpu);
    let parameters = draw(1)?;
    let std = |name: &str| -> Result<f32> {
        let values = parameters[name].flatten_all()?.to_vec1::<f32>()?;
        Ok((values.iter().map(|value| value * value).sum::<f32>() / values.len() as f32).sqrt())
    };
    let close = |got: f32, wanted: f32| (got / wanted - 1.0).abs() < 0.05;
    assert!(close(std("wte")?, 0.02), "{}", std("wte")?);
    assert!(close(std("h.3.mlp.c_fc.weight")?, 0.02));
    assert!(close(std("h.3.mlp.c_proj.weight")?, 0.02 / 8f32.sqrt()), "scaled by 1 / sqrt(2 layers)");
    assert_eq!(std("h.0.attn.c_attn.bias")?, 0.0);
    assert_eq!(std("h.0.ln_1.weight")?, 1.0);
    let values = |parameters: &Named| parameters["wpe"].flatten_all()?.to_vec1::<f32>();
    assert_eq!(values(&draw(1)?)?, values(&parameters)?);
    assert_ne!(values(&draw(2)?)?, values(&parameters)?);
    Ok(())
}

/// A generator that is written to JSON and read back continues at its position.
#[test]
fn the_random_state_survives_json() -> Result<()> {
    let mut rng = Rng::new(42);
    for _ in 0..100 {
        let mut copy: Rng = serde_json::from_str(&serde_json::to_string(&rng)?)?;
        assert_eq!(copy, rng);
        assert_eq!(copy.uniform(), rng.uniform());
        assert_eq!(copy.normal(3, 1.0), rng.normal(3, 1.0));
        assert_eq!(copy.seed(), rng.seed());
    }
    Ok(())
}

#[test]
fn tokenizers_give_the_text_back() -> Result<()> {
    let all_bytes: Vec<u8> = (0..=255).collect();
    let bytes = Tokenizer::Bytes;
    assert_eq!(bytes.decode(&bytes.encode(&all_bytes, "text")?)?, all_bytes);
    assert_eq!(bytes.vocab_size(), 256);

    let gpt2 = Tokenizer::Gpt2;
    assert_eq!(gpt2.encode(b"Hello world", "text")?, [15496, 995]);
    let text = "fn main() {\n    println!(\"naïve Größe 数学 🙂\");\n}\r\n\t<|endoftext|>";
    let tokens = gpt2.encode(text.as_bytes(), "text")?;
    assert_eq!(gpt2.decode(&tokens)?, text.as_bytes());
    assert!(tokens.iter().all(|&token| token != 50_256), "a text cannot hold the end-of-text token: {tokens:?}");
    assert!(gpt2.decode(&[50_256]).is_ok());
    Ok(())
}

fn corpus(config: &Config) -> Result<Corpus> {
    Corpus::new(Text::read(config.data.as_deref())?, config.tokenizer, config.context)
}

#[test]
fn the_last_tenth_is_held_out() -> Result<()> {
    let room = Room::new();
    let corpus = corpus(&short_config(&room, AttentionKind::Flash))?;
    let bytes = |tokens: &[u32]| tokens.iter().map(|&token| token as u8).collect::<Vec<u8>>();
    assert_eq!(bytes(&corpus.train), story(6000).as_bytes()[..5400]);
    assert_eq!(bytes(&corpus.held_out), story(6000).as_bytes()[5400..]);
    Ok(())
}

/// Each epoch visits each of its windows once. Epochs differ in their order. A cursor restores the position.
#[test]
fn batches_cover_the_text_and_resume_at_their_cursor() -> Result<()> {
    let room = Room::new();
    let config = short_config(&room, AttentionKind::Flash);
    let corpus = corpus(&config)?;
    let mut rng = Rng::new(3);
    let mut batches = Batches::new(&config, &corpus, &mut rng);
    let windows = 5400 / config.context - 2; // the smallest number, over all offsets
    let mut epochs = Vec::new();
    for _ in 0..2 {
        let epoch = batches.next(windows, &mut rng);
        let starts: BTreeSet<usize> = epoch.iter().copied().collect();
        assert_eq!(starts.len(), windows, "a window came twice in one epoch");
        let first = starts.first().unwrap() % config.context;
        assert!(starts.iter().all(|start| start % config.context == first && start + config.context < 5400));
        epochs.push(epoch);
        batches.next(3, &mut rng); // past the end of the epoch
        let mut again = Batches::at(&config, &corpus, batches.cursor().clone());
        let mut rng_again = rng.clone();
        assert_eq!(again.next(400, &mut rng_again), batches.next(400, &mut rng), "after the cursor");
        batches = Batches::new(&config, &corpus, &mut rng);
    }
    assert_ne!(epochs[0], epochs[1]);
    Ok(())
}

#[test]
fn the_repository_is_the_default_text() -> Result<()> {
    let room = Room::new();
    let root = room.path("repository");
    let ours = ["README.md", "cuda/core/mask.cuh", "cuda/fwd.cu", "src/lib.rs"];
    let others = ["notes.txt", "target/a.rs", "runs/b.md", ".hidden/c.md"];
    for name in ours.iter().chain(&others) {
        let path = root.join(name);
        fs::create_dir_all(path.parent().unwrap())?;
        fs::write(path, name)?;
    }
    assert_eq!(repository_files(&root)?, ours.iter().map(|name| root.join(name)).collect());

    let empty = room.path("empty");
    fs::create_dir_all(&empty)?;
    let said = || String::from_utf8_lossy(&child_process(&[], &empty, None).stderr).into_owned();
    let elsewhere = said();
    let sentence =
        "there is no default text: . holds no Cargo.toml; start in the repository, or name a text with --data FILE";
    assert!(elsewhere.contains(&format!("error: {sentence}")), "{elsewhere}");
    fs::write(empty.join("Cargo.toml"), "")?;
    let nothing = said();
    assert!(nothing.contains("error: --data this repository is empty; give a file with text"), "{nothing}");
    assert!(!empty.join("runs").exists());
    Ok(())
}

#[test]
fn numbered_folders_are_new() -> Result<()> {
    let room = Room::new();
    let runs = room.path("runs");
    assert_eq!(RunFolder::create_next(&runs)?.path(), runs.join("0001"));
    fs::create_dir_all(runs.join("0041"))?;
    fs::create_dir(runs.join("experiment"))?;
    fs::create_dir(runs.join("0042"))?;
    assert_eq!(RunFolder::create_next(&runs)?.path(), runs.join("0043"));
    fs::write(runs.join("0041/checkpoint"), "")?;
    assert_eq!(newest_run(&runs, "checkpoint")?, runs.join("0041"));
    check_free(&runs.join("0042"))?;
    check_free(&runs.join("0043"))?;
    assert!(check_free(&runs.join("0041")).is_err());
    Ok(())
}

#[test]
fn runs_that_start_at_once_get_different_folders() {
    let room = Room::new();
    let runs = room.path("runs");
    let create = || RunFolder::create_next(&runs).unwrap().path().to_owned();
    let mut folders = std::thread::scope(|scope| {
        let threads = [(); 8].map(|()| scope.spawn(create));
        threads.map(|thread| thread.join().unwrap())
    });
    folders.sort();
    assert_eq!(folders, std::array::from_fn(|i| runs.join(format!("{:04}", i + 1))));
}

fn row(step: usize, val_loss: Option<f32>) -> Row {
    Row { step, train_loss: 1.0 / 3.0, val_loss, lr: 1e-3, grad_norm: 0.1, tokens_per_s: 1234 }
}

#[test]
fn metrics_have_their_columns() -> Result<()> {
    let room = Room::new();
    let mut metrics = Metrics::open(room.folder.path(), 0)?;
    metrics.push(row(1, Some(2.5)))?;
    metrics.push(row(2, None))?;
    metrics.push(row(3, None))?;
    let path = room.path(metrics::FILE_NAME);
    let text = "step,train_loss,val_loss,lr,grad_norm,tokens_per_s\n1,0.33333334,2.5,0.001,0.1,1234\n2,0.33333334,,0.001,0.1,1234\n";
    assert_eq!(fs::read_to_string(&path)?, format!("{text}3,0.33333334,,0.001,0.1,1234\n"));
    let all = [row(1, Some(2.5)), row(2, None), row(3, None)];
    assert_eq!(metrics::read(&path, usize::MAX)?.0, all);

    // Rows after the checkpoint are removed, also the incomplete last row.
    fs::write(&path, format!("{text}3,0.33333334,,0.001,0.1,1234\n4,0.2"))?;
    let mut metrics = Metrics::open(room.folder.path(), 2)?;
    assert_eq!(fs::read_to_string(&path)?, text);
    metrics.push(row(3, None))?;
    assert_eq!(fs::read_to_string(&path)?, format!("{text}3,0.33333334,,0.001,0.1,1234\n"));
    assert_eq!(metrics.rows().len(), 3);
    Ok(())
}

#[test]
fn the_loss_curve_draws_one_row_or_many() -> Result<()> {
    let room = Room::new();
    for steps in [1, 2, 1000] {
        let rows: Vec<Row> = (1..=steps).map(|step| row(step, (step % 10 == 1).then_some(2.0))).collect();
        plot::save(room.folder.path(), &rows)?;
        let svg = fs::read_to_string(room.path(plot::FILE_NAME))?;
        assert!(svg.starts_with("<svg") && svg.trim_end().ends_with("</svg>"), "{svg}");
        for text in ["loss, nats per token", "step", "training", "held-out, 2.000 at the end"] {
            assert!(svg.contains(text), "{text} is missing after {steps} steps");
        }
        for colour in ["#000000", "#FFFFFF"] {
            assert!(!svg.contains(colour), "{colour} is invisible on a page of that colour");
        }
        assert!(!svg.contains("NaN") && !svg.contains("inf"), "{svg}");
    }
    Ok(())
}

/// In a repository, without options: the default command trains into numbered folders, and `sample` and `eval` use the newest
/// run.
#[test]
fn a_repository_is_all_that_is_needed() -> Result<()> {
    let room = Room::new();
    let root = room.path("repository");
    fs::create_dir_all(root.join("src"))?;
    fs::write(root.join("Cargo.toml"), "")?;
    fs::write(root.join("src/lib.rs"), story(4000))?;
    let said = |args: &[&str]| -> String {
        let output = child_process(args, &root, None);
        assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8_lossy(&output.stdout).into_owned()
    };
    let trained = said(&["--steps", "2", "--batch", "2"]);
    for text in
        ["this repository: 3601 tokens to train on, 400 held out", "steps  1 to 2", "a sample:", "held-out loss"]
    {
        assert!(trained.contains(text), "{text}: {trained}");
    }
    said(&["train", "--steps", "1", "--batch", "1", "--context", "16"]);
    for run in ["runs/0001", "runs/0002"] {
        for name in [metrics::FILE_NAME, plot::FILE_NAME, checkpoint::FILE_NAME, KEPT_FILE_NAME] {
            assert!(root.join(run).join(name).is_file(), "{run}/{name}");
        }
    }
    assert!(said(&["sample", "--prompt", "the query", "--tokens", "20"]).contains("the query"));
    assert!(said(&["eval"]).contains("on 384 tokens of the held-out part of runs/0002/corpus.txt"));
    Ok(())
}

/// Two measurements are two rows with one heading. Their numbers are consistent.
#[test]
fn a_measurement_is_a_row() -> Result<()> {
    let room = Room::new();
    let csv = room.string("speed.csv");
    let args = ["time", "--steps", "2", "--warmup", "1", "--context", "16", "--batch", "2", "--csv", &csv];
    run(&[&args[..], &["--peak", "2", "--profile"]].concat())?;
    run(&[&args[..], &["--attention", "none", "--accumulation", "2"]].concat())?;
    let rows: Vec<BTreeMap<String, String>> =
        csv::Reader::from_path(&csv)?.deserialize().collect::<std::result::Result<_, _>>()?;
    let number = |row: usize, column: &str| rows[row][column].parse::<f64>();
    assert_eq!(rows.len(), 2);
    assert_eq!((rows[0]["attention"].as_str(), rows[1]["attention"].as_str()), ("flash", "none"));
    for (row, batches) in [(0, 1.0), (1, 2.0)] {
        let tokens_per_s = number(row, "tokens_per_s")?;
        let close = |got: f64, want: f64| (got / want - 1.0).abs() < 1e-9;
        assert!(close(number(row, "ms_per_step")?, batches * 32e3 / tokens_per_s));
        let attention = if row == 0 { 6.0 * 4.0 * 128.0 * 16.0 } else { 0.0 };
        let flops_per_token = 6.0 * number(row, "parameters")? + attention;
        assert!(close(number(row, "model_tflops")?, flops_per_token * tokens_per_s / 1e12));
    }
    assert!((number(0, "mfu_percent")? / number(0, "model_tflops")? - 50.0).abs() < 1e-9);
    assert_eq!(rows[1]["mfu_percent"], "", "the peak of a CPU is not known");
    assert!((number(0, "last_loss")? - 256f64.ln()).abs() < 0.5);
    Ok(())
}

/// A profile divides the time of a step among its operators.
#[test]
fn a_profile_accounts_for_a_step() -> Result<()> {
    let config = Config { context: 16, batch: 2, accumulation: 2, ..Config::preset(Preset::Tiny) };
    let plan = Plan { steps: 2, warmup: 1, peak_tflops: None, profile: true };
    let profile = measure(&config, &plan, &Device::Cpu)?.profile;
    let names: BTreeSet<&str> = profile.iter().map(|(name, _)| name.as_str()).collect();
    let attention = "flash_attention_qkv";
    for operator in ["embedding", "layer_norm", "linear", attention, "linear_add", "mlp_add", "linear_cross_entropy"] {
        assert!(
            names.contains(operator) && names.contains(&*format!("{operator} backward")),
            "{operator}: {profile:?}"
        );
    }
    assert!(["after linear", "optimizer"].iter().all(|name| names.contains(name)), "{profile:?}");
    assert!(profile.iter().all(|(_, seconds)| *seconds > 0.0), "{profile:?}");
    Ok(())
}

#[test]
fn a_trained_model_writes_and_is_measured() -> Result<()> {
    let room = Room::new();
    let out = room.string("out");
    let args = ["--data", &room.string("text.txt"), "--out", &out, "--context", "32", "--batch", "4"];
    run(&[&args[..], &["--steps", "10", "--eval-windows", "100"]].concat())?;
    let trained = Trained::load(Path::new(&out), &Device::Cpu)?;

    let sampling = Sampling { tokens: 40, ..Sampling::default() };
    let write = |sampling: &Sampling, seed| sample(&trained.model, "the ", sampling, &mut Rng::new(seed));
    let text = write(&sampling, 1)?;
    assert!(text.starts_with("the ") && text.chars().count() == 44, "{text}");
    assert_eq!(write(&sampling, 1)?, text, "one seed, one text");
    assert_ne!(write(&sampling, 2)?, text);
    let greedy = write(&Sampling { temperature: 0.0, ..sampling.clone() }, 1)?;
    assert_eq!(write(&Sampling { top_k: 1, ..sampling.clone() }, 2)?, greedy, "both take the most likely token");
    let unprompted = sample(&trained.model, "", &sampling, &mut Rng::new(1));
    assert!(unprompted.unwrap_err().to_string().starts_with("--prompt is empty"));

    // All 18 held-out windows went into the last evaluation of the training.
    let recorded = metrics::read(&room.path("out/metrics.csv"), 10)?.0[9].val_loss.unwrap();
    let held_out = trained.evaluate(None)?;
    assert_eq!(held_out.loss as f32, recorded);
    assert_eq!(held_out.tokens, 18 * 32);
    assert!((held_out.bits_per_byte - held_out.loss / std::f64::consts::LN_2).abs() < 1e-9, "a token is a byte here");
    let file = Trained::load(&room.path("out/checkpoint.safetensors"), &Device::Cpu)?;
    assert_eq!(file.evaluate(None)?.loss, held_out.loss);

    fs::write(room.path("other.txt"), story(1000).replace("the", "THE"))?;
    let other = trained.evaluate(Some(&room.path("other.txt")))?;
    assert_eq!(other.tokens, 31 * 32, "all of another text");
    assert!(other.loss > held_out.loss);
    fs::write(room.path("short.txt"), story(32))?;
    let short = room.path("short.txt");
    assert_eq!(
        trained.evaluate(Some(&short)).err().unwrap().to_string(),
        format!(
            "{} is too short for the model's context 32: it has 32 tokens and needs 33; give a longer text",
            short.display()
        )
    );
    Ok(())
}

/// Byte-pair tokens are longer than a byte. Bits per byte take this into account.
#[test]
fn gpt2_tokens_train_and_evaluate() -> Result<()> {
    let room = Room::new();
    let out = room.string("out");
    let args = ["--data", &room.string("text.txt"), "--out", &out, "--context", "8", "--batch", "1"];
    run(&[&args[..], &["--steps", "1", "--tokenizer", "gpt2", "--eval-windows", "2"]].concat())?;
    let trained = Trained::load(Path::new(&out), &Device::Cpu)?;
    let evaluation = trained.evaluate(None)?;
    assert!((evaluation.loss - 50_257f64.ln()).abs() < 0.5, "{evaluation}");
    assert!(evaluation.bits_per_byte < evaluation.loss / std::f64::consts::LN_2 / 3.0, "{evaluation}");
    Ok(())
}
