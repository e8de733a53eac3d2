//! loss.svg: the loss curves of a run.

use crate::files::cannot_write;
use crate::metrics::Row;
use anyhow::Result;
use figures::curves::{self, Curve};
use std::fs;
use std::path::Path;

pub const FILE_NAME: &str = "loss.svg";

const BLUE: (u8, u8, u8) = (62, 137, 214);
const ORANGE: (u8, u8, u8) = (232, 113, 26);

pub fn save(dir: &Path, rows: &[Row]) -> Result<()> {
    let train: Vec<_> = rows.iter().map(|row| (row.step as f64, f64::from(row.train_loss))).collect();
    let held_out: Vec<_> = rows.iter().filter_map(|row| Some((row.step as f64, f64::from(row.val_loss?)))).collect();
    let mut drawn = vec![Curve {
        label: Some("training".to_string()),
        colour: BLUE,
        width: Some(2),
        radius: None,
        points: curves::thin(&train),
    }];
    if let Some((_, loss)) = held_out.last() {
        let label = Some(format!("held-out, {loss:.3} at the end"));
        drawn.push(Curve { label, colour: ORANGE, width: Some(2), radius: Some(3), points: held_out });
    }
    let svg = curves::svg("loss, nats per token", &drawn)?;
    let path = dir.join(FILE_NAME);
    fs::write(&path, svg).map_err(|error| cannot_write(&path, error))
}
