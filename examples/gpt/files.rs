//! The files of a run: its folder, into which one process at a time writes, and writes that happen whole or not at all.

use anyhow::{anyhow, bail, Result};
use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, BufWriter, ErrorKind, Read, Write};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

/// The repository: where cargo says it is, else the current folder.
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

/// Creates the first free folder of `runs`/0001, `runs`/0002, ...
pub fn fresh_folder(runs: &Path) -> Result<PathBuf> {
    for number in last_number(runs) + 1.. {
        let dir = runs.join(format!("{number:04}"));
        // Creating is also claiming: of two runs that start at once only one succeeds, the other takes the next number.
        match fs::create_dir(&dir) {
            Ok(()) => return Ok(dir),
            Err(error) if error.kind() == ErrorKind::AlreadyExists => continue,
            Err(error) => bail!("cannot create the folder {}: {error}", dir.display()),
        }
    }
    unreachable!("numbers do not end")
}

/// The folder of the newest numbered run that has a checkpoint called `name`.
pub fn newest_run(runs: &Path, name: &str) -> Result<PathBuf> {
    (1..=last_number(runs))
        .rev()
        .map(|number| runs.join(format!("{number:04}")))
        .find(|dir| dir.join(name).is_file())
        .ok_or_else(|| {
            anyhow!("no run with a checkpoint in {}; train one first, or name it with --checkpoint", runs.display())
        })
}

fn last_number(runs: &Path) -> usize {
    let Ok(entries) = fs::read_dir(runs) else { return 0 };
    entries.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok()).max().unwrap_or(0)
}

/// Checks that `dir` can be the folder of a new run: not there yet, or empty. Creates nothing.
pub fn check_free(dir: &Path) -> Result<()> {
    match fs::read_dir(dir) {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
        Err(error) => bail!("--out {} cannot be the folder of a run: {error}; choose another", dir.display()),
        Ok(entries) => {
            for entry in entries {
                let name = entry?.file_name();
                let name = name.to_string_lossy();
                // A process that is killed before its first checkpoint leaves these.
                if name != LOCK_NAME && !is_temporary(&name) {
                    bail!(
                        "--out {0} is not empty (it holds {name}), and nothing is ever overwritten; choose another \
                         folder, or continue that run with --resume {0}",
                        dir.display()
                    );
                }
            }
            Ok(())
        }
    }
}

/// A run's folder, into which this process alone writes.
pub struct RunFolder {
    dir: PathBuf,
    _lock: Lock,
    _made: MadeFolders, // goes after the lock, whose file lies in it
}

impl RunFolder {
    /// The folder of a new run. If nothing lies in it when the value is dropped, it is removed.
    pub fn create(dir: &Path) -> Result<Self> {
        let made = MadeFolders::create(dir)?;
        Self::new(dir, made)
    }

    /// As [`Self::create`], the first free folder of `runs`/0001, `runs`/0002, ...
    pub fn create_numbered(runs: &Path) -> Result<Self> {
        let mut made = MadeFolders::create(runs)?;
        let dir = fresh_folder(runs)?;
        made.0.insert(0, dir.clone());
        Self::new(&dir, made)
    }

    fn new(dir: &Path, made: MadeFolders) -> Result<Self> {
        let folder = Self { dir: dir.to_owned(), _lock: Lock::take(dir)?, _made: made };
        check_free(dir)?; // again: another process may have trained there before this one had the lock
        folder.remove_leftovers();
        Ok(folder)
    }

    /// The folder of a run that is to go on.
    pub fn open(dir: &Path) -> Result<Self> {
        if dir.is_file() {
            bail!("--resume {} is a file; give the folder of the run", dir.display());
        }
        let folder = Self { dir: dir.to_owned(), _lock: Lock::take(dir)?, _made: MadeFolders(Vec::new()) };
        folder.remove_leftovers();
        Ok(folder)
    }

    pub fn path(&self) -> &Path {
        &self.dir
    }

    /// Removes the temporary files of killed processes. No other process writes here now, so none is in use.
    fn remove_leftovers(&self) {
        let Ok(entries) = fs::read_dir(&self.dir) else { return };
        for entry in entries.flatten() {
            if is_temporary(&entry.file_name().to_string_lossy()) {
                let _ = fs::remove_file(entry.path()); // one that stays only takes room
            }
        }
    }
}

/// The folders that a run had to make, innermost first. Dropping the value removes those that are empty.
struct MadeFolders(Vec<PathBuf>);

impl MadeFolders {
    /// Creates `dir` and the folders around it, as far as they are not there.
    fn create(dir: &Path) -> Result<Self> {
        let absent = dir.ancestors().take_while(|folder| !folder.as_os_str().is_empty() && !folder.exists());
        let made = Self(absent.map(Path::to_owned).collect());
        fs::create_dir_all(dir).map_err(|error| {
            anyhow!("cannot create the folder {}: {error}; choose another with --out", dir.display())
        })?;
        Ok(made)
    }
}

