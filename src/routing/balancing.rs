//! Balancing the load without a loss.

use burn::config::Config;
use burn::module::Param;
use burn::tensor::{DType, Device, FloatDType, Tensor, TensorData};
use serde::{Deserialize, Serialize};

use super::router::Router;
use crate::support::{cost::Cost, error::ConfigError, param::with_value};

/// The longest warm-up: f32 tells apart as many shares of it.
const MOST_WARMUP_STEPS: usize = 1_000_000;

/// Balancing by a bias per expert, which is added to the scores for selection only, and which
/// [`MoeFeedForward::update_balancing_bias`](crate::MoeFeedForward::update_balancing_bias) moves against the load after each training step (Wang et al.,
/// [arXiv 2408.15664](https://arxiv.org/abs/2408.15664)).
///
/// With the direction `d` of [`BalancingRule`], in step `n`, from 1:
///
/// ```text
/// m = β · m + (1 − β) · d                  β: momentum; m starts from 0
/// b = b + rate · min(1, n / warmup) · m    within −cap and cap
/// ```
///
/// `m` and the share of the warm-up that is done are parameters of the [`Router`] without a gradient, so that records and checkpoints hold them and training
/// goes on where it was stopped. Without momentum and warm-up there is neither of them, and `b` moves by `rate · d`.
///
/// ```
/// use burn_moe::{BalancingOptions, BalancingRule, RouterOptions, RouterScore};
///
/// // DeepSeek-V3, arXiv 2412.19437
/// let router = RouterOptions::new().with_score(RouterScore::Sigmoid).with_balancing(Some(BalancingOptions::new(1e-3)));
/// // MoE-ViE, arXiv 2608.17402
/// let by_z_score = BalancingOptions::new(1e-3).with_rule(BalancingRule::ZScore);
/// let router = router.with_balancing(Some(by_z_score));
/// ```
#[derive(Config, Debug, PartialEq)]
pub struct BalancingOptions {
    /// How far a bias moves in a step, in units of scores. DeepSeek-V3 uses 1e-3; 0 leaves the bias as it is.
    pub rate: f64,
    /// Which way, and how far in proportion to the others. Default: `Sign`
    #[config(default = "BalancingRule::Sign")]
    pub rule: BalancingRule,
    /// How much of the mean direction of the steps before stays at each step, `β`. Default: 0
    #[config(default = 0.0)]
    pub momentum: f64,
    /// The largest size of a bias, in units of scores. Default: no limit
    pub cap: Option<f64>,
    /// Steps in which the rate rises evenly to its value. Default: 0
    #[config(default = 0)]
    pub warmup_steps: usize,
}

/// The direction in which a load moves the balancing biases: up for an expert that has less than the mean, down for one that has more. A load is the
/// number of choices that named each expert in one training step, before drops.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum BalancingRule {
    /// `sign(mean − load_e)` (DeepSeek-V3; [arXiv 2408.15664](https://arxiv.org/abs/2408.15664), algorithm 1): 1, 0 or −1, whatever the distance.
    Sign,
    /// `(mean − load_e) / σ`, with the population standard deviation `σ` of the loads; 0 where `σ` is 0 (MoE-ViE,
    /// [arXiv 2608.17402](https://arxiv.org/abs/2608.17402)): the experts that are furthest from the mean move most. At most `√(E − 1)` for each.
    ZScore,
}

impl BalancingRule {
    /// One number per expert.
    fn direction(self, load: &[usize]) -> Vec<f32> {
        let count = load.len().max(1) as f64;
        let mean = load.iter().sum::<usize>() as f64 / count;
        let short = || load.iter().map(|&load| mean - load as f64);
        let unit = match self {
            Self::Sign => None,
            Self::ZScore => Some((short().map(|short| short * short).sum::<f64>() / count).sqrt()),
        };
        // An even load has a standard deviation of 0, and none of its experts is short.
        let direction = |short: f64| if short == 0.0 { 0.0 } else { short / unit.unwrap_or(short.abs()) };
        short().map(|short| direction(short) as f32).collect()
    }
}

