//! Kernels for every GPU that burn knows, in CubeCL: one source for CUDA, Vulkan, Metal and WebGPU.
//!
//! f32, f16 and bf16, with sums in f32. The library has validated everything by the time a kernel runs.

pub(super) mod by_expert;
mod counts;
mod gates;
mod grouped;
mod launch;
mod pointwise;
mod router;
mod rows;
mod slots;
mod sums;
mod tensor_cores;

use burn::backend::tensor::{FloatTensor, IntTensor};
use burn_cubecl::{CubeBackend, kernel::into_contiguous, tensor::CubeTensor};

use super::{
    Activation, GateSum, HostOffsets, SlotRules,
    extension::{MoeBackwardOps, MoeOps, RouterBackwardOps, RouterOps, SlotOps},
};
use grouped::{Linear, Maps};

impl MoeOps for CubeBackend {
    fn moe_activation(x: FloatTensor<Self>, activation: Activation) -> FloatTensor<Self> {
        pointwise::activation(into_contiguous(x), activation)
    }

    fn moe_dispatch(x: FloatTensor<Self>, row_choice: IntTensor<Self>, choice_row: IntTensor<Self>) -> FloatTensor<Self> {
        let [num_tokens, _] = x.meta.shape().dims();
        let num_choices = choice_row.meta.num_elements() / num_tokens;
        rows::gather(into_contiguous(x), None, into_contiguous(row_choice), num_choices)
    }

    fn moe_combine(
        rows: FloatTensor<Self>,
        gates: FloatTensor<Self>,
        _row_choice: IntTensor<Self>,
        choice_row: IntTensor<Self>,
    ) -> FloatTensor<Self> {
        let [num_tokens, _] = gates.meta.shape().dims();
        rows::sum(into_contiguous(rows), Some(into_contiguous(gates)), into_contiguous(choice_row), num_tokens)
    }

    fn moe_grouped_linear(
        x: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        bias: FloatTensor<Self>,
        offsets: IntTensor<Self>,
        host_offsets: HostOffsets,
        activation: Option<Activation>,
    ) -> FloatTensor<Self> {
        let (weight, bias) = (into_contiguous(weight), Some(into_contiguous(bias)));
        linear(x, Maps { weight, transposed: false, bias, activation, keep_pre: false }, offsets, &host_offsets).out
    }
}

impl MoeBackwardOps for CubeBackend {
    fn moe_grouped_linear_keeping(
        x: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        bias: FloatTensor<Self>,
        offsets: IntTensor<Self>,
        host_offsets: HostOffsets,
        activation: Activation,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        let (weight, bias, activation) = (into_contiguous(weight), Some(into_contiguous(bias)), Some(activation));
        let output = linear(x, Maps { weight, transposed: false, bias, activation, keep_pre: true }, offsets, &host_offsets);
        (output.out, output.pre.expect("it is kept"))
    }

    fn moe_activation_backward(x: FloatTensor<Self>, grad: FloatTensor<Self>, activation: Activation) -> FloatTensor<Self> {
        pointwise::activation_backward(into_contiguous(x), into_contiguous(grad), activation)
    }

    fn moe_dispatch_backward(grad: FloatTensor<Self>, choice_row: IntTensor<Self>, num_tokens: usize) -> FloatTensor<Self> {
        rows::sum(into_contiguous(grad), None, into_contiguous(choice_row), num_tokens)
    }

    fn moe_combine_backward_rows(
        grad: FloatTensor<Self>,
        gates: FloatTensor<Self>,
        row_choice: IntTensor<Self>,
    ) -> FloatTensor<Self> {
        let [_, num_choices] = gates.meta.shape().dims();
        rows::gather(into_contiguous(grad), Some(into_contiguous(gates)), into_contiguous(row_choice), num_choices)
    }

    fn moe_combine_backward_gates(
        grad: FloatTensor<Self>,
        rows: FloatTensor<Self>,
        choice_row: IntTensor<Self>,
    ) -> FloatTensor<Self> {
        rows::products(into_contiguous(grad), into_contiguous(rows), into_contiguous(choice_row))
    }

    fn moe_grouped_linear_backward_x(
        grad: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        offsets: IntTensor<Self>,
        host_offsets: HostOffsets,
    ) -> FloatTensor<Self> {
        let maps = Maps { weight: into_contiguous(weight), transposed: true, bias: None, activation: None, keep_pre: false };
        linear(grad, maps, offsets, &host_offsets).out
    }

