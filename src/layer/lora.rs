//! Low-rank adapters for experts.

use burn::config::Config;
use burn::module::{Module, Param, Reparameterization, Reparameterizer};
use burn::tensor::{DType, Distribution, Tensor, TensorCreationOptions};

use crate::support::error::{ConfigError, expect_valid};

/// Rank and scale of low-rank adapters (LoRA, [arXiv 2106.09685](https://arxiv.org/abs/2106.09685)).
#[derive(Config, Debug, PartialEq)]
pub struct LoraOptions {
    /// Rank, `r`. Default: 8
    #[config(default = 8)]
    pub rank: usize,
    /// The change is multiplied by `alpha / rank`. Default: 16
    #[config(default = 16.0)]
    pub alpha: f64,
}

impl LoraOptions {
    /// Refuses numbers that no adapter can have.
    ///
    /// # Errors
    /// The first field that cannot be used, with its value.
    pub fn validate(&self) -> Result<(), ConfigError> {
        ConfigError::non_zero("rank", self.rank)?;
        if !self.alpha.is_finite() {
            return Err(ConfigError::OutOfRange { field: "alpha", value: self.alpha, reason: "it must be finite" });
        }
        Ok(())
    }
}

/// A low-rank change of each expert's map: `W[e] + scale · A[e] · B[e]`, attached to the parameter by
/// [`ExpertMlp::with_lora`](crate::ExpertMlp::with_lora). The forward pass applies it to rows, so that no matrix of the size of `W` is made.
#[derive(Module, Debug)]
pub struct ExpertLora {
    /// `[E, D, r]`
    pub a: Param<Tensor<3>>,
    /// `[E, r, F]`
    pub b: Param<Tensor<3>>,
    /// `alpha / r`
    #[module(skip)]
    pub scale: f64,
}

impl Reparameterization for ExpertLora {
    // As burn's, so that one group of parameters finds all adapters of a model.
    const NAME: &'static str = "lora";

    fn apply<const D: usize>(&self, base: Tensor<D>) -> Tensor<D> {
        let change = self.a.val().matmul(self.b.val()) * self.scale;
        let change = change.reshape(base.shape());
        base.dequantize().cast(change.dtype()) + change
    }
}

/// Freezes a weight `[E, D, F]`, and adapts it in its own number type; a quantized one in the device's.
struct Attach<'a>(&'a LoraOptions);

impl Reparameterizer for Attach<'_> {
    type Reparam = ExpertLora;

    fn reparameterize<const D: usize>(&mut self, _: &str, param: Param<Tensor<D>>) -> (Param<Tensor<D>>, Option<ExpertLora>) {
        let ([num_experts, d_in, d_out], device) = (param.lazy_shape().dims(), param.lazy_device());
        let LoraOptions { rank, alpha } = *self.0;
        let options: TensorCreationOptions = match param.val().dtype() {
            DType::QFloat(_) => (&device).into(),
            dtype => (&device, dtype).into(),
        };
        // The product starts at zero, and the gradient of B does not.
        let distribution = Distribution::Normal(0.0, 1.0 / rank as f64);
        let a = Tensor::<3>::random([num_experts, d_in, rank], distribution, options.clone());
        let b = Tensor::<3>::zeros([num_experts, rank, d_out], options);
        let adapter = ExpertLora { a: Param::from_tensor(a), b: Param::from_tensor(b), scale: alpha / rank as f64 };
        (param.set_require_grad(false), Some(adapter))
    }
}

/// The weight, frozen and with a new adapter.
///
/// # Panics
/// With the text of [`validate`](LoraOptions::validate), and when the weight has an adapter already.
#[track_caller]
pub(super) fn adapted(weight: Param<Tensor<3>>, options: &LoraOptions) -> Param<Tensor<3>> {
    expect_valid(options.validate());
    #[cfg(feature = "flex")]
    assert!(
        weight.reparameterization::<super::packed::PackedWeight>().is_none(),
        "packed weights take no adapter: make them plain first, by `materialize`"
    );
    assert!(
        weight.reparameterization::<ExpertLora>().is_none(),
        "the experts have an adapter already: merge it first, by `materialize`"
    );
    weight.apply_reparameterization(Attach(options))
}