impl BalancingOptions {
    /// Refuses numbers outside their range.
    ///
    /// # Errors
    /// The first such field, with its value.
    pub fn validate(&self) -> Result<(), ConfigError> {
        let refused = |field, value, reason| Err(ConfigError::OutOfRange { field, value, reason });
        if !(self.rate.is_finite() && self.rate >= 0.0) {
            return refused("router.balancing.rate", self.rate, "a rate must be finite and not negative");
        }
        if !(0.0..1.0).contains(&self.momentum) {
            return refused("router.balancing.momentum", self.momentum, "momentum must be at least 0 and below 1");
        }
        match self.cap {
            Some(cap) if !(cap.is_finite() && cap > 0.0) => {
                return refused("router.balancing.cap", cap, "a cap must be finite and above 0; `None` sets no limit");
            }
            _ => {}
        }
        if self.warmup_steps > MOST_WARMUP_STEPS {
            return refused("router.balancing.warmup_steps", self.warmup_steps as f64, "a warm-up has at most 1,000,000 steps");
        }
        Ok(())
    }

    /// Whether the mean of the directions is kept.
    pub(crate) fn has_momentum(&self) -> bool {
        self.momentum > 0.0
    }

    /// Whether the share of the warm-up that is done is kept.
    pub(crate) fn has_warmup(&self) -> bool {
        self.warmup_steps > 0
    }

    /// Parameters without a gradient: bias, momentum and warm-up.
    pub(super) fn cost(&self, num_experts: usize) -> Cost {
        let per_expert = 1 + usize::from(self.has_momentum());
        Cost::params(per_expert * num_experts + usize::from(self.has_warmup()))
    }
}

/// A parameter of zeros without a gradient, in f32 on every device: in 16 bits, small moves would be lost.
pub(super) fn zeros(len: usize, device: &Device) -> Param<Tensor<1>> {
    Param::from_tensor(Tensor::zeros([len], (device, DType::F32))).set_require_grad(false)
}

/// A new state from an old one, in f32 even if the whole module was cast to 16 bits.
fn next(state: Param<Tensor<1>>, f: impl FnOnce(Tensor<1>) -> Tensor<1>) -> Param<Tensor<1>> {
    with_value(state, |old| f(old.dequantize().cast(FloatDType::F32)))
}

