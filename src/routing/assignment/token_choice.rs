//! Each token chooses its experts.

use burn::config::Config;
use burn::tensor::{Int, Tensor, TensorData};
use serde::{Deserialize, Serialize};

pub use super::gates::GateNormalization;
use super::{AssignmentInput, ExpertGroups, HostInput, TokenGroups, gates::scaled};
use crate::{
    ops::{self, SlotRules},
    routing::{
        capacity::Capacity,
        mask::TokenMask,
        plan::{ChoiceOutcome, DispatchPlan},
    },
    support::error::ConfigError,
};

/// Configuration of token choice: each valid token requests the `K` experts of highest score plus bias (Shazeer et al.,
/// [arXiv 1701.06538](https://arxiv.org/abs/1701.06538)), of all experts or of those that [`ExpertGroups`] leave. Ties go to the lower expert index, on
/// every backend.
#[derive(Config, Debug, PartialEq)]
pub struct TokenChoiceConfig {
    /// Choices per token, `K`. Default: 2
    #[config(default = 2)]
    pub top_k: usize,
    /// How probabilities become gates. Default: `BeforeDrop`
    #[config(default = "GateNormalization::BeforeDrop")]
    pub gate_normalization: GateNormalization,
    /// What gates are multiplied by at the end; `routed_scaling_factor` of DeepSeek-V3's configuration. Default: 1
    #[config(default = 1.0)]
    pub gate_scale: f64,
    /// Limits the choices of a token to some groups of experts. Default: all experts
    pub expert_groups: Option<ExpertGroups>,
    /// Who gets a slot first when there are too few. Default: `ChoiceMajor`
    #[config(default = "FillOrder::ChoiceMajor")]
    pub fill_order: FillOrder,
    /// Slots per expert in a training step. Default: `OfBalancedLoad(1.0)`, which holds a perfectly even routing whatever `top_k` is
    #[config(default = "Capacity::OfBalancedLoad(1.0)")]
    pub training_capacity: Capacity,
    /// Slots per expert outside of training. Default: `Dropless`, so that a result does not depend on the rest of the batch.
    #[config(default = "Capacity::Dropless")]
    pub inference_capacity: Capacity,
    /// Which tokens compete for the same slots. Default: `Whole`
    #[config(default = "TokenGroups::Whole")]
    pub groups: TokenGroups,
}

/// The order in which choices fill an expert's slots.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub enum FillOrder {
    /// All first choices in token order, then all second choices, … (GShard, V-MoE, flaxformer, axlearn, Tutel).
    ChoiceMajor,
    /// All choices of the first token, then all of the second, … (MegaBlocks).
    TokenMajor,
    /// Choice-major, with tokens in descending order of their largest score instead of token order; ties stay in token order
    /// (batch prioritized routing of V-MoE, [arXiv 2106.05974](https://arxiv.org/abs/2106.05974), section 4).
    BatchPriority,
}

impl TokenChoiceConfig {
    /// `top_k` choices per token, with the gates that fit: not normalised for one choice, whose gate would be the constant 1, and as by default
    /// for more.
    pub fn of_top_k(top_k: usize) -> Self {
        let config = Self::new().with_top_k(top_k);
        if top_k == 1 { config.with_gate_normalization(GateNormalization::None) } else { config }
    }

    /// Refuses what cannot work with `num_experts` experts.
    ///
    /// # Errors
    /// The first field that cannot be used, with its value.
    pub fn validate(&self, num_experts: usize) -> Result<(), ConfigError> {
        ConfigError::non_zero("num_experts", num_experts)?;
        ConfigError::non_zero("top_k", self.top_k)?;
        if self.top_k > num_experts {
            return Err(ConfigError::TopKExceedsExperts { top_k: self.top_k, num_experts });
        }
        let (is_one, gates) = (self.top_k == 1, self.gate_normalization);
        if is_one && matches!(gates, GateNormalization::BeforeDrop | GateNormalization::AfterDrop) {
            return Err(ConfigError::TopOneNormalized { normalization: format!("{gates:?}") });
        }
        if !is_one && gates == GateNormalization::ConstantOne {
            let reason = "`ConstantOne` is the gate of a single choice: use `BeforeDrop`";
            return Err(ConfigError::OutOfRange { field: "top_k", value: self.top_k as f64, reason });
        }
        if !(self.gate_scale.is_finite() && self.gate_scale > 0.0) {
            let reason = "what gates are multiplied by must be finite and above 0";
            return Err(ConfigError::OutOfRange { field: "gate_scale", value: self.gate_scale, reason });
        }
        if let Some(groups) = &self.expert_groups {
            groups.validate(num_experts, self.top_k)?;
        }
        self.groups.validate()?;
        self.training_capacity.validate()?;
        self.inference_capacity.validate()
    }

