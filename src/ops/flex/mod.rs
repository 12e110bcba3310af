//! Kernels for burn's CPU backend, f32.

mod attention;
mod buffer;
mod gemm;
mod grouped;
mod packed;
mod pointwise;
mod prefetch;
mod rows;
mod tiled_attention;
mod tiles;

use std::sync::Arc;

use burn::backend::{
    Flex,
    flex::{FlexTensor, Layout},
    tensor::{FloatTensor, IntTensor},
};
use burn::tensor::DType;

use super::{
    Activation, AttentionShape, HostOffsets,
    extension::{AttentionBackwardOps, AttentionOps, MoeBackwardOps, MoeOps, PackedOps},
};
use buffer::Buffer;
pub(crate) use packed::PackedMaps;

pub(super) fn release_idle_memory() {
    buffer::release_idle();
}

impl MoeOps for Flex {
    fn moe_activation(x: FloatTensor<Self>, activation: Activation) -> FloatTensor<Self> {
        let x = x.to_contiguous();
        tensor(pointwise::activation(floats(&x), activation), &x.layout().shape().to_vec())
    }

    fn moe_dispatch(x: FloatTensor<Self>, row_choice: IntTensor<Self>, choice_row: IntTensor<Self>) -> FloatTensor<Self> {
        let x = x.to_contiguous();
        let [num_tokens, width] = x.layout().shape().dims();
        let num_choices = choice_row.layout().num_elements() / num_tokens;
        let row_choice = indices(&row_choice);
        tensor(rows::gather(floats(&x), width, &row_choice, num_choices), &[row_choice.len(), width])
    }

    fn moe_combine(
        rows: FloatTensor<Self>,
        gates: FloatTensor<Self>,
        _row_choice: IntTensor<Self>,
        choice_row: IntTensor<Self>,
    ) -> FloatTensor<Self> {
        let (rows, gates) = (rows.to_contiguous(), gates.to_contiguous());
        let ([_, width], [num_tokens, _]) = (rows.layout().shape().dims(), gates.layout().shape().dims());
        tensor(rows::weighted_sum(floats(&rows), width, floats(&gates), &indices(&choice_row), num_tokens), &[num_tokens, width])
    }

    fn moe_grouped_linear(
        x: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        bias: FloatTensor<Self>,
        _offsets: IntTensor<Self>,
        host_offsets: HostOffsets,
        activation: Option<Activation>,
    ) -> FloatTensor<Self> {
        grouped_linear(x, weight, bias, known(&host_offsets), activation, false).0
    }
}

impl MoeBackwardOps for Flex {
    fn moe_grouped_linear_keeping(
        x: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        bias: FloatTensor<Self>,
        _offsets: IntTensor<Self>,
        host_offsets: HostOffsets,
        activation: Activation,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        let (out, pre) = grouped_linear(x, weight, bias, known(&host_offsets), Some(activation), true);
        (out, pre.expect("it was kept"))
    }

    fn moe_activation_backward(x: FloatTensor<Self>, grad: FloatTensor<Self>, activation: Activation) -> FloatTensor<Self> {
        let (x, grad) = (x.to_contiguous(), grad.to_contiguous());
        tensor(pointwise::activation_backward(floats(&x), floats(&grad), activation), &x.layout().shape().to_vec())
    }

    fn moe_dispatch_backward(grad: FloatTensor<Self>, choice_row: IntTensor<Self>, num_tokens: usize) -> FloatTensor<Self> {
        let grad = grad.to_contiguous();
        let [_, width] = grad.layout().shape().dims();
        tensor(rows::sum(floats(&grad), width, &indices(&choice_row), num_tokens), &[num_tokens, width])
    }

    fn moe_combine_backward_rows(
        grad: FloatTensor<Self>,
        gates: FloatTensor<Self>,
        row_choice: IntTensor<Self>,
    ) -> FloatTensor<Self> {
        let (grad, gates) = (grad.to_contiguous(), gates.to_contiguous());
        let ([_, width], [_, num_choices]) = (grad.layout().shape().dims(), gates.layout().shape().dims());
        let row_choice = indices(&row_choice);
        tensor(rows::weighted_gather(floats(&grad), width, floats(&gates), &row_choice, num_choices), &[row_choice.len(), width])
    }

