//! The learned part of routing.

use burn::config::Config;
use burn::module::{Content, DisplaySettings, Module, ModuleDisplay, Param};
use burn::nn::Initializer;
use burn::tensor::{Bool, Device, Distribution, FloatDType, Tensor, TensorData, activation, assert_shape};
use serde::{Deserialize, Serialize};

use crate::{cost::Cost, error::ConfigError, ops, param::with_value, phase::Phase};

/// Configuration of a [`Router`].
#[derive(Config, Debug, PartialEq)]
pub struct RouterConfig {
    /// Standard deviation of the normal distribution that the weight starts from. Default: 0.02
    #[config(default = 0.02)]
    pub init_std: f64,
    /// How logits become scores. Default: `Softmax`
    #[config(default = "RouterScore::Softmax")]
    pub score: RouterScore,
    /// In training, normal noise of standard deviation `noise / E` on the logits that route (V-MoE,
    /// [arXiv 2106.05974](https://arxiv.org/abs/2106.05974), equation 2 with `noise = 1`). Default: 0
    #[config(default = 0.0)]
    pub noise: f64,
    /// In training, the input of the router times `U(1 − jitter, 1 + jitter)`, element by element (Switch Transformer,
    /// [arXiv 2101.03961](https://arxiv.org/abs/2101.03961), section 2.4, with 0.01). Default: 0
    #[config(default = 0.0)]
    pub jitter: f64,
    /// Whether experts have a bias that is added to their scores when they are chosen, and that
    /// [`MoeFeedForward::update_balancing_bias`](crate::MoeFeedForward::update_balancing_bias) moves against their load. Default: `None`
    #[config(default = "BalancingBias::None")]
    pub balancing_bias: BalancingBias,
}

/// How logits become scores; scores choose experts and become gates.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum RouterScore {
    /// `softmax(logits)`: the probabilities.
    Softmax,
    /// `σ(logits)`, each expert by itself (DeepSeek-V3, [arXiv 2412.19437](https://arxiv.org/abs/2412.19437), equation 15). Losses read
    /// the scores divided by their sum; the router z-loss, which is about a softmax, is refused.
    Sigmoid,
}

/// Balancing without a loss (Wang et al., [arXiv 2408.15664](https://arxiv.org/abs/2408.15664)).
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub enum BalancingBias {
    /// No bias.
    None,
    /// A bias that moves by `rate` a training step; DeepSeek-V3 has 1e-3.
    Sign {
        /// How far the bias moves, `u`.
        rate: f64,
    },
}

/// Scores every expert for every token: `logits = x · W_r`, `scores = softmax(logits)`.
///
/// No bias on the logits. All is computed in f32 whatever the dtype of `x`: rounding here changes which expert a token goes to (Switch
/// Transformer, [arXiv 2101.03961](https://arxiv.org/abs/2101.03961), section 2.4).
#[derive(Module, Debug)]
#[module(custom_display)]
pub struct Router {
    /// Router weight `W_r`, `[D, E]`.
    pub weight: Param<Tensor<2>>,
    /// Added to scores when choosing, never to a gate, `[E]`; has no gradient.
    pub balancing_bias: Option<Param<Tensor<1>>>,
    /// How logits become scores.
    #[module(skip)]
    pub score: RouterScore,
    /// See [`RouterConfig::noise`].
    #[module(skip)]
    pub noise: f64,
    /// See [`RouterConfig::jitter`].
    #[module(skip)]
    pub jitter: f64,
    /// See [`BalancingBias::Sign`].
    #[module(skip)]
    pub balancing_rate: f64,
}

/// What a [`Router`] says. *Clean* is what it says without noise and jitter.
#[derive(Debug, Clone)]
pub struct RouterOutput {
    /// Clean logits, `[T, E]`, f32.
    pub logits: Tensor<2>,
    /// Clean probabilities, `[T, E]`, f32; rows sum to one.
    pub clean_probs: Tensor<2>,
    /// The probabilities that route, `[T, E]`, f32; rows sum to one.
    pub probs: Tensor<2>,
    /// The scores that route, `[T, E]`, f32: the probabilities, or what [`RouterScore::Sigmoid`] makes of the logits.
    pub scores: Tensor<2>,
    /// The noise that was added, if any.
    pub noise: Option<RouterNoise>,
}

