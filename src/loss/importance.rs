//! Evens out how much probability each expert gets.

use burn::tensor::Tensor;

use super::squared_variation;
use crate::routing::Routing;

/// `Var(I) / Mean(I)²` over experts, with the importance `I_e = Σ_t probs[t, e]` over valid tokens and the population variance (Shazeer
/// et al., [arXiv 1701.06538](https://arxiv.org/abs/1701.06538), equation 6; V-MoE, [arXiv 2106.05974](https://arxiv.org/abs/2106.05974),
/// appendix A).
///
/// 0 at perfect balance, `E − 1` when all probability goes to one expert. Reads clean probabilities. Zero, with a zero gradient, when
/// no token is valid. Output: `[1]`.
pub fn importance_loss(routing: &Routing) -> Tensor<1> {
    squared_variation(routing.mean_over_valid(routing.router.clean_probs.clone()))
}
