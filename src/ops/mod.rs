//! The backend seam: moving rows, multiplying them by their expert's weights, and the activation in between.
//!
//! This module knows tensors only: no module, no configuration, no plan. Each function here picks a backend's own kernels or the
//! reference; [`RowIndex`] carries the pick from one function to the next, because the two lay out rows differently.

mod activation;
mod choice;
mod reference;

#[cfg(any(feature = "cube", feature = "flex"))]
mod autodiff;
#[cfg(feature = "cube")]
mod cube;
#[cfg(any(feature = "cube", feature = "flex"))]
mod extension;
#[cfg(feature = "flex")]
mod flex;

use std::sync::Arc;

use burn::tensor::{DType, Device, Int, Tensor, TensorData};

pub use activation::Activation;
use choice::has_dense_kernels;
#[cfg(feature = "cube")]
use choice::has_router_kernel;
pub use choice::{Kernels, release_idle_memory, with_kernels};
pub(crate) use choice::{can_seat, has_kernels};

/// Which token each row of the experts' input comes from, and the way back.
#[derive(Clone, Debug)]
#[allow(clippy::large_enum_variant, reason = "there is one for each call of a layer")]
pub(crate) enum RowIndex {
    /// `N = R` rows sorted by expert, without padding: what kernels take.
    Ragged(RaggedIndex),
    /// `N = E · S` rows, `S` for each expert: what batched matrix products take.
    Padded(PaddedIndex),
}

impl RowIndex {
    /// Where each expert's rows begin, when the rows are ragged.
    pub(crate) fn offsets(&self) -> Option<&Offsets> {
        match self {
            Self::Ragged(index) => Some(&index.offsets),
            Self::Padded(_) => None,
        }
    }
}

/// First row of each expert and the end, `[E + 1]`, in both places: a kernel reads the one, its launch the other.
#[derive(Clone, Debug)]
pub(crate) struct Offsets {
    pub device: Tensor<1, Int>,
    pub host: Arc<[usize]>,
}

impl Offsets {
    pub(crate) fn new(host: impl Into<Arc<[usize]>>, device: &Device) -> Self {
        let host = host.into();
        let values: Vec<i32> = host.iter().map(|&offset| offset as i32).collect();
        Self { device: Tensor::from_data(TensorData::new(values, [host.len()]), device), host }
    }
}

/// See [`RowIndex::Ragged`].
#[derive(Clone, Debug)]
pub(crate) struct RaggedIndex {
    /// Where each expert's rows begin.
    pub offsets: Offsets,
    /// Choice of each row, `t · M + m`, `[R]`; −1 for a row without one, which holds zeros.
    pub row_choice: Tensor<1, Int>,
    /// Row of each choice, `[T · M]`; −1 for a choice without one, or [`LOST`].
    pub choice_row: Tensor<1, Int>,
}

/// See [`RowIndex::Padded`].
#[derive(Clone, Debug)]
pub(crate) struct PaddedIndex {
    /// Some row has no token.
    pub has_empty_slots: bool,
    /// Some choice has no row.
    pub has_unseated_choices: bool,
    /// Token of each row, `[E · S]`; `T` for an empty one.
    pub slot_token: Tensor<1, Int>,
    /// Row of each choice, `[T · M]`; `E · S` for a choice without one.
    pub choice_slot: Tensor<1, Int>,
}

/// Marks all choices of a valid token whose scores are not finite, where a device hands out seats; combining makes NaN of it.
pub(crate) const LOST: i32 = -2;

/// Seats that were handed out on a device, in slots of equal number for all experts.
#[derive(Clone, Debug)]
pub(crate) struct DeviceSeats {
    /// Expert of each choice, `[T · K]`; −1 for padding, or [`LOST`].
    pub chosen: Tensor<1, Int>,
    /// Slot of each choice, `[T · K]`; −1 for a choice without one, or [`LOST`].
    pub choice_slot: Tensor<1, Int>,
    /// Choice of each slot, `[E · S]`; −1 for an empty one.
    pub slot_choice: Tensor<1, Int>,
    /// Slots of each expert, `S`, all groups together.
    pub slots: usize,
}

impl DeviceSeats {
    /// Slots as rows.
    pub(crate) fn index(&self, num_experts: usize, device: &Device) -> RaggedIndex {
        let offsets: Vec<usize> = (0..=num_experts).map(|expert| expert * self.slots).collect();
        RaggedIndex {
            offsets: Offsets::new(offsets, device),
            row_choice: self.slot_choice.clone(),
            choice_row: self.choice_slot.clone(),
        }
    }
}

