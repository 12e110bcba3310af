//! A run as a page.

use std::{collections::BTreeMap, fmt::Write};

use serde_json::Value;

/// Points of a line at most.
const POINTS: usize = 400;
/// Pixels of a chart, and what its axes take of them.
const WIDTH: f64 = 560.0;
const HEIGHT: f64 = 220.0;
const LEFT: f64 = 64.0;
const BELOW: f64 = 26.0;
const COLORS: [&str; 8] = ["#3366cc", "#dc3912", "#109618", "#ff9900", "#990099", "#0099c6", "#dd4477", "#66aa00"];

/// A line of a chart.
struct Series {
    name: String,
    points: Vec<(f64, f64)>,
}

/// A page of HTML that shows a run from the lines that [`JsonLog`](super::JsonLog) wrote: losses, recalls, learning rate, norm of the gradients, rate,
/// memory, and the load of every expert over the steps. It needs no other file. Lines that are not whole are passed over, so that the log of a run
/// that is going on can be shown.
pub fn html_report(log: &str) -> String {
    let lines: Vec<Value> = log.lines().filter_map(|line| serde_json::from_str(line).ok()).collect();
    let charts = [
        chart("Contrastive loss", &by_arm(&lines, |line| line["contrastive"].as_f64())),
        chart("Auxiliary losses", &by_arm(&lines, |line| line["auxiliary"].as_f64())),
        chart("Text to image R@1, %", &by_arm(&lines, |line| Some(100.0 * line["t2i_r1"].as_f64()?))),
        chart("Image to text R@1, %", &by_arm(&lines, |line| Some(100.0 * line["i2t_r1"].as_f64()?))),
        chart("Learning rate", &by_arm(&lines, |line| line["learning_rate"].as_f64())),
        chart("Norm of the gradients", &by_arm(&lines, |line| line["gradient_norm"].as_f64())),
        chart("Pairs per second of the step", &by_arm(&lines, |line| Some(line["pairs"].as_f64()? / line["seconds"].as_f64()?))),
        chart("Memory of the process, GB", &by_arm(&lines, |line| Some(line["memory"].as_f64()? / 1e9))),
        chart("Dropped choices, %", &by_arm(&lines, |line| Some(100.0 * line["dropped"].as_f64()?))),
    ];
    let loads = loads(&lines).into_iter().map(|(title, series)| chart(&title, &series));
    let mut page = String::from(HEAD);
    page += &summary(&lines);
    page += "<h2>Losses, recalls and rates</h2><div class=charts>";
    charts.iter().for_each(|chart| page += chart);
    page += "</div><h2>Share of choices by expert, %</h2><div class=charts>";
    loads.for_each(|chart| page += &chart);
    page + "</div></body></html>\n"
}

const HEAD: &str = "<!doctype html><html lang=en><head><meta charset=utf-8><title>Training run</title><style>\
body{font:15px/1.4 sans-serif;margin:24px auto;max-width:1180px;padding:0 12px;color:#222}\
table{border-collapse:collapse}td,th{padding:3px 12px;border-bottom:1px solid #ddd;text-align:left}\
.charts{display:flex;flex-wrap:wrap;gap:16px}figure{margin:0}figcaption{font-weight:600}\
svg text{font:11px sans-serif;fill:#444}</style></head><body><h1>Training run</h1>\n";

