//! The learned part of routing.

use burn::config::Config;
use burn::module::{Content, DisplaySettings, Module, ModuleDisplay, Param};
use burn::nn::Initializer;
use burn::tensor::{Bool, Device, Distribution, FloatDType, Tensor, activation, assert_shape};
use serde::{Deserialize, Serialize};

pub use super::router_options::RouterOptions;
use super::{
    balancing::{self, BalancingOptions},
    normalization::normalized,
    phase::Phase,
};
use crate::{ops, support::cost::Cost};

/// Configuration of a [`Router`].
#[derive(Config, Debug)]
pub struct RouterConfig {
    /// Token width, `D`.
    pub d_model: usize,
    /// Number of experts, `E`.
    pub num_experts: usize,
    /// Everything but the sizes. Default: [`RouterOptions::new`]
    #[config(default = "RouterOptions::new()")]
    pub options: RouterOptions,
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

/// Scores every expert for every token: `logits = x · W_r`, plus a trained bias if [`RouterOptions::bias`] says so, and scores by [`RouterScore`].
///
/// All is computed in f32 whatever the dtype of `x`: rounding here changes which expert a token goes to (Switch
/// Transformer, [arXiv 2101.03961](https://arxiv.org/abs/2101.03961), section 2.4).
#[derive(Module, Debug)]
#[module(custom_display)]
pub struct Router {
    /// Router weight `W_r`, `[D, E]`.
    pub weight: Param<Tensor<2>>,
    /// Added to the logits, `[E]`; trained.
    pub bias: Option<Param<Tensor<1>>>,
    /// Added to scores when choosing, never to a gate, `[E]`; has no gradient.
    pub balancing_bias: Option<Param<Tensor<1>>>,
    /// Mean direction of the last moves of the bias, `[E]`, if [`BalancingOptions::momentum`] is not 0; has no gradient.
    pub balancing_momentum: Option<Param<Tensor<1>>>,
    /// Share of [`BalancingOptions::warmup_steps`] that is done, `[1]`, if there are any; has no gradient.
    pub balancing_warmup: Option<Param<Tensor<1>>>,
    /// How logits become scores.
    #[module(skip)]
    pub score: RouterScore,
    /// See [`RouterOptions::noise`].
    #[module(skip)]
    pub noise: f64,
    /// See [`RouterOptions::jitter`].
    #[module(skip)]
    pub jitter: f64,
    /// What moves the bias; nothing without.
    #[module(skip)]
    pub balancing: Option<BalancingOptions>,
    /// See [`RouterOptions::logit_normalization`].
    #[module(skip)]
    pub logit_normalization: Option<f64>,
}

/// What a [`Router`] computes. Values that begin with `clean_` are without noise and jitter; the others, which decide about the experts, are
/// with them. Without noise and jitter both are the same. Logits are those before [`RouterOptions::logit_normalization`], probabilities and scores those after.
#[derive(Debug, Clone)]
pub struct RouterOutput {
    /// `[T, E]`, f32. The load loss reads them.
    pub logits: Tensor<2>,
    /// Probabilities, `[T, E]`, f32; rows sum to one. Load balancing reads them.
    pub probs: Tensor<2>,
    /// Scores for selection and gates, `[T, E]`, f32, without the balancing bias: probabilities, or sigmoids of the logits.
    pub scores: Tensor<2>,
    /// `[T, E]`, f32. The router z-loss reads them.
    pub clean_logits: Tensor<2>,
    /// Probabilities, `[T, E]`, f32; rows sum to one. Importance, entropies and statistics read them.
    pub clean_probs: Tensor<2>,
    /// Standard deviation of the noise on the logits, if there is any.
    pub noise_std: Option<f64>,
    /// How logits became scores.
    pub score: RouterScore,
}

impl RouterOutput {
    /// Of a router of your own: logits and their softmax, `[T, E]`, f32, without noise.
    pub fn new(logits: Tensor<2>, probs: Tensor<2>) -> Self {
        let (clean_logits, clean_probs, scores) = (logits.clone(), probs.clone(), probs.clone());
        Self { logits, probs, scores, clean_logits, clean_probs, noise_std: None, score: RouterScore::Softmax }
    }
}

impl RouterConfig {
    /// Cost of scoring `num_tokens` tokens.
    pub fn cost(&self, num_tokens: usize) -> Cost {
        let balancing = self.options.balancing.as_ref().map_or(Cost::default(), |balancing| balancing.cost(self.num_experts));
        Cost::linear(num_tokens, self.d_model, self.num_experts, self.options.bias) + balancing
    }

