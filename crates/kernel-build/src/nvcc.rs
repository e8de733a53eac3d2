//! Finds nvcc and the GPUs to compile for, and runs nvcc.
//!
//! Candle builds its own kernels with cudaforge. This crate does not use it: it compiles for one GPU at a time, always compiles 9.0 as
//! 9.0a, and would add eleven crates to every build, even without CUDA.

use std::collections::BTreeSet;
use std::env;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::family::Arch;
use crate::{files, Error, Result};

/// The flags for all kernels. With `-v` ptxas reports the registers and the memory of each kernel.
pub const FLAGS: [&str; 5] = ["-std=c++17", "-O3", "--use_fast_math", "-Xptxas", "-v"];

/// The environment variables that lead to nvcc, in the order of the search. `PATH` comes after the first.
pub const VARIABLES: [&str; 3] = ["NVCC", "CUDA_HOME", "CUDA_PATH"];

const ROOTS: [&str; 3] = ["/usr/local/cuda", "/opt/cuda", "/usr/lib/cuda"];

/// An nvcc that was found and runs.
#[derive(Clone, Debug)]
pub struct Nvcc {
    path: PathBuf,
    version: String,
}

impl Nvcc {
    /// Finds nvcc. The search looks at `NVCC`, on `PATH`, in `CUDA_HOME` and `CUDA_PATH`, and where Linux distributions install CUDA,
    /// in this order.
    ///
    /// # Errors
    /// If there is no nvcc, or if it does not run.
    pub fn find() -> Result<Self> {
        let found = candidates(|name| env::var_os(name)).into_iter().find(|path| path.is_file());
        let path = found.ok_or_else(|| {
            Error::new(format!(
                "there is no nvcc in NVCC, PATH, CUDA_HOME, CUDA_PATH, {}; install CUDA, or set one of these variables",
                ROOTS.join(", ")
            ))
        })?;
        let output = Command::new(&path).arg("--version").output();
        let output = output.map_err(|error| Error::new(format!("cannot run {}: {error}", path.display())))?;
        Ok(Self { path, version: String::from_utf8_lossy(&output.stdout).into_owned() })
    }

    /// The path of its file, and the text of `--version`.
    pub fn identity(&self) -> (&Path, &str) {
        (&self.path, &self.version)
    }

    /// Compiles `source` into `output` with [`FLAGS`] and `options`. Returns what the compiler printed.
    ///
    /// # Errors
    /// If the compiler fails. The error has the command and what the compiler printed.
    pub fn compile(&self, source: &Path, output: &Path, options: &[String]) -> Result<String> {
        let mut command = Command::new(&self.path);
        command.args(FLAGS).args(options).arg("-o").arg(output).arg(source);
        let result = command.output();
        let result = result.map_err(|error| Error::new(format!("cannot run {}: {error}", self.path.display())))?;
        let log = String::from_utf8_lossy(&result.stdout) + String::from_utf8_lossy(&result.stderr);
        if !result.status.success() {
            return Err(Error::new(format!("{} does not compile: {command:?} failed:\n{log}", source.display())));
        }
        Ok(log.into_owned())
    }

    /// Compiles `source` into machine code for one GPU, such as `90`, with the headers of some folders. Otherwise as [`Self::compile`].
    ///
    /// # Errors
    /// As [`Self::compile`].
    pub fn cubin(
        &self,
        source: &Path,
        output: &Path,
        gpu: &str,
        folders: &[&Path],
        options: &[String],
    ) -> Result<String> {
        let mut all = vec!["-cubin".to_string(), format!("-arch=sm_{gpu}")];
        all.extend(include(folders));
        all.extend_from_slice(options);
        self.compile(source, output, &all)
    }
}

/// The options that let nvcc look for headers in some folders.
pub(crate) fn include(folders: &[&Path]) -> Vec<String> {
    folders.iter().flat_map(|folder| ["-I".to_string(), folder.display().to_string()]).collect()
}

/// Paths where nvcc may be, in the order of the search. `variable` reads the environment.
fn candidates(variable: impl Fn(&str) -> Option<OsString>) -> Vec<PathBuf> {
    let program = format!("nvcc{}", env::consts::EXE_SUFFIX);
    let set = |name: &str| variable(name).filter(|value| !value.is_empty());
    let named = set(VARIABLES[0]).map(PathBuf::from);
    let path = set("PATH").unwrap_or_default();
    let on_path = env::split_paths(&path).map(|folder| folder.join(&program));
    let roots = VARIABLES[1..].iter().filter_map(|name| set(name)).map(PathBuf::from);
    let in_roots = roots.chain(ROOTS.map(PathBuf::from)).map(|root| root.join("bin").join(&program));
    named.into_iter().chain(on_path).chain(in_roots).collect()
}

/// The GPUs to compile for: compute capabilities times ten.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Gpus(BTreeSet<u32>);

