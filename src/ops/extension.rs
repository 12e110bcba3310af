//! What a backend implements to have kernels.

use burn::backend::tensor::{FloatTensor, IntTensor};
use burn::backend::{Backend, backend_extension};

use super::Activation;

/// Kernels and the helpers of their backwards; first order only.
///
/// `R` rows are sorted by expert, `offsets [E + 1]` says where each expert's begin; `row_choice [R]` names the choice `t · M + m` of a
/// row, `choice_row [T · M]` the row of a choice, −1 for none.
#[backend_extension(Flex, Autodiff)]
pub(crate) trait MoeOps: Backend {
    /// `out = act(x)`, any shape.
    fn moe_activation(x: FloatTensor<Self>, activation: Activation) -> FloatTensor<Self>;

    /// `grad · act'(x)`, any shape.
    fn moe_activation_backward(x: FloatTensor<Self>, grad: FloatTensor<Self>, activation: Activation) -> FloatTensor<Self>;

    /// `out[r] = x[t(r)]`: `[T, D] -> [R, D]`.
    fn moe_dispatch(x: FloatTensor<Self>, row_choice: IntTensor<Self>, choice_row: IntTensor<Self>) -> FloatTensor<Self>;

    /// `out[t] = Σ_m grad[row of (t, m)]`: `[R, D] -> [T, D]`.
    fn moe_dispatch_backward(grad: FloatTensor<Self>, choice_row: IntTensor<Self>, num_tokens: usize) -> FloatTensor<Self>;

    /// `out[t] = Σ_m gates[t, m] · rows[row of (t, m)]`: `[R, D], [T, M] -> [T, D]`.
    fn moe_combine(
        rows: FloatTensor<Self>,
        gates: FloatTensor<Self>,
        row_choice: IntTensor<Self>,
        choice_row: IntTensor<Self>,
    ) -> FloatTensor<Self>;

    /// `out[r] = gates[choice of r] · grad[t(r)]`: `[T, D], [T, M] -> [R, D]`.
    fn moe_combine_backward_rows(
        grad: FloatTensor<Self>,
        gates: FloatTensor<Self>,
        row_choice: IntTensor<Self>,
    ) -> FloatTensor<Self>;

    /// `out[t, m] = grad[t] · rows[row of (t, m)]`: `[T, D], [R, D] -> [T, M]`.
    fn moe_combine_backward_gates(
        grad: FloatTensor<Self>,
        rows: FloatTensor<Self>,
        choice_row: IntTensor<Self>,
    ) -> FloatTensor<Self>;

    /// `pre[r] = x[r] · weight[e(r)] + bias[e(r)]` and `out = act(pre)`: `[R, D], [E, D, F], [E, F] -> ([R, F], [R, F])`, `out` first.
    /// Without an activation, or when `pre` is not kept, the second is the first.
    fn moe_grouped_linear(
        x: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        bias: FloatTensor<Self>,
        offsets: IntTensor<Self>,
        activation: Option<Activation>,
        keep_pre: bool,
    ) -> (FloatTensor<Self>, FloatTensor<Self>);

    /// `out[r] = grad[r] · weight[e(r)]ᵀ`: `[R, F], [E, D, F] -> [R, D]`.
    fn moe_grouped_linear_backward_x(
        grad: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        offsets: IntTensor<Self>,
    ) -> FloatTensor<Self>;

    /// `out[e] = Σ_{r of e} x[r]ᵀ · grad[r]`: `[R, D], [R, F] -> [E, D, F]`.
    fn moe_grouped_linear_backward_weight(
        x: FloatTensor<Self>,
        grad: FloatTensor<Self>,
        offsets: IntTensor<Self>,
    ) -> FloatTensor<Self>;

    /// `out[e] = Σ_{r of e} grad[r]`: `[R, F] -> [E, F]`.
    fn moe_grouped_linear_backward_bias(grad: FloatTensor<Self>, offsets: IntTensor<Self>) -> FloatTensor<Self>;
}
