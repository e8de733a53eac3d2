//! Training, from the first step or from a checkpoint. Both use the same loop, so on a CPU their results are identical.

use crate::checkpoint::{self, Checkpoint, State};
use crate::config::Config;
use crate::data::{window_starts, windows, Batches, Corpus, Text, KEPT_FILE_NAME};
use crate::files::{cannot_write, RunFolder};
use crate::learner::{diverged, Learner, Outcome};
use crate::metrics::{self, Metrics, Row};
use crate::model::{init_parameters, Gpt};
use crate::output;
use crate::plot;
use crate::progress::{clock, Progress};
use crate::rng::Rng;
use crate::sample::{sample, Sampling};
use crate::sizes;
use crate::stop::{Stop, Stopped};
use anyhow::{bail, Result};
use candle_core::Device;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Instant;

/// Number of tokens in the sample at the end of training. The tests train dozens of models and read no sample.
const SAMPLE_TOKENS: usize = if cfg!(test) { 10 } else { 400 };

/// Number of steps queued on a GPU before the host waits for all of them.
///
/// After each wait the GPU is idle until the host has queued the next step. So the host waits only once in ten steps. With a
/// larger number, progress and the error of a non-finite loss would come later. Operators of a CPU have finished when they
/// return, so there it is 1.
const STEPS_AHEAD: usize = 10;

/// A run in memory: everything that the next step needs.
pub struct Run {
    config: Config,
    corpus: Corpus,
    device: Device,
    learner: Learner,
    rng: Rng,
    batches: Batches,
    step: usize,            // number of steps done or queued
    queued: Vec<Outcome>,   // steps queued since the last wait
    clock: Instant,         // started after the last wait
    pub steps_ahead: usize, // steps to queue before a wait
}

impl Run {
    /// A new run, before its first step.
    pub fn new(config: Config, device: Device) -> Result<Self> {
        let text = Text::read(config.data.as_deref())?;
        Self::start(config, text, None, device)
    }

    /// Loads the run in `folder` from its checkpoint. `data` replaces the path of the text, and `steps` the number of steps.
    pub fn resume(folder: &RunFolder, data: Option<PathBuf>, steps: Option<usize>, device: Device) -> Result<Self> {
        let dir = folder.path();
        let saved = checkpoint::load(&dir.join(checkpoint::FILE_NAME), &device)?;
        let State { step, mut config, .. } = saved.state.clone();
        config.steps = steps.unwrap_or(config.steps);
        if step >= config.steps {
            bail!(
                "the run in {} has done its {step} steps; add --steps N with N above {step} to train it further",
                dir.display()
            );
        }
        sizes::check(&config, sizes::memory_of(&device))?;
        let text = Text::of_run(dir, &config, data.as_deref())?;
        text.check_is(&saved.state.text_sha256)?;
        config.data = data.or(config.data);
        Self::start(config, text, Some(saved), device)
    }

    /// The run of `config`, at its beginning or where it was saved.
    fn start(config: Config, text: Text, saved: Option<Checkpoint>, device: Device) -> Result<Self> {
        let corpus = Corpus::new(text, config.tokenizer, config.context)?;
        let (step, learner, batches, rng) = match saved {
            None => {
                let mut rng = Rng::new(config.seed);
                let vocab_size = config.tokenizer.padded_vocab_size();
                let parameters = init_parameters(&config, vocab_size, &mut rng, &device)?;
                (0, Learner::new(&config, &parameters)?, Batches::new(&config, &corpus, &mut rng), rng)
            }
            Some(Checkpoint { state, tensors }) => {
                let batches = Batches::at(&config, &corpus, state.cursor);
                (state.step, Learner::restore(&config, &tensors)?, batches, state.rng)
            }
        };
        Ok(Self {
            config,
            corpus,
            steps_ahead: if device.is_cpu() { 1 } else { STEPS_AHEAD },
            device,
            learner,
            rng,
            batches,
            step,
            queued: Vec::new(),
            clock: Instant::now(),
        })
    }

