//! What a run says while it goes on.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::KeptRun;
use crate::train::{Evaluation, stream::Skipped};

/// Watches a run: progress bars, logs. Every method does nothing by default.
pub trait Observer {
    /// When a run begins that does not go on from a checkpoint.
    fn on_start(&mut self) {}
    /// After each step of each arm; `step` counts from 1.
    fn on_step(&mut self, _arm: usize, _step: usize, _report: &StepReport) {}
    /// After a step whose batch had samples that could not be used: how many there were so far on all ranks, and the first ones of this rank.
    fn on_skipped(&mut self, _skipped: &Skipped) {}
    /// After a checkpoint was written.
    fn on_checkpoint(&mut self, _step: usize) {}
    /// When a run goes on from a checkpoint. With more steps than were planned, the learning rate jumps to what the longer schedule has at
    /// this step.
    fn on_resume(&mut self, _kept: KeptRun) {}
    /// After each evaluation.
    fn on_evaluation(&mut self, _arm: usize, _step: usize, _evaluation: &Evaluation) {}
}

impl Observer for () {}

impl<O: Observer + ?Sized> Observer for &mut O {
    fn on_start(&mut self) {
        (**self).on_start();
    }

    fn on_step(&mut self, arm: usize, step: usize, report: &StepReport) {
        (**self).on_step(arm, step, report);
    }

    fn on_skipped(&mut self, skipped: &Skipped) {
        (**self).on_skipped(skipped);
    }

    fn on_checkpoint(&mut self, step: usize) {
        (**self).on_checkpoint(step);
    }

    fn on_resume(&mut self, kept: KeptRun) {
        (**self).on_resume(kept);
    }

    fn on_evaluation(&mut self, arm: usize, step: usize, evaluation: &Evaluation) {
        (**self).on_evaluation(arm, step, evaluation);
    }
}

/// What one step of one arm was like.
#[derive(Debug, Clone, PartialEq)]
pub struct StepReport {
    /// The contrastive loss.
    pub contrastive: f64,
    /// The weighted auxiliary losses; 0 for a dense model.
    pub auxiliary: f64,
    /// Share of choices that were dropped, the mean over routed blocks.
    pub dropped: f64,
    /// The learning rate of the schedule.
    pub learning_rate: f64,
    /// The norm of all gradients together, before it was limited.
    pub gradient_norm: f64,
    /// Pairs of the batch, of all ranks.
    pub pairs: usize,
    /// What each routed block did, in training, on all ranks.
    pub layers: Vec<LayerLoad>,
    /// How long the step took on this rank, loading and evaluating aside.
    pub time: Duration,
}

/// What a routed block did in one step.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct LayerLoad {
    /// Path in the model.
    pub path: String,
    /// Share of the choices that name each expert, before drops.
    pub load: Vec<f64>,
    /// Share of the choices that were dropped.
    pub dropped: f64,
}
