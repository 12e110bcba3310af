//! Entropies: a certain choice for each token, many experts for each modality (LIMoE).

use burn::tensor::Tensor;

use crate::routing::{Routing, entropy};

/// Mean over valid tokens of the entropy of their probabilities, in nats (LIMoE, [arXiv 2206.02770](https://arxiv.org/abs/2206.02770),
/// equation 2); minimising it makes the routing more certain.
///
/// `ln E` for uniform probabilities, 0 for one-hot ones. Reads clean probabilities; call it with the routing of one modality. Zero,
/// with a zero gradient, when no token is valid. Output: `[1]`.
pub fn local_entropy_loss(routing: &Routing) -> Tensor<1> {
    routing.mean_over_valid(entropy(routing.router.clean_probs.clone())).reshape([1])
}

/// `max(0, ln n − H(mean_t probs_t))`, in nats: how far the experts of one modality are from being used like `n` equal ones (LIMoE,
/// [arXiv 2206.02770](https://arxiv.org/abs/2206.02770), equation 4).
///
/// 0 when `num_experts_to_use` or more are used evenly. Reads clean probabilities; call it with the routing of one modality. Zero, with a
/// zero gradient, when no token counts. Output: `[1]`.
pub fn global_entropy_loss(routing: &Routing, num_experts_to_use: f64) -> Tensor<1> {
    let mean = routing.mean_over_valid(routing.router.clean_probs.clone());
    let no_token = mean.clone().sum_dim(1).equal_elem(0.0);
    entropy(mean).neg().add_scalar(num_experts_to_use.ln()).clamp_min(0.0).mask_fill(no_token, 0.0).reshape([1])
}
