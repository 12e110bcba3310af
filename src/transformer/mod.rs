//! The pre-norm transformer that both CLIP towers are made of, with sparse blocks where the configuration says so.

mod attention;
mod block;
mod encoder;
mod layout;
mod mlp;
#[cfg(feature = "train")]
mod recompute;
mod sparse;

pub use block::{BlockRouter, BlockTokens, FeedForward, TokenMarks, TransformerBlock};
pub use encoder::{Encoder, EncoderConfig, EncoderOutput, FeedForwardInputs};
pub use mlp::{Mlp, MlpConfig};
#[cfg(feature = "train")]
pub(crate) use recompute::{KeptInputs, Part};
pub use sparse::{BlockSelection, Padding, Protection, RoutedLayerConfig, SparseEncoderConfig, SparseLayer};
