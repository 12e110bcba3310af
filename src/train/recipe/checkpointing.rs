//! Keeping a run, so that it can go on after it was stopped.

use std::{
    fs::{self, File, TryLockError},
    io,
    path::{Path, PathBuf},
};

use burn::module::Module;
use burn::store::RecordError;
use serde::{Deserialize, Serialize};

use super::{
    Run, Setting, TrainError,
    identity::{Identity, difference, fingerprint, fingerprint_of_set},
    run::trainable,
};
use crate::{clip::Clip, train::Evaluation};

/// The form of a checkpoint. A number that is not this one is another version's.
const FORMAT: u32 = 3;
/// What a checkpoint's folder begins with, and what one that is being written does.
const NAME: &str = "step-";
const UNFINISHED: &str = ".step-";
/// What the first versions kept beside their checkpoints.
const OLDER: &str = "latest.json";

/// Where a run is kept, so that it can go on after it was stopped, or for longer than was planned.
///
/// Each checkpoint is a folder of its own, `step-00001000`, which is written under another name and renamed when it is whole. The run goes on
/// from the one with the most steps; remove it to go back to the one before.
#[derive(Debug, Clone)]
pub struct Checkpointing {
    /// A folder of this run's own. The last checkpoints stay when the run ends.
    pub folder: PathBuf,
    /// Steps between checkpoints.
    pub every: usize,
    /// How many of the last ones are kept.
    pub keep: usize,
    /// Whether the run begins anew where there is one, of whatever version. That one is removed when the new one has its first checkpoint.
    pub overwrite: bool,
}

/// How far a run has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KeptRun {
    /// Steps that are done.
    pub step: usize,
    /// Steps that were planned.
    pub steps: usize,
}

impl Checkpointing {
    /// The last checkpoint only; a run that is there goes on.
    pub fn new(folder: impl Into<PathBuf>, every: usize) -> Self {
        Self { folder: folder.into(), every, keep: 1, overwrite: false }
    }

    /// How far the run in the folder has come, if there is one.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn kept_run(&self) -> Result<Option<KeptRun>, TrainError> {
        Ok(self.latest()?.map(|(_, state)| KeptRun { step: state.step, steps: state.steps }))
    }

    /// Removes the checkpoints in the folder, of whatever version, but for one that is being written.
    fn discard(&self, unfinished: &Path) -> Result<(), TrainError> {
        for path in self.entries()?.into_iter().filter(|path| path != unfinished) {
            if step_of(&path).is_some() {
                remove(&path)?;
            } else if path.file_name().is_some_and(|name| name == OLDER) {
                fs::remove_file(&path).map_err(|error| bad(&path, error.to_string()))?;
            }
        }
        Ok(())
    }

    /// Keeps other processes out of the folder until the file is dropped.
    pub(super) fn lock(&self) -> Result<File, TrainError> {
        let open = || {
            fs::create_dir_all(&self.folder)?;
            File::options().create(true).truncate(false).write(true).open(self.folder.join(".lock"))
        };
        let file = open().map_err(|error| bad(&self.folder, error.to_string()))?;
        match file.try_lock() {
            Err(TryLockError::WouldBlock) => Err(bad(
                &self.folder,
                "another process keeps its run in this folder: wait until it has ended, or take another folder".into(),
            )),
            // Not every file system has locks.
            Ok(()) | Err(TryLockError::Error(_)) => Ok(file),
        }
    }

    /// The checkpoint with the most steps.
    fn latest(&self) -> Result<Option<(PathBuf, State)>, TrainError> {
        let Some((_, folder)) = self.checkpoints()?.pop() else {
            let old = self.folder.join(OLDER);
            return if old.is_file() {
                Err(bad(&old, "a run that another version of burn-moe kept, which cannot go on: take another folder".into()))
            } else {
                Ok(None)
            };
        };
        let path = folder.join("state.json");
        let text = fs::read_to_string(&path).map_err(|error| bad(&path, error.to_string()))?;
        let Format { format } = serde_json::from_str(&text).map_err(|error| bad(&path, error.to_string()))?;
        if format != FORMAT {
            let reason =
                format!("it has form {format}, of another version of burn-moe; this one reads form {FORMAT}: take another folder");
            return Err(bad(&path, reason));
        }
        let state = serde_json::from_str(&text).map_err(|error| bad(&path, error.to_string()))?;
        Ok(Some((folder, state)))
    }

    /// Whole checkpoints, by their steps.
    fn checkpoints(&self) -> Result<Vec<(usize, PathBuf)>, TrainError> {
        let whole = |path: PathBuf| step_of(&path).filter(|(_, is_whole)| *is_whole).map(|(step, _)| (step, path));
        let mut found: Vec<(usize, PathBuf)> = self.entries()?.into_iter().filter_map(whole).collect();
        found.sort();
        Ok(found)
    }

    fn entries(&self) -> Result<Vec<PathBuf>, TrainError> {
        match fs::read_dir(&self.folder) {
            Ok(entries) => Ok(entries.flatten().map(|entry| entry.path()).collect()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
            Err(error) => Err(bad(&self.folder, error.to_string())),
        }
    }

    /// Removes all but the last ones, and what a run left that was stopped while it wrote or removed one.
    fn clean(&self) -> Result<(), TrainError> {
        for path in self.entries()?.iter().filter(|path| step_of(path).is_some_and(|(_, is_whole)| !is_whole)) {
            remove(path)?;
        }
        let mut checkpoints = self.checkpoints()?;
        checkpoints.truncate(checkpoints.len().saturating_sub(self.keep));
        checkpoints.iter().try_for_each(|(_, path)| remove(path))
    }
}

