//! The files of a run. One process at a time writes into the folder. Each file is written atomically.

use anyhow::{anyhow, bail, Result};
use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, BufWriter, ErrorKind, Read, Seek, Write};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

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

/// Creates the first free folder of `runs`/0001, `runs`/0002, ...
pub fn fresh_folder(runs: &Path) -> Result<PathBuf> {
    let last = numbers(runs).last().map_or(0, |&last| u64::from(last));
    for number in last + 1.. {
        let dir = runs.join(format!("{number:04}"));
        // If two runs start at the same time, only one of them can create this folder. The other takes the next number.
        match fs::create_dir(&dir) {
            Ok(()) => return Ok(dir),
            Err(error) if error.kind() == ErrorKind::AlreadyExists => continue,
            Err(error) => bail!("cannot create the folder {}: {error}", dir.display()),
        }
    }
    unreachable!("the range has no end")
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
    match fs::read_dir(dir) {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
        Err(error) => bail!("--out {} cannot be the folder of a run: {error}; choose another", dir.display()),
        Ok(entries) => {
            for entry in entries {
                let name = entry?.file_name();
                let name = name.to_string_lossy();
                // A process killed before its first checkpoint leaves a lock file and temporary files.
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

/// The folder of a run. Only this process writes into it.
pub struct RunFolder {
    dir: PathBuf,
    lock: Lock,
    _created: CreatedFolders, // dropped after `lock`, because the lock file is in this folder
}

impl RunFolder {
    /// The folder of a new run. If the folder is empty when this value is dropped, the folder is removed.
    pub fn create(dir: &Path) -> Result<Self> {
        let created = CreatedFolders::create(dir)?;
        Self::new(dir, created)
    }

    /// As [`Self::create`], in the first free folder of `runs`/0001, `runs`/0002, ...
    pub fn create_numbered(runs: &Path) -> Result<Self> {
        let mut created = CreatedFolders::create(runs)?;
        let dir = fresh_folder(runs)?;
        created.0.insert(0, dir.clone());
        Self::new(&dir, created)
    }

    fn new(dir: &Path, created: CreatedFolders) -> Result<Self> {
        let folder = Self { dir: dir.to_owned(), lock: Lock::take(dir)?, _created: created };
        check_free(dir)?; // Check again: another process may have trained here before this one got the lock.
        folder.remove_leftovers();
        Ok(folder)
    }

    /// Opens the folder of a run to resume.
    pub fn open(dir: &Path) -> Result<Self> {
        if dir.is_file() {
            bail!("--resume {} is a file; give the folder of the run", dir.display());
        }
        let folder = Self { dir: dir.to_owned(), lock: Lock::take(dir)?, _created: CreatedFolders(Vec::new()) };
        folder.remove_leftovers();
        Ok(folder)
    }

    pub fn path(&self) -> &Path {
        &self.dir
    }

    /// Checks that this is still the folder that was locked. If a user deletes the folder, a new run can take its name.
    pub fn check(&self) -> Result<()> {
        if !self.lock.is_in_place() {
            bail!("{} was removed or replaced while it trained; nothing more is written there", self.dir.display());
        }
        Ok(())
    }

    /// Removes the temporary files of killed processes. None is in use, because only this process writes here.
    fn remove_leftovers(&self) {
        let Ok(entries) = fs::read_dir(&self.dir) else { return };
        for entry in entries.flatten() {
            if is_temporary(&entry.file_name().to_string_lossy()) {
                let _ = fs::remove_file(entry.path()); // If removal fails, the file only uses disk space.
            }
        }
    }
}

/// The folders that this run created, innermost first. Drop removes the empty ones.
struct CreatedFolders(Vec<PathBuf>);

impl CreatedFolders {
    /// Creates `dir` and its missing parents.
    fn create(dir: &Path) -> Result<Self> {
        let absent = dir.ancestors().take_while(|folder| !folder.as_os_str().is_empty() && !folder.exists());
        let created = Self(absent.map(Path::to_owned).collect());
        fs::create_dir_all(dir).map_err(|error| {
            anyhow!("cannot create the folder {}: {error}; choose another with --out", dir.display())
        })?;
        Ok(created)
    }
}

impl Drop for CreatedFolders {
    fn drop(&mut self) {
        for folder in &self.0 {
            let _ = fs::remove_dir(folder); // remove_dir fails on a folder that is not empty
        }
    }
}

/// Name of the lock file. It contains the ID of the process that holds the lock.
const LOCK_NAME: &str = "train.lock";

/// Maximum time between taking the lock and writing the process ID.
const UNTIL_ID_IS_WRITTEN: Duration = Duration::from_millis(100);

/// An exclusive lock on a folder. The operating system releases it when the process ends, even after SIGKILL.
struct Lock {
    path: PathBuf,
    file: File,
}

impl Lock {
    fn take(dir: &Path) -> Result<Self> {
        let path = dir.join(LOCK_NAME);
        let id = std::process::id().to_string();
        // A lock file is a regular file that holds at most the ID of a process. Any other file belongs to the user.
        let not_ours = || anyhow!("{} is not a lock file of this program; move it away", path.display());
        if fs::symlink_metadata(&path).is_ok_and(|found| found.is_symlink()) {
            return Err(not_ours());
        }
        loop {
            let opened = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(&path);
            let mut file = opened.map_err(|error| CannotWrite::new(&path, error))?;
            match file.try_lock() {
                Ok(()) => {}
                Err(TryLockError::WouldBlock) => bail!(
                    "{} is in use: {} is training there; wait for it to end, or stop it",
                    dir.display(),
                    holder(file)
                ),
                Err(TryLockError::Error(error)) => {
                    bail!(
                        "cannot lock {}: {error}; choose a folder on a file system that supports file locks",
                        path.display()
                    )
                }
            }
            let mut before = String::new();
            let readable = file.read_to_string(&mut before).is_ok();
            if !readable || !(before.is_empty() || before.parse::<u32>().is_ok()) {
                return Err(not_ours());
            }
            let written = file.rewind().and_then(|()| file.set_len(0)).and_then(|()| file.write_all(id.as_bytes()));
            written.map_err(|error| CannotWrite::new(&path, error))?;
            // The previous holder may have deleted the file after this process opened it. Then another process could
            // create and lock a new file. So check that `path` still names the file locked here.
            let lock = Self { path: path.clone(), file };
            if lock.is_in_place() {
                return Ok(lock);
            }
        }
    }

    /// Whether `path` names the file that is locked.
    #[cfg(unix)]
    fn is_in_place(&self) -> bool {
        use std::os::unix::fs::MetadataExt;
        let identity = |file: fs::Metadata| (file.dev(), file.ino());
        match (self.file.metadata(), fs::symlink_metadata(&self.path)) {
            (Ok(locked), Ok(named)) => identity(locked) == identity(named),
            _ => false,
        }
    }

    /// Whether `path` names the file that is locked. These systems do not remove an open file, and may refuse to read it.
    #[cfg(not(unix))]
    fn is_in_place(&self) -> bool {
        self.path.exists()
    }
}

impl Drop for Lock {
    fn drop(&mut self) {
        if self.is_in_place() {
            let _ = fs::remove_file(&self.path); // a remaining lock file is harmless, because it is not locked
        }
    }
}

/// The process that holds the lock on `file`, if its ID can be read.
fn holder(mut file: File) -> String {
    thread::sleep(UNTIL_ID_IS_WRITTEN);
    let mut id = String::new();
    match file.read_to_string(&mut id).map(|_| id.parse::<u32>()) {
        Ok(Ok(id)) => format!("process {id}"),
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

/// Writes a file atomically. The data goes to a temporary file in the same folder. When it is complete and synced, it
/// replaces the old file.
pub struct AtomicFile {
    path: PathBuf,
    file: BufWriter<File>, // dropped before `temporary`, because some systems cannot remove an open file
    temporary: Temporary,
}

/// Path of a temporary file. Drop removes the file. After the rename there is nothing to remove.
struct Temporary(PathBuf);

const TEMPORARY_SUFFIX: &str = ".gpt-tmp";

/// Whether `name` is the name of a temporary file of any process: `NAME.PROCESS.gpt-tmp`.
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

/// Writes `bytes` to the file `path` atomically.
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

/// Syncs the folder of `path`. Without this, a rename in the folder may not be on the disk.
#[cfg(unix)]
fn sync_folder(path: &Path) -> io::Result<()> {
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    File::open(folder)?.sync_all()
}

/// Other systems cannot sync a folder.
#[cfg(not(unix))]
fn sync_folder(_path: &Path) -> io::Result<()> {
    Ok(())
}