    pub(super) fn assign(&self, input: &AssignmentInput, capacity: Capacity) -> DispatchPlan {
        self.assign_on_device(input, capacity).unwrap_or_else(|| self.assign_on_host(input, capacity))
    }

    fn assign_on_host(&self, input: &AssignmentInput, capacity: Capacity) -> DispatchPlan {
        let mut host = HostInput::new(input);
        if let Some(groups) = &self.expert_groups {
            groups.limit(&mut host.selection_scores, host.num_experts);
        }
        let shape = [host.num_tokens, self.top_k];
        let chosen = choose(&host, self.top_k);
        let outcomes = self.fill(&host, &chosen, capacity);

        let device = input.scores.device();
        // A token without a request still needs an index to gather; its gate is masked to zero below.
        let index: Vec<i32> = chosen.iter().map(|expert| expert.unwrap_or(0) as i32).collect();
        let index = Tensor::<2, Int>::from_data(TensorData::new(index, shape), &device);
        let raw = input.scores.clone().gather(1, index);
        let without_slot: Vec<bool> = outcomes.iter().map(|outcome| !matches!(outcome, ChoiceOutcome::Kept { .. })).collect();
        let without_slot = without_slot.contains(&true).then(|| Tensor::from_data(TensorData::new(without_slot, shape), &device));
        let gates = scaled(self.gate_normalization.gates(raw, without_slot), self.gate_scale);
        DispatchPlan::new(host.num_experts, self.top_k, &outcomes, gates, host.non_finite_tokens())
    }

    /// Nothing where the assignment depends on more than the device can tell: a capacity or an order that depends on the scores, a device without
    /// kernels.
    fn assign_on_device(&self, input: &AssignmentInput, capacity: Capacity) -> Option<DispatchPlan> {
        let [num_tokens, num_experts] = input.scores.dims();
        let device = input.scores.device();
        if self.fill_order == FillOrder::BatchPriority || !ops::can_assign_slots(&device, self.top_k) {
            return None;
        }
        let group_size = self.groups.size(num_tokens, input.tokens_per_sample);
        // The kernel's groups are all of one size.
        if !num_tokens.is_multiple_of(group_size) {
            return None;
        }
        // More slots than tokens are never taken.
        let slots = capacity.slots(group_size, self.top_k, num_experts).map(|slots| slots.min(group_size));
        // Empty slots are computed too: from twice as many slots as choices on, waiting for the host costs less.
        let can_wait = ops::can_wait_for(&device);
        if can_wait && slots.is_some_and(|slots| num_experts * slots > 2 * self.top_k * group_size) {
            return None;
        }
        let token_major = self.fill_order == FillOrder::TokenMajor;
        let rules = SlotRules { top_k: self.top_k, group_size, slots, token_major, protects: input.protected.is_some() };
        let selection_scores = match &self.expert_groups {
            Some(groups) => groups.limited(input.selection_scores()),
            None => input.selection_scores(),
        };
        let mut assigned = ops::assign_slots(selection_scores, token_states(input), rules);
        if can_wait && slots.is_none() && input.valid.is_some() {
            // Padding can be most of a batch: its share of rows is worth waiting for the number of the others.
            assigned.index = assigned.index.without_rows_behind();
        }

        let gates = ops::gates(input.scores.clone(), &assigned, self.gate_normalization.sum());
        let gates = scaled(gates, self.gate_scale);
        Some(DispatchPlan::on_device(num_experts, assigned, gates))
    }

