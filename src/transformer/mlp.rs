//! The dense feed-forward network.

use burn::config::Config;
use burn::module::{Content, DisplaySettings, Module, ModuleDisplay};
use burn::nn::{Linear, LinearConfig};
use burn::tensor::{Device, Tensor, assert_shape};

use crate::{
    layer::{
        experts::{Activation, FeedForwardForm},
        packed::linear,
    },
    support::{
        cost::Cost,
        error::{ConfigError, expect_valid},
    },
};

/// Configuration of an [`Mlp`].
#[derive(Config, Debug)]
pub struct MlpConfig {
    /// Token width, `D`.
    pub d_model: usize,
    /// Hidden width, `F`.
    pub d_ff: usize,
    /// The non-linearity. Default: `Gelu`
    #[config(default = "Activation::Gelu")]
    pub activation: Activation,
    /// Plain or gated. Default: `Plain`
    #[config(default = "FeedForwardForm::Plain")]
    pub form: FeedForwardForm,
}

/// `FFN(x) = act(x · W_in + b_in) · W_out + b_out`, or the gated form of [`FeedForwardForm`].
///
/// burn's `PositionWiseFeedForward` without dropout and with the activations and the gate that CLIPs need.
#[derive(Module, Debug)]
#[module(custom_display)]
pub struct Mlp {
    /// `[D, F]`
    pub linear_in: Linear,
    /// `[D, F]`, in the gated form.
    pub linear_gate: Option<Linear>,
    /// `[F, D]`
    pub linear_out: Linear,
    /// The non-linearity.
    #[module(skip)]
    pub activation: Activation,
}

impl MlpConfig {
    /// Cost over `tokens` rows.
    pub(super) fn cost(&self, tokens: usize) -> Cost {
        let gate = if self.form.is_gated() { Cost::linear(tokens, self.d_model, self.d_ff, true) } else { Cost::default() };
        gate + Cost::feed_forward(tokens, self.d_model, self.d_ff, true)
    }

    /// Refuses a form that is for experts alone.
    ///
    /// # Errors
    /// With the clamped gated form.
    pub fn validate(&self) -> Result<(), ConfigError> {
        match self.form {
            FeedForwardForm::ClampedGated { limit, .. } => {
                let reason = "dense networks have no clamped gated form: set that of the experts, `SparseEncoderConfig::form`";
                Err(ConfigError::OutOfRange { field: "form.limit", value: limit, reason })
            }
            FeedForwardForm::Plain | FeedForwardForm::Gated => Ok(()),
        }
    }

    /// A new network.
    ///
    /// # Panics
    /// With the text of [`validate`](Self::validate).
    #[track_caller]
    pub fn init(&self, device: &Device) -> Mlp {
        expect_valid(self.validate());
        let linear_in = || LinearConfig::new(self.d_model, self.d_ff).init(device);
        Mlp {
            linear_in: linear_in(),
            linear_gate: self.form.is_gated().then(linear_in),
            linear_out: LinearConfig::new(self.d_ff, self.d_model).init(device),
            activation: self.activation,
        }
    }
}

impl Mlp {
    /// Plain or gated.
    pub fn form(&self) -> FeedForwardForm {
        match self.linear_gate {
            None => FeedForwardForm::Plain,
            Some(_) => FeedForwardForm::Gated,
        }
    }

    /// Applies the network to every token.
    ///
    /// # Shapes
    /// - x, output: `[.., D]`
    ///
    /// # Panics
    /// When the last axis of `x` is not `D`.
    pub fn forward<const R: usize>(&self, x: Tensor<R>) -> Tensor<R> {
        let [d_model, _] = self.linear_in.weight.shape().dims();
        assert_shape!(x, [.., d_model]);
        let shape = x.shape();
        if shape.num_elements() == 0 {
            return x;
        }
        let tokens = x.reshape([shape.num_elements() / d_model, d_model]);
        let hidden = match &self.linear_gate {
            None => linear(tokens, &self.linear_in, Some(self.activation)),
            Some(gate) => linear(tokens.clone(), gate, Some(self.activation)) * linear(tokens, &self.linear_in, None),
        };
        linear(hidden, &self.linear_out, None).reshape(shape)
    }
}

impl ModuleDisplay for Mlp {
    fn custom_settings(&self) -> Option<DisplaySettings> {
        DisplaySettings::new().with_new_line_after_attribute(false).optional()
    }

    fn custom_content(&self, content: Content) -> Option<Content> {
        let [d_model, d_ff] = self.linear_in.weight.shape().dims();
        let content = content.add("d_model", &d_model).add("d_ff", &d_ff).add_debug_attribute("activation", &self.activation);
        let content = if self.linear_gate.is_some() { content.add("gated", &true) } else { content };
        content.optional()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[should_panic(expected = "assert_shape!(x, [.., d_model]): axis 1 expected 4, got 3")]
    fn token_width_must_match() {
        let device = Device::default();
        MlpConfig::new(4, 8).init(&device).forward(Tensor::<2>::zeros([5, 3], &device));
    }

    #[test]
    fn display() {
        let text = "Mlp {d_model: 4, d_ff: 8, activation: Gelu, params: 76}";
        assert_eq!(format!("{}", MlpConfig::new(4, 8).init(&Device::default())), text);
    }
}
