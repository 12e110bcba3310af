//! Sizes of a CLIP, dense and sparse.

use burn::config::Config;

use super::{TextConfig, VisionConfig};
use crate::{
    layer::experts::Activation,
    support::{cost::Cost, error::ConfigError},
    transformer::{EncoderConfig, SparseEncoderConfig},
};

/// Configuration of a [`Clip`](super::Clip).
#[derive(Config, Debug)]
pub struct ClipConfig {
    /// The vision tower.
    pub vision: VisionConfig,
    /// The text tower.
    pub text: TextConfig,
    /// Width of the shared embedding space, `P`.
    pub embed_dim: usize,
    /// Where the logit scale starts, as its logarithm. Default: 2.6592, which is ln(1 / 0.07)
    #[config(default = 2.6592)]
    pub logit_scale_init: f64,
}

/// The sparse blocks of both towers; `None` leaves a tower dense.
#[derive(Config, Debug)]
pub struct SparseClipConfig {
    /// The vision tower.
    pub vision: Option<SparseEncoderConfig>,
    /// The text tower.
    pub text: Option<SparseEncoderConfig>,
}

impl SparseClipConfig {
    /// CLIP-UP's: every second block of both towers, 8 experts, top-2 ([arXiv 2502.00965](https://arxiv.org/abs/2502.00965)).
    pub fn clip_up() -> Self {
        Self { vision: Some(SparseEncoderConfig::new()), text: Some(SparseEncoderConfig::new()) }
    }
}

impl ClipConfig {
    /// ViT-B/32 with OpenAI's activation, which is DFN's too; LAION's models have [`Activation::Gelu`].
    pub fn vit_b_32() -> Self {
        Self::preset(768, 12, 32, 512, 512)
    }

    /// ViT-B/16 with OpenAI's activation.
    pub fn vit_b_16() -> Self {
        Self::preset(768, 12, 16, 512, 512)
    }

    /// ViT-L/14 with OpenAI's activation.
    pub fn vit_l_14() -> Self {
        Self::preset(1024, 24, 14, 768, 768)
    }

    /// ViT-L/14 for images of 336 pixels, with OpenAI's activation.
    pub fn vit_l_14_336() -> Self {
        let mut config = Self::vit_l_14();
        config.vision.image_size = 336;
        config
    }

    /// The preset of that name: `vit-b-32`, `vit-b-16`, `vit-l-14` or `vit-l-14-336`, and with `-gelu` behind it the same with LAION's
    /// activation; `moe-vie-b-16`, `moe-vie-l-16` or `moe-vie-h-14`.
    pub fn preset_by_name(name: &str) -> Option<Self> {
        match name {
            "moe-vie-b-16" => return Some(Self::moe_vie_b_16()),
            "moe-vie-l-16" => return Some(Self::moe_vie_l_16()),
            "moe-vie-h-14" => return Some(Self::moe_vie_h_14()),
            _ => {}
        }
        let (base, activation) = match name.strip_suffix("-gelu") {
            Some(base) => (base, Activation::Gelu),
            None => (name, Activation::QuickGelu),
        };
        let config = match base {
            "vit-b-32" => Self::vit_b_32(),
            "vit-b-16" => Self::vit_b_16(),
            "vit-l-14" => Self::vit_l_14(),
            "vit-l-14-336" => Self::vit_l_14_336(),
            _ => return None,
        };
        Some(config.activation(activation))
    }

    /// A small model for trials and tests: 32-pixel images, CLIP's own vocabulary.
    pub fn tiny() -> Self {
        let vision = VisionConfig::new(EncoderConfig::new(32, 2, 4, 128), 32, 8);
        let text = TextConfig::new(EncoderConfig::new(32, 2, 2, 128)).with_context_length(24);
        Self::new(vision, text, 64)
    }

    /// Another activation in both towers.
    pub fn activation(mut self, activation: Activation) -> Self {
        self.vision.encoder.activation = activation;
        self.text.encoder.activation = activation;
        self
    }

    /// The same model with sparse blocks.
    pub fn sparse(mut self, sparse: SparseClipConfig) -> Self {
        self.vision.encoder.sparse = sparse.vision;
        self.text.encoder.sparse = sparse.text;
        self
    }

    /// The same model without sparse blocks.
    pub fn dense(self) -> Self {
        self.sparse(SparseClipConfig::new())
    }

    /// Whether any block is sparse.
    pub fn is_sparse(&self) -> bool {
        self.vision.encoder.sparse.is_some() || self.text.encoder.sparse.is_some()
    }

    /// Refuses what no model can be built from.
    ///
    /// # Errors
    /// The first field that cannot be used, with its value.
    pub fn validate(&self) -> Result<(), ConfigError> {
        ConfigError::non_zero("embed_dim", self.embed_dim)?;
        self.vision.validate()?;
        self.text.validate()
    }

    /// Cost of one image-text pair, the text at its full context.
    pub fn cost(&self) -> Cost {
        self.vision.cost(self.embed_dim) + self.text.cost(self.embed_dim) + Cost::params(1)
    }

    fn preset(vision_width: usize, vision_layers: usize, patch_size: usize, text_width: usize, embed_dim: usize) -> Self {
        let encoder = |width: usize, layers| EncoderConfig::new(width, width / 64, layers, 4 * width);
        let vision = VisionConfig::new(encoder(vision_width, vision_layers), 224, patch_size);
        Self::new(vision, TextConfig::new(encoder(text_width, 12)), embed_dim).activation(Activation::QuickGelu)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn presets_cost_what_their_papers_say() {
        // GFLOPs per pair, dense and sparse: the table in docs/experiments.md.
        for (config, dense, sparse) in
            [(ClipConfig::vit_b_32(), 14.8, 19.55), (ClipConfig::vit_b_16(), 41.1, 54.2), (ClipConfig::vit_l_14(), 175.3, 231.48)]
        {
            let found = config.cost().gflops();
            assert!((found - dense).abs() < 0.05, "dense: {found}, expected {dense}");
            let found = config.sparse(SparseClipConfig::clip_up()).cost().gflops();
            assert!((found - sparse).abs() < 0.05, "sparse: {found}, expected {sparse}");
        }
    }
}
