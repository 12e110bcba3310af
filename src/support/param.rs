//! Changing a parameter's value from outside a computation.

use burn::module::Param;
#[cfg(feature = "train")]
use burn::module::{Module, ModuleMapper};
#[cfg(feature = "train")]
use burn::tensor::Device;
use burn::tensor::{Tensor, TensorCreationOptions, TensorData};

/// A parameter with another value: same identity, same device, as trainable as before. `f` sees the value outside of any graph.
pub(crate) fn with_value<const D: usize>(param: Param<Tensor<D>>, f: impl FnOnce(Tensor<D>) -> Tensor<D>) -> Param<Tensor<D>> {
    param.map(|old| {
        let (tracked, device) = (old.is_require_grad(), old.device());
        // Detached, and still on the parameter's own device: another one would checkpoint gradients in another way.
        let new = f(old.detach());
        assert!(new.device() == device, "a parameter's value stays on {device:?}, but is on {:?}", new.device());
        new.detach().set_require_grad(tracked)
    })
}

/// A parameter with new numbers in the device's own number type: same identity, same device, as trainable as before. What it would have
/// started from is not made.
///
/// # Panics
/// When the shape is another one.
#[cfg(feature = "store")]
pub(crate) fn replaced<const D: usize>(param: Param<Tensor<D>>, data: TensorData) -> Param<Tensor<D>> {
    let device = param.lazy_device();
    replaced_in(param, data, &device)
}

/// As [`replaced`], on the device and in the number type of `options`.
pub(crate) fn replaced_in<const D: usize>(
    param: Param<Tensor<D>>,
    data: TensorData,
    options: impl Into<TensorCreationOptions>,
) -> Param<Tensor<D>> {
    let (id, shape) = (param.id, param.lazy_shape());
    assert!(data.shape() == &shape, "a parameter of shape {shape:?} cannot hold {:?}", data.shape());
    let value = Tensor::from_data(data, options);
    param.transform_for_load(value, id)
}

/// The module with its float parameters on `device`, an autodiff device of the same kind: as trainable as before, and checkpointing gradients in
/// the device's way, which burn's `fork` does not change.
#[cfg(feature = "train")]
pub(crate) fn with_leaves_on<M: Module>(module: M, device: &Device) -> M {
    struct Leaves<'a>(&'a Device);
    impl ModuleMapper for Leaves<'_> {
        fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
            param.map(|old| {
                let tracked = old.is_require_grad();
                // A result is where the one of its operands is that has a way of checkpointing.
                let one = Tensor::<D>::ones([1; D], (self.0, old.dtype()));
                (old.without_autodiff() * one).detach().set_require_grad(tracked)
            })
        }
    }
    module.map(&mut Leaves(device))
}

#[cfg(all(test, feature = "train", feature = "flex"))]
mod tests {
    use super::*;
    use burn::nn::LinearConfig;

    #[test]
    fn leaves_checkpoint_gradients_as_their_device_does() {
        let device = Device::flex().autodiff().gradient_checkpointing();
        let linear = LinearConfig::new(2, 3).init(&Device::flex()).train();
        let before = linear.weight.val().into_data();
        let linear = with_leaves_on(linear, &device);
        let weight = linear.weight.val();
        assert!(weight.device() == device && weight.is_require_grad());
        assert_eq!(weight.into_data(), before);
    }
}
