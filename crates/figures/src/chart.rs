//! A figure of several panels: groups of bars, or lines.
//!
//! It has no background, and its text and lines are mid grey, so it is readable on a white page and on a dark one. Positions are
//! whole pixels and no font is measured, so the same rows give the same bytes on every machine.

use anyhow::{anyhow, Result};
use plotters::coord::Shift;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

pub struct Chart {
    pub title: String,
    /// The small line under the title.
    pub about: String,
    pub series: Vec<Series>,
    pub panels: Vec<Panel>,
    pub columns: usize,
    pub marks: Marks,
    /// The units of the vertical and of the horizontal axis.
    pub units: [&'static str; 2],
    /// A horizontal line across each panel.
    pub level: Option<f64>,
}

/// The bars or the line of one colour.
#[derive(Clone, Copy)]
pub struct Series {
    pub name: &'static str,
    pub colour: (u8, u8, u8),
}

#[derive(Clone)]
pub struct Panel {
    pub title: String,
    /// Names below the panel, at equal distances.
    pub groups: Vec<String>,
    /// The values of each series, one for each group.
    pub rows: Vec<Vec<Value>>,
}

#[derive(Clone, Copy, PartialEq)]
pub enum Value {
    Missing,
    /// The reason why there is no value.
    Failed(&'static str),
    Of(f64),
}

pub enum Marks {
    /// Bars from zero, each with its value in `digits` digits after the point.
    Bars { digits: usize },
    /// Lines on a logarithmic scale of MiB.
    Lines,
}

const WIDTH: i32 = 1000;
const MARGIN: i32 = 12;
/// The top of the legend, below title and small line; and the height of a line of the legend.
const LEGEND_TOP: i32 = 58;
const LEGEND_LINE: i32 = 20;
/// The height of a panel with its names. Lines with a value at each point need more.
const BARS_HEIGHT: i32 = 224;
const LINES_HEIGHT: i32 = 300;
/// The space between a panel's edges and its plot.
const LEFT: i32 = 52;
const TOP: i32 = 26;
const BOTTOM: i32 = 26;

const TEXT: RGBColor = RGBColor(128, 128, 128);
const TITLE_PX: i32 = 17;
const TEXT_PX: i32 = 12;
const VALUE_PX: i32 = 10;
/// The widest bar. A wider one looks like a box.
const MAX_BAR: i32 = 30;

/// An estimate of the width of `text` in a font of `px`.
fn width(text: &str, px: i32) -> i32 {
    text.chars().count() as i32 * px * 58 / 100
}

impl Value {
    fn number(self) -> Option<f64> {
        match self {
            Value::Of(value) => Some(value),
            _ => None,
        }
    }

    fn failure(self) -> Option<&'static str> {
        match self {
            Value::Failed(why) => Some(why),
            _ => None,
        }
    }
}

/// The drawing area. Coordinates are pixels of the whole figure.
struct Canvas<'a>(DrawingArea<SVGBackend<'a>, Shift>);

impl Canvas<'_> {
    fn text(&self, text: &str, at: (i32, i32), px: i32, colour: RGBColor, anchor: (HPos, VPos)) -> Result<()> {
        self.draw_text(text, at, px, colour, anchor, FontTransform::None)
    }

    fn draw_text(
        &self,
        text: &str,
        at: (i32, i32),
        px: i32,
        colour: RGBColor,
        (h, v): (HPos, VPos),
        turn: FontTransform,
    ) -> Result<()> {
        // plotters divides the size by this number, so multiply by it.
        let font = ("sans-serif", f64::from(px) * 1.24).into_font().transform(turn);
        let style = TextStyle::from(font).color(&colour).pos(Pos::new(h, v));
        self.0.draw_text(text, &style, at).map_err(|error| anyhow!("{error}"))
    }

    fn rect(&self, corners: [(i32, i32); 2], colour: RGBColor) -> Result<()> {
        self.0.draw(&Rectangle::new(corners, colour.filled())).map_err(|error| anyhow!("{error}"))
    }

    fn line(&self, points: Vec<(i32, i32)>, style: impl Into<ShapeStyle>) -> Result<()> {
        self.0.draw(&PathElement::new(points, style)).map_err(|error| anyhow!("{error}"))
    }

    fn circle(&self, at: (i32, i32), colour: RGBColor) -> Result<()> {
        self.0.draw(&Circle::new(at, 3, colour.filled())).map_err(|error| anyhow!("{error}"))
    }
}

