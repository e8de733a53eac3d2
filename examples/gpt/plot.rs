//! loss.svg: the loss curves of a run.
//!
//! The plot has no background and colours of medium lightness, so it is readable on a white page and on a dark one.

use crate::files::write_atomically;
use crate::metrics::Row;
use anyhow::{anyhow, Result};
use plotters::prelude::*;
use std::path::Path;

pub const FILE_NAME: &str = "loss.svg";

const SIZE: (u32, u32) = (800, 480);
const TEXT: RGBColor = RGBColor(128, 128, 128);
const TRAIN: RGBColor = RGBColor(62, 137, 214);
const HELD_OUT: RGBColor = RGBColor(232, 113, 26);

/// Largest number of points. More would overlap at this size.
const MAX_POINTS: usize = 400;

pub fn save(dir: &Path, rows: &[Row]) -> Result<()> {
    let mut svg = String::new();
    draw(&mut svg, rows).map_err(|error| anyhow!("cannot draw {FILE_NAME}: {error}"))?;
    Ok(write_atomically(&dir.join(FILE_NAME), svg.as_bytes())?)
}

fn draw(svg: &mut String, rows: &[Row]) -> Result<(), Box<dyn std::error::Error>> {
    let train = thin(rows);
    let held_out: Vec<(f32, f32)> =
        rows.iter().filter_map(|row| row.val_loss.map(|loss| (row.step as f32, loss))).collect();
    let losses = || train.iter().chain(&held_out).map(|&(_, loss)| loss);
    let top = losses().fold(f32::MIN, f32::max);
    let bottom = losses().fold(f32::MAX, f32::min);
    let margin = (0.05 * (top - bottom)).max(0.05);
    let last = rows.last().map_or(0.0, |row| row.step as f32);

    let area = SVGBackend::with_string(svg, SIZE).into_drawing_area();
    let text = ("sans-serif", 14).into_font().color(&TEXT);
    let mut chart = ChartBuilder::on(&area)
        .caption("loss, nats per token", ("sans-serif", 16).into_font().color(&TEXT))
        .margin(16)
        .x_label_area_size(40)
        .y_label_area_size(48)
        .build_cartesian_2d(0f32..last, (bottom - margin).max(0.0)..top + margin)?;
    chart
        .configure_mesh()
        .x_desc("step")
        .axis_style(TEXT)
        .bold_line_style(TEXT.mix(0.3))
        .light_line_style(TRANSPARENT)
        .x_label_formatter(&|step| format!("{step:.0}"))
        .y_label_formatter(&|loss| format!("{loss:.1}"))
        .label_style(text.clone())
        .draw()?;

    let key = |colour: RGBColor| move |(x, y)| PathElement::new([(x, y), (x + 20, y)], colour.stroke_width(2));
    chart.draw_series(LineSeries::new(train, TRAIN.stroke_width(2)))?.label("training").legend(key(TRAIN));
    if let Some(&(_, loss)) = held_out.last() {
        chart
            .draw_series(LineSeries::new(held_out.clone(), HELD_OUT.stroke_width(2)))?
            .label(format!("held-out, {loss:.3} at the end"))
            .legend(key(HELD_OUT));
        chart.draw_series(held_out.iter().map(|&point| Circle::new(point, 3, HELD_OUT.filled())))?;
    }
    chart.configure_series_labels().position(SeriesLabelPosition::UpperRight).label_font(text).margin(12).draw()?;
    area.present()?;
    Ok(())
}

/// The training loss by step. With more than `MAX_POINTS` steps, each point is the mean over an equal number of steps.
fn thin(rows: &[Row]) -> Vec<(f32, f32)> {
    let span = rows.len().div_ceil(MAX_POINTS).max(1);
    rows.chunks(span)
        .map(|rows| {
            let mean = rows.iter().map(|row| row.train_loss).sum::<f32>() / rows.len() as f32;
            (rows[rows.len() / 2].step as f32, mean)
        })
        .collect()
}
