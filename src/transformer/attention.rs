//! Self-attention, with the weights of burn's module.

use burn::nn::Linear;
use burn::nn::attention::{MhaInput, MultiHeadAttention};
use burn::tensor::{Tensor, module::attention, ops::AttentionModuleOptions};

use super::layout::{Layout, Looks};
use crate::ops::{self, AttentionShape};

/// The longest samples that the kernel is faster for than burn's own attention.
const LONGEST: usize = 128;

/// `[R, D] -> [R, D]`
///
/// Where there is a kernel of this crate, samples are as long as they are. Elsewhere this is burn's own forward pass in training, and its fused
/// attention, which has no gradient, at inference.
pub(super) fn self_attention(weights: &MultiHeadAttention, rows: Tensor<2>, layout: &Layout) -> Tensor<2> {
    let device = rows.device();
    let linear = |x, linear: &Linear| ops::linear(x, linear.weight.val(), linear.bias.as_ref().map(|bias| bias.val()), None);
    let project =
        |rows: &Tensor<2>| [&weights.query, &weights.key, &weights.value].map(|projection| linear(rows.clone(), projection));
    let causal = match layout.looks {
        Looks::AtAll => Some(false),
        Looks::Back => Some(true),
        Looks::Mask(_) => None,
    };
    if let Some(causal) = causal.filter(|_| layout.longest() <= LONGEST && ops::has_attention(&device, rows.dtype())) {
        let [query, key, value] = project(&rows);
        let shape = AttentionShape { samples: layout.samples.clone(), width: weights.d_model, heads: weights.n_heads, causal };
        return linear(ops::attention(query, key, value, shape), &weights.output);
    }
    let mask = layout.mask(&device);
    if device.is_autodiff() {
        let input = MhaInput::self_attn(layout.tokens(rows));
        let input = match mask {
            Some(mask) => input.mask_attn(mask),
            None => input,
        };
        return layout.rows(weights.forward(input).context);
    }
    let [num_rows, d_model] = rows.dims();
    let [batch, len] = layout.dims();
    let heads = weights.n_heads;
    let by_head = |x: Tensor<2>| layout.tokens(x).reshape([batch, len, heads, weights.d_k]).swap_dims(1, 2);
    let [query, key, value] = project(&rows).map(by_head);
    let mask = mask.map(|mask| mask.unsqueeze_dim::<4>(1).expand([batch, heads, len, len]));
    let context = attention(query, key, value, mask, None, AttentionModuleOptions::default());
    let context = layout.rows(context.swap_dims(1, 2).reshape([batch, len, d_model]));
    debug_assert_eq!(context.dims(), [num_rows, d_model]);
    linear(context, &weights.output)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::transformer::TokenMarks;
    use burn::module::Module;
    use burn::nn::attention::{MultiHeadAttentionConfig, generate_autoregressive_mask};
    use burn::tensor::{Device, Distribution};

    /// Outputs, and gradients with respect to the input and the weights of the query.
    fn compare(len: usize, heads: usize, causal: bool) {
        let device = Device::default().autodiff();
        let weights = MultiHeadAttentionConfig::new(24, heads).with_dropout(0.0).init(&device);
        let x = Tensor::<3>::random([2, len, 24], Distribution::Normal(0.0, 1.0), &device);
        let target = Tensor::<3>::random([2, len, 24], Distribution::Normal(0.0, 1.0), &device);
        let looks = || if causal { Looks::Back } else { Looks::AtAll };
        let results = [false, true].map(|ours| {
            let x = x.clone().require_grad();
            let layout = Layout::whole([2, len], looks());
            let out = if ours {
                layout.tokens(self_attention(&weights, layout.rows(x.clone()), &layout))
            } else {
                let input = MhaInput::self_attn(x.clone());
                let mask = causal.then(|| generate_autoregressive_mask(2, len, &device));
                weights.forward(mask.into_iter().fold(input, MhaInput::mask_attn)).context
            };
            let gradients = (out.clone() * target.clone()).sum().backward();
            let to_x = x.grad(&gradients).unwrap().reshape([-1]);
            let to_weights = [&weights.query, &weights.key, &weights.value]
                .map(|linear| linear.weight.val().grad(&gradients).unwrap().reshape([-1]));
            let inference = Layout::whole([2, len], looks());
            let inference = self_attention(&weights.valid(), inference.rows(x.clone().inner()), &inference).reshape([-1]);
            Tensor::<1>::cat([vec![out.inner().reshape([-1]), inference, to_x], to_weights.to_vec()].concat(), 0)
        });
        let [burns, ours] = results;
        let difference = (ours - burns).abs().max().into_scalar::<f32>();
        assert!(difference < 2e-5, "{len} tokens, {heads} heads, causal {causal}: {difference}");
    }

    #[test]
    fn it_is_burns_own_attention() {
        for len in [1, 7, 16, 33, 70, 150] {
            for causal in [false, true] {
                compare(len, 3, causal);
            }
        }
        // A head of 24 and one of 1: wider than a vector, and narrower.
        compare(5, 1, true);
        compare(5, 24, false);
    }

    #[test]
    fn padding_changes_nothing_for_the_rest() {
        let device = Device::default().autodiff();
        let weights = MultiHeadAttentionConfig::new(24, 3).with_dropout(0.0).init(&device);
        let x = Tensor::<3>::random([3, 6, 24], Distribution::Normal(0.0, 1.0), &device);
        let valid = [[true; 6], [true, true, true, false, false, false], [true, false, false, false, false, false]];
        let marks = TokenMarks { valid: Some(Tensor::from_data(valid, &device)), protected: None };
        let (packed, whole) = (Layout::packed(&x, &marks), Layout::whole([3, 6], Looks::Back));
        let run = |layout: &Layout| layout.tokens(self_attention(&weights, layout.rows(x.clone()), layout));
        assert_eq!(packed.rows(x.clone()).dims(), [10, 24]);
        let padding = marks.valid.unwrap().bool_not().unsqueeze_dim::<3>(2).expand([3, 6, 24]);
        let difference = (run(&packed) - run(&whole).mask_fill(padding, 0.0)).abs().max();
        assert!(difference.into_scalar::<f32>() < 1e-5);
        // Padding in between is looked at, and stays.
        let valid = Tensor::from_data([[true, false, true]], &device);
        let x = Tensor::<3>::ones([1, 3, 24], &device);
        let layout = Layout::packed(&x, &TokenMarks { valid: Some(valid), protected: None });
        assert_eq!(layout.rows(x).dims(), [3, 24]);
    }
}
