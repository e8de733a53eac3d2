//! `kernel-build describe` and `kernel-build usage`: the library for scripts.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use kernel_build::nvcc::Nvcc;
use kernel_build::params::Structs;
use kernel_build::table::Table;
use kernel_build::{attention, describe, headers, report, units, Error, Result};

const USAGE: &str = "\
kernel-build describe [--cuda DIR] [--table FILE] [--dtype NAME] [--plain]
    Prints the kernels of a table as JSON: sources, headers, launches, layouts. The parameter structs come from DIR/params.h.
    --cuda DIR      the folder of the sources [default: cuda]
    --table FILE    the table [default: DIR/instances.def]
    --dtype NAME    only kernels of this element type
    --plain         only kernels without a score_mod

kernel-build usage SOURCE --arch NAME [--include DIR] [-DNAME=VALUE]..
    Compiles a CUDA source for one GPU, and prints the registers and the local memory of each kernel. A warning is an error.
    --arch NAME     the GPU, such as 90
    --include DIR   the folder of the headers [default: cuda]
    -DNAME=VALUE    defines a macro";

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let result = match arguments.split_first() {
        Some((command, rest)) if command == "describe" => describe_table(rest),
        Some((command, rest)) if command == "usage" => print_usage(rest),
        _ => Err(Error::new(format!("expected describe or usage\n\n{USAGE}"))),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("kernel-build: {error}");
            ExitCode::FAILURE
        }
    }
}

fn describe_table(arguments: &[String]) -> Result<()> {
    let (mut cuda, mut table, mut dtype, mut plain) = (PathBuf::from("cuda"), None, None, false);
    let mut rest = arguments.iter();
    while let Some(option) = rest.next() {
        let mut value = || rest.next().ok_or_else(|| Error::new(format!("{option} needs a value\n\n{USAGE}")));
        match option.as_str() {
            "--cuda" => cuda = PathBuf::from(value()?),
            "--table" => table = Some(PathBuf::from(value()?)),
            "--dtype" => dtype = Some(value()?),
            "--plain" => plain = true,
            other => return Err(Error::new(format!("describe has no option {other}\n\n{USAGE}"))),
        }
    }
    let table = Table::read(&table.unwrap_or_else(|| cuda.join("instances.def")), &attention::FAMILIES)?;
    let structs = Structs::read(&cuda.join("params.h"))?;
    let mut units = units(&table);
    for unit in &mut units {
        let wanted = |name: &str| dtype.is_none_or(|dtype| dtype == name);
        unit.kernels.retain(|kernel| wanted(kernel.dtype.name) && !(plain && kernel.variant.score_mod));
    }
    println!("{}", describe(&units, &structs, &cuda)?);
    Ok(())
}

fn print_usage(arguments: &[String]) -> Result<()> {
    let (mut source, mut gpu, mut include, mut options) = (None, None, "cuda", Vec::new());
    let mut rest = arguments.iter();
    while let Some(option) = rest.next() {
        let mut value = || rest.next().ok_or_else(|| Error::new(format!("{option} needs a value\n\n{USAGE}")));
        match option.as_str() {
            "--arch" => gpu = Some(value()?),
            "--include" => include = value()?,
            define if define.starts_with("-D") => options.push(define.to_string()),
            path => source = Some(path),
        }
    }
    let (Some(source), Some(gpu)) = (source, gpu) else {
        return Err(Error::new(format!("usage needs a source and --arch\n\n{USAGE}")));
    };
    options.extend(["-Werror", "all-warnings"].map(String::from));
    let folder = std::env::temp_dir().join(format!("kernel-build-{}", std::process::id()));
    headers::write_generated(&folder)?;
    let log =
        Nvcc::find()?.cubin(Path::new(source), &folder.join("cubin"), gpu, &[Path::new(include), &folder], &options);
    // Only the log is needed. If the folder cannot be removed, it stays with the temporary files, where it does no harm.
    let _ = std::fs::remove_dir_all(&folder);
    let log = log?;
    for ((kernel, _), usage) in report::parse(&log) {
        println!("{kernel:<18} {usage}");
    }
    Ok(())
}
