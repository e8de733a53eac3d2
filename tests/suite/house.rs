//! The documents agree with what they speak of: links lead to files, and tables of measurements are the records'.

use anyhow::{ensure, Context, Result};
use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};

/// The runs whose numbers the documents show.
const CPU_RECORD: &str = "benches/record/xeon-sapphire-rapids-2-cores/2026-11-22";
const CUDA_RECORD: &str = "benches/record/h100-80gb-hbm3/2026-11-24";

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

type Table = fn() -> Result<String>;

/// Each document with a table that is made from a record, and how it is made.
const TABLES: [(&str, &str, Table); 4] = [
    ("README.md", "cpu", cpu_table),
    ("README.md", "cuda", || cuda_table(&[1024, 4096, 16384], "")),
    ("docs/cuda.md", "cuda", || cuda_table(&[512, 1024, 2048, 4096, 8192, 16384], "../")),
    ("docs/cuda.md", "summary", cuda_summary),
];

/// `CANDLE_FA2_UPDATE=1` writes the tables instead of comparing them.
#[test]
fn the_documents_show_the_records() -> Result<()> {
    for (document, name, table) in TABLES {
        let (begin, end) = (format!("<!-- table: {name} -->\n"), "<!-- end -->");
        let path = root().join(document);
        let text = fs::read_to_string(&path)?;
        let missing = || format!("{document} has no place for the table {name}");
        let (before, rest) = text.split_once(&begin).with_context(missing)?;
        let (shown, after) = rest.split_once(end).with_context(missing)?;
        let table = table().with_context(|| format!("the table {name} of {document}"))?;
        if std::env::var_os("CANDLE_FA2_UPDATE").is_some() {
            fs::write(&path, [before, &begin, &table, end, after].concat())?;
        } else {
            ensure!(shown == table, "{document} is older than its record; `just tables` rewrites the table:\n{table}");
        }
    }
    Ok(())
}

/// The rows of one CSV file of a record.
fn rows(file: &str) -> Result<Vec<HashMap<String, String>>> {
    let text = fs::read_to_string(root().join(file)).with_context(|| file.to_string())?;
    Ok(csv::Reader::from_reader(text.as_bytes()).deserialize().collect::<Result<_, _>>()?)
}

/// Where and when a record was made: the names of its folders.
fn origin(folder: &str) -> Result<String> {
    let folder = Path::new(folder);
    let machine = folder.parent().and_then(Path::file_name).context("the folder is named by machine")?;
    let date = folder.file_name().context("and by date")?;
    Ok(format!("{}, {}", machine.to_string_lossy().replace('-', " "), date.to_string_lossy()))
}

/// One cell of the GPU benchmark: everything but who computed it.
type Cell = [String; 8];

/// TFLOP/s of one run, by cell.
fn tflops(file: &str, peer: &str) -> Result<HashMap<Cell, f64>> {
    let columns = ["kind", "dir", "hdim", "causal", "batch", "seqlen_q", "hq", "hkv"];
    let timed = rows(file)?.into_iter().filter(|row| row["peer"] == peer && !row["tflops"].is_empty());
    timed.map(|row| Ok((columns.map(|column| row[column].clone()), row["tflops"].parse()?))).collect()
}

/// TFLOP/s of ours and their ratio to FlashAttention-2, by cell.
type Compared = HashMap<Cell, [f64; 2]>;

/// Of each the median of three runs in turns.
fn compared() -> Result<Compared> {
    let runs = |name: &str, peer: &str| -> Result<Vec<_>> {
        (1..=3).map(|run| tflops(&format!("{CUDA_RECORD}/{name}-{run}.csv"), peer)).collect()
    };
    let (ours, flash) = (runs("ours", "ours")?, runs("flash", "flash")?);
    let median = |mut values: Vec<f64>| {
        values.sort_by(f64::total_cmp);
        values[values.len() / 2]
    };
    let cells = flash[0].keys().filter(|cell| cell[1] == "fwd" || cell[1] == "bwd");
    let compare = |cell: &Cell| -> Result<(Cell, [f64; 2])> {
        let of = |runs: &[HashMap<Cell, f64>]| -> Result<Vec<f64>> {
            runs.iter().map(|run| run.get(cell).copied().with_context(|| format!("a run lacks {cell:?}"))).collect()
        };
        let (ours, flash) = (of(&ours)?, of(&flash)?);
        let ratios = ours.iter().zip(&flash).map(|(ours, flash)| ours / flash).collect();
        Ok((cell.clone(), [median(ours), median(ratios)]))
    };
    cells.map(compare).collect()
}

/// Ours and its ratio to FlashAttention-2, by head_dim, mask and direction, over the papers' grid. `to_root` leads from the
/// folder of the document to the repository.
fn cuda_table(seqlens: &[usize], to_root: &str) -> Result<String> {
    let compared = compared()?;
    let heads = seqlens.iter().map(|seqlen| format!(" {seqlen} |")).collect::<String>();
    let rule = " --- |".repeat(seqlens.len());
    let mut table = format!("| head_dim | mask | pass |{heads}\n| --- | --- | --- |{rule}\n");
    for (dir, pass) in [("fwd", "forward"), ("bwd", "backward")] {
        for hdim in [64, 128, 256] {
            for (causal, mask) in [("0", "full"), ("1", "causal")] {
                table += &format!("| {hdim} | {mask} | {pass} |");
                for seqlen in seqlens {
                    let heads = (2048 / hdim).to_string();
                    let (batch, seqlen) = ((16384 / seqlen).to_string(), seqlen.to_string());
                    let cell = ["mha", dir, &hdim.to_string(), causal, &batch, &seqlen, &heads, &heads];
                    let [ours, ratio] =
                        compared.get(&cell.map(String::from)).with_context(|| format!("no run has {cell:?}"))?;
                    table += &format!(" {ours:.0}, {ratio:.2}x |");
                }
                table += "\n";
            }
        }
    }
    let [forward, backward] = ["fwd", "bwd"].map(|dir| geometric_mean(&ratios(&compared, &["mha"], dir)));
    let machine_and_date = origin(CUDA_RECORD)?;
    table += &format!(
        "\nGeometric mean of the ratios over the papers' grid, 36 shapes: {forward:.2} forward, {backward:.2} backward.\n\
         Measured on: {machine_and_date} ([the runs]({to_root}{CUDA_RECORD})).\n"
    );
    Ok(table)
}

