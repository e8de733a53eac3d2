//! The records that the documents show: of each machine the newest that compares a pass with other implementations.

use std::collections::{BTreeMap, HashMap};
use std::fs;

use anyhow::{bail, ensure, Context, Result};

use super::{loss, read, root};
use figures::record::{median, Call, Record};
use figures::{data_sheet, Figure};

/// The other implementations of a record. The peer `before` is an older version of ours.
const OTHERS: [&str; 5] = ["flash", "cudnn", "fa3", "standard", "candle_flash"];

/// A record of each machine.
pub struct Records {
    /// Runs of the CPU path.
    pub xeon: Machine,
    /// Runs of the sm80 kernels.
    pub h100: Machine,
    /// Runs of the sm90 kernels.
    pub h200: Machine,
    /// Runs in f32, next to PyTorch's memory-efficient attention.
    pub h200_f32: Machine,
    /// Runs of the part `sizes`.
    pub h200_sizes: Machine,
    /// Training steps of a GPT, next to PyTorch's.
    pub h200_training: Machine,
    /// A training with operators by hand, and one with those of candle-fused-ops.
    pub h200_operators: Machine,
}

/// Reads the newest records.
pub fn newest() -> Result<Records> {
    let xeon = ("xeon-sapphire-rapids-2-cores", "Xeon Sapphire Rapids, 2 cores");
    let (h100, h200) = (("h100-80gb-hbm3", "H100 80GB HBM3"), ("h200", "H200"));
    // If two machines have the same figure, one of them is shown under another name.
    let of_every_gpu = ["forward", "backward", "forward-backward", "memory", "ablations", "heads", "loss"];
    Ok(Records {
        xeon: Machine::newest(xeon, ("fwd", &OTHERS), &[("cpu", "cpu")])?,
        h100: Machine::newest(h100, ("fwd", &OTHERS), &of_every_gpu.map(|name| (name, name)))?,
        h200: Machine::newest(
            h200,
            ("bwd", &OTHERS),
            &[("forward", "hopper-forward"), ("backward", "hopper-backward")],
        )?,
        h200_f32: Machine::newest(h200, ("bwd", &["efficient"]), &[])?,
        h200_sizes: Machine::newest_with(h200, "sizes", &[])?,
        h200_training: Machine::newest_with(h200, "gpt-peers", &[])?,
        h200_operators: Machine::newest_with(h200, "gpt-old-operators", &[("loss-operators", "loss-operators")])?,
    })
}

impl Records {
    /// Every figure of docs/plots.
    pub fn figures(self) -> Vec<Figure> {
        let Self { xeon, h100, h200, h200_f32, h200_sizes, h200_training, h200_operators } = self;
        let machines = [xeon, h100, h200, h200_f32, h200_sizes, h200_training, h200_operators];
        machines.into_iter().flat_map(|machine| machine.figures).collect()
    }
}

/// One record of a machine.
pub struct Machine {
    /// `benches/record/MACHINE/DATE`.
    pub folder: String,
    /// The name of the machine in a document.
    pub name: &'static str,
    /// Name, date, and the versions that the record names.
    pub origin: String,
    /// Medians over all files.
    pub record: Record,
    /// The runs by the number in their names. Implementations alternated: `ours-1.csv`, `flash-1.csv`, `ours-2.csv` and so on.
    runs: BTreeMap<u32, Record>,
    figures: Vec<Figure>,
}

