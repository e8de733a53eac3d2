//! Compiles units into images, in parallel. Units that did not change are not compiled again.

use std::fs;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::Mutex;
use std::thread;

use crate::nvcc::{self, Gpus, Nvcc, FLAGS};
use crate::params::Structs;
use crate::report::{self, Report};
use crate::units::Unit;
use crate::{files, headers, Error, Result};

/// Compiles units for some GPUs into a folder.
#[derive(Debug)]
pub struct Compiler {
    /// The compiler.
    pub nvcc: Nvcc,
    /// The GPUs to compile for.
    pub gpus: Gpus,
    /// The folder of the headers.
    pub include: PathBuf,
    /// The folder for sources, images and logs, of which a unit has one file each, and for generated headers.
    pub out: PathBuf,
}

/// One unit to compile, with everything that its image depends on.
struct Job<'a> {
    unit: &'a Unit,
    source: String,
    options: Vec<String>,
    fingerprint: String,
}

impl Compiler {
    /// Writes an image, `NAME.fatbin`, for each unit, and reads the reports of ptxas. At most as many compilers run at once as cargo
    /// has jobs. A unit is compiled again only if its source, a header, the options or the compiler changed.
    ///
    /// # Errors
    /// The first error of nvcc or of a file. Also if ptxas serializes the wgmmas of a kernel, because the kernel is then slow.
    pub fn compile<'a>(&self, units: &'a [Unit], structs: &Structs) -> Result<Report<'a>> {
        let jobs: Vec<Job> = units.iter().map(|unit| self.job(unit, structs)).collect::<Result<_>>()?;
        // Start with the end of the table: the backwards are there, and they take longest.
        let changed: Vec<&Job> = jobs.iter().rev().filter(|job| self.changed(job)).collect();
        headers::write_generated(&self.out)?;
        self.run(&changed)?;
        Report::read(self, units)
    }

    /// The path of a unit's file with this extension.
    pub fn path(&self, unit: &Unit, extension: &str) -> PathBuf {
        self.out.join(format!("{}.{extension}", unit.name))
    }

    /// Runs the jobs. After a failure, no further job starts.
    fn run(&self, jobs: &[&Job]) -> Result<()> {
        let threads = files::variable("NUM_JOBS").and_then(|jobs| jobs.parse().ok()).unwrap_or(1usize);
        let (next, error) = (AtomicUsize::new(0), Mutex::new(None));
        thread::scope(|scope| {
            for _ in 0..threads.min(jobs.len()) {
                scope.spawn(|| {
                    while let Some(job) = jobs.get(next.fetch_add(1, Ordering::Relaxed)) {
                        if let Err(failed) = self.unit(job) {
                            next.store(jobs.len(), Ordering::Relaxed);
                            error.lock().expect("no job panics").get_or_insert(failed);
                        }
                    }
                });
            }
        });
        error.into_inner().expect("no job panics").map_or(Ok(()), Err)
    }

    fn unit(&self, job: &Job) -> Result<()> {
        let source = self.path(job.unit, "cu");
        files::write(&source, &job.source)?;
        let log = self.nvcc.compile(&source, &self.path(job.unit, "fatbin"), &job.options)?;
        let advice = report::serialized(&log);
        if !advice.is_empty() {
            let text =
                "ptxas runs the wgmmas or setmaxnregs of a kernel in a slow way; change the kernel as its advice says";
            return Err(Error::new(format!("{}: {text}:\n{}", job.unit.name, advice.join("\n"))));
        }
        files::write(&self.path(job.unit, "log"), &log)?;
        files::write(&self.path(job.unit, "fingerprint"), &job.fingerprint)
    }

    fn job<'a>(&self, unit: &'a Unit, structs: &Structs) -> Result<Job<'a>> {
        let source = unit.source(structs);
        let mut options = self.gpus.options(&unit.family.arch);
        options.extend(nvcc::include(&[&self.include, &self.out]));
        options.push("-fatbin".to_string());
        let mut hasher = DefaultHasher::new();
        (self.nvcc.identity(), FLAGS, &options, &source, headers::of_text(&source, &self.include)?).hash(&mut hasher);
        Ok(Job { unit, source, options, fingerprint: format!("{:016x}", hasher.finish()) })
    }

    fn changed(&self, job: &Job) -> bool {
        let seen = fs::read_to_string(self.path(job.unit, "fingerprint"));
        !(seen.is_ok_and(|seen| seen == job.fingerprint) && Path::exists(&self.path(job.unit, "fatbin")))
    }
}
