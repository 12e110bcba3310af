//! Turning probabilities into a [`DispatchPlan`]; nothing here is learned.
//!
//! Slots are assigned on the host, from one read of the scores, or by a GPU itself: in the same order and with the same ties on
//! every backend.

mod expert_choice;
mod expert_groups;
mod gates;
mod groups;
mod token_choice;

pub use expert_choice::ExpertChoiceConfig;
pub use expert_groups::ExpertGroups;
pub use groups::TokenGroups;
pub use token_choice::{FillOrder, GateNormalization, TokenChoiceConfig};

use burn::tensor::{FloatDType, Tensor};
use serde::{Deserialize, Serialize};

use crate::{
    ops,
    routing::{capacity::Capacity, mask::TokenMask, phase::Phase, plan::DispatchPlan},
    support::error::ConfigError,
};

/// The assignment rule.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub enum AssignmentConfig {
    /// Each token chooses experts.
    TokenChoice(TokenChoiceConfig),
    /// Each expert chooses tokens.
    ExpertChoice(ExpertChoiceConfig),
}

impl From<ExpertChoiceConfig> for AssignmentConfig {
    fn from(config: ExpertChoiceConfig) -> Self {
        Self::ExpertChoice(config)
    }
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

/// What an assignment is made from.
#[derive(Clone, Debug)]
pub struct AssignmentInput {
    /// What gates are made of, `[T, E]`, f32.
    pub scores: Tensor<2>,
    /// Added to each expert's scores when tokens choose, and never part of a gate, `[E]`. `None`: nothing.
    pub selection_bias: Option<Tensor<1>>,
    /// Which tokens are not padding, `T` flags. `None`: all.
    pub valid: Option<TokenMask>,
    /// Which tokens get their slots before all others, `T` flags. `None`: none.
    pub protected: Option<TokenMask>,
    /// Tokens of one sample, for [`TokenGroups::PerSample`].
    pub tokens_per_sample: usize,
    /// Training or inference.
    pub phase: Phase,
}

impl AssignmentInput {
    /// Scores `[T, E]` of tokens that are all valid, none protected, and one sample.
    pub fn new(scores: Tensor<2>, phase: Phase) -> Self {
        let [tokens_per_sample, _] = scores.dims();
        Self { scores, selection_bias: None, valid: None, protected: None, tokens_per_sample, phase }
    }

    /// What experts are chosen by, `[T, E]`: scores and the bias.
    fn selection_scores(&self) -> Tensor<2> {
        match &self.selection_bias {
            None => self.scores.clone(),
            Some(bias) => self.scores.clone() + bias.clone().dequantize().cast(FloatDType::F32).unsqueeze(),
        }
    }

    /// Refuses flags and biases of another number than the scores have rows and columns.
    fn expect_fits(&self) {
        let [num_tokens, num_experts] = self.scores.dims();
        for (name, mask) in [("valid", &self.valid), ("protected", &self.protected)] {
            if let Some(len) = mask.as_ref().map(TokenMask::len) {
                assert!(len == num_tokens, "`{name}` has {len} flags, but the scores are of {num_tokens} tokens");
            }
        }
        if let Some(bias) = &self.selection_bias {
            let [len] = bias.dims();
            assert!(len == num_experts, "`selection_bias` has {len} entries, but the scores are of {num_experts} experts");
        }
    }
}

/// The same as the host sees it: one read of the scores, the bias and each mask.
struct HostInput<'a> {
    num_tokens: usize,
    num_experts: usize,
    /// `[T · E]`
    scores: Vec<f32>,
    /// What experts are chosen by: scores and the bias, `[T · E]`.
    selection_scores: Vec<f32>,
    valid: Option<&'a [bool]>,
    protected: Option<&'a [bool]>,
    tokens_per_sample: usize,
    /// Tokens that request slots. One whose scores are not finite does not: it must not take a slot from another token.
    routable: Vec<bool>,
}

impl<'a> HostInput<'a> {
    fn new(input: &'a AssignmentInput) -> Self {
        let [num_tokens, num_experts] = input.scores.dims();
        assert!(
            ops::can_wait_for(&input.scores.device()),
            "these slots are assigned on the host, which cannot wait for a browser's GPU: use token choice with at most 16 choices per token, \
             groups of equal sizes, and another fill order than `BatchPriority`"
        );
        let scores: Vec<f32> = input.scores.clone().detach().try_into_vec_as().expect("scores are f32");
        let [valid, protected] = [&input.valid, &input.protected].map(|mask| mask.as_ref().map(TokenMask::as_slice));
        let selection_scores = match &input.selection_bias {
            None => scores.clone(),
            Some(bias) => {
                let bias: Vec<f32> = bias.clone().detach().try_into_vec_as().expect("a bias is a float");
                scores.iter().zip(bias.iter().cycle()).map(|(score, bias)| score + bias).collect()
            }
        };
        let rows = selection_scores.chunks_exact(num_experts).enumerate();
        let is_valid = |token: usize| valid.is_none_or(|valid| valid[token]);
        let routable = rows.map(|(token, scores)| is_valid(token) && scores.iter().all(|score| score.is_finite())).collect();
        Self {
            num_tokens,
            num_experts,
            selection_scores,
            valid,
            protected,
            tokens_per_sample: input.tokens_per_sample,
            routable,
            scores,
        }
    }

