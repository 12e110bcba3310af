//! The training loop.

mod checkpointing;
mod checks;
mod data;
mod error;
pub(super) mod gradients;
mod identity;
mod observer;
mod run;
mod step;

pub use checkpointing::{Checkpointing, KeptRun};
pub use data::TrainData;
pub use error::TrainError;
pub use observer::{LayerLoad, Observer, StepReport};

use std::{
    hash::{Hash, Hasher},
    thread,
    time::Duration,
};

use burn::config::Config;
use burn::tensor::Device;
use checkpointing::{resume, save};
use checks::{check_losses, check_micro_batches, check_model, check_preprocessing};
use data::Pieces;
use identity::{Identity, fingerprint, identity_of};
use run::Run;
use serde::{Deserialize, Serialize};

use super::{
    CompactVocabulary, Evaluation, OptimizerConfig, OptimizerState,
    data::ImageTextSet,
    ranks::{RankError, Ranks},
    stream::{Part, Skipped},
};
use crate::{
    clip::{Clip, ClipAuxiliaryLossConfig, tokenizer::ClipTokenizer},
    support::{error::ConfigError, hash::StableHasher},
};

/// Everything that the arms of a run share.
#[derive(Config, Debug)]
pub struct TrainConfig {
    /// Optimiser steps.
    pub steps: usize,
    /// Pairs that are computed at a time, so that memory does not grow with the batch; `None`: all of it. The loss and its gradients are those of
    /// the batch at once: embeddings are computed twice, the second time with gradients (GradCache,
    /// [arXiv 2101.06983](https://arxiv.org/abs/2101.06983)). Where slots are limited, a capacity holds for each micro-batch, and with expert choice an expert
    /// chooses among the tokens of one. Default: `None`
    #[config(default = "None")]
    pub micro_batch: Option<usize>,
    /// Steps between evaluations; there is always one at the end. Default: 250
    #[config(default = 250)]
    pub eval_every: usize,
    /// Decides the order of a set in memory, its captions and image changes, and what routers draw. Default: 0
    #[config(default = 0)]
    pub seed: u64,
    /// Share of the patches of each image that training does not look at (FLIP, [arXiv 2212.00794](https://arxiv.org/abs/2212.00794)); others for
    /// each pair and step. Default: 0
    #[config(default = 0.0)]
    pub patch_dropout: f64,
    /// Whether each block is computed again in the backward pass, so that only what goes into the blocks is kept: less memory, for one more forward
    /// pass. Experts and slots are the same in all passes. Default: no
    #[config(default = false)]
    pub recompute_blocks: bool,
    /// What the passes are computed with; weights, moments and sums of gradients are 32-bit floats in any case. Default:
    /// [`TrainPrecision::F32`]
    #[config(default = "TrainPrecision::F32")]
    pub precision: TrainPrecision,
}

impl TrainConfig {
    /// Refuses numbers that no run can have.
    ///
    /// # Errors
    /// The first one, with its value.
    pub fn validate(&self) -> Result<(), ConfigError> {
        ConfigError::non_zero("steps", self.steps)?;
        ConfigError::non_zero("eval_every", self.eval_every)?;
        self.micro_batch.map_or(Ok(()), |size| ConfigError::non_zero("micro_batch", size))?;
        if !(0.0..1.0).contains(&self.patch_dropout) {
            let reason = "must be at least 0 and below 1";
            return Err(ConfigError::OutOfRange { field: "patch_dropout", value: self.patch_dropout, reason });
        }
        Ok(())
    }
}

/// Numbers of the forward and backward passes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum TrainPrecision {
    /// 32-bit floats.
    F32,
    /// bfloat16: each step computes with a copy of the weights. Routers, the logit scale and the loss stay in 32 bits.
    Bf16,
}

