//! A run as lines of JSON.

use std::{
    fs::{File, OpenOptions},
    io::{self, Write},
    path::{Path, PathBuf},
};

use serde_json::{Value, json};

use super::{Evaluation, KeptRun, Observer, StepReport, stream::Skipped};
use crate::support::files::write_atomic;

/// Writes a run into a file, a JSON object in every line, and passes everything on to another observer.
///
/// - After some steps, `{"step", "arm", "contrastive", "auxiliary", "dropped", "learning_rate", "gradient_norm", "pairs", "seconds", "memory",
///   "peak_memory", "layers": [{"path", "load", "dropped"}]}`: losses of the step, pairs of all ranks, seconds of the step, bytes of memory that the process holds
///   and held at most (null where that is not known), and of each routed block the share of the choices that name each expert.
/// - After an evaluation, `{"step", "arm", "t2i_r1", …, "i2t_r10", "by_language"}`.
/// - When samples were skipped, `{"step", "skipped", "last"}`: how many so far on all ranks, and why the last one that this rank
///   names was.
///
/// When the run goes on from a checkpoint, lines of later steps are removed. An error of the file system does not end the run; it is returned
/// by [`finish`](Self::finish).
#[derive(Debug)]
pub struct JsonLog<'a, O> {
    path: PathBuf,
    file: File,
    arms: Vec<String>,
    every: usize,
    next: &'a mut O,
    skipped: usize,
    step: usize,
    error: Option<io::Error>,
}

impl<'a, O: Observer> JsonLog<'a, O> {
    /// Begins the file anew, unless the run goes on. A step is written when its number is a multiple of `every`.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn new(path: impl Into<PathBuf>, arms: Vec<String>, every: usize, next: &'a mut O) -> io::Result<Self> {
        let path = path.into();
        let file = OpenOptions::new().create(true).append(true).open(&path)?;
        Ok(Self { path, file, arms, every: every.max(1), next, skipped: 0, step: 0, error: None })
    }

    /// The first error of the file system, if there was one.
    ///
    /// # Errors
    /// That one.
    pub fn finish(self) -> io::Result<()> {
        self.error.map_or(Ok(()), Err)
    }

    fn write(&mut self, line: Value) {
        // One call, so that a line is whole or not there.
        let written = self.file.write_all(format!("{line}\n").as_bytes());
        self.remember(written);
    }

    fn remember(&mut self, result: io::Result<()>) {
        if let Err(error) = result {
            self.error.get_or_insert(error);
        }
    }

    /// Only lines up to this step stay.
    fn cut(&mut self, step: usize) {
        let cut = || {
            write_atomic(&self.path, lines_until(&self.path, step)?.as_bytes())?;
            OpenOptions::new().append(true).open(&self.path)
        };
        match cut() {
            Ok(file) => self.file = file,
            Err(error) => self.remember(Err(error)),
        }
    }
}

/// The whole lines of a log up to a step.
fn lines_until(path: &Path, step: usize) -> io::Result<String> {
    let is_kept = |line: &&str| {
        let value: Option<Value> = serde_json::from_str(line).ok();
        value.and_then(|value| value.get("step")?.as_u64()).is_some_and(|at| at <= step as u64)
    };
    Ok(std::fs::read_to_string(path)?.lines().filter(is_kept).fold(String::new(), |kept, line| kept + line + "\n"))
}

/// Bytes of memory of this process, where the system says it.
fn memory(field: &str) -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix(field))?;
    line.split_whitespace().next()?.parse::<u64>().ok().map(|kib| kib * 1024)
}

impl<O: Observer> Observer for JsonLog<'_, O> {
    fn on_start(&mut self) {
        let emptied = self.file.set_len(0);
        self.remember(emptied);
        self.next.on_start();
    }

    fn on_step(&mut self, arm: usize, step: usize, report: &StepReport) {
        self.step = step;
        if step.is_multiple_of(self.every) {
            let StepReport { contrastive, auxiliary, dropped, learning_rate, gradient_norm, pairs, layers, time } = report;
            self.write(json!({
                "step": step,
                "arm": self.arms[arm],
                "contrastive": contrastive,
                "auxiliary": auxiliary,
                "dropped": dropped,
                "learning_rate": learning_rate,
                "gradient_norm": gradient_norm,
                "pairs": pairs,
                "seconds": time.as_secs_f64(),
                "memory": memory("VmRSS:"),
                "peak_memory": memory("VmHWM:"),
                "layers": layers,
            }));
        }
        self.next.on_step(arm, step, report);
    }

    fn on_skipped(&mut self, skipped: &Skipped) {
        if skipped.count > self.skipped {
            self.skipped = skipped.count;
            let last = skipped.first.last().map(ToString::to_string);
            self.write(json!({ "step": self.step, "skipped": skipped.count, "last": last }));
        }
        self.next.on_skipped(skipped);
    }

    fn on_checkpoint(&mut self, step: usize) {
        self.next.on_checkpoint(step);
    }

    fn on_resume(&mut self, kept: KeptRun) {
        self.cut(kept.step);
        self.step = kept.step;
        self.next.on_resume(kept);
    }

    fn on_evaluation(&mut self, arm: usize, step: usize, evaluation: &Evaluation) {
        let (t2i, i2t) = (evaluation.retrieval.text_to_image, evaluation.retrieval.image_to_text);
        let by_language: serde_json::Map<String, Value> =
            evaluation.by_language.iter().map(|(language, recall)| (language.clone(), json!(recall.r1))).collect();
        self.write(json!({
            "step": step,
            "arm": self.arms[arm],
            "t2i_r1": t2i.r1, "t2i_r5": t2i.r5, "t2i_r10": t2i.r10,
            "i2t_r1": i2t.r1, "i2t_r5": i2t.r5, "i2t_r10": i2t.r10,
            "by_language": by_language,
        }));
        self.next.on_evaluation(arm, step, evaluation);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_log_that_goes_on_has_no_later_lines() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("log.jsonl");
        std::fs::write(&path, "{\"step\":1}\n{\"step\":4}\n{\"step\":9}\n{\"step\":1").unwrap();
        let mut nobody = ();
        let mut log = JsonLog::new(&path, vec!["a".into()], 2, &mut nobody).unwrap();
        log.on_resume(KeptRun { step: 4, steps: 9 });
        log.on_skipped(&Skipped { count: 2, first: Vec::new() });
        log.finish().unwrap();
        let expected = "{\"step\":1}\n{\"step\":4}\n{\"last\":null,\"skipped\":2,\"step\":4}\n";
        assert_eq!(std::fs::read_to_string(&path).unwrap(), expected);
    }
}