/// What a router says of each expert, `x · weight` in f32.
///
/// # Shapes
/// - x: `[T, D]`
/// - weight: `[D, E]`
/// - output: `[T, E]`, f32
pub(crate) fn router_logits(x: Tensor<2>, weight: Tensor<2>) -> Tensor<2> {
    let weight = weight.cast(DType::F32);
    if x.dims()[0] == 0 {
        return Tensor::zeros([0, weight.dims()[1]], (&x.device(), DType::F32));
    }
    #[cfg(feature = "cube")]
    if has_router_kernel(&x.device(), x.dtype()) {
        use extension::RouterOps;
        let logits = burn::backend::Dispatch::moe_router_logits(x.into_dispatch(), weight.transpose().into_dispatch());
        return Tensor::from_dispatch(logits);
    }
    x.cast(DType::F32).matmul(weight)
}

/// How seats are handed out.
#[derive(Clone, Copy, Debug)]
#[cfg_attr(not(feature = "cube"), allow(dead_code))]
pub(crate) struct SeatRules {
    /// Choices per token, `K`.
    pub top_k: usize,
    /// Tokens that compete with each other, in order.
    pub group_size: usize,
    /// Slots of each expert in each group.
    pub slots: usize,
    /// All choices of a token before the next one; otherwise all first choices, then all second ones, ….
    pub token_major: bool,
}

/// Hands out seats on the device: the experts of highest score for each token, ties to the lower one, in the order of the rules.
///
/// # Shapes
/// - scores: `[T, E]`, f32
/// - bias: `[E]`, f32, added to scores
/// - valid, protected: `[T]`, 0 or 1
#[cfg(feature = "cube")]
pub(crate) fn seat_on_device(
    scores: Tensor<2>,
    bias: Option<Tensor<1>>,
    valid: Option<Tensor<1, Int>>,
    protected: Option<Tensor<1, Int>>,
    rules: SeatRules,
) -> DeviceSeats {
    use burn::backend::Dispatch;
    use extension::SeatOps;

    let [num_tokens, num_experts] = scores.dims();
    // No gradient passes through seats.
    let (scores, bias) = (scores.inner(), bias.map(|bias| bias.inner()));
    let (valid, protected) = (valid.map(|flags| flags.inner()), protected.map(|flags| flags.inner()));
    let device = scores.device();
    let given = [bias.is_some(), valid.is_some(), protected.is_some()];
    // What stands for something that is not there is never read.
    let bias = bias.map_or_else(|| scores.clone().into_dispatch(), |bias| bias.into_dispatch());
    let flags = valid.clone().or(protected.clone()).unwrap_or_else(|| Tensor::zeros([1], &device));
    let [valid, protected] = [valid, protected].map(|given| given.unwrap_or_else(|| flags.clone()).into_dispatch());
    let (chosen, choice_slot, slot_choice) = Dispatch::moe_seat(scores.into_dispatch(), bias, valid, protected, rules, given);
    let [chosen, choice_slot, slot_choice] = [chosen, choice_slot, slot_choice].map(Tensor::from_dispatch);
    let slots = rules.slots * num_tokens / rules.group_size;
    debug_assert_eq!(slot_choice.dims(), [num_experts * slots]);
    DeviceSeats { chosen, choice_slot, slot_choice, slots }
}

#[cfg(not(feature = "cube"))]
pub(crate) fn seat_on_device(
    _: Tensor<2>,
    _: Option<Tensor<1>>,
    _: Option<Tensor<1, Int>>,
    _: Option<Tensor<1, Int>>,
    _: SeatRules,
) -> DeviceSeats {
    unreachable!("no backend that hands out seats is built in")
}

/// Gathers the token of each row; a padded row holds zeros.
///
/// # Shapes
/// - tokens: `[T, D]`
/// - output: `[N, D]`
pub(crate) fn dispatch(tokens: Tensor<2>, index: &RowIndex) -> Tensor<2> {
    match index {
        RowIndex::Ragged(index) => kernel::dispatch(tokens, index),
        RowIndex::Padded(index) => reference::gather(tokens, index.slot_token.clone(), index.has_empty_slots),
    }
}

/// One linear map and activation per expert: `out[r] = act(rows[r] · weight[e(r)] + bias[e(r)])`.
///
/// With `offsets` the kernels run; without, every expert has `N / E` rows.
///
/// # Shapes
/// - rows: `[N, D]`
/// - weight: `[E, D, F]`
/// - bias: `[E, F]`
/// - output: `[N, F]`
pub(crate) fn grouped_linear(
    rows: Tensor<2>,
    weight: Tensor<3>,
    bias: Option<Tensor<2>>,
    activation: Option<Activation>,
    offsets: Option<&Offsets>,
) -> Tensor<2> {
    if let Some(offsets) = offsets {
        return kernel::grouped_linear(rows, weight, bias, activation, offsets.clone());
    }
    let [num_experts, d_in, d_out] = weight.dims();
    let [num_rows, _] = rows.dims();
    let out = reference::batched_linear(rows.reshape([num_experts, num_rows / num_experts, d_in]), weight, bias);
    let out = match activation {
        Some(activation) => reference::activation(out, activation),
        None => out,
    };
    out.reshape([num_rows, d_out])
}

