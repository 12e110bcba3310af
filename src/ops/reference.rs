//! Reference bodies in plain tensor operations, right on every backend; the oracle for every faster one.

use burn::tensor::{Tensor, activation as burn_activation};

use super::{Activation, Offsets, RowIndex, int_tensor};

/// Gathers the token of each row, `[T, D] -> [R, D]`.
pub(super) fn dispatch(tokens: Tensor<2>, index: &RowIndex) -> Tensor<2> {
    let [num_tokens, _] = tokens.dims();
    let num_choices = index.choice_row.dims()[0] / num_tokens;
    // LibTorch's backend divides integers as f32, which is exact up to 16 million choices.
    tokens.select(0, index.row_choice.clone() / num_choices as i32)
}

/// Sums the rows of each token's choices, weighted: rows `[R, D]`, gates `[T, M]` `-> [T, D]`.
pub(super) fn combine(rows: Tensor<2>, gates: Tensor<2>, index: &RowIndex) -> Tensor<2> {
    let ([num_tokens, num_choices], [num_rows, d_model]) = (gates.dims(), rows.dims());
    // Every row has a choice, so fewer rows than choices means choices without a row.
    let (rows, choice_row) = if num_rows < num_tokens * num_choices {
        let none = index.choice_row.clone().lower_elem(0);
        (with_zero_row(rows), index.choice_row.clone().mask_fill(none, num_rows as i32))
    } else {
        (rows, index.choice_row.clone())
    };
    let picked = rows.select(0, choice_row).reshape([num_tokens, num_choices, d_model]);
    (picked * gates.unsqueeze_dim(2)).sum_dim(1).squeeze_dim(1)
}

/// One linear map per expert: rows `[R, D]`, as many for each, weight `[E, D, F]`, bias `[E, F]` `-> [R, F]`.
pub(super) fn grouped_linear(rows: Tensor<2>, weight: Tensor<3>, bias: Option<Tensor<2>>) -> Tensor<2> {
    let ([num_experts, d_in, d_out], [num_rows, _]) = (weight.dims(), rows.dims());
    let out = rows.reshape([num_experts, num_rows / num_experts, d_in]).matmul(weight);
    let out = match bias {
        Some(bias) => out + bias.unsqueeze_dim(1),
        None => out,
    };
    out.reshape([num_rows, d_out])
}

/// Runs `body` on as many rows for each expert, and takes its results back to `rows`.
///
/// All experts are then one batched product: a product by expert would write the gradient of all experts' weights once for each of them. A place
/// that is too many repeats a row of its expert; nobody reads its result.
pub(super) fn with_even_rows(rows: Tensor<2>, offsets: &[usize], body: impl FnOnce(Tensor<2>, &Offsets) -> Tensor<2>) -> Tensor<2> {
    let device = rows.device();
    let most = most_rows(offsets);
    let last = offsets[offsets.len() - 1] - 1;
    // An expert without rows repeats any row.
    let of_expert = |pair: &[usize]| {
        let end = if pair[0] < pair[1] { pair[1] - 1 } else { last };
        (pair[0]..pair[0] + most).map(|row| row.min(end) as i32).collect::<Vec<_>>()
    };
    let grid_row = offsets.windows(2).flat_map(of_expert).collect();
    let place = |(expert, pair): (usize, &[usize])| (0..pair[1] - pair[0]).map(move |place| (expert * most + place) as i32);
    let row_place = offsets.windows(2).enumerate().flat_map(place).collect();
    let even: Vec<usize> = (0..offsets.len()).map(|expert| expert * most).collect();
    let out = body(rows.select(0, int_tensor(grid_row, &device)), &Offsets::new(even, &device));
    out.select(0, int_tensor(row_place, &device))
}

/// Rows of the expert that has most.
pub(super) fn most_rows(offsets: &[usize]) -> usize {
    offsets.windows(2).map(|pair| pair[1] - pair[0]).max().unwrap_or(0)
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
fn with_zero_row(x: Tensor<2>) -> Tensor<2> {
    let [_, width] = x.dims();
    let zero = Tensor::zeros([1, width], (&x.device(), x.dtype()));
    Tensor::cat(vec![x, zero], 0)
}
