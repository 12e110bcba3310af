//! The sparse layer.

use burn::config::Config;
use burn::module::{Content, DisplaySettings, Flag, Module, ModuleDisplay, Param};
use burn::nn::Initializer;
use burn::tensor::{Device, Tensor, activation::sigmoid};

use crate::{
    layer::experts::{ExpertMlp, ExpertMlpConfig, ExpertOptions},
    ops,
    routing::{
        DispatchPlan, Dispatcher, FlatTokens, MoeInput, MoeOutput, Phase, Routing, TokenMask,
        assignment::{AssignmentConfig, AssignmentInput},
        router::{Router, RouterConfig, RouterOptions, without_non_finite},
        shaped,
    },
    support::{
        cost::Cost,
        error::{ConfigError, expect_valid},
    },
};

/// Configuration of a [`MoeFeedForward`].
#[derive(Config, Debug)]
pub struct MoeFeedForwardConfig {
    /// Token width, `D`.
    pub d_model: usize,
    /// Hidden width of each expert, `F`.
    pub d_ff: usize,
    /// Number of experts, `E`.
    pub num_experts: usize,
    /// The router. Default: [`RouterOptions::new`]
    #[config(default = "RouterOptions::new()")]
    pub router: RouterOptions,
    /// Which experts compute which tokens, and how many slots there are. Default: top-2 token choice, [`TokenChoiceConfig::new`](crate::TokenChoiceConfig::new)
    #[config(default = "AssignmentConfig::default()")]
    pub assignment: AssignmentConfig,
    /// The experts. Default: [`ExpertOptions::new`]
    #[config(default = "ExpertOptions::new()")]
    pub experts: ExpertOptions,
    /// Hidden width of an expert that every valid token passes, added without a gate (DeepSeekMoE,
    /// [arXiv 2401.06066](https://arxiv.org/abs/2401.06066), section 3.2). Default: none
    pub shared_expert: Option<usize>,
    /// Whether the shared expert's output has a gate of its own, `σ(x · w)` with a trained `w` `[D, 1]` (Qwen1.5-MoE). Default: false
    #[config(default = false)]
    pub shared_expert_gate: bool,
}

/// A sparse feed-forward layer: `y_t = Σ_k gate[t, k] · FFN_{e(t, k)}(x_t)` over the choices that have a slot.
///
/// The output is exactly 0 for padding, 0 or the shared expert's output for a token without a slot, and NaN for a valid token whose scores are
/// not finite. The layer has no residual, norm or dropout; add them around it, as around a dense feed-forward network.
///
/// Papers: Shazeer et al. ([arXiv 1701.06538](https://arxiv.org/abs/1701.06538), equation 1), GShard
/// ([arXiv 2006.16668](https://arxiv.org/abs/2006.16668)), CLIP-UP ([arXiv 2502.00965](https://arxiv.org/abs/2502.00965)).
#[derive(Module, Debug)]
#[module(custom_display)]
pub struct MoeFeedForward {
    /// Scores experts.
    pub router: Router,
    /// The feed-forward networks.
    pub experts: ExpertMlp,
    /// One more network, which every valid token passes; experts of one, `[1, D, F']`.
    pub shared_expert: Option<ExpertMlp>,
    /// Weight of the shared expert's gate, `[D, 1]`, if it has one.
    pub shared_expert_gate: Option<Param<Tensor<2>>>,
    /// Which experts compute which tokens.
    #[module(skip)]
    pub assignment: AssignmentConfig,
    /// Enables the training capacity, noise and jitter. Cleared by [`freeze`](burn::module::Module::freeze).
    pub training: Param<Flag>,
}

impl MoeFeedForwardConfig {
    /// Checks the configuration.
    ///
    /// # Errors
    /// The first field that cannot be used, with its value.
    pub fn validate(&self) -> Result<(), ConfigError> {
        ConfigError::non_zero("d_model", self.d_model)?;
        ConfigError::non_zero("d_ff", self.d_ff)?;
        if let Some(d_ff) = self.shared_expert {
            ConfigError::non_zero("shared_expert", d_ff)?;
        } else if self.shared_expert_gate {
            let reason = "there is no shared expert whose output it could multiply: set `shared_expert`";
            return Err(ConfigError::OutOfRange { field: "shared_expert_gate", value: 1.0, reason });
        }
        self.experts.form.validate()?;
        self.router.validate()?;
        if let (Some(balancing), AssignmentConfig::ExpertChoice(_)) = (&self.router.balancing, &self.assignment) {
            let reason = "expert choice is balanced by itself, and a bias per expert changes no choice of it";
            return Err(ConfigError::OutOfRange { field: "router.balancing.rate", value: balancing.rate, reason });
        }
        self.assignment.validate(self.num_experts)
    }

