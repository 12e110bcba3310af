//! Kernel or reference: decided here and nowhere else.

use std::cell::Cell;

#[cfg(feature = "_gpu")]
use burn::tensor::Tensor;
use burn::tensor::{DType, Device};

#[cfg(feature = "_gpu")]
use super::cube::by_expert::MIN_ROWS;

/// Which implementations the layers use: this crate's own for the backend, or plain tensor operations.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Kernels {
    /// The backend's own kernels where there are some (f32 on burn's CPU backend; f32, f16 and bf16 on GPUs), plain tensor operations elsewhere.
    #[default]
    Fastest,
    /// Plain tensor operations everywhere: what every kernel is tested against.
    Reference,
}

thread_local! {
    static KERNELS: Cell<Kernels> = const { Cell::new(Kernels::Fastest) };
}

/// Runs `body` with another choice on this thread; a backward pass follows the choice of its forward pass.
///
/// ```
/// # use burn::tensor::{Device, Distribution, Tensor};
/// # use burn_moe::{MoeFeedForwardConfig, kernels::{Kernels, with_kernels}};
/// # let device = Device::default();
/// # let layer = MoeFeedForwardConfig::new(8, 16, 4).init(&device);
/// # let x = Tensor::<2>::random([6, 8], Distribution::Default, &device);
/// let fast = layer.forward(x.clone()).output;
/// let plain = with_kernels(Kernels::Reference, || layer.forward(x).output);
/// # let difference = (fast - plain).abs().max().into_scalar::<f32>();
/// # assert!(difference < 1e-5);
/// ```
pub fn with_kernels<R>(kernels: Kernels, body: impl FnOnce() -> R) -> R {
    struct Restore(Kernels);
    impl Drop for Restore {
        fn drop(&mut self) {
            KERNELS.set(self.0);
        }
    }
    let _restore = Restore(KERNELS.replace(kernels));
    body()
}

/// What [`with_kernels`] chose for this thread.
pub(crate) fn chosen_kernels() -> Kernels {
    KERNELS.get()
}

/// What a device has from this crate.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Has {
    /// Nothing: plain tensor operations.
    Nothing,
    /// Everything that experts need, slot assignment included.
    Experts,
    /// That, and maps and activations faster than the backend's own.
    ExpertsAndDense,
}

fn has(device: &Device, dtype: DType) -> Has {
    #[allow(unused_imports)]
    use burn::backend::DispatchDevice;
    if KERNELS.get() == Kernels::Reference {
        return Has::Nothing;
    }
    match (device.clone().inner().as_dispatch(), dtype) {
        #[cfg(feature = "flex")]
        (DispatchDevice::Flex(_), DType::F32) => Has::ExpertsAndDense,
        // With its own matrix products and fusion there is nothing to gain for dense layers.
        #[cfg(feature = "_gpu")]
        (DispatchDevice::Cube(_), DType::F32 | DType::F16 | DType::BF16) => Has::Experts,
        _ => Has::Nothing,
    }
}

/// Whether this crate has kernels for experts on `device` with numbers of `dtype`, and may use them.
pub(crate) fn has_kernels(device: &Device, dtype: DType) -> bool {
    has(device, dtype) != Has::Nothing
}

/// Whether it also has some for one map and activation.
pub(super) fn has_dense_kernels(device: &Device, dtype: DType) -> bool {
    has(device, dtype) == Has::ExpertsAndDense
}

/// Whether attention within samples of different lengths has a kernel.
pub(crate) fn has_attention(device: &Device, dtype: DType) -> bool {
    has(device, dtype) == Has::ExpertsAndDense
}

/// Whether a device is burn's CPU backend.
#[cfg(feature = "flex")]
pub(crate) fn is_flex(device: &Device) -> bool {
    matches!(device.clone().inner().as_dispatch(), burn::backend::DispatchDevice::Flex(_))
}

/// Whether products with packed weights have a kernel: they have no gradient.
#[cfg(feature = "flex")]
pub(crate) fn has_packed(device: &Device, dtype: DType) -> bool {
    !device.is_autodiff() && has(device, dtype) == Has::ExpertsAndDense
}

/// Whether products of rows `[R, D]` may need to know on the host where each expert's begin: those that are launched expert by expert. In 16 bits,
/// CUDA has one launch for all.
#[cfg(feature = "_gpu")]
pub(super) fn products_need_host_offsets(rows: &Tensor<2>, num_experts: usize) -> bool {
    use burn::backend::DispatchDevice;
    use burn_cubecl::CubeDevice;
    match rows.device().inner().as_dispatch() {
        DispatchDevice::Cube(CubeDevice::Cuda(_)) if rows.dtype() != DType::F32 => false,
        DispatchDevice::Cube(_) => can_wait_for(&rows.device()) && rows.dims()[0] >= MIN_ROWS * num_experts,
        _ => true,
    }
}

/// Whether the host can wait for what a device computes: in a browser, it cannot wait for a GPU.
pub(crate) fn can_wait_for(device: &Device) -> bool {
    !cfg!(target_family = "wasm") || has(device, DType::F32) != Has::Experts
}

/// Whether the router's product has a kernel.
#[cfg(feature = "_gpu")]
pub(super) fn has_router_kernel(device: &Device, dtype: DType) -> bool {
    has(device, dtype) == Has::Experts
}

/// The most choices per token that a device assigns slots for: it goes through them in code without loops.
const MAX_CHOICES: usize = 16;

/// Whether slots for `top_k` choices per token can be assigned on `device` itself.
pub(crate) fn can_assign_slots(device: &Device, top_k: usize) -> bool {
    top_k <= MAX_CHOICES && has(device, DType::F32) == Has::Experts
}

/// Gives back to the system what the CPU kernels keep for their next call: at most a quarter more than they ever had in use at once. For a
/// program that is done with its layers and goes on.
pub fn release_idle_memory() {
    #[cfg(feature = "flex")]
    super::flex::release_idle_memory();
}
