//! MoE-ViE ([arXiv 2608.17402](https://arxiv.org/abs/2608.17402)): its towers, and the sizes of the published models.

use super::{ClipConfig, ImagePreprocessing, Pooling, ResizeMode, TextConfig, VisionConfig};
use crate::{
    layer::experts::{Activation, FeedForwardForm},
    routing::{
        assignment::{GateNormalization, TokenChoiceConfig},
        balancing::{BalancingOptions, BalancingRule},
        capacity::Capacity,
        router::{RouterOptions, RouterScore},
    },
    transformer::{BlockSelection, EncoderConfig, RotaryPositions, RoutedLayerConfig, SparseEncoderConfig},
};

/// The experts of a tower, in MoE-ViE's terms: `count · split − 1` experts of a `split`-th of the dense hidden width, of which a token passes `k · split − 1`, and
/// one more that every token passes.
pub(super) struct MoeVieExperts {
    pub(super) count: usize,
    pub(super) split: usize,
    pub(super) k: usize,
    pub(super) blocks: Vec<usize>,
}

impl MoeVieExperts {
    /// Experts to choose from, and choices of a token; none if there are none of both.
    pub(super) fn numbers(&self) -> Option<[usize; 2]> {
        let number = |of: usize| of.saturating_mul(self.split).checked_sub(1).filter(|number| *number > 0);
        Some([number(self.count)?, number(self.k)?])
    }

    /// For an encoder of hidden width `d_ff`.
    ///
    /// # Panics
    /// When there is nothing to choose.
    pub(super) fn config(self, d_ff: usize) -> SparseEncoderConfig {
        let [num_experts, top_k] = self.numbers().expect("there is something to choose");
        let width = d_ff.div_ceil(self.split);
        let balancing = BalancingOptions::new(0.0).with_rule(BalancingRule::ZScore);
        let router = RouterOptions::new().with_score(RouterScore::Sigmoid).with_balancing(Some(balancing));
        let gates = if top_k == 1 { GateNormalization::ConstantOne } else { GateNormalization::BeforeDrop };
        let choice = TokenChoiceConfig::new()
            .with_top_k(top_k)
            .with_gate_normalization(gates)
            .with_training_capacity(Capacity::Dropless)
            .with_inference_capacity(Capacity::Dropless);
        let layer = RoutedLayerConfig::new().with_router(router).with_assignment(choice.into()).with_shared_expert(Some(width));
        SparseEncoderConfig::new()
            .with_blocks(BlockSelection::List(self.blocks))
            .with_num_experts(num_experts)
            .with_d_ff(Some(width))
            .with_form(Some(FeedForwardForm::Gated))
            .with_bias(false)
            .with_layer(layer.into())
    }
}

/// Hidden width of a SwiGLU with about as many weights as a plain network of `ratio` times the width: two thirds of it, rounded down, and then up to a multiple of
/// 16 if it is aligned.
pub(super) fn hidden_width(width: usize, ratio: f64, aligned: bool) -> usize {
    let two_thirds = ((width as f64 * ratio) as usize).saturating_mul(2) / 3;
    if aligned { two_thirds.next_multiple_of(16) } else { two_thirds }
}

/// Blocks with SwiGLU.
pub(super) fn encoder(width: usize, heads: usize, layers: usize, d_ff: usize) -> EncoderConfig {
    EncoderConfig::new(width, heads, layers, d_ff).with_form(FeedForwardForm::Gated).with_activation(Activation::Silu)
}

/// A vision tower without class token and table of positions, and with attention pooling by `pooler_heads` heads.
pub(super) fn vision(encoder: EncoderConfig, image_size: usize, patch_size: usize, pooler_heads: usize) -> VisionConfig {
    let preprocessing = ImagePreprocessing::new().with_mean([0.5; 3]).with_std([0.5; 3]).with_resize_mode(ResizeMode::Squash);
    VisionConfig::new(encoder, image_size, patch_size)
        .with_preprocessing(preprocessing)
        .with_class_token(false)
        .with_position_table(false)
        .with_pooling(Pooling::Attention { n_heads: pooler_heads })
}

