//! Self-attention, with the weights of burn's module.

use burn::nn::Linear;
use burn::nn::attention::{MhaInput, MultiHeadAttention};
use burn::tensor::{Bool, Tensor, module::attention, ops::AttentionModuleOptions};

use crate::ops;

/// `[B, N, D] -> [B, N, D]`; `mask` `[B, N, N]` is true where a token must not look.
///
/// In training this is burn's own forward pass. Elsewhere the projections take the kernels of `ops`, and the middle is burn's fused
/// attention, which has no gradient.
pub(super) fn self_attention(weights: &MultiHeadAttention, x: Tensor<3>, mask: Option<Tensor<3, Bool>>) -> Tensor<3> {
    if x.device().is_autodiff() {
        let input = MhaInput::self_attn(x);
        let input = match mask {
            Some(mask) => input.mask_attn(mask),
            None => input,
        };
        return weights.forward(input).context;
    }
    let [batch, len, d_model] = x.dims();
    let heads = weights.n_heads;
    let tokens = x.reshape([batch * len, d_model]);
    let linear = |x, linear: &Linear| ops::linear(x, linear.weight.val(), linear.bias.as_ref().map(|bias| bias.val()), None);
    let by_head = |x: Tensor<2>| x.reshape([batch, len, heads, weights.d_k]).swap_dims(1, 2);
    let [query, key, value] =
        [&weights.query, &weights.key, &weights.value].map(|projection| by_head(linear(tokens.clone(), projection)));
    let mask = mask.map(|mask| mask.unsqueeze_dim::<4>(1).expand([batch, heads, len, len]));
    let context = attention(query, key, value, mask, None, AttentionModuleOptions::default());
    let context = context.swap_dims(1, 2).reshape([batch * len, d_model]);
    linear(context, &weights.output).reshape([batch, len, d_model])
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn::nn::attention::{MultiHeadAttentionConfig, generate_autoregressive_mask};
    use burn::tensor::{Device, Distribution};

    #[test]
    fn it_is_burns_own_forward_pass() {
        let device = Device::default();
        let weights = MultiHeadAttentionConfig::new(24, 3).with_dropout(0.0).init(&device);
        for len in [1, 7, 70] {
            let x = Tensor::<3>::random([2, len, 24], Distribution::Normal(0.0, 1.0), &device);
            for mask in [None, Some(generate_autoregressive_mask(2, len, &device))] {
                let input = MhaInput::self_attn(x.clone());
                let expected = match mask.clone() {
                    Some(mask) => weights.forward(input.mask_attn(mask)),
                    None => weights.forward(input),
                };
                let difference = (self_attention(&weights, x.clone(), mask) - expected.context).abs().max();
                assert!(difference.into_scalar::<f32>() < 1e-5);
            }
        }
    }
}