/// The ratios of one direction over all cells of some kinds.
fn ratios(compared: &Compared, kinds: &[&str], dir: &str) -> Vec<f64> {
    let of_them = |(cell, _): &(&Cell, _)| kinds.contains(&cell[0].as_str()) && cell[1] == dir;
    compared.iter().filter(of_them).map(|(_, &[_, ratio])| ratio).collect()
}

fn geometric_mean(ratios: &[f64]) -> f64 {
    (ratios.iter().map(|ratio| ratio.ln()).sum::<f64>() / ratios.len() as f64).exp()
}

/// Geometric mean and minimum of the ratios to FlashAttention-2, by kind of call and direction.
fn cuda_summary() -> Result<String> {
    let compared = compared()?;
    let mut table =
        String::from("| calls | pass | cells | geometric mean | smallest |\n| --- | --- | --- | --- | --- |\n");
    for (kinds, name) in [
        (&["mha"][..], "the papers' grid"),
        (&["gqa"], "GQA 32/8"),
        (&["varlen", "varlen_gqa"], "packed, 29 sequences"),
    ] {
        for (dir, pass) in [("fwd", "forward"), ("bwd", "backward")] {
            let ratios = ratios(&compared, kinds, dir);
            let mean = geometric_mean(&ratios);
            let smallest = ratios.iter().copied().fold(f64::INFINITY, f64::min);
            table += &format!("| {name} | {pass} | {} | {mean:.2} | {smallest:.2} |\n", ratios.len());
        }
    }
    Ok(table)
}

/// Forward, and forward + backward, of each way to compute one call, as the record has them.
fn cpu_table() -> Result<String> {
    let rows = rows(&format!("{CPU_RECORD}/attention.csv"))?;
    let time_ms = |peer: &str, dir: &str| -> Option<f64> {
        let reference =
            [("kind", "mha"), ("dtype", "f32"), ("hdim", "64"), ("causal", "1"), ("seqlen_q", "2048"), ("hq", "8")];
        let mut rows = rows.iter().filter(|row| row["peer"] == peer && row["dir"] == dir);
        rows.find(|row| reference.iter().all(|(column, value)| row[*column] == *value))?["ms"].parse().ok()
    };
    let ours = |dir| time_ms("ours", dir).context("the record lacks the reference case");
    let (fwd, both) = (ours("fwd")?, ours("fwd+bwd")?);
    let cell = |peer: &str, dir: &str, ours: f64| match time_ms(peer, dir) {
        Some(ms) if peer == "ours" => format!("{ms:.1} ms"),
        Some(ms) => format!("{ms:.0} ms, {:.1}x as long", ms / ours),
        None => "has no backward".to_string(),
    };
    let mut table = String::from(
        "| causal, 2048 tokens, 8 heads of 64, f32 | forward | forward + backward |\n| --- | --- | --- |\n",
    );
    for (peer, name) in [
        ("ours", "candle-fa2"),
        ("unfused", "Candle: matmul, softmax, matmul"),
        ("candle_flash", "`candle_nn::attention::flash_attn`"),
    ] {
        table += &format!("| {name} | {} | {} |\n", cell(peer, "fwd", fwd), cell(peer, "fwd+bwd", both));
    }
    Ok(table + &format!("\nMeasured on: {} ([the whole run]({CPU_RECORD}/attention.txt)).\n", origin(CPU_RECORD)?))
}

/// Every relative link of a document names a file or folder, from the folder that the document is in.
#[test]
fn links_lead_somewhere() -> Result<()> {
    let in_docs = fs::read_dir(root().join("docs"))?.map(|entry| Ok(entry?.path())).collect::<Result<Vec<_>>>()?;
    let in_docs = in_docs.into_iter().filter(|path| path.extension().is_some_and(|extension| extension == "md"));
    for document in ["README.md", "CHANGELOG.md"].map(|name| root().join(name)).into_iter().chain(in_docs) {
        let text = fs::read_to_string(&document)?;
        let folder = document.parent().context("a document lies in a folder")?;
        for target in text.split("](").skip(1).filter_map(|rest| rest.split_once(')')).map(|(target, _)| target) {
            // Without the heading that it may name.
            let file = target.split('#').next().unwrap_or_default();
            let leads = target.starts_with("http") || folder.join(file).exists();
            ensure!(leads, "{} links to {target}, which does not exist", document.display());
        }
    }
    Ok(())
}

/// A file that a document names in code exists.
#[test]
fn named_files_exist() -> Result<()> {
    for document in ["README.md", "CHANGELOG.md", "docs/cuda.md"] {
        let text = fs::read_to_string(root().join(document))?;
        let folders = ["examples/", "benches/", "tests/", "cuda/", "docs/", "src/", ".ci/"];
        let names = text.split('`').filter(|code| folders.iter().any(|folder| code.starts_with(folder)));
        for name in names.filter_map(|code| code.split(' ').next()) {
            ensure!(root().join(name).exists(), "{document} names {name}, which does not exist");
        }
    }
    Ok(())
}