/// Where the run is, and the samples that it skipped.
fn summary(lines: &[Value]) -> String {
    let last = |field: &str| lines.iter().rev().find(|line| line.get(field).is_some_and(|value| !value.is_null()));
    let mut rows = String::new();
    let mut row = |name: &str, value: String| {
        let _ = write!(rows, "<tr><td>{name}</td><td>{}</td></tr>", escaped(&value));
    };
    let number = |value: &Value| value.as_f64().map_or_else(String::new, readable);
    if let Some(line) = last("contrastive") {
        row("last step in the log", number(&line["step"]));
        row("pairs in a batch", number(&line["pairs"]));
        row("contrastive loss", number(&line["contrastive"]));
    }
    if let Some(line) = last("t2i_r1") {
        let percent = |field: &str| line[field].as_f64().map_or_else(String::new, |share| format!("{:.2}", 100.0 * share));
        let recalls = |way: &str| ["r1", "r5", "r10"].map(|k| percent(&format!("{way}_{k}"))).join(" / ");
        row("evaluated after step", number(&line["step"]));
        row("text to image, R@1 / 5 / 10, %", recalls("t2i"));
        row("image to text, R@1 / 5 / 10, %", recalls("i2t"));
        if let Some(languages) = line["by_language"].as_object().filter(|languages| languages.len() > 1) {
            let shares = languages.iter().filter_map(|(name, share)| Some(format!("{name} {:.1}", 100.0 * share.as_f64()?)));
            row("text to image R@1 by language, %", shares.collect::<Vec<_>>().join(", "));
        }
    }
    if let Some(line) = last("skipped") {
        row("samples that were skipped", number(&line["skipped"]));
        row("such as", line["last"].as_str().unwrap_or_default().to_string());
    }
    format!("<table>{rows}</table>\n")
}

/// A line for each arm.
fn by_arm(lines: &[Value], value: impl Fn(&Value) -> Option<f64>) -> Vec<Series> {
    let mut arms: BTreeMap<String, Vec<(f64, f64)>> = BTreeMap::new();
    for line in lines {
        if let (Some(arm), Some(step), Some(value)) = (line["arm"].as_str(), line["step"].as_f64(), value(line)) {
            arms.entry(arm.to_string()).or_default().push((step, value));
        }
    }
    arms.into_iter().map(|(name, points)| Series { name, points }).collect()
}

/// A chart for each routed block, with a line for each expert.
fn loads(lines: &[Value]) -> Vec<(String, Vec<Series>)> {
    let mut blocks: BTreeMap<String, Vec<Series>> = BTreeMap::new();
    for line in lines {
        let (Some(arm), Some(step), Some(layers)) = (line["arm"].as_str(), line["step"].as_f64(), line["layers"].as_array()) else {
            continue;
        };
        for layer in layers {
            let (Some(path), Some(load)) = (layer["path"].as_str(), layer["load"].as_array()) else { continue };
            let series = blocks.entry(format!("{arm}: {path}")).or_default();
            for (expert, share) in load.iter().enumerate() {
                if series.len() <= expert {
                    series.push(Series { name: expert.to_string(), points: Vec::new() });
                }
                series[expert].points.push((step, 100.0 * share.as_f64().unwrap_or(0.0)));
            }
        }
    }
    blocks.into_iter().collect()
}

/// A chart; nothing where there is no line.
fn chart(title: &str, series: &[Series]) -> String {
    let all = || series.iter().flat_map(|series| &series.points).filter(|(_, y)| y.is_finite());
    let Some(bounds) = Bounds::of(all()) else { return String::new() };
    let mut svg = format!(
        "<figure><figcaption>{}</figcaption><svg role=img width={} height={} viewBox=\"0 0 {} {}\">",
        escaped(title),
        WIDTH,
        HEIGHT,
        WIDTH,
        HEIGHT
    );
    for tick in 0..=4 {
        let share = f64::from(tick) / 4.0;
        let (x, y) = (bounds.x(share * bounds.width() + bounds.left), bounds.y(share * bounds.height() + bounds.low));
        let (step, value) = (readable(bounds.left + share * bounds.width()), readable(bounds.low + share * bounds.height()));
        let _ = write!(
            svg,
            "<line x1={LEFT} x2={WIDTH} y1={y:.1} y2={y:.1} stroke=#eee /><text x={} y={:.1} text-anchor=end>{value}</text>\
             <text x={x:.1} y={} text-anchor=middle>{step}</text>",
            LEFT - 6.0,
            y + 4.0,
            HEIGHT - 8.0
        );
    }
    for (place, Series { name, points }) in series.iter().enumerate() {
        let color = COLORS[place % COLORS.len()];
        let path: Vec<String> = thinned(points).map(|(x, y)| format!("{:.1},{:.1}", bounds.x(*x), bounds.y(*y))).collect();
        let _ = write!(svg, "<polyline fill=none stroke={color} stroke-width=1.5 points=\"{}\"/>", path.join(" "));
        if series.len() > 1 {
            let (x, y) = (LEFT + 8.0 + place as f64 % 16.0 * 30.0, 12.0 + (place / 16) as f64 * 13.0);
            let _ = write!(svg, "<text x={x} y={y} style=\"fill:{color}\">{}</text>", escaped(name));
        }
    }
    svg + "</svg></figure>\n"
}

