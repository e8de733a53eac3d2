//! Compares the claims of the papers, and the aims of this crate, with the rows of this run.

use figures::record::OUT_OF_MEMORY;
use figures::{ABLATION, FULL_GPU, PAPER_BACKWARD_SHARE, PAPER_FORWARD_SHARE};

use crate::rows::CsvRow;

/// The columns that claims use, of one row.
pub struct Fact {
    peer: String,
    kind: String,
    cell: Cell,
    ms: Option<f64>,
    tflops: Option<f64>,
    peak_mib: Option<f64>,
    out_of_memory: bool,
}

/// A pass of a call, by any peer.
#[derive(Clone, PartialEq)]
struct Cell {
    pass: String,
    dtype: String,
    hdim: Option<usize>,
    causal: bool,
    batch: Option<usize>,
    seqlens: (usize, usize),
    heads: (Option<usize>, Option<usize>),
}

impl From<&CsvRow<'_>> for Fact {
    fn from(row: &CsvRow) -> Self {
        Self {
            peer: row.peer.to_string(),
            kind: row.kind.clone(),
            cell: Cell {
                pass: row.pass.to_string(),
                dtype: row.dtype.to_string(),
                hdim: row.hdim,
                causal: row.causal == 1,
                batch: row.batch,
                seqlens: (row.seqlen_q, row.seqlen_k),
                heads: (row.hq, row.hkv),
            },
            ms: row.ms.parse().ok(),
            tflops: row.tflops.parse().ok(),
            peak_mib: row.peak_mib.parse().ok(),
            out_of_memory: row.peak_mib == OUT_OF_MEMORY,
        }
    }
}

impl std::fmt::Display for Cell {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        let mask = if self.causal { "causal" } else { "full" };
        let head_dim = self.hdim.unwrap_or_default();
        write!(f, "{} {} d{head_dim} {mask} s{}", self.pass, self.dtype, self.seqlens.0)?;
        self.heads.0.map_or(Ok(()), |heads| write!(f, " h{heads}"))
    }
}

/// A line of the table.
struct Claim {
    what: String,
    got: String,
    place: String,
    /// `None` if the papers have no such number.
    holds: Option<bool>,
}

/// Prints the claims that the rows of this run can answer.
pub fn print(facts: &[Fact], data_sheet: Option<f64>) {
    let claims = [speed(facts), standard_from_2k(facts), rates(facts, data_sheet), flash1(facts), memory(facts)];
    let claims: Vec<Claim> = claims.into_iter().flatten().collect();
    if claims.is_empty() {
        return;
    }
    println!("\n{:<70} {:>9}  {:<6} where", "claims", "here", "holds");
    for Claim { what, got, place, holds } in claims {
        let holds = holds.map_or("-", |holds| if holds { "yes" } else { "no" });
        println!("{what:<70} {got:>9}  {holds:<6} {place}");
    }
}

/// The time of `peer` over ours in each cell of `kind`. Our row is of the same kind, or of the grid.
fn ratios<'a>(facts: &'a [Fact], peer: &'a str, kind: &'a str) -> impl Iterator<Item = (f64, &'a Cell)> {
    let theirs = facts.iter().filter(move |fact| fact.peer == peer && fact.kind == kind);
    theirs.filter_map(move |fact| {
        let ours = |kind: &str| {
            let same = |ours: &&Fact| ours.peer == "ours" && ours.kind == kind && ours.cell == fact.cell;
            facts.iter().find(same).and_then(|ours| ours.ms)
        };
        Some((fact.ms? / ours(kind).or_else(|| ours("mha"))?, &fact.cell))
    })
}

fn largest<'a>(values: impl Iterator<Item = (f64, &'a Cell)>) -> Option<(f64, &'a Cell)> {
    values.max_by(|a, b| a.0.total_cmp(&b.0))
}

fn times(what: &str, (ratio, cell): (f64, &Cell), at_least: f64) -> Claim {
    let what = what.to_string();
    Claim { what, got: format!("{ratio:.1}x"), place: cell.to_string(), holds: Some(ratio >= at_least) }
}

fn speed(facts: &[Fact]) -> Vec<Claim> {
    let both = ratios(facts, "standard", "standard").filter(|(_, cell)| cell.pass == "fwd+bwd");
    let claim = |best| times("paper: up to 10x standard attention, forward + backward", best, 10.0);
    largest(both).map(claim).into_iter().collect()
}