/// Noise on the logits.
#[derive(Debug, Clone)]
pub struct RouterNoise {
    /// Logits with noise, `[T, E]`.
    pub logits: Tensor<2>,
    /// Its standard deviation.
    pub std: f64,
}

impl RouterConfig {
    /// Refuses numbers outside their range.
    ///
    /// # Errors
    /// The first field that cannot be used, with its value.
    pub fn validate(&self) -> Result<(), ConfigError> {
        let rate = match self.balancing_bias {
            BalancingBias::None => 0.0,
            BalancingBias::Sign { rate } => rate,
        };
        let fields = [
            ("router.init_std", self.init_std, "a standard deviation must be finite and not negative"),
            ("router.noise", self.noise, "noise must be finite and not negative"),
            ("router.balancing_bias.rate", rate, "a rate must be finite and not negative"),
        ];
        for (field, value, reason) in fields {
            if !(value.is_finite() && value >= 0.0) {
                return Err(ConfigError::OutOfRange { field, value, reason });
            }
        }
        if !(0.0..1.0).contains(&self.jitter) {
            let reason = "jitter must be at least 0 and below 1";
            return Err(ConfigError::OutOfRange { field: "router.jitter", value: self.jitter, reason });
        }
        Ok(())
    }

    /// Cost of scoring `num_tokens` tokens.
    pub fn cost(&self, num_tokens: usize, d_model: usize, num_experts: usize) -> Cost {
        let bias = if self.balancing_bias == BalancingBias::None { 0 } else { num_experts };
        Cost::linear(num_tokens, d_model, num_experts, false) + Cost::params(bias)
    }

    /// A router for `num_experts` experts over tokens of width `d_model`.
    ///
    /// # Panics
    /// With the text of [`validate`](Self::validate).
    pub fn init(&self, d_model: usize, num_experts: usize, device: &Device) -> Router {
        crate::error::expect_valid(self.validate());
        let (balancing_bias, balancing_rate) = match self.balancing_bias {
            BalancingBias::None => (None, 0.0),
            BalancingBias::Sign { rate } => {
                let zeros = Param::from_tensor(Tensor::zeros([num_experts], device));
                (Some(zeros.set_require_grad(false)), rate)
            }
        };
        Router {
            weight: Initializer::Normal { mean: 0.0, std: self.init_std }.init([d_model, num_experts], device),
            balancing_bias,
            score: self.score,
            noise: self.noise,
            jitter: self.jitter,
            balancing_rate,
        }
    }
}

impl Router {
    /// Logits, probabilities and scores of every token; noisy in training, if so configured.
    ///
    /// # Shapes
    /// - x: `[T, D]`
    /// - everything in the output: `[T, E]`
    ///
    /// # Panics
    /// When the last axis of `x` is not `D`.
    pub fn forward(&self, x: Tensor<2>, phase: Phase) -> RouterOutput {
        let weight = self.weight.val();
        let [d_model, num_experts] = weight.dims();
        assert_shape!(x, [_, d_model]);
        // Zero times NaN is NaN: in the weight's gradient, one bad token would spoil all. Without gradients there is nothing to guard.
        let is_guarded = x.device().is_autodiff() && x.dims()[0] > 0;
        let bad_tokens = is_guarded.then(|| non_finite_rows(x.clone()));
        let x = match &bad_tokens {
            Some(bad) => x.mask_fill(bad.clone(), 0.0),
            None => x,
        };
        // Tokens whose logits overflow, too: the fill keeps a gradient from passing, and its NaN tells who cannot be routed.
        let guarded = |logits: Tensor<2>| match &bad_tokens {
            Some(bad) => {
                let (scores, _) = self.score.of(logits.clone().detach());
                let bad = bad.clone().bool_or(non_finite_rows(scores));
                Guarded { logits: logits.mask_fill(bad.clone(), 0.0), bad: Some(bad) }
            }
            None => Guarded { logits, bad: None },
        };
        let logits = ops::router_logits(x.clone(), weight.clone());
        let is_clean = phase == Phase::Inference || (self.noise == 0.0 && self.jitter == 0.0);
        if is_clean {
            let logits = guarded(logits);
            let (scores, probs) = logits.scores(self.score);
            return RouterOutput { logits: logits.marked(), clean_probs: probs.clone(), probs, scores, noise: None };
        }
        let clean = guarded(logits.clone());
        let (_, clean_probs) = clean.scores(self.score);
        let mut routed = logits;
        if self.jitter > 0.0 {
            let x = x.cast(FloatDType::F32);
            let factor = x.random_like(Distribution::Uniform(1.0 - self.jitter, 1.0 + self.jitter));
            routed = ops::router_logits(x * factor, weight);
        }
        let mut noise = None;
        if self.noise > 0.0 {
            let std = self.noise / num_experts as f64;
            routed = routed.clone() + routed.random_like(Distribution::Normal(0.0, std));
            noise = Some(std);
        }
        let routed = guarded(routed);
        let (scores, probs) = routed.scores(self.score);
        let noise = noise.map(|std| RouterNoise { logits: routed.marked(), std });
        RouterOutput { logits: clean.marked(), clean_probs, probs, scores, noise }
    }

