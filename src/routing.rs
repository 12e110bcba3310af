//! What one sparse layer decided on one batch: data for losses and statistics.

use burn::tensor::{Bool, Device, Tensor, TensorData};

use crate::plan::DispatchPlan;

/// The routing of one layer on one batch. Everything that losses and statistics need is in here; nothing is kept elsewhere.
#[derive(Debug, Clone)]
pub struct Routing {
    /// Router logits, `[T, E]`, f32.
    pub logits: Tensor<2>,
    /// Router probabilities, `[T, E]`, f32.
    pub probs: Tensor<2>,
    /// Which tokens are not padding, `T` flags; `None`: all.
    pub valid: Option<Vec<bool>>,
    /// Who sits where, and with which gate.
    pub plan: DispatchPlan,
}

impl Routing {
    /// Tokens that count: all but padding.
    pub fn num_valid(&self) -> usize {
        match &self.valid {
            Some(valid) => valid.iter().filter(|&&valid| valid).count(),
            None => self.plan.num_tokens(),
        }
    }

    /// Mean over valid tokens of a value per token, `[T, N] -> [1, N]`; zeros when no token is valid.
    pub(crate) fn mean_over_valid(&self, per_token: Tensor<2>) -> Tensor<2> {
        let count = self.num_valid().max(1) as f64;
        let counted = match &self.valid {
            // A fill, not a product: what padding holds may not be finite.
            Some(valid) => per_token.clone().mask_fill(invalid_mask(valid, &per_token.device()), 0.0),
            None => per_token,
        };
        counted.sum_dim(0) / count
    }
}

/// `[T, 1]`, true for padding.
pub(crate) fn invalid_mask(valid: &[bool], device: &Device) -> Tensor<2, Bool> {
    let invalid: Vec<bool> = valid.iter().map(|valid| !valid).collect();
    Tensor::from_data(TensorData::new(invalid, [valid.len(), 1]), device)
}
