//! Self-attention, with the weights of burn's module.

use burn::nn::attention::{MhaInput, MultiHeadAttention};
use burn::tensor::{Bool, IndexingUpdateOp, Int, Tensor, activation::softmax, module::attention, ops::AttentionModuleOptions};

use super::layout::{Layout, Looks};
use crate::{
    layer::packed::{linear, linear_each},
    ops::{self, AttentionShape},
};

/// The longest samples whose gradients, or whose narrow heads, the kernel is faster for than burn's own attention.
const LONGEST: usize = 128;
/// Heads of this width have a kernel at inference that is faster for samples of any length.
const WIDE: usize = 32;

/// `[R, D] -> [R, D]`
///
/// Where there is a kernel of this crate, samples are as long as they are. Elsewhere this is burn's own forward pass in training, if the layout turns
/// nothing, and at inference its fused attention, which has no gradient.
pub(super) fn self_attention(weights: &MultiHeadAttention, rows: Tensor<2>, layout: &Layout) -> Tensor<2> {
    let device = rows.device();
    let project = |rows: &Tensor<2>| {
        let projected = linear_each(rows, [&weights.query, &weights.key, &weights.value]);
        match (&layout.rotation, projected) {
            (None, projected) => projected,
            (Some(rotation), [query, key, value]) => {
                [rotation.turn(query, weights.n_heads), rotation.turn(key, weights.n_heads), value]
            }
        }
    };
    let causal = match layout.looks {
        Looks::AtAll => Some(false),
        Looks::Back => Some(true),
        Looks::Mask(_) => None,
    };
    let is_faster = layout.longest() <= LONGEST || (weights.d_k >= WIDE && !device.is_autodiff());
    if let Some(causal) = causal.filter(|_| is_faster && ops::has_attention(&device, rows.dtype())) {
        let [query, key, value] = project(&rows);
        let shape = AttentionShape { samples: layout.samples.clone(), width: weights.d_model, heads: weights.n_heads, causal };
        return linear(ops::attention(query, key, value, shape), &weights.output, None);
    }
    let mask = layout.mask(&device);
    if device.is_autodiff() && layout.rotation.is_none() {
        let input = MhaInput::self_attn(layout.tokens(rows));
        let input = match mask {
            Some(mask) => input.mask_attn(mask),
            None => input,
        };
        return layout.rows(weights.forward(input).context);
    }
    let [query, key, value] = project(&rows).map(|x| layout.tokens(x));
    linear(layout.rows(by_heads(weights, query, key, value, mask)), &weights.output, None)
}

/// [`self_attention`] of one token of each sample, at inference: `[R, D], [B, 1] -> [B, D]`.
pub(super) fn attention_at(weights: &MultiHeadAttention, rows: Tensor<2>, layout: &Layout, at: &Tensor<2, Int>) -> Tensor<2> {
    let ([batch, len], device) = (layout.dims(), rows.device());
    let chosen = layout.rows_at(at);
    let query = linear(rows.clone().select(0, chosen.clone()), &weights.query, None);
    let [key, value] = [&weights.key, &weights.value].map(|projection| linear(rows.clone(), projection, None));
    let (query, key) = match &layout.rotation {
        None => (query, key),
        Some(rotation) => (rotation.turn_some(query, weights.n_heads, chosen.clone()), rotation.turn(key, weights.n_heads)),
    };
    let context = if layout.is_packed() {
        // The kernel takes a query for every key; those of other tokens are zeros.
        let query = Tensor::zeros_like(&key).select_assign(0, chosen.clone(), query, IndexingUpdateOp::Add);
        let shape =
            AttentionShape { samples: layout.samples.clone(), width: weights.d_model, heads: weights.n_heads, causal: true };
        ops::attention(query, key, value, shape).select(0, chosen)
    } else {
        let places = || Tensor::<1, Int>::arange(0..len as i64, &device).unsqueeze::<2>().expand([batch, len]);
        let mask = match layout.looks {
            Looks::AtAll => None,
            _ => Some(places().greater(at.clone().expand([batch, len])).unsqueeze_dim(1)),
        };
        by_heads(weights, query.unsqueeze_dim(1), layout.tokens(key), layout.tokens(value), mask).squeeze_dim(1)
    };
    linear(context, &weights.output, None)
}