    /// Trains until the last step or until a stop signal. Writes all files into `folder`.
    pub fn train(&mut self, folder: &RunFolder) -> Result<()> {
        let stop = Stop::listen()?;
        let dir = folder.path();
        output::progress(self.describe());
        let started = Instant::now();
        folder.check_still_locked()?;
        if self.step == 0 {
            self.begin(dir)?;
        }
        let mut metrics = Metrics::open(dir, self.step)?;

        self.clock = Instant::now();
        let mut progress = Progress::new(self.step, self.config.steps);
        while self.step < self.config.steps {
            self.queue_step()?;
            let (evaluate, save) = (self.evaluation_is_due(), self.is_due(self.config.checkpoint_interval()));
            if !evaluate && !save && stop.signal().is_none() && self.queued.len() < self.steps_ahead {
                continue;
            }
            self.finish_steps(|row| {
                progress.step(&row);
                metrics.push(row)
            })?;
            let signal = stop.signal().filter(|_| self.step < self.config.steps);
            folder.check_still_locked()?; // before any file is written by its name
            if evaluate {
                plot::save(dir, metrics.rows())?; // before the checkpoint, so that the last checkpoint completes the run
            }
            if save || signal.is_some() {
                if !evaluate {
                    self.held_out_loss(1)?; // an error if the loss is not finite: do not save such a model
                }
                metrics.sync()?;
                self.checkpoint(dir)?; // after the metrics, so that they have all steps that a resume does not run again
            }
            if let Some(signal) = signal {
                return Err(Stopped { signal, step: self.step, dir: dir.to_owned() }.into());
            }
            self.clock = Instant::now();
        }
        stop.end();
        drop(progress);

        output::progress(format_args!("\na sample:{}\n", self.sample()?));
        let val_loss = metrics.rows().last().and_then(|row| row.val_loss).unwrap_or(f32::NAN);
        let time = clock(started.elapsed());
        output::progress(format_args!("held-out loss {val_loss:.4} after {} steps and {time}", self.step));
        let (metrics, plot, checkpoint) = (metrics::FILE_NAME, plot::FILE_NAME, checkpoint::FILE_NAME);
        output::progress(format_args!("{}: {metrics}, {plot}, {checkpoint}", dir.display()));
        Ok(())
    }

    /// Writes the first files of a new run: its checkpoint, and its text if nobody else keeps it.
    pub fn begin(&self, dir: &Path) -> Result<()> {
        self.checkpoint(dir)?;
        if self.config.data.is_none() {
            let text = self.config.tokenizer.decode(&[&self.corpus.train[..], &self.corpus.held_out].concat())?;
            let (path, part) = (dir.join(KEPT_FILE_NAME), dir.join("corpus.txt.tmp"));
            let written = fs::write(&part, text).and_then(|()| fs::rename(part, &path));
            written.map_err(|error| cannot_write(&path, error))?;
        }
        Ok(())
    }

    /// Queues one optimizer step. [`Self::finish_steps`] reads its outcome.
    fn queue_step(&mut self) -> Result<()> {
        let config = &self.config;
        let batches = (0..config.accumulation)
            .map(|_| {
                let starts = self.batches.next(config.batch, &mut self.rng);
                windows(&self.corpus.train, &starts, config.context, &self.device)
            })
            .collect::<candle_core::Result<Vec<_>>>()?;
        self.queued.push(self.learner.step(self.step + 1, &batches)?);
        self.step += 1;
        Ok(())
    }

    /// Whether the current step is evaluated.
    fn evaluation_is_due(&self) -> bool {
        self.is_due(self.config.eval_interval)
    }

    /// Whether the current step is the first, the last, or a multiple of `interval`.
    fn is_due(&self, interval: usize) -> bool {
        self.step == 1 || self.step == self.config.steps || self.step.is_multiple_of(interval)
    }

