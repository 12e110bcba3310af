//! What one sparse layer decided on one batch: data for losses and statistics.

mod input;

pub(crate) use input::FlatTokens;
pub use input::{MoeInput, MoeOutput};

use burn::tensor::Tensor;

use crate::{
    mask::TokenMask,
    plan::DispatchPlan,
    router::{RouterNoise, RouterScore},
};

/// The routing of one layer on one batch. Everything that losses and statistics need is in here; nothing is kept elsewhere.
#[derive(Debug, Clone)]
pub struct Routing {
    /// Router logits without noise, `[T, E]`, f32 (Soft MoE: of each slot, `[T, E · S]`).
    pub logits: Tensor<2>,
    /// Router probabilities without noise, `[T, E]`, f32: what importance, entropies and statistics read.
    pub clean_probs: Tensor<2>,
    /// The probabilities that routed, `[T, E]`, f32: what load balancing reads.
    pub probs: Tensor<2>,
    /// The noise on the logits, if there was any.
    pub noise: Option<RouterNoise>,
    /// How logits became scores.
    pub score: RouterScore,
    /// Which tokens are not padding; `None`: all.
    pub valid: Option<TokenMask>,
    /// Who sits where, and with which gate.
    pub plan: DispatchPlan,
}

impl Routing {
    /// Tokens that count: all but padding.
    pub fn num_valid(&self) -> usize {
        match &self.valid {
            Some(valid) => valid.as_slice().iter().filter(|&&valid| valid).count(),
            None => self.plan.num_tokens(),
        }
    }

    /// Mean over valid tokens of a value per token, `[T, N] -> [1, N]`; zeros when no token is valid.
    pub(crate) fn mean_over_valid(&self, per_token: Tensor<2>) -> Tensor<2> {
        let (device, dtype) = (per_token.device(), per_token.dtype());
        let sum = self.sum_over_valid(per_token);
        match &self.valid {
            // Counted where the sum is, which does not wait for the host.
            Some(valid) => sum / valid.tensor(&device).float().cast(dtype).sum().clamp_min(1.0).unsqueeze_dim(1),
            None => sum / self.plan.num_tokens().max(1) as f64,
        }
    }

    /// Sum over valid tokens of a value per token, `[T, N] -> [1, N]`.
    pub(crate) fn sum_over_valid(&self, per_token: Tensor<2>) -> Tensor<2> {
        let counted = match &self.valid {
            // A fill, not a product: what padding holds may not be finite.
            Some(valid) => per_token.clone().mask_fill(valid.unset(&per_token.device()), 0.0),
            None => per_token,
        };
        counted.sum_dim(0)
    }
}

/// `H(p) = −Σ p ln p` of each row, `[N, E] -> [N, 1]`.
pub(crate) fn entropy(probs: Tensor<2>) -> Tensor<2> {
    // 0 · ln 0 is 0: the clamp keeps the logarithm finite, and above what a device may flush to zero.
    (probs.clone() * probs.clamp_min(1e-30).log()).sum_dim(1).neg()
}