    /// Moves the balancing bias against the load: `b_e += rate · sign(mean load − load_e)` (arXiv 2408.15664, algorithm 1). `load` counts
    /// the choices that named each expert in one training step. A router without a bias stays as it is.
    ///
    /// # Panics
    /// When `load` does not have one entry per expert.
    pub fn update_balancing_bias(mut self, load: &[usize]) -> Self {
        let mean = load.iter().sum::<usize>() as f64 / load.len().max(1) as f64;
        let rate = self.balancing_rate;
        self.balancing_bias = self.balancing_bias.map(|bias| {
            let [num_experts] = bias.shape().dims();
            assert_eq!(load.len(), num_experts, "loads of {} experts do not fit a router of {num_experts}", load.len());
            let step =
                |&load: &usize| (rate * (mean - load as f64).partial_cmp(&0.0).map_or(0, |order| order as i32) as f64) as f32;
            let steps: Vec<f32> = load.iter().map(step).collect();
            with_value(bias, |bias| bias.clone() + Tensor::from_data(TensorData::new(steps, [num_experts]), &bias.device()))
        });
        self
    }
}

/// Logits in which the rows `bad [T, 1]`, if it is known, stand at zero.
struct Guarded {
    logits: Tensor<2>,
    bad: Option<Tensor<2, Bool>>,
}

impl Guarded {
    /// NaN in bad rows, which a gradient does not pass.
    fn mark(&self, x: Tensor<2>) -> Tensor<2> {
        match &self.bad {
            Some(bad) => x.mask_fill(bad.clone(), f32::NAN),
            None => x,
        }
    }

    fn marked(&self) -> Tensor<2> {
        self.mark(self.logits.clone())
    }

    /// Scores, and the probabilities that belong to them.
    fn scores(&self, score: RouterScore) -> (Tensor<2>, Tensor<2>) {
        let (scores, probs) = score.of(self.logits.clone());
        (self.mark(scores), self.mark(probs))
    }
}

/// Rows that hold a value that is not finite, `[T, N] -> [T, 1]`; outside of any graph.
pub(crate) fn non_finite_rows(x: Tensor<2>) -> Tensor<2, Bool> {
    // A sum that no finite row can make overflow. Not a product with zero, which a shader compiler may take for zero.
    let scaled = x.detach().cast(FloatDType::F32).mul_scalar(1e-20);
    scaled.sum_dim(1).is_finite().bool_not()
}

/// The rows with those that are not finite as zeros.
pub(crate) fn without_non_finite(x: Tensor<2>) -> Tensor<2> {
    let bad = non_finite_rows(x.clone());
    x.mask_fill(bad, 0.0)
}

impl RouterScore {
    /// Scores, and the probabilities that belong to them.
    fn of(self, logits: Tensor<2>) -> (Tensor<2>, Tensor<2>) {
        match self {
            Self::Softmax => {
                let probs = activation::softmax(logits, 1);
                (probs.clone(), probs)
            }
            Self::Sigmoid => {
                // A sigmoid makes 0 or 1 of an infinite logit, by which no token must be routed.
                let is_bad = logits.clone().detach().is_finite().bool_not();
                let scores = activation::sigmoid(logits).mask_fill(is_bad, f32::NAN);
                (scores.clone(), scores.clone() / scores.sum_dim(1).clamp_min(f64::from(f32::MIN_POSITIVE)))
            }
        }
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
        RouterConfig::new().init(4, 2, &device).forward(Tensor::zeros([5, 3], &device), Phase::Inference);
    }

