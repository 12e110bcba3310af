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
//!   [`DenseFeedForward`](upcycle::DenseFeedForward); strategies, reports, the way back and the way from several dense models to one sparse
//!   model are in [`upcycle`].
//! - A transformer with sparse blocks: [`transformer::Encoder`]; a CLIP of two of them: `clip` (feature `clip`), its checkpoints (feature
//!   `store`), and the training recipe: `train` (feature `train`).
//!
//! # Guides
//! See [`guide`]: `own_model`, `own_router`, `routing`, `upcycling`, `training` and others. Measurements are in the file `docs/results.md` of the
//! repository and of the package.
//!
//! # Cargo features
//! - `flex` (default): burn's CPU backend, and this crate's kernels for it.
//! - `wgpu`, `vulkan`, `metal`, `cuda`, `webgpu`: burn's GPU backends, and this crate's kernels for them; `fusion` beside one of them.
//! - `clip` (default): CLIP's towers. `store` (default): checkpoints, and layers of published language models (`language_models`).
//! - `train` (default): the training recipe and its data; it includes `preprocess`: images, texts, lists and evaluation.
//! - `mpi`: training by several processes.
#![warn(clippy::print_stdout)]

#[cfg(feature = "store")]
mod checkpoint;
#[cfg(feature = "store")]
pub mod language_models;
mod layer;
pub mod loss;
mod ops;
pub mod routing;
pub mod stats;
mod support;
pub mod transformer;
pub mod upcycle;

#[cfg(feature = "clip")]
pub mod clip;
#[cfg(feature = "train")]
pub mod train;

pub use layer::experts::{Activation, ExpertMlp, ExpertMlpConfig, ExpertOptions, FeedForwardForm};
pub use layer::lora::{ExpertLora, LoraOptions};
pub use layer::moe::{MoeFeedForward, MoeFeedForwardConfig};
#[cfg(feature = "flex")]
pub use layer::packed::{PackedWeight, pack_weights};
pub use layer::soft_moe::{SoftMoeFeedForward, SoftMoeFeedForwardConfig, SoftMoeOutput};
pub use loss::{AuxiliaryLoss, AuxiliaryLossConfig};
pub use ops::Precision;
pub use routing::assignment::{
    AssignmentConfig, ExpertChoiceConfig, ExpertGroups, FillOrder, GateNormalization, TokenChoiceConfig, TokenGroups,
};
pub use routing::balancing::{BalancingOptions, BalancingRule};
pub use routing::capacity::Capacity;
pub use routing::router::{Router, RouterConfig, RouterOptions, RouterScore};
pub use routing::{MoeInput, MoeOutput, Routing};
pub use support::{cost::Cost, error::ConfigError, finite};
pub use upcycle::{UpcycleFromDense, UpcycleOptions};

/// Whether layers use this crate's kernels, and the memory that the kernels keep.
pub mod kernels {
    pub use crate::ops::{Kernels, release_idle_memory, with_kernels};
}

/// The guides of `docs/`, so that their code is compiled and run.
pub mod guide {
    /// Notation: letters and terms.
    #[doc = include_str!("../docs/notation.md")]
    pub mod notation {}
    /// Architecture and design decisions.
    #[doc = include_str!("../docs/architecture.md")]
    pub mod architecture {}
    /// Routing options.
    #[doc = include_str!("../docs/routing.md")]
    pub mod routing {}
    /// Upcycling, training and saving a network of your own.
    #[cfg(feature = "train")]
    #[doc = include_str!("../docs/own_model.md")]
    pub mod own_model {}
    /// Routers of your own.
    #[doc = include_str!("../docs/own_router.md")]
    pub mod own_router {}
    /// Upcycling strategies.
    #[doc = include_str!("../docs/upcycling.md")]
    pub mod upcycling {}
    /// Kernels.
    #[doc = include_str!("../docs/kernels.md")]
    pub mod kernels {}
    /// Checkpoint formats and tensor names.
    #[cfg(feature = "store")]
    #[doc = include_str!("../docs/checkpoints.md")]
    pub mod checkpoints {}
    /// Training after upcycling.
    #[cfg(feature = "train")]
    #[doc = include_str!("../docs/training.md")]
    pub mod training {}
}

#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct ReadmeDoctests;
