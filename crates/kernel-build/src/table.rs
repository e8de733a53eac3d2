//! Parses a table of kernels. It has one line for each instance of the templates.
//!
//! ```text
//! KERNEL(fwd, sm80, 128, 128, 64, 4, 1)  // a line of a family: pass, arch, and a number for each column
//! LOCAL(fwd_sm80_d128_128x64, 112)       // these kernels (f16 and bf16) may use 112 bytes of local memory per thread; the reason
//! ```
//! Everything after `//` is a comment. A LOCAL line must have a comment, and must name a kernel of the table.

use std::collections::BTreeMap;
use std::path::Path;

use crate::family::{Dtype, Entry, Family, Variant};
use crate::nvcc::Gpus;
use crate::{files, Error, Result};

/// The lines of a table.
#[derive(Debug)]
pub struct Table {
    /// The KERNEL lines, in the order of the file.
    pub lines: Vec<Line>,
    /// The LOCAL lines, in the order of the file.
    pub locals: Vec<Local>,
}

/// A KERNEL line.
#[derive(Clone, Debug)]
pub struct Line {
    /// The family of its pass and architecture.
    pub family: &'static Family,
    /// The number of the line in the file.
    pub number: usize,
    values: Vec<usize>,
}

/// A LOCAL line: kernels that may use local memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Local {
    /// The name of the kernels, as [`Line::label`] makes it.
    pub label: String,
    /// The largest number of bytes per thread.
    pub bytes: usize,
    /// The number of the line in the file.
    pub number: usize,
}

impl Line {
    /// The number in a column. 0 if the family has no such column.
    pub fn get(&self, column: &str) -> usize {
        let index = self.family.columns.iter().position(|name| *name == column);
        index.map_or(0, |index| self.values[index])
    }

    /// All numbers, in the order of the columns.
    pub fn values(&self) -> &[usize] {
        &self.values
    }

    /// The symbol of a kernel of this line.
    pub fn symbol(&self, entry: &Entry, dtype: &Dtype, variant: &Variant) -> String {
        self.fill(entry.symbol).replace("{dtype}", dtype.name) + variant.suffix
    }

    /// The symbol, without the element type if the line has several. LOCAL lines, reports and documents use this name.
    pub fn label(&self, entry: &Entry, variant: &Variant) -> String {
        match self.family.dtypes {
            [only] => self.symbol(entry, only, variant),
            _ => self.fill(entry.symbol).replace("_{dtype}", "") + variant.suffix,
        }
    }

    fn fill(&self, pattern: &str) -> String {
        let columns = self.family.columns.iter().zip(&self.values);
        columns
            .fold(pattern.to_string(), |text, (name, value)| text.replace(&format!("{{{name}}}"), &value.to_string()))
    }

    fn labels(&self) -> impl Iterator<Item = String> + '_ {
        let entries = self.family.entries.iter();
        entries.flat_map(|entry| entry.variants.iter().map(|variant| self.label(entry, variant)))
    }
}

impl Table {
    /// Reads a file.
    ///
    /// # Errors
    /// As [`Self::parse`], or if the file cannot be read.
    pub fn read(path: &Path, families: &'static [Family]) -> Result<Self> {
        Self::parse(&files::read(path)?, &path.display().to_string(), families)
    }

    /// Parses the text of `file`. Errors name the file.
    ///
    /// # Errors
    /// If a line breaks a rule, if two lines make kernels with the same name, if a LOCAL line names no kernel of the table, or if two
    /// LOCAL lines name the same kernel.
    pub fn parse(text: &str, file: &str, families: &'static [Family]) -> Result<Self> {
        let mut table = Self { lines: Vec::new(), locals: Vec::new() };
        for (index, line) in text.lines().enumerate() {
            let (code, comment) = line.split_once("//").unwrap_or((line, ""));
            if code.trim().is_empty() {
                continue;
            }
            table
                .add(code.trim(), comment.trim(), index + 1, families)
                .map_err(|rule| Error::at(file, index + 1, format!("{rule}, got {}", line.trim())))?;
        }
        table.check_names(file)?;
        Ok(table)
    }

    /// Removes the lines for a single GPU (`Arch::exact`) that is not in `gpus`. They get no code, so a plan must not choose them.
    /// Returns the GPUs that no line supports.
    pub fn keep_for(&mut self, gpus: &Gpus) -> Vec<u32> {
        self.lines.retain(|Line { family: Family { arch, .. }, .. }| !arch.exact || gpus.contains(arch.sm));
        let runs = |gpu: &u32| self.lines.iter().any(|line| line.family.arch.runs_on(*gpu));
        gpus.iter().filter(|gpu| !runs(gpu)).collect()
    }

