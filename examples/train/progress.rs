//! What is shown while a run goes on.

use std::{
    fs,
    path::PathBuf,
    time::{Duration, Instant},
};

use burn_moe::train::{Evaluation, KeptRun, Observer, StepReport, html_report, stream::Skipped};
use indicatif::{ProgressBar, ProgressStyle};

use super::support::write_atomic;

/// How often a line is printed where no bar can be shown.
const LINES: Duration = Duration::from_secs(60);

pub(crate) struct Progress {
    bar: ProgressBar,
    batch_size: usize,
    log: PathBuf,
    report: PathBuf,
    skipped: usize,
    /// Steps of this process, and the time that they took, reading included; evaluations and checkpoints aside.
    steps: usize,
    time: Duration,
    /// Since when the next step is going on.
    since: Instant,
    printed: Instant,
}

impl Progress {
    pub(crate) fn new(steps: usize, batch_size: usize, log: PathBuf, report: PathBuf) -> Self {
        let style = ProgressStyle::with_template("{wide_bar} {pos}/{len} {elapsed} of {duration} {msg}");
        let bar = ProgressBar::new(steps as u64).with_style(style.expect("a template that indicatif reads"));
        let now = Instant::now();
        Self { bar, batch_size, log, report, skipped: 0, steps: 0, time: Duration::ZERO, since: now, printed: now }
    }

    pub(crate) fn finish(&self) {
        self.bar.finish();
    }

    fn print(&self, line: &str) {
        // A bar that is not on a terminal prints nothing by itself.
        if self.bar.is_hidden() { println!("{line}") } else { self.bar.println(line) }
    }
}

impl Observer for Progress {
    fn on_start(&mut self) {
        self.since = Instant::now();
    }

    fn on_resume(&mut self, KeptRun { step, steps }: KeptRun) {
        self.since = Instant::now();
        self.bar.set_position(step as u64);
        self.bar.reset_eta();
        self.print(&format!("going on from step {step}"));
        if self.bar.length() != Some(steps as u64) {
            let planned = self.bar.length().unwrap_or(0);
            self.print(&format!("note: {steps} steps were planned; the learning rate now follows the schedule of {planned}"));
        }
    }

    fn on_step(&mut self, _: usize, step: usize, report: &StepReport) {
        self.steps += 1;
        self.time += self.since.elapsed();
        self.since = Instant::now();
        let rate = (self.steps * self.batch_size) as f64 / self.time.as_secs_f64();
        let text = format!("loss {:.3}, {rate:.1} pairs/s", report.contrastive);
        self.bar.set_position(step as u64);
        if self.bar.is_hidden() && (self.steps == 1 || self.printed.elapsed() > LINES) {
            self.printed = Instant::now();
            let steps = self.bar.length().unwrap_or(0);
            let left = self.time.mul_f64((steps as f64 - step as f64) / self.steps as f64);
            self.print(&format!("step {step} of {steps}: {text}, {} s left", left.as_secs()));
        }
        self.bar.set_message(text);
    }

    fn on_skipped(&mut self, skipped: &Skipped) {
        if skipped.count > self.skipped {
            // Only the first ones, and then as their number doubles.
            if skipped.count <= 10 || skipped.count >= 2 * self.skipped {
                let last = skipped.first.last().map(|error| format!(", such as {error}")).unwrap_or_default();
                self.print(&format!("{} samples were skipped so far{last}", skipped.count));
                self.skipped = skipped.count;
            }
        }
    }

    fn on_checkpoint(&mut self, _: usize) {
        self.since = Instant::now();
    }

    fn on_evaluation(&mut self, _: usize, step: usize, evaluation: &Evaluation) {
        let (t2i, i2t) = (evaluation.retrieval.text_to_image, evaluation.retrieval.image_to_text);
        let [t1, t5, i1, i5] = [t2i.r1, t2i.r5, i2t.r1, i2t.r5].map(|share| 100.0 * share);
        self.print(&format!(
            "step {step:>6}: text to image R@1 {t1:5.2} % R@5 {t5:5.2} %, image to text R@1 {i1:5.2} % R@5 {i5:5.2} %"
        ));
        // The page is made again later; a run does not end for it.
        if let Ok(text) = fs::read_to_string(&self.log) {
            let _ = write_atomic(&self.report, html_report(&text).as_bytes());
        }
        self.since = Instant::now();
    }
}