    /// What becomes of each choice, in token-major order, whatever the fill order.
    fn fill(&self, input: &HostInput, chosen: &[Option<usize>], capacity: Capacity) -> Vec<ChoiceOutcome> {
        let HostInput { num_tokens, num_experts, .. } = *input;
        let mut outcomes = vec![ChoiceOutcome::NotRequested; chosen.len()];
        // Rows of earlier groups come first.
        let mut used = vec![0; num_experts];
        for group in self.groups.ranges(num_tokens, input.tokens_per_sample) {
            let slots = capacity.slots(group.len(), self.top_k, num_experts).unwrap_or(usize::MAX);
            let first = used.clone();
            let mut fill = |choice: usize| {
                let Some(expert) = chosen[choice] else { return };
                outcomes[choice] = if used[expert] - first[expert] < slots {
                    used[expert] += 1;
                    ChoiceOutcome::Kept { expert, position: used[expert] - 1 }
                } else {
                    ChoiceOutcome::Dropped { expert }
                };
            };
            let is_protected = |token: &usize| input.protected.is_some_and(|protected| protected[*token]);
            let (protected, others): (Vec<usize>, Vec<usize>) = group.partition(is_protected);
            for mut tokens in [protected, others] {
                if self.fill_order == FillOrder::BatchPriority {
                    let largest =
                        |token: usize| input.scores[token * num_experts..][..num_experts].iter().copied().fold(f32::MIN, f32::max);
                    tokens.sort_by(|&a, &b| largest(b).total_cmp(&largest(a)));
                }
                let choices = tokens.iter().map(|token| token * self.top_k);
                match self.fill_order {
                    FillOrder::ChoiceMajor | FillOrder::BatchPriority => {
                        for rank in 0..self.top_k {
                            choices.clone().for_each(|choice| fill(choice + rank));
                        }
                    }
                    FillOrder::TokenMajor => choices.for_each(|choice| (choice..choice + self.top_k).for_each(&mut fill)),
                }
            }
        }
        outcomes
    }
}

/// What each token is, as [`ops::assign_slots`] takes it, `[T]`.
fn token_states(input: &AssignmentInput) -> Tensor<1, Int> {
    let ([num_tokens, _], device) = (input.scores.dims(), input.scores.device());
    let flags = |mask: &Option<TokenMask>| mask.as_ref().map(|mask| mask.tensor(&device).int());
    match (flags(&input.valid), flags(&input.protected)) {
        (None, None) => Tensor::ones([num_tokens], &device),
        (Some(valid), None) => valid,
        (None, Some(protected)) => protected + 1,
        (Some(valid), Some(protected)) => valid * (protected + 1),
    }
}

