//! The experts: feed-forward networks with stacked weights.

use burn::config::Config;
use burn::module::{Content, DisplaySettings, Module, ModuleDisplay, Param};
use burn::nn::Initializer;
use burn::tensor::{Device, Tensor, assert_shape};
use serde::{Deserialize, Serialize};

use super::{
    lora::{ExpertLora, LoraOptions, adapted},
    packed::packed_product,
};
pub use crate::ops::Activation;
use crate::{
    ops::{self, Offsets},
    routing::Dispatcher,
    support::{
        cost::Cost,
        error::{ConfigError, expect_valid},
        param::made,
    },
};

/// How a feed-forward network uses its activation.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub enum FeedForwardForm {
    /// `act(x · W_in + b_in) · W_out + b_out`.
    Plain,
    /// `(act(x · W_gate + b_gate) ⊙ (x · W_in + b_in)) · W_out + b_out` (Shazeer, [arXiv 2002.05202](https://arxiv.org/abs/2002.05202)): SwiGLU
    /// with SiLU, GEGLU with GELU.
    Gated,
    /// The gated form of gpt-oss ([arXiv 2508.10925](https://arxiv.org/abs/2508.10925)), `(act(α · g) / α ⊙ (u + 1)) · W_out + b_out` with
    /// `g = min(x · W_gate + b_gate, limit)` and `u = x · W_in + b_in` between `−limit` and `limit`. With SiLU, `act(α · g) / α` is `g · σ(α · g)`.
    ClampedGated {
        /// The largest gate, and the largest size of what it multiplies; above 0.
        limit: f64,
        /// The steepness of the activation, `α`; above 0. gpt-oss has 1.702.
        alpha: f64,
    },
}

/// Configuration of an [`ExpertMlp`].
#[derive(Config, Debug)]
pub struct ExpertMlpConfig {
    /// Token width, `D`.
    pub d_model: usize,
    /// Hidden width of each expert, `F`.
    pub d_ff: usize,
    /// Number of experts, `E`.
    pub num_experts: usize,
    /// Everything but the sizes. Default: [`ExpertOptions::new`]
    #[config(default = "ExpertOptions::new()")]
    pub options: ExpertOptions,
}

/// Options of an [`ExpertMlp`], whatever its sizes are.
#[derive(Config, Debug)]
pub struct ExpertOptions {
    /// Plain, gated or clamped. Default: `Plain`
    #[config(default = "FeedForwardForm::Plain")]
    pub form: FeedForwardForm,
    /// The non-linearity. Default: `Gelu`
    #[config(default = "Activation::Gelu")]
    pub activation: Activation,
    /// Whether the maps have biases. Default: true
    #[config(default = true)]
    pub bias: bool,
    /// How weights and biases start; fans are those of one expert. Default: `U(-1/√fan_in, 1/√fan_in)`, as burn's `Linear`
    #[config(default = "Initializer::KaimingUniform{gain: 1.0 / 3f64.sqrt(), fan_out_only: false}")]
    pub initializer: Initializer,
}

/// `E` feed-forward networks side by side: `FFN_e(x) = act(x · W_in[e] + b_in[e]) · W_out[e] + b_out[e]`, or another form of
/// [`FeedForwardForm`].
#[derive(Module, Debug)]
#[module(custom_display)]
pub struct ExpertMlp {
    /// `[E, D, F]`
    pub w_in: Param<Tensor<3>>,
    /// `[E, F]`
    pub b_in: Option<Param<Tensor<2>>>,
    /// `[E, D, F]`, in the gated forms.
    pub w_gate: Option<Param<Tensor<3>>>,
    /// `[E, F]`, in the gated forms.
    pub b_gate: Option<Param<Tensor<2>>>,
    /// `[E, F, D]`
    pub w_out: Param<Tensor<3>>,
    /// `[E, D]`
    pub b_out: Option<Param<Tensor<2>>>,
    /// The non-linearity.
    #[module(skip)]
    pub activation: Activation,
    /// How the activation is used.
    #[module(skip)]
    pub form: FeedForwardForm,
}

impl FeedForwardForm {
    /// Whether there are `W_gate` and `b_gate`.
    pub fn is_gated(self) -> bool {
        self != Self::Plain
    }

    /// Refuses numbers outside their range.
    pub(crate) fn validate(self) -> Result<(), ConfigError> {
        let Self::ClampedGated { limit, alpha } = self else { return Ok(()) };
        for (field, value) in [("form.limit", limit), ("form.alpha", alpha)] {
            if !(value.is_finite() && value > 0.0) {
                return Err(ConfigError::OutOfRange { field, value, reason: "it must be finite and above 0" });
            }
        }
        Ok(())
    }
}

