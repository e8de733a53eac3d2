//! Training, from the first step or from a checkpoint. Both ways lead through the same loop, bit for bit.

use crate::checkpoint::{self, Checkpoint, State};
use crate::config::Config;
use crate::data::{way_to_text, window_starts, windows, Batches, Corpus, Text, KEPT_FILE_NAME};
use crate::files::write_atomically;
use crate::learner::{come_apart, mean_gradients, Learner, Outcome};
use crate::metrics;
use crate::metrics::{Metrics, Row};
use crate::model::{check_gradients, init_parameters, Gpt};
use crate::output;
use crate::parameters::Flat;
use crate::plot;
use crate::progress::{clock, Progress};
use crate::rng::Rng;
use crate::sample::{generate, Sampling};
use crate::tokenizer::Tokenizer;
use anyhow::{bail, Result};
use candle_core::Device;
use std::path::{Path, PathBuf};
use std::time::Instant;

/// Tokens of the sample that is printed when training ends; the tests train dozens of models and read no sample.
const SAMPLE_TOKENS: usize = if cfg!(test) { 10 } else { 400 };

/// Steps that a GPU may be given before anybody waits for one: while it computes, the next are queued. Each wait leaves it
/// idle until the host has queued again, so that one in ten costs a tenth; with more, news of a loss that is not finite, and
/// progress, would only come later.
const STEPS_AHEAD: usize = 10;

/// A CPU's operators are done when they return: there the rows come one by one.
fn steps_ahead(device: &Device) -> usize {
    match device.is_cpu() {
        true => 1,
        false => STEPS_AHEAD,
    }
}

/// A run in memory: what is needed for the next step.
pub struct Run {
    config: Config,
    tokenizer: Tokenizer,
    corpus: Corpus,
    device: Device,
    learner: Learner,
    rng: Rng,
    batches: Batches,
    step: usize,            // steps done, or queued
    queued: Vec<Outcome>,   // of steps that have not been heard of
    clock: Instant,         // since the last that was heard
    pub steps_ahead: usize, // steps that may be queued before they are waited for
}

impl Run {
    /// A run at its first step.
    pub fn new(config: Config, device: Device) -> Result<Self> {
        let tokenizer = Tokenizer::new(config.tokenizer);
        let corpus = Corpus::new(Text::read(config.data.as_deref())?, &tokenizer, config.context)?;
        let mut rng = Rng::new(config.seed);
        let parameters = init_parameters(&config, tokenizer.padded_vocab_size(), &mut rng, &device)?;
        let learner = Learner::new(Flat::new(&parameters)?)?;
        let batches = Batches::new(&config, &corpus, &mut rng);
        let run = Self {
            config,
            tokenizer,
            corpus,
            steps_ahead: steps_ahead(&device),
            device,
            learner,
            rng,
            batches,
            step: 0,
            queued: Vec::new(),
            clock: Instant::now(),
        };
        run.check_gradients()?;
        Ok(run)
    }

    /// The run in `dir`, at its checkpoint. `data` says where its text is now, `steps` where it shall end now.
    pub fn resume(dir: &Path, data: Option<PathBuf>, steps: Option<usize>, device: Device) -> Result<Self> {
        let Checkpoint { state, learner } = checkpoint::load(&checkpoint::locate(dir)?, &device)?;
        let State { step, mut config, rng, cursor, text_name, text_sha256, .. } = state;
        if let Some(steps) = steps {
            config.steps = steps;
        }
        if step >= config.steps {
            bail!(
                "the run in {} has done its {step} steps; add --steps N with N above {step} to train it further",
                dir.display()
            );
        }
        let text = Text::read(data.as_deref().or(config.data.as_deref()))?;
        if text.sha256 != text_sha256 {
            bail!(
                "the run in {} was trained on {text_name} with SHA-256 {}, but {} has {}; {}, or start a new run",
                dir.display(),
                &text_sha256[..12],
                text.name,
                &text.sha256[..12],
                way_to_text(dir),
            );
        }
        config.data = data.or(config.data);
        let tokenizer = Tokenizer::new(config.tokenizer);
        let corpus = Corpus::new(text, &tokenizer, config.context)?;
        let batches = Batches::at(&config, &corpus, cursor);
        let run = Self {
            config,
            tokenizer,
            corpus,
            steps_ahead: steps_ahead(&device),
            device,
            learner,
            rng,
            batches,
            step,
            queued: Vec::new(),
            clock: Instant::now(),
        };
        run.check_gradients()?;
        Ok(run)
    }

    /// Trains to the last step; everything that is to be kept goes into `dir`.
    pub fn train(&mut self, dir: &Path) -> Result<()> {
        output::progress(self.describe());
        let started = Instant::now();
        let mut metrics = match self.step {
            0 => Metrics::create(dir)?,
            step => Metrics::resume(dir, step)?,
        };
        if self.step == 0 {
            if self.config.data.is_none() {
                let tokens = [&self.corpus.train[..], &self.corpus.held_out].concat();
                write_atomically(&dir.join(KEPT_FILE_NAME), &self.tokenizer.decode(&tokens)?)?;
            }
            // Room on the disk is known from now on, and a run that dies early can be resumed.
            self.checkpoint(dir, &metrics)?;
        }

        self.clock = Instant::now();
        let mut progress = Progress::new(self.step, self.config.steps);
        while self.step < self.config.steps {
            self.queue_step()?;
            let evaluate = self.evaluation_is_due();
            if !evaluate && self.queued.len() < self.steps_ahead {
                continue;
            }
            let (rows, finite) = self.rows()?;
            if let Some(last) = rows.last() {
                progress.step(last);
            }
            for row in rows {
                metrics.push(row)?;
            }
            finite?;
            if evaluate {
                plot::save(dir, metrics.rows())?;
                self.checkpoint(dir, &metrics)?; // last: what it does not know of will be done again
                self.clock = Instant::now();
            }
        }
        progress.finish();

        output::progress(format_args!("\na sample:\n{}\n", self.sample()?));
        let val_loss = metrics.rows().last().and_then(|row| row.val_loss).unwrap_or(f32::NAN);
        let time = clock(started.elapsed());
        output::progress(format_args!("held-out loss {val_loss:.4} after {} steps and {time}", self.step));
        let (metrics, plot, checkpoint) = (metrics::FILE_NAME, plot::FILE_NAME, checkpoint::FILE_NAME);
        output::progress(format_args!("{}: {metrics}, {plot}, {checkpoint}", dir.display()));
        Ok(())
    }

