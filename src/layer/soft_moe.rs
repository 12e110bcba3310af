//! Soft MoE: every slot is a mixture of tokens.

use burn::config::Config;
use burn::module::{Content, DisplaySettings, Module, ModuleDisplay, Param};
use burn::nn::Initializer;
use burn::tensor::{DType, Device, FloatDType, Tensor, activation::softmax};

use crate::{
    layer::experts::{ExpertMlp, ExpertMlpConfig, ExpertOptions},
    routing::{FlatTokens, MoeInput, router::non_finite_rows, shaped},
    support::{
        cost::Cost,
        error::{ConfigError, expect_valid},
    },
};

/// Configuration of a [`SoftMoeFeedForward`].
#[derive(Config, Debug)]
pub struct SoftMoeFeedForwardConfig {
    /// Token width, `D`.
    pub d_model: usize,
    /// Hidden width of each expert, `F`.
    pub d_ff: usize,
    /// Number of experts, `E`.
    pub num_experts: usize,
    /// Slots of each expert for one sample, `S`. The operations are those of `E · S` tokens. Default: 1
    #[config(default = 1)]
    pub slots_per_expert: usize,
    /// Standard deviation of the normal distribution that the slots' weights start from. Default: 0.02
    #[config(default = 0.02)]
    pub init_std: f64,
    /// The experts. Default: [`ExpertOptions::new`]
    #[config(default = "ExpertOptions::new()")]
    pub experts: ExpertOptions,
}

/// Experts over mixtures of tokens (Puigcerver et al., [arXiv 2308.00951](https://arxiv.org/abs/2308.00951), equations 1 and 2): nothing is
/// chosen and nothing dropped, and all of it has a gradient.
///
/// `logits = x · Φ`; a slot's input is the mean of its sample's valid tokens, weighted by a softmax of the logits over these tokens; a token's
/// output is the mean of its sample's slots' outputs, weighted by a softmax over the slots. Not for causal models, whose tokens must not see
/// later ones.
#[derive(Module, Debug)]
#[module(custom_display)]
pub struct SoftMoeFeedForward {
    /// `Φ`, `[D, E · S]`.
    pub slots: Param<Tensor<2>>,
    /// The feed-forward networks.
    pub experts: ExpertMlp,
}

/// What a [`SoftMoeFeedForward`] returns. There is no routing: every expert is always used.
#[derive(Debug, Clone)]
pub struct SoftMoeOutput<const R: usize> {
    /// Same shape as the input.
    pub output: Tensor<R>,
    /// Slot logits, `[T, E · S]`, f32; NaN for a token that is not finite.
    pub logits: Tensor<2>,
    /// The weight of each slot in each token's output, `[T, E · S]`, f32; rows sum to one, but for a token that is not finite, whose row is
    /// NaN.
    pub weights: Tensor<2>,
}

impl SoftMoeFeedForwardConfig {
    /// Checks the configuration.
    ///
    /// # Errors
    /// The first field that cannot be used, with its value.
    pub fn validate(&self) -> Result<(), ConfigError> {
        for (field, value) in [
            ("d_model", self.d_model),
            ("d_ff", self.d_ff),
            ("num_experts", self.num_experts),
            ("slots_per_expert", self.slots_per_expert),
        ] {
            ConfigError::non_zero(field, value)?;
        }
        if !(self.init_std.is_finite() && self.init_std >= 0.0) {
            let reason = "a standard deviation must be finite and not negative";
            return Err(ConfigError::OutOfRange { field: "init_std", value: self.init_std, reason });
        }
        self.experts.form.validate()
    }

    /// Cost for one sample of `num_tokens` tokens: logits, both mixtures, and experts over their slots.
    pub fn cost(&self, num_tokens: usize) -> Cost {
        let slots = self.num_experts * self.slots_per_expert;
        let logits = Cost::linear(num_tokens, self.d_model, slots, false);
        let mixtures = Cost { flops: 2 * logits.flops, ..Cost::default() };
        let expert = self.expert_config().cost_of_one(slots);
        logits + mixtures + Cost::experts(expert, self.num_experts, self.num_experts)
    }

    fn expert_config(&self) -> ExpertMlpConfig {
        ExpertMlpConfig::new(self.d_model, self.d_ff, self.num_experts).with_options(self.experts.clone())
    }

    /// A new layer.
    ///
    /// # Panics
    /// With the text of [`validate`](Self::validate).
    pub fn init(&self, device: &Device) -> SoftMoeFeedForward {
        expect_valid(self.validate());
        let shape = [self.d_model, self.num_experts * self.slots_per_expert];
        SoftMoeFeedForward {
            slots: Initializer::Normal { mean: 0.0, std: self.init_std }.init(shape, device),
            experts: self.expert_config().init(device),
        }
    }
}