    fn add(&mut self, code: &str, comment: &str, number: usize, families: &'static [Family]) -> Result<(), String> {
        let forms = || "expected KERNEL(pass, arch, numbers ..) or LOCAL(kernel, bytes)".to_string();
        let (word, rest) = code.split_once('(').ok_or_else(forms)?;
        let arguments: Vec<&str> = rest.strip_suffix(')').ok_or_else(forms)?.split(',').map(str::trim).collect();
        match (word.trim(), arguments.as_slice()) {
            ("KERNEL", &[pass, arch, ref numbers @ ..]) => {
                self.lines.push(kernel(pass, arch, numbers, number, families)?)
            }
            ("LOCAL", _) if comment.is_empty() => {
                return Err("a LOCAL line needs a comment with the reason, after //".to_string());
            }
            ("LOCAL", &[label, bytes]) => {
                self.locals.push(Local { label: label.to_string(), bytes: positive(bytes)?, number });
            }
            _ => return Err(forms()),
        }
        Ok(())
    }

    fn check_names(&self, file: &str) -> Result<()> {
        let mut kernels = BTreeMap::new();
        for (label, number) in self.lines.iter().flat_map(|line| line.labels().map(|label| (label, line.number))) {
            if let Some(first) = kernels.insert(label.clone(), number) {
                return Err(Error::at(
                    file,
                    number,
                    format!("line {first} makes a kernel {label} too; remove one of the lines"),
                ));
            }
        }
        let mut locals = BTreeMap::new();
        for Local { label, number, .. } in &self.locals {
            if !kernels.contains_key(label) {
                let text =
                    format!("LOCAL takes the name of a kernel of this table, without the element type, got {label}");
                return Err(Error::at(file, *number, text));
            }
            if let Some(first) = locals.insert(label, number) {
                return Err(Error::at(
                    file,
                    *number,
                    format!("line {first} has LOCAL({label}, ..) too; remove one of the lines"),
                ));
            }
        }
        Ok(())
    }
}

fn kernel(
    pass: &str,
    arch: &str,
    numbers: &[&str],
    number: usize,
    families: &'static [Family],
) -> Result<Line, String> {
    let is_it = |family: &&Family| family.pass == pass && arch == format!("sm{}", family.arch.sm);
    let Some(family) = families.iter().find(is_it) else {
        let known: Vec<String> = families.iter().map(Family::form).collect();
        return Err(format!("expected one of {}", known.join(", ")));
    };
    if numbers.len() != family.columns.len() {
        return Err(format!("expected {}", family.form()));
    }
    let value = |(column, text): (&&str, &&str)| {
        if family.flags.contains(column) {
            flag(column, text)
        } else {
            positive(text)
        }
    };
    let values = family.columns.iter().zip(numbers).map(value).collect::<Result<_, _>>()?;
    Ok(Line { family, number, values })
}

fn flag(column: &str, text: &str) -> Result<usize, String> {
    text.parse().ok().filter(|&number| number <= 1).ok_or_else(|| format!("expected 0 or 1 for {column} {text}"))
}