impl ExpertOptions {
    /// SwiGLU experts: gated, SiLU.
    pub fn swiglu() -> Self {
        Self::new().with_form(FeedForwardForm::Gated).with_activation(Activation::Silu)
    }

    /// GEGLU experts: gated, GELU.
    pub fn geglu() -> Self {
        Self::new().with_form(FeedForwardForm::Gated)
    }
}

impl ExpertMlpConfig {
    /// Cost of one expert over `rows` rows.
    pub(crate) fn cost_of_one(&self, rows: usize) -> Cost {
        let gate = match self.options.form.is_gated() {
            false => Cost::default(),
            true => Cost::linear(rows, self.d_model, self.d_ff, self.options.bias),
        };
        gate + Cost::feed_forward(rows, self.d_model, self.d_ff, self.options.bias)
    }

    /// New experts.
    ///
    /// # Panics
    /// When the form has a number out of its range.
    #[track_caller]
    pub fn init(&self, device: &Device) -> ExpertMlp {
        let &Self { d_model, d_ff, num_experts, ref options } = self;
        expect_valid(options.form.validate());
        let weight =
            |fan_in, fan_out| options.initializer.init_with([num_experts, fan_in, fan_out], Some(fan_in), Some(fan_out), device);
        let bias = |fan_in, fan_out| {
            let init = || options.initializer.init_with([num_experts, fan_out], Some(fan_in), Some(fan_out), device);
            options.bias.then(init)
        };
        let is_gated = options.form.is_gated();
        ExpertMlp {
            w_in: weight(d_model, d_ff),
            b_in: bias(d_model, d_ff),
            w_gate: is_gated.then(|| weight(d_model, d_ff)),
            b_gate: if is_gated { bias(d_model, d_ff) } else { None },
            w_out: weight(d_ff, d_model),
            b_out: bias(d_ff, d_model),
            activation: options.activation,
            form: options.form,
        }
    }
}

impl ExpertMlp {
    /// Sizes `[E, D, F]`.
    pub fn dims(&self) -> [usize; 3] {
        self.w_in.shape().dims()
    }

    /// Every expert over its own slots.
    ///
    /// # Shapes
    /// - slots: `[E, S, D]`
    /// - output: `[E, S, D]`
    ///
    /// # Panics
    /// When `slots` is not `[E, _, D]`.
    pub fn forward(&self, slots: Tensor<3>) -> Tensor<3> {
        let [num_experts, d_model, _] = self.dims();
        assert_shape!(slots, [num_experts, _, d_model]);
        let [_, per_expert, _] = slots.dims();
        let (device, shape) = (slots.device(), slots.shape());
        if shape.num_elements() == 0 {
            return slots;
        }
        let offsets = Offsets::new((0..=num_experts).map(|e| e * per_expert).collect::<Vec<_>>(), &device);
        self.grouped(slots.reshape([num_experts * per_expert, d_model]), &offsets).reshape(shape)
    }

    /// Applies each expert to its rows: the step between [`dispatch`](Dispatcher::dispatch) and [`combine`](Dispatcher::combine).
    ///
    /// # Shapes
    /// - rows, output: `[R, D]`
    ///
    /// # Panics
    /// When rows have another width, or the dispatcher has another number of experts or of rows.
    pub fn forward_rows(&self, rows: Tensor<2>, dispatcher: &Dispatcher) -> Tensor<2> {
        let ([num_experts, d_model, _], [found, width]) = (self.dims(), rows.dims());
        assert!(width == d_model, "rows of width {width} do not fit experts of width {d_model}");
        let (experts, expected) = (dispatcher.num_experts(), dispatcher.num_rows());
        assert!(experts == num_experts, "a plan of {experts} experts does not fit {num_experts} experts");
        assert!(found == expected, "{found} rows do not fit a plan of {expected} rows");
        match dispatcher.offsets() {
            Some(offsets) => self.grouped(rows, offsets),
            None => rows,
        }
    }

    /// `[R, D] -> [R, D]`
    fn grouped(&self, rows: Tensor<2>, offsets: &Offsets) -> Tensor<2> {
        ops::with_even_rows(rows, offsets, |rows, offsets| {
            let bias = |bias: &Option<Param<Tensor<2>>>| {
                let bias = bias.as_ref()?;
                assert!(
                    bias.adapter().is_none(),
                    "burn's `apply_lora` took the experts' biases for matrices: leave experts out of its group of parameters, and use \
                     `ExpertMlp::with_lora` for them"
                );
                Some(bias.val())
            };
            let hidden = match &self.w_gate {
                None => map(rows, &self.w_in, bias(&self.b_in), Some(self.activation), offsets),
                Some(w_gate) => {
                    let gate = |activation| map(rows.clone(), w_gate, bias(&self.b_gate), activation, offsets);
                    let scaled = || map(rows.clone(), &self.w_in, bias(&self.b_in), None, offsets);
                    match self.form {
                        FeedForwardForm::ClampedGated { limit, alpha } => {
                            let gate = ops::activation(gate(None).clamp_max(limit) * alpha, self.activation) / alpha;
                            gate * (scaled().clamp(-limit, limit) + 1.0)
                        }
                        _ => gate(Some(self.activation)) * scaled(),
                    }
                }
            };
            map(hidden, &self.w_out, bias(&self.b_out), None, offsets)
        })
    }

