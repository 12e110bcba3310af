//! From the scores of chosen experts to gates.

use burn::tensor::{Bool, Tensor};
use serde::{Deserialize, Serialize};

use crate::ops::{GateSum, MIN_GATE_SUM};

/// How the probabilities of a token's chosen experts become gates.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum GateNormalization {
    /// The probabilities as they are.
    None,
    /// Divided by their sum over the `K` chosen experts (axlearn, Tutel, ST-MoE).
    BeforeDrop,
    /// Divided by their sum over the experts that had a slot left (DeepSpeed).
    AfterDrop,
    /// The constant 1 of a single choice, `top_k` 1: its probability divided by itself, with no task gradient for the router. For models that were trained so.
    ConstantOne,
}

impl GateNormalization {
    /// What a kernel divides by.
    pub(super) fn sum(self) -> GateSum {
        match self {
            Self::None => GateSum::None,
            Self::BeforeDrop | Self::ConstantOne => GateSum::OfChosen,
            Self::AfterDrop => GateSum::OfKept,
        }
    }

    /// Gates from the chosen scores, `[T, K]`, zero for a choice without a slot; `without_slot [T, K]` marks those, if there are any.
    pub(super) fn gates(self, scores: Tensor<2>, without_slot: Option<Tensor<2, Bool>>) -> Tensor<2> {
        let Some(without_slot) = without_slot else {
            return match self {
                Self::None => scores,
                Self::BeforeDrop | Self::AfterDrop | Self::ConstantOne => share(scores),
            };
        };
        match self {
            Self::None => scores.mask_fill(without_slot, 0.0),
            Self::BeforeDrop | Self::ConstantOne => share(scores).mask_fill(without_slot, 0.0),
            Self::AfterDrop => share(scores.mask_fill(without_slot.clone(), 0.0)).mask_fill(without_slot, 0.0),
        }
    }
}

/// Each score over the sum of its row.
fn share(scores: Tensor<2>) -> Tensor<2> {
    scores.clone() / scores.sum_dim(1).clamp_min(MIN_GATE_SUM)
}

pub(super) fn scaled(gates: Tensor<2>, scale: f64) -> Tensor<2> {
    if scale == 1.0 { gates } else { gates * scale }
}
