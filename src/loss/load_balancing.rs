//! Keeps the experts evenly loaded.

use burn::tensor::{Tensor, TensorData};

use crate::routing::Routing;

/// `E · Σ_e f_e · P_e` (Switch Transformer, [arXiv 2101.03961](https://arxiv.org/abs/2101.03961), equation 4; GShard; axlearn).
///
/// `f_e` is the share of all asked choices, before drops, that name expert `e`, and has no gradient; `P_e` is the mean
/// probability of `e` over valid tokens. 1 at perfect balance, `E` when every choice and all probability is on one expert
/// (`K = 1`). Zero, with a zero gradient, when no token is valid. Output: `[1]`.
pub fn load_balancing_loss(routing: &Routing) -> Tensor<1> {
    let num_experts = routing.plan.num_experts();
    let asked = routing.plan.asked();
    let total = asked.iter().sum::<usize>().max(1) as f32;
    let share: Vec<f32> = asked.iter().map(|&asked| asked as f32 / total).collect();
    let share = Tensor::<2>::from_data(TensorData::new(share, [1, num_experts]), &routing.probs.device());
    let mean_probs = routing.mean_over_valid(routing.probs.clone());
    (share * mean_probs).sum() * num_experts as f64
}
