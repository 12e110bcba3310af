//! From the tokens of an image to its embedding.

use burn::module::{Module, Param};
use burn::nn::attention::{MultiHeadAttention, MultiHeadAttentionConfig};
use burn::nn::{Initializer, LayerNorm, LayerNormConfig};
use burn::tensor::{Device, Tensor};
use serde::{Deserialize, Serialize};

use crate::{
    layer::experts::Activation,
    support::{cost::Cost, error::ConfigError},
    transformer::{Mlp, MlpConfig, attention_of_one},
};

/// What of the tokens behind the blocks becomes the embedding of an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Pooling {
    /// The class token, behind the final norm if there is one (ViT, CLIP).
    ClassToken,
    /// All tokens, each behind the final norm if there is one, by an [`AttentionPooling`] (SigLIP, MoE-ViE).
    Attention {
        /// Heads of its attention; must divide the width of the tokens.
        n_heads: usize,
    },
}

/// A learned probe attends to all tokens (MAP head, [arXiv 2106.04560](https://arxiv.org/abs/2106.04560)):
/// `h = MHA(query: probe, keys and values: tokens)`, `pooled = h + FFN(LN(h))`, with a feed-forward network of hidden width `4 D` and GELU, whatever that of the
/// blocks is.
#[derive(Module, Debug)]
pub struct AttentionPooling {
    /// `[D]`
    pub probe: Param<Tensor<1>>,
    /// Its queries are of the probe, keys and values of the tokens.
    pub attention: MultiHeadAttention,
    /// Before the feed-forward network.
    pub norm: LayerNorm,
    /// On what the probe saw.
    pub mlp: Mlp,
}

impl Pooling {
    pub(super) fn validate(self, d_model: usize) -> Result<(), ConfigError> {
        let Self::Attention { n_heads } = self else { return Ok(()) };
        ConfigError::non_zero("pooling.n_heads", n_heads)?;
        if !d_model.is_multiple_of(n_heads) {
            let (field, divisor) = ("encoder.d_model", "pooling.n_heads");
            return Err(ConfigError::NotDivisible { field, value: d_model, divisor, divisor_value: n_heads });
        }
        Ok(())
    }

    /// Cost for one sample; that of the probe's query is counted for each.
    pub(super) fn cost(self, num_tokens: usize, d_model: usize) -> Cost {
        if self == Self::ClassToken {
            return Cost::default();
        }
        let products = Cost { flops: 4 * (num_tokens * d_model) as u64, ..Cost::default() };
        let of_tokens = Cost::linear(num_tokens, d_model, d_model, true);
        let of_one = Cost::linear(1, d_model, d_model, true);
        let attention = of_one + of_tokens + of_tokens + of_one + products;
        attention + Cost::feed_forward(1, d_model, 4 * d_model, true) + Cost::params(3 * d_model) // probe and norm
    }

    pub(super) fn init(self, d_model: usize, norm_epsilon: f64, device: &Device) -> Option<AttentionPooling> {
        let Self::Attention { n_heads } = self else { return None };
        let normal = Initializer::Normal { mean: 0.0, std: (d_model as f64).powf(-0.5) };
        Some(AttentionPooling {
            probe: normal.init([d_model], device),
            attention: MultiHeadAttentionConfig::new(d_model, n_heads).with_dropout(0.0).init(device),
            norm: LayerNormConfig::new(d_model).with_epsilon(norm_epsilon).init(device),
            mlp: MlpConfig::new(d_model, 4 * d_model).with_activation(Activation::Gelu).init(device),
        })
    }
}

impl AttentionPooling {
    /// One vector for each sample: `[B, N, D] -> [B, D]`.
    pub fn forward(&self, tokens: Tensor<3>) -> Tensor<2> {
        let probe = self.probe.val().dequantize().unsqueeze::<2>();
        let seen = attention_of_one(&self.attention, probe, tokens);
        seen.clone() + self.mlp.forward(self.norm.forward(seen))
    }
}