    /// Cost for one sample of `num_tokens` tokens when nothing is dropped.
    pub fn cost(&self, num_tokens: usize) -> Cost {
        let rows = self.assignment.rows(num_tokens, self.num_experts);
        let active = self.assignment.active_experts(self.num_experts);
        let experts = Cost::experts(self.expert_config(self.d_ff, self.num_experts).cost_of_one(rows), self.num_experts, active);
        let shared = self.shared_expert.map_or(Cost::default(), |d_ff| self.expert_config(d_ff, 1).cost_of_one(num_tokens));
        let gate = if self.shared_expert_gate { Cost::linear(num_tokens, self.d_model, 1, false) } else { Cost::default() };
        self.router_config().cost(num_tokens) + experts + shared + gate
    }

    fn router_config(&self) -> RouterConfig {
        RouterConfig::new(self.d_model, self.num_experts).with_options(self.router.clone())
    }

    fn expert_config(&self, d_ff: usize, num_experts: usize) -> ExpertMlpConfig {
        ExpertMlpConfig::new(self.d_model, d_ff, num_experts).with_options(self.experts.clone())
    }

    /// A new layer.
    ///
    /// # Panics
    /// With the text of [`validate`](Self::validate).
    #[track_caller]
    pub fn init(&self, device: &Device) -> MoeFeedForward {
        expect_valid(self.validate());
        MoeFeedForward {
            router: self.router_config().init(device),
            experts: self.expert_config(self.d_ff, self.num_experts).init(device),
            shared_expert: self.shared_expert.map(|d_ff| self.expert_config(d_ff, 1).init(device)),
            shared_expert_gate: self
                .shared_expert_gate
                .then(|| Initializer::Normal { mean: 0.0, std: self.router.init_std }.init([self.d_model, 1], device)),
            assignment: self.assignment.clone(),
            training: Param::from_bool(true),
        }
    }
}

impl MoeFeedForward {
    /// Routes every token and combines the outputs of its experts.
    ///
    /// The training capacity holds if the *input* is on an autodiff device and the layer is not frozen; otherwise the inference capacity does
    /// ([`phase`](Self::phase)). `valid()` and `freeze()` end training, and `train()` brings a layer back to it.
    /// Which expert a token goes to has no gradient; gates and experts have one.
    ///
    /// # Shapes
    /// - input: `[.., D]`, any rank of at least 2; `T` is the product of the leading axes
    /// - output: as the input
    ///
    /// # Panics
    /// When the last axis is not `D`, a mask has neither the leading axes of the input nor `[T]`, or tokens are protected and experts choose. In a
    /// browser on `webgpu` also where the host assigns slots ([kernels](crate::guide::kernels)).
    #[track_caller]
    pub fn forward<const R: usize>(&self, input: impl Into<MoeInput<R>>) -> MoeOutput<R> {
        let [_, d_model, _] = self.experts.dims();
        let FlatTokens { x, shape, per_sample, valid, protected } = input.into().into_tokens(d_model);
        let routing = self.route(&x, valid, protected, per_sample);
        let output = self.compute(x, &routing.plan, routing.valid.as_ref());
        MoeOutput { output: shaped(output, shape), routing }
    }

    /// The layer's output with the plan of a router of your own, the shared expert included. The layer's router and
    /// assignment are not used. Padding comes out as exactly 0, also where the plan gives it to an expert.
    ///
    /// # Shapes
    /// - input, output: `[.., D]`; the plan is of `T` tokens, the product of the leading axes
    ///
    /// # Panics
    /// When the last axis is not `D`, a mask does not fit, the plan is of another number of tokens or of experts, or the input names protected
    /// tokens: which tokens keep their slots was decided when the plan was made.
    #[track_caller]
    pub fn forward_with<const R: usize>(&self, input: impl Into<MoeInput<R>>, plan: &DispatchPlan) -> Tensor<R> {
        let [num_experts, d_model, _] = self.experts.dims();
        let found = plan.num_experts();
        assert!(found == num_experts, "a plan of {found} experts does not fit a layer of {num_experts}");
        let FlatTokens { x, shape, valid, protected, .. } = input.into().into_tokens(d_model);
        assert!(
            protected.is_none(),
            "`protected` changes nothing in a plan that exists: pass it to the routing that makes the plan"
        );
        let output = self.compute(x, plan, None);
        let output = match valid {
            Some(valid) => output.clone().mask_fill(valid.unset(&output.device()), 0.0),
            None => output,
        };
        shaped(output, shape)
    }

    fn route(
        &self,
        tokens: &Tensor<2>,
        valid: Option<TokenMask>,
        protected: Option<TokenMask>,
        tokens_per_sample: usize,
    ) -> Routing {
        let phase = self.phase(&tokens.device());
        let router = self.router.forward(tokens.clone(), phase);
        let plan = self.assignment.assign(&AssignmentInput {
            scores: router.scores.clone(),
            selection_bias: self.router.balancing_bias.as_ref().map(|bias| bias.val()),
            valid: valid.clone(),
            protected,
            tokens_per_sample,
            phase,
        });
        Routing { router, valid, plan, token_dtype: tokens.dtype() }
    }