/// From values to pixels.
struct Scale {
    bottom: f64,
    top: f64,
    log: bool,
    pixels: (i32, i32),
}

impl Scale {
    fn y(&self, value: f64) -> i32 {
        let place = |value: f64| if self.log { value.log2() } else { value };
        let share = (place(value) - place(self.bottom)) / (place(self.top) - place(self.bottom));
        let (bottom, top) = self.pixels;
        bottom + (share * f64::from(top - bottom)).round() as i32
    }

    /// About five ticks, at round values.
    fn ticks(&self) -> Vec<f64> {
        if self.log {
            let factor = 2f64.powf(((self.top / self.bottom).log2() / 6.0).ceil().max(1.0));
            return std::iter::successors(Some(self.bottom), |tick| Some(tick * factor))
                .take_while(|tick| *tick <= self.top)
                .collect();
        }
        let rough = self.top / 6.0;
        let power = 10f64.powf(rough.log10().floor());
        let step = [1.0, 2.0, 5.0, 10.0].map(|round| round * power).into_iter().find(|step| *step >= rough);
        let step = step.unwrap_or(rough);
        (0..).map(|index| f64::from(index) * step).take_while(|tick| *tick <= self.top).collect()
    }
}

impl Chart {
    /// A chart of bars in two columns. Series, panels and groups without values are left out. `None` if nothing is left.
    pub fn new(
        title: String,
        about: [&str; 2],
        series: impl IntoIterator<Item = Series>,
        mut panels: Vec<Panel>,
    ) -> Option<Self> {
        let drawn = |value: &Value| *value != Value::Missing;
        panels.retain(|panel| panel.rows.iter().flatten().any(|value| value.number().is_some()));
        let some = |index: usize| panels.iter().any(|panel| panel.rows[index].iter().any(drawn));
        let (kept, series): (Vec<usize>, Vec<Series>) =
            series.into_iter().enumerate().filter(|&(index, _)| some(index)).unzip();
        for panel in &mut panels {
            panel.rows = kept.iter().map(|&index| panel.rows[index].clone()).collect();
            let groups: Vec<usize> =
                (0..panel.groups.len()).filter(|&group| panel.rows.iter().any(|row| drawn(&row[group]))).collect();
            panel.groups = groups.iter().map(|&group| panel.groups[group].clone()).collect();
            for row in &mut panel.rows {
                *row = groups.iter().map(|&group| row[group]).collect();
            }
        }
        let about = about.into_iter().filter(|part| !part.is_empty()).collect::<Vec<_>>().join(". ");
        let (columns, marks) = (2, Marks::Bars { digits: 0 });
        (!panels.is_empty()).then_some(Self {
            title,
            about,
            series,
            panels,
            columns,
            marks,
            units: ["", ""],
            level: None,
        })
    }

    /// # Errors
    /// If plotters cannot draw the chart.
    pub fn svg(&self) -> Result<String> {
        let top = LEGEND_TOP + LEGEND_LINE * self.legend().last().map_or(0, |&(line, _)| line + 1) + 4;
        let rows = self.panels.len().div_ceil(self.columns) as i32;
        let height = top + self.panel_height() * rows;
        let mut svg = String::new();
        let canvas = Canvas(SVGBackend::with_string(&mut svg, (WIDTH as u32, height as u32)).into_drawing_area());
        self.head(&canvas)?;
        let width = (WIDTH - 2 * MARGIN) / self.columns as i32;
        for (index, panel) in self.panels.iter().enumerate() {
            let (row, column) = ((index / self.columns) as i32, (index % self.columns) as i32);
            self.panel(&canvas, panel, (MARGIN + column * width, top + row * self.panel_height()), width)?;
        }
        canvas.0.present().map_err(|error| anyhow!("{error}"))?;
        drop(canvas);
        Ok(svg)
    }

    fn panel_height(&self) -> i32 {
        match self.marks {
            Marks::Bars { .. } => BARS_HEIGHT,
            Marks::Lines => LINES_HEIGHT,
        }
    }