    /// Valid tokens whose scores are not finite.
    fn non_finite_tokens(&self) -> Vec<usize> {
        let is_valid = |token: usize| self.valid.is_none_or(|valid| valid[token]);
        (0..self.num_tokens).filter(|&token| is_valid(token) && !self.routable[token]).collect()
    }
}

impl AssignmentConfig {
    /// Refuses what cannot work with `num_experts` experts.
    ///
    /// # Errors
    /// The first field that cannot be used, with its value.
    pub fn validate(&self, num_experts: usize) -> Result<(), ConfigError> {
        match self {
            Self::TokenChoice(config) => config.validate(num_experts),
            Self::ExpertChoice(config) => config.validate(num_experts),
        }
    }

    /// Experts that compute each token when nothing is dropped, `K`; for expert choice, on average and rounded up.
    pub fn active_experts(&self, num_experts: usize) -> usize {
        match self {
            Self::TokenChoice(config) => config.top_k,
            Self::ExpertChoice(config) => config.active_experts(num_experts),
        }
    }

    /// The capacity rule of a phase.
    pub fn capacity(&self, phase: Phase) -> Capacity {
        match (self, phase) {
            (Self::TokenChoice(config), Phase::Training) => config.training_capacity,
            (Self::TokenChoice(config), Phase::Inference) => config.inference_capacity,
            (Self::ExpertChoice(config), _) => config.capacity,
        }
    }

    /// Choices of each token in a plan, `M`.
    fn num_choices(&self, num_experts: usize) -> usize {
        match self {
            Self::TokenChoice(config) => config.top_k,
            Self::ExpertChoice(_) => num_experts,
        }
    }

    /// Whether tokens may be protected: only where tokens choose.
    pub fn can_protect(&self) -> bool {
        matches!(self, Self::TokenChoice(_))
    }

    /// The fewest experts that a layer can have.
    pub(crate) fn least_experts(&self) -> usize {
        match self {
            Self::TokenChoice(config) => config.top_k,
            Self::ExpertChoice(_) => 1,
        }
    }

    /// Rows that experts compute for `num_tokens` tokens when nothing is dropped.
    pub(crate) fn rows(&self, num_tokens: usize, num_experts: usize) -> usize {
        match self {
            Self::TokenChoice(config) => num_tokens * config.top_k,
            Self::ExpertChoice(config) => {
                num_experts * config.capacity.slots(num_tokens, 1, num_experts).unwrap_or(num_tokens).min(num_tokens)
            }
        }
    }

    /// The same for a layer of one expert, which every token then requests.
    pub(crate) fn with_one_expert(self) -> Self {
        match self {
            Self::TokenChoice(config) => {
                let config = config.with_top_k(1).with_gate_normalization(GateNormalization::None);
                let config = config.with_expert_groups(None);
                config.with_training_capacity(Capacity::Dropless).with_inference_capacity(Capacity::Dropless).into()
            }
            Self::ExpertChoice(config) => config.with_capacity(Capacity::OfTokens(1.0)).into(),
        }
    }

    /// The same, with samples as groups where experts would otherwise choose in the whole batch, so that a result would depend on other samples at
    /// inference. Groups of a size that was set stay.
    pub(crate) fn independent_of_batch(mut self) -> Self {
        if let Self::ExpertChoice(config) = &mut self
            && config.groups == TokenGroups::Whole
        {
            config.groups = TokenGroups::PerSample;
        }
        self
    }

    /// Assigns slots to the tokens of one batch: on a GPU with this crate's kernels if tokens choose, up to 16 experts each, and the fill order is not
    /// `BatchPriority` (the host then does not wait, except dropless for the number of rows if there is a mask, and not in a browser), otherwise on
    /// the host.
    ///
    /// # Panics
    /// When a mask does not have `T` flags, the bias does not have `E` entries, there are fewer than `top_k` experts, samples do not divide
    /// the tokens, or expert choice gets protected tokens; in a browser on `webgpu`, where the host would assign the slots.
    #[track_caller]
    pub fn assign(&self, input: &AssignmentInput) -> DispatchPlan {
        input.expect_fits();
        let [num_tokens, num_experts] = input.scores.dims();
        let least = self.least_experts();
        assert!(least <= num_experts, "`top_k` is {least}, but the scores are of only {num_experts} experts");
        if num_tokens == 0 {
            return DispatchPlan::of_no_tokens(num_experts, self.num_choices(num_experts), &input.scores.device());
        }
        match self {
            Self::TokenChoice(config) => config.assign(input, self.capacity(input.phase)),
            Self::ExpertChoice(config) => config.assign(input),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_choice_in_the_whole_batch_becomes_one_within_samples() {
        let groups = |groups| match AssignmentConfig::from(ExpertChoiceConfig::new().with_groups(groups)).independent_of_batch() {
            AssignmentConfig::ExpertChoice(config) => config.groups,
            AssignmentConfig::TokenChoice(_) => unreachable!("the rule stays"),
        };
        assert_eq!(groups(TokenGroups::Whole), TokenGroups::PerSample);
        assert_eq!(groups(TokenGroups::OfSize(3)), TokenGroups::OfSize(3));
        let token_choice = AssignmentConfig::default();
        assert_eq!(token_choice.clone().independent_of_batch(), token_choice);
    }
}
