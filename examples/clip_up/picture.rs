//! The picture of a run.

use std::{error::Error, path::Path};

use burn_moe::train::{Evaluation, TrainedArm, data::ImageTextSet};
use plotters::prelude::*;

use super::{
    canvas::{Area, TITLE, block_name, cell, label, write},
    report::{gain_by_language, interval, last},
};

const DENSE: RGBColor = RGBColor(90, 90, 90);
const SPARSE: RGBColor = RGBColor(200, 60, 30);

/// Recall over the steps, the gain by language, and the load of each expert.
pub(crate) fn draw(path: &Path, test: &ImageTextSet, arms: &[TrainedArm], steps: usize) -> Result<(), Box<dyn Error>> {
    write(path, (1240, 640), |root| {
        let (left, right) = root.split_horizontally(620);
        let languages = gain_by_language(test, &arms[0], &arms[1]);
        draw_recall(&left, test, arms, steps)?;
        if languages.len() > 1 {
            let (top, bottom) = right.split_vertically(280);
            draw_load(&top, last(&arms[1]), 240)?;
            draw_languages(&bottom, &languages)
        } else {
            draw_load(&right, last(&arms[1]), 560)
        }
    })
}

fn draw_recall(area: &Area, test: &ImageTextSet, arms: &[TrainedArm], steps: usize) -> Result<(), Box<dyn Error>> {
    // Step, recall, and the ends of its interval.
    let points = |arm: &TrainedArm| -> Vec<[f64; 4]> {
        let point = |(step, e): &(usize, Evaluation)| {
            let interval = interval(test, e);
            [*step as f64, 100.0 * interval.difference, 100.0 * interval.low, 100.0 * interval.high]
        };
        arm.history.iter().map(point).collect()
    };
    let arms: Vec<(&str, RGBColor, Vec<[f64; 4]>)> =
        vec![("dense, trained further", DENSE, points(&arms[0])), ("sparse (upcycled)", SPARSE, points(&arms[1]))];
    let ends = || arms.iter().flat_map(|(_, _, points)| points);
    let low = ends().map(|point| point[2]).fold(f64::MAX, f64::min);
    let high = ends().map(|point| point[3]).fold(1.0, f64::max);
    let margin = 0.1 * (high - low).max(1.0);
    let mut chart = ChartBuilder::on(area)
        .caption("Text to image R@1 on the test set, with 95 % intervals", TITLE)
        .margin(14)
        .x_label_area_size(42)
        .y_label_area_size(50)
        .build_cartesian_2d(0.0..steps as f64, (low - margin).max(0.0)..high + margin)?;
    chart
        .configure_mesh()
        .x_desc("steps")
        .y_desc("%")
        .x_label_formatter(&|x| format!("{x:.0}"))
        .y_label_formatter(&|y| format!("{y:.*}", usize::from(high - low < 8.0)))
        .label_style(label())
        .light_line_style(WHITE)
        .draw()?;
    for (name, color, points) in &arms {
        let color = *color;
        let band: Vec<(f64, f64)> = points.iter().map(|p| (p[0], p[2])).chain(points.iter().rev().map(|p| (p[0], p[3]))).collect();
        chart.draw_series([Polygon::new(band, color.mix(0.15).filled())])?;
        chart
            .draw_series(LineSeries::new(points.iter().map(|p| (p[0], p[1])), color.stroke_width(3)))?
            .label(*name)
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 24, y)], color.stroke_width(3)));
        chart.draw_series(points.iter().map(|p| Circle::new((p[0], p[1]), 4, color.filled())))?;
    }
    let labels = &mut chart.configure_series_labels();
    labels.position(SeriesLabelPosition::LowerRight).border_style(BLACK).background_style(WHITE).label_font(label()).draw()?;
    Ok(())
}

/// One line per language: the difference, with its interval.
fn draw_languages(area: &Area, languages: &[(String, burn_moe::train::PairedBootstrap)]) -> Result<(), Box<dyn Error>> {
    let area = area.titled("Gain by language, points of R@1, with 95 % intervals", TITLE)?;
    let scale = languages.iter().flat_map(|(_, gain)| [gain.low.abs(), gain.high.abs()]).fold(0.01, f64::max);
    let lowest = languages.iter().map(|(_, gain)| gain.low).fold(0.0, f64::min);
    let (left, width) = (70.0, 440.0);
    let x = |value: f64| (left + (value - lowest) / (scale - lowest) * width) as i32;
    let height = (310 / languages.len() as i32).min(40);
    area.draw(&PathElement::new([(x(0.0), 4), (x(0.0), 8 + height * languages.len() as i32)], BLACK))?;
    for (row, (language, gain)) in languages.iter().enumerate() {
        let middle = 8 + row as i32 * height + height / 2;
        area.draw(&Text::new(language.clone(), (24, middle - 8), label()))?;
        area.draw(&PathElement::new([(x(gain.low), middle), (x(gain.high), middle)], SPARSE.stroke_width(3)))?;
        area.draw(&Circle::new((x(gain.difference), middle), 5, SPARSE.filled()))?;
        area.draw(&Text::new(format!("{:+.1}", 100.0 * gain.difference), (left as i32 + width as i32 + 20, middle - 8), label()))?;
    }
    Ok(())
}

/// One row of squares per sparse layer, one square per expert, in so many pixels.
fn draw_load(area: &Area, evaluation: &Evaluation, height: i32) -> Result<(), Box<dyn Error>> {
    let area = area.titled("Load per expert, % of a layer's rows (test set)", TITLE)?;
    let (layers, experts) = (evaluation.layers.len() as i32, evaluation.layers.first().map_or(0, |l| l.stats.load.len()));
    let (left, top) = (130, 12);
    let (width, height) = (470 / experts.max(1) as i32, (height / layers.max(1)).min(60));
    for (row, layer) in evaluation.layers.iter().enumerate() {
        let y = top + row as i32 * height;
        area.draw(&Text::new(block_name(&layer.path), (10, y + height / 2 - 8), label()))?;
        for (expert, share) in layer.stats.load.iter().enumerate() {
            cell(&area, (left + expert as i32 * width, y), (width, height), *share, experts)?;
        }
    }
    Ok(())
}
