//! The pre-norm transformer that both CLIP towers are made of, with sparse blocks where the configuration says so.

mod attention;
mod block;
mod config;
mod encoder;
mod layout;
mod mlp;
#[cfg(feature = "train")]
mod recompute;
mod rotary;
mod sparse;

#[cfg(feature = "clip")]
pub(crate) use attention::attention_of_one;
pub use block::{BlockRouter, BlockTokens, FeedForward, TokenMarks, TransformerBlock};
pub use config::EncoderConfig;
pub use encoder::{Encoder, EncoderOutput, FeedForwardInputs};
pub use mlp::{Mlp, MlpConfig};
#[cfg(feature = "train")]
pub(crate) use recompute::{KeptInputs, Part};
pub use rotary::{RotaryPositions, TokenGrid};
pub use sparse::{BlockSelection, Padding, Protection, RoutedLayerConfig, SparseEncoderConfig, SparseLayer};
