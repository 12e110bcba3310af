//! Evens out how likely each expert is to be chosen.

use burn::tensor::{Int, Tensor, TensorData};

use super::squared_variation;
use crate::routing::{Routing, router::RouterOutput};

/// `Var(L) / Mean(L)²` over experts, with the load `L_e = Σ_t 1 − Φ((θ_t − logit[t, e]) / σ)`: the probability that expert `e` is
/// chosen when its noise is drawn anew (`Φ` is the normal distribution function). `θ_t` is the `K`-th largest noisy logit, `σ` the standard deviation of the noise (V-MoE,
/// [arXiv 2106.05974](https://arxiv.org/abs/2106.05974), appendix A).
///
/// For token choice among all experts by their scores, where `K` is the plan's choices per token: what a balancing bias and groups of experts change is not in it. 0 at perfect balance. Zero, with a zero gradient, when no token is valid.
/// Output: `[1]`.
///
/// # Panics
/// Without noise, as outside of training (the load is then a count, which has no gradient), and when a token has as many choices as there are
/// experts or more, as with expert choice.
pub fn load_loss(routing: &Routing) -> Tensor<1> {
    let RouterOutput { logits, clean_logits, noise_std, .. } = &routing.router;
    let std = noise_std.expect("the load loss needs router noise: `RouterOptions::noise` above 0, in training");
    let [num_tokens, num_experts] = logits.dims();
    let top_k = routing.plan.num_choices();
    assert!(
        top_k < num_experts,
        "the load loss is for tokens that choose some of the experts, but this plan has {top_k} choices of each token among {num_experts} \
         experts"
    );
    // Where the K-th largest is, on the host like all choices; its value keeps its gradient.
    let values: Vec<f32> = logits.clone().detach().try_into_vec_as().expect("logits are f32");
    let kth: Vec<i32> = values
        .chunks_exact(num_experts)
        .map(|logits| {
            let mut order: Vec<usize> = (0..num_experts).collect();
            order.sort_by(|&a, &b| logits[b].total_cmp(&logits[a]));
            order[top_k - 1] as i32
        })
        .collect();
    let kth = Tensor::<2, Int>::from_data(TensorData::new(kth, [num_tokens, 1]), &logits.device());
    let threshold = logits.clone().gather(1, kth);
    let short_of = (threshold - clean_logits.clone()) / std;
    // 1 − Φ(z) = (1 − erf(z / √2)) / 2
    let chosen = (short_of / std::f64::consts::SQRT_2).erf().neg().add_scalar(1.0) / 2.0;
    squared_variation(routing.mean_over_valid(chosen))
}