    fn compute(&self, tokens: Tensor<2>, plan: &DispatchPlan, valid: Option<&TokenMask>) -> Tensor<2> {
        let dispatcher = Dispatcher::new(plan, &tokens);
        let rows = dispatcher.dispatch(tokens.clone());
        let mut output = dispatcher.combine(self.experts.forward_rows(rows, &dispatcher));
        if let Some(shared) = self.shared_expert.as_ref().filter(|_| plan.num_tokens() > 0) {
            // A token that is not finite has its NaN from combining, and must not reach the weights' gradient.
            let tokens = if tokens.device().is_autodiff() { without_non_finite(tokens) } else { tokens };
            let shared = self.gated(shared.forward(tokens.clone().unsqueeze_dim(0)).squeeze_dim(0), tokens);
            output = output
                + match valid {
                    Some(valid) => shared.clone().mask_fill(valid.unset(&shared.device()), 0.0),
                    None => shared,
                };
        }
        output
    }

    /// The shared expert's output for these tokens, times its gate if it has one.
    fn gated(&self, output: Tensor<2>, tokens: Tensor<2>) -> Tensor<2> {
        let Some(weight) = &self.shared_expert_gate else { return output };
        let gate = sigmoid(ops::router_logits(tokens, weight.val()));
        let dtype = output.dtype();
        output * gate.cast(dtype)
    }

    /// Moves the router's balancing bias by what one training step routed; see
    /// [`BalancingOptions`](crate::BalancingOptions). A router without one stays as it is.
    ///
    /// # Panics
    /// When the routing is of another number of experts.
    pub fn update_balancing_bias(mut self, routing: &Routing) -> Self {
        self.router = self.router.update_balancing_bias(routing.plan.requested());
        self
    }

    /// What a forward pass on tokens of this device is for: training on an autodiff device, unless the layer is frozen. For a router of your own,
    /// so that it follows the layer.
    pub fn phase(&self, device: &Device) -> Phase {
        if self.training.is_enabled() && device.is_autodiff() { Phase::Training } else { Phase::Inference }
    }
}

impl ModuleDisplay for MoeFeedForward {
    fn custom_settings(&self) -> Option<DisplaySettings> {
        DisplaySettings::new().with_new_line_after_attribute(false).optional()
    }

    fn custom_content(&self, content: Content) -> Option<Content> {
        let [num_experts, d_model, d_ff] = self.experts.dims();
        content
            .add("d_model", &d_model)
            .add("d_ff", &d_ff)
            .add("num_experts", &num_experts)
            .add("active_experts", &self.assignment.active_experts(num_experts))
            .optional()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn::tensor::Bool;

    use crate::{BalancingOptions, Capacity, TokenChoiceConfig};

    #[test]
    #[should_panic(expected = "`top_k` is 3, but there are only 2 experts")]
    fn init_refuses_what_validate_refuses() {
        let assignment = TokenChoiceConfig::new().with_top_k(3).into();
        MoeFeedForwardConfig::new(4, 8, 2).with_assignment(assignment).init(&Device::default());
    }

    #[test]
    #[should_panic(expected = "`router.balancing.rate` is 0.5: expert choice is balanced by itself")]
    fn a_balancing_bias_that_would_do_nothing_is_refused() {
        let router = RouterOptions::new().with_balancing(Some(BalancingOptions::new(0.5)));
        let assignment = crate::ExpertChoiceConfig::new().into();
        MoeFeedForwardConfig::new(4, 8, 2).with_router(router).with_assignment(assignment).init(&Device::default());
    }

    #[test]
    #[should_panic(expected = "tokens of shape [5, 3] do not fit a layer of width 4: expected [.., 4]")]
    fn token_width_must_match() {
        let device = Device::default();
        MoeFeedForwardConfig::new(4, 8, 2).init(&device).forward(Tensor::<2>::zeros([5, 3], &device));
    }

    #[test]
    #[should_panic(expected = "a mask of shape [3, 2] does not fit tokens of shape [2, 3, 4]: expected [2, 3] or [6]")]
    fn a_mask_must_have_the_leading_axes_of_the_input() {
        let device = Device::default();
        let mask = Tensor::<2, Bool>::full([3, 2], true, &device);
        let x = Tensor::<3>::zeros([2, 3, 4], &device);
        MoeFeedForwardConfig::new(4, 8, 2).init(&device).forward(MoeInput::new(x).valid(mask));
    }

    #[test]
    fn capacity_is_limited_in_training_only() {
        let device = Device::default().autodiff();
        let tight = TokenChoiceConfig::new().with_training_capacity(Capacity::Fixed(1));
        let layer = MoeFeedForwardConfig::new(4, 8, 2).with_assignment(tight.into()).init(&device);
        let x = Tensor::<2>::ones([6, 4], &device);
        assert_eq!(layer.forward(x.clone()).routing.plan.num_rows(), 2);
        assert_eq!(layer.clone().freeze().forward(x.clone()).routing.plan.num_rows(), 12);
        assert_eq!(layer.valid().forward(x.inner()).routing.plan.num_rows(), 12);
    }

    #[test]
    fn display() {
        let layer = MoeFeedForwardConfig::new(4, 8, 2).init(&Device::default());
        let text = "MoeFeedForward {d_model: 4, d_ff: 8, num_experts: 2, active_experts: 2, params: 160}";
        assert_eq!(format!("{layer}"), text);
    }
}