    /// A new router.
    ///
    /// # Panics
    /// With the text of [`RouterOptions::validate`].
    pub fn init(&self, device: &Device) -> Router {
        crate::support::error::expect_valid(self.options.validate());
        let RouterOptions { init_std, score, noise, jitter, bias, balancing, logit_normalization } = self.options.clone();
        let state = |is_kept: bool, len: usize| is_kept.then(|| balancing::zeros(len, device));
        let has = |part: fn(&BalancingOptions) -> bool| balancing.as_ref().is_some_and(part);
        Router {
            weight: Initializer::Normal { mean: 0.0, std: init_std }.init([self.d_model, self.num_experts], device),
            bias: bias.then(|| Initializer::Zeros.init([self.num_experts], device)),
            balancing_bias: state(balancing.is_some(), self.num_experts),
            balancing_momentum: state(has(BalancingOptions::has_momentum), self.num_experts),
            balancing_warmup: state(has(BalancingOptions::has_warmup), 1),
            score,
            noise,
            jitter,
            balancing,
            logit_normalization,
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
        // Zero times NaN is NaN: in the weight's gradient, one bad token would spoil all. A kernel sees to that itself; elsewhere the tokens are set to
        // zero. Without gradients there is nothing to guard.
        let is_guarded = self.bias.is_none() && ops::router_is_guarded(&x);
        let needs_guard = x.device().is_autodiff() && x.dims()[0] > 0 && !is_guarded;
        let bad_tokens = needs_guard.then(|| non_finite_rows(x.clone()));
        let x = match &bad_tokens {
            Some(bad) => x.mask_fill(bad.clone(), 0.0),
            None => x,
        };
        // Tokens whose logits are not finite, whether the token is not or only its product: the fill keeps a gradient from passing, and its NaN
        // tells who cannot be routed.
        let guarded = |logits: Tensor<2>| {
            let Some(bad_tokens) = &bad_tokens else {
                return Guarded { logits, bad: None };
            };
            let (scores, _) = self.scores(logits.clone().detach());
            let bad = bad_tokens.clone().bool_or(non_finite_rows(scores));
            Guarded { logits: logits.mask_fill(bad.clone(), 0.0), bad: Some(bad) }
        };
        let logits = self.logits(x.clone(), weight.clone());
        let is_clean = phase == Phase::Inference || (self.noise == 0.0 && self.jitter == 0.0);
        if is_clean {
            let logits = guarded(logits);
            let (scores, probs) = logits.marked_scores(self);
            return RouterOutput { scores, score: self.score, ..RouterOutput::new(logits.marked(), probs) };
        }
        let clean = guarded(logits.clone());
        let (_, clean_probs) = clean.marked_scores(self);
        let mut routed = logits;
        if self.jitter > 0.0 {
            let x = x.cast(FloatDType::F32);
            let factor = x.random_like(Distribution::Uniform(1.0 - self.jitter, 1.0 + self.jitter));
            routed = self.logits(x * factor, weight);
        }
        let noise_std = (self.noise > 0.0).then(|| self.noise / num_experts as f64);
        if let Some(std) = noise_std {
            routed = routed.clone() + routed.random_like(Distribution::Normal(0.0, std));
        }
        let routed = guarded(routed);
        let (scores, probs) = routed.marked_scores(self);
        let (logits, clean_logits) = (routed.marked(), clean.marked());
        RouterOutput { logits, probs, scores, clean_logits, clean_probs, noise_std, score: self.score }
    }

    /// `[T, D], [D, E] -> [T, E]`
    fn logits(&self, x: Tensor<2>, weight: Tensor<2>) -> Tensor<2> {
        let logits = ops::router_logits(x, weight);
        match &self.bias {
            Some(bias) => logits + bias.val().dequantize().cast(FloatDType::F32).unsqueeze(),
            None => logits,
        }
    }

    /// Scores, and the probabilities that belong to them.
    fn scores(&self, logits: Tensor<2>) -> (Tensor<2>, Tensor<2>) {
        match self.logit_normalization {
            Some(scale) => self.score.of(normalized(logits, scale)),
            None => self.score.of(logits),
        }
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
    fn marked_scores(&self, router: &Router) -> (Tensor<2>, Tensor<2>) {
        let (scores, probs) = router.scores(self.logits.clone());
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
        RouterConfig::new(4, 2).init(&device).forward(Tensor::zeros([5, 3], &device), Phase::Inference);
    }

    #[test]
    fn noise_is_for_training_and_leaves_the_clean_values_alone() {
        let device = Device::default();
        let x = Tensor::<2>::random([64, 4], Distribution::Normal(0.0, 1.0), &device);
        let router = RouterConfig::new(4, 2)
            .with_options(RouterOptions::new().with_init_std(1.0).with_noise(1.0).with_jitter(0.1))
            .init(&device);
        let (training, inference) = (router.forward(x.clone(), Phase::Training), router.forward(x, Phase::Inference));
        let values = |x: &Tensor<2>| x.clone().try_into_vec_as::<f32>().unwrap();
        assert_eq!(values(&training.clean_logits), values(&inference.logits));
        assert_eq!(values(&training.clean_probs), values(&inference.probs));
        assert_ne!(values(&training.probs), values(&inference.probs));
        assert_eq!((training.noise_std, inference.noise_std), (Some(0.5), None));
        assert_ne!(values(&training.logits), values(&inference.logits));
    }

    #[test]
    fn sigmoid_scores_do_not_compete_and_probabilities_sum_to_one() {
        let device = Device::default();
        let mut router = RouterConfig::new(2, 2).with_options(RouterOptions::new().with_score(RouterScore::Sigmoid)).init(&device);
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
        let router = RouterConfig::new(2, 2)
            .with_options(RouterOptions::new().with_score(RouterScore::Sigmoid).with_init_std(1.0))
            .init(&device);
        let output = router.forward(Tensor::from_floats([[f32::INFINITY, 1.0], [1.0, 1.0]], &device), Phase::Inference);
        let scores = output.scores.try_into_vec_as::<f32>().unwrap();
        assert!(scores[..2].iter().all(|s| s.is_nan()) && scores[2..].iter().all(|s| s.is_finite()), "{scores:?}");
    }

    #[test]
    fn display() {
        let router = RouterConfig::new(4, 2).init(&Device::default());
        assert_eq!(format!("{router}"), "Router {d_model: 4, num_experts: 2, params: 8}");
    }
}
