//! One arm while it runs.

use std::{
    collections::BTreeSet,
    hash::Hasher,
    time::{Duration, Instant},
};

use burn::module::{Module, ModuleMapper, ModuleVisitor, Param};
use burn::optim::ModuleOptimizer;
use burn::tensor::{DType, Device, Tensor};

use super::{
    Arm, LayerLoad, Observer, Setting, StepReport, Tower, TrainError, TrainPrecision, TrainedArm,
    checkpointing::Progress,
    gradients::{global_norm, scale_to},
    identity::{adapters_of, routing_of},
    step::{self, StepError, StepGradients, StepSetting},
};
use crate::{
    clip::{Clip, ClipAuxiliaryLossConfig},
    support::{
        finite::{NonFiniteError, check_finite_module},
        hash::StableHasher,
        param::with_leaves_on,
    },
    train::{Evaluation, OptimizerConfig, OptimizerState, data::Batch, evaluate, optimizer::average},
    transformer::Encoder,
};

/// An arm and where it is. What it started from is not kept, so that it does not take the memory of another model.
pub(super) struct Run {
    pub(super) name: String,
    pub(super) config: OptimizerConfig,
    pub(super) auxiliary: ClipAuxiliaryLossConfig,
    pub(super) frozen: Option<Tower>,
    /// How the model routes, in words.
    pub(super) routing: Vec<String>,
    /// Its low-rank adapters, in words.
    pub(super) adapters: BTreeSet<String>,
    /// The model with all token ids, where it is trained on some of them.
    full: Option<Clip>,
    /// Absent while a step makes another one of it.
    model: Option<Clip>,
    /// Without autodiff.
    pub(super) average: Option<Clip>,
    pub(super) optimizer: ModuleOptimizer,
    pub(super) progress: Progress,
    pub(super) history: Vec<(usize, Evaluation)>,
    time: Duration,
    timed_steps: usize,
}

impl Run {
    pub(super) fn new(arm: Arm, setting: &Setting) -> Result<Self, TrainError> {
        let Arm { name, model, optimizer: config, auxiliary, state, frozen } = arm;
        let (routing, adapters) = (routing_of(&model), adapters_of(&model));
        let [all_ids, _] = model.text.token_embedding.weight.dims();
        let (model, full) = match setting.vocabulary.len() == all_ids {
            true => (model, None),
            false => (setting.vocabulary.compact(model.clone()), Some(model)),
        };
        let model = trainable(model.valid(), frozen, setting.device);
        let mut optimizer = config.init(setting.device);
        if let Some(state) = &state {
            let [ids, _] = model.text.token_embedding.weight.dims();
            if state.vocabulary() != ids {
                return Err(TrainError::Model {
                    arm: name,
                    what: "token ids in the optimiser's state",
                    expected: ids.to_string(),
                    found: state.vocabulary().to_string(),
                });
            }
            optimizer = state.load(optimizer);
        }
        let average = config.average.map(|_| model.valid());
        Ok(Self {
            name,
            config,
            auxiliary,
            frozen,
            routing,
            adapters,
            full,
            model: Some(model),
            average,
            optimizer,
            progress: Progress::default(),
            history: Vec::new(),
            time: Duration::ZERO,
            timed_steps: 0,
        })
    }

    pub(super) fn model(&self) -> &Clip {
        self.model.as_ref().expect("no step is going on")
    }

    pub(super) fn replace_model(&mut self, model: Clip) {
        self.model = Some(model);
    }

    pub(super) fn step(&mut self, batch: &[Batch], step: usize, setting: &Setting) -> Result<StepReport, TrainError> {
        let start = Instant::now();
        let device = setting.device.clone().autodiff();
        let auxiliary = self.auxiliary.init();
        let seed = setting.config.seed.wrapping_add((step as u64) << 32);
        let model = match setting.config.precision {
            TrainPrecision::F32 => self.model().clone(),
            TrainPrecision::Bf16 => in_bf16(self.model().clone()),
        };
        let of_step = StepSetting {
            auxiliary: &auxiliary,
            ranks: setting.ranks,
            device: &device,
            seed,
            patch_dropout: setting.config.patch_dropout,
            recompute_blocks: setting.config.recompute_blocks,
        };
        let found = step::gradients(&model, batch, of_step);
        drop(model);
        let mut found = found.map_err(|error| match error {
            StepError::NonFinite(source) => TrainError::NonFinite { arm: self.name.clone(), step: step + 1, source },
            StepError::Ranks(error) => error.into(),
        })?;
        let gradient_norm = global_norm(self.model(), &found.gradients);
        if !gradient_norm.is_finite() {
            let source = NonFiniteError { tensor: "norm of the gradients".into(), count: 1, total: 1 };
            return Err(TrainError::NonFinite { arm: self.name.clone(), step: step + 1, source });
        }
        if let Some(most) = self.config.clip_norm {
            scale_to(self.model(), &mut found.gradients, gradient_norm, most);
        }
        let StepGradients { gradients, totals, .. } = found;
        let rates = self.config.rates_at(step, setting.config.steps);
        let learning_rate = rates.base();
        // Given away, so that each weight is freed when the next one is there.
        let model = self.model.take().expect("no other step is going on");
        let model = self.optimizer.step(rates, model, gradients).clamp_logit_scale();
        let model = model.update_balancing_bias_by(totals.each_ref());
        if let (Some(kept), Some(decay)) = (self.average.take(), self.config.average_at(step)) {
            self.average = Some(average(kept, &model, decay));
        }
        self.model = Some(model);
        let layers = self.loads(&totals, &found.kept);
        // An empty sum of floats is -0.
        let dropped = layers.iter().fold(0.0, |sum, layer| sum + layer.dropped) / layers.len().max(1) as f64;
        self.progress.dropped.push(dropped);
        let time = start.elapsed();
        self.time += time;
        self.timed_steps += 1;
        let (contrastive, auxiliary, pairs) = (found.contrastive, found.auxiliary, found.pairs);
        Ok(StepReport { contrastive, auxiliary, dropped, learning_rate, gradient_norm, pairs, layers, time })
    }

