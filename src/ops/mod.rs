//! The backend seam: moving rows, multiplying them by their expert's weights, and the activation in between.
//!
//! This module knows tensors only: no module, no configuration, no plan. Each function here picks a backend's own kernels or the reference.

mod activation;
mod choice;
mod precision;
mod reference;
mod router;

#[cfg(any(feature = "_gpu", feature = "flex"))]
mod autodiff;
#[cfg(feature = "_gpu")]
mod cube;
#[cfg(any(feature = "_gpu", feature = "flex"))]
mod extension;
#[cfg(feature = "flex")]
mod flex;

use std::sync::{Arc, OnceLock};

use burn::tensor::{Device, Int, Tensor, TensorData, read_sync};

pub use activation::Activation;
use choice::has_dense_kernels;
pub use choice::{Kernels, release_idle_memory, with_kernels};
pub(crate) use choice::{can_assign_slots, can_wait_for, chosen_kernels, has_attention, has_kernels};
#[cfg(feature = "flex")]
pub(crate) use choice::{has_packed, is_flex};
#[cfg(feature = "flex")]
pub(crate) use flex::PackedMaps;
pub use precision::Precision;
#[cfg(feature = "store")]
pub(crate) use precision::quantize;
pub(crate) use router::{DeviceSlots, GateSum, MIN_GATE_SUM, SlotRules, assign_slots, gates, router_is_guarded, router_logits};

/// First row of each expert and the end, `[E + 1]`, on the host; `None` where only the device knows them.
pub(crate) type HostOffsets = Option<Arc<[usize]>>;

/// First row of each expert and the end, `[E + 1]`: kernels read them on the device, some launches on the host.
#[derive(Clone, Debug)]
pub(crate) struct Offsets {
    pub device: Tensor<1, Int>,
    /// Read from the device by the first who needs them, unless they were made on the host.
    host: Arc<OnceLock<Arc<[usize]>>>,
}

impl Offsets {
    pub(crate) fn new(host: impl Into<Arc<[usize]>>, device: &Device) -> Self {
        let host = host.into();
        let on_device = int_tensor(host.iter().map(|&offset| offset as i32).collect(), device);
        Self { device: on_device, host: Arc::new(host.into()) }
    }

    /// Known to the device that made them; on the host too, if they are the same whatever was assigned.
    #[cfg(feature = "_gpu")]
    fn on_device(device: Tensor<1, Int>, host: HostOffsets) -> Self {
        Self { device, host: Arc::new(host.map_or_else(OnceLock::new, Into::into)) }
    }

    /// On the host; waits for the device if they are not known yet.
    pub(crate) fn host(&self) -> &Arc<[usize]> {
        self.host.get_or_init(|| read_sync(self.read()))
    }

    /// Makes them known to the host, for a device that it cannot wait for.
    pub(crate) async fn read_async(&self) {
        if self.host.get().is_none() {
            // What somebody else has read meanwhile is the same.
            let _ = self.host.set(self.read().await);
        }
    }

    async fn read(&self) -> Arc<[usize]> {
        ints(&self.device).await.into_iter().map(|offset| offset as usize).collect()
    }

    /// On the host, unless products of `rows` manage without.
    #[cfg(any(feature = "_gpu", feature = "flex"))]
    fn for_products_of(&self, rows: &Tensor<2>) -> HostOffsets {
        #[cfg(feature = "_gpu")]
        if !choice::products_need_host_offsets(rows, self.device.dims()[0] - 1) {
            return self.host.get().cloned();
        }
        let _ = rows;
        Some(self.host().clone())
    }

    /// Whether every expert has as many rows.
    fn are_even(&self) -> bool {
        let (host, num_experts) = (self.host(), self.host().len() - 1);
        reference::most_rows(host) * num_experts == host[num_experts]
    }
}

/// Integers on a device, `[N]`.
pub(crate) fn int_tensor(values: Vec<i32>, device: &Device) -> Tensor<1, Int> {
    let len = values.len();
    Tensor::from_data(TensorData::new(values, [len]), device)
}

/// What is in a tensor of indices.
pub(crate) async fn ints(indices: &Tensor<1, Int>) -> Vec<i32> {
    let data = indices.clone().into_data_async().await.expect("the device can be read");
    data.try_into_vec_as::<i32>().expect("indices are integers")
}