/// Sums the rows of each token's choices, weighted: `out[t] = Σ_m gates[t, m] · rows[row of choice (t, m)]`; a choice without a row
/// adds nothing.
///
/// # Shapes
/// - rows: `[N, D]`
/// - gates: `[T, M]`
/// - output: `[T, D]`
pub(crate) fn combine(rows: Tensor<2>, gates: Tensor<2>, index: &RowIndex) -> Tensor<2> {
    match index {
        RowIndex::Ragged(index) => kernel::combine(rows, gates, index),
        RowIndex::Padded(index) => reference::combine(rows, gates, index.choice_slot.clone(), index.has_unseated_choices),
    }
}

/// The activation of every element; any shape.
pub(crate) fn activation<const R: usize>(x: Tensor<R>, activation: Activation) -> Tensor<R> {
    if has_dense_kernels(&x.device(), x.dtype()) {
        return kernel::activation(x, activation);
    }
    reference::activation(x, activation)
}

/// `act(x · weight + bias)` with one weight for all rows.
///
/// # Shapes
/// - x: `[T, D]`
/// - weight: `[D, F]`
/// - bias: `[F]`
/// - output: `[T, F]`
pub(crate) fn linear(x: Tensor<2>, weight: Tensor<2>, bias: Option<Tensor<1>>, act: Option<Activation>) -> Tensor<2> {
    if has_dense_kernels(&x.device(), x.dtype()) {
        let offsets = Offsets::new([0, x.dims()[0]], &x.device());
        return kernel::grouped_linear(x, weight.unsqueeze_dim(0), bias.map(|b| b.unsqueeze_dim(0)), act, offsets);
    }
    let out = burn::tensor::module::linear(x, weight, bias);
    match act {
        Some(act) => reference::activation(out, act),
        None => out,
    }
}

/// The kernels as functions of tensors.
#[cfg(any(feature = "cube", feature = "flex"))]
mod kernel {
    use burn::backend::Dispatch;
    use burn::tensor::Tensor;

    use super::{Activation, Offsets, RaggedIndex, extension::MoeOps};

    pub(super) fn activation<const R: usize>(x: Tensor<R>, activation: Activation) -> Tensor<R> {
        Tensor::from_dispatch(Dispatch::moe_activation(x.into_dispatch(), activation))
    }

    pub(super) fn dispatch(tokens: Tensor<2>, index: &RaggedIndex) -> Tensor<2> {
        let (row_choice, choice_row) = (index.row_choice.clone(), index.choice_row.clone());
        Tensor::from_dispatch(Dispatch::moe_dispatch(
            tokens.into_dispatch(),
            row_choice.into_dispatch(),
            choice_row.into_dispatch(),
        ))
    }

    pub(super) fn grouped_linear(
        rows: Tensor<2>,
        weight: Tensor<3>,
        bias: Option<Tensor<2>>,
        activation: Option<Activation>,
        offsets: Offsets,
    ) -> Tensor<2> {
        let [num_experts, _, d_out] = weight.dims();
        let bias = bias.unwrap_or_else(|| Tensor::zeros([num_experts, d_out], &weight.device()));
        Tensor::from_dispatch(Dispatch::moe_grouped_linear(
            rows.into_dispatch(),
            weight.into_dispatch(),
            bias.into_dispatch(),
            offsets.device.into_dispatch(),
            offsets.host,
            activation,
        ))
    }

    pub(super) fn combine(rows: Tensor<2>, gates: Tensor<2>, index: &RaggedIndex) -> Tensor<2> {
        let (row_choice, choice_row) = (index.row_choice.clone(), index.choice_row.clone());
        Tensor::from_dispatch(Dispatch::moe_combine(
            rows.into_dispatch(),
            gates.into_dispatch(),
            row_choice.into_dispatch(),
            choice_row.into_dispatch(),
        ))
    }
}

/// What stands in their place where no backend has any; `has_kernels` says so.
#[cfg(not(any(feature = "cube", feature = "flex")))]
mod kernel {
    use burn::tensor::Tensor;

    use super::{Activation, Offsets, RaggedIndex};

    const NONE: &str = "no backend with kernels is built in";

    pub(super) fn activation<const R: usize>(_: Tensor<R>, _: Activation) -> Tensor<R> {
        unreachable!("{NONE}")
    }

    pub(super) fn dispatch(_: Tensor<2>, _: &RaggedIndex) -> Tensor<2> {
        unreachable!("{NONE}")
    }

    pub(super) fn grouped_linear(_: Tensor<2>, _: Tensor<3>, _: Option<Tensor<2>>, _: Option<Activation>, _: Offsets) -> Tensor<2> {
        unreachable!("{NONE}")
    }

    pub(super) fn combine(_: Tensor<2>, _: Tensor<2>, _: &RaggedIndex) -> Tensor<2> {
        unreachable!("{NONE}")
    }
}