impl Drop for MadeFolders {
    fn drop(&mut self) {
        for folder in &self.0 {
            let _ = fs::remove_dir(folder); // takes empty folders only
        }
    }
}

/// This file is locked, and holds the number of the process that locked it.
const LOCK_NAME: &str = "train.lock";

/// A process that has just locked the file writes its number within this time.
const UNTIL_NUMBERED: Duration = Duration::from_millis(100);

/// The right to write into a folder. The operating system takes it back when the process ends, even by SIGKILL.
struct Lock {
    path: PathBuf,
    _file: File,
}

impl Lock {
    fn take(dir: &Path) -> Result<Self> {
        let path = dir.join(LOCK_NAME);
        let number = std::process::id().to_string();
        loop {
            let opened = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(&path);
            let mut file = opened.map_err(|error| CannotWrite::new(&path, error))?;
            match file.try_lock() {
                Ok(()) => {}
                Err(TryLockError::WouldBlock) => bail!(
                    "{} is in use: {} is training there; wait until it has ended, or stop it",
                    dir.display(),
                    holder(file)
                ),
                Err(TryLockError::Error(error)) => {
                    bail!("cannot lock {}: {error}; choose a folder on a file system that has locks", path.display())
                }
            }
            let numbered = file.set_len(0).and_then(|()| file.write_all(number.as_bytes()));
            numbered.map_err(|error| CannotWrite::new(&path, error))?;
            // The process before may have removed the file after it was opened here. The next process would then lock
            // another file, so the one under the name must be this one.
            let ours = match fs::read_to_string(&path) {
                Ok(text) => text == number,
                Err(error) => error.kind() != ErrorKind::NotFound, // some systems let nobody read a locked file
            };
            if ours {
                return Ok(Self { path, _file: file });
            }
        }
    }
}

impl Drop for Lock {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.path); // one that stays is not locked
    }
}

/// The process that has locked `file`, as far as it can be known.
fn holder(mut file: File) -> String {
    thread::sleep(UNTIL_NUMBERED);
    let mut number = String::new();
    match file.read_to_string(&mut number).map(|_| number.parse::<u32>()) {
        Ok(Ok(number)) => format!("process {number}"),
        _ => "another process".to_string(),
    }
}

/// A file of a run that could not be written.
#[derive(Debug, thiserror::Error)]
#[error("cannot write {}: {error}", path.display())]
pub struct CannotWrite {
    pub path: PathBuf,
    pub error: io::Error,
}

impl CannotWrite {
    pub fn new(path: &Path, error: io::Error) -> Self {
        Self { path: path.to_owned(), error }
    }
}

/// A file that appears under its name only when it is complete and on the disk. Until then its bytes lie next to it in a
/// temporary file, and the file that was under the name stays.
pub struct AtomicFile {
    path: PathBuf,
    file: BufWriter<File>, // goes before the temporary file: some systems remove no open file
    temporary: Temporary,
}

/// The name of a temporary file. Dropping it removes the file; after the rename there is none.
struct Temporary(PathBuf);

const TEMPORARY_SUFFIX: &str = ".gpt-tmp";

/// Whether `name` is that of a temporary file of any process: `NAME.PROCESS.gpt-tmp`.
fn is_temporary(name: &str) -> bool {
    let process = name.strip_suffix(TEMPORARY_SUFFIX).and_then(|name| name.rsplit_once('.'));
    process.is_some_and(|(_, process)| process.parse::<u32>().is_ok())
}

impl Drop for Temporary {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}

impl AtomicFile {
    pub fn create(path: &Path) -> io::Result<Self> {
        let mut temporary = path.as_os_str().to_owned();
        temporary.push(format!(".{}{TEMPORARY_SUFFIX}", std::process::id()));
        let temporary = Temporary(temporary.into());
        let file = BufWriter::new(File::create(&temporary.0)?);
        Ok(Self { path: path.to_owned(), file, temporary })
    }

    pub fn commit(self) -> io::Result<()> {
        self.file.into_inner().map_err(io::IntoInnerError::into_error)?.sync_all()?;
        #[cfg(test)]
        crate::tests::abort_at("before the rename of", &self.path);
        fs::rename(&self.temporary.0, &self.path)?;
        #[cfg(test)]
        crate::tests::abort_at("after the rename of", &self.path);
        sync_folder(&self.path)
    }
}

/// Puts `bytes` under `path`, whole or not at all.
pub fn write_atomically(path: &Path, bytes: &[u8]) -> Result<(), CannotWrite> {
    AtomicFile::create(path)
        .and_then(|mut file| {
            file.write_all(bytes)?;
            file.commit()
        })
        .map_err(|error| CannotWrite::new(path, error))
}

impl Write for AtomicFile {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.file.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

/// A rename is on the disk when the folder is.
#[cfg(unix)]
fn sync_folder(path: &Path) -> io::Result<()> {
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    File::open(folder)?.sync_all()
}

/// Other systems offer no handle of a folder to flush.
#[cfg(not(unix))]
fn sync_folder(_path: &Path) -> io::Result<()> {
    Ok(())
}
