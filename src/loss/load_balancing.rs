//! Keeps the experts evenly loaded.

use burn::tensor::Tensor;

use crate::routing::Routing;

/// `E · Σ_e f_e · P_e` (Switch Transformer, [arXiv 2101.03961](https://arxiv.org/abs/2101.03961), equation 4; GShard; axlearn).
///
/// `f_e` is the share of all requested choices, before drops, that name expert `e`, and has no gradient; `P_e` is the mean
/// probability of `e` over valid tokens. 1 at perfect balance, `E` when every choice and all probability is on one expert
/// (`K = 1`). Zero, with a zero gradient, when no token is valid. Output: `[1]`.
pub fn load_balancing_loss(routing: &Routing) -> Tensor<1> {
    with_share(routing, own_share(routing))
}

/// The shares `f [1, E]` of this routing.
pub(super) fn own_share(routing: &Routing) -> Tensor<2> {
    routing.plan.requested_share(&routing.router.probs.device())
}

/// The same with the shares `f [1, E]` of a batch that the routing is a part of.
pub(super) fn with_share(routing: &Routing, share: Tensor<2>) -> Tensor<1> {
    let mean_probs = routing.mean_over_valid(routing.router.probs.clone());
    (share * mean_probs).sum() * routing.plan.num_experts() as f64
}
