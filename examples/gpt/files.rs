//! The files of a run: its folder, and writes that either happen whole or not at all.

use anyhow::{anyhow, bail, Result};
use std::fs::{self, File};
use std::io::{self, BufWriter, ErrorKind, Write};
use std::path::{Path, PathBuf};

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
    fs::create_dir_all(runs).map_err(|error| anyhow!("cannot create the folder {}: {error}", runs.display()))?;
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
        Ok(mut entries) => match entries.next() {
            None => Ok(()),
            Some(entry) => bail!(
                "--out {0} is not empty (it holds {1}), and nothing is ever overwritten; choose another folder, or \
                 continue that run with --resume {0}",
                dir.display(),
                entry?.file_name().to_string_lossy()
            ),
        },
    }
}

/// A file that appears under its name only when it is complete and on the disk: until then, and for ever if the process
/// dies, its bytes lie beside it in `NAME.tmp`, and what was under the name before stays.
pub struct AtomicFile {
    path: PathBuf,
    temporary: PathBuf,
    file: BufWriter<File>,
}

impl AtomicFile {
    pub fn create(path: &Path) -> io::Result<Self> {
        let mut temporary = path.as_os_str().to_owned();
        temporary.push(".tmp");
        let temporary = PathBuf::from(temporary);
        let file = BufWriter::new(File::create(&temporary)?);
        Ok(Self { path: path.to_owned(), temporary, file })
    }

    pub fn commit(self) -> io::Result<()> {
        self.file.into_inner().map_err(io::IntoInnerError::into_error)?.sync_all()?;
        #[cfg(test)]
        crate::tests::abort_at("before the rename of", &self.path);
        fs::rename(&self.temporary, &self.path)?;
        #[cfg(test)]
        crate::tests::abort_at("after the rename of", &self.path);
        sync_folder(&self.path)
    }
}

/// Puts `bytes` under `path`, whole or not at all.
pub fn write_atomically(path: &Path, bytes: &[u8]) -> Result<()> {
    AtomicFile::create(path)
        .and_then(|mut file| {
            file.write_all(bytes)?;
            file.commit()
        })
        .map_err(|error| anyhow!("cannot write {}: {error}", path.display()))
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
