//! Reads what ptxas reports of each kernel. Local memory that no LOCAL line allows is a warning, or an error in CI.

use std::collections::BTreeMap;
use std::fmt::{self, Display, Formatter, Write as _};
use std::fs;

use crate::compile::Compiler;
use crate::table::Local;
use crate::units::{Kernel, Unit};
use crate::{files, Error, Result};

/// The registers and the memory of a kernel on one GPU.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Registers of a thread.
    pub registers: usize,
    /// Local memory of a thread: spilled registers and arrays.
    pub stack_bytes: usize,
    /// Bytes that a thread stores when registers are spilled.
    pub spill_store_bytes: usize,
    /// Bytes that a thread loads back.
    pub spill_load_bytes: usize,
    /// Static shared memory of a thread block.
    pub shared_bytes: usize,
}

impl Display for Usage {
    fn fmt(&self, f: &mut Formatter) -> fmt::Result {
        let Self { registers, stack_bytes, spill_store_bytes, spill_load_bytes, .. } = self;
        write!(
            f,
            "{registers:>3} registers, {stack_bytes} bytes local ({spill_store_bytes} / {spill_load_bytes} spilled)"
        )
    }
}

/// Usages by the name of the kernel and ptxas' name of the GPU, such as `sm_90a`.
pub type Usages = BTreeMap<(String, String), Usage>;

/// Parses the output of `-Xptxas -v`. A function that is not inlined has a stack frame of its own. The largest frame counts.
pub fn parse(log: &str) -> Usages {
    let mut usages = Usages::new();
    let mut current = None;
    for line in log.lines() {
        if line.contains("Compiling entry function") {
            let mut quoted = line.split('\'');
            current = quoted.nth(1).zip(quoted.nth(1)).map(|(name, gpu)| (name.to_string(), gpu.to_string()));
            continue;
        }
        let Some(key) = &current else { continue };
        let words: Vec<&str> = line.split([' ', ',']).filter(|word| !word.is_empty()).collect();
        // The number before a phrase: `80 bytes stack frame`, `Used 255 registers`.
        let before = |phrase: &[&str]| {
            let at = words.windows(phrase.len()).position(|window| window == phrase)?;
            words.get(at.checked_sub(1)?)?.parse::<usize>().ok()
        };
        let usage = usages.entry(key.clone()).or_default();
        let update = |value: &mut usize, phrase: &[&str]| *value = before(phrase).unwrap_or(0).max(*value);
        update(&mut usage.stack_bytes, &["bytes", "stack", "frame"]);
        update(&mut usage.stack_bytes, &["bytes", "cumulative", "stack", "size"]);
        update(&mut usage.spill_store_bytes, &["bytes", "spill", "stores"]);
        update(&mut usage.spill_load_bytes, &["bytes", "spill", "loads"]);
        update(&mut usage.registers, &["registers"]);
        update(&mut usage.shared_bytes, &["bytes", "smem"]);
    }
    usages
}

/// The lines in which ptxas reports that wgmmas run one by one, or that it ignores setmaxnreg. These lines name the kernel.
pub fn serialized(log: &str) -> Vec<&str> {
    const WORDS: [&str; 2] = ["Potential Performance Loss", "serialized"];
    // The codes of this advice.
    const CODES: [&str; 8] = ["C7508", "C7510", "C7511", "C7512", "C7513", "C7514", "C7515", "C7516"];
    let is_sign = |line: &&str| {
        WORDS.iter().any(|word| line.contains(word)) || CODES.iter().any(|code| line.contains(&format!("({code})")))
    };
    log.lines().filter(is_sign).collect()
}

/// Whether kernels and LOCAL lines must agree. CI sets `strict`, because it compiles for all GPUs with one version of nvcc. Another version
/// may spill a few bytes more, so for everybody else a difference is a warning.
fn is_strict(variable: &str, value: Option<&str>) -> Result<bool> {
    match value {
        None => Ok(false),
        Some("strict") => Ok(true),
        Some(other) => Err(Error::new(format!("{variable} must be strict or unset, got {other}"))),
    }
}

/// The usage of every kernel on every GPU that it was compiled for.
#[derive(Debug)]
pub struct Report<'a> {
    rows: Vec<(&'a Kernel, u32, Usage)>,
}

