//! Sparse Mixture-of-Experts layers for [burn](https://burn.dev), and CLIP-UP: upcycling a trained dense CLIP into a sparse one.
//!
//! ```
//! use burn::tensor::{Device, Distribution, Tensor};
//! use burn_moe::{AuxiliaryLossConfig, MoeFeedForwardConfig};
//!
//! let device = Device::default();
//! let moe = MoeFeedForwardConfig::new(64, 256, 8).init(&device); // width, hidden width, experts
//! let x = Tensor::<3>::random([4, 10, 64], Distribution::Default, &device);
//!
//! let result = moe.forward(x.clone());
//! let y = x + result.output; // same shape
//! let auxiliary = AuxiliaryLossConfig::new().init().forward(&[result.routing]).total; // add it to the task loss
//! # assert_eq!((y.dims(), auxiliary.dims()), ([4, 10, 64], [1]));
//! ```
//!
//! # Where things are
//! - The layer: [`MoeFeedForward`], and what it is made of: [`Router`], [`AssignmentConfig`] and [`Capacity`], [`ExpertMlp`]. What it
//!   decided is a value, [`Routing`], which losses ([`AuxiliaryLoss`], [`loss`]) and statistics ([`stats`]) read. The pieces for a router of
//!   your own are in [`routing`].
//! - From dense to sparse: [`UpcycleFromDense`], for this crate's modules, burn's own feed-forward network, and yours through
//!   [`DenseFeedForward`](upcycle::DenseFeedForward); strategies, reports and the way back are in [`upcycle`].
//! - A transformer with sparse blocks: [`transformer::Encoder`]; a CLIP of two of them: `clip` (feature `clip`), its checkpoints (feature
//!   `store`), and the training recipe: `recipe` (feature `train`).
//!
//! # Guides
//! The modules of [`guide`]: notation, architecture, routing, upcycling, kernels, training. What was measured is in `docs/results.md`.
#![warn(clippy::print_stdout)]

mod assignment;
mod capacity;
mod cost;
mod dispatch;
mod error;
mod experts;
#[cfg(feature = "store")]
mod files;
pub mod finite;
pub mod loss;
mod mask;
mod moe;
mod ops;
mod param;
mod phase;
mod plan;
mod router;
pub mod routing;
mod soft_moe;
pub mod stats;
pub mod transformer;
pub mod upcycle;

#[cfg(feature = "clip")]
pub mod clip;
#[cfg(feature = "train")]
pub mod recipe;

pub use assignment::{AssignmentConfig, ExpertChoiceConfig, FillOrder, GateNormalization, TokenChoiceConfig, TokenGroups};
pub use capacity::Capacity;
pub use cost::Cost;
pub use error::ConfigError;
pub use experts::{Activation, ExpertMlp, ExpertMlpConfig, FeedForwardForm};
pub use loss::{AuxiliaryLoss, AuxiliaryLossConfig};
pub use moe::{MoeFeedForward, MoeFeedForwardConfig};
pub use router::{BalancingBias, Router, RouterConfig, RouterScore};
pub use routing::{MoeInput, MoeOutput, Routing};
pub use soft_moe::{SoftMoeFeedForward, SoftMoeFeedForwardConfig};
pub use upcycle::{UpcycleFromDense, UpcycleOptions};

/// Whether layers use this crate's kernels, and the memory that the kernels keep.
pub mod kernels {
    pub use crate::ops::{Kernels, release_idle_memory, with_kernels};
}

/// The guides of `docs/`, so that their code is compiled and run.
pub mod guide {
    /// Letters and words.
    #[doc = include_str!("../docs/notation.md")]
    pub mod notation {}
    /// How the crate is built, and why.
    #[doc = include_str!("../docs/architecture.md")]
    pub mod architecture {}
    /// Which routing option to take when.
    #[doc = include_str!("../docs/routing.md")]
    pub mod routing {}
    /// A network of your own, upcycled, trained and saved.
    #[cfg(feature = "train")]
    #[doc = include_str!("../docs/own_model.md")]
    pub mod own_model {}
    /// Routers of your own.
    #[doc = include_str!("../docs/own_router.md")]
    pub mod own_router {}
    /// Which upcycling strategy to take when.
    #[doc = include_str!("../docs/upcycling.md")]
    pub mod upcycling {}
    /// What the layers compute with.
    #[doc = include_str!("../docs/kernels.md")]
    pub mod kernels {}
    /// Checkpoints, name by name.
    #[cfg(feature = "store")]
    #[doc = include_str!("../docs/checkpoints.md")]
    pub mod checkpoints {}
    /// From a dense CLIP to a better sparse one.
    #[cfg(feature = "train")]
    #[doc = include_str!("../docs/training.md")]
    pub mod training {}
}

#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct ReadmeDoctests;
