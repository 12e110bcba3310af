//! The training loop.

mod checkpointing;
mod checks;
mod error;
mod step;

pub use checkpointing::{Checkpointing, KeptRun};
pub use error::TrainError;

use std::{
    thread,
    time::{Duration, Instant},
};

use burn::config::Config;
use burn::module::{Module, ParamGroup};
use burn::optim::{AdamWConfig, ModuleOptimizer};
use burn::tensor::Device;
use checkpointing::{Progress, fingerprint_of, resume, save};
use checks::{check_losses, check_micro_batches, check_model, check_preprocessing};
use serde::{Deserialize, Serialize};

use super::{
    CompactVocabulary, Evaluation, OptimizerState, WarmupCosine,
    data::{Batch, BatchConfig, Batches, ImageTextSet},
    evaluate,
};
use crate::{
    clip::{Clip, ClipAuxiliaryLossConfig, tokenizer::ClipTokenizer},
    support::{error::ConfigError, finite::check_finite_module, param::with_leaves_on},
};

/// AdamW and its learning rate. Biases, norms, embeddings, the logit scale and routers are not decayed.
#[derive(Config, Debug, PartialEq)]
pub struct OptimizerConfig {
    /// The learning rate over the steps.
    pub schedule: WarmupCosine,
    /// Weight decay, times the learning rate at each step. Default: 0.1
    #[config(default = 0.1)]
    pub weight_decay: f32,
    /// Decay of the first moment. Default: 0.9
    #[config(default = 0.9)]
    pub beta_1: f32,
    /// Decay of the second moment. Default: 0.98
    #[config(default = 0.98)]
    pub beta_2: f32,
    /// Added to the root of the second moment. Default: 1e-8
    #[config(default = 1e-8)]
    pub epsilon: f32,
}

impl OptimizerConfig {
    fn init(&self) -> ModuleOptimizer {
        let adamw = AdamWConfig::new().with_beta_1(self.beta_1).with_beta_2(self.beta_2).with_epsilon(self.epsilon);
        let undecayed = [
            ".bias",
            ".gamma",
            ".beta",
            ".b_in",
            ".b_gate",
            ".b_out",
            ".router.",
            "logit_scale",
            "class_embedding",
            "position_embedding",
            "token_embedding",
        ];
        adamw.clone().with_weight_decay(self.weight_decay).init().with_group(
            ParamGroup::from_any_predicates(undecayed.to_vec()),
            adamw.with_weight_decay(0.0).build(),
            None,
        )
    }
}

/// Everything that the arms of a run share.
#[derive(Config, Debug)]
pub struct TrainConfig {
    /// Optimiser steps.
    pub steps: usize,
    /// How batches are drawn. Default: [`BatchConfig::new`]
    #[config(default = "BatchConfig::new()")]
    pub batch: BatchConfig,
    /// Pairs that are computed at a time, so that memory does not grow with the batch; `None`: all of it. The loss and its gradients are those of
    /// the batch at once: embeddings are computed twice, the second time with gradients (GradCache,
    /// [arXiv 2101.06983](https://arxiv.org/abs/2101.06983)). Where slots are limited, a capacity holds for each micro-batch, and with expert choice an expert
    /// chooses among the tokens of one. Default: `None`
    #[config(default = "None")]
    pub micro_batch: Option<usize>,
    /// Steps between evaluations; there is always one at the end. Default: 250
    #[config(default = 250)]
    pub eval_every: usize,
    /// Decides the order of the data, captions and image changes. Default: 0
    #[config(default = 0)]
    pub seed: u64,
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
    /// Where its optimiser ended.
    pub state: OptimizerState,
    /// Evaluations by the number of steps before them, the first one at 0.
    pub history: Vec<(usize, Evaluation)>,
    /// Mean over the last tenth of the steps of the share of choices that were dropped in training; 0 for a dense model.
    pub dropped: f64,
    /// Captions of the training batches that did not fit the context and were cut.
    pub truncated: usize,
    /// Time spent in this arm's own steps since the start or the last resumption, evaluations aside.
    pub time: Duration,
    /// Steps that `time` covers.
    pub timed_steps: usize,
}

/// What one step of one arm cost.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct StepLosses {
    /// The contrastive loss.
    pub contrastive: f64,
    /// The weighted auxiliary losses; 0 for a dense model.
    pub auxiliary: f64,
    /// Share of choices that were dropped.
    pub dropped: f64,
    /// The learning rate.
    pub learning_rate: f64,
}

