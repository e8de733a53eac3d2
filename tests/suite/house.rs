//! The documents agree with what they speak of: links lead to files, and figures and tables of measurements are the records'.

mod claims;
mod gpu;
#[path = "../docs/import_graph.rs"]
mod import_graph;
mod loss;
mod tables;

// The figures are drawn by what draws those of a run of the bench.
#[path = "../../benches/attention/plot/mod.rs"]
mod plot;

use anyhow::{ensure, Context, Result};
use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};

use self::gpu::{Gpu, Machine, GPU, HOPPER};

/// The run on a CPU whose numbers the documents show; of those on GPUs it is each one's newest.
const CPU_RECORD: &str = "benches/record/xeon-sapphire-rapids-2-cores/2026-11-22";

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

type Table = fn(&Gpu) -> Result<String>;

/// Each part of a document that is made from a GPU's record, and how it is made.
const TABLES: [(&str, &str, Machine, Table); 19] = [
    ("README.md", "cpu", GPU, |_| cpu_table()),
    ("README.md", "hopper-plot", HOPPER, |gpu| Ok(gpu.figure("hopper-forward", "docs/"))),
    ("README.md", "hopper", HOPPER, |gpu| {
        tables::beside_the_fastest(gpu, &plot::HEAD_DIMS, &[512, 1024, 4096, 16384], "")
    }),
    ("README.md", "plot", GPU, |gpu| Ok(gpu.figure("forward-backward", "docs/"))),
    ("README.md", "cuda", GPU, |gpu| tables::speed(gpu, &[1024, 4096, 16384], "")),
    ("docs/hopper.md", "hopper", HOPPER, |gpu| {
        tables::beside_the_fastest(gpu, &[64, 96, 128, 192, 256], &plot::SEQLENS, "../")
    }),
    ("docs/hopper.md", "hopper-summary", HOPPER, tables::forward_summary),
    ("docs/cuda.md", "cuda", GPU, |gpu| tables::speed(gpu, &plot::SEQLENS, "../")),
    ("docs/cuda.md", "summary", GPU, tables::summary),
    ("docs/benchmarks.md", "claims", GPU, claims::table),
    ("docs/benchmarks.md", "speed", GPU, tables::peers),
    ("docs/benchmarks.md", "standard", GPU, tables::standard),
    ("docs/benchmarks.md", "memory", GPU, tables::memory),
    ("docs/benchmarks.md", "ablations", GPU, tables::ablations),
    ("docs/benchmarks.md", "heads", GPU, tables::heads),
    ("README.md", "training", GPU, tables::training),
    ("docs/benchmarks.md", "gpt", GPU, tables::gpt),
    ("docs/benchmarks.md", "gpt-steps", GPU, tables::gpt_steps),
    ("docs/benchmarks.md", "loss", GPU, |gpu| Ok(gpu.figure("loss", ""))),
];

/// What stands in place of a table or figure that the record has no rows for.
const NOTHING_YET: &str = "Not in the newest record.\n";

/// `CANDLE_FA2_UPDATE=1` writes what is generated instead of comparing it.
fn update() -> bool {
    std::env::var_os("CANDLE_FA2_UPDATE").is_some()
}

#[test]
fn the_documents_show_the_records() -> Result<()> {
    let records = gpu::newest()?;
    for (document, name, machine, table) in TABLES {
        let gpu = records.iter().find(|gpu| gpu.machine == machine).context("every machine has a record")?;
        let (begin, end) = (format!("<!-- table: {name} -->\n"), "<!-- end -->");
        let path = root().join(document);
        let text = fs::read_to_string(&path)?;
        let missing = || format!("{document} has no place for the table {name}");
        let (before, rest) = text.split_once(&begin).with_context(missing)?;
        let (shown, after) = rest.split_once(end).with_context(missing)?;
        let table = table(gpu).with_context(|| format!("the table {name} of {document}"))?;
        let table = if table.is_empty() { NOTHING_YET.to_string() } else { table };
        if update() {
            fs::write(&path, [before, &begin, &table, end, after].concat())?;
        } else {
            ensure!(shown == table, "{document} is older than its record; `just tables` rewrites the table:\n{table}");
        }
    }
    Ok(())
}

