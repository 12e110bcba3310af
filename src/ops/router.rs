//! What a router needs of a backend: logits, slots for its choices, and gates.

use burn::tensor::{DType, Int, Tensor};

use super::RowIndex;
#[cfg(feature = "_gpu")]
use super::{Offsets, choice::has_router_kernel, extension};

/// Slots that were assigned on a device. With a limit, each expert has a row for each of its slots, taken or not; without, only for what it has.
#[derive(Clone, Debug)]
pub(crate) struct DeviceSlots {
    /// Expert of each choice, `[T · K]`; −1 for padding, or [`NON_FINITE`](super::NON_FINITE).
    pub chosen: Tensor<1, Int>,
    /// Their rows.
    pub index: RowIndex,
}

/// What a router says of each expert, `x · weight` in f32.
///
/// # Shapes
/// - x: `[T, D]`
/// - weight: `[D, E]`
/// - output: `[T, E]`, f32
pub(crate) fn router_logits(x: Tensor<2>, weight: Tensor<2>) -> Tensor<2> {
    let weight = weight.dequantize().cast(DType::F32);
    if x.dims()[0] == 0 {
        return Tensor::zeros([0, weight.dims()[1]], (&x.device(), DType::F32));
    }
    #[cfg(feature = "_gpu")]
    if has_router_kernel(&x.device(), x.dtype()) {
        use extension::RouterOps;
        let logits = burn::backend::Dispatch::moe_router_logits(x.into_dispatch(), weight.transpose().into_dispatch());
        return Tensor::from_dispatch(logits);
    }
    x.cast(DType::F32).matmul(weight)
}

/// Whether [`router_logits`] gives NaN to a token that has a logit that is not finite, and lets no gradient pass there, whatever the token holds.
pub(crate) fn router_is_guarded(x: &Tensor<2>) -> bool {
    #[cfg(feature = "_gpu")]
    return has_router_kernel(&x.device(), x.dtype());
    #[cfg(not(feature = "_gpu"))]
    {
        let _ = x;
        false
    }
}

/// What the scores of a token's chosen experts are divided by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[cfg_attr(not(feature = "_gpu"), allow(dead_code))]
pub(crate) enum GateSum {
    /// Nothing.
    None,
    /// Their sum.
    OfChosen,
    /// The sum of those that have a row.
    OfKept,
}

/// A sum can be next to nothing: of an expert whose probability is too small for f32, or of experts that a balancing bias chose. This floor, whose
/// square f32 can still hold, keeps gates and their gradients finite there.
pub(crate) const MIN_GATE_SUM: f32 = 1e-18;

/// Gates of choices that a device made; 0 for a choice without a row.
///
/// # Shapes
/// - scores: `[T, E]`, f32
/// - output: `[T, K]`
#[cfg(feature = "_gpu")]
pub(crate) fn gates(scores: Tensor<2>, slots: &DeviceSlots, rule: GateSum) -> Tensor<2> {
    use extension::RouterOps;

    let (chosen, choice_row) = (slots.chosen.clone().into_dispatch(), slots.index.choice_row.clone().into_dispatch());
    Tensor::from_dispatch(burn::backend::Dispatch::moe_gates(scores.into_dispatch(), chosen, choice_row, rule))
}

#[cfg(not(feature = "_gpu"))]
pub(crate) fn gates(_: Tensor<2>, _: &DeviceSlots, _: GateSum) -> Tensor<2> {
    unreachable!("no backend that assigns slots is built in")
}

/// How slots are assigned.
#[derive(Clone, Copy, Debug)]
#[cfg_attr(not(feature = "_gpu"), allow(dead_code))]
pub(crate) struct SlotRules {
    /// Choices per token, `K`.
    pub top_k: usize,
    /// Tokens that compete with each other, in order.
    pub group_size: usize,
    /// Slots of each expert in each group; as many as it needs without.
    pub slots: Option<usize>,
    /// All choices of a token before the next one; otherwise all first choices, then all second ones, ….
    pub token_major: bool,
    /// Whether some tokens get their slots before all others.
    pub protects: bool,
}

#[cfg(feature = "_gpu")]
impl SlotRules {
    /// Rows of all experts: all slots, or as many as there are choices.
    pub(super) fn num_rows(&self, num_tokens: usize, num_experts: usize) -> usize {
        self.slots.map_or(num_tokens * self.top_k, |slots| num_experts * slots * num_tokens / self.group_size)
    }
}

/// Assigns slots on the device: the experts of highest score for each token, ties to the lower one, in the order of the rules.
///
/// # Shapes
/// - scores: `[T, E]`, f32, what experts are chosen by
/// - states: `[T]`, 0 for padding, 1 for other tokens, 2 for those that get their slots first
/// - row_choice: `[E · slots]`, or `[T · K]` without a limit
#[cfg(feature = "_gpu")]
pub(crate) fn assign_slots(scores: Tensor<2>, states: Tensor<1, Int>, rules: SlotRules) -> DeviceSlots {
    use burn::backend::Dispatch;
    use extension::SlotOps;

    let [num_tokens, num_experts] = scores.dims();
    // No gradient passes through the assignment.
    let (scores, states) = (scores.inner().into_dispatch(), states.inner().into_dispatch());
    let (chosen, choice_row, row_choice, offsets) = Dispatch::moe_assign_slots(scores, states, rules);
    let [chosen, choice_row, row_choice, offsets] = [chosen, choice_row, row_choice, offsets].map(Tensor::from_dispatch);
    let host = rules.slots.map(|slots| (0..=num_experts).map(|expert| expert * slots * num_tokens / rules.group_size).collect());
    DeviceSlots { chosen, index: RowIndex { offsets: Offsets::on_device(offsets, host), row_choice, choice_row } }
}

#[cfg(not(feature = "_gpu"))]
pub(crate) fn assign_slots(_: Tensor<2>, _: Tensor<1, Int>, _: SlotRules) -> DeviceSlots {
    unreachable!("no backend that assigns slots is built in")
}
