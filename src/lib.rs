//! Sparse Mixture-of-Experts layers for burn.
#![warn(missing_docs)]
mod assignment;
mod capacity;
mod cost;
mod device;
mod dispatch;
mod error;
mod experts;
mod files;
mod finite;
mod loss;
mod moe;
mod ops;
mod param;
mod plan;
mod router;
mod routing;
mod stats;
mod transformer;
mod upcycle;

#[cfg(feature = "clip")]
pub mod clip;
#[cfg(feature = "train")]
pub mod recipe;

pub use assignment::{AssignmentConfig, FillOrder, GateNormalization, Phase, TokenChoiceConfig};
pub use capacity::Capacity;
pub use cost::Cost;
pub use device::{DeviceError, device_by_name};
pub use error::ConfigError;
pub use experts::{Activation, ExpertMlp, ExpertMlpConfig};
pub use files::write_atomic;
pub use finite::{NonFiniteError, check_finite, check_finite_module};
pub use loss::{AuxiliaryLoss, AuxiliaryLossConfig, AuxiliaryLossOutput, LossTerm, load_balancing_loss, router_z_loss};
pub use moe::{MoeFeedForward, MoeFeedForwardConfig, MoeInput, MoeOutput};
pub use plan::DispatchPlan;
pub use router::{Router, RouterConfig, RouterOutput};
pub use routing::Routing;
pub use stats::RoutingStats;
pub use transformer::{
    BlockSelection, Encoder, EncoderConfig, EncoderOutput, FeedForward, Mlp, MlpConfig, SparseEncoderConfig, TransformerBlock,
};
pub use upcycle::{
    DenseFeedForward, DenseWeights, Probe, UpcycleError, UpcycleFromDense, UpcycleOptions, UpcycleReport, UpcycleStrategy,
    Upcycled, UpcycledLayer,
};
