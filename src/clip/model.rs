//! The two towers together.

use burn::module::{Module, Param};
use burn::tensor::{Device, Int, Tensor};

use super::{ClipConfig, TextOutput, TextTower, VisionOutput, VisionTower};
use crate::{
    routing::{BatchTotals, Routing},
    support::{error::expect_valid, param::with_value},
};

/// ln 100: similarities are scaled by at most 100 (CLIP, section 2.5).
pub const MAX_LOGIT_SCALE: f64 = 4.605170185988092;

/// A CLIP, dense or sparse: which blocks are sparse is a matter of its configuration.
#[derive(Module, Debug)]
pub struct Clip {
    /// Embeds images.
    pub vision: VisionTower,
    /// Embeds texts.
    pub text: TextTower,
    /// Logarithm of the factor on cosine similarities, `[1]`.
    pub logit_scale: Param<Tensor<1>>,
}

/// What a [`Clip`] returns for `B` images and `B'` texts.
#[derive(Debug, Clone)]
pub struct ClipOutput {
    /// Normalised, `[B, P]`.
    pub image_embeds: Tensor<2>,
    /// Normalised, `[B', P]`.
    pub text_embeds: Tensor<2>,
    /// Scaled cosine similarities, images by texts, `[B, B']`.
    pub logits_per_image: Tensor<2>,
    /// One per routed block of the vision tower.
    pub image_routings: Vec<Routing>,
    /// One per routed block of the text tower.
    pub text_routings: Vec<Routing>,
}

impl ClipConfig {
    /// A new model.
    ///
    /// # Panics
    /// With the text of [`validate`](Self::validate).
    pub fn init(&self, device: &Device) -> Clip {
        expect_valid(self.validate());
        Clip {
            vision: self.vision.init(self.embed_dim, device),
            text: self.text.init(self.embed_dim, device),
            logit_scale: Param::from_tensor(Tensor::full([1], self.logit_scale_init, device)),
        }
    }
}

impl Clip {
    /// Embeds images, `[B, channels, image_size, image_size] -> [B, P]`; not normalised.
    ///
    /// # Panics
    /// When the images do not have the size the tower was made for.
    pub fn encode_image(&self, images: Tensor<4>) -> VisionOutput {
        self.vision.forward(images)
    }

    /// Embeds texts, `[B, N] -> [B, P]`, from token ids; not normalised.
    ///
    /// # Panics
    /// When texts are longer than the tower's context.
    pub fn encode_text(&self, tokens: Tensor<2, Int>) -> TextOutput {
        self.text.forward(tokens)
    }

    /// Compares images with texts.
    ///
    /// # Shapes
    /// - images: `[B, channels, image_size, image_size]`
    /// - tokens: `[B', N]`
    /// - logits_per_image: `[B, B']`
    ///
    /// # Panics
    /// When a shape does not fit its tower.
    pub fn forward(&self, images: Tensor<4>, tokens: Tensor<2, Int>) -> ClipOutput {
        self.compare(self.encode_image(images), self.encode_text(tokens))
    }

    /// Scaled similarities and normalised embeddings of what the towers returned: what [`forward`](Self::forward) ends with, for towers that you
    /// ran yourself, with routers of your own for instance: of `B` images and `B'` texts.
    pub fn compare(&self, image: VisionOutput, text: TextOutput) -> ClipOutput {
        let (image_embeds, text_embeds) = (normalize(image.embedding), normalize(text.embedding));
        let logits_per_image = image_embeds.clone().matmul(text_embeds.clone().transpose()) * self.scale().unsqueeze();
        ClipOutput { image_embeds, text_embeds, logits_per_image, image_routings: image.routings, text_routings: text.routings }
    }

    /// The factor on cosine similarities, `[1]`: at most 100 when [`clamp_logit_scale`](Self::clamp_logit_scale) follows each step.
    pub fn scale(&self) -> Tensor<1> {
        self.logit_scale.val().exp()
    }

    /// Moves the balancing biases of both towers by what one training step routed; see
    /// [`BalancingOptions`](crate::BalancingOptions).
    ///
    /// # Panics
    /// When a tower does not have as many routed blocks as there are routings of it.
    pub fn update_balancing_bias(mut self, image_routings: &[Routing], text_routings: &[Routing]) -> Self {
        self.vision.encoder = self.vision.encoder.update_balancing_bias(image_routings);
        self.text.encoder = self.text.encoder.update_balancing_bias(text_routings);
        self
    }

    /// The same by what the micro-batches of one training step routed together, images and texts.
    ///
    /// # Panics
    /// When the totals are not of as many layers as there are routed blocks.
    pub fn update_balancing_bias_by(mut self, [image_totals, text_totals]: [&BatchTotals; 2]) -> Self {
        self.vision.encoder = self.vision.encoder.update_balancing_bias_by(image_totals);
        self.text.encoder = self.text.encoder.update_balancing_bias_by(text_totals);
        self
    }

    /// Brings a logit scale that a training step has moved too far back to ln 100.
    pub fn clamp_logit_scale(mut self) -> Self {
        self.logit_scale = with_value(self.logit_scale, |scale| scale.clamp_max(MAX_LOGIT_SCALE));
        self
    }
}

/// Rows of length 1, `[N, P] -> [N, P]`; a zero row stays zero.
pub fn normalize(x: Tensor<2>) -> Tensor<2> {
    // Clamped before the root, whose gradient at zero is infinite.
    let norm = x.clone().square().sum_dim(1).clamp_min(1e-24).sqrt();
    x / norm
}
