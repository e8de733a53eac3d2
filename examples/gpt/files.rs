//! The folders of runs. One process at a time writes into the folder of a run.

use anyhow::{anyhow, bail, Result};
use std::fmt::Display;
use std::fs::{self, File, TryLockError};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

/// The folder of the repository: the folder that cargo sets, or the current folder without cargo.
pub fn repository() -> PathBuf {
    let root = std::env::var_os("CARGO_MANIFEST_DIR").map(PathBuf::from).unwrap_or_else(|| PathBuf::from("."));
    match std::env::current_dir() {
        Ok(current) if current == root => PathBuf::from("."),
        _ => root,
    }
}

/// The folder of numbered runs.
pub fn runs_folder() -> PathBuf {
    repository().components().filter(|part| part.as_os_str() != ".").collect::<PathBuf>().join("runs")
}

/// The folder of the newest numbered run that has a checkpoint called `name`.
pub fn newest_run(runs: &Path, name: &str) -> Result<PathBuf> {
    numbers(runs)
        .into_iter()
        .rev()
        .map(|number| runs.join(format!("{number:04}")))
        .find(|dir| dir.join(name).is_file())
        .ok_or_else(|| {
            anyhow!("no run with a checkpoint in {}; train one first, or name it with --checkpoint", runs.display())
        })
}

/// The numbers of the folders in `runs`, ascending. Ignores other names, for example time stamps.
fn numbers(runs: &Path) -> Vec<u32> {
    let Ok(entries) = fs::read_dir(runs) else { return Vec::new() };
    let number = |name: &str| name.parse().ok().filter(|number: &u32| *name == format!("{number:04}"));
    let mut numbers: Vec<u32> = entries.flatten().filter_map(|entry| number(entry.file_name().to_str()?)).collect();
    numbers.sort_unstable();
    numbers
}

/// Checks that `dir` can be the folder of a new run: it does not exist, or it is empty. Creates nothing.
pub fn check_free(dir: &Path) -> Result<()> {
    let entries = match fs::read_dir(dir) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
        Err(error) => bail!("--out {} cannot be the folder of a run: {error}; choose another", dir.display()),
        Ok(entries) => entries,
    };
    for entry in entries {
        let name = entry?.file_name();
        let name = name.to_string_lossy();
        // A process that ended before its first checkpoint leaves these files.
        if name != LOCK_NAME && !is_temporary(&name) {
            bail!(
                "--out {0} is not empty (it holds {name}), and nothing is ever overwritten; choose another folder, or \
                 continue that run with --resume {0}",
                dir.display()
            );
        }
    }
    Ok(())
}

/// Name of the lock file. It stays in the folder of a run.
const LOCK_NAME: &str = "train.lock";

/// Whether `name` is a temporary file of `AdamW::save`. A process that is killed while it saves leaves one.
fn is_temporary(name: &str) -> bool {
    name == "checkpoint.safetensors.tmp" || name.starts_with(".tmp") && name.len() == ".tmp".len() + 6
}

/// The folder of a run, locked: only this process writes into it.
pub struct RunFolder {
    dir: PathBuf,
    lock: File, // the operating system releases the lock when the process ends, even after SIGKILL
}

impl RunFolder {
    /// Creates the next folder of `runs`/0001, `runs`/0002, ... Processes that start at once get different ones.
    pub fn create_next(runs: &Path) -> Result<Self> {
        fs::create_dir_all(runs).map_err(|error| cannot_create(runs, error))?;
        let mut number = numbers(runs).last().map_or(0, |&last| u64::from(last)) + 1;
        loop {
            let dir = runs.join(format!("{number:04}"));
            match fs::create_dir(&dir) {
                Ok(()) => return Self::open(&dir),
                Err(error) if error.kind() == ErrorKind::AlreadyExists => number += 1,
                Err(error) => return Err(cannot_create(&dir, error)),
            }
        }
    }

    /// Creates the folder of a new run.
    pub fn create(dir: &Path) -> Result<Self> {
        fs::create_dir_all(dir).map_err(|error| cannot_create(dir, error))?;
        let folder = Self::open(dir)?;
        check_free(dir)?; // another process may have trained here before this one got the lock
        Ok(folder)
    }

    /// Locks the folder of a run, and removes the temporary files of killed processes.
    pub fn open(dir: &Path) -> Result<Self> {
        let path = dir.join(LOCK_NAME);
        let lock = File::options().append(true).create(true).open(&path).map_err(|error| cannot_write(&path, error))?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                bail!("{} is in use: another process is training there; wait for it to end, or stop it", dir.display())
            }
            Err(TryLockError::Error(error)) => bail!(
                "cannot lock {}: {error}; choose a folder on a file system that supports file locks",
                path.display()
            ),
        }
        for entry in fs::read_dir(dir)?.flatten() {
            if is_temporary(&entry.file_name().to_string_lossy()) {
                let _ = fs::remove_file(entry.path()); // if removal fails, the file only uses disk space
            }
        }
        Ok(Self { dir: dir.to_owned(), lock })
    }

    pub fn path(&self) -> &Path {
        &self.dir
    }

    /// Checks that the folder is still the locked one. If a user has removed it, another run may have one of the same name.
    pub fn check_still_locked(&self) -> Result<()> {
        #[cfg(unix)]
        {
            use std::os::unix::fs::MetadataExt;
            let identity = |file: fs::Metadata| (file.dev(), file.ino());
            let held = identity(self.lock.metadata()?);
            if !fs::metadata(self.dir.join(LOCK_NAME)).is_ok_and(|found| identity(found) == held) {
                bail!(
                    "{} is no longer the folder of this run: somebody has removed or replaced its {LOCK_NAME}; nothing more \
                     is written there, so start a new run",
                    self.dir.display()
                );
            }
        }
        Ok(())
    }
}

fn cannot_create(dir: &Path, error: std::io::Error) -> anyhow::Error {
    anyhow!("cannot create the folder {}: {error}; choose another with --out", dir.display())
}

/// The error of a file of a run that could not be written.
pub fn cannot_write(path: &Path, error: impl Display) -> anyhow::Error {
    anyhow!(
        "cannot write {}: {error}; once that is fixed, a run with a checkpoint continues with --resume",
        path.display()
    )
}
