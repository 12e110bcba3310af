//! CLIP ([arXiv 2103.00020](https://arxiv.org/abs/2103.00020)): a vision and a text tower in one embedding space.

mod auxiliary;
mod config;
mod loss;
mod model;
mod retrieval;
mod text;
mod vision;

#[cfg(feature = "store")]
pub mod checkpoint;
#[cfg(feature = "train")]
pub mod tokenizer;

pub use auxiliary::{ClipAuxiliaryLoss, ClipAuxiliaryLossConfig, ClipAuxiliaryLossOutput};
pub use config::{ClipConfig, SparseClipConfig};
pub use loss::contrastive_loss;
pub use model::{Clip, ClipOutput, MAX_LOGIT_SCALE};
pub use retrieval::{Recall, RetrievalError, RetrievalMetrics};
pub use text::{EndOfText, TextConfig, TextOutput, TextTower};
pub use vision::{VisionConfig, VisionOutput, VisionTower};
