//! What a model needs in memory, counted and not measured.

use super::{ClipConfig, Pooling};
use crate::{
    layer::experts::FeedForwardForm,
    transformer::{EncoderConfig, SparseLayer},
};

/// Bytes in f32.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize)]
pub struct ClipMemory {
    /// All parameters.
    pub weights: u64,
    /// One number per parameter, in training.
    pub gradients: u64,
    /// AdamW's two moments, in training.
    pub optimizer: u64,
    /// What the backward pass needs of one batch's forward pass: what each matrix product and norm read, attention weights, and hidden
    /// activations before and after their non-linearity; without drops.
    pub training_activations: u64,
    /// The most that one block needs at a time at inference.
    pub inference_activations: u64,
}

impl ClipMemory {
    /// Everything that training needs at a time.
    pub fn training(&self) -> u64 {
        self.weights + self.gradients + self.optimizer + self.training_activations
    }

    /// Everything that inference needs at a time.
    pub fn inference(&self) -> u64 {
        self.weights + self.inference_activations
    }
}

impl ClipConfig {
    /// Memory for batches of `batch` images and as many texts of full length.
    pub fn memory(&self, batch: usize) -> ClipMemory {
        let bytes = |numbers: u64| 4 * numbers;
        let params = self.cost().params_total;
        let (tokens, d) = (self.vision.num_tokens(), self.vision.encoder.d_model);
        let (kept, most) = activations(&self.vision.encoder, tokens);
        // Keys, values, scores and weights, and of one token what the probe saw, a norm's output and the hidden numbers twice.
        let pooling = match self.vision.pooling {
            Pooling::ClassToken => 0,
            Pooling::Attention { n_heads } => (2 * tokens * d + 2 * n_heads * tokens + 10 * d) as u64,
        };
        let towers = [(kept + pooling, most.max(pooling)), activations(&self.text.encoder, self.text.context_length)];
        let batch = batch as u64;
        ClipMemory {
            weights: bytes(params),
            gradients: bytes(params),
            optimizer: bytes(2 * params),
            training_activations: bytes(batch * towers.iter().map(|tower| tower.0).sum::<u64>()),
            // One tower after the other.
            inference_activations: bytes(batch * towers.iter().map(|tower| tower.1).max().unwrap_or(0)),
        }
    }
}

/// Hidden maps of a network: a gated one has a second.
fn maps(form: FeedForwardForm) -> usize {
    if form.is_gated() { 2 } else { 1 }
}

/// Numbers of one sample: kept by all blocks for the backward pass, and at a time in the largest block.
fn activations(encoder: &EncoderConfig, tokens: usize) -> (u64, u64) {
    let (d, heads) = (encoder.d_model, encoder.n_heads);
    // Input and output of a norm, queries, keys, values, scores and weights, context, and the sum with the residual.
    let attention = 7 * tokens * d + 2 * heads * tokens * tokens;
    let blocks = (0..encoder.n_layers).map(|index| {
        let (rows, d_ff, maps, others) = match encoder.sparse_block(index) {
            None => (tokens, encoder.d_ff, maps(encoder.form), 0),
            Some(sparse) => {
                let (rows, shared) = match &sparse.layer {
                    SparseLayer::Routed(routed) => (routed.assignment.rows(tokens, sparse.num_experts), routed.shared_expert),
                    SparseLayer::Soft { slots_per_expert } => (slots_per_expert * sparse.num_experts, None),
                };
                // A shared expert sees every token.
                let maps = maps(encoder.form_of_experts(sparse));
                let shared = shared.map_or(0, |width| tokens * (d + 2 * maps * width));
                (rows, sparse.d_ff.unwrap_or(encoder.d_ff), maps, shared + 3 * tokens * sparse.num_experts)
            }
        };
        // A norm's output, the rows that go in and come out, the hidden ones twice, and the sum.
        let feed_forward = 2 * tokens * d + 2 * rows * d + 2 * maps * rows * d_ff + others;
        ((attention + feed_forward) as u64, attention.max(feed_forward) as u64)
    });
    blocks.fold((0, 0), |(kept, most), (block, at_a_time)| (kept + block, most.max(at_a_time)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        clip::SparseClipConfig,
        transformer::{RoutedLayerConfig, SparseEncoderConfig},
    };

    #[test]
    fn more_experts_need_more_and_gates_and_shared_experts_add_to_it() {
        let dense = ClipConfig::vit_b_32();
        let of = |sparse: SparseEncoderConfig| {
            let towers = SparseClipConfig::new().with_vision(Some(sparse));
            ClipConfig::vit_b_32().sparse(towers).memory(8)
        };
        let plain = of(SparseEncoderConfig::new());
        assert!(plain.weights > dense.memory(8).weights);
        assert!(plain.training_activations > dense.memory(8).training_activations);
        let gated = of(SparseEncoderConfig::new().with_form(Some(FeedForwardForm::Gated)));
        let shared = of(SparseEncoderConfig::new().with_layer(RoutedLayerConfig::new().with_shared_expert(Some(64)).into()));
        assert!(gated.training_activations > plain.training_activations);
        assert!(shared.training_activations > plain.training_activations);
        assert_eq!(dense.memory(16).training_activations, 2 * dense.memory(8).training_activations);
        assert_eq!(dense.memory(1).optimizer, 2 * dense.memory(1).weights);
    }
}
