//! Loss curves by step.

use anyhow::{anyhow, Result};
use plotters::prelude::*;

/// A line, points, or both.
pub struct Curve {
    /// Its text in the legend; a curve without text has no entry.
    pub label: Option<String>,
    pub colour: (u8, u8, u8),
    /// The width of the line.
    pub width: Option<u32>,
    /// The radius of the points.
    pub radius: Option<i32>,
    /// Step and loss.
    pub points: Vec<(f64, f64)>,
}

const SIZE: (u32, u32) = (1000, 420);
const TEXT: RGBColor = RGBColor(128, 128, 128);

/// More points cannot be told apart at this size.
const MAX_POINTS: usize = 400;

/// Draws the curves as SVG. Later ones cover earlier ones.
///
/// # Errors
/// If plotters cannot draw them.
pub fn svg(title: &str, curves: &[Curve]) -> Result<String> {
    let mut svg = String::new();
    draw(&mut svg, title, curves).map_err(|error| anyhow!("cannot draw {title:?}: {error}"))?;
    Ok(svg)
}

fn draw(svg: &mut String, title: &str, curves: &[Curve]) -> Result<(), Box<dyn std::error::Error>> {
    let points = || curves.iter().flat_map(|curve| &curve.points);
    let losses = || points().map(|&(_, loss)| loss);
    let (top, bottom) = (losses().fold(f64::MIN, f64::max), losses().fold(f64::MAX, f64::min));
    let margin = (0.05 * (top - bottom)).max(0.05);
    let last = points().map(|&(step, _)| step).fold(1.0, f64::max);

    let area = SVGBackend::with_string(svg, SIZE).into_drawing_area();
    let text = ("sans-serif", 15).into_font().color(&TEXT);
    let mut chart = ChartBuilder::on(&area)
        .caption(title, ("sans-serif", 21).into_font().color(&TEXT))
        .margin(12)
        .margin_right(28)
        .x_label_area_size(40)
        .y_label_area_size(52)
        .build_cartesian_2d(0f64..last, (bottom - margin).max(0.0)..top + margin)?;
    chart
        .configure_mesh()
        .x_desc("step")
        .axis_style(TEXT)
        .bold_line_style(TEXT.mix(0.2))
        .light_line_style(TRANSPARENT)
        .x_label_formatter(&|step| format!("{step:.0}"))
        .y_label_formatter(&|loss| format!("{loss:.1}"))
        .label_style(text.clone())
        .draw()?;
    for Curve { label, colour: (red, green, blue), width, radius, points } in curves {
        let colour = RGBColor(*red, *green, *blue);
        if let &Some(width) = width {
            let line = chart.draw_series(LineSeries::new(points.clone(), colour.stroke_width(width)))?;
            if let Some(label) = label {
                let key = move |(x, y)| PathElement::new([(x, y), (x + 20, y)], colour.stroke_width(width));
                line.label(label).legend(key);
            }
        }
        if let &Some(radius) = radius {
            chart.draw_series(points.iter().map(|&point| Circle::new(point, radius, colour.filled())))?;
        }
    }
    chart.configure_series_labels().position(SeriesLabelPosition::UpperRight).label_font(text).margin(12).draw()?;
    area.present()?;
    Ok(())
}

/// Fewer points, if there are too many to draw: means over equal spans of steps.
pub fn thin(points: &[(f64, f64)]) -> Vec<(f64, f64)> {
    let span = points.len().div_ceil(MAX_POINTS).max(1);
    let mean = |span: &[(f64, f64)]| span.iter().map(|(_, loss)| loss).sum::<f64>() / span.len() as f64;
    points.chunks(span).map(|span| (span[span.len() / 2].0, mean(span))).collect()
}