/// Which choice each row of the experts' input belongs to, and the way back. Rows are sorted by expert.
#[derive(Clone, Debug)]
pub(crate) struct RowIndex {
    /// Where each expert's rows begin.
    pub offsets: Offsets,
    /// Choice of each row, `t · M + m`, `[R]`; −1 for a row without one, which holds zeros. Only what a device assigned has such rows: empty
    /// slots, and those behind the last expert's rows.
    pub row_choice: Tensor<1, Int>,
    /// Row of each choice, `[T · M]`; −1 for a choice without one, or [`NON_FINITE`].
    pub choice_row: Tensor<1, Int>,
}

impl RowIndex {
    /// Rows in all, `R`.
    pub(crate) fn num_rows(&self) -> usize {
        self.row_choice.dims()[0]
    }

    /// Without the empty rows behind the last expert's. Waits for the device, and leaves one row where there is none.
    pub(crate) fn without_rows_behind(self) -> Self {
        let num_rows = self.offsets.host().last().copied().unwrap_or(0).max(1);
        Self { row_choice: self.row_choice.narrow(0, 0, num_rows), ..self }
    }
}

/// Marks all choices of a valid token whose scores are not finite, where a device assigns the slots; combining sets the token's output to NaN.
pub(crate) const NON_FINITE: i32 = -2;

/// Gathers the token of each row.
///
/// # Shapes
/// - tokens: `[T, D]`
/// - output: `[R, D]`
pub(crate) fn dispatch(tokens: Tensor<2>, index: &RowIndex) -> Tensor<2> {
    if has_kernels(&tokens.device(), tokens.dtype()) { kernel::dispatch(tokens, index) } else { reference::dispatch(tokens, index) }
}

/// Runs `body`, which maps rows `[R, D] -> [R, D']` by [`grouped_linear`], on rows as the reference takes them where there are no kernels: as many
/// for each expert.
pub(crate) fn with_even_rows(rows: Tensor<2>, offsets: &Offsets, body: impl FnOnce(Tensor<2>, &Offsets) -> Tensor<2>) -> Tensor<2> {
    if has_kernels(&rows.device(), rows.dtype()) || offsets.are_even() {
        return body(rows, offsets);
    }
    reference::with_even_rows(rows, offsets.host(), body)
}

/// One linear map and activation per expert: `out[r] = act(rows[r] · weight[e(r)] + bias[e(r)])`. What burn quantized is brought back to floats.
///
/// # Shapes
/// - rows: `[R, D]`
/// - weight: `[E, D, F]`
/// - bias: `[E, F]`
/// - output: `[R, F]`
pub(crate) fn grouped_linear(
    rows: Tensor<2>,
    weight: Tensor<3>,
    bias: Option<Tensor<2>>,
    activation: Option<Activation>,
    offsets: &Offsets,
) -> Tensor<2> {
    let (weight, bias) = (weight.dequantize(), bias.map(Tensor::dequantize));
    if has_kernels(&rows.device(), rows.dtype()) {
        return kernel::grouped_linear(rows, weight, bias, activation, offsets.clone());
    }
    debug_assert!(offsets.are_even(), "the reference takes as many rows for each expert: see `with_even_rows`");
    let out = reference::grouped_linear(rows, weight, bias);
    match activation {
        Some(activation) => reference::activation(out, activation),
        None => out,
    }
}

