//! What a backend implements to have kernels.

use burn::backend::tensor::{FloatTensor, IntTensor};
use burn::backend::{Backend, backend_extension};
#[cfg(all(feature = "fusion", feature = "_gpu"))]
use burn::{backend::fusion::custom::TensorSpec, tensor::Shape};

#[cfg(feature = "flex")]
use std::sync::Arc;

use super::{Activation, HostOffsets};
#[cfg(feature = "flex")]
use super::{AttentionShape, PackedMaps};
#[cfg(feature = "_gpu")]
use super::{GateSum, SlotRules};

/// Shapes of outputs, which fusion needs before a kernel runs.
#[cfg(all(feature = "fusion", feature = "_gpu"))]
mod shape {
    use super::{Activation, HostOffsets, Shape, SlotRules, TensorSpec};

    /// A row for each index, as wide as `x`.
    pub(super) fn rows(index: &Shape, x: &Shape) -> Shape {
        [index[0], x[1]].into()
    }

    pub(super) fn tokens(num_tokens: &usize, x: &Shape) -> Shape {
        [*num_tokens, x[1]].into()
    }

    /// `[T, D], [T · M] -> [T, M]`
    pub(super) fn gates(x: &Shape, choice_row: &Shape) -> Shape {
        [x[0], choice_row[0] / x[0]].into()
    }

    pub(super) fn weight(x: &Shape, grad: &Shape, offsets: &Shape) -> Shape {
        [offsets[0] - 1, x[1], grad[1]].into()
    }

    pub(super) fn bias(grad: &Shape, offsets: &Shape) -> Shape {
        [offsets[0] - 1, grad[1]].into()
    }

    pub(super) fn slots(
        scores: &TensorSpec,
        states: &TensorSpec,
        rules: &SlotRules,
    ) -> (TensorSpec, TensorSpec, TensorSpec, TensorSpec) {
        let [num_tokens, num_experts] = [scores.shape[0], scores.shape[1]];
        let indices = |count: usize| TensorSpec::new([count].into(), states.dtype);
        let choices = indices(num_tokens * rules.top_k);
        (choices.clone(), choices, indices(rules.num_rows(num_tokens, num_experts)), indices(num_experts + 1))
    }

    pub(super) fn linear(
        x: &TensorSpec,
        weight: &TensorSpec,
        _bias: &TensorSpec,
        _offsets: &TensorSpec,
        _host_offsets: &HostOffsets,
        _activation: &Activation,
    ) -> (TensorSpec, TensorSpec) {
        let out = TensorSpec::new([x.shape[0], weight.shape[2]].into(), x.dtype);
        (out.clone(), out)
    }
}

/// Kernels with a gradient, of first order.
///
/// `R` rows are sorted by expert, `offsets [E + 1]` says where each expert's begin, on the device and on the host; `row_choice [R]` names the choice
/// `t · M + m` of a row, `choice_row [T · M]` the row of a choice; −1 is none in both, and a choice may be [`NON_FINITE`](super::NON_FINITE).
#[backend_extension(
    Cube: cfg(feature = "_gpu"),
    Flex: cfg(feature = "flex"),
    Autodiff,
    Fusion: cfg(all(feature = "fusion", feature = "_gpu"))
)]
pub(crate) trait MoeOps: Backend {
    /// `out = act(x)`, any shape.
    #[fusion(dtype = x, shape = x)]
    fn moe_activation(x: FloatTensor<Self>, activation: Activation) -> FloatTensor<Self>;

    /// `out[r] = x[t(r)]`: `[T, D] -> [R, D]`.
    #[fusion(dtype = x, shape = shape::rows(row_choice, x))]
    fn moe_dispatch(x: FloatTensor<Self>, row_choice: IntTensor<Self>, choice_row: IntTensor<Self>) -> FloatTensor<Self>;

    /// `out[t] = Σ_m gates[t, m] · rows[row of (t, m)]`: `[R, D], [T, M] -> [T, D]`.
    #[fusion(dtype = rows, shape = shape::rows(gates, rows))]
    fn moe_combine(
        rows: FloatTensor<Self>,
        gates: FloatTensor<Self>,
        row_choice: IntTensor<Self>,
        choice_row: IntTensor<Self>,
    ) -> FloatTensor<Self>;