/// docs/plots holds the figures of the newest records on GPUs, and nothing else.
#[test]
fn the_plots_show_the_records() -> Result<()> {
    let figures: Vec<plot::Figure> = gpu::newest()?.into_iter().flat_map(|gpu| gpu.figures).collect();
    let folder = root().join("docs/plots");
    let file = |name: &str| format!("{name}.svg");
    if update() {
        plot::save(&folder, &figures)?;
    }
    for (name, svg) in &figures {
        let shown = fs::read_to_string(folder.join(file(name))).unwrap_or_default();
        ensure!(shown == *svg, "docs/plots/{name}.svg is older than its record; `just tables` draws it anew");
    }
    for entry in fs::read_dir(&folder)? {
        let entry = entry?;
        let drawn = figures.iter().any(|(name, _)| *file(name) == *entry.file_name());
        if !drawn && update() {
            fs::remove_file(entry.path())?;
        }
        ensure!(drawn || update(), "{} is no figure of a record; `just tables` removes it", entry.path().display());
    }
    Ok(())
}

/// Files of any age and author: columns by name, medians over runs, forward + backward as their sum, failures, one type.
#[test]
fn rows_are_read_by_their_columns() -> Result<()> {
    let grid = "mha,bf16,128,0,4,4096,4096,16,16";
    let head = "peer,dir,kind,dtype,hdim,causal,batch,seqlen_q,seqlen_k,hq,hkv,ms,tflops";
    let run = |ms: u32| format!("{head}\nours,fwd,{grid},{ms},{}\nours,bwd,{grid},6,250\n", 600 / ms);
    let others = format!(
        "# a remark\n{head},peak_mib\nours,fwd,{},1,900,\nceiling,fwd,matmul8192,bf16,,0,,8192,8192,,,1,700,\n\
         standard,fwd+bwd,{},,,oom\n",
        grid.replace("bf16", "fp16"),
        grid.replace("mha", "standard"),
    );
    let texts = [run(1), run(3), run(2), others, "head_dim,error\n128,0.1\n".to_string()];
    let record = plot::record::Record::read(texts.iter().map(String::as_str))?;
    let call = plot::record::Call::of_the_grid("fwd", 128, false, 4096);
    ensure!(record.dtype == "bf16" && record.tflops("ours", &call) == Some(300.0), "the median of three runs is 300");
    let both = call.with_dir("fwd+bwd");
    ensure!(record.tflops("ours", &both) == Some((300.0 * 2.0 + 250.0 * 6.0) / 8.0), "the sum of 2 ms and 6 ms");
    let standard = record.get("standard", &both.with_kind("standard")).context("a row that failed is a row")?;
    ensure!(standard.failure == Some("out of memory") && standard.ms.is_none());
    let figures = plot::figures(&record, "here")?;
    ensure!(figures.iter().map(|(name, _)| *name).eq(["forward", "backward", "forward-backward"]));
    ensure!(figures[2].1.contains("out of memory") && figures[2].1.contains("here") && !figures[0].1.contains("cuDNN"));
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
    // What older records call it.
    let standard = if time_ms("standard", "fwd").is_some() { "standard" } else { "unfused" };
    let mut table = String::from(
        "| causal, 2048 tokens, 8 heads of 64, f32 | forward | forward + backward |\n| --- | --- | --- |\n",
    );
    for (peer, name) in [
        ("ours", "candle-fa2"),
        (standard, "Candle: matmul, softmax, matmul"),
        ("candle_flash", "`candle_nn::attention::flash_attn`"),
    ] {
        table += &format!("| {name} | {} | {} |\n", cell(peer, "fwd", fwd), cell(peer, "fwd+bwd", both));
    }
    Ok(table + &format!("\nMeasured on: {} ([the whole run]({CPU_RECORD}/attention.txt)).\n", origin(CPU_RECORD)?))
}

/// Every relative link of a document names a file or folder, from the folder that the document is in.
#[test]
fn links_lead_somewhere() -> Result<()> {
    if update() {
        return Ok(()); // documents and figures are being written meanwhile
    }
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
    for document in ["README.md", "CHANGELOG.md", "docs/cuda.md", "docs/benchmarks.md"] {
        let text = fs::read_to_string(root().join(document))?;
        let folders = ["examples/", "benches/", "tests/", "cuda/", "docs/", "src/", ".ci/"];
        let names = text.split('`').filter(|code| folders.iter().any(|folder| code.starts_with(folder)));
        for name in names.filter_map(|code| code.split(' ').next()) {
            ensure!(root().join(name).exists(), "{document} names {name}, which does not exist");
        }
    }
    Ok(())
}