/// As many points as a chart can show, the last one among them.
fn thinned(points: &[(f64, f64)]) -> impl Iterator<Item = &(f64, f64)> {
    let each = points.len().div_ceil(POINTS).max(1);
    points.iter().rev().step_by(each).filter(|(_, y)| y.is_finite())
}

/// What a chart has room for.
struct Bounds {
    left: f64,
    right: f64,
    low: f64,
    high: f64,
}

impl Bounds {
    fn of<'a>(points: impl Iterator<Item = &'a (f64, f64)>) -> Option<Self> {
        let around = |bounds: Option<Self>, (x, y): &(f64, f64)| {
            let Self { left, right, low, high } = bounds.unwrap_or(Self { left: *x, right: *x, low: *y, high: *y });
            Some(Self { left: left.min(*x), right: right.max(*x), low: low.min(*y), high: high.max(*y) })
        };
        let Self { left, right, low, high } = points.fold(None, around)?;
        // A level line lies in the middle.
        let apart = |a: f64, b: f64| if a == b { (a - a.abs().max(1.0) * 0.5, b + b.abs().max(1.0) * 0.5) } else { (a, b) };
        let ((left, right), (low, high)) = (apart(left, right), apart(low, high));
        Some(Self { left, right, low, high })
    }

    fn width(&self) -> f64 {
        self.right - self.left
    }

    fn height(&self) -> f64 {
        self.high - self.low
    }

    fn x(&self, x: f64) -> f64 {
        LEFT + 12.0 + (x - self.left) / self.width() * (WIDTH - LEFT - 40.0)
    }

    fn y(&self, y: f64) -> f64 {
        HEIGHT - BELOW - (y - self.low) / self.height() * (HEIGHT - BELOW - 18.0)
    }
}

/// A number with three digits or so.
fn readable(number: f64) -> String {
    match number.abs() {
        0.0 => "0".into(),
        size if size >= 1e6 => format!("{:.1}M", number / 1e6),
        size if size >= 100.0 => format!("{number:.0}"),
        size if size >= 1.0 => format!("{number:.2}"),
        size if size >= 1e-3 => format!("{number:.4}"),
        _ => format!("{number:.1e}"),
    }
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_shows_every_line_of_a_log() {
        let step = |step: usize| {
            format!(
                "{{\"step\":{step},\"arm\":\"a<b\",\"contrastive\":{},\"pairs\":8,\"seconds\":0.5,\"layers\":[{{\"path\":\"text.0\",\"load\":[0.25,0.75],\"dropped\":0}}]}}\n",
                3.0 / step as f64
            )
        };
        let mut log: String = (1..1000).map(step).collect();
        log += "{\"step\":999,\"arm\":\"a<b\",\"t2i_r1\":0.125,\"by_language\":{\"de\":0.1,\"en\":0.2}}\n{\"step\":999,\"skipped\":3,\"last\":\"x&y\"}\n{\"st";
        let page = html_report(&log);
        for expected in ["Contrastive loss", "a&lt;b: text.0", "x&amp;y", "<td>12.50 /", "de 10.0, en 20.0", ">999</td>"] {
            assert!(page.contains(expected), "{expected} is missing");
        }
        assert!(!page.contains("Learning rate</figcaption>"), "no chart without a line");
        assert!(!page.contains("NaN") && page.matches("<polyline").count() == 5, "{}", page.matches("<polyline").count());
        assert!(page.len() < 60_000);
        assert!(html_report("").contains("Training run"));
    }
}
