//! Loss curves of runs of the GPT example in one figure.

use anyhow::{anyhow, Result};
use plotters::prelude::*;
use serde::Deserialize;

/// The columns of a run's metrics.csv that are drawn.
#[derive(Deserialize)]
struct Step {
    step: usize,
    train_loss: f64,
    val_loss: Option<f64>,
}

const SIZE: (u32, u32) = (1000, 420);
const TEXT: RGBColor = RGBColor(128, 128, 128);
const COLOURS: [RGBColor; 3] = [RGBColor(150, 150, 150), RGBColor(232, 113, 26), RGBColor(62, 137, 214)];

/// More points cannot be told apart at this size.
const MAX_POINTS: usize = 400;

/// Training and held-out loss by step of each run, given as its name and the text of its metrics.csv.
///
/// # Errors
/// If a text is not a metrics.csv, or has no steps.
pub fn curves(runs: &[(&str, &str)], source: &str) -> Result<String> {
    let read = |(name, text): &(&str, &str)| -> Result<(String, Vec<Step>)> {
        let steps = csv::Reader::from_reader(text.as_bytes()).into_deserialize().collect::<Result<Vec<Step>, _>>();
        match steps {
            Ok(steps) if !steps.is_empty() => Ok((name.to_string(), steps)),
            Ok(_) => Err(anyhow!("the run {name} has no steps")),
            Err(error) => Err(anyhow!("the run {name}: {error}")),
        }
    };
    let runs = runs.iter().map(read).collect::<Result<Vec<_>>>()?;
    let mut svg = String::new();
    draw(&mut svg, &runs, source).map_err(|error| anyhow!("cannot draw the losses: {error}"))?;
    Ok(svg)
}

fn draw(svg: &mut String, runs: &[(String, Vec<Step>)], source: &str) -> Result<(), Box<dyn std::error::Error>> {
    let steps = || runs.iter().flat_map(|(_, steps)| steps);
    let losses = || steps().flat_map(|step| [Some(step.train_loss), step.val_loss]).flatten();
    let (top, bottom) = (losses().fold(f64::MIN, f64::max), losses().fold(f64::MAX, f64::min));
    let margin = (0.05 * (top - bottom)).max(0.05);
    let last = steps().map(|step| step.step).max().unwrap_or(1) as f64;

    let area = SVGBackend::with_string(svg, SIZE).into_drawing_area();
    let text = ("sans-serif", 15).into_font().color(&TEXT);
    let caption = ("sans-serif", 21).into_font().color(&TEXT);
    let title = format!("Loss by step, nats per token. {source}");
    let mut chart = ChartBuilder::on(&area)
        .caption(title.trim_end_matches(". "), caption)
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
    for (index, ((name, steps), colour)) in runs.iter().zip(COLOURS).enumerate() {
        // The first line is wide, so that both show where the next one covers it.
        let wide = if index == 0 { 5 } else { 2 };
        let held_out: Vec<(f64, f64)> =
            steps.iter().filter_map(|step| Some((step.step as f64, step.val_loss?))).collect();
        let end = held_out.last().map_or(String::new(), |(_, loss)| format!(", held-out {loss:.3} at the end"));
        chart
            .draw_series(LineSeries::new(thin(steps), colour.stroke_width(wide)))?
            .label(format!("{name}{end}"))
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 20, y)], colour.stroke_width(wide)));
        chart.draw_series(held_out.iter().map(|&point| Circle::new(point, 3 + wide as i32 / 2, colour.filled())))?;
    }
    chart.configure_series_labels().position(SeriesLabelPosition::UpperRight).label_font(text).margin(12).draw()?;
    area.present()?;
    Ok(())
}

/// The training loss. If there are many steps: means over equal spans of steps.
fn thin(steps: &[Step]) -> Vec<(f64, f64)> {
    let span = steps.len().div_ceil(MAX_POINTS).max(1);
    let mean = |steps: &[Step]| steps.iter().map(|step| step.train_loss).sum::<f64>() / steps.len() as f64;
    steps.chunks(span).map(|steps| (steps[steps.len() / 2].step as f64, mean(steps))).collect()
}