/// What [`train`] takes.
pub struct TrainInput<'a> {
    /// The models, which see the same batches.
    pub arms: Vec<Arm>,
    /// What they are trained on.
    pub set: &'a ImageTextSet,
    /// What they are evaluated on.
    pub test: &'a ImageTextSet,
    /// What all arms share.
    pub config: &'a TrainConfig,
    /// Where the run is kept, so that it can go on after it was stopped; `None`: nowhere.
    pub checkpointing: Option<&'a Checkpointing>,
    /// Where the models are trained; `device.autodiff().gradient_checkpointing()` takes less memory.
    pub device: &'a Device,
    /// Hears of every step and evaluation; `&mut ()` hears nothing.
    pub observer: &'a mut dyn Observer,
}

/// Watches a run: progress bars, logs. Every method does nothing by default.
pub trait Observer {
    /// After each step of each arm; `step` counts from 1.
    fn on_step(&mut self, _arm: usize, _step: usize, _losses: &StepLosses) {}
    /// When a run goes on from a checkpoint. With more steps than were planned, the learning rate jumps to what the longer schedule has at
    /// this step.
    fn on_resume(&mut self, _kept: KeptRun) {}
    /// After each evaluation.
    fn on_evaluation(&mut self, _arm: usize, _step: usize, _evaluation: &Evaluation) {}
}

impl Observer for () {}

/// Trains all arms on the same batches, step by step, and evaluates each on `test` at the start, every
/// [`eval_every`](TrainConfig::eval_every) steps and at the end.
///
/// The order of the data depends on the seed alone; router noise comes from the device's own generator, which arms share and checkpoints
/// do not keep. With `checkpointing` the run leaves a checkpoint now and then, and goes on
/// from the last one when it is started again with the same configuration, of which only the number of steps may differ: a run that has ended
/// goes on for longer.
///
/// # Errors
/// When the data does not fit, a loss or a parameter is not finite, or a checkpoint cannot be read or written.
pub fn train(input: TrainInput) -> Result<Vec<TrainedArm>, TrainError> {
    let TrainInput { arms, set, test, config, checkpointing, device, observer } = input;
    let every = checkpointing.map_or(1, |checkpointing| checkpointing.every);
    let sizes = [("steps", config.steps), ("eval_every", config.eval_every), ("arms", arms.len()), ("checkpointing.every", every)];
    sizes.into_iter().try_for_each(|(field, value)| ConfigError::non_zero(field, value))?;
    check_micro_batches(&arms, config.micro_batch)?;
    let data = fingerprint_of(&[set, test], &arms);
    config.batch.validate()?;
    let tokenizer = ClipTokenizer::with_vocab_size(config.batch.vocab_size);
    let vocabulary = CompactVocabulary::of_sets(&[set, test], &tokenizer);
    let setting = Setting { test, config, tokenizer, vocabulary, device };
    let vocabulary = &setting.vocabulary;
    let mut runs = Vec::new();
    for arm in arms {
        arm.auxiliary.validate()?;
        check_model(&arm, set, config)?;
        check_preprocessing(&arm, set)?;
        check_preprocessing(&arm, test)?;
        check_losses(&arm)?;
        runs.push(Run::new(arm, &setting)?);
    }
    let resumed = match checkpointing {
        Some(checkpointing) => resume(checkpointing, &setting, data, &mut runs)?,
        None => None,
    };
    let first_step = match resumed {
        Some(kept) => {
            observer.on_resume(kept);
            kept.step
        }
        None => {
            for (index, run) in runs.iter_mut().enumerate() {
                run.evaluate(index, 0, &setting, observer)?;
            }
            0
        }
    };
    let pools = thread_pools(runs.len());
    let mut batches = Batches::new(set, config.batch, config.seed, first_step)?;
    for step in first_step..config.steps {
        let mut batch = batches.next().expect("batches have no end");
        vocabulary.compact_ids(&mut batch.texts.ids);
        runs.iter_mut().for_each(|run| run.progress.truncated += batch.texts.truncated);
        let losses: Vec<Result<StepLosses, TrainError>> = thread::scope(|scope| {
            let (batch, setting) = (&batch, &setting);
            let step = |(run, pool): (_, &rayon::ThreadPool)| pool.install(|| Run::step(run, batch, step, setting));
            let steps: Vec<_> = runs.iter_mut().zip(&pools).map(|arm| scope.spawn(move || step(arm))).collect();
            steps.into_iter().map(|step| step.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))).collect()
        });
        for (index, (run, losses)) in runs.iter_mut().zip(losses).enumerate() {
            observer.on_step(index, step + 1, &losses?);
            if (step + 1) % config.eval_every == 0 || step + 1 == config.steps {
                run.evaluate(index, step + 1, &setting, observer)?;
            }
        }
        if let Some(checkpointing) = checkpointing
            && ((step + 1) % checkpointing.every == 0 || step + 1 == config.steps)
        {
            save(checkpointing, config, data, &runs, step + 1)?;
        }
    }
    runs.into_iter().map(|run| run.finish(&setting)).collect()
}

