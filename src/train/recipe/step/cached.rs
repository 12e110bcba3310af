//! The contrastive loss on embeddings alone.

use std::ops::Range;

use burn::optim::GradientsParams;
use burn::tensor::{DType, Tensor};

use super::{accumulate, scalar};
use crate::clip::{Clip, contrastive_loss_of_rows};

/// Logits that are there at once.
pub(super) const LOGITS: usize = 1 << 22;

/// The contrastive loss of embeddings, and its gradients.
pub(super) struct Cached {
    /// Normalised, `[B, P]`, of all ranks.
    pub(super) images: Tensor<2>,
    pub(super) texts: Tensor<2>,
    /// The part of the own rows.
    pub(super) contrastive: f64,
    /// By the loss of the own rows, on the device without autodiff.
    pub(super) image_gradients: Tensor<2>,
    pub(super) text_gradients: Tensor<2>,
    /// Of the logit scale so far.
    pub(super) gradients: GradientsParams,
}

impl Cached {
    /// Compares the pairs `own` with all.
    pub(super) fn new(model: &Clip, images: Tensor<2>, texts: Tensor<2>, own: Range<usize>) -> Self {
        let [batch, _] = images.dims();
        let rows = (LOGITS / batch).clamp(1, batch);
        let mut gradients = GradientsParams::new();
        let mut contrastive = 0.0;
        let [mut image_gradients, mut text_gradients] = [&images, &texts].map(|embeddings| embeddings.zeros_like());
        for first in own.clone().step_by(rows) {
            let rows = first..(first + rows).min(own.end);
            let scale = model.scale().cast(DType::F32);
            // What is multiplied must have one checkpointing strategy.
            let leaf = |embeddings: &Tensor<2>| {
                let leaf = Tensor::from_inner(embeddings.clone());
                match scale.gradient_checkpointing_strategy() {
                    Some(strategy) => leaf.with_gradient_checkpointing_strategy(strategy),
                    None => leaf,
                }
                .require_grad()
            };
            let leaves = [&images, &texts].map(leaf);
            let logits = |from: &Tensor<2>, to: &Tensor<2>| {
                from.clone().slice([rows.clone()]).matmul(to.clone().transpose()) * scale.clone().unsqueeze()
            };
            let [image, text] = &leaves;
            let part = contrastive_loss_of_rows(logits(image, text), logits(text, image), first);
            contrastive += scalar(&part);
            let mut found = part.backward();
            let [image, text] = leaves.map(|leaf| leaf.grad_remove(&mut found).expect("the loss depends on every embedding"));
            image_gradients = image_gradients + image;
            text_gradients = text_gradients + text;
            accumulate(model, &mut gradients, GradientsParams::from_grads(found, model));
        }
        Self { images, texts, contrastive, image_gradients, text_gradients, gradients }
    }
}