impl SoftMoeFeedForward {
    /// Dispatch, experts and combine, each sample by itself.
    ///
    /// # Shapes
    /// - input: `[B, .., D]`; all tokens of one index of the first axis are one sample. `[T, D]` is one sample
    /// - output: as the input; exactly 0 for padding, and NaN for a token that is not finite or has a logit that is not, which changes nothing
    ///   else
    ///
    /// # Panics
    /// When the last axis is not `D`, a mask does not fit, or tokens are protected: nothing is ever dropped.
    pub fn forward<const R: usize>(&self, input: impl Into<MoeInput<R>>) -> SoftMoeOutput<R> {
        let [num_experts, d_model, _] = self.experts.dims();
        let tokens = input.into().into_tokens(d_model);
        assert!(tokens.protected.is_none(), "soft MoE has no protected tokens: it drops none");
        let (num_tokens, per_sample) = (tokens.x.dims()[0], tokens.per_sample);
        if num_tokens == 0 {
            return self.forward_nothing(tokens);
        }
        let samples = num_tokens.checked_div(per_sample).unwrap_or(0);
        let [_, num_slots] = self.slots.shape().dims();
        let device = tokens.x.device();

        let weight = self.slots.val().dequantize().cast(FloatDType::F32);
        // Zero times NaN is NaN: what is not finite must not be in a product, here or in a gradient.
        let bad_tokens = non_finite_rows(tokens.x.clone());
        let x = tokens.x.mask_fill(bad_tokens.clone(), 0.0);
        let logits = x.clone().cast(FloatDType::F32).matmul(weight);
        let bad = bad_tokens.bool_or(non_finite_rows(logits.clone()));
        let logits = logits.mask_fill(bad.clone(), 0.0);
        let invalid = tokens.valid.as_ref().map(|valid| valid.unset(&device));
        let unmixed = match &invalid {
            Some(invalid) => bad.clone().bool_or(invalid.clone()),
            None => bad.clone(),
        };
        // Far below any logit, and finite: a sample without a token to mix must not divide zero by zero.
        let over_tokens = logits.clone().mask_fill(unmixed, -1e30);
        let dtype = x.dtype();
        let dispatch = softmax(over_tokens.reshape([samples, per_sample, num_slots]), 1).cast(dtype);
        let combine = softmax(logits.clone(), 1);

        let x = x.mask_fill(bad.clone(), 0.0).reshape([samples, per_sample, d_model]);
        let per_expert = num_slots / num_experts;
        let mixed = dispatch.swap_dims(1, 2).matmul(x).reshape([samples, num_experts, per_expert, d_model]);
        let slots = mixed.swap_dims(0, 1).reshape([num_experts, samples * per_expert, d_model]);
        let computed = self.experts.forward(slots).reshape([num_experts, samples, per_expert, d_model]);
        let computed = computed.swap_dims(0, 1).reshape([samples, num_slots, d_model]);
        let output = combine.clone().cast(dtype).reshape([samples, per_sample, num_slots]).matmul(computed);
        let marked = |x: Tensor<2>| x.mask_fill(bad.clone(), f32::NAN);
        let output = marked(output.reshape([num_tokens, d_model]));
        let output = match invalid {
            Some(invalid) => output.mask_fill(invalid, 0.0),
            None => output,
        };

        SoftMoeOutput { output: output.reshape(tokens.shape), logits: marked(logits), weights: marked(combine) }
    }

    /// No tokens in, none out.
    fn forward_nothing<const R: usize>(&self, tokens: FlatTokens) -> SoftMoeOutput<R> {
        let [_, num_slots] = self.slots.shape().dims();
        let none = Tensor::<2>::zeros([0, num_slots], (&tokens.x.device(), DType::F32));
        SoftMoeOutput { output: shaped(tokens.x, tokens.shape), logits: none.clone(), weights: none }
    }
}

impl ModuleDisplay for SoftMoeFeedForward {
    fn custom_settings(&self) -> Option<DisplaySettings> {
        DisplaySettings::new().with_new_line_after_attribute(false).optional()
    }