/// One pool of threads for each arm, which together have as many threads as there are cores. Models this small leave most of a shared
/// pool idle, and arms that share one wait for each other.
fn thread_pools(arms: usize) -> Vec<rayon::ThreadPool> {
    let cores = thread::available_parallelism().map_or(1, usize::from);
    let pool = || rayon::ThreadPoolBuilder::new().num_threads((cores / arms).max(1)).build().expect("threads can be started");
    (0..arms).map(|_| pool()).collect()
}

/// The model with leaves on `device`, which may be one that checkpoints gradients.
fn trainable(model: Clip, frozen: Option<Tower>, device: &Device) -> Clip {
    let device = device.clone().autodiff();
    let mut model = with_leaves_on(model.fork(&device.clone().inner()).train(), &device);
    match frozen {
        None => {}
        Some(Tower::Vision) => model.vision = model.vision.freeze(),
        Some(Tower::Text) => model.text = model.text.freeze(),
    }
    model
}

/// What all arms and steps share.
struct Setting<'a> {
    test: &'a ImageTextSet,
    config: &'a TrainConfig,
    tokenizer: ClipTokenizer,
    vocabulary: CompactVocabulary,
    device: &'a Device,
}

/// One arm while it runs.
struct Run {
    arm: Arm,
    model: Clip,
    optimizer: ModuleOptimizer,
    progress: Progress,
    history: Vec<(usize, Evaluation)>,
    time: Duration,
    timed_steps: usize,
}

impl Run {
    fn new(arm: Arm, setting: &Setting) -> Result<Self, TrainError> {
        let model = trainable(setting.vocabulary.compact(arm.model.clone()).valid(), arm.frozen, setting.device);
        let mut optimizer = arm.optimizer.init();
        if let Some(state) = &arm.state {
            let [ids, _] = model.text.token_embedding.weight.dims();
            if state.vocabulary() != ids {
                return Err(TrainError::Model {
                    arm: arm.name,
                    what: "token ids in the optimiser's state",
                    expected: ids.to_string(),
                    found: state.vocabulary().to_string(),
                });
            }
            optimizer = state.load(optimizer);
        }
        Ok(Self { arm, model, optimizer, progress: Progress::default(), history: Vec::new(), time: Duration::ZERO, timed_steps: 0 })
    }

    fn step(&mut self, batch: &Batch, step: usize, setting: &Setting) -> Result<StepLosses, TrainError> {
        let start = Instant::now();
        let device = setting.device.clone().autodiff();
        let auxiliary = self.arm.auxiliary.init();
        let seed = setting.config.seed.wrapping_add((step as u64) << 32);
        let found = step::gradients(&self.model, batch, &auxiliary, setting.config.micro_batch, seed, &device);
        let found = found.map_err(|source| TrainError::NonFinite { arm: self.arm.name.clone(), step: step + 1, source })?;
        let learning_rate = self.arm.optimizer.schedule.at(step, setting.config.steps);
        let losses =
            StepLosses { contrastive: found.contrastive, auxiliary: found.auxiliary, dropped: found.dropped, learning_rate };
        let model = self.optimizer.step(learning_rate, self.model.clone(), found.gradients).clamp_logit_scale();
        self.model = model.update_balancing_bias_by(found.totals.each_ref());
        self.progress.dropped.push(losses.dropped);
        self.time += start.elapsed();
        self.timed_steps += 1;
        Ok(losses)
    }

    fn evaluate(&mut self, index: usize, step: usize, setting: &Setting, observer: &mut dyn Observer) -> Result<(), TrainError> {
        let named = |source| TrainError::NonFinite { arm: self.arm.name.clone(), step, source };
        check_finite_module(&self.model).map_err(named)?;
        let Setting { test, config, tokenizer, vocabulary, device } = setting;
        let evaluation = evaluate(&self.model, test, tokenizer, config.batch.context_length, Some(vocabulary), device)?;
        observer.on_evaluation(index, step, &evaluation);
        let ranks = (step, evaluation.retrieval.text_ranks.clone(), evaluation.retrieval.image_ranks.clone());
        self.progress.evaluations.push(ranks);
        self.history.push((step, evaluation));
        Ok(())
    }

    fn finish(self, setting: &Setting) -> Result<TrainedArm, TrainError> {
        let last = self.progress.dropped.len().saturating_sub(setting.config.steps.div_ceil(10));
        let tail = &self.progress.dropped[last..];
        let [ids, _] = self.model.text.token_embedding.weight.dims();
        Ok(TrainedArm {
            state: OptimizerState::new(&self.optimizer, ids),
            dropped: tail.iter().sum::<f64>() / tail.len().max(1) as f64,
            truncated: self.progress.truncated,
            model: setting.vocabulary.restore(self.model.valid(), &self.arm.model),
            name: self.arm.name,
            history: self.history,
            time: self.time,
            timed_steps: self.timed_steps,
        })
    }
}