    /// Line and left edge of each entry of the legend.
    fn legend(&self) -> Vec<(i32, i32)> {
        let (mut line, mut left) = (0, MARGIN);
        let place = |series: &Series| {
            let wide = 18 + width(series.name, TEXT_PX) + 22;
            if left + wide > WIDTH - MARGIN && left > MARGIN {
                (line, left) = (line + 1, MARGIN);
            }
            left += wide;
            (line, left - wide)
        };
        self.series.iter().map(place).collect()
    }

    fn head(&self, canvas: &Canvas) -> Result<()> {
        let left = (HPos::Left, VPos::Center);
        canvas.text(&self.title, (MARGIN, 18), TITLE_PX, TEXT, left)?;
        canvas.text(&self.about, (MARGIN, 40), TEXT_PX, TEXT, left)?;
        for (series, (line, x)) in self.series.iter().zip(self.legend()) {
            let y = LEGEND_TOP + line * LEGEND_LINE;
            canvas.rect([(x, y), (x + 12, y + 12)], series.colour())?;
            canvas.text(series.name, (x + 18, y + 6), TEXT_PX, TEXT, left)?;
        }
        Ok(())
    }

    fn scale(&self, pixels: (i32, i32)) -> Scale {
        let values =
            || self.panels.iter().flat_map(|panel| panel.rows.iter().flatten()).filter_map(|value| value.number());
        let most = values().chain(self.level).fold(f64::MIN, f64::max);
        match self.marks {
            // Room for the number above the highest bar.
            Marks::Bars { .. } => Scale { bottom: 0.0, top: 1.16 * most, log: false, pixels },
            Marks::Lines => {
                let least = values().fold(f64::MAX, f64::min);
                let [bottom, top] = [(0.6 * least).log2().floor(), (2.5 * most).log2().ceil()].map(f64::exp2);
                Scale { bottom, top, log: true, pixels }
            }
        }
    }

    fn panel(&self, canvas: &Canvas, panel: &Panel, (left, top): (i32, i32), width: i32) -> Result<()> {
        let (plot_left, plot_right) = (left + LEFT, left + width - 8);
        let (plot_top, plot_bottom) = (top + TOP, top + self.panel_height() - BOTTOM);
        let scale = self.scale((plot_bottom, plot_top));
        canvas.text(
            &panel.title,
            ((plot_left + plot_right) / 2, top + 13),
            TEXT_PX + 1,
            TEXT,
            (HPos::Center, VPos::Center),
        )?;
        let [up, right] = self.units;
        let unit = |text, at, anchor| canvas.text(text, at, TEXT_PX - 1, TEXT, (anchor, VPos::Center));
        unit(up, (left, top + 13), HPos::Left)?;
        unit(right, (plot_left - 6, plot_bottom + 13), HPos::Right)?;
        for tick in scale.ticks() {
            let y = scale.y(tick);
            canvas.line(vec![(plot_left, y), (plot_right, y)], TEXT.mix(0.2))?;
            let name = self.tick_name(tick);
            canvas.text(&name, (plot_left - 6, y), TEXT_PX - 1, TEXT, (HPos::Right, VPos::Center))?;
        }
        canvas.line(vec![(plot_left, plot_bottom), (plot_right, plot_bottom)], TEXT)?;
        if let Some(level) = self.level {
            canvas.line(vec![(plot_left, scale.y(level)), (plot_right, scale.y(level))], TEXT)?;
        }
        let group_width = (plot_right - plot_left) / panel.groups.len() as i32;
        let centre = |group: usize| plot_left + group as i32 * group_width + group_width / 2;
        for (group, name) in panel.groups.iter().enumerate() {
            canvas.text(name, (centre(group), plot_bottom + 13), TEXT_PX - 1, TEXT, (HPos::Center, VPos::Center))?;
            if let Marks::Bars { digits } = self.marks {
                self.bars(canvas, panel, group, (centre(group), group_width), &scale, digits)?;
            }
        }
        if let Marks::Lines = self.marks {
            self.lines(canvas, panel, &centre, &scale)?;
        }
        Ok(())
    }

    fn tick_name(&self, tick: f64) -> String {
        match self.marks {
            Marks::Lines => mib(tick),
            Marks::Bars { digits } => format!("{tick:.*}", digits.min(1)),
        }
    }