impl Machine {
    /// The newest record of a machine in which one of the `others` ran `pass` with a head_dim of 128, which every comparison has.
    fn newest(
        machine: (&str, &'static str),
        (pass, others): (&str, &[&str]),
        shown: &[(&str, &'static str)],
    ) -> Result<Self> {
        for date in dates(machine.0)?.iter().rev() {
            let record = Self::read(machine, date, shown)?;
            let compared = |call: &Call| call.pass == pass && call.head_dim == 128;
            let compares = |peer: &&str| record.record.calls(peer).any(compared);
            if others.iter().any(compares) {
                return Ok(record);
            }
        }
        bail!("no record of {} compares {pass} with one of {}", machine.0, others.join(", "))
    }

    /// The newest record of a machine that has the file `name`.
    fn newest_with(machine: (&str, &'static str), name: &str, shown: &[(&str, &'static str)]) -> Result<Self> {
        let has = |date: &&String| root().join(format!("benches/record/{}/{date}/{name}.csv", machine.0)).exists();
        let dates = dates(machine.0)?;
        let date = dates.iter().rev().find(has);
        Self::read(machine, date.with_context(|| format!("no record of {} has {name}.csv", machine.0))?, shown)
    }

    /// `shown` lists the figures of this record: the name in [`figures`], and the name of the file.
    fn read((machine, name): (&str, &'static str), date: &str, shown: &[(&str, &'static str)]) -> Result<Self> {
        let folder = format!("benches/record/{machine}/{date}");
        let texts = csv_files(&folder)?;
        let measured = format!("{name}, {}", date_in_words(date));
        let origin = [Some(measured.as_str()), versions(&texts)].into_iter().flatten().collect::<Vec<_>>().join("; ");

        let mut runs = BTreeMap::<u32, Vec<&str>>::new();
        for (name, text) in &texts {
            if let Some(run) = name.rsplit_once('-').and_then(|(_, run)| run.parse().ok()) {
                runs.entry(run).or_default().push(text);
            }
        }
        let runs = runs.into_iter().map(|(run, texts)| Ok((run, Record::read(texts)?))).collect::<Result<_>>()?;
        let record = Record::read(texts.values().map(String::as_str)).with_context(|| folder.clone())?;

        let source = format!("Measured on: {measured}");
        let mut figures = figures::of_record(&record, &source)?;
        for (name, runs) in [
            ("loss", [("standard attention", "gpt-standard"), ("candle-fa2", "gpt-flash")]),
            ("loss-operators", [("operators by hand", "gpt-old-operators"), ("candle-fused-ops", "gpt-new-operators")]),
        ] {
            if let [(first, Some(of_first)), (second, Some(of_second))] = runs.map(|(run, file)| (run, texts.get(file)))
            {
                figures.push((name, loss::figure([(first, of_first), (second, of_second)], &source)?));
            }
        }
        let rename = |(name, svg): Figure| {
            let &(_, file) = shown.iter().find(|(figure, _)| *figure == name)?;
            Some((file, svg))
        };
        let figures = figures.into_iter().filter_map(rename).collect();
        Ok(Self { folder, name, origin, record, runs, figures })
    }

    /// Markdown that shows a figure. Empty if the record has no such figure. `to_docs` is the path from the document to docs.
    pub fn figure(&self, name: &str, to_docs: &str) -> String {
        let alt = match name {
            "cpu" => "GFLOP/s on a CPU by head_dim and mask, with other implementations",
            "forward" => "TFLOP/s of the forward by sequence length",
            "hopper-forward" => "TFLOP/s of the forward by sequence length on a Hopper GPU, with other implementations",
            "backward" => "TFLOP/s of the backward by sequence length",
            "hopper-backward" => {
                "TFLOP/s of the backward by sequence length on a Hopper GPU, with other implementations"
            }
            "forward-backward" => "TFLOP/s of forward and backward by sequence length, with other implementations",
            "memory" => "memory of forward and backward by sequence length",
            "ablations" => "speed over the same kernels without one idea each",
            "heads" => "TFLOP/s by number of heads, with and without parallelism over the sequence",
            "loss-operators" => "loss by step of a GPT with operators by hand and with candle-fused-ops",
            _ => "loss by step of a GPT with either attention",
        };
        let drawn = self.figures.iter().any(|(figure, _)| *figure == name);
        if drawn {
            format!("![{alt}]({to_docs}plots/{name}.svg)\n")
        } else {
            String::new()
        }
    }

    /// TFLOP/s of the data sheet.
    pub fn peak(&self) -> Result<f64> {
        let name = format!("NVIDIA {}", self.name);
        data_sheet::tflops(&name).with_context(|| format!("crates/figures has no data sheet of {name}"))
    }

    /// The speed of ours over `peer`: the median over the numbered runs. Without such runs, the ratio of the medians.
    pub fn ratio(&self, peer: &str, call: &Call) -> Option<f64> {
        let of = |record: &Record| Some(record.tflops("ours", call)? / record.tflops(peer, call)?);
        median(self.runs.values().filter_map(of).collect()).or_else(|| of(&self.record))
    }

    /// The calls of one pass that ours and `peer` have timed. For `mha` only calls of the papers' grid.
    pub fn compared(&self, peer: &str, kinds: &[&str], pass: &str) -> Vec<(Call, f64)> {
        let of_the_grid = |call: &Call| {
            let of_grid = Call::of_the_grid(&call.pass, call.head_dim, call.causal, call.seqlen);
            call.kind != "mha" || *call == of_grid
        };
        let calls = self.record.calls(peer).filter(|call| kinds.contains(&call.kind.as_str()) && call.pass == pass);
        let ratio = |call: &Call| Some((call.clone(), self.ratio(peer, call)?));
        calls.filter(|call| of_the_grid(call)).filter_map(ratio).collect()
    }

    /// The rows of a file with other columns. Empty if the record does not have the file.
    pub fn rows(&self, name: &str, columns: &[&str]) -> Result<Vec<HashMap<String, String>>> {
        let file = format!("{}/{name}.csv", self.folder);
        if !root().join(&file).exists() {
            return Ok(Vec::new());
        }
        let text = read(&file)?;
        let mut reader = csv::Reader::from_reader(text.as_bytes());
        let rows = reader.deserialize().collect::<Result<Vec<HashMap<String, String>>, _>>();
        let rows = rows.with_context(|| file.clone())?;
        for column in columns {
            ensure!(rows.iter().all(|row| row.contains_key(*column)), "{file} has no column {column}");
        }
        Ok(rows)
    }
}

/// The folders of a machine in benches/record, in the order of their dates.
fn dates(machine: &str) -> Result<Vec<String>> {
    let folders = fs::read_dir(root().join("benches/record").join(machine)).with_context(|| machine.to_string())?;
    let mut dates =
        folders.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned())).collect::<Result<Vec<String>>>()?;
    dates.sort();
    Ok(dates)
}

/// `2026-11-30, record b` for the folder `2026-11-30b`.
fn date_in_words(date: &str) -> String {
    match date.split_at("2026-11-30".len()) {
        (day, "") => day.to_string(),
        (day, letter) => format!("{day}, record {letter}"),
    }
}

/// The versions that `benches/peers.py` writes into the first line of its file, after the name of the GPU.
fn versions(texts: &BTreeMap<String, String>) -> Option<&str> {
    let comment = texts.values().filter_map(|text| text.lines().next()).find(|line| line.starts_with('#'))?;
    comment.split_once("; ").map(|(_, versions)| versions)
}

/// The CSV files of a record: their text by name, without the extension.
fn csv_files(folder: &str) -> Result<BTreeMap<String, String>> {
    let mut texts = BTreeMap::new();
    for entry in fs::read_dir(root().join(folder))? {
        let path = entry?.path();
        if path.extension().is_some_and(|extension| extension == "csv") {
            let name = path.file_stem().context("a file has a name")?.to_string_lossy().into_owned();
            texts.insert(name, fs::read_to_string(&path).with_context(|| path.display().to_string())?);
        }
    }
    Ok(texts)
}
