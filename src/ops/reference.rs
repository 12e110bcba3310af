//! Reference bodies in plain tensor operations, right on every backend; the oracle for every faster one.

use burn::tensor::{Int, Tensor, activation as burn_activation};

use super::Activation;

/// Gathers the row of each slot: `out[s] = x[index[s]]`, and zero where `index[s] = T`.
///
/// # Shapes
/// - x: `[T, D]`
/// - index: `[N]`
/// - output: `[N, D]`
pub(super) fn gather(x: Tensor<2>, index: Tensor<1, Int>, has_empty: bool) -> Tensor<2> {
    with_zero_row(x, has_empty).select(0, index)
}

/// Sums the rows of each token's choices, weighted: `out[t] = Σ_m gates[t, m] · rows[index[t · M + m]]`; a row index `N` adds zero.
///
/// # Shapes
/// - rows: `[N, D]`
/// - gates: `[T, M]`
/// - index: `[T · M]`
/// - output: `[T, D]`
pub(super) fn combine(rows: Tensor<2>, gates: Tensor<2>, index: Tensor<1, Int>, has_unseated: bool) -> Tensor<2> {
    let [num_tokens, num_choices] = gates.dims();
    let [_, d_model] = rows.dims();
    let picked = with_zero_row(rows, has_unseated).select(0, index).reshape([num_tokens, num_choices, d_model]);
    (picked * gates.unsqueeze_dim(2)).sum_dim(1).squeeze_dim(1)
}

/// One linear map per expert: `out[e] = x[e] · weight[e] + bias[e]`.
///
/// # Shapes
/// - x: `[E, S, D]`
/// - weight: `[E, D, F]`
/// - bias: `[E, F]`
/// - output: `[E, S, F]`
pub(super) fn batched_linear(x: Tensor<3>, weight: Tensor<3>, bias: Option<Tensor<2>>) -> Tensor<3> {
    let out = x.matmul(weight);
    match bias {
        Some(bias) => out + bias.unsqueeze_dim(1),
        None => out,
    }
}

/// The activation of every element; any shape.
pub(super) fn activation<const R: usize>(x: Tensor<R>, activation: Activation) -> Tensor<R> {
    match activation {
        Activation::Gelu => burn_activation::gelu(x),
        Activation::GeluTanh => burn_activation::gelu_approximate(x),
        Activation::QuickGelu => x.clone() * burn_activation::sigmoid(x * 1.702),
        Activation::Relu => burn_activation::relu(x),
        Activation::Silu => burn_activation::silu(x),
    }
}

/// A zero row behind the last one, for indices that mean "nothing". A row times a zero gate would not do: zero times an
/// infinite value is not zero, and one token's overflow would reach another.
fn with_zero_row(x: Tensor<2>, needed: bool) -> Tensor<2> {
    if !needed {
        return x;
    }
    let [_, width] = x.dims();
    let zero = Tensor::zeros([1, width], (&x.device(), x.dtype()));
    Tensor::cat(vec![x, zero], 0)
}