/// The steps of a checkpoint by its name, and whether it is whole.
fn step_of(path: &Path) -> Option<(usize, bool)> {
    let name = path.file_name()?.to_str()?;
    let (number, is_whole) = match name.strip_prefix(UNFINISHED) {
        Some(number) => (number, false),
        None => (name.strip_prefix(NAME)?, true),
    };
    Some((number.parse().ok()?, is_whole))
}

/// Removes a checkpoint, which is none from one moment on.
fn remove(path: &Path) -> Result<(), TrainError> {
    let io = |error: io::Error| bad(path, error.to_string());
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    if name.starts_with(UNFINISHED) {
        return fs::remove_dir_all(path).map_err(io);
    }
    let aside = path.with_file_name(format!(".{name}"));
    fs::rename(path, &aside).and_then(|()| fs::remove_dir_all(&aside)).map_err(io)
}

fn bad(path: &Path, reason: String) -> TrainError {
    TrainError::Checkpoint { path: path.to_path_buf(), reason }
}

/// What a checkpoint keeps of an arm beside its weights.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub(super) struct Progress {
    /// Dropped share of each step so far.
    pub(super) dropped: Vec<f64>,
    /// Captions that were cut so far, on this rank.
    pub(super) truncated: usize,
    /// Samples that could not be used so far, on all ranks.
    pub(super) skipped: usize,
    /// Ranks of each evaluation so far: (step, text ranks, image ranks).
    pub(super) evaluations: Vec<(usize, Vec<usize>, Vec<usize>)>,
}

/// The part of `state.json` that every version has.
#[derive(Deserialize)]
struct Format {
    format: u32,
}

/// What `state.json` says.
#[derive(Serialize, Deserialize)]
struct State {
    format: u32,
    step: usize,
    steps: usize,
    fingerprint: String,
    /// Stands for what the run is evaluated on, where it is.
    test: Option<String>,
    progress: Vec<Progress>,
}

fn record_path(folder: &Path, arm: usize, part: &str) -> PathBuf {
    folder.join(format!("arm-{arm}-{part}.bpk"))
}

