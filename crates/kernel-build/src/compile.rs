//! Compiles units, or hand-written sources, into images, in parallel. What did not change is not compiled again.

use std::fs;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::Mutex;
use std::thread;

use crate::family::Arch;
use crate::nvcc::{self, Gpus, Nvcc, FLAGS};
use crate::params::Structs;
use crate::report::{self, Report, Usages};
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
    /// The folder for sources, images and logs (one of each for a unit), and for generated headers.
    pub out: PathBuf,
}

/// One source to compile, with everything that its image depends on.
struct Job {
    name: String,
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
        // Start with the end of the table: the backwards are there, and they take longest.
        let jobs = units.iter().rev().map(|unit| self.job(&unit.name, &unit.family.arch, unit.source(structs)));
        self.run(jobs.collect::<Result<_>>()?)?;
        Report::read(self, units)
    }

    /// As [`Self::compile`], for hand-written sources whose kernels are in no table: the files `NAME.cu` of [`Self::include`]. Each
    /// also asserts the layout of all `structs`. Returns the usages of all kernels.
    ///
    /// # Errors
    /// As [`Self::compile`].
    pub fn compile_files(&self, names: &[&str], arch: &Arch, structs: &Structs) -> Result<Usages> {
        let asserts = structs.cuda_asserts(structs.structs.iter().map(|item| item.name.as_str()));
        let jobs = names.iter().map(|name| {
            let text = files::read(&self.include.join(name).with_extension("cu"))?;
            self.job(name, arch, format!("{text}\n#include <cstddef>\n{asserts}"))
        });
        self.run(jobs.collect::<Result<_>>()?)?;
        let logs = names.iter().map(|name| files::read(&self.path(name, "log")));
        Ok(report::parse(&logs.collect::<Result<String>>()?))
    }

    /// The path of the file of a unit or source with this extension.
    pub fn path(&self, name: &str, extension: &str) -> PathBuf {
        self.out.join(format!("{name}.{extension}"))
    }

    /// Runs the jobs that changed. After a failure, no further job starts.
    fn run(&self, jobs: Vec<Job>) -> Result<()> {
        let jobs: Vec<Job> = jobs.into_iter().filter(|job| self.changed(job)).collect();
        headers::write_generated(&self.out)?;
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
        let source = self.path(&job.name, "cu");
        files::write(&source, &job.source)?;
        let log = self.nvcc.compile(&source, &self.path(&job.name, "fatbin"), &job.options)?;
        let advice = report::serialized(&log);
        if !advice.is_empty() {
            let text =
                "ptxas runs the wgmmas or setmaxnregs of a kernel in a slow way; change the kernel as its advice says";
            return Err(Error::new(format!("{}: {text}:\n{}", job.name, advice.join("\n"))));
        }
        files::write(&self.path(&job.name, "log"), &log)?;
        files::write(&self.path(&job.name, "fingerprint"), &job.fingerprint)
    }

    fn job(&self, name: &str, arch: &Arch, source: String) -> Result<Job> {
        let mut options = self.gpus.options(arch);
        options.extend(nvcc::include(&[&self.include, &self.out]));
        options.push("-fatbin".to_string());
        let mut hasher = DefaultHasher::new();
        (self.nvcc.identity(), FLAGS, &options, &source, headers::of_text(&source, &self.include)?).hash(&mut hasher);
        Ok(Job { name: name.to_string(), source, options, fingerprint: format!("{:016x}", hasher.finish()) })
    }

    fn changed(&self, job: &Job) -> bool {
        let seen = fs::read_to_string(self.path(&job.name, "fingerprint"));
        !(seen.is_ok_and(|seen| seen == job.fingerprint) && Path::exists(&self.path(&job.name, "fatbin")))
    }
}