    /// One optimizer step; what it says of itself is read by [`Self::rows`].
    fn queue_step(&mut self) -> Result<()> {
        let config = &self.config;
        let batches = (0..config.accumulation)
            .map(|_| {
                let starts = self.batches.next(config.batch, &mut self.rng);
                windows(&self.corpus.train, &starts, config.context, &self.device)
            })
            .collect::<candle_core::Result<Vec<_>>>()?;
        self.queued.push(self.learner.step(config, self.step + 1, &batches)?);
        self.step += 1;
        Ok(())
    }

    /// Whether the last step is evaluated.
    fn evaluation_is_due(&self) -> bool {
        self.step == 1 || self.step == self.config.steps || self.step.is_multiple_of(self.config.eval_interval)
    }

    /// The rows of the steps since the last call, the last one evaluated where that is due. If something is not finite: the
    /// numbers before it, and the error that it is.
    fn rows(&mut self) -> Result<(Vec<Row>, Result<()>)> {
        let queued = std::mem::take(&mut self.queued);
        let (numbers, mut finite) = Outcome::read(&queued)?;
        self.device.synchronize()?;
        let tokens = (self.config.tokens_per_step() * queued.len()) as f64;
        let tokens_per_s = (tokens / self.clock.elapsed().as_secs_f64()) as u64;
        let row = |(outcome, (train_loss, grad_norm)): (&Outcome, (f32, f32))| {
            let Outcome { step, lr, .. } = *outcome;
            Row { step, train_loss, val_loss: None, lr, grad_norm, tokens_per_s }
        };
        let mut rows: Vec<Row> = queued.iter().zip(numbers).map(row).collect();
        if let Some(last) = rows.last_mut().filter(|row| row.step == self.step && self.evaluation_is_due()) {
            match self.held_out_loss()? {
                loss if loss.is_finite() => last.val_loss = Some(loss),
                loss => finite = Err(come_apart(last.step, &format!("the held-out loss after it is {loss}"))),
            }
        }
        self.clock = Instant::now();
        Ok((rows, finite))
    }

    /// One optimizer step, waited for.
    #[cfg(test)]
    pub fn one_step(&mut self) -> Result<Row> {
        self.queue_step()?;
        let (mut rows, finite) = self.rows()?;
        finite?;
        Ok(rows.remove(0))
    }

    /// What the model writes now, from a new line on.
    fn sample(&self) -> Result<String> {
        let model = Gpt::frozen(&self.config, &self.learner.weights(&self.config)?)?;
        let sampling = Sampling { tokens: SAMPLE_TOKENS, ..Sampling::default() };
        let prompt = self.tokenizer.encode(b"\n", "the prompt")?;
        // A clone of the generator: a sample must not change how a resumed run goes on.
        let tokens = generate(&model, self.tokenizer.vocab_size(), &prompt, &sampling, &mut self.rng.clone())?;
        Ok(String::from_utf8_lossy(&self.tokenizer.decode(&tokens)?).into_owned())
    }

    /// Mean loss over `eval_windows` windows that are spread over the held-out text, always the same.
    fn held_out_loss(&self) -> Result<f32> {
        let all = window_starts(self.corpus.held_out.len(), self.config.context, 0);
        let stride = all.len().div_ceil(self.config.eval_windows);
        let starts: Vec<usize> = all.into_iter().step_by(stride).collect();
        mean_loss(&Gpt::frozen(&self.config, &self.learner.weights(&self.config)?)?, &self.corpus.held_out, &starts)
    }

    /// One backward pass, whose gradients must reach every parameter.
    fn check_gradients(&self) -> Result<()> {
        let starts = window_starts(self.corpus.train.len(), self.config.context, 0);
        let (tokens, targets) = windows(&self.corpus.train, &starts[..1], self.config.context, &self.device)?;
        let weights = self.learner.weights(&self.config)?;
        let (_, gradients) = mean_gradients(&Gpt::new(&self.config, &weights)?, &[(tokens, targets)])?;
        check_gradients(weights.keys(), &gradients)
    }

    fn checkpoint(&self, dir: &Path, metrics: &Metrics) -> Result<()> {
        metrics.sync()?;
        let state = State {
            step: self.step,
            config: self.config.clone(),
            vocab_size: self.learner.parameters.named()?["wte"].dim(0)?,
            text_name: self.corpus.name.clone(),
            text_sha256: self.corpus.sha256.clone(),
            rng: self.rng.clone(),
            cursor: self.batches.cursor().clone(),
        };
        checkpoint::save(dir, &state, &self.learner)
    }

    fn describe(&self) -> String {
        let Config { num_layers, num_heads, embed_dim, context, batch, accumulation, .. } = self.config;
        let weights = self.learner.parameters.count();
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
