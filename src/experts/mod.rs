//! Expert feed-forward networks with stacked weights: one tensor per weight, the expert index in front.

mod activation;
mod mlp;

pub use activation::Activation;
pub use mlp::{ExpertMlp, ExpertMlpConfig};