impl<'a> Report<'a> {
    /// Reads the logs of a compilation.
    ///
    /// # Errors
    /// If a log does not mention a kernel of its unit.
    pub fn read(compiler: &Compiler, units: &'a [Unit]) -> Result<Self> {
        let mut rows = Vec::new();
        for unit in units {
            // Where only Rust is checked, a script replaces nvcc and writes an empty image.
            if fs::metadata(compiler.path(&unit.name, "fatbin")).is_ok_and(|file| file.len() == 0) {
                continue;
            }
            let usages = parse(&files::read(&compiler.path(&unit.name, "log"))?);
            for kernel in &unit.kernels {
                for (gpu, target) in compiler.gpus.targets(&unit.family.arch) {
                    let usage = usages.get(&(kernel.name.clone(), format!("sm_{target}")));
                    let missing = || Error::new(format!("ptxas reports nothing about {} for sm_{target}", kernel.name));
                    rows.push((kernel, gpu, *usage.ok_or_else(missing)?));
                }
            }
        }
        Ok(Self { rows })
    }

    /// A line for each kernel and GPU.
    pub fn csv(&self) -> String {
        let mut csv =
            String::from("kernel,arch,threads,registers,stack_bytes,spill_store_bytes,spill_load_bytes,shared_bytes\n");
        for (kernel, gpu, usage) in &self.rows {
            let &Usage { registers, stack_bytes, spill_store_bytes, spill_load_bytes, shared_bytes } = usage;
            let (name, threads, shared_bytes) = (&kernel.name, kernel.threads(), shared_bytes + kernel.shared_bytes);
            let _ = writeln!(
                csv,
                "{name},{gpu},{threads},{registers},{stack_bytes},{spill_store_bytes},{spill_load_bytes},{shared_bytes}"
            );
        }
        csv
    }

    /// Compares local memory with the LOCAL lines of the file `table`. Returns warnings about local memory that no line allows. If the
    /// environment variable `variable` is `strict`, these are errors, and so is a line whose kernels use none.
    ///
    /// # Errors
    /// As above, or if the variable has another value.
    pub fn check(&self, locals: &[Local], table: &str, variable: &str) -> Result<Vec<String>> {
        self.compare(locals, table, is_strict(variable, files::variable(variable).as_deref())?)
    }

    fn compare(&self, locals: &[Local], table: &str, strict: bool) -> Result<Vec<String>> {
        let (unlisted, stale) = (self.unlisted(locals), self.stale(locals));
        if !strict {
            return Ok(unlisted);
        }
        if !unlisted.is_empty() {
            let way_out = "change the tile, or add a line LOCAL(kernel, bytes)  // reason";
            let text = unlisted.join("\n");
            return Err(Error::new(format!("{text}\n{way_out} to {table}")));
        }
        if !stale.is_empty() {
            let lines = stale.iter().map(|Local { label, number, .. }| format!("{table}:{number}: LOCAL({label}, ..)"));
            let lines = lines.collect::<Vec<_>>().join("\n");
            let text = "the kernels of these lines use no local memory on any GPU; remove the lines";
            return Err(Error::new(format!("{lines}\n{text}")));
        }
        Ok(Vec::new())
    }

    /// A text for each kernel that uses more local memory than its LOCAL line allows.
    fn unlisted(&self, locals: &[Local]) -> Vec<String> {
        let allowed =
            |kernel: &Kernel| locals.iter().find(|local| local.label == kernel.label).map_or(0, |local| local.bytes);
        let over = self.rows.iter().filter(|(kernel, _, usage)| usage.stack_bytes > allowed(kernel));
        let describe = |(kernel, gpu, usage): &(&Kernel, u32, Usage)| {
            let &Usage { stack_bytes, spill_store_bytes, .. } = usage;
            let (name, allowed) = (&kernel.name, allowed(kernel));
            format!(
                "{name} for sm_{gpu} uses {stack_bytes} bytes of local memory per thread, {allowed} are allowed; \
                 {spill_store_bytes} bytes are spilled"
            )
        };
        over.map(describe).collect()
    }

