//! Each expert chooses its tokens.

use burn::config::Config;
use burn::tensor::Tensor;
use burn::tensor::TensorData;

use super::{AssignmentInput, HostInput, TokenGroups};
use crate::{
    routing::{
        capacity::Capacity,
        plan::{ChoiceOutcome, DispatchPlan},
    },
    support::error::ConfigError,
};

/// Configuration of expert choice: in each group, each expert takes the `C` valid tokens of highest probability (Zhou et al.,
/// [arXiv 2202.09368](https://arxiv.org/abs/2202.09368)). The gate is the probability, not normalised.
///
/// Loads are equal by construction, and a token may have any number of experts, none included. Who is chosen depends on the
/// other tokens of the group: with [`TokenGroups::PerSample`], which encoders and towers set instead of `Whole`, not on other samples. A causal model leaks
/// the future through it.
///
/// Ties go to the lower token index. An expert's rows are in descending probability.
#[derive(Config, Debug, PartialEq)]
pub struct ExpertChoiceConfig {
    /// Slots of each expert in each group, in both phases (`K` is 1 here). Default: `OfTokens(2.0)`, so that a token has two
    /// experts on average
    #[config(default = "Capacity::OfTokens(2.0)")]
    pub capacity: Capacity,
    /// Which tokens an expert chooses among. Default: `Whole`
    #[config(default = "TokenGroups::Whole")]
    pub groups: TokenGroups,
}

impl ExpertChoiceConfig {
    /// Refuses what cannot work with `num_experts` experts.
    ///
    /// # Errors
    /// The first field that cannot be used, with its value.
    pub fn validate(&self, num_experts: usize) -> Result<(), ConfigError> {
        ConfigError::non_zero("num_experts", num_experts)?;
        if self.capacity == Capacity::Dropless {
            let reason = "an expert that chooses needs to know how many tokens it may take";
            return Err(ConfigError::Capacity { capacity: "Dropless".into(), reason });
        }
        self.groups.validate()?;
        self.capacity.validate()
    }

    /// Experts per token on average, rounded up; of `num_experts`.
    pub(super) fn active_experts(&self, num_experts: usize) -> usize {
        match self.capacity {
            Capacity::OfTokens(c) => (c.ceil() as usize).clamp(1, num_experts),
            // One choice per token is what "balanced load" refers to here.
            Capacity::OfBalancedLoad(c) => (c.ceil() as usize).clamp(1, num_experts),
            Capacity::Fixed(_) | Capacity::Dropless => num_experts,
        }
    }

    pub(super) fn assign(&self, input: &AssignmentInput) -> DispatchPlan {
        assert!(input.protected.is_none(), "expert choice has no protected tokens: an expert that chooses owes no token a slot");
        let host = HostInput::new(input);
        let HostInput { num_tokens, num_experts, .. } = host;
        let mut outcomes = vec![ChoiceOutcome::NotRequested; num_tokens * num_experts];
        let mut used = vec![0; num_experts];
        for group in self.groups.ranges(num_tokens, input.tokens_per_sample) {
            let slots = self.capacity.slots(group.len(), 1, num_experts).unwrap_or(usize::MAX);
            let candidates: Vec<usize> = group.filter(|&token| host.routable[token]).collect();
            for expert in 0..num_experts {
                // A balancing bias would add the same to all of an expert's tokens.
                let score = |token: usize| host.scores[token * num_experts + expert];
                let mut order = candidates.clone();
                // Stable, so that ties stay in token order.
                order.sort_by(|&a, &b| score(b).total_cmp(&score(a)));
                for &token in order.iter().take(slots) {
                    outcomes[token * num_experts + expert] = ChoiceOutcome::Kept { expert, position: used[expert] };
                    used[expert] += 1;
                }
            }
        }
        let without_slot: Vec<bool> = outcomes.iter().map(|outcome| !matches!(outcome, ChoiceOutcome::Kept { .. })).collect();
        let without_slot = Tensor::from_data(TensorData::new(without_slot, [num_tokens, num_experts]), &input.scores.device());
        let gates = input.scores.clone().mask_fill(without_slot, 0.0);
        DispatchPlan::new(num_experts, num_experts, &outcomes, gates, host.non_finite_tokens())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn::tensor::{Bool, Device};

    use crate::routing::{assignment::AssignmentConfig, mask::TokenMask, phase::Phase};

    fn plan(config: ExpertChoiceConfig, scores: &[[f32; 2]], valid: Option<&[bool]>, tokens_per_sample: usize) -> DispatchPlan {
        let flat: Vec<f32> = scores.iter().flatten().copied().collect();
        let scores = Tensor::from_data(TensorData::new(flat, [scores.len(), 2]), &Device::default());
        let valid = valid.map(|valid| TokenMask::new(Tensor::<1, Bool>::from_data(valid, &Device::default())));
        let input = AssignmentInput { valid, tokens_per_sample, ..AssignmentInput::new(scores, Phase::Training) };
        AssignmentConfig::from(config).assign(&input)
    }

    #[test]
    fn each_expert_takes_its_best_tokens_in_descending_order() {
        let config = ExpertChoiceConfig::new().with_capacity(Capacity::Fixed(2));
        let plan = plan(config, &[[0.2, 0.8], [0.9, 0.1], [0.5, 0.5], [0.5, 0.5]], None, 4);
        assert_eq!(plan.row_token(), [1, 2, 0, 2]);
        assert_eq!(plan.load(), [2, 2]);
        assert_eq!(plan.dropped(), 0.0);
        let gates: Vec<f32> = plan.gates().try_into_vec_as().unwrap();
        assert_eq!(gates, [0.0, 0.8, 0.9, 0.0, 0.5, 0.5, 0.0, 0.0]);
    }

    #[test]
    fn groups_are_samples_and_padding_is_never_chosen() {
        let config = ExpertChoiceConfig::new().with_capacity(Capacity::Fixed(1)).with_groups(TokenGroups::PerSample);
        let scores = [[0.9, 0.1], [0.8, 0.2], [0.7, 0.3], [0.6, 0.4]];
        let plan = plan(config, &scores, Some(&[false, true, true, true]), 2);
        assert_eq!(plan.row_token(), [1, 2, 1, 3]);
    }

    #[test]
    fn a_capacity_without_a_number_is_refused() {
        let error = ExpertChoiceConfig::new().with_capacity(Capacity::Dropless).validate(4).unwrap_err();
        let text = "capacity `Dropless` is refused: an expert that chooses needs to know how many tokens it may take";
        assert_eq!(error.to_string(), text);
    }
}
