//! The learned part of routing.

use burn::config::Config;
use burn::module::{Content, DisplaySettings, Module, ModuleDisplay, Param};
use burn::nn::Initializer;
use burn::tensor::{Device, FloatDType, Tensor, activation::softmax, assert_shape};

/// Configuration of a [`Router`].
#[derive(Config, Debug)]
pub struct RouterConfig {
    /// Standard deviation of the normal distribution that the weight starts from. Default: 0.02
    #[config(default = 0.02)]
    pub init_std: f64,
}

/// Scores every expert for every token: `logits = x · W_r`, `probs = softmax(logits)`.
///
/// No bias. Both are computed in f32 whatever the dtype of `x`: rounding here changes which expert a token goes to (Switch
/// Transformer, [arXiv 2101.03961](https://arxiv.org/abs/2101.03961), section 2.4).
#[derive(Module, Debug)]
#[module(custom_display)]
pub struct Router {
    /// Router weight `W_r`, `[D, E]`.
    pub weight: Param<Tensor<2>>,
}

/// What a [`Router`] says.
#[derive(Debug, Clone)]
pub struct RouterOutput {
    /// `[T, E]`, f32.
    pub logits: Tensor<2>,
    /// Softmax of the logits, `[T, E]`, f32.
    pub probs: Tensor<2>,
}

impl RouterConfig {
    /// A router for `num_experts` experts over tokens of width `d_model`.
    pub fn init(&self, d_model: usize, num_experts: usize, device: &Device) -> Router {
        let weight = Initializer::Normal { mean: 0.0, std: self.init_std }.init([d_model, num_experts], device);
        Router { weight }
    }
}

impl Router {
    /// Logits and probabilities of every token.
    ///
    /// # Shapes
    /// - x: `[T, D]`
    /// - logits, probs: `[T, E]`
    ///
    /// # Panics
    /// When the last axis of `x` is not `D`.
    pub fn forward(&self, x: Tensor<2>) -> RouterOutput {
        let weight = self.weight.val();
        let [d_model, _] = weight.dims();
        assert_shape!(x, [_, d_model]);
        let logits = x.cast(FloatDType::F32).matmul(weight.cast(FloatDType::F32));
        let probs = softmax(logits.clone(), 1);
        RouterOutput { logits, probs }
    }
}

impl ModuleDisplay for Router {
    fn custom_settings(&self) -> Option<DisplaySettings> {
        DisplaySettings::new().with_new_line_after_attribute(false).optional()
    }

    fn custom_content(&self, content: Content) -> Option<Content> {
        let [d_model, num_experts] = self.weight.shape().dims();
        content.add("d_model", &d_model).add("num_experts", &num_experts).optional()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[should_panic(expected = "assert_shape!(x, [_, d_model]): axis 1 expected 4, got 3")]
    fn token_width_must_match() {
        let device = Device::default();
        RouterConfig::new().init(4, 2, &device).forward(Tensor::zeros([5, 3], &device));
    }

    #[test]
    fn display() {
        let router = RouterConfig::new().init(4, 2, &Device::default());
        assert_eq!(format!("{router}"), "Router {d_model: 4, num_experts: 2, params: 8}");
    }
}
