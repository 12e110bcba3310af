//! Keeping a run, so that it can go on after it was stopped.

use std::{
    fs,
    hash::{Hash, Hasher},
    io,
    path::{Path, PathBuf},
};

use burn::module::Module;
use serde::{Deserialize, Serialize};

use super::{Arm, Run, Setting, TrainConfig, TrainError, trainable};
use crate::{
    clip::Clip,
    routing::router::Router,
    train::{Evaluation, data::ImageTextSet},
    transformer::{Encoder, FeedForward, TransformerBlock},
};

/// Where a run is kept, so that it can go on after it was stopped, or for longer than was planned.
#[derive(Debug, Clone)]
pub struct Checkpointing {
    /// A folder of this run's own. Its last checkpoint stays when the run ends.
    pub folder: PathBuf,
    /// Steps between checkpoints.
    pub every: usize,
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
    /// How far the run in the folder has come, if there is one.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn kept_run(&self) -> Result<Option<KeptRun>, TrainError> {
        Ok(self.latest()?.map(|latest| KeptRun { step: latest.step, steps: latest.steps }))
    }

    fn latest(&self) -> Result<Option<Latest>, TrainError> {
        let path = self.folder.join("latest.json");
        if !path.is_file() {
            return Ok(None);
        }
        let bad = |reason: String| TrainError::Checkpoint { path: path.clone(), reason };
        let text = fs::read_to_string(&path).map_err(|error| bad(error.to_string()))?;
        serde_json::from_str(&text).map(Some).map_err(|error| bad(error.to_string()))
    }
}

/// What a checkpoint keeps of an arm beside its weights.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub(super) struct Progress {
    /// Dropped share of each step so far.
    pub(super) dropped: Vec<f64>,
    /// Captions that were cut so far.
    #[serde(default)]
    pub(super) truncated: usize,
    /// Ranks of each evaluation so far: (step, text ranks, image ranks).
    pub(super) evaluations: Vec<(usize, Vec<usize>, Vec<usize>)>,
}

/// What `latest.json` says: written last, so that what it names is whole.
#[derive(Serialize, Deserialize)]
struct Latest {
    step: usize,
    #[serde(default)]
    steps: usize,
    fingerprint: String,
    progress: Vec<Progress>,
}

/// Of all but the number of steps, which may grow.
fn fingerprint(config: &TrainConfig, data: u64, runs: &[Run]) -> String {
    let config = TrainConfig { steps: 0, ..config.clone() };
    let arms: Vec<_> = runs
        .iter()
        .map(|Run { arm, .. }| (&arm.name, &arm.optimizer, &arm.auxiliary, arm.frozen, routing_of(&arm.model)))
        .collect();
    serde_json::to_string(&(config, data, arms)).expect("configurations are JSON")
}

/// How a model routes, in words: settings that no parameter shows.
fn routing_of(model: &Clip) -> Vec<String> {
    let towers = [&model.vision.encoder, &model.text.encoder];
    let settings = |block: &TransformerBlock, encoder: &Encoder| match &block.feed_forward {
        FeedForward::Dense(_) => "dense".to_string(),
        FeedForward::SoftMoe(_) => format!("soft {:?}", encoder.padding),
        FeedForward::Moe(moe) => {
            let Router { score, noise, jitter, balancing_rate, .. } = &moe.router;
            format!(
                "{:?} {score:?} {noise} {jitter} {balancing_rate} {:?} {:?}",
                moe.assignment, encoder.protection, encoder.padding
            )
        }
    };
    towers.into_iter().flat_map(|encoder| encoder.blocks.iter().map(move |block| settings(block, encoder))).collect()
}

fn record_paths(folder: &Path, step: usize, arm: usize) -> [PathBuf; 2] {
    ["model", "optimizer"].map(|part| folder.join(format!("step-{step}-arm-{arm}-{part}.bpk")))
}