    fn custom_content(&self, content: Content) -> Option<Content> {
        let [num_experts, d_model, d_ff] = self.experts.dims();
        let [_, num_slots] = self.slots.shape().dims();
        content
            .add("d_model", &d_model)
            .add("d_ff", &d_ff)
            .add("num_experts", &num_experts)
            .add("slots_per_expert", &(num_slots / num_experts))
            .optional()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn::tensor::{Bool, Distribution};

    fn values<const D: usize>(x: &Tensor<D>) -> Vec<f32> {
        x.clone().try_into_vec_as().unwrap()
    }

    fn layer(device: &Device) -> SoftMoeFeedForward {
        SoftMoeFeedForwardConfig::new(4, 8, 3).with_slots_per_expert(2).with_init_std(1.0).init(device)
    }

    #[test]
    fn it_is_the_formula() {
        let device = Device::default();
        let layer = layer(&device);
        let x = Tensor::<2>::random([5, 4], Distribution::Normal(0.0, 1.0), &device);
        let logits = x.clone().matmul(layer.slots.val());
        let slots = softmax(logits.clone(), 0).transpose().matmul(x.clone()).reshape([3, 2, 4]);
        let expected = softmax(logits, 1).matmul(layer.experts.forward(slots).reshape([6, 4]));
        let found = layer.forward(x);
        assert!((found.output - expected).abs().max().into_scalar::<f32>() < 1e-6);
        assert_eq!((found.logits.dims(), found.weights.dims()), ([5, 6], [5, 6]));
    }

    #[test]
    fn a_sample_depends_on_its_own_valid_tokens_only() {
        let device = Device::default();
        let layer = layer(&device);
        let x = Tensor::<3>::random([2, 5, 4], Distribution::Normal(0.0, 1.0), &device);
        let valid = Tensor::<2, Bool>::from_data([[true, true, true, false, false], [false; 5]], &device);
        let padded = x.clone().mask_fill(valid.clone().bool_not().unsqueeze_dim::<3>(2), f32::NAN);
        let output = values(&layer.forward(MoeInput::new(padded).valid(valid)).output);
        let alone = values(&layer.forward(x.narrow(0, 0, 1).narrow(1, 0, 3)).output);
        assert!(alone.iter().zip(&output).all(|(a, b)| (a - b).abs() < 1e-6));
        assert!(output[12..].iter().all(|v| *v == 0.0));
    }

    #[test]
    fn a_token_that_is_not_finite_changes_nothing_but_its_own_output() {
        let device = Device::default().autodiff();
        let mut layer = layer(&device);
        // So that logits of large tokens are too large.
        layer.slots = Param::from_tensor((layer.slots.val() + 2.0).detach());
        let x = Tensor::<2>::random([6, 4], Distribution::Normal(0.0, 1.0), &device);
        let is_bad =
            |bad: usize| Tensor::<1, burn::tensor::Int>::arange(0..6, &device).equal_elem(bad as i64).unsqueeze_dim::<2>(1);
        // A loss over the other tokens, and its gradients.
        let run = |x: Tensor<2>, valid: Option<Tensor<2, Bool>>| {
            let input = MoeInput::new(x.clone().unsqueeze_dim::<3>(0));
            let input = match valid {
                Some(valid) => input.valid(valid.transpose()),
                None => input,
            };
            let output: Tensor<2> = layer.forward(input).output.squeeze_dim(0);
            let grads = output.clone().mask_fill(is_bad(2), 0.0).square().sum().backward();
            let gradient = |weight: Tensor<3>| values(&weight.grad(&grads).unwrap());
            let slots = values(&layer.slots.val().grad(&grads).unwrap());
            let of_x = x.grad(&grads).map(|grad| values(&grad));
            (values(&output), [slots, gradient(layer.experts.w_in.val()), gradient(layer.experts.w_out.val())], of_x)
        };
        let (expected, expected_gradients, _) = run(x.clone(), Some(is_bad(2).bool_not()));
        // The last is finite, and its logits are not.
        for bad in [f32::NAN, f32::INFINITY, 3e38] {
            let x = x.clone().mask_fill(is_bad(2), bad).detach().require_grad();
            let (output, gradients, of_x) = run(x, None);
            let near = |a: &[f32], b: &[f32]| a.iter().zip(b).all(|(a, b)| (a - b).abs() < 1e-5);
            assert!(output[8..12].iter().all(|v| v.is_nan()), "{bad}: {output:?}");
            assert!(near(&output[..8], &expected[..8]) && near(&output[12..], &expected[12..]), "{bad}: {output:?}");
            assert!(gradients.iter().zip(&expected_gradients).all(|(a, b)| near(a, b)), "{bad}: {gradients:?}");
            let of_x = of_x.unwrap();
            assert!(of_x.iter().all(|v| v.is_finite()) && of_x[8..12] == [0.0; 4], "{bad}: {of_x:?}");
        }
    }

    #[test]
    fn gradients_reach_everything() {
        let device = Device::default().autodiff();
        let layer = layer(&device);
        let x = Tensor::<2>::random([5, 4], Distribution::Normal(0.0, 1.0), &device).require_grad();
        let grads = layer.forward(x.clone()).output.square().sum().backward();
        for gradient in [x.grad(&grads), layer.slots.val().grad(&grads)] {
            assert!(gradient.unwrap().abs().max().into_scalar::<f32>() > 0.0);
        }
        assert!(layer.experts.w_in.val().grad(&grads).is_some());
    }

    #[test]
    fn display() {
        let text = "SoftMoeFeedForward {d_model: 4, d_ff: 8, num_experts: 3, slots_per_expert: 2, params: 252}";
        assert_eq!(format!("{}", layer(&Device::default())), text);
    }
}
