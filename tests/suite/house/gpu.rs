//! The newest records on GPUs.

use super::plot::record::{median, Call, Record};
use super::{loss, origin, plot, root, rows};
use anyhow::{ensure, Context, Result};
use std::collections::{BTreeMap, HashMap};
use std::fs;

/// Machines whose runs the documents show: folders of benches/record, with a folder by date for each of their runs.
pub type Machine = &'static str;

/// The kernels of every GPU, ours beside others, and everything that is measured with them.
pub const GPU: Machine = "h100-80gb-hbm3";

/// The forward on Hopper's units.
pub const HOPPER: Machine = "h200";

/// Each machine's newest record.
pub fn newest() -> Result<Vec<Gpu>> {
    [GPU, HOPPER].map(Gpu::newest).into_iter().collect()
}

pub struct Gpu {
    pub machine: Machine,
    pub folder: String,
    /// Machine and date.
    pub origin: String,
    /// Medians over all its files.
    pub record: Record,
    /// What was timed in turns: `ours-1.csv`, `flash-1.csv`, `ours-2.csv` .. by that number.
    runs: BTreeMap<u32, Record>,
    pub figures: Vec<plot::Figure>,
}

impl Gpu {
    fn newest(machine: Machine) -> Result<Self> {
        let dates = fs::read_dir(root().join("benches/record").join(machine)).with_context(|| machine.to_string())?;
        let dates = dates.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()));
        let newest = dates.collect::<Result<Vec<String>>>()?.into_iter().max();
        let newest = newest.with_context(|| format!("{machine} has no runs"))?;
        Self::read(machine, format!("benches/record/{machine}/{newest}"))
    }

    fn read(machine: Machine, folder: String) -> Result<Self> {
        let (mut texts, mut runs) = (BTreeMap::new(), BTreeMap::<u32, Vec<String>>::new());
        for entry in fs::read_dir(root().join(&folder))? {
            let path = entry?.path();
            if path.extension().is_some_and(|extension| extension == "csv") {
                let name = path.file_stem().context("a file has a name")?.to_string_lossy().into_owned();
                let text = fs::read_to_string(&path).with_context(|| path.display().to_string())?;
                if let Some(run) = name.rsplit_once('-').and_then(|(_, run)| run.parse().ok()) {
                    runs.entry(run).or_default().push(text.clone());
                }
                texts.insert(name, text);
            }
        }
        let read = |texts: &[String]| Record::read(texts.iter().map(String::as_str));
        let record = Record::read(texts.values().map(String::as_str)).with_context(|| folder.clone())?;
        let runs = runs.iter().map(|(&run, texts)| Ok((run, read(texts)?))).collect::<Result<_>>()?;
        let origin = origin(&folder)?;
        let source = format!("Measured on: {}", origin.to_uppercase());
        let mut figures = plot::figures(&record, &source)?;
        if machine == HOPPER {
            // Its backward has no kernels of its own: the other machine's figures show that.
            figures.retain(|(name, _)| *name == "forward");
            figures.iter_mut().for_each(|(name, _)| *name = "hopper-forward");
        }
        let loss = |name: &'static str, file: &str| texts.get(file).map(|text| (name, text.clone()));
        let losses = [loss("standard attention", "gpt-standard"), loss("candle-fa2", "gpt-flash")];
        if let [Some(standard), Some(flash)] = losses {
            figures.push(("loss", loss::curves(&[standard, flash], &source)?));
        }
        Ok(Self { machine, folder, origin, record, runs, figures })
    }

    /// The figure for a document, from whose folder `to_docs` leads to docs; nothing if the record has none of that name.
    pub fn figure(&self, name: &str, to_docs: &str) -> String {
        let alt = match name {
            "forward" => "TFLOP/s of the forward by sequence length",
            "hopper-forward" => {
                "TFLOP/s of the forward by sequence length on a Hopper GPU, beside other implementations"
            }
            "backward" => "TFLOP/s of the backward by sequence length",
            "forward-backward" => "TFLOP/s of forward and backward by sequence length, beside other implementations",
            "memory" => "memory of forward and backward by sequence length",
            "ablations" => "speed over the same kernels without one idea each",
            "heads" => "TFLOP/s by number of heads, with and without parallelism over the sequence",
            _ => "loss by step of a GPT with either attention",
        };
        let drawn = self.figures.iter().any(|(figure, _)| *figure == name);
        if drawn {
            format!("![{alt}]({to_docs}plots/{name}.svg)\n")
        } else {
            String::new()
        }
    }

    /// How fast ours is over `peer`: the median over the runs that timed both in turns; else the ratio of their medians.
    pub fn ratio(&self, peer: &str, call: &Call) -> Option<f64> {
        let of = |record: &Record| Some(record.tflops("ours", call)? / record.tflops(peer, call)?);
        median(self.runs.values().filter_map(of).collect()).or_else(|| of(&self.record))
    }

    /// The calls of one direction that both have timed: the papers' grid for `mha`, all for other kinds.
    pub fn compared(&self, peer: &str, kinds: &[&str], dir: &str) -> Vec<(Call, f64)> {
        let of_the_grid = |call: &Call| {
            let of_grid = Call::of_the_grid(&call.dir, call.head_dim, call.causal, call.seqlen);
            call.kind != "mha" || *call == of_grid
        };
        let calls = self.record.calls(peer).filter(|call| kinds.contains(&call.kind.as_str()) && call.dir == dir);
        let ratio = |call: &Call| Some((call.clone(), self.ratio(peer, call)?));
        calls.filter(|call| of_the_grid(call)).filter_map(ratio).collect()
    }

    /// The rows of a file of other columns, none if the record lacks it.
    pub fn rows(&self, name: &str, columns: &[&str]) -> Result<Vec<HashMap<String, String>>> {
        let file = format!("{}/{name}.csv", self.folder);
        if !root().join(&file).exists() {
            return Ok(Vec::new());
        }
        let rows = rows(&file)?;
        for column in columns {
            ensure!(rows.iter().all(|row| row.contains_key(*column)), "{file} has no column {column}");
        }
        Ok(rows)
    }
}