    /// What each routed block did, from what was requested of its experts and what they kept.
    fn loads(&self, totals: &[crate::routing::BatchTotals; 2], kept: &[Vec<usize>; 2]) -> Vec<LayerLoad> {
        let model = self.model();
        let towers = [("vision", &model.vision.encoder), ("text", &model.text.encoder)];
        let of_tower = |((tower, encoder), (totals, kept)): (_, (&crate::routing::BatchTotals, &Vec<usize>))| {
            let encoder: &Encoder = encoder;
            let blocks = encoder.routed_blocks().zip(&totals.requested).zip(kept);
            let load = |((block, requested), kept): ((usize, &Vec<usize>), &usize)| {
                let all = requested.iter().sum::<usize>().max(1) as f64;
                let load = requested.iter().map(|count| *count as f64 / all).collect();
                let dropped = (requested.iter().sum::<usize>() - kept) as f64 / all;
                LayerLoad { path: format!("{tower}.encoder.blocks.{block}"), load, dropped }
            };
            blocks.map(load).collect::<Vec<_>>()
        };
        towers.into_iter().zip(totals.iter().zip(kept)).flat_map(of_tower).collect()
    }

    /// Evaluates the model, or the average of its weights where there is one.
    pub(super) fn evaluate(
        &mut self,
        index: usize,
        step: usize,
        setting: &Setting,
        observer: &mut dyn Observer,
    ) -> Result<(), TrainError> {
        let named = |source| TrainError::NonFinite { arm: self.name.clone(), step, source };
        check_finite_module(self.model()).map_err(named)?;
        let Setting { test, context_length, tokenizer, vocabulary, device, .. } = setting;
        let Some(test) = test else { return Ok(()) };
        let model = self.average.as_ref().unwrap_or(self.model());
        let evaluation = evaluate(model, test, tokenizer, *context_length, Some(vocabulary), device)?;
        observer.on_evaluation(index, step, &evaluation);
        let ranks = (step, evaluation.retrieval.text_ranks.clone(), evaluation.retrieval.image_ranks.clone());
        self.progress.evaluations.push(ranks);
        self.history.push((step, evaluation));
        Ok(())
    }

    /// Stands for the weights: equal for equal bits, 32 bits long.
    pub(super) fn fingerprint(&self) -> usize {
        struct Bits(StableHasher);
        impl ModuleVisitor for Bits {
            fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
                let values = param.val().detach().try_into_vec_as::<f32>().expect("a float tensor reads as f32");
                values.iter().for_each(|value| self.0.write_u32(value.to_bits()));
            }
        }
        let mut bits = Bits(StableHasher::default());
        self.model().visit(&mut bits);
        (bits.0.finish() >> 32) as usize
    }

    pub(super) fn finish(self, setting: &Setting) -> Result<TrainedArm, TrainError> {
        let last = self.progress.dropped.len().saturating_sub(setting.config.steps.div_ceil(10));
        let tail = &self.progress.dropped[last..];
        let [ids, _] = self.model().text.token_embedding.weight.dims();
        let restored = |model: Clip| match &self.full {
            None => model,
            Some(full) => setting.vocabulary.restore(model, full),
        };
        Ok(TrainedArm {
            state: OptimizerState::new(&self.optimizer, ids),
            dropped: tail.iter().sum::<f64>() / tail.len().max(1) as f64,
            truncated: self.progress.truncated,
            model: restored(self.model().valid()),
            average: self.average.map(restored),
            name: self.name,
            history: self.history,
            time: self.time,
            timed_steps: self.timed_steps,
        })
    }
}

/// The model with leaves on `device`, which may be one that checkpoints gradients.
pub(super) fn trainable(model: Clip, frozen: Option<Tower>, device: &Device) -> Clip {
    let device = device.clone().autodiff();
    let mut model = with_leaves_on(model, &device);
    match frozen {
        None => {}
        Some(Tower::Vision) => model.vision = model.vision.freeze(),
        Some(Tower::Text) => model.text = model.text.freeze(),
    }
    model
}

/// A copy to compute with, whose parameters are as trainable and have the same identities. Routers and the logit scale keep their 32 bits.
fn in_bf16(model: Clip) -> Clip {
    struct Cast {
        path: Vec<String>,
    }
    impl ModuleMapper for Cast {
        fn enter_module(&mut self, name: &str, _: &str) {
            self.path.push(name.to_string());
        }

        fn exit_module(&mut self, _: &str, _: &str) {
            self.path.pop();
        }

        fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
            if self.path.iter().any(|name| name == "router" || name == "logit_scale") {
                return param;
            }
            param.map(|weight| {
                let tracked = weight.is_require_grad();
                weight.detach().cast(DType::BF16).detach().set_require_grad(tracked)
            })
        }
    }
    model.map(&mut Cast { path: Vec::new() })
}
