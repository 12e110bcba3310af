//! Which blocks are sparse, and how.

use burn::config::Config;
use serde::{Deserialize, Serialize};

use crate::{
    layer::experts::FeedForwardForm,
    routing::{assignment::AssignmentConfig, router::RouterOptions},
    support::error::ConfigError,
};

/// A choice of blocks, by index from 0.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum BlockSelection {
    /// Every `n`-th block: `EveryNth(2)` is 1, 3, 5, … (CLIP-UP).
    EveryNth(usize),
    /// The last `n` blocks.
    Last(usize),
    /// Exactly these.
    List(Vec<usize>),
}

impl BlockSelection {
    /// Refuses what an encoder of `num_layers` blocks cannot have.
    ///
    /// # Errors
    /// A step of zero, and blocks that do not exist.
    pub fn validate(&self, num_layers: usize) -> Result<(), ConfigError> {
        let missing = match self {
            Self::EveryNth(n) => return ConfigError::non_zero("every_nth", *n),
            Self::Last(n) => n.checked_sub(1).filter(|_| *n > num_layers),
            Self::List(list) => list.iter().copied().find(|index| *index >= num_layers),
        };
        missing.map_or(Ok(()), |index| Err(ConfigError::NoSuchBlock { index, num_layers }))
    }

    /// Whether block `index` of `num_layers` is chosen.
    pub fn contains(&self, index: usize, num_layers: usize) -> bool {
        match self {
            Self::EveryNth(n) => (index + 1).is_multiple_of(*n),
            Self::Last(n) => index + n >= num_layers,
            Self::List(list) => list.contains(&index),
        }
    }
}

/// The sparse blocks of one encoder. Width, activation and, unless given, hidden width and form are the encoder's.
#[derive(Config, Debug)]
pub struct SparseEncoderConfig {
    /// Which blocks. Default: `EveryNth(2)`
    #[config(default = "BlockSelection::EveryNth(2)")]
    pub blocks: BlockSelection,
    /// Number of experts, `E`. Default: 8
    #[config(default = 8)]
    pub num_experts: usize,
    /// Hidden width of each expert, `F`. Default: that of the encoder
    pub d_ff: Option<usize>,
    /// Plain or gated experts. Default: as the encoder's dense networks
    pub form: Option<FeedForwardForm>,
    /// Whether the maps of experts, a shared one included, have biases. Default: true
    #[config(default = true)]
    pub bias: bool,
    /// How tokens reach the experts. Default: `Routed`, with [`RoutedLayerConfig::new`]
    #[config(default = "SparseLayer::default()")]
    pub layer: SparseLayer,
    /// Whether padding takes part. Default: `Excluded`
    #[config(default = "Padding::Excluded")]
    pub padding: Padding,
}

/// How tokens reach the experts of a sparse block.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[allow(clippy::large_enum_variant)] // one for each encoder
pub enum SparseLayer {
    /// Each token is computed by some experts: a [`MoeFeedForward`](crate::MoeFeedForward).
    Routed(RoutedLayerConfig),
    /// Every expert computes mixtures of the tokens of each sample: a [`SoftMoeFeedForward`](crate::SoftMoeFeedForward). In a causal tower,
    /// tokens then depend on later tokens; a CLIP's text embedding, which is computed from its last token, does not suffer from this.
    Soft {
        /// Slots of each expert for one sample, `S`.
        slots_per_expert: usize,
    },
}

impl Default for SparseLayer {
    fn default() -> Self {
        Self::Routed(RoutedLayerConfig::new())
    }
}

impl From<RoutedLayerConfig> for SparseLayer {
    fn from(config: RoutedLayerConfig) -> Self {
        Self::Routed(config)
    }
}

/// The routing of the sparse blocks of one encoder.
#[derive(Config, Debug)]
pub struct RoutedLayerConfig {
    /// The router. Default: [`RouterOptions::new`]
    #[config(default = "RouterOptions::new()")]
    pub router: RouterOptions,
    /// Which experts compute which tokens. Default: top-2 token choice
    #[config(default = "AssignmentConfig::default()")]
    pub assignment: AssignmentConfig,
    /// Hidden width of an expert that every valid token passes. Default: none
    pub shared_expert: Option<usize>,
    /// Whether the shared expert has a gate of its own; see [`MoeFeedForwardConfig::shared_expert_gate`](crate::MoeFeedForwardConfig::shared_expert_gate).
    /// Default: false
    #[config(default = false)]
    pub shared_expert_gate: bool,
    /// Whether tokens marked as protected get their slots before all others. Default: `Pooled`
    #[config(default = "Protection::Pooled")]
    pub protection: Protection,
}

/// What happens to padding in sparse blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Padding {
    /// It gets no expert and counts in no loss.
    Excluded,
    /// It is routed like any token, as most other implementations do; to compare.
    Routed,
}

/// Tokens that get their slots before all others, where tokens choose their experts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Protection {
    /// The token whose output is the embedding: a CLIP's class token, and the end of its texts.
    Pooled,
    /// None.
    None,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chosen(blocks: BlockSelection, num_layers: usize) -> Vec<usize> {
        (0..num_layers).filter(|&i| blocks.contains(i, num_layers)).collect()
    }

    #[test]
    fn every_second_block_starts_at_index_one() {
        assert_eq!(chosen(BlockSelection::EveryNth(2), 6), [1, 3, 5]);
        assert_eq!(chosen(BlockSelection::EveryNth(1), 3), [0, 1, 2]);
        assert_eq!(chosen(BlockSelection::Last(2), 5), [3, 4]);
        assert_eq!(chosen(BlockSelection::List(vec![0, 4]), 5), [0, 4]);
    }

    #[test]
    fn blocks_that_do_not_exist_are_refused() {
        let text = |blocks: BlockSelection| blocks.validate(3).unwrap_err().to_string();
        assert_eq!(text(BlockSelection::EveryNth(0)), "`every_nth` must be at least 1, got 0");
        assert_eq!(text(BlockSelection::List(vec![1, 7])), "block 7 is named sparse, but the encoder has 3 blocks");
        assert_eq!(text(BlockSelection::Last(4)), "block 3 is named sparse, but the encoder has 3 blocks");
        assert_eq!(BlockSelection::Last(3).validate(3), Ok(()));
    }
}