/// What a published model has of its own.
struct Published {
    /// Width and layers of the image tower, and the width of its heads.
    vision: [usize; 3],
    image_size: usize,
    patch_size: usize,
    pooler_heads: usize,
    /// Choices of a token before they are split, `k`.
    k: usize,
    /// Width and layers of the text tower, whose heads are 16.
    text: [usize; 2],
    aligned: bool,
}

impl Published {
    fn config(self) -> ClipConfig {
        let d_ff = |width| hidden_width(width, 4.0, self.aligned);
        let [width, layers, head_width] = self.vision;
        let experts = MoeVieExperts { count: 8, split: 4, k: self.k, blocks: (1..layers).collect() };
        let blocks = encoder(width, width / head_width, layers, d_ff(width))
            .with_rotary(Some(RotaryPositions::new()))
            .with_sparse(Some(experts.config(d_ff(width))));
        let vision = vision(blocks, self.image_size, self.patch_size, self.pooler_heads).with_norm_post(false);
        let [width, layers] = self.text;
        let text = TextConfig::new(encoder(width, 16, layers, d_ff(width))).with_context_length(144).with_norm_final(false);
        ClipConfig::new(vision, text, 1024)
    }
}

impl ClipConfig {
    /// MoE-ViE-B/16 for images of 224 pixels ([arXiv 2608.17402](https://arxiv.org/abs/2608.17402)): a sparse image tower with 31 experts of a quarter of the
    /// dense hidden width and one that is shared in all blocks but the first, of which a token passes 3 and the shared one; a dense text tower of 24 blocks.
    pub fn moe_vie_b_16() -> Self {
        let (vision, text) = ([768, 12, 64], [1024, 24]);
        Published { vision, image_size: 224, patch_size: 16, pooler_heads: 8, k: 1, text, aligned: false }.config()
    }

    /// MoE-ViE-L/16 for images of 384 pixels; see [`moe_vie_b_16`](Self::moe_vie_b_16).
    pub fn moe_vie_l_16() -> Self {
        let (vision, text) = ([1024, 24, 64], [1024, 24]);
        Published { vision, image_size: 384, patch_size: 16, pooler_heads: 8, k: 1, text, aligned: true }.config()
    }

    /// MoE-ViE-H/14 for images of 448 pixels, in which a token passes 7 of 31 experts; see [`moe_vie_b_16`](Self::moe_vie_b_16).
    pub fn moe_vie_h_14() -> Self {
        let (vision, text) = ([1280, 32, 80], [1408, 34]);
        Published { vision, image_size: 448, patch_size: 14, pooler_heads: 16, k: 2, text, aligned: false }.config()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hidden_widths_are_two_thirds() {
        assert_eq!([hidden_width(32, 4.0, false), hidden_width(16, 4.0, false), hidden_width(1024, 4.0, true)], [85, 42, 2736]);
        assert_eq!(hidden_width(24, 4.0, true), 64);
    }

    #[test]
    fn presets_are_valid_and_have_as_many_experts_as_the_paper_says() {
        for (config, width, top_k) in
            [(ClipConfig::moe_vie_b_16(), 512, 3), (ClipConfig::moe_vie_l_16(), 684, 3), (ClipConfig::moe_vie_h_14(), 854, 7)]
        {
            config.validate().unwrap();
            let sparse = config.vision.encoder.sparse.as_ref().unwrap();
            assert_eq!((sparse.num_experts, sparse.d_ff), (31, Some(width)));
            let crate::transformer::SparseLayer::Routed(layer) = &sparse.layer else { panic!("routed") };
            assert_eq!((layer.assignment.active_experts(31), layer.shared_expert), (top_k, Some(width)));
        }
    }
}