/// One model of a run.
#[derive(Debug, Clone)]
pub struct Arm {
    /// For progress and reports.
    pub name: String,
    /// Where it starts.
    pub model: Clip,
    /// How it is optimised.
    pub optimizer: OptimizerConfig,
    /// Weights of the auxiliary losses; without effect on a model without routed blocks.
    pub auxiliary: ClipAuxiliaryLossConfig,
    /// The optimiser's state at the start, from an arm of an earlier run on the same data; `None`: a new one.
    pub state: Option<OptimizerState>,
    /// A tower that stays as it is, its layers as at inference; with the vision tower frozen, this is LiT
    /// ([arXiv 2111.07991](https://arxiv.org/abs/2111.07991)).
    pub frozen: Option<Tower>,
}

impl Arm {
    /// An arm with the default auxiliary losses and a new optimiser, nothing frozen.
    pub fn new(name: impl Into<String>, model: Clip, optimizer: OptimizerConfig) -> Self {
        Self { name: name.into(), model, optimizer, auxiliary: ClipAuxiliaryLossConfig::new(), state: None, frozen: None }
    }
}

/// One half of a CLIP.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Tower {
    /// The one for images.
    Vision,
    /// The one for texts.
    Text,
}

/// One model at the end of a run.
#[derive(Debug, Clone)]
pub struct TrainedArm {
    /// As given.
    pub name: String,
    /// Where it ended.
    pub model: Clip,
    /// The average of its weights, where [`OptimizerConfig::average`] asks for one.
    pub average: Option<Clip>,
    /// Where its optimiser ended.
    pub state: OptimizerState,
    /// Evaluations by the number of steps before them, the first one at 0.
    pub history: Vec<(usize, Evaluation)>,
    /// Mean over the last tenth of the steps of the share of choices that were dropped in training; 0 for a dense model.
    pub dropped: f64,
    /// Captions of the training batches that did not fit the context and were cut, on this rank.
    pub truncated: usize,
    /// Time spent in this arm's own steps since the start or the last resumption, evaluations aside.
    pub time: Duration,
    /// Steps that `time` covers.
    pub timed_steps: usize,
}

/// What [`train`] takes.
pub struct TrainInput<'a> {
    /// The models, which see the same batches.
    pub arms: Vec<Arm>,
    /// What they are trained on.
    pub data: TrainData<'a>,
    /// What they are evaluated on, by the first rank; `None`: they are not.
    pub test: Option<&'a ImageTextSet>,
    /// What all arms share.
    pub config: &'a TrainConfig,
    /// Where the run is kept, so that it can go on after it was stopped; `None`: nowhere.
    pub checkpointing: Option<&'a Checkpointing>,
    /// The ranks that share each batch; `&Solo`: none but this process. Several can train one arm.
    pub ranks: &'a dyn Ranks,
    /// Where the models are trained; `device.autodiff().gradient_checkpointing()` takes less memory.
    pub device: &'a Device,
    /// Hears of every step and evaluation; `&mut ()` hears nothing.
    pub observer: &'a mut dyn Observer,
}