    /// The lines whose kernels use no local memory on any GPU.
    fn stale<'b>(&self, locals: &'b [Local]) -> Vec<&'b Local> {
        let uses = |local: &Local| {
            self.rows.iter().any(|(kernel, _, usage)| kernel.label == local.label && usage.stack_bytes > 0)
        };
        locals.iter().filter(|local| !uses(local)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::attention::FAMILIES;
    use crate::table::Table;
    use crate::units::units;

    const LOG: &str = "\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'fwd_sm80_bf16_d64_128x128' for 'sm_90'
ptxas info    : Function properties for fwd_sm80_bf16_d64_128x128
    48 bytes stack frame, 100 bytes spill stores, 104 bytes spill loads
ptxas info    : Used 255 registers, used 2 barriers, 48 bytes cumulative stack size, 4096 bytes smem
ptxas info    : Compile time = 3603.263 ms
ptxas info    : Function properties for recompute
    64 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Compiling entry function 'fwd_sm80_bf16_d64_128x128' for 'sm_80'
ptxas info    : Function properties for fwd_sm80_bf16_d64_128x128
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 250 registers, used 2 barriers
";

    fn usage(gpu: &str) -> Usage {
        parse(LOG)[&("fwd_sm80_bf16_d64_128x128".to_string(), gpu.to_string())]
    }

    #[test]
    fn a_log_is_read_by_kernel_and_gpu() {
        let large = Usage {
            registers: 255,
            stack_bytes: 64,
            spill_store_bytes: 100,
            spill_load_bytes: 104,
            shared_bytes: 4096,
        };
        assert_eq!(usage("sm_90"), large);
        assert_eq!(usage("sm_80"), Usage { registers: 250, ..Usage::default() });
    }

    #[test]
    fn advice_about_wgmma_is_found() {
        let line =
            "ptxas info : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized in kernel";
        assert_eq!(serialized(&format!("{LOG}{line}\n")), [line]);
        assert!(serialized(LOG).is_empty());
    }

    /// One kernel on two GPUs, of which the second spills.
    fn report(units: &[Unit]) -> Report<'_> {
        let kernel = &units[0].kernels[2];
        assert_eq!(kernel.name, "fwd_sm80_bf16_d64_128x128");
        Report { rows: vec![(kernel, 80, usage("sm_80")), (kernel, 90, usage("sm_90"))] }
    }

    fn table(locals: &str) -> Table {
        let text = format!("KERNEL(fwd, sm80, 64, 128, 128, 4, 1)\nKERNEL(delta, sm80, 8)\n{locals}");
        Table::parse(&text, "instances.def", &FAMILIES).expect("the lines are right")
    }

    #[test]
    fn csv_has_all_shared_memory() {
        let units = units(&table(""));
        let csv = report(&units).csv();
        assert!(csv.ends_with("fwd_sm80_bf16_d64_128x128,90,128,255,64,100,104,53248\n"), "{csv}");
    }

    #[test]
    fn local_memory_must_be_listed() {
        let text = "fwd_sm80_bf16_d64_128x128 for sm_90 uses 64 bytes of local memory per thread, 32 are allowed; 100 bytes are spilled";
        let short = table("LOCAL(fwd_sm80_d64_128x128, 32)  // why");
        let units = units(&short);
        let report = report(&units);
        assert_eq!(report.unlisted(&short.locals), [text]);
        assert_eq!(report.compare(&short.locals, "instances.def", false), Ok(vec![text.to_string()]));
        let error = report.compare(&short.locals, "instances.def", true).expect_err("it is not listed").to_string();
        let way_out = "change the tile, or add a line LOCAL(kernel, bytes)  // reason to instances.def";
        assert_eq!(error, format!("{text}\n{way_out}"));
        assert!(report.unlisted(&table("LOCAL(fwd_sm80_d64_128x128, 64)  // why").locals).is_empty());
    }

    #[test]
    fn a_line_that_no_kernel_needs_is_stale() {
        let table = table("LOCAL(fwd_sm80_d64_128x128, 64)  // why\nLOCAL(delta, 8)  // why");
        let units = units(&table);
        let report = report(&units);
        assert_eq!(report.stale(&table.locals), [&table.locals[1]]);
        assert_eq!(report.compare(&table.locals, "instances.def", false), Ok(Vec::new()));
        let error =
            report.compare(&table.locals, "instances.def", true).expect_err("no kernel needs the line").to_string();
        let text = "the kernels of these lines use no local memory on any GPU; remove the lines";
        assert_eq!(error, format!("instances.def:4: LOCAL(delta, ..)\n{text}"));
    }

    #[test]
    fn the_gate_is_strict_or_unset() {
        assert_eq!([None, Some("strict")].map(|value| is_strict("SPILLS", value)), [Ok(false), Ok(true)]);
        let error = is_strict("SPILLS", Some("warn")).expect_err("it is neither").to_string();
        assert_eq!(error, "SPILLS must be strict or unset, got warn");
    }
}