impl Router {
    /// Moves the balancing bias against the load, as [`BalancingOptions`] says. `load` counts the choices that named each expert in one training step: call
    /// it once per step. The state is kept in f32: in a module that was cast to 16 bits, it is f32 again from the first call on. A router without [`RouterOptions::balancing`](crate::RouterOptions::balancing) stays as it is.
    ///
    /// # Panics
    /// When `load` does not have one entry per expert.
    pub fn update_balancing_bias(mut self, load: &[usize]) -> Self {
        let (Some(options), Some(bias)) = (self.balancing.clone(), self.balancing_bias.clone()) else { return self };
        let [num_experts] = bias.shape().dims();
        assert_eq!(load.len(), num_experts, "loads of {} experts do not fit a router of {num_experts}", load.len());
        let direction = TensorData::new(options.rule.direction(load), [num_experts]);
        let mut step = Tensor::<1>::from_data(direction, (&bias.val().device(), DType::F32));
        self.balancing_momentum = self.balancing_momentum.map(|momentum| {
            let momentum = next(momentum, |momentum| momentum * options.momentum + step.clone() * (1.0 - options.momentum));
            step = momentum.val().detach();
            momentum
        });
        step = step * options.rate;
        self.balancing_warmup = self.balancing_warmup.map(|done| {
            let steps = options.warmup_steps as f64;
            // A whole number of steps, so that no error adds up.
            let done = next(done, |done| (done * steps).round().add_scalar(1.0).clamp_max(steps) / steps);
            step = step.clone() * done.val().detach();
            done
        });
        self.balancing_bias = Some(next(bias, |bias| match options.cap {
            Some(cap) => (bias + step).clamp(-cap, cap),
            None => bias + step,
        }));
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{RouterConfig, RouterOptions};

    fn router(num_experts: usize, options: BalancingOptions) -> Router {
        let options = RouterOptions::new().with_balancing(Some(options));
        RouterConfig::new(4, num_experts).with_options(options).init(&Device::default())
    }

    fn bias(router: &Router) -> Vec<f32> {
        router.balancing_bias.as_ref().unwrap().val().try_into_vec_as().unwrap()
    }

    fn near(found: &[f32], expected: &[f64]) {
        let close = found.iter().zip(expected).all(|(found, expected)| (f64::from(*found) - expected).abs() < 1e-6);
        assert!(close && found.len() == expected.len(), "{found:?} {expected:?}");
    }

    #[test]
    fn the_sign_moves_by_the_rate() {
        let router = router(3, BalancingOptions::new(0.25));
        let router = router.update_balancing_bias(&[9, 3, 6]).update_balancing_bias(&[9, 9, 0]);
        assert_eq!(bias(&router), [-0.5, 0.0, 0.25]);
        assert!(router.balancing_momentum.is_none() && router.balancing_warmup.is_none());
        let without = RouterConfig::new(4, 3).init(&Device::default()).update_balancing_bias(&[1, 2, 3]);
        assert!(without.balancing_bias.is_none());
    }

    #[test]
    fn the_z_score_moves_those_most_that_are_furthest_from_the_mean() {
        let router = router(4, BalancingOptions::new(0.5).with_rule(BalancingRule::ZScore));
        // Mean 5, deviations −3, 1, 1, 1, variance 12 / 4.
        let router = router.update_balancing_bias(&[8, 4, 4, 4]);
        let root = 3f64.sqrt();
        near(&bias(&router), &[-1.5 / root, 0.5 / root, 0.5 / root, 0.5 / root]);
        let before = bias(&router);
        let router = router.update_balancing_bias(&[7, 7, 7, 7]).update_balancing_bias(&[0; 4]);
        assert_eq!(bias(&router), before, "an even load moves nothing");
    }

    #[test]
    fn momentum_cap_and_warm_up_are_as_computed_by_hand() {
        let options = BalancingOptions::new(0.5)
            .with_rule(BalancingRule::ZScore)
            .with_momentum(0.75)
            .with_cap(Some(0.4))
            .with_warmup_steps(4);
        let mut router = router(2, options);
        // Two experts have z-scores of ±1. By hand: m = 0.75 m + 0.25 d, the rate is 1/8, 2/8, 3/8, 1/2, 1/2, ….
        let steps = [
            ([1, 3], 0.25, 0.25, 0.03125),                   // 0.25 / 8
            ([1, 9], 0.4375, 0.5, 0.140625),                 // + 0.4375 / 4
            ([5, 5], 0.328125, 0.75, 0.263671875),           // + 0.328125 · 3 / 8
            ([0, 1], 0.49609375, 1.0, 0.4),                  // + 0.248046875, which is above the cap
            ([7, 1], 0.1220703125, 1.0, 0.4),                // still up
            ([7, 1], -0.158447265625, 1.0, 0.3207763671875), // − 0.158447265625 / 2
        ];
        let value = |param: &Option<Param<Tensor<1>>>| param.as_ref().unwrap().val().try_into_vec_as::<f32>().unwrap();
        for (load, momentum, warmup, expected) in steps {
            router = router.update_balancing_bias(&load);
            near(&value(&router.balancing_momentum), &[momentum, -momentum]);
            near(&value(&router.balancing_warmup), &[warmup]);
            near(&bias(&router), &[expected, -expected]);
        }
    }

    #[test]
    fn a_long_warm_up_counts_every_step() {
        let mut router = router(2, BalancingOptions::new(0.0).with_warmup_steps(1000));
        for step in 1..=1001 {
            router = router.update_balancing_bias(&[1, 2]);
            let done = router.balancing_warmup.as_ref().unwrap().val().into_scalar::<f32>();
            assert_eq!((f64::from(done) * 1000.0).round() as usize, step.min(1000));
        }
    }

    #[test]
    fn numbers_outside_their_range_are_refused() {
        let text = |options: BalancingOptions| options.validate().unwrap_err().to_string();
        let options = || BalancingOptions::new(0.1);
        assert_eq!(text(BalancingOptions::new(f64::NAN)), "`router.balancing.rate` is NaN: a rate must be finite and not negative");
        assert_eq!(text(options().with_momentum(1.0)), "`router.balancing.momentum` is 1: momentum must be at least 0 and below 1");
        assert!(text(options().with_cap(Some(0.0))).starts_with("`router.balancing.cap` is 0: "));
        assert!(text(options().with_warmup_steps(1_000_001)).starts_with("`router.balancing.warmup_steps` is 1000001: "));
        assert!(RouterOptions::new().with_balancing(Some(options().with_momentum(-0.1))).validate().is_err());
    }

    #[test]
    #[should_panic(expected = "loads of 2 experts do not fit a router of 3")]
    fn a_load_of_other_experts_is_refused() {
        router(3, BalancingOptions::new(0.1)).update_balancing_bias(&[1, 2]);
    }
}
