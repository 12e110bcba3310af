//! Carries tokens to the slots of their experts and the results back.

use burn::tensor::Tensor;

use crate::{
    ops,
    plan::{DispatchPlan, SlotGrid},
};

/// One trip: [`dispatch`](Self::dispatch) out, [`combine`](Self::combine) back.
pub(crate) struct Dispatcher {
    grid: SlotGrid,
    gates: Tensor<2>,
    num_experts: usize,
    is_empty: bool,
}

impl Dispatcher {
    pub(crate) fn new(plan: &DispatchPlan) -> Self {
        let gates = plan.gates();
        Self { grid: plan.slot_grid(&gates.device()), gates, num_experts: plan.num_experts(), is_empty: plan.num_rows() == 0 }
    }

    /// No choice has a slot: there is nothing to compute.
    pub(crate) fn is_empty(&self) -> bool {
        self.is_empty
    }

    /// `[T, D] -> [E, S, D]`; an empty slot holds zeros.
    pub(crate) fn dispatch(&self, tokens: Tensor<2>) -> Tensor<3> {
        let [_, d_model] = tokens.dims();
        ops::dispatch(tokens, self.grid.slot_token.clone(), self.grid.has_empty_slots).reshape([
            self.num_experts,
            self.grid.slots,
            d_model,
        ])
    }

    /// `[E, S, D] -> [T, D]`: the gate-weighted sum of each token's rows, exactly 0 for a token without one.
    pub(crate) fn combine(&self, slots: Tensor<3>) -> Tensor<2> {
        let [num_experts, per_expert, d_model] = slots.dims();
        let dtype = slots.dtype();
        let rows = slots.reshape([num_experts * per_expert, d_model]);
        ops::combine(rows, self.gates.clone().cast(dtype), self.grid.choice_slot.clone(), self.grid.has_unseated_choices)
    }
}
