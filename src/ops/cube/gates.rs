//! Gates from the scores of the chosen experts, and their gradient. A unit for each token.

use burn_cubecl::tensor::CubeTensor;
use cubecl::prelude::*;

use super::launch::{Elementwise, elem_pair, empty};
use crate::ops::{GateSum, MIN_GATE_SUM};

/// What the gates of one token are made of.
#[derive(CubeType)]
struct Choices {
    /// The scores of the chosen experts, 0 for a choice without one.
    scores: Array<f32>,
    /// 1 for a choice with a row, else 0.
    kept: Array<f32>,
    /// 1 for a choice whose score is in the sum, else 0.
    summed: Array<f32>,
    /// What the scores are divided by.
    sum: f32,
}

#[cube]
fn choices_of<F: Float, I: Int>(
    scores: &Tensor<F>,
    chosen: &Tensor<I>,
    choice_row: &Tensor<I>,
    token: usize,
    num_experts: usize,
    #[comptime] top_k: usize,
    #[comptime] rule: GateSum,
) -> Choices {
    let mut own = Array::<f32>::new(top_k);
    let mut kept = Array::<f32>::new(top_k);
    let mut summed = Array::<f32>::new(top_k);
    let mut sum = 0.0f32;
    #[unroll]
    for k in 0..top_k {
        let choice = token * top_k + k;
        let expert = i32::cast_from(chosen[choice]);
        own[k] = 0.0f32;
        summed[k] = 0.0f32;
        kept[k] = f32::cast_from(i32::cast_from(choice_row[choice]) >= 0);
        if expert >= 0 {
            own[k] = f32::cast_from(scores[token * num_experts + usize::cast_from(expert)]);
            summed[k] = 1.0f32;
        }
        if comptime!(rule == GateSum::OfKept) {
            summed[k] = kept[k];
        }
        sum += own[k] * summed[k];
    }
    Choices { scores: own, kept, summed, sum }
}

/// `gates [T, K]` of `scores [T, E]`; 0 for a choice without a row.
#[cube(launch)]
fn gates_kernel<F: Float, I: Int>(
    scores: &Tensor<F>,
    chosen: &Tensor<I>,
    choice_row: &Tensor<I>,
    gates: &mut Tensor<F>,
    num_experts: usize,
    total: usize,
    #[comptime] top_k: usize,
    #[comptime] rule: GateSum,
    #[define(F, I)] _dtypes: [ElemType; 2],
) {
    if ABSOLUTE_POS >= total {
        terminate!();
    }
    let choices = choices_of::<F, I>(scores, chosen, choice_row, ABSOLUTE_POS, num_experts, top_k, rule);
    #[unroll]
    for k in 0..top_k {
        let mut gate = choices.scores[k] * choices.kept[k];
        if comptime!(rule != GateSum::None) {
            gate /= choices.sum.max(MIN_GATE_SUM);
        }
        gates[ABSOLUTE_POS * top_k + k] = F::cast_from(gate);
    }
}

/// `out [T, E]`, the gradient of the scores from `grad [T, K]`; 0 for experts that were not chosen.
#[cube(launch)]
fn scores_kernel<F: Float, I: Int>(
    grad: &Tensor<F>,
    scores: &Tensor<F>,
    chosen: &Tensor<I>,
    choice_row: &Tensor<I>,
    out: &mut Tensor<F>,
    num_experts: usize,
    total: usize,
    #[comptime] top_k: usize,
    #[comptime] rule: GateSum,
    #[define(F, I)] _dtypes: [ElemType; 2],
) {
    if ABSOLUTE_POS >= total {
        terminate!();
    }
    let choices = choices_of::<F, I>(scores, chosen, choice_row, ABSOLUTE_POS, num_experts, top_k, rule);
    let mut grads = Array::<f32>::new(top_k);
    let mut through_sum = 0.0f32;
    #[unroll]
    for k in 0..top_k {
        grads[k] = f32::cast_from(grad[ABSOLUTE_POS * top_k + k]) * choices.kept[k];
        through_sum += grads[k] * choices.scores[k];
    }
    if comptime!(rule != GateSum::None) {
        let sum = choices.sum.max(MIN_GATE_SUM);
        // A sum that was raised to the least one does not depend on the scores.
        through_sum = select(choices.sum > MIN_GATE_SUM, through_sum / sum / sum, 0.0f32);
        #[unroll]
        for k in 0..top_k {
            grads[k] = grads[k] / sum - through_sum * choices.summed[k];
        }
    }
    for e in 0..num_experts {
        let mut gradient = 0.0f32;
        #[unroll]
        for k in 0..top_k {
            if i32::cast_from(chosen[ABSOLUTE_POS * top_k + k]) == i32::cast_from(e) {
                gradient = grads[k];
            }
        }
        out[ABSOLUTE_POS * num_experts + e] = F::cast_from(gradient);
    }
}

/// See [`RouterOps`](crate::ops::extension::RouterOps).
pub(super) fn gates(scores: CubeTensor, chosen: CubeTensor, choice_row: CubeTensor, rule: GateSum) -> CubeTensor {
    let [num_tokens, num_experts] = scores.meta.shape().dims();
    let top_k = chosen.meta.num_elements() / num_tokens;
    let out = empty(&scores, [num_tokens, top_k]);
    let grid = Elementwise::new(&out, num_tokens);
    let dtypes = elem_pair(&scores, &chosen);
    gates_kernel::launch(
        &out.client,
        grid.count,
        grid.dim,
        scores.into_tensor_arg(),
        chosen.into_tensor_arg(),
        choice_row.into_tensor_arg(),
        out.clone().into_tensor_arg(),
        num_experts,
        grid.total,
        top_k,
        rule,
        dtypes,
    );
    out
}

/// See [`RouterBackwardOps`](crate::ops::extension::RouterBackwardOps).
pub(super) fn scores_gradient(
    grad: CubeTensor,
    scores: CubeTensor,
    chosen: CubeTensor,
    choice_row: CubeTensor,
    rule: GateSum,
) -> CubeTensor {
    let [num_tokens, num_experts] = scores.meta.shape().dims();
    let out = empty(&scores, [num_tokens, num_experts]);
    let grid = Elementwise::new(&out, num_tokens);
    let (top_k, dtypes) = (chosen.meta.num_elements() / num_tokens, elem_pair(&scores, &chosen));
    scores_kernel::launch(
        &out.client,
        grid.count,
        grid.dim,
        grad.into_tensor_arg(),
        scores.into_tensor_arg(),
        chosen.into_tensor_arg(),
        choice_row.into_tensor_arg(),
        out.clone().into_tensor_arg(),
        num_experts,
        grid.total,
        top_k,
        rule,
        dtypes,
    );
    out
}