    fn moe_grouped_linear_backward_weight(
        x: FloatTensor<Self>,
        grad: FloatTensor<Self>,
        offsets: IntTensor<Self>,
        host_offsets: HostOffsets,
    ) -> FloatTensor<Self> {
        let (x, grad, offsets) = (into_contiguous(x), into_contiguous(grad), into_contiguous(offsets));
        match Products::of(&x, grad.meta.shape()[1], &host_offsets) {
            Products::TensorCores => tensor_cores::weight_gradient(x, grad, offsets),
            Products::ByExpert(host_offsets) => by_expert::weight_gradient(x, grad, host_offsets),
            Products::Tiled => grouped::weight_gradient(x, grad, offsets),
        }
    }

    fn moe_grouped_linear_backward_bias(
        grad: FloatTensor<Self>,
        offsets: IntTensor<Self>,
        _host_offsets: HostOffsets,
    ) -> FloatTensor<Self> {
        sums::by_expert(into_contiguous(grad), into_contiguous(offsets))
    }
}

impl RouterOps for CubeBackend {
    fn moe_router_logits(x: FloatTensor<Self>, weight: FloatTensor<Self>) -> FloatTensor<Self> {
        router::logits(into_contiguous(x), into_contiguous(weight))
    }

    fn moe_gates(
        scores: FloatTensor<Self>,
        chosen: IntTensor<Self>,
        choice_row: IntTensor<Self>,
        rule: GateSum,
    ) -> FloatTensor<Self> {
        gates::gates(into_contiguous(scores), into_contiguous(chosen), into_contiguous(choice_row), rule)
    }
}

impl RouterBackwardOps for CubeBackend {
    fn moe_router_logits_backward_x(
        grad: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        x: FloatTensor<Self>,
        logits: FloatTensor<Self>,
    ) -> FloatTensor<Self> {
        router::tokens_gradient(into_contiguous(grad), into_contiguous(weight), &x, into_contiguous(logits))
    }

    fn moe_router_logits_backward_weight(
        grad: FloatTensor<Self>,
        x: FloatTensor<Self>,
        logits: FloatTensor<Self>,
    ) -> FloatTensor<Self> {
        router::weight_gradient(into_contiguous(grad), into_contiguous(x), into_contiguous(logits))
    }

    fn moe_gates_backward(
        grad: FloatTensor<Self>,
        scores: FloatTensor<Self>,
        chosen: IntTensor<Self>,
        choice_row: IntTensor<Self>,
        rule: GateSum,
    ) -> FloatTensor<Self> {
        let (chosen, choice_row) = (into_contiguous(chosen), into_contiguous(choice_row));
        gates::scores_gradient(into_contiguous(grad), into_contiguous(scores), chosen, choice_row, rule)
    }
}

impl SlotOps for CubeBackend {
    fn moe_assign_slots(
        scores: FloatTensor<Self>,
        states: IntTensor<Self>,
        rules: SlotRules,
    ) -> (IntTensor<Self>, IntTensor<Self>, IntTensor<Self>, IntTensor<Self>) {
        slots::assign(into_contiguous(scores), into_contiguous(states), rules)
    }
}

/// `[R, K] -> [R, N]` by each row's expert.
fn linear(x: CubeTensor, maps: Maps, offsets: CubeTensor, host_offsets: &HostOffsets) -> Linear {
    let (x, offsets) = (into_contiguous(x), into_contiguous(offsets));
    match Products::of(&x, maps.columns(), host_offsets) {
        Products::TensorCores => tensor_cores::linear(x, maps, offsets),
        Products::ByExpert(host_offsets) => by_expert::linear(x, maps, offsets, host_offsets),
        Products::Tiled => grouped::linear(x, maps, offsets),
    }
}

/// How the experts' products are computed.
enum Products<'a> {
    /// One launch, on tensor cores.
    TensorCores,
    /// One of the backend's products for each expert, whose rows begin there.
    ByExpert(&'a [usize]),
    /// One launch, in tiles.
    Tiled,
}

impl<'a> Products<'a> {
    /// For rows `[R, D]` and others of a width.
    fn of(x: &CubeTensor, width: usize, host_offsets: &'a HostOffsets) -> Self {
        let widths = [x.meta.shape()[1], width];
        if tensor_cores::are_usable(x, widths) {
            return Self::TensorCores;
        }
        match host_offsets {
            Some(offsets) if by_expert::is_worth_it(x, widths, offsets) => Self::ByExpert(offsets),
            _ => Self::Tiled,
        }
    }
}