/// Trains all arms on the same batches, step by step, and evaluates each on `test` at the start, every
/// [`eval_every`](TrainConfig::eval_every) steps and at the end.
///
/// Every number that is drawn depends on the seed and the step, but for router noise and jitter where several arms are trained, which draw from
/// the device's one generator. With `checkpointing` the run leaves a checkpoint now and then, and goes on from the last one when it is started again
/// with the same configuration. What may differ is the number of steps, so that a run that has ended goes on for longer, how often it is evaluated, and
/// what saves memory: micro-batches, and computing blocks again. On the CPU, it ends with the same bits as one that was never stopped, if nothing differs.
/// When data cannot be read any more, a run without other ranks leaves a checkpoint before it ends.
///
/// # Errors
/// When the data does not fit or ends, a loss or a parameter is not finite, another rank is gone, a checkpoint cannot be read or written, or another
/// process keeps its run in the same folder.
pub fn train(input: TrainInput) -> Result<Vec<TrainedArm>, TrainError> {
    let TrainInput { arms, data, test, config, checkpointing, ranks, device, observer } = input;
    config.validate()?;
    let (every, keep) = checkpointing.map_or((1, 1), |checkpointing| (checkpointing.every, checkpointing.keep));
    let sizes = [("arms", arms.len()), ("checkpointing.every", every), ("checkpointing.keep", keep)];
    sizes.into_iter().try_for_each(|(field, value)| ConfigError::non_zero(field, value))?;
    let part = ranks.part();
    check_micro_batches(&arms, config, ranks)?;
    data.validate()?;
    let evaluates = part.rank == 0;
    // Until the run ends.
    let _lock = checkpointing.filter(|_| evaluates).map(Checkpointing::lock).transpose()?;
    let tokenizer = ClipTokenizer::with_vocab_size(data.vocab_size());
    let vocabulary = data.vocabulary(test, &tokenizer, part);
    let mut identity = identity_of(&data, &vocabulary, &arms);
    let setting = Setting { test, config, context_length: data.context_length(), tokenizer, vocabulary, ranks, device };
    let mut runs = Vec::new();
    for arm in arms {
        arm.auxiliary.validate()?;
        arm.optimizer.validate()?;
        check_model(&arm, &data)?;
        check_preprocessing(&arm, data.preprocessing())?;
        test.map_or(Ok(()), |test| check_preprocessing(&arm, test.preprocessing()))?;
        check_losses(&arm)?;
        runs.push(Run::new(arm, &setting)?);
    }
    check_same_options(&runs, &identity, config, every, ranks)?;
    let resumed = match checkpointing {
        Some(checkpointing) if !checkpointing.overwrite => resume(checkpointing, &setting, &mut identity, &mut runs)?,
        _ => None,
    };
    let first_step = resumed.map_or(0, |kept| kept.step);
    check_ranks(&runs, ranks, first_step)?;
    // Data that cannot be used is refused before anything is computed.
    let mut pieces = Pieces::new(&data, part, config, first_step)?;
    match resumed {
        Some(kept) => observer.on_resume(kept),
        None => {
            observer.on_start();
            for (index, run) in runs.iter_mut().enumerate().filter(|_| evaluates) {
                run.evaluate(index, 0, &setting, observer)?;
            }
        }
    }
    let pools = thread_pools(runs.len(), ranks);
    // Whether this run has a checkpoint.
    let mut is_begun = resumed.is_some();
    let mut skipped = Skipped { count: runs[0].progress.skipped, first: Vec::new() };
    for step in first_step..config.steps {
        let (batch, truncated) = match pieces.next_batch(&setting.vocabulary) {
            Ok(next) => next,
            Err(error) => {
                // The steps that were done are not lost with the data. Other ranks may have their data still.
                let is_kept = step == first_step || step.is_multiple_of(every);
                if let Some(checkpointing) = checkpointing.filter(|_| !is_kept && !ranks.has_others()) {
                    save(checkpointing, &setting, &identity, &runs, step, !is_begun).map_err(|failed| failed.because(&error))?;
                    observer.on_checkpoint(step);
                }
                return Err(error.into());
            }
        };
        runs.iter_mut().for_each(|run| run.progress.truncated += truncated);
        let reports: Vec<Result<StepReport, TrainError>> = thread::scope(|scope| {
            let (batch, setting) = (&batch, &setting);
            let step = |(run, pool): (_, &rayon::ThreadPool)| pool.install(|| Run::step(run, batch, step, setting));
            let steps: Vec<_> = runs.iter_mut().zip(&pools).map(|arm| scope.spawn(move || step(arm))).collect();
            steps.into_iter().map(|step| step.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))).collect()
        });
        let done = step + 1;
        let mut pairs = data.batch_size();
        for (index, (run, report)) in runs.iter_mut().zip(reports).enumerate() {
            let report = report?;
            pairs = report.pairs;
            run.progress.skipped += data.batch_size() - pairs;
            observer.on_step(index, done, &report);
            if evaluates && (done.is_multiple_of(config.eval_every) || done == config.steps) {
                run.evaluate(index, done, &setting, observer)?;
            }
        }
        // Those of all ranks count, and this one's are named.
        if pairs < data.batch_size() {
            skipped.count += data.batch_size() - pairs;
            skipped.first = pieces.skipped().map_or(Vec::new(), |own| own.first.clone());
            observer.on_skipped(&skipped);
        }
        if let Some(checkpointing) = checkpointing
            && (done.is_multiple_of(checkpointing.every) || done == config.steps)
        {
            check_ranks(&runs, ranks, done)?;
            if evaluates {
                save(checkpointing, &setting, &identity, &runs, done, !is_begun)?;
                is_begun = true;
                observer.on_checkpoint(done);
            }
        }
    }
    // A run may end where its data did, which was not planned.
    let is_evaluated = |run: &Run| run.history.last().is_some_and(|(step, _)| *step == config.steps);
    for (index, run) in runs.iter_mut().enumerate().filter(|(_, run)| evaluates && !is_evaluated(run)) {
        run.evaluate(index, config.steps, &setting, observer)?;
    }
    runs.into_iter().map(|run| run.finish(&setting)).collect()
}

