//! Keeps router logits small.

use burn::tensor::Tensor;

use crate::routing::{
    Routing,
    router::{RouterOutput, RouterScore},
};

/// Mean over valid tokens of `logsumexp(logits)²` (ST-MoE, [arXiv 2202.08906](https://arxiv.org/abs/2202.08906), equation 5).
///
/// `(ln E)²` for zero logits. Zero, with a zero gradient, when no token is valid. Output: `[1]`.
///
/// # Panics
/// With sigmoid scores: the loss is defined for a softmax.
pub fn router_z_loss(routing: &Routing) -> Tensor<1> {
    let RouterOutput { clean_logits: logits, score, .. } = &routing.router;
    assert_eq!(*score, RouterScore::Softmax, "the router z-loss is about a softmax; it has no meaning for other scores");
    // The maximum only keeps `exp` in range; the value does not depend on it, so neither does the gradient.
    let max = logits.clone().detach().max_dim(1);
    let log_z = (logits.clone() - max.clone()).exp().sum_dim(1).log() + max;
    routing.mean_over_valid(log_z.square()).reshape([1])
}