    /// The bars of one group, without a gap for a series that has no value here.
    fn bars(
        &self,
        canvas: &Canvas,
        panel: &Panel,
        group: usize,
        (centre, group_width): (i32, i32),
        scale: &Scale,
        digits: usize,
    ) -> Result<()> {
        let here = self.series.iter().zip(&panel.rows).map(|(series, row)| (series.colour(), row[group]));
        let here: Vec<(RGBColor, Value)> = here.filter(|(_, value)| *value != Value::Missing).collect();
        // All bars of a figure are as wide as those of its fullest group.
        let pitch = ((group_width - 10) / self.series.len() as i32).min(MAX_BAR);
        let left = centre - pitch * here.len() as i32 / 2;
        for (index, (colour, value)) in here.into_iter().enumerate() {
            let x = left + index as i32 * pitch;
            let (label, y) = match value.number() {
                Some(value) => {
                    canvas.rect([(x, scale.y(value)), (x + pitch - 1, scale.pixels.0)], colour)?;
                    (format!("{value:.digits$}"), scale.y(value))
                }
                None => (value.failure().unwrap_or_default().to_string(), scale.pixels.0),
            };
            let middle = x + pitch / 2;
            let colour = if value.failure().is_some() { colour } else { TEXT };
            if width(&label, VALUE_PX) <= pitch {
                canvas.text(&label, (middle, y - 2), VALUE_PX, colour, (HPos::Center, VPos::Bottom))?;
            } else {
                let upright = (HPos::Left, VPos::Center);
                canvas.draw_text(&label, (middle, y - 3), VALUE_PX, colour, upright, FontTransform::Rotate270)?;
            }
        }
        Ok(())
    }

    /// Each series as a line through its values. The numbers are above the upper line and below the others.
    fn lines(&self, canvas: &Canvas, panel: &Panel, centre: &dyn Fn(usize) -> i32, scale: &Scale) -> Result<()> {
        for (series, row) in self.series.iter().zip(&panel.rows) {
            let of = |(group, value): (usize, &Value)| Some((group, value.number()?));
            let values: Vec<(usize, f64)> = row.iter().enumerate().filter_map(of).collect();
            let points = values.iter().map(|&(group, value)| (centre(group), scale.y(value))).collect();
            canvas.line(points, series.colour().stroke_width(2))?;
            for &(group, value) in &values {
                let at = (centre(group), scale.y(value));
                canvas.circle(at, series.colour())?;
                let others = panel.rows.iter().filter_map(|row| row[group].number());
                let failed = panel.rows.iter().any(|row| row[group].failure().is_some());
                let highest = others.fold(f64::MIN, f64::max) <= value && !failed;
                // Lines rise, so there is space above to the left and below to the right.
                let (x, y, anchor) = if highest {
                    (at.0 + 6, at.1 - 6, (HPos::Right, VPos::Bottom))
                } else {
                    (at.0 - 6, at.1 + 6, (HPos::Left, VPos::Top))
                };
                canvas.text(&mib(value), (x, y), VALUE_PX, series.colour(), anchor)?;
            }
            // The first call that failed.
            let failed = |(group, value): (usize, &Value)| Some((group, value.failure()?));
            if let Some((group, why)) = row.iter().enumerate().find_map(failed) {
                let (x, y) = (centre(group), scale.pixels.1 + 8);
                let cross = series.colour().stroke_width(2);
                canvas.line(vec![(x - 5, y - 5), (x + 5, y + 5)], cross)?;
                canvas.line(vec![(x - 5, y + 5), (x + 5, y - 5)], cross)?;
                let (at, anchor) = if group + 1 < row.len() {
                    ((x + 12, y), (HPos::Left, VPos::Center))
                } else {
                    ((x, y + 10), (HPos::Center, VPos::Top))
                };
                canvas.text(why, at, VALUE_PX, series.colour(), anchor)?;
            }
        }
        Ok(())
    }
}

impl Series {
    pub fn colour(&self) -> RGBColor {
        let (red, green, blue) = self.colour;
        RGBColor(red, green, blue)
    }
}

/// A size in MiB, or in GiB if it is at least one.
pub fn mib(size: f64) -> String {
    let (size, unit) = if size < 1024.0 { (size, "MiB") } else { (size / 1024.0, "GiB") };
    let digits = usize::from(size < 9.95 && size.fract() != 0.0);
    format!("{size:.digits$} {unit}")
}
