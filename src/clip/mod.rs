//! CLIP ([arXiv 2103.00020](https://arxiv.org/abs/2103.00020)): a vision and a text tower in one embedding space.

mod auxiliary;
mod config;
mod image;
mod lora;
mod loss;
mod memory;
mod model;
mod moe_vie;
mod pooling;
mod retrieval;
mod text;
mod vision;
mod zero_shot;

#[cfg(feature = "store")]
pub mod checkpoint;
#[cfg(feature = "preprocess")]
mod embed;
#[cfg(feature = "preprocess")]
pub mod lists;
#[cfg(feature = "preprocess")]
pub mod preprocess;
#[cfg(feature = "preprocess")]
pub mod tokenizer;

pub use auxiliary::{ClipAuxiliaryLoss, ClipAuxiliaryLossConfig, ClipAuxiliaryLossOutput};
pub use config::{ClipConfig, SparseClipConfig};
#[cfg(feature = "preprocess")]
pub use embed::{ImageEmbedder, ImageEmbeddings, PromptError, TextEmbedder, TextEmbeddings};
pub use image::{IMAGE_MEAN, IMAGE_STD, ImagePreprocessing, Interpolation, ResizeMode};
pub use loss::{contrastive_loss, contrastive_loss_of_rows};
pub use memory::ClipMemory;
pub use model::{Clip, ClipOutput, MAX_LOGIT_SCALE, normalize};
pub use pooling::{AttentionPooling, Pooling};
pub use retrieval::{Recall, RetrievalError, RetrievalMetrics};
pub use text::{EndOfText, TextConfig, TextOutput, TextTower, TokenizerKind};
pub use vision::{VisionConfig, VisionOutput, VisionTower};
pub use zero_shot::{ZeroShotClassifier, ZeroShotMetrics};