    fn moe_combine_backward_gates(
        grad: FloatTensor<Self>,
        rows: FloatTensor<Self>,
        choice_row: IntTensor<Self>,
    ) -> FloatTensor<Self> {
        let (grad, rows) = (grad.to_contiguous(), rows.to_contiguous());
        let [num_tokens, width] = grad.layout().shape().dims();
        let choice_row = indices(&choice_row);
        let num_choices = choice_row.len() / num_tokens;
        tensor(rows::products(floats(&grad), floats(&rows), width, &choice_row, num_choices), &[num_tokens, num_choices])
    }

    fn moe_grouped_linear_backward_x(
        grad: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        _offsets: IntTensor<Self>,
        host_offsets: HostOffsets,
    ) -> FloatTensor<Self> {
        let (grad, weight) = (grad.to_contiguous(), weight.to_contiguous());
        let ([num_rows, _], [_, d_in, d_out]) = (grad.layout().shape().dims(), weight.layout().shape().dims());
        let maps = grouped::Maps { weight: floats(&weight), d_in, d_out };
        tensor(grouped::backward_x(floats(&grad), &maps, known(&host_offsets)), &[num_rows, d_in])
    }

    fn moe_grouped_linear_backward_weight(
        x: FloatTensor<Self>,
        grad: FloatTensor<Self>,
        _offsets: IntTensor<Self>,
        host_offsets: HostOffsets,
    ) -> FloatTensor<Self> {
        let (x, grad) = (x.to_contiguous(), grad.to_contiguous());
        let ([_, d_in], [_, d_out]) = (x.layout().shape().dims(), grad.layout().shape().dims());
        tensor(
            grouped::backward_weight(floats(&x), floats(&grad), [d_in, d_out], known(&host_offsets)),
            &[known(&host_offsets).len() - 1, d_in, d_out],
        )
    }

    fn moe_grouped_linear_backward_bias(
        grad: FloatTensor<Self>,
        _offsets: IntTensor<Self>,
        host_offsets: HostOffsets,
    ) -> FloatTensor<Self> {
        let grad = grad.to_contiguous();
        let [_, d_out] = grad.layout().shape().dims();
        let offsets = known(&host_offsets);
        tensor(grouped::backward_bias(floats(&grad), d_out, offsets), &[offsets.len() - 1, d_out])
    }
}

impl PackedOps for Flex {
    fn moe_packed_linear(
        x: FloatTensor<Self>,
        bias: FloatTensor<Self>,
        weight: Arc<PackedMaps>,
        host_offsets: Arc<[usize]>,
        activation: Option<Activation>,
    ) -> FloatTensor<Self> {
        let (x, bias) = (x.to_contiguous(), bias.to_contiguous());
        let ([num_rows, _], [_, _, d_out]) = (x.layout().shape().dims(), weight.dims());
        tensor(packed::linear(floats(&x), &weight, Some(floats(&bias)), &host_offsets, activation), &[num_rows, d_out])
    }
}

impl AttentionOps for Flex {
    fn moe_attention(
        query: FloatTensor<Self>,
        key: FloatTensor<Self>,
        value: FloatTensor<Self>,
        shape: AttentionShape,
    ) -> FloatTensor<Self> {
        let [query, key, value] = [query, key, value].map(|x| x.to_contiguous());
        let (query_rows, key, value) = (floats(&query), floats(&key), floats(&value));
        let out = if tiled_attention::is_faster(&shape) {
            tiled_attention::forward(query_rows, key, value, &shape)
        } else {
            attention::forward(query_rows, key, value, &shape)
        };
        tensor(out, &query.layout().shape().to_vec())
    }
}

impl AttentionBackwardOps for Flex {
    fn moe_attention_backward(
        query: FloatTensor<Self>,
        key: FloatTensor<Self>,
        value: FloatTensor<Self>,
        grad: FloatTensor<Self>,
        shape: AttentionShape,
    ) -> (FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>) {
        let [query, key, value, grad] = [query, key, value, grad].map(|x| x.to_contiguous());
        let dims = query.layout().shape().to_vec();
        let gradients = attention::backward(floats(&query), floats(&key), floats(&value), floats(&grad), &shape);
        let [query, key, value] = gradients.map(|gradient| tensor(gradient, &dims));
        (query, key, value)
    }
}

/// Offsets, which this backend's index tensors are never made without.
fn known(offsets: &HostOffsets) -> &[usize] {
    offsets.as_deref().expect("the host made the offsets")
}