pub(super) fn save(
    checkpointing: &Checkpointing,
    config: &TrainConfig,
    data: u64,
    runs: &[Run],
    step: usize,
) -> Result<(), TrainError> {
    let folder = &checkpointing.folder;
    let io = |path: &Path| {
        let path = path.to_path_buf();
        move |error: io::Error| TrainError::Checkpoint { path, reason: error.to_string() }
    };
    let record = |path: &Path, result: Result<(), burn::store::RecordError>| {
        result.map_err(|error| TrainError::Checkpoint { path: path.to_path_buf(), reason: error.to_string() })
    };
    fs::create_dir_all(folder).map_err(io(folder))?;
    let mut current = Vec::new();
    for (index, run) in runs.iter().enumerate() {
        let [model, optimizer] = record_paths(folder, step, index);
        record(&model, run.model.valid().save_file(&model))?;
        record(&optimizer, run.optimizer.save(&optimizer))?;
        current.extend([model, optimizer]);
    }
    let latest = Latest {
        step,
        steps: config.steps,
        fingerprint: fingerprint(config, data, runs),
        progress: runs.iter().map(|run| run.progress.clone()).collect(),
    };
    let path = folder.join("latest.json");
    crate::support::files::write_atomic(&path, &serde_json::to_vec(&latest).expect("progress is JSON")).map_err(io(&path))?;
    // Older records: nothing names them any more.
    for entry in fs::read_dir(folder).map_err(io(folder))?.flatten() {
        let path = entry.path();
        if path.extension().is_some_and(|e| e == "bpk") && !current.contains(&path) {
            fs::remove_file(&path).map_err(io(&path))?;
        }
    }
    Ok(())
}

/// How far the run in the folder has come, if there is one; the runs are then as they were.
pub(super) fn resume(
    checkpointing: &Checkpointing,
    setting: &Setting,
    data: u64,
    runs: &mut [Run],
) -> Result<Option<KeptRun>, TrainError> {
    let Some(latest) = checkpointing.latest()? else { return Ok(None) };
    let config = setting.config;
    let path = checkpointing.folder.join("latest.json");
    let bad = |reason: String| TrainError::Checkpoint { path: path.clone(), reason };
    if latest.fingerprint != fingerprint(config, data, runs) {
        return Err(bad(
            "the run in this folder has another configuration, other data or another start; take another folder or remove this one"
                .into(),
        ));
    }
    if latest.step > config.steps {
        let (done, steps) = (latest.step, config.steps);
        return Err(bad(format!("the run in this folder has done {done} steps already, and {steps} are asked for")));
    }
    for (index, (run, progress)) in runs.iter_mut().zip(latest.progress).enumerate() {
        let [model, optimizer] = record_paths(&checkpointing.folder, latest.step, index);
        let loaded = run.model.valid().try_load_file(&model).map_err(|error| bad(error.to_string()))?;
        run.model = trainable(loaded, run.arm.frozen, setting.device);
        run.optimizer = run.arm.optimizer.init().load(&optimizer).map_err(|error| bad(error.to_string()))?;
        run.history = progress
            .evaluations
            .iter()
            .map(|(step, text, image)| (*step, Evaluation::from_ranks(setting.test, text.clone(), image.clone())))
            .collect();
        run.progress = progress;
    }
    Ok(Some(KeptRun { step: latest.step, steps: latest.steps }))
}

/// Stands for the data and for where the arms start, so that a run is not resumed as another one.
pub(super) fn fingerprint_of(sets: &[&ImageTextSet], arms: &[Arm]) -> u64 {
    let mut hasher = std::hash::DefaultHasher::new();
    sets.iter().for_each(|set| set.hash(&mut hasher));
    for arm in arms {
        // One weight of each tower tells two models apart.
        for weight in [arm.model.vision.patch_embedding.weight.val(), arm.model.text.projection.weight.val()] {
            let values = weight.detach().try_into_vec_as::<f32>().expect("a float tensor reads as f32");
            values.iter().for_each(|value| value.to_bits().hash(&mut hasher));
        }
        arm.state.hash(&mut hasher);
    }
    hasher.finish()
}