/// The `top_k` experts of each token by descending score, ties to the lower index, `[T · K]`; nothing for a token that is not routed.
fn choose(input: &HostInput, top_k: usize) -> Vec<Option<usize>> {
    let mut chosen = vec![None; input.num_tokens * top_k];
    let mut best: Vec<(f32, usize)> = Vec::with_capacity(top_k + 1);
    let rows = input.selection_scores.chunks_exact(input.num_experts).enumerate();
    for (token, scores) in rows.filter(|(token, _)| input.routable[*token]) {
        best.clear();
        for (expert, &score) in scores.iter().enumerate() {
            let rank = best.iter().position(|(other, _)| score > *other).unwrap_or(best.len());
            if rank < top_k {
                best.truncate(top_k - 1);
                best.insert(rank, (score, expert));
            }
        }
        let ranks = chosen[token * top_k..][..top_k].iter_mut();
        ranks.zip(&best).for_each(|(chosen, (_, expert))| *chosen = Some(*expert));
    }
    chosen
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn::tensor::{Bool, Device};

    use crate::routing::phase::Phase;

    fn plan(config: &TokenChoiceConfig, probs: &[[f32; 3]], valid: Option<&[bool]>, capacity: Capacity) -> DispatchPlan {
        let flat: Vec<f32> = probs.iter().flatten().copied().collect();
        let probs = Tensor::from_data(TensorData::new(flat, [probs.len(), 3]), &Device::default());
        let valid = valid.map(flags);
        config.assign(&AssignmentInput { valid, ..AssignmentInput::new(probs, Phase::Training) }, capacity)
    }

    fn flags(flags: &[bool]) -> TokenMask {
        TokenMask::new(Tensor::<1, Bool>::from_data(flags, &Device::default()))
    }

    fn bias(values: [f32; 3]) -> Option<Tensor<1>> {
        Some(Tensor::from_floats(values, &Device::default()))
    }

    fn gates(plan: &DispatchPlan) -> Vec<f32> {
        plan.gates().try_into_vec_as().unwrap()
    }

    #[test]
    fn ties_go_to_the_lower_expert() {
        let plan = plan(&TokenChoiceConfig::new(), &[[0.25, 0.5, 0.25], [0.4, 0.2, 0.4]], None, Capacity::Dropless);
        assert_eq!(plan.row_token(), [1, 0, 0, 1]); // expert 0: token 1 first, token 0 second; expert 1: token 0; expert 2: token 1
        assert_eq!(plan.choice_row(), [2, 1, 0, 3]);
    }

    #[test]
    fn first_choices_get_their_slots_before_any_second_choice() {
        // Expert 0 has one slot; token 0 wants it second, token 1 first.
        let plan = plan(&TokenChoiceConfig::new(), &[[0.3, 0.6, 0.1], [0.6, 0.3, 0.1]], None, Capacity::Fixed(1));
        assert_eq!(plan.choice_row(), [1, -1, 0, -1]);
        assert_eq!(plan.requested(), [2, 2, 0]);
        assert_eq!(plan.load(), [1, 1, 0]);
    }

    #[test]
    fn fill_orders_do_as_named() {
        // Everybody wants expert 0 first and expert 1 second; each has two slots.
        let probs = [[0.5, 0.3, 0.2], [0.6, 0.3, 0.1], [0.7, 0.2, 0.1]];
        let rows = |order| {
            let config = TokenChoiceConfig::new().with_fill_order(order);
            plan(&config, &probs, None, Capacity::Fixed(2)).row_token().to_vec()
        };
        assert_eq!(rows(FillOrder::ChoiceMajor), [0, 1, 0, 1]);
        assert_eq!(rows(FillOrder::TokenMajor), [0, 1, 0, 1]);
        assert_eq!(rows(FillOrder::BatchPriority), [2, 1, 2, 1]);
        // Expert 0 has one slot; token 0 wants it second, token 1 first.
        let probs = [[0.3, 0.6, 0.1], [0.6, 0.3, 0.1]];
        let config = TokenChoiceConfig::new().with_fill_order(FillOrder::TokenMajor);
        assert_eq!(plan(&config, &probs, None, Capacity::Fixed(1)).choice_row(), [1, 0, -1, -1]);
    }

    #[test]
    fn protected_tokens_get_their_slots_before_any_first_choice_of_others() {
        let probs = [[0.6, 0.3, 0.1], [0.6, 0.3, 0.1], [0.3, 0.6, 0.1]];
        let flat: Vec<f32> = probs.iter().flatten().copied().collect();
        let probs = Tensor::from_data(TensorData::new(flat, [3, 3]), &Device::default());
        let protected = Some(&[false, false, true][..]);
        let protected = protected.map(flags);
        let input = AssignmentInput { protected, ..AssignmentInput::new(probs, Phase::Training) };
        let plan = TokenChoiceConfig::new().assign(&input, Capacity::Fixed(1));
        assert_eq!(plan.row_token(), [2, 2]);
        assert_eq!(plan.choice_row(), [-1, -1, -1, -1, 1, 0]);
    }

    #[test]
    fn capacity_is_counted_in_each_group() {
        let probs = [[0.6, 0.3, 0.1]; 4];
        let config = TokenChoiceConfig::new().with_groups(TokenGroups::OfSize(2));
        let plan = plan(&config, &probs, None, Capacity::Fixed(1));
        assert_eq!(plan.row_token(), [0, 2, 0, 2]);
    }

    #[test]
    fn the_last_group_may_be_smaller() {
        // Groups of 3, 3 and 1 tokens that all want experts 0 and 1: 2, 2 and 1 slots of each.
        let config = TokenChoiceConfig::new().with_groups(TokenGroups::OfSize(3));
        let plan = plan(&config, &[[0.6, 0.3, 0.1]; 7], None, Capacity::OfBalancedLoad(1.0));
        assert_eq!(plan.load(), [5, 5, 0]);
        assert_eq!(plan.row_token(), [0, 1, 3, 4, 6, 0, 1, 3, 4, 6]);
        let short = TokenChoiceConfig::new().with_groups(TokenGroups::OfSize(3));
        assert_eq!(self::plan(&short, &[[0.6, 0.3, 0.1]; 2], None, Capacity::Dropless).load(), [2, 2, 0]);
    }

    #[test]
    fn a_selection_bias_changes_who_is_chosen_and_not_the_gate() {
        let probs = Tensor::from_data(TensorData::new(vec![0.6f32, 0.3, 0.1], [1, 3]), &Device::default());
        let input = AssignmentInput { selection_bias: bias([0.0, 0.0, 1.0]), ..AssignmentInput::new(probs, Phase::Training) };
        let config = TokenChoiceConfig::new().with_gate_normalization(GateNormalization::None);
        let plan = config.assign(&input, Capacity::Dropless);
        assert_eq!(plan.load(), [1, 0, 1]);
        assert_eq!(gates(&plan), [0.1, 0.6]);
    }

    #[test]
    fn gates_are_normalized_as_named() {
        let probs = [[0.3, 0.6, 0.1], [0.6, 0.3, 0.1]];
        let near = |got: Vec<f32>, want: [f32; 4]| {
            assert!(got.iter().zip(want).all(|(a, b)| (a - b).abs() < 1e-6), "{got:?} is not {want:?}");
        };
        let config = |normalization| TokenChoiceConfig::new().with_gate_normalization(normalization);
        let run = |normalization, capacity| gates(&plan(&config(normalization), &probs, None, capacity));
        // Token 0 chooses 0.6 and 0.3, their sum is 0.9.
        near(run(GateNormalization::None, Capacity::Fixed(1)), [0.6, 0.0, 0.6, 0.0]);
        near(run(GateNormalization::BeforeDrop, Capacity::Fixed(1)), [0.6 / 0.9, 0.0, 0.6 / 0.9, 0.0]);
        near(run(GateNormalization::AfterDrop, Capacity::Fixed(1)), [1.0, 0.0, 1.0, 0.0]);
        near(run(GateNormalization::AfterDrop, Capacity::Dropless), [0.6 / 0.9, 0.3 / 0.9, 0.6 / 0.9, 0.3 / 0.9]);
    }

    #[test]
    fn a_gate_too_small_for_f32_is_zero_and_not_nan() {
        let config = TokenChoiceConfig::new().with_gate_normalization(GateNormalization::AfterDrop);
        let plan = plan(&config, &[[1.0, 0.0, 0.0], [1.0, 0.0, 0.0]], None, Capacity::Fixed(1));
        assert_eq!(plan.requested(), [2, 2, 0]);
        assert_eq!(gates(&plan), [1.0, 0.0, 0.0, 0.0]);
    }

    #[test]
    fn experts_that_only_a_bias_chose_get_zero_gates_and_not_nan() {
        let probs = Tensor::from_data(TensorData::new(vec![1.0f32, 0.0, 0.0], [1, 3]), &Device::default());
        let input = AssignmentInput { selection_bias: bias([0.0, 2.0, 2.0]), ..AssignmentInput::new(probs, Phase::Training) };
        for normalization in [GateNormalization::BeforeDrop, GateNormalization::AfterDrop] {
            let plan = TokenChoiceConfig::new().with_gate_normalization(normalization).assign(&input, Capacity::Dropless);
            assert_eq!((plan.load(), gates(&plan)), (vec![0, 1, 1], vec![0.0, 0.0]));
        }
    }

    #[test]
    fn padding_and_tokens_that_are_not_finite_request_nothing() {
        let probs = [[f32::NAN, 0.5, 0.5], [0.6, 0.3, 0.1], [0.6, 0.3, 0.1]];
        let plan = plan(&TokenChoiceConfig::new(), &probs, Some(&[true, false, true]), Capacity::Fixed(1));
        assert_eq!(plan.requested(), [1, 1, 0]);
        assert_eq!(plan.row_token(), [2, 2]);
        assert_eq!(gates(&plan)[2..4], [0.0, 0.0]);
    }

    #[test]
    fn impossible_settings_are_refused_with_their_value() {
        let text = |config: TokenChoiceConfig, experts| config.validate(experts).unwrap_err().to_string();
        assert_eq!(text(TokenChoiceConfig::new().with_top_k(9), 8), "`top_k` is 9, but there are only 8 experts");
        assert_eq!(text(TokenChoiceConfig::new().with_top_k(0), 8), "`top_k` must be at least 1, got 0");
        assert_eq!(text(TokenChoiceConfig::new(), 0), "`num_experts` must be at least 1, got 0");
        assert!(text(TokenChoiceConfig::new().with_top_k(1), 8).contains("no task gradient reaches the router"));
        let zero = TokenChoiceConfig::new().with_training_capacity(Capacity::OfTokens(0.0));
        assert_eq!(text(zero, 8), "capacity `OfTokens(0.0)` is refused: the factor must be above 0");
    }
}
