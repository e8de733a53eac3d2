//! The cases and the targets of `benches/cases.toml`.

use anyhow::{ensure, Context, Result};
use serde::Deserialize;

use crate::cases::{self, Case};

/// All of `benches/cases.toml`, which explains every field.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Cases {
    #[serde(rename = "case")]
    pub cases: Vec<Case>,
    #[serde(rename = "target")]
    pub targets: Vec<Target>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Target {
    pub what: String,
    pub ratio: Option<[String; 2]>,
    pub gemm_share: Option<String>,
    pub at_least: Option<f64>,
    pub at_most: Option<f64>,
    pub stretch: Option<f64>,
}

impl Cases {
    /// The cases and targets of `text`.
    ///
    /// # Errors
    /// If it is not TOML of that form, or a case or target makes no sense.
    pub fn parse(text: &str) -> Result<Self> {
        let parsed: Self = toml::from_str(text)?;
        cases::validate(&parsed.cases)?;
        let rows: Vec<String> = parsed.cases.iter().flat_map(Case::rows).collect();
        for target in &parsed.targets {
            target.validate(&rows).with_context(|| format!("target {}", target.what))?;
        }
        Ok(parsed)
    }
}

impl Target {
    fn validate(&self, rows: &[String]) -> Result<()> {
        ensure!(self.ratio.is_some() != self.gemm_share.is_some(), "give either ratio or gemm_share");
        ensure!(self.at_least.is_some() != self.at_most.is_some(), "give either at_least or at_most");
        for name in self.names() {
            ensure!(rows.contains(name), "no case gives the row {name:?}");
        }
        Ok(())
    }

    /// The rows that the target needs.
    pub fn names(&self) -> impl Iterator<Item = &String> {
        self.ratio.iter().flatten().chain(&self.gemm_share)
    }
}