/// Also what the activation was applied to, if it is kept.
fn grouped_linear(
    x: FlexTensor,
    weight: FlexTensor,
    bias: FlexTensor,
    offsets: &[usize],
    activation: Option<Activation>,
    keep_pre: bool,
) -> (FlexTensor, Option<FlexTensor>) {
    let (x, weight, bias) = (x.to_contiguous(), weight.to_contiguous(), bias.to_contiguous());
    let ([num_rows, _], [_, d_in, d_out]) = (x.layout().shape().dims(), weight.layout().shape().dims());
    let maps = grouped::Maps { weight: floats(&weight), d_in, d_out };
    let (out, pre) = grouped::linear(floats(&x), &maps, floats(&bias), offsets, activation, keep_pre);
    (tensor(out, &[num_rows, d_out]), pre.map(|pre| tensor(pre, &[num_rows, d_out])))
}

fn floats(x: &FlexTensor) -> &[f32] {
    x.as_slice().expect("a contiguous f32 tensor")
}

fn tensor(values: Buffer, shape: &[usize]) -> FlexTensor {
    FlexTensor::new(values.into_bytes(), Layout::contiguous(shape.into()), DType::F32)
}

/// Integers of either width that burn's devices may be set to; a negative one means "none".
fn indices(x: &FlexTensor) -> Vec<i32> {
    let x = x.to_contiguous();
    match x.dtype() {
        DType::I32 => x.as_slice::<i32>().expect("contiguous").to_vec(),
        DType::I64 => x.as_slice::<i64>().expect("contiguous").iter().map(|&v| v as i32).collect(),
        dtype => panic!("indices of dtype {dtype:?}: expected I32 or I64"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_without_a_choice_are_zeros_and_tokens_that_are_not_finite_are_nan() {
        let (row_choice, choice_row) = ([1, -1], [-1, 0, crate::ops::NON_FINITE, crate::ops::NON_FINITE]);
        let (x, rows, gates) = ([3.0; 4], [5.0; 4], [0.5; 4]);
        assert_eq!(rows::gather(&x, 2, &row_choice, 2)[..], [3.0, 3.0, 0.0, 0.0]);
        assert_eq!(rows::weighted_gather(&x, 2, &gates, &row_choice, 2)[..], [1.5, 1.5, 0.0, 0.0]);
        let sums = rows::weighted_sum(&rows, 2, &gates, &choice_row, 2);
        assert!(sums[..2] == [2.5, 2.5] && sums[2..].iter().all(|value| value.is_nan()), "{:?}", &sums[..]);
        assert_eq!(rows::sum(&rows, 2, &choice_row, 2)[..], [5.0, 5.0, 0.0, 0.0]);
    }

    /// In tests a new buffer holds NaN: see [`Buffer::new`].
    #[test]
    fn every_value_of_an_output_is_written() {
        // Four tokens of width 2 with two choices each; experts 0 and 2 have rows, expert 1 has none, and token 3 has no slot.
        let offsets = [0, 2, 2, 5];
        let (row_choice, choice_row) = ([0, 2, 1, 3, 4], [0, 2, 1, 3, 4, -1, -1, -1]);
        let (x, rows, gates) = ([1.0; 8], [1.0; 10], [0.5; 8]);
        let maps = grouped::Maps { weight: &[1.0; 18], d_in: 2, d_out: 3 };
        let (out, pre) = grouped::linear(&rows, &maps, &[1.0; 9], &offsets, Some(Activation::Gelu), true);
        let outputs = [
            rows::gather(&x, 2, &row_choice, 2),
            rows::weighted_gather(&x, 2, &gates, &row_choice, 2),
            rows::sum(&rows, 2, &choice_row, 4),
            rows::weighted_sum(&rows, 2, &gates, &choice_row, 4),
            rows::products(&x, &rows, 2, &choice_row, 2),
            grouped::linear(&rows, &maps, &[1.0; 9], &offsets, None, false).0,
            out,
            pre.expect("it was kept"),
            grouped::backward_x(&[1.0; 15], &maps, &offsets),
            grouped::backward_weight(&rows, &[1.0; 15], [2, 3], &offsets),
            grouped::backward_bias(&[1.0; 15], 3, &offsets),
            pointwise::activation(&x, Activation::Silu),
            pointwise::activation_backward(&x, &x, Activation::Silu),
        ];
        for (index, output) in outputs.iter().enumerate() {
            assert!(output.iter().all(|value| value.is_finite()), "output {index}: {:?}", &output[..]);
        }
        // The expert without rows has no gradient.
        assert_eq!((&outputs[9][6..12], &outputs[10][3..6]), (&[0.0; 6][..], &[0.0; 3][..]));
    }
}