/// Sums the rows of each token's choices, weighted: `out[t] = Σ_m gates[t, m] · rows[row of choice (t, m)]`; a choice without a row
/// adds nothing.
///
/// # Shapes
/// - rows: `[R, D]`
/// - gates: `[T, M]`
/// - output: `[T, D]`
pub(crate) fn combine(rows: Tensor<2>, gates: Tensor<2>, index: &RowIndex) -> Tensor<2> {
    if has_kernels(&rows.device(), rows.dtype()) {
        kernel::combine(rows, gates, index)
    } else {
        reference::combine(rows, gates, index)
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
    let (weight, bias) = (weight.dequantize(), bias.map(Tensor::dequantize));
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

/// What stands for a bias where there is none, in the rows' number type, `[E, F]`.
#[cfg(any(feature = "_gpu", feature = "flex"))]
fn no_bias(num_experts: usize, d_out: usize, rows: &Tensor<2>) -> Tensor<2> {
    Tensor::zeros([num_experts, d_out], (&rows.device(), rows.dtype()))
}

/// [`grouped_linear`] with packed weights, without gradients; only where [`has_packed`] says so.
#[cfg(feature = "flex")]
pub(crate) fn packed_linear(
    rows: Tensor<2>,
    weight: &Arc<PackedMaps>,
    bias: Option<Tensor<2>>,
    activation: Option<Activation>,
    host_offsets: Arc<[usize]>,
) -> Tensor<2> {
    use burn::backend::Dispatch;
    use extension::PackedOps;

    let [num_experts, _, d_out] = weight.dims();
    let bias = bias.unwrap_or_else(|| no_bias(num_experts, d_out, &rows));
    Tensor::from_dispatch(Dispatch::moe_packed_linear(
        rows.into_dispatch(),
        bias.into_dispatch(),
        weight.clone(),
        host_offsets,
        activation,
    ))
}

/// The samples that attention keeps apart, and how their tokens look at each other.
#[derive(Clone, Debug)]
#[cfg_attr(not(feature = "flex"), allow(dead_code))]
pub(crate) struct AttentionShape {
    /// First row of each sample and the end, `[B + 1]`.
    pub samples: Arc<[usize]>,
    /// Width of all heads together, `D`.
    pub width: usize,
    /// Heads, each of width `D / heads`.
    pub heads: usize,
    /// Whether a token looks only at itself and at those before it.
    pub causal: bool,
}

/// `softmax(query · keyᵀ / √(D / heads)) · value` within each sample and head; only where [`has_attention`] says so.
///
/// # Shapes
/// - query, key, value, output: `[R, D]`, the samples one after the other
#[cfg(feature = "flex")]
pub(crate) fn attention(query: Tensor<2>, key: Tensor<2>, value: Tensor<2>, shape: AttentionShape) -> Tensor<2> {
    use burn::backend::Dispatch;
    use extension::AttentionOps;

    let [query, key, value] = [query, key, value].map(Tensor::into_dispatch);
    Tensor::from_dispatch(Dispatch::moe_attention(query, key, value, shape))
}

#[cfg(not(feature = "flex"))]
pub(crate) fn attention(_: Tensor<2>, _: Tensor<2>, _: Tensor<2>, _: AttentionShape) -> Tensor<2> {
    unreachable!("no backend with attention is built in")
}

/// The kernels as functions of tensors.
#[cfg(any(feature = "_gpu", feature = "flex"))]
mod kernel {
    use burn::backend::Dispatch;
    use burn::tensor::Tensor;

    use super::{Activation, Offsets, RowIndex, extension::MoeOps};

    pub(super) fn activation<const R: usize>(x: Tensor<R>, activation: Activation) -> Tensor<R> {
        Tensor::from_dispatch(Dispatch::moe_activation(x.into_dispatch(), activation))
    }

    pub(super) fn dispatch(tokens: Tensor<2>, index: &RowIndex) -> Tensor<2> {
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
        let bias = bias.unwrap_or_else(|| super::no_bias(num_experts, d_out, &rows));
        let host_offsets = offsets.for_products_of(&rows);
        Tensor::from_dispatch(Dispatch::moe_grouped_linear(
            rows.into_dispatch(),
            weight.into_dispatch(),
            bias.into_dispatch(),
            offsets.device.into_dispatch(),
            host_offsets,
            activation,
        ))
    }

    pub(super) fn combine(rows: Tensor<2>, gates: Tensor<2>, index: &RowIndex) -> Tensor<2> {
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
#[cfg(not(any(feature = "_gpu", feature = "flex")))]
mod kernel {
    use burn::tensor::Tensor;

    use super::{Activation, Offsets, RowIndex};

    const NONE: &str = "no backend with kernels is built in";

    pub(super) fn activation<const R: usize>(_: Tensor<R>, _: Activation) -> Tensor<R> {
        unreachable!("{NONE}")
    }

    pub(super) fn dispatch(_: Tensor<2>, _: &RowIndex) -> Tensor<2> {
        unreachable!("{NONE}")
    }

    pub(super) fn grouped_linear(_: Tensor<2>, _: Tensor<3>, _: Option<Tensor<2>>, _: Option<Activation>, _: Offsets) -> Tensor<2> {
        unreachable!("{NONE}")
    }

    pub(super) fn combine(_: Tensor<2>, _: Tensor<2>, _: &RowIndex) -> Tensor<2> {
        unreachable!("{NONE}")
    }
}