fn standard_from_2k(facts: &[Fact]) -> Vec<Claim> {
    let long = |(_, cell): &(f64, &Cell)| cell.pass == "fwd+bwd" && cell.seqlens.0 >= 2048;
    let smallest = ratios(facts, "standard", "standard").filter(long).min_by(|a, b| a.0.total_cmp(&b.0));
    let claim = |worst| times("aim: at least 10x Candle's, forward + backward, from 2k tokens on", worst, 10.0);
    smallest.map(claim).into_iter().collect()
}

/// The paper's shares are of the rate in an A100's data sheet.
fn rates(facts: &[Fact], data_sheet: Option<f64>) -> Vec<Claim> {
    let is_product = |fact: &&Fact| fact.peer == "ceiling" && fact.kind.starts_with("matmul");
    let product = facts.iter().find(is_product).and_then(|fact| fact.tflops);
    let mut claims = Vec::new();
    for (pass, name, share) in [("fwd", "forward", PAPER_FORWARD_SHARE), ("bwd", "backward", PAPER_BACKWARD_SHARE)] {
        let ours = facts.iter().filter(|fact| fact.peer == "ours" && fact.kind == "mha" && fact.cell.pass == pass);
        let Some((tflops, cell)) = largest(ours.filter_map(|fact| Some((fact.tflops?, &fact.cell)))) else { continue };
        for (whole, of_what) in [(data_sheet, "of the data sheet's rate"), (product, "of the matrix product's rate")] {
            let Some(whole) = whole else { continue };
            claims.push(Claim {
                what: format!("paper: {name} at {:.0}% of an A100's peak; {of_what}", 100.0 * share),
                got: format!("{:.0}%", 100.0 * tflops / whole),
                place: format!("{cell}: {tflops:.0} of {whole:.0} TFLOP/s"),
                holds: Some(tflops >= share * whole),
            });
        }
    }
    claims
}

fn flash1(facts: &[Fact]) -> Vec<Claim> {
    let full = |pass| {
        let of_pass = move |(_, cell): &(f64, &Cell)| {
            cell.pass == pass && cell.batch.zip(cell.heads.0).is_some_and(|(batch, heads)| batch * heads >= FULL_GPU)
        };
        largest(ratios(facts, "ablation_flash1", ABLATION).filter(of_pass))
    };
    let claims =
        [("fwd", "paper: up to 2x FlashAttention; ours in its manner, forward"), ("bwd", "the same, backward")];
    claims.into_iter().filter_map(|(pass, what)| Some(times(what, full(pass)?, 2.0))).collect()
}

fn memory(facts: &[Fact]) -> Vec<Claim> {
    /// How far the longest sequence may be from linear growth. Tiles that are not full count more at the shortest.
    const SLACK: f64 = 1.05;
    let of = |peer: &str| -> Vec<(usize, f64)> {
        let sweep = facts.iter().filter(|fact| fact.peer == peer && fact.kind == "memory");
        sweep.filter_map(|fact| Some((fact.cell.seqlens.0, fact.peak_mib?))).collect()
    };
    let mut claims = Vec::new();
    if let [(short, few), .., (long, many)] = of("ours")[..] {
        let growth = (many / few) / (long as f64 / short as f64);
        claims.push(Claim {
            what: "paper: memory is linear in the sequence, forward + backward".into(),
            got: format!("{growth:.2}x"),
            place: format!("bytes per token at {long} tokens over those at {short}"),
            holds: Some(growth <= SLACK),
        });
    }
    let (ours, theirs) = (of("ours"), of("standard"));
    let last = theirs.last().and_then(|&(seqlen, mib)| {
        let ours = ours.iter().find(|(other, _)| *other == seqlen)?.1;
        let stops = facts.iter().find(|fact| fact.peer == "standard" && fact.kind == "memory" && fact.out_of_memory);
        let stops = stops.map_or(String::new(), |fact| format!("; none left at {}", fact.cell.seqlens.0));
        Some((seqlen, mib / ours, stops))
    });
    if let Some((seqlen, ratio, stops)) = last {
        claims.push(Claim {
            what: "memory of Candle's standard attention over ours, forward + backward".into(),
            got: format!("{ratio:.0}x"),
            place: format!("{seqlen} tokens{stops}"),
            holds: None,
        });
    }
    claims
}
