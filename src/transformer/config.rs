//! Sizes and options of a stack of blocks.

use burn::config::Config;
use burn::nn::attention::MultiHeadAttentionConfig;
use burn::nn::{LayerNorm, LayerNormConfig};
use burn::tensor::Device;

use super::{
    Encoder, FeedForward, MlpConfig, Padding, Protection, RotaryPositions, SparseEncoderConfig, SparseLayer, TransformerBlock,
};
use crate::{
    layer::{
        experts::{Activation, ExpertOptions, FeedForwardForm},
        moe::MoeFeedForwardConfig,
        soft_moe::SoftMoeFeedForwardConfig,
    },
    support::{
        cost::Cost,
        error::{ConfigError, expect_valid},
    },
};

/// Configuration of an [`Encoder`].
#[derive(Config, Debug)]
pub struct EncoderConfig {
    /// Token width, `D`.
    pub d_model: usize,
    /// Attention heads; must divide `d_model`.
    pub n_heads: usize,
    /// Number of blocks.
    pub n_layers: usize,
    /// Hidden width of the feed-forward networks, `F`.
    pub d_ff: usize,
    /// Non-linearity of the feed-forward networks. Default: `Gelu`
    #[config(default = "Activation::Gelu")]
    pub activation: Activation,
    /// Plain or gated feed-forward networks, each map with a bias. Experts follow unless they say otherwise. Default: `Plain`
    #[config(default = "FeedForwardForm::Plain")]
    pub form: FeedForwardForm,
    /// Rotary positions in each attention, for tokens in a grid ([`TokenMarks::grid`](super::TokenMarks::grid)). Default: none
    pub rotary: Option<RotaryPositions>,
    /// Added to the variance in layer norms. Default: 1e-5
    #[config(default = 1e-5)]
    pub norm_epsilon: f64,
    /// The sparse blocks. Default: none
    pub sparse: Option<SparseEncoderConfig>,
}

impl EncoderConfig {
    /// Refuses what no encoder can be built from.
    ///
    /// # Errors
    /// The first field that cannot be used, with its value.
    pub fn validate(&self) -> Result<(), ConfigError> {
        for (field, value) in
            [("d_model", self.d_model), ("n_heads", self.n_heads), ("n_layers", self.n_layers), ("d_ff", self.d_ff)]
        {
            ConfigError::non_zero(field, value)?;
        }
        if !self.d_model.is_multiple_of(self.n_heads) {
            return Err(ConfigError::NotDivisible {
                field: "d_model",
                value: self.d_model,
                divisor: "n_heads",
                divisor_value: self.n_heads,
            });
        }
        if !(self.norm_epsilon.is_finite() && self.norm_epsilon >= 0.0) {
            let reason = "it must be finite and not negative";
            return Err(ConfigError::OutOfRange { field: "norm_epsilon", value: self.norm_epsilon, reason });
        }
        if let Some(rotary) = &self.rotary {
            rotary.validate(self.d_model / self.n_heads)?;
        }
        self.dense_feed_forward().validate()?;
        if let Some(sparse) = &self.sparse {
            sparse.blocks.validate(self.n_layers)?;
            self.sparse_feed_forward(sparse).validate()?;
        }
        Ok(())
    }

    /// New blocks.
    ///
    /// # Panics
    /// With the text of [`validate`](Self::validate).
    pub fn init(&self, device: &Device) -> Encoder {
        expect_valid(self.validate());
        let protection = match self.sparse.as_ref().map(|sparse| &sparse.layer) {
            Some(SparseLayer::Routed(routed)) => routed.protection,
            _ => Protection::None,
        };
        let padding = self.sparse.as_ref().map_or(Padding::Excluded, |sparse| sparse.padding);
        Encoder { blocks: (0..self.n_layers).map(|index| self.init_block(index, device)).collect(), protection, padding }
    }

    /// The sparse settings of block `index`, if it is sparse.
    pub fn sparse_block(&self, index: usize) -> Option<&SparseEncoderConfig> {
        self.sparse.as_ref().filter(|sparse| sparse.blocks.contains(index, self.n_layers))
    }

