//! Auxiliary losses of both towers, weighted apart.

use burn::config::Config;
use burn::tensor::Tensor;

use crate::{
    loss::{AuxiliaryLoss, AuxiliaryLossConfig, AuxiliaryLossOutput},
    routing::{BatchTotals, Routing},
    support::error::{ConfigError, expect_valid},
};

/// Weights of the auxiliary losses, images and texts apart: a modality may need another balance, or LIMoE's entropies
/// ([arXiv 2206.02770](https://arxiv.org/abs/2206.02770), section 2.2) alone.
#[derive(Config, Debug, PartialEq)]
pub struct ClipAuxiliaryLossConfig {
    /// The vision tower's. Default: [`AuxiliaryLossConfig::new`]
    #[config(default = "AuxiliaryLossConfig::new()")]
    pub image: AuxiliaryLossConfig,
    /// The text tower's. Default: [`AuxiliaryLossConfig::new`]
    #[config(default = "AuxiliaryLossConfig::new()")]
    pub text: AuxiliaryLossConfig,
}

/// The losses of both towers: each loss on each layer, averaged over all layers, weighted by the layer's tower.
#[derive(Debug, Clone, PartialEq)]
pub struct ClipAuxiliaryLoss {
    image: AuxiliaryLoss,
    text: AuxiliaryLoss,
}

/// What [`ClipAuxiliaryLoss::forward`] returns.
#[derive(Debug, Clone)]
pub struct ClipAuxiliaryLossOutput {
    /// The weighted mean over the layers of both towers, `[1]`: add it to the contrastive loss.
    pub total: Tensor<1>,
    /// Of the vision tower; `None` when it is dense.
    pub image: Option<AuxiliaryLossOutput>,
    /// Of the text tower; `None` when it is dense.
    pub text: Option<AuxiliaryLossOutput>,
}

impl ClipAuxiliaryLossConfig {
    /// The same weights for both towers.
    pub fn both(weights: AuxiliaryLossConfig) -> Self {
        Self { image: weights.clone(), text: weights }
    }

    /// Refuses weights that are negative or not finite.
    ///
    /// # Errors
    /// The first such weight, with its value.
    pub fn validate(&self) -> Result<(), ConfigError> {
        self.image.validate()?;
        self.text.validate()
    }

    /// Refuses losses that cannot be computed by micro-batches; see [`AuxiliaryLossConfig::validate_micro_batches`].
    ///
    /// # Errors
    /// The first such loss that has a weight.
    pub fn validate_micro_batches(&self) -> Result<(), ConfigError> {
        self.image.validate_micro_batches()?;
        self.text.validate_micro_batches()
    }

    /// The loss with these weights.
    ///
    /// # Panics
    /// With the text of [`validate`](Self::validate).
    pub fn init(&self) -> ClipAuxiliaryLoss {
        expect_valid(self.validate());
        ClipAuxiliaryLoss { image: self.image.init(), text: self.text.init() }
    }
}

impl ClipAuxiliaryLoss {
    /// The losses of one forward pass; `None` for a dense model.
    pub fn forward(&self, image_routings: &[Routing], text_routings: &[Routing]) -> Option<ClipAuxiliaryLossOutput> {
        let layers = image_routings.len() + text_routings.len();
        let tower = |loss: &AuxiliaryLoss, routings: &[Routing]| (!routings.is_empty()).then(|| loss.forward(routings));
        let (image, text) = (tower(&self.image, image_routings), tower(&self.text, text_routings));
        let share = |output: &Option<AuxiliaryLossOutput>, count: usize| {
            output.as_ref().map(|output| output.total.clone() * (count as f64 / layers as f64))
        };
        let total = match (share(&image, image_routings.len()), share(&text, text_routings.len())) {
            (Some(image), Some(text)) => image + text,
            (Some(one), None) | (None, Some(one)) => one,
            (None, None) => return None,
        };
        Some(ClipAuxiliaryLossOutput { total, image, text })
    }

    /// The part that a layer of a tower, images first, brings into [`forward_micro_batch`](Self::forward_micro_batch).
    #[cfg(feature = "train")]
    pub(crate) fn layer_of_micro_batch(
        &self,
        tower: usize,
        layer: usize,
        routing: &Routing,
        totals: [&BatchTotals; 2],
    ) -> Tensor<1> {
        let layers = totals.map(|totals| totals.tokens.len());
        let share = layers[tower] as f64 / layers.iter().sum::<usize>() as f64;
        [&self.image, &self.text][tower].layer_of_micro_batch(layer, routing, totals[tower]) * share
    }

    /// The part of a batch's loss that one of its micro-batches brings in, `[1]`; `None` for a dense model. The totals are of the image and the
    /// text routings of all micro-batches; see [`AuxiliaryLoss::forward_micro_batch`].
    ///
    /// # Panics
    /// As [`AuxiliaryLoss::forward_micro_batch`].
    pub fn forward_micro_batch(
        &self,
        image_routings: &[Routing],
        text_routings: &[Routing],
        [image_totals, text_totals]: [&BatchTotals; 2],
    ) -> Option<Tensor<1>> {
        let layers = image_routings.len() + text_routings.len();
        let tower = |loss: &AuxiliaryLoss, routings: &[Routing], totals: &BatchTotals| {
            let share = routings.len() as f64 / layers as f64;
            (!routings.is_empty()).then(|| loss.forward_micro_batch(routings, totals) * share)
        };
        let (image, text) = (tower(&self.image, image_routings, image_totals), tower(&self.text, text_routings, text_totals));
        match (image, text) {
            (Some(image), Some(text)) => Some(image + text),
            (one, other) => one.or(other),
        }
    }
}