pub(super) fn save(
    checkpointing: &Checkpointing,
    setting: &Setting,
    identity: &Identity,
    runs: &[Run],
    step: usize,
    is_first: bool,
) -> Result<(), TrainError> {
    let config = setting.config;
    let folder = checkpointing.folder.join(format!("{NAME}{step:08}"));
    let unfinished = checkpointing.folder.join(format!("{UNFINISHED}{step:08}"));
    let io = |path: &Path| {
        let path = path.to_path_buf();
        move |error: io::Error| bad(&path, error.to_string())
    };
    if unfinished.exists() {
        fs::remove_dir_all(&unfinished).map_err(io(&unfinished))?;
    }
    fs::create_dir_all(&unfinished).map_err(io(&unfinished))?;
    let record = |path: PathBuf, result: Result<(), RecordError>| result.map_err(|error| bad(&path, error.to_string()));
    for (index, run) in runs.iter().enumerate() {
        let path = |part: &str| record_path(&unfinished, index, part);
        record(path("model"), run.model().valid().save_file(path("model")))?;
        record(path("optimizer"), run.optimizer.save(path("optimizer")))?;
        if let Some(average) = &run.average {
            record(path("average"), average.clone().save_file(path("average")))?;
        }
    }
    let state = State {
        format: FORMAT,
        step,
        steps: config.steps,
        fingerprint: fingerprint(config, identity, runs),
        test: setting.test.map(fingerprint_of_set).or(identity.test_before.clone()),
        progress: runs.iter().map(|run| run.progress.clone()).collect(),
    };
    let path = unfinished.join("state.json");
    fs::write(&path, serde_json::to_vec(&state).expect("progress is JSON")).map_err(io(&path))?;
    // On the disk before it has its name.
    for entry in fs::read_dir(&unfinished).map_err(io(&unfinished))?.flatten() {
        let path = entry.path();
        fs::File::options().write(true).open(&path).and_then(|file| file.sync_all()).map_err(io(&path))?;
    }
    if is_first && checkpointing.overwrite {
        checkpointing.discard(&unfinished)?;
    }
    if folder.exists() {
        fs::remove_dir_all(&folder).map_err(io(&folder))?;
    }
    fs::rename(&unfinished, &folder).map_err(io(&folder))?;
    // Not every file system can: it is then up to the system when the name is on the disk.
    let _ = fs::File::open(&checkpointing.folder).and_then(|folder| folder.sync_all());
    checkpointing.clean()
}

/// How far the run in the folder has come, if there is one; the runs are then as they were.
pub(super) fn resume(
    checkpointing: &Checkpointing,
    setting: &Setting,
    identity: &mut Identity,
    runs: &mut [Run],
) -> Result<Option<KeptRun>, TrainError> {
    let Some((folder, state)) = checkpointing.latest()? else { return Ok(None) };
    let config = setting.config;
    let other_run = |reason: String| bad(&checkpointing.folder, reason);
    if let Some(difference) = difference(&state.fingerprint, &fingerprint(config, identity, runs)) {
        return Err(other_run(format!(
            "the run in this folder has another configuration: {difference}. Go on with what it was started with, or take another folder"
        )));
    }
    // Of several ranks, one evaluates.
    if let (Some(then), Some(now)) = (&state.test, setting.test.map(fingerprint_of_set))
        && *then != now
    {
        return Err(other_run("the run in this folder was evaluated on another set: name that one, or take another folder".into()));
    }
    if state.step > config.steps {
        let (done, steps) = (state.step, config.steps);
        return Err(other_run(format!("the run in this folder has done {done} steps already, and {steps} are asked for")));
    }
    identity.test_before = state.test;
    let bad = |reason: String| bad(&folder, reason);
    for (index, (run, progress)) in runs.iter_mut().zip(state.progress).enumerate() {
        let path = |part: &str| record_path(&folder, index, part);
        let load = |model: Clip, part: &str| model.try_load_file(path(part)).map_err(|error| bad(error.to_string()));
        let loaded = load(run.model().valid(), "model")?;
        run.replace_model(trainable(loaded, run.frozen, setting.device));
        run.average = run.average.take().map(|average| load(average, "average")).transpose()?;
        run.optimizer = run.config.init(setting.device).load(path("optimizer")).map_err(|error| bad(error.to_string()))?;
        run.history = progress
            .evaluations
            .iter()
            .filter_map(|(step, text, image)| Some((*step, Evaluation::from_ranks(setting.test?, text.clone(), image.clone()))))
            .collect();
        run.progress = progress;
    }
    Ok(Some(KeptRun { step: state.step, steps: state.steps }))
}
