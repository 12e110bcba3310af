//! Losses of a batch whose micro-batches are computed one after the other.

use burn::tensor::{DType, Tensor};

use super::{AuxiliaryLoss, AuxiliaryLossConfig, auxiliary::Weighted};
use crate::{
    routing::{BatchTotals, Routing},
    support::error::ConfigError,
};

impl AuxiliaryLossConfig {
    /// Refuses losses that are not a sum over tokens once the totals of the batch are known.
    ///
    /// # Errors
    /// The first such loss that has a weight.
    pub fn validate_micro_batches(&self) -> Result<(), ConfigError> {
        match self.losses().into_iter().find(|loss| loss.weight > 0.0 && !loss.is_sum) {
            None => Ok(()),
            Some(Weighted { field, weight: value, .. }) => {
                let reason = "this loss needs the whole batch at once: set its weight to 0, or train on one rank, without micro-batches and recomputation";
                Err(ConfigError::OutOfRange { field, value, reason })
            }
        }
    }
}

impl AuxiliaryLoss {
    /// The part of a batch's losses that one of its micro-batches brings in, `[1]`: summed over micro-batches, it is what
    /// [`forward`](Self::forward) returns for the batch in one piece, and so are the gradients. `totals` must have counted all of them
    /// before, which takes another pass.
    ///
    /// # Panics
    /// As [`forward`](Self::forward), and for a loss that
    /// [`validate_micro_batches`](AuxiliaryLossConfig::validate_micro_batches) refuses.
    #[track_caller]
    pub fn forward_micro_batch(&self, routings: &[Routing], totals: &BatchTotals) -> Tensor<1> {
        assert_eq!(routings.len(), totals.tokens.len(), "the totals are of another number of layers than the routings");
        assert!(!routings.is_empty(), "auxiliary losses need the routing of at least one layer, got none");
        let parts = routings.iter().enumerate().map(|(layer, routing)| self.layer_of_micro_batch(layer, routing, totals));
        parts.reduce(|sum, part| sum + part).expect("there is a layer")
    }

    /// What one of the layers of [`forward_micro_batch`](Self::forward_micro_batch) brings in.
    pub(crate) fn layer_of_micro_batch(&self, layer: usize, routing: &Routing, totals: &BatchTotals) -> Tensor<1> {
        let config = self.config();
        crate::support::error::expect_valid(config.validate_micro_batches());
        let device = routing.router.probs.device();
        let part = routing.counted() / (totals.tokens[layer].max(1) * totals.tokens.len()) as f64;
        let mut total = Tensor::zeros([1], (&device, DType::F32));
        for Weighted { weight, loss, .. } in config.losses().into_iter().filter(|loss| loss.weight > 0.0) {
            total = total + loss(config, routing, &|| totals.share(layer, &device)) * part.clone() * weight;
        }
        total.cast(routing.token_dtype)
    }
}