/// One query looks at all tokens of each sample: `[1, D], [B, N, D] -> [B, D]`, with a gradient.
#[cfg(feature = "clip")]
pub(crate) fn attention_of_one(weights: &MultiHeadAttention, query: Tensor<2>, tokens: Tensor<3>) -> Tensor<2> {
    let [batch, len, d_model] = tokens.dims();
    let rows = tokens.reshape([batch * len, d_model]);
    let query = linear(query, &weights.query, None).unsqueeze::<3>().expand([batch, 1, d_model]);
    let [key, value] = [&weights.key, &weights.value].map(|map| linear(rows.clone(), map, None).reshape([batch, len, d_model]));
    linear(by_heads(weights, query, key, value, None).squeeze_dim(1), &weights.output, None)
}

/// Attention without projections, by burn's fused operation or, as that has no gradient, by plain ones on an autodiff device:
/// `[B, Q, D], [B, N, D], [B, N, D] -> [B, Q, D]`; the mask, `[B, Q, N]`, is true where a query must not look.
fn by_heads(
    weights: &MultiHeadAttention,
    query: Tensor<3>,
    key: Tensor<3>,
    value: Tensor<3>,
    mask: Option<Tensor<3, Bool>>,
) -> Tensor<3> {
    let ([batch, queries, d_model], [_, len, _], heads) = (query.dims(), key.dims(), weights.n_heads);
    let [query, key, value] =
        [query, key, value].map(|x| x.reshape([batch as i32, -1, heads as i32, weights.d_k as i32]).swap_dims(1, 2));
    let mask = mask.map(|mask| mask.unsqueeze_dim::<4>(1).expand([batch, heads, queries, len]));
    let context = if query.device().is_autodiff() {
        let scores = query.matmul(key.swap_dims(2, 3)) / (weights.d_k as f64).sqrt();
        let scores = match mask {
            Some(mask) => scores.mask_fill(mask, weights.min_float),
            None => scores,
        };
        softmax(scores, 3).matmul(value)
    } else {
        attention(query, key, value, mask, None, AttentionModuleOptions::default())
    };
    context.swap_dims(1, 2).reshape([batch, queries, d_model])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::transformer::TokenMarks;
    use burn::module::Module;
    use burn::nn::attention::{MultiHeadAttentionConfig, generate_autoregressive_mask};
    use burn::tensor::{Device, Distribution};

    /// Outputs, and gradients with respect to the input and the weights of the query.
    fn compare(len: usize, width: usize, heads: usize, causal: bool) {
        let device = Device::default().autodiff();
        let weights = MultiHeadAttentionConfig::new(width, heads).with_dropout(0.0).init(&device);
        let x = Tensor::<3>::random([2, len, width], Distribution::Normal(0.0, 1.0), &device);
        let target = Tensor::<3>::random([2, len, width], Distribution::Normal(0.0, 1.0), &device);
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
        assert!(difference < 2e-5, "{len} tokens, {heads} heads of {width}, causal {causal}: {difference}");
    }

    #[test]
    fn it_is_burns_own_attention() {
        for len in [1, 7, 16, 33, 70, 150] {
            for causal in [false, true] {
                for (width, heads) in [(24, 3), (64, 2), (80, 2)] {
                    compare(len, width, heads, causal);
                }
            }
        }
        // A head of 24 and one of 1: wider than a vector, and narrower.
        compare(5, 24, 1, true);
        compare(5, 24, 24, false);
    }

    #[test]
    fn padding_changes_nothing_for_the_rest() {
        let device = Device::default().autodiff();
        let weights = MultiHeadAttentionConfig::new(24, 3).with_dropout(0.0).init(&device);
        let x = Tensor::<3>::random([3, 6, 24], Distribution::Normal(0.0, 1.0), &device);
        let valid = [[true; 6], [true, true, true, false, false, false], [true, false, false, false, false, false]];
        let marks = TokenMarks { valid: Some(Tensor::from_data(valid, &device)), ..TokenMarks::default() };
        let (packed, whole) = (Layout::packed(&x, &marks), Layout::whole([3, 6], Looks::Back));
        let run = |layout: &Layout| layout.tokens(self_attention(&weights, layout.rows(x.clone()), layout));
        assert_eq!(packed.rows(x.clone()).dims(), [10, 24]);
        let padding = marks.valid.unwrap().bool_not().unsqueeze_dim::<3>(2).expand([3, 6, 24]);
        let difference = (run(&packed) - run(&whole).mask_fill(padding, 0.0)).abs().max();
        assert!(difference.into_scalar::<f32>() < 1e-5);
        // Padding in between is looked at, and stays.
        let valid = Tensor::from_data([[true, false, true]], &device);
        let x = Tensor::<3>::ones([1, 3, 24], &device);
        let layout = Layout::packed(&x, &TokenMarks { valid: Some(valid), ..TokenMarks::default() });
        assert_eq!(layout.rows(x).dims(), [3, 24]);
    }
}