    #[test]
    fn noise_is_for_training_and_leaves_the_clean_values_alone() {
        let device = Device::default();
        let x = Tensor::<2>::random([64, 4], Distribution::Normal(0.0, 1.0), &device);
        let router = RouterConfig::new().with_init_std(1.0).with_noise(1.0).with_jitter(0.1).init(4, 2, &device);
        let (training, inference) = (router.forward(x.clone(), Phase::Training), router.forward(x, Phase::Inference));
        let values = |x: &Tensor<2>| x.clone().try_into_vec_as::<f32>().unwrap();
        assert_eq!(values(&training.logits), values(&inference.logits));
        assert_eq!(values(&training.clean_probs), values(&inference.probs));
        assert_ne!(values(&training.probs), values(&inference.probs));
        assert!(inference.noise.is_none());
        let noise = training.noise.unwrap();
        assert_eq!(noise.std, 0.5);
        assert_ne!(values(&noise.logits), values(&training.logits));
    }

    #[test]
    fn sigmoid_scores_do_not_compete_and_probabilities_sum_to_one() {
        let device = Device::default();
        let mut router = RouterConfig::new().with_score(RouterScore::Sigmoid).init(2, 2, &device);
        router.weight = Param::from_tensor(Tensor::from_floats([[3f32.ln(), 0.0], [0.0, 0.0]], &device));
        let output = router.forward(Tensor::from_floats([[1.0, 0.0]], &device), Phase::Training);
        let values = |x: Tensor<2>| x.try_into_vec_as::<f32>().unwrap();
        let near = |a: Vec<f32>, b: [f32; 2]| assert!((a[0] - b[0]).abs() < 1e-6 && (a[1] - b[1]).abs() < 1e-6, "{a:?}");
        near(values(output.scores), [0.75, 0.5]); // σ(ln 3) = 3/4, σ(0) = 1/2
        near(values(output.probs), [0.6, 0.4]);
    }

    #[test]
    fn sigmoid_scores_of_infinite_logits_are_not_finite() {
        let device = Device::default();
        let router = RouterConfig::new().with_score(RouterScore::Sigmoid).with_init_std(1.0).init(2, 2, &device);
        let output = router.forward(Tensor::from_floats([[f32::INFINITY, 1.0], [1.0, 1.0]], &device), Phase::Inference);
        let scores = output.scores.try_into_vec_as::<f32>().unwrap();
        assert!(scores[..2].iter().all(|s| s.is_nan()) && scores[2..].iter().all(|s| s.is_finite()), "{scores:?}");
    }

    #[test]
    fn the_balancing_bias_moves_against_the_load() {
        let bias = BalancingBias::Sign { rate: 0.25 };
        let router = RouterConfig::new().with_balancing_bias(bias).init(4, 3, &Device::default());
        let router = router.update_balancing_bias(&[9, 3, 6]).update_balancing_bias(&[9, 9, 0]);
        let bias: Vec<f32> = router.balancing_bias.unwrap().val().try_into_vec_as().unwrap();
        assert_eq!(bias, [-0.5, 0.0, 0.25]);
        let without = RouterConfig::new().init(4, 3, &Device::default()).update_balancing_bias(&[1, 2, 3]);
        assert!(without.balancing_bias.is_none());
    }

    #[test]
    fn numbers_outside_their_range_are_refused() {
        let text = |config: RouterConfig| config.validate().unwrap_err().to_string();
        let jitter = text(RouterConfig::new().with_jitter(1.0));
        assert_eq!(jitter, "`router.jitter` is 1: jitter must be at least 0 and below 1");
        let noise = text(RouterConfig::new().with_noise(f64::NAN));
        assert_eq!(noise, "`router.noise` is NaN: noise must be finite and not negative");
    }

    #[test]
    fn display() {
        let router = RouterConfig::new().init(4, 2, &Device::default());
        assert_eq!(format!("{router}"), "Router {d_model: 4, num_experts: 2, params: 8}");
    }
}
