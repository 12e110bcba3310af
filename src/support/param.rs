//! Changing a parameter's value from outside a computation.

use burn::module::{Module, ModuleMapper, Param};
use burn::tensor::{DType, Device, Tensor, TensorCreationOptions, TensorData, kind::Autodiff};

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

/// A tensor as a new value on `device`, outside of any graph, and with what that device does about gradients: burn's `to_device` keeps what the
/// tensor's old device does.
pub(crate) fn placed<const D: usize, K: Autodiff>(tensor: Tensor<D, K>, device: &Device) -> Tensor<D, K> {
    let tensor = tensor.without_autodiff().to_device(&device.clone().without_autodiff());
    match device.gradient_checkpointing_strategy() {
        Some(strategy) => tensor.autodiff().with_gradient_checkpointing_strategy(strategy),
        None => tensor,
    }
}

/// The module with its float parameters on `device`, with what that device does about gradients: as trainable as they were, or would have been on
/// a device with gradients.
pub(crate) fn with_leaves_on<M: Module>(module: M, device: &Device) -> M {
    struct Leaves<'a>(&'a Device);
    impl ModuleMapper for Leaves<'_> {
        fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
            param.map(|old| placed(old, self.0))
        }
    }
    let module = module.map(&mut Leaves(device));
    if device.is_autodiff() { module.train() } else { module }
}

/// The module with all parameters made, and shared with no clone. What freezes a clone of a parameter that is not made yet freezes the original,
/// too: burn makes it once for both.
pub(crate) fn made<M: Module>(module: M) -> M {
    struct Made;
    impl ModuleMapper for Made {
        fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
            param.map(|value| value)
        }
    }
    module.map(&mut Made)
}

/// A frozen copy of a module.
pub(crate) fn frozen<M: Module>(module: &M) -> M {
    made(module.clone()).freeze()
}

/// The module with plain floats as parameters: nothing is packed, adapted or quantized.
pub(crate) fn with_floats<M: Module>(module: &M) -> M {
    struct Floats;
    impl ModuleMapper for Floats {
        fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
            param.map(|old| if let DType::QFloat(_) = old.dtype() { old.dequantize().detach() } else { old })
        }
    }
    module.clone().materialize().map(&mut Floats)
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

    #[test]
    fn leaves_that_burn_quantized_stay_so() {
        use burn::{
            module::Quantizer,
            tensor::quantization::{Calibration, QuantScheme},
        };
        let linear = LinearConfig::new(32, 32).init(&Device::flex());
        let linear = linear.quantize_weights(&mut Quantizer::new(Calibration::MinMax, QuantScheme::default()));
        for device in [Device::flex().autodiff().gradient_checkpointing(), Device::flex()] {
            let moved = with_leaves_on(linear.clone().train(), &device);
            assert_eq!(moved.weight.val().dtype(), linear.weight.val().dtype());
            let x = Tensor::<2>::ones([1, 32], &device);
            assert_eq!(moved.forward(x.clone()).into_data(), linear.forward(x.without_autodiff()).into_data());
        }
    }
}