impl Gpus {
    /// The GPUs in the environment variable `list`. Without it, the one in `CUDA_COMPUTE_CAP`, which Candle reads too. Without both,
    /// the GPUs of this machine.
    ///
    /// # Errors
    /// As [`Self::parse`], or if neither the variables nor nvidia-smi name a GPU.
    pub fn find(list: &str) -> Result<Self> {
        if let Some(names) = files::variable(list).or_else(|| files::variable("CUDA_COMPUTE_CAP")) {
            return Self::parse(&names);
        }
        match Command::new("nvidia-smi").args(["--query-gpu=compute_cap", "--format=csv,noheader"]).output() {
            Ok(output) if output.status.success() => Self::parse(&String::from_utf8_lossy(&output.stdout)),
            _ => Err(Error::new(
                "nvidia-smi does not tell which GPU to compile for; set CUDA_COMPUTE_CAP to its compute capability, for example 90",
            )),
        }
    }

    /// Parses a list such as `80, 86`. 90, 9.0, sm_90 and 90a all name the same GPU.
    ///
    /// # Errors
    /// If a name contains no number.
    pub fn parse(list: &str) -> Result<Self> {
        let names = list.split([',', ';', ' ', '\n', '\r']).filter(|name| !name.is_empty());
        let number = |name: &str| {
            let digits: String = name.trim_start_matches("sm_").chars().filter(char::is_ascii_digit).collect();
            let wrong = |_| Error::new(format!("a compute capability is a number such as 90 or 9.0, got {name}"));
            digits.parse().map_err(wrong)
        };
        Ok(Self(names.map(number).collect::<Result<_>>()?))
    }

    /// The GPUs in ascending order.
    pub fn iter(&self) -> impl Iterator<Item = u32> + '_ {
        self.0.iter().copied()
    }

    /// Whether `gpu` is one of them.
    pub fn contains(&self, gpu: u32) -> bool {
        self.0.contains(&gpu)
    }

    /// The GPUs that get machine code for kernels of `arch`, each with ptxas' name for it: `90a` if no other GPU has the instructions.
    pub fn targets(&self, arch: &Arch) -> Vec<(u32, String)> {
        let suffix = if arch.exact { "a" } else { "" };
        self.iter().filter(|gpu| arch.runs_on(*gpu)).map(|gpu| (gpu, format!("{gpu}{suffix}"))).collect()
    }

    /// The options of nvcc for kernels of `arch`: machine code for each of the targets, and PTX, which the driver compiles for later GPUs.
    pub fn options(&self, arch: &Arch) -> Vec<String> {
        let targets = self.targets(arch).into_iter();
        let machine_code = targets.map(|(_, name)| format!("-gencode=arch=compute_{name},code=sm_{name}"));
        let sm = arch.sm;
        let ptx = (!arch.exact).then(|| format!("-gencode=arch=compute_{sm},code=compute_{sm}"));
        machine_code.chain(ptx).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SM80: Arch = Arch { sm: 80, exact: false };
    const SM90: Arch = Arch { sm: 90, exact: true };

    #[test]
    fn nvcc_is_looked_for_in_order() {
        let variables = |name: &str| {
            let value = match name {
                "NVCC" => "/a/nvcc-of-mine",
                "PATH" => "/b:/c",
                "CUDA_HOME" => "/d",
                _ => "",
            };
            Some(OsString::from(value))
        };
        let found: Vec<String> = candidates(variables).iter().map(|path| path.display().to_string()).collect();
        let rest = ["/usr/local/cuda/bin/nvcc", "/opt/cuda/bin/nvcc", "/usr/lib/cuda/bin/nvcc"];
        assert_eq!(found[..4], ["/a/nvcc-of-mine", "/b/nvcc", "/c/nvcc", "/d/bin/nvcc"]);
        assert_eq!(found[4..], rest);
    }

    #[test]
    fn gpus_have_several_spellings() {
        let gpus = Gpus::parse("9.0, sm_80;90a\n12.0").expect("all are numbers");
        assert_eq!(gpus.iter().collect::<Vec<_>>(), [80, 90, 120]);
        let error = Gpus::parse("hopper").expect_err("no number").to_string();
        assert_eq!(error, "a compute capability is a number such as 90 or 9.0, got hopper");
    }

    #[test]
    fn an_exact_architecture_has_one_target_and_no_ptx() {
        let gpus = Gpus::parse("75 80 90").expect("numbers");
        assert_eq!(gpus.options(&SM90), ["-gencode=arch=compute_90a,code=sm_90a"]);
        assert_eq!(
            gpus.options(&SM80),
            [
                "-gencode=arch=compute_80,code=sm_80",
                "-gencode=arch=compute_90,code=sm_90",
                "-gencode=arch=compute_80,code=compute_80"
            ]
        );
        assert_eq!(gpus.targets(&SM90), [(90, "90a".to_string())]);
    }
}