    /// `out[r] = act(x[r] · weight[e(r)] + bias[e(r)])`: `[R, D], [E, D, F], [E, F] -> [R, F]`.
    #[fusion(dtype = x, shape = [x[0], weight[2]].into())]
    fn moe_grouped_linear(
        x: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        bias: FloatTensor<Self>,
        offsets: IntTensor<Self>,
        host_offsets: HostOffsets,
        activation: Option<Activation>,
    ) -> FloatTensor<Self>;
}

/// What the backward passes of [`MoeOps`] call on the backend below autodiff.
#[backend_extension(
    Cube: cfg(feature = "_gpu"),
    Flex: cfg(feature = "flex"),
    Fusion: cfg(all(feature = "fusion", feature = "_gpu"))
)]
pub(crate) trait MoeBackwardOps: Backend {
    /// As [`MoeOps::moe_grouped_linear`], with what the activation was applied to, which its slope needs: `out` first.
    #[fusion(meta = shape::linear)]
    fn moe_grouped_linear_keeping(
        x: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        bias: FloatTensor<Self>,
        offsets: IntTensor<Self>,
        host_offsets: HostOffsets,
        activation: Activation,
    ) -> (FloatTensor<Self>, FloatTensor<Self>);

    /// `grad · act'(x)`, any shape.
    #[fusion(dtype = x, shape = x)]
    fn moe_activation_backward(x: FloatTensor<Self>, grad: FloatTensor<Self>, activation: Activation) -> FloatTensor<Self>;

    /// `out[t] = Σ_m grad[row of (t, m)]`: `[R, D] -> [T, D]`.
    #[fusion(dtype = grad, shape = shape::tokens(num_tokens, grad))]
    fn moe_dispatch_backward(grad: FloatTensor<Self>, choice_row: IntTensor<Self>, num_tokens: usize) -> FloatTensor<Self>;

    /// `out[r] = gates[choice of r] · grad[t(r)]`: `[T, D], [T, M] -> [R, D]`.
    #[fusion(dtype = grad, shape = shape::rows(row_choice, grad))]
    fn moe_combine_backward_rows(
        grad: FloatTensor<Self>,
        gates: FloatTensor<Self>,
        row_choice: IntTensor<Self>,
    ) -> FloatTensor<Self>;

    /// `out[t, m] = grad[t] · rows[row of (t, m)]`: `[T, D], [R, D] -> [T, M]`.
    #[fusion(dtype = grad, shape = shape::gates(grad, choice_row))]
    fn moe_combine_backward_gates(
        grad: FloatTensor<Self>,
        rows: FloatTensor<Self>,
        choice_row: IntTensor<Self>,
    ) -> FloatTensor<Self>;

    /// `out[r] = grad[r] · weight[e(r)]ᵀ`: `[R, F], [E, D, F] -> [R, D]`.
    #[fusion(dtype = grad, shape = [grad[0], weight[1]].into())]
    fn moe_grouped_linear_backward_x(
        grad: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        offsets: IntTensor<Self>,
        host_offsets: HostOffsets,
    ) -> FloatTensor<Self>;

    /// `out[e] = Σ_{r of e} x[r]ᵀ · grad[r]`: `[R, D], [R, F] -> [E, D, F]`.
    #[fusion(dtype = x, shape = shape::weight(x, grad, offsets))]
    fn moe_grouped_linear_backward_weight(
        x: FloatTensor<Self>,
        grad: FloatTensor<Self>,
        offsets: IntTensor<Self>,
        host_offsets: HostOffsets,
    ) -> FloatTensor<Self>;

    /// `out[e] = Σ_{r of e} grad[r]`: `[R, F] -> [E, F]`.
    #[fusion(dtype = grad, shape = shape::bias(grad, offsets))]
    fn moe_grouped_linear_backward_bias(
        grad: FloatTensor<Self>,
        offsets: IntTensor<Self>,
        host_offsets: HostOffsets,
    ) -> FloatTensor<Self>;
}

/// The router's product in f32, and the gates.
#[cfg(feature = "_gpu")]
#[backend_extension(Cube: cfg(feature = "_gpu"), Autodiff, Fusion: cfg(all(feature = "fusion", feature = "_gpu")))]
pub(crate) trait RouterOps: Backend {
    /// `logits[t, e] = Σ_d x[t, d] · weight[e, d]`: `[T, D], [E, D] -> [T, E]`; all but `x` are f32. NaN for all experts of a token with a logit that is
    /// not finite, which no gradient passes.
    #[fusion(dtype = weight, shape = [x[0], weight[0]].into())]
    fn moe_router_logits(x: FloatTensor<Self>, weight: FloatTensor<Self>) -> FloatTensor<Self>;

