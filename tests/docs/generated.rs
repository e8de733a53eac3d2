//! Tests that the generated parts of the documents are up to date.

use std::fs;

use anyhow::{ensure, Context, Result};
use candle_core::DType;

use super::records::{self, Records};
use super::{claims, files, read, root, shapes, tables, update};

type Table = fn(&Records) -> Result<String>;

/// Each generated part of a document: the document, the name in its `<!-- table: NAME -->`, and the function that makes the part.
const TABLES: [(&str, &str, Table); 33] = [
    ("README.md", "cpu-plot", |records| Ok(records.xeon.figure("cpu", "docs/"))),
    ("README.md", "cpu", |records| tables::cpu(&records.xeon, "")),
    ("README.md", "gpu-plot", |records| {
        Ok(records.h200.figure("hopper-forward", "docs/") + &records.h200.figure("hopper-backward", "docs/"))
    }),
    ("README.md", "gpu", |Records { h200, .. }| tables::front_page(h200)),
    ("docs/benchmarks.md", "hopper-plot", |records| Ok(records.h200.figure("hopper-forward", ""))),
    ("docs/benchmarks.md", "hopper-backward-plot", |records| Ok(records.h200.figure("hopper-backward", ""))),
    ("docs/benchmarks.md", "hopper", |records| tables::forward(&records.h200, "../")),
    ("docs/benchmarks.md", "hopper-summary", |records| tables::pass_summary(&records.h200, "fwd")),
    ("docs/benchmarks.md", "hopper-shares", |records| tables::shares(&records.h200)),
    ("docs/benchmarks.md", "backward", |records| tables::backward(&records.h200, "../")),
    ("docs/benchmarks.md", "backward-summary", |records| tables::pass_summary(&records.h200, "bwd")),
    ("docs/benchmarks.md", "f32", |records| tables::f32(&records.h200_f32, "../")),
    ("docs/benchmarks.md", "standard-f32", |records| tables::standard(&records.h200_f32)),
    ("docs/benchmarks.md", "cuda", |records| tables::speed(&records.h100, &figures::SEQLENS, "../")),
    ("docs/benchmarks.md", "summary", |records| tables::summary(&records.h100)),
    ("docs/benchmarks.md", "speed", |records| tables::peers(&records.h100)),
    ("docs/benchmarks.md", "claims", |records| claims::table(&records.h100, &records.h100)),
    ("docs/benchmarks.md", "claims-hopper", |records| claims::table(&records.h200, &records.h200_training)),
    ("docs/benchmarks.md", "standard", |records| tables::standard(&records.h100)),
    ("docs/benchmarks.md", "memory", |records| tables::memory(&records.h100)),
    ("docs/benchmarks.md", "ablations", |records| tables::ablations(&records.h100)),
    ("docs/benchmarks.md", "heads", |records| tables::heads(&records.h100)),
    ("docs/benchmarks.md", "sizes", |records| tables::sizes(&records.h200_sizes)),
    ("docs/benchmarks.md", "gpt-peers", |records| tables::gpt_peers(&records.h200_training)),
    ("docs/benchmarks.md", "gpt", |records| tables::gpt(&records.h100)),
    ("docs/benchmarks.md", "loss", |records| Ok(records.h100.figure("loss", ""))),
    ("docs/gpt.md", "training", |records| tables::training(&records.h100)),
    ("docs/log/gpt.md", "loss-operators", |records| Ok(records.h200_operators.figure("loss-operators", "../"))),
    ("docs/log/gpt.md", "gpt-steps", |records| tables::gpt_steps(&records.h100)),
    ("docs/design/hopper.md", "shapes", |_| Ok(shapes::hopper())),
    ("docs/design/sm80.md", "shapes", |_| Ok(shapes::sm80(DType::BF16, false))),
    ("docs/design/sm80.md", "shapes-f32", |_| Ok(shapes::sm80(DType::F32, false))),
    ("docs/design/sm80.md", "shapes-tf32", |_| Ok(shapes::sm80(DType::F32, true))),
];

/// The text in place of a table or figure for which the record has no rows.
const NOTHING_YET: &str = "Not in the newest record.\n";

#[test]
fn tables_are_up_to_date() -> Result<()> {
    let records = records::newest()?;
    for (document, name, table) in TABLES {
        let (begin, end) = (format!("<!-- table: {name} -->\n"), "<!-- end -->");
        let text = read(document)?;
        let missing = || format!("{document} must have a line <!-- table: {name} --> and after it <!-- end -->");
        let (before, rest) = text.split_once(&begin).with_context(missing)?;
        let (shown, after) = rest.split_once(end).with_context(missing)?;
        let table = table(&records).with_context(|| format!("the table {name} of {document}"))?;
        let table = if table.is_empty() { NOTHING_YET.to_string() } else { table };
        if update() {
            fs::write(root().join(document), [before, &begin, &table, end, after].concat())?;
        } else {
            ensure!(shown == table, "{document} is stale; `just tables` rewrites the table {name}:\n{table}");
        }
    }
    Ok(())
}

/// The measured numbers that may be typed, because no record has them.
const TYPED: [&str; 2] = ["2.5 times that backward", "the two losses differ by at most 0.16%"];

/// A typed number does not follow the record, so shares, factors and rates of the newest record are in generated parts.
#[test]
fn measured_numbers_are_generated() -> Result<()> {
    if update() {
        return Ok(()); // another test is writing documents
    }
    for document in ["README.md", "docs/benchmarks.md"] {
        let text = read(document)?;
        let typed = text.split("<!-- end -->").filter_map(|part| part.split("<!-- table:").next());
        for line in typed.flat_map(str::lines).filter(|line| !TYPED.iter().any(|known| line.contains(known))) {
            let is_number = |(at, _): (usize, &str)| line[..at].ends_with(|c: char| c.is_ascii_digit());
            let measured = ["%", "x", " times", " TFLOP/s"].iter().any(|unit| line.match_indices(unit).any(is_number));
            ensure!(!measured, "{document} has a typed number; make a generated part for it in tests/docs:\n{line}");
        }
    }
    Ok(())
}

/// docs/plots has the figures of the newest records, and no other files.
#[test]
fn plots_are_up_to_date() -> Result<()> {
    let figures = records::newest()?.figures();
    let folder = root().join("docs/plots");
    if update() {
        figures::save(&folder, &figures)?;
    }
    for (name, svg) in &figures {
        let shown = fs::read_to_string(folder.join(name).with_extension("svg")).unwrap_or_default();
        ensure!(shown == *svg, "docs/plots/{name}.svg is stale; `just tables` draws it again");
    }
    for path in files("docs/plots", &|_| true)? {
        let drawn = figures.iter().any(|(name, _)| path.file_stem().is_some_and(|stem| stem == *name));
        if !drawn && update() {
            fs::remove_file(root().join(&path))?;
        }
        ensure!(drawn || update(), "{} is not a figure of a record; `just tables` removes it", path.display());
    }
    Ok(())
}
