//! Auxiliary losses over [`Routing`]; usable with any layer that makes one.

mod auxiliary;
mod load_balancing;
mod router_z;

pub use auxiliary::{AuxiliaryLoss, AuxiliaryLossConfig, AuxiliaryLossOutput, LossTerm};
pub use load_balancing::load_balancing_loss;
pub use router_z::router_z_loss;