fn positive(text: &str) -> Result<usize, String> {
    text.parse().ok().filter(|&number| number > 0).ok_or_else(|| format!("expected a number above 0 for {text}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::attention::FAMILIES;

    fn parse(text: &str) -> Result<Table> {
        Table::parse(text, "instances.def", &FAMILIES)
    }

    fn error(text: &str) -> String {
        parse(text).expect_err("the text breaks a rule").to_string()
    }

    #[test]
    fn a_line_has_its_columns_and_names() {
        let table = parse("// comment\n\nKERNEL(bwd, sm80, 64, 32, 128, 4, 1, 2, 1, 4, 1)  // 295\n")
            .expect("the line is right");
        let line = &table.lines[0];
        assert_eq!((line.number, line.get("head_dim"), line.get("stages"), line.get("splits")), (3, 64, 2, 0));
        let [backward] = line.family.entries else { panic!("a backward has one entry") };
        let [_, score_mod] = backward.variants else { panic!("a backward has two variants") };
        let [_, bf16] = line.family.dtypes else { panic!("two element types") };
        assert_eq!(line.symbol(backward, bf16, score_mod), "bwd_sm80_bf16_d64_32x128_s2_score_mod");
        assert_eq!(line.label(backward, score_mod), "bwd_sm80_d64_32x128_s2_score_mod");
    }

    #[test]
    fn a_local_line_names_kernels_of_the_table() {
        let kernel = "KERNEL(fwd, sm80, 64, 128, 128, 4, 1)\n";
        let table = parse(&format!("{kernel}LOCAL(fwd_sm80_d64_128x128, 88)  // why")).expect("the lines are right");
        assert_eq!(table.locals, [Local { label: "fwd_sm80_d64_128x128".to_string(), bytes: 88, number: 2 }]);
        assert_eq!(
            error(&format!("{kernel}LOCAL(fwd_*, 88)  // why")),
            "instances.def:2: LOCAL takes the name of a kernel of this table, without the element type, got fwd_*"
        );
        let local = "LOCAL(fwd_sm80_d64_128x128, 88)  // why\n";
        assert_eq!(
            error(&format!("{kernel}{local}{local}")),
            "instances.def:3: line 2 has LOCAL(fwd_sm80_d64_128x128, ..) too; remove one of the lines"
        );
        assert_eq!(
            error(&format!("{kernel}LOCAL(fwd_sm80_d64_128x128, 88)")),
            "instances.def:2: a LOCAL line needs a comment with the reason, after //, got LOCAL(fwd_sm80_d64_128x128, 88)"
        );
    }

    #[test]
    fn an_error_names_line_rule_and_text() {
        assert_eq!(
            error("KERNEL(fwd, sm80, 64, 128)"),
            "instances.def:1: expected KERNEL(fwd, sm80, head_dim, block_m, block_n, warps, min_blocks), got KERNEL(fwd, sm80, 64, 128)"
        );
        assert_eq!(
            error("\nKERNEL(fwd, sm80, 64, 128, 0, 4, 1) // tile"),
            "instances.def:2: expected a number above 0 for 0, got KERNEL(fwd, sm80, 64, 128, 0, 4, 1) // tile"
        );
        assert_eq!(
            error("KERNEL(fwd, sm90, 64, 192, 128, 16, 2, 0, 2)"),
            "instances.def:1: expected 0 or 1 for late_rescale 2, got KERNEL(fwd, sm90, 64, 192, 128, 16, 2, 0, 2)"
        );
        assert!(error("KERNEL(delta, sm90, 8)").starts_with("instances.def:1: expected one of KERNEL(fwd, sm80, "));
        for text in ["KERNEL(fwd, sm80, 64", "TILE(64)", "LOCAL(a, b, c)  // why", "fwd"] {
            let rule = "instances.def:1: expected KERNEL(pass, arch, numbers ..) or LOCAL(kernel, bytes), got ";
            assert_eq!(error(text), format!("{rule}{text}"));
        }
    }

    #[test]
    fn two_lines_of_one_name_are_an_error() {
        assert_eq!(
            error("KERNEL(fwd, sm80, 64, 128, 128, 4, 1)\nKERNEL(fwd, sm80, 64, 128, 128, 8, 1)"),
            "instances.def:2: line 1 makes a kernel fwd_sm80_d64_128x128 too; remove one of the lines"
        );
    }

    #[test]
    fn only_lines_with_code_are_kept() {
        let text = "KERNEL(fwd, sm80, 64, 128, 128, 4, 1)\nKERNEL(fwd, sm90, 64, 192, 128, 16, 2, 0, 0)";
        for (gpus, kept, without) in
            [("80", 1, vec![]), ("90", 2, vec![]), ("100 120", 1, vec![]), ("70 80", 1, vec![70])]
        {
            let mut table = parse(text).expect("the lines are right");
            assert_eq!(table.keep_for(&Gpus::parse(gpus).expect("numbers")), without, "{gpus}");
            assert_eq!(table.lines.len(), kept, "{gpus}");
        }
    }

    #[test]
    fn every_pattern_of_a_family_is_filled() {
        for family in &FAMILIES {
            assert!(family.flags.iter().all(|flag| family.columns.contains(flag)), "{}", family.form());
            let line = Line { family, number: 1, values: vec![1; family.columns.len()] };
            assert!(family.columns.contains(&"warps"), "{}", family.form());
            assert!(line.labels().all(|label| !label.contains(['{', '}'])), "{}", family.form());
        }
    }
}