    /// The scores of the chosen experts, over their sum if the rule says so, 0 for a choice without a row: `[T, E], [T · K], [T · K] -> [T, K]`.
    #[fusion(dtype = scores, shape = shape::gates(scores, choice_row))]
    fn moe_gates(
        scores: FloatTensor<Self>,
        chosen: IntTensor<Self>,
        choice_row: IntTensor<Self>,
        rule: GateSum,
    ) -> FloatTensor<Self>;
}

/// The gradients of [`RouterOps`], on the backend below autodiff.
#[cfg(feature = "_gpu")]
#[backend_extension(Cube: cfg(feature = "_gpu"), Fusion: cfg(all(feature = "fusion", feature = "_gpu")))]
pub(crate) trait RouterBackwardOps: Backend {
    /// `out[t, d] = Σ_e grad[t, e] · weight[e, d]`: `[T, E], [E, D] -> [T, D]`, with the numbers of `x`; 0 where `logits` are NaN.
    #[fusion(dtype = x, shape = x)]
    fn moe_router_logits_backward_x(
        grad: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        x: FloatTensor<Self>,
        logits: FloatTensor<Self>,
    ) -> FloatTensor<Self>;

    /// `out[e, d] = Σ_t grad[t, e] · x[t, d]`: `[T, E], [T, D] -> [E, D]`, f32; without the tokens whose `logits` are NaN.
    #[fusion(dtype = grad, shape = [grad[1], x[1]].into())]
    fn moe_router_logits_backward_weight(
        grad: FloatTensor<Self>,
        x: FloatTensor<Self>,
        logits: FloatTensor<Self>,
    ) -> FloatTensor<Self>;

    /// The gradient of the scores from that of the gates: `[T, K] -> [T, E]`.
    #[fusion(dtype = scores, shape = scores)]
    fn moe_gates_backward(
        grad: FloatTensor<Self>,
        scores: FloatTensor<Self>,
        chosen: IntTensor<Self>,
        choice_row: IntTensor<Self>,
        rule: GateSum,
    ) -> FloatTensor<Self>;
}

/// Assigning slots; no gradient passes through it.
#[cfg(feature = "_gpu")]
#[backend_extension(Cube: cfg(feature = "_gpu"), Fusion: cfg(all(feature = "fusion", feature = "_gpu")))]
pub(crate) trait SlotOps: Backend {
    /// `[T, E], [T] -> [T · K], [T · K], [R], [E + 1]`: the expert and the row of each choice, the choice of each row, and the first row of each
    /// expert.
    #[fusion(meta = shape::slots)]
    fn moe_assign_slots(
        scores: FloatTensor<Self>,
        states: IntTensor<Self>,
        rules: SlotRules,
    ) -> (IntTensor<Self>, IntTensor<Self>, IntTensor<Self>, IntTensor<Self>);
}

/// Attention within samples of different lengths.
#[cfg(feature = "flex")]
#[backend_extension(Flex: cfg(feature = "flex"), Autodiff)]
pub(crate) trait AttentionOps: Backend {
    /// `[R, D]` three times, to `[R, D]`.
    fn moe_attention(
        query: FloatTensor<Self>,
        key: FloatTensor<Self>,
        value: FloatTensor<Self>,
        shape: AttentionShape,
    ) -> FloatTensor<Self>;
}

/// The gradients of [`AttentionOps`], on the backend below autodiff.
#[cfg(feature = "flex")]
#[backend_extension(Flex: cfg(feature = "flex"))]
pub(crate) trait AttentionBackwardOps: Backend {
    /// Those of the query, the key and the value, `[R, D]` each.
    fn moe_attention_backward(
        query: FloatTensor<Self>,
        key: FloatTensor<Self>,
        value: FloatTensor<Self>,
        grad: FloatTensor<Self>,
        shape: AttentionShape,
    ) -> (FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>);
}

/// Products with packed weights, which have no gradient.
#[cfg(feature = "flex")]
#[backend_extension(Flex: cfg(feature = "flex"))]
pub(crate) trait PackedOps: Backend {
    /// `out[r] = act(x[r] · weight[e(r)] + bias[e(r)])`: `[R, D], [E, F] -> [R, F]`.
    fn moe_packed_linear(
        x: FloatTensor<Self>,
        bias: FloatTensor<Self>,
        weight: Arc<PackedMaps>,
        host_offsets: Arc<[usize]>,
        activation: Option<Activation>,
    ) -> FloatTensor<Self>;
}