/// Refuses ranks that were started in different ways: they would train different models, or wait for each other for ever.
fn check_same_options(
    runs: &[Run],
    identity: &Identity,
    config: &TrainConfig,
    checkpoint_every: usize,
    ranks: &dyn Ranks,
) -> Result<(), TrainError> {
    if !ranks.has_others() {
        return Ok(());
    }
    let mut hasher = StableHasher::default();
    let TrainConfig { steps, micro_batch, recompute_blocks, .. } = config;
    (fingerprint(config, identity, runs), steps, micro_batch, recompute_blocks, checkpoint_every).hash(&mut hasher);
    let found = ranks.gather_counts((hasher.finish() >> 32) as usize)?;
    match found.iter().position(|other| *other != found[0]) {
        None => Ok(()),
        Some(other) => {
            let Part { rank, ranks } = ranks.part();
            let reason = format!("rank {other} was started with other options, other data or another model than rank 0");
            Err(RankError { rank, ranks, reason }.into())
        }
    }
}

/// Refuses ranks that do not hold the same weights at the same step.
fn check_ranks(runs: &[Run], ranks: &dyn Ranks, step: usize) -> Result<(), TrainError> {
    if !ranks.has_others() {
        return Ok(());
    }
    let part = ranks.part();
    for number in [step, runs.iter().map(Run::fingerprint).fold(0, |all, one| all ^ one)] {
        let found = ranks.gather_counts(number)?;
        if let Some(rank) = found.iter().position(|other| *other != found[0]) {
            let reason = format!(
                "at step {step}, rank {rank} holds other weights or another step than rank 0: all ranks need the same checkpoints"
            );
            return Err(RankError { rank: part.rank, ranks: part.ranks, reason }.into());
        }
    }
    Ok(())
}

/// One pool of threads for each arm, which together have as many threads as there are cores for this rank. Models this small leave most of a shared
/// pool idle, and arms that share one wait for each other.
fn thread_pools(arms: usize, ranks: &dyn Ranks) -> Vec<rayon::ThreadPool> {
    let of_process = if ranks.are_threads() { ranks.part().ranks } else { 1 };
    let cores = thread::available_parallelism().map_or(1, usize::from) / of_process;
    let pool = || rayon::ThreadPoolBuilder::new().num_threads((cores / arms).max(1)).build().expect("threads can be started");
    (0..arms).map(|_| pool()).collect()
}

/// What all arms and steps share.
struct Setting<'a> {
    test: Option<&'a ImageTextSet>,
    config: &'a TrainConfig,
    context_length: usize,
    tokenizer: ClipTokenizer,
    vocabulary: CompactVocabulary,
    ranks: &'a dyn Ranks,
    device: &'a Device,
}
