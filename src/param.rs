//! Changing a parameter's value from outside a computation.

use burn::module::Param;
use burn::tensor::Tensor;

/// A parameter with another value: same identity, same device, as trainable as before. `f` sees the value outside of any graph.
pub(crate) fn with_value<const D: usize>(param: Param<Tensor<D>>, f: impl FnOnce(Tensor<D>) -> Tensor<D>) -> Param<Tensor<D>> {
    param.map(|old| {
        let (tracked, device) = (old.is_require_grad(), old.device());
        let new = f(old.detach().without_autodiff());
        assert!(!new.is_autodiff(), "a parameter's value comes from outside of any graph");
        let new = if device.is_autodiff() { new.autodiff() } else { new };
        new.set_require_grad(tracked)
    })
}
