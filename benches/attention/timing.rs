//! Times several jobs alternately: warm, enough runs for a median and a spread. Also thread pools to run them on.

use std::sync::Arc;
use std::time::Instant;

use anyhow::Result;
use rayon::ThreadPool;

/// A job to time. It returns its own seconds, so that it can leave out setup.
pub struct Job<'a> {
    pub run: Box<dyn Fn() -> Result<f64> + 'a>,
    /// Seconds of an earlier run, if there was one. A job known to be slow gets no warm-up.
    pub known_s: Option<f64>,
    /// Threads that it runs on.
    pub threads: usize,
}

/// The runs of one job.
#[derive(Clone)]
pub struct Timing {
    /// Seconds, ascending; never empty.
    runs_s: Vec<f64>,
    /// Share of the time in which threads of this process were ready to run but had no core, because the machine was
    /// busy. Idle threads that look for work count too, so that the jobs may have waited less. `None` if the system
    /// does not tell.
    pub waited: Option<f64>,
}

impl Timing {
    /// Sorts `runs_s`, at least one time.
    pub fn new(mut runs_s: Vec<f64>, waited: Option<f64>) -> Self {
        assert!(!runs_s.is_empty(), "a time needs a run");
        runs_s.sort_by(f64::total_cmp);
        Self { runs_s, waited }
    }

    pub fn median(&self) -> f64 {
        figures::record::median(self.runs_s.clone()).expect("there is a run")
    }

    pub fn min(&self) -> f64 {
        self.runs_s[0]
    }

    pub fn max(&self) -> f64 {
        self.runs_s[self.runs_s.len() - 1]
    }

    pub fn runs(&self) -> usize {
        self.runs_s.len()
    }
}

/// Seconds that `run` takes.
pub fn seconds<R>(run: impl FnOnce() -> Result<R>) -> Result<f64> {
    let start = Instant::now();
    let result = run()?;
    drop(result);
    Ok(start.elapsed().as_secs_f64())
}

/// Times `jobs` alternately. Each round gives every job its share of runs, so that a slow moment of the machine affects
/// all jobs alike.
///
/// # Errors
/// The first error of a job.
pub fn in_turns(jobs: &[Job]) -> Result<Vec<Timing>> {
    const ROUNDS: usize = 5;
    // Total seconds of a job, with 5 to 100 runs. A job whose single run takes longer runs 3 times.
    const SECONDS: f64 = 1.5;
    let mut counts = Vec::new();
    for job in jobs {
        let warm = match job.known_s {
            Some(known_s) if known_s > SECONDS => known_s,
            _ => (job.run)()?,
        };
        counts.push(if warm > SECONDS { 3 } else { ((SECONDS / warm) as usize).clamp(5, 100) });
    }
    let mut runs_s: Vec<Vec<f64>> = vec![Vec::new(); jobs.len()];
    let (mut waited, mut passed) = (vec![Some(0.0); jobs.len()], vec![0.0; jobs.len()]);
    for round in 1..=ROUNDS {
        for (index, (job, &count)) in jobs.iter().zip(&counts).enumerate() {
            let (start, waited_before) = (Instant::now(), waited_seconds());
            while runs_s[index].len() < count * round / ROUNDS {
                runs_s[index].push((job.run)()?);
            }
            passed[index] += start.elapsed().as_secs_f64();
            let here = waited_seconds().zip(waited_before).map(|(after, before)| after - before);
            waited[index] = waited[index].zip(here).map(|(sum, here)| sum + here);
        }
    }
    let timing = |index: usize, runs_s: Vec<f64>| {
        let share = |waited: f64| (waited / (passed[index] * jobs[index].threads as f64)).clamp(0.0, 1.0);
        Timing::new(runs_s, waited[index].map(share))
    };
    Ok(runs_s.into_iter().enumerate().map(|(index, runs_s)| timing(index, runs_s)).collect())
}

/// Seconds that all threads of this process have waited for a core, as Linux counts them.
fn waited_seconds() -> Option<f64> {
    let tasks = std::fs::read_dir("/proc/self/task").ok()?;
    let nanoseconds = |task: std::io::Result<std::fs::DirEntry>| -> Option<f64> {
        let text = std::fs::read_to_string(task.ok()?.path().join("schedstat")).ok()?;
        text.split_whitespace().nth(1)?.parse().ok()
    };
    tasks.map(nanoseconds).sum::<Option<f64>>().map(|nanoseconds| nanoseconds / 1e9)
}

/// A pool of that many threads. `None` stands for rayon's global pool.
pub fn pool(threads: Option<usize>) -> Result<Option<Arc<ThreadPool>>> {
    let build = |threads| rayon::ThreadPoolBuilder::new().num_threads(threads).build().map(Arc::new);
    Ok(threads.map(build).transpose()?)
}

/// `run` on the threads of `pool`, or on rayon's global pool.
pub fn on_pool<'a, R: Send>(
    pool: Option<Arc<ThreadPool>>,
    run: impl Fn() -> R + Send + Sync + 'a,
) -> Box<dyn Fn() -> R + 'a> {
    Box::new(move || match &pool {
        Some(pool) => pool.install(&run),
        None => run(),
    })
}