    /// Waits for the queued steps and gives `record` their rows. Evaluates the last step if that is due. A number that is not
    /// finite is an error, after the rows of the steps before it.
    fn finish_steps(&mut self, mut record: impl FnMut(Row) -> Result<()>) -> Result<()> {
        let queued = std::mem::take(&mut self.queued);
        let numbers = Outcome::read(&queued)?;
        self.device.synchronize()?;
        let tokens = (self.config.tokens_per_step() * queued.len()) as f64;
        let tokens_per_s = (tokens / self.clock.elapsed().as_secs_f64()) as u64;
        for (Outcome { step, lr, .. }, (train_loss, grad_norm)) in queued.into_iter().zip(numbers) {
            if !train_loss.is_finite() || !grad_norm.is_finite() {
                let what = format!("the loss is {train_loss} and the norm of its gradient {grad_norm}");
                return Err(diverged(step, &what));
            }
            let val_loss = match step == self.step && self.evaluation_is_due() {
                true => Some(self.held_out_loss(self.config.eval_windows)?),
                false => None,
            };
            record(Row { step, train_loss, val_loss, lr, grad_norm, tokens_per_s })?;
        }
        Ok(())
    }

    /// Runs one optimizer step and waits for it.
    #[cfg(test)]
    pub fn one_step(&mut self) -> Result<Row> {
        self.queue_step()?;
        let mut last = None;
        self.finish_steps(|row| {
            last = Some(row);
            Ok(())
        })?;
        Ok(last.expect("one step"))
    }

    /// A sample of the model's text. It begins with its prompt, a line break.
    fn sample(&self) -> Result<String> {
        let sampling = Sampling { tokens: SAMPLE_TOKENS, ..Sampling::default() };
        // Use a clone of the generator, so that the sample does not change the batches of a resumed run.
        sample(&self.learner.frozen()?, "\n", &sampling, &mut self.rng.clone())
    }

    /// Mean loss over `count` windows spread over the held-out text. The windows are always the same. A non-finite loss is
    /// an error.
    fn held_out_loss(&self, count: usize) -> Result<f32> {
        let all = window_starts(self.corpus.held_out.len(), self.config.context, 0);
        let stride = all.len().div_ceil(count);
        let starts: Vec<usize> = all.into_iter().step_by(stride).collect();
        let model = self.learner.frozen()?;
        match mean_loss(&model, &self.corpus.held_out, &starts)? {
            loss if loss.is_finite() => Ok(loss),
            loss => Err(diverged(self.step, &format!("the held-out loss after it is {loss}"))),
        }
    }

    fn checkpoint(&self, dir: &Path) -> Result<()> {
        let state = State {
            step: self.step,
            config: self.config.clone(),
            text_sha256: self.corpus.sha256.clone(),
            rng: self.rng.clone(),
            cursor: self.batches.cursor().clone(),
        };
        checkpoint::save(dir, &state, &self.learner.optimizer)
    }

    fn describe(&self) -> String {
        let Config { num_layers, num_heads, embed_dim, context, batch, accumulation, .. } = self.config;
        let weights: usize = self.learner.model.variables().values().map(|var| var.elem_count()).sum();
        let accumulated = if accumulation == 1 { String::new() } else { format!("{accumulation} x ") };
        format!(
            "text   {}: {} tokens to train on, {} held out (SHA-256 {})\n\
             model  {num_layers} layers, {num_heads} heads, {embed_dim} wide, context {context}: {:.2} M parameters\n\
             steps  {} to {}, each {accumulated}{batch} windows of {context} tokens",
            self.corpus.name,
            self.corpus.train.len(),
            self.corpus.held_out.len(),
            &self.corpus.sha256[..12],
            weights as f64 / 1e6,
            self.step + 1,
            self.config.steps,
        )
    }
}

/// Mean loss over the windows of `tokens` at `starts`.
pub fn mean_loss(model: &Gpt, tokens: &[u32], starts: &[usize]) -> Result<f32> {
    let config = model.config();
    let mut sum = 0.0;
    for starts in starts.chunks(config.batch) {
        let (tokens, targets) = windows(tokens, starts, config.context, model.device())?;
        sum += f64::from(model.loss(&tokens, &targets)?.to_scalar::<f32>()?) * starts.len() as f64;
    }
    Ok((sum / starts.len() as f64) as f32)
}