    /// The form of the experts of a sparse block.
    pub(crate) fn form_of_experts(&self, sparse: &SparseEncoderConfig) -> FeedForwardForm {
        sparse.form.unwrap_or(self.form)
    }

    fn dense_feed_forward(&self) -> MlpConfig {
        MlpConfig::new(self.d_model, self.d_ff).with_activation(self.activation).with_form(self.form)
    }

    fn feed_forward(&self, index: usize) -> FeedForwardConfig {
        match self.sparse_block(index) {
            None => FeedForwardConfig::Dense(self.dense_feed_forward()),
            Some(sparse) => self.sparse_feed_forward(sparse),
        }
    }

    /// Expert choice over the whole batch becomes expert choice in each sample, so that a result does not depend on the rest of the batch.
    fn sparse_feed_forward(&self, sparse: &SparseEncoderConfig) -> FeedForwardConfig {
        let (d_ff, num_experts) = (sparse.d_ff.unwrap_or(self.d_ff), sparse.num_experts);
        let experts =
            ExpertOptions::new().with_form(self.form_of_experts(sparse)).with_activation(self.activation).with_bias(sparse.bias);
        match &sparse.layer {
            SparseLayer::Routed(routed) => FeedForwardConfig::Moe(
                MoeFeedForwardConfig::new(self.d_model, d_ff, num_experts)
                    .with_router(routed.router.clone())
                    .with_assignment(routed.assignment.clone().independent_of_batch())
                    .with_experts(experts)
                    .with_shared_expert(routed.shared_expert)
                    .with_shared_expert_gate(routed.shared_expert_gate),
            ),
            SparseLayer::Soft { slots_per_expert } => FeedForwardConfig::SoftMoe(
                SoftMoeFeedForwardConfig::new(self.d_model, d_ff, num_experts)
                    .with_slots_per_expert(*slots_per_expert)
                    .with_experts(experts),
            ),
        }
    }

    /// Cost for one sample of `num_tokens` tokens; both attention products counted in full, causal or not.
    pub fn cost(&self, num_tokens: usize) -> Cost {
        let d = self.d_model;
        let products = Cost { flops: 4 * (num_tokens * num_tokens * d) as u64, ..Cost::default() };
        let attention = (0..4).map(|_| Cost::linear(num_tokens, d, d, true)).sum::<Cost>() + products;
        (0..self.n_layers).map(|index| attention + self.feed_forward(index).cost(num_tokens) + Cost::params(4 * d)).sum()
    }

    fn init_block(&self, index: usize, device: &Device) -> TransformerBlock {
        let norm = || -> LayerNorm { LayerNormConfig::new(self.d_model).with_epsilon(self.norm_epsilon).init(device) };
        TransformerBlock {
            norm_attention: norm(),
            attention: MultiHeadAttentionConfig::new(self.d_model, self.n_heads).with_dropout(0.0).init(device),
            norm_feed_forward: norm(),
            feed_forward: self.feed_forward(index).init(device),
            rotary: self.rotary,
        }
    }
}

/// The feed-forward network of one block.
enum FeedForwardConfig {
    Dense(MlpConfig),
    Moe(MoeFeedForwardConfig),
    SoftMoe(SoftMoeFeedForwardConfig),
}

impl FeedForwardConfig {
    fn validate(&self) -> Result<(), ConfigError> {
        match self {
            Self::Dense(config) => config.validate(),
            Self::Moe(config) => config.validate(),
            Self::SoftMoe(config) => config.validate(),
        }
    }

    fn cost(&self, num_tokens: usize) -> Cost {
        match self {
            Self::Dense(config) => config.cost(num_tokens),
            Self::Moe(config) => config.cost(num_tokens),
            Self::SoftMoe(config) => config.cost(num_tokens),
        }
    }

    fn init(&self, device: &Device) -> FeedForward {
        match self {
            Self::Dense(config) => FeedForward::Dense(config.init(device)),
            Self::Moe(config) => FeedForward::Moe(config.init(device)),
            Self::SoftMoe(config) => FeedForward::SoftMoe(config.init(device)),
        }
    }
}
