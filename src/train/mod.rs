//! CLIP-UP's recipe: take a dense CLIP, upcycle it, train it a little further, and see what it gained.
//!
//! Paper: [arXiv 2502.00965](https://arxiv.org/abs/2502.00965). The loop trains any number of models side by side on the same
//! batches, so that a dense model trained on and its sparse twin differ in nothing else.

mod bootstrap;
pub mod data;
mod evaluate;
mod log;
mod optimizer;
mod random;
pub mod ranks;
mod recipe;
mod report;
mod schedule;
mod state;
pub mod stream;
mod vocabulary;

pub use bootstrap::{PairedBootstrap, paired_bootstrap};
pub use evaluate::{Evaluation, LayerStats, evaluate};
pub use log::JsonLog;
pub use optimizer::{OptimizerConfig, RateFactors};
pub use recipe::{
    Arm, Checkpointing, KeptRun, LayerLoad, Observer, StepReport, Tower, TrainConfig, TrainData, TrainError, TrainInput,
    TrainPrecision, TrainedArm, train,
};
pub use report::html_report;
pub use schedule::WarmupCosine;
pub use state::OptimizerState;
pub use vocabulary::CompactVocabulary;
