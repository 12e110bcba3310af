//! Expert feed-forward networks with stacked weights: one tensor per weight, the expert index in front.

mod mlp;

pub use crate::ops::Activation;
pub use mlp::{ExpertMlp, ExpertMlpConfig, FeedForwardForm};
