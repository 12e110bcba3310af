//! Turning probabilities into a [`DispatchPlan`]; nothing here is learned.
//!
//! Seats are handed out on the host, from one read of the probabilities: the same order, the same ties and the same seats on
//! every backend.

mod token_choice;

pub use token_choice::{FillOrder, GateNormalization, TokenChoiceConfig};

use burn::tensor::Tensor;
use serde::{Deserialize, Serialize};

use crate::{capacity::Capacity, error::ConfigError, plan::DispatchPlan};

/// Who chooses whom.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub enum AssignmentConfig {
    /// Each token chooses experts.
    TokenChoice(TokenChoiceConfig),
}

impl From<TokenChoiceConfig> for AssignmentConfig {
    fn from(config: TokenChoiceConfig) -> Self {
        Self::TokenChoice(config)
    }
}

impl Default for AssignmentConfig {
    fn default() -> Self {
        TokenChoiceConfig::new().into()
    }
}

/// Whether a plan is for a training step or for inference; the two have their own capacity.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// Inside a training step.
    Training,
    /// Outside of training: a token's seats must not depend on what else is in the batch.
    Inference,
}

impl AssignmentConfig {
    /// Refuses what cannot work with `num_experts` experts.
    ///
    /// # Errors
    /// The first field that cannot be used, with its value.
    pub fn validate(&self, num_experts: usize) -> Result<(), ConfigError> {
        match self {
            Self::TokenChoice(config) => config.validate(num_experts),
        }
    }

    /// Experts that compute each token when nothing is dropped, `K`.
    pub fn active_experts(&self) -> usize {
        match self {
            Self::TokenChoice(config) => config.top_k,
        }
    }

    /// The capacity rule of a phase.
    pub fn capacity(&self, phase: Phase) -> Capacity {
        match (self, phase) {
            (Self::TokenChoice(config), Phase::Training) => config.training_capacity,
            (Self::TokenChoice(config), Phase::Inference) => config.inference_capacity,
        }
    }

    /// Seats the tokens of one batch.
    ///
    /// # Shapes
    /// - probs: `[T, E]`, f32
    /// - valid: `T` flags; `None`: every token is valid
    pub fn assign(&self, probs: Tensor<2>, valid: Option<&[bool]>, phase: Phase) -> DispatchPlan {
        match self {
            Self::TokenChoice(config) => config.assign(probs, valid, self.capacity(phase)),
        }
    }
}
