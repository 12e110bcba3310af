//! Counts over several routings.

use burn::tensor::{Device, Tensor};

use super::{Routing, plan::share_of};

/// What was counted over the micro-batches of a batch, for losses and biases that are about the whole of it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct BatchTotals {
    /// Requested choices of each expert, before drops, `[layers][E]`.
    pub requested: Vec<Vec<usize>>,
    /// Tokens that count in losses, `[layers]`.
    pub tokens: Vec<usize>,
}

impl BatchTotals {
    /// Counts the routings of one micro-batch, one per layer.
    ///
    /// # Panics
    /// When there are not as many layers, or experts in one of them, as before.
    #[track_caller]
    pub fn add(&mut self, routings: &[Routing]) {
        if self.requested.is_empty() {
            self.requested = routings.iter().map(|routing| vec![0; routing.plan.num_experts()]).collect();
            self.tokens = vec![0; routings.len()];
        }
        let fits = self.requested.iter().map(Vec::len).eq(routings.iter().map(|routing| routing.plan.num_experts()));
        let layers = self.requested.len();
        assert!(fits, "routings of {} layers do not fit totals of {layers} layers, or have other experts", routings.len());
        for ((requested, tokens), routing) in self.requested.iter_mut().zip(&mut self.tokens).zip(routings) {
            requested.iter_mut().zip(routing.plan.requested()).for_each(|(total, count)| *total += count);
            *tokens += routing.num_counted();
        }
    }

    /// Share of all requested choices of a layer that name each expert, `[1, E]`; zeros when there was none.
    pub(crate) fn share(&self, layer: usize, device: &Device) -> Tensor<2> {
        share_of(&self.requested[layer], device)
    }
}