    /// The experts frozen, each with low-rank adapters of its own on its maps: `W[e] + alpha / r · A[e] · B[e]`. They start as no change, are trained
    /// and saved like other parameters, at `w_in.lora.a` and so on, and become part of the weights by burn's
    /// [`materialize`](burn::module::Module::materialize).
    ///
    /// burn's own `apply_lora` knows matrices only: it would freeze stacked weights without an adapter, and take their biases for matrices. Call
    /// it before this, on a group of parameters that leaves experts out; experts whose biases it adapted refuse to compute.
    ///
    /// # Panics
    /// When the options cannot be used, or there are adapters or packed weights already.
    #[track_caller]
    pub fn with_lora(self, options: &LoraOptions) -> Self {
        let frozen = |bias: Option<Param<Tensor<2>>>| bias.map(|bias| bias.set_require_grad(false));
        let experts = made(self);
        Self {
            w_in: adapted(experts.w_in, options),
            w_gate: experts.w_gate.map(|w_gate| adapted(w_gate, options)),
            w_out: adapted(experts.w_out, options),
            b_in: frozen(experts.b_in),
            b_gate: frozen(experts.b_gate),
            b_out: frozen(experts.b_out),
            ..experts
        }
    }
}

/// One map of every expert, packed or with its adapter, if it is or has one.
fn map(
    rows: Tensor<2>,
    weight: &Param<Tensor<3>>,
    bias: Option<Tensor<2>>,
    activation: Option<Activation>,
    offsets: &Offsets,
) -> Tensor<2> {
    if let Some(out) = packed_product(&rows, weight, &bias, activation, offsets) {
        return out;
    }
    let Some(lora) = weight.reparameterization::<ExpertLora>() else {
        return ops::grouped_linear(rows, weight.val(), bias, activation, offsets);
    };
    let low = ops::grouped_linear(rows.clone(), lora.a.val(), None, None, offsets);
    let change = ops::grouped_linear(low, lora.b.val(), None, None, offsets) * lora.scale;
    let out = ops::grouped_linear(rows, weight.base(), bias, None, offsets) + change;
    match activation {
        Some(activation) => ops::activation(out, activation),
        None => out,
    }
}

impl ModuleDisplay for ExpertMlp {
    fn custom_settings(&self) -> Option<DisplaySettings> {
        DisplaySettings::new().with_new_line_after_attribute(false).optional()
    }

    fn custom_content(&self, content: Content) -> Option<Content> {
        let [num_experts, d_model, d_ff] = self.dims();
        content
            .add("num_experts", &num_experts)
            .add("d_model", &d_model)
            .add("d_ff", &d_ff)
            .add_debug_attribute("activation", &self.activation)
            .add_debug_attribute("form", &self.form)
            .add("bias", &self.b_in.is_some())
            .optional()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[should_panic(expected = "assert_shape!(slots, [num_experts, _, d_model]): axis 0 expected 2, got 3")]
    fn slots_must_be_those_of_every_expert() {
        let device = Device::default();
        ExpertMlpConfig::new(4, 8, 2).init(&device).forward(Tensor::zeros([3, 5, 4], &device));
    }

    #[test]
    #[should_panic(expected = "rows of width 6 do not fit experts of width 4")]
    fn rows_must_be_as_wide_as_the_experts() {
        let device = Device::default();
        let plan =
            crate::routing::DispatchPlan::from_choices(2, Tensor::from_data([[0], [1]], &device), Tensor::ones([2, 1], &device));
        let rows = Tensor::zeros([2, 6], &device);
        ExpertMlpConfig::new(4, 8, 2).init(&device).forward_rows(rows, &Dispatcher::new(&plan, &Tensor::zeros([2, 4], &device)));
    }

    #[test]
    fn display() {
        let experts = ExpertMlpConfig::new(4, 8, 2).init(&Device::default());
        let text = "ExpertMlp {num_experts: 2, d_model: 4, d_ff: 8, activation: Gelu, form: Plain, bias: true, params: 152}";
        assert_eq!(format!("{experts}"), text);
    }
}
