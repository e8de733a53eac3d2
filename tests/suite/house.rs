//! The documents agree with what they speak of: links lead to files, and the README's table is the record's.

use anyhow::{ensure, Context, Result};
use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};

/// The run whose numbers the README shows.
const RECORD: &str = "benches/record/xeon-sapphire-rapids-2-cores/2026-11-22/attention.csv";

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

/// `CANDLE_FA2_UPDATE=1` writes the table instead of comparing it.
#[test]
fn the_readme_shows_the_record() -> Result<()> {
    let (begin, end) = ("<!-- table: cpu -->\n", "<!-- end -->");
    let path = root().join("README.md");
    let readme = fs::read_to_string(&path)?;
    let (before, rest) = readme.split_once(begin).context("README.md has no place for the table")?;
    let (shown, after) = rest.split_once(end).context("the table in README.md has no end")?;
    let table = table(&fs::read_to_string(root().join(RECORD))?)?;
    if std::env::var_os("CANDLE_FA2_UPDATE").is_some() {
        fs::write(&path, [before, begin, &table, end, after].concat())?;
    } else {
        ensure!(shown == table, "README.md is older than {RECORD}; `just tables` rewrites its table:\n{table}");
    }
    Ok(())
}

/// Forward, and forward + backward, of each way to compute one call, as the record has them.
fn table(record: &str) -> Result<String> {
    let mut reader = csv::Reader::from_reader(record.as_bytes());
    let rows: Vec<HashMap<String, String>> = reader.deserialize().collect::<Result<_, _>>()?;
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
    let folder = Path::new(RECORD).parent().context("the record lies in a folder")?;
    let machine = folder.parent().and_then(Path::file_name).context("the folder is named by machine")?;
    let date = folder.file_name().context("and by date")?;
    let (machine, date) = (machine.to_string_lossy().replace('-', " "), date.to_string_lossy());
    Ok(table + &format!("\nMeasured on: {machine}, {date} ([the whole run]({}/attention.txt)).\n", folder.display()))
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

/// A command or a file that the README names in code exists.
#[test]
fn named_files_exist() -> Result<()> {
    let readme = fs::read_to_string(root().join("README.md"))?;
    for name in readme.split('`').filter(|code| code.starts_with("examples/") || code.starts_with("benches/")) {
        ensure!(root().join(name).exists(), "README.md names {name}, which does not exist");
    }
    Ok(())
}
