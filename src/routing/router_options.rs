//! Options of a router.

use burn::config::Config;

use super::{balancing::BalancingOptions, router::RouterScore};
use crate::support::error::ConfigError;

/// Options of a [`Router`](crate::Router), whatever its sizes are.
#[derive(Config, Debug, PartialEq)]
pub struct RouterOptions {
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
    /// Whether the logits have a trained bias per expert, `logits = x · W_r + b_r`, which starts from 0 (gpt-oss,
    /// [arXiv 2508.10925](https://arxiv.org/abs/2508.10925)). Scores, gates and losses are with it. Default: false
    #[config(default = false)]
    pub bias: bool,
    /// Balancing without a loss: a bias per expert, which is added to the scores for selection only. Default: no bias
    pub balancing: Option<BalancingOptions>,
    /// `λ` of gating logit normalisation (Skywork-MoE, [arXiv 2406.06563](https://arxiv.org/abs/2406.06563), section 4.1, with `λ = 1`): before the
    /// softmax, the logits `z` of a token become `λ · (z − mean(z)) / std(z)` over the experts, with the population standard deviation
    /// `√(var(z) + 1e-8)`, so that equal logits give equal probabilities. The larger `λ`, the sharper the probabilities.
    ///
    /// Noise and jitter act on the logits before. Gates, load balancing, importance, entropies and statistics read the probabilities; the router z-loss and
    /// the load loss read the logits as they were, which the z-loss keeps small. Refused with sigmoid scores. Default: none
    pub logit_normalization: Option<f64>,
}

impl RouterOptions {
    /// Refuses numbers outside their range.
    ///
    /// # Errors
    /// The first field that cannot be used, with its value.
    pub fn validate(&self) -> Result<(), ConfigError> {
        let fields = [
            ("router.init_std", self.init_std, "a standard deviation must be finite and not negative"),
            ("router.noise", self.noise, "noise must be finite and not negative"),
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
        if let Some(value) = self.logit_normalization {
            let refused = |reason| Err(ConfigError::OutOfRange { field: "router.logit_normalization", value, reason });
            if !(value.is_finite() && value > 0.0) {
                return refused("the scale of normalised logits must be finite and above 0");
            }
            if self.score != RouterScore::Softmax {
                return refused("logits are normalised for a softmax, and the scores are of another kind");
            }
        }
        self.balancing.as_ref().map_or(Ok(()), BalancingOptions::validate)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_outside_their_range_are_refused() {
        let text = |config: RouterOptions| config.validate().unwrap_err().to_string();
        let jitter = text(RouterOptions::new().with_jitter(1.0));
        assert_eq!(jitter, "`router.jitter` is 1: jitter must be at least 0 and below 1");
        let noise = text(RouterOptions::new().with_noise(f64::NAN));
        assert_eq!(noise, "`router.noise` is NaN: noise must be finite and not negative");
        let normalized = RouterOptions::new().with_logit_normalization(Some(0.0));
        let reason = "the scale of normalised logits must be finite and above 0";
        assert_eq!(text(normalized), format!("`router.logit_normalization` is 0: {reason}"));
        let sigmoid = RouterOptions::new().with_score(RouterScore::Sigmoid).with_logit_normalization(Some(1.0));
        assert!(text(sigmoid).contains("normalised for a softmax"));
    }
}
