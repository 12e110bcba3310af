//! Auxiliary losses over [`Routing`](crate::Routing); usable with any layer that makes one.

mod auxiliary;
mod entropy;
mod importance;
mod load;
mod load_balancing;
mod micro_batches;
mod router_z;

use burn::tensor::Tensor;

pub use auxiliary::{AuxiliaryLoss, AuxiliaryLossConfig, AuxiliaryLossOutput, LossTerm};
pub use entropy::{global_entropy_loss, local_entropy_loss};
pub use importance::importance_loss;
pub use load::load_loss;
pub use load_balancing::load_balancing_loss;
pub use router_z::router_z_loss;

/// `Var(x) / Mean(x)²` over a row `[1, E]`, with the population variance; no root, so that the gradient at balance is 0 and not NaN.
fn squared_variation(x: Tensor<2>) -> Tensor<1> {
    let mean = x.clone().mean_dim(1);
    let variance = (x - mean.clone()).square().mean_dim(1);
    // A row of zeros (no valid token) has no variation.
    (variance / mean.square().clamp_min(1e-30)).reshape([1])
}
