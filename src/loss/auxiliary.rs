//! The weighted sum that is added to the task loss.

use burn::config::Config;
use burn::tensor::Tensor;

use super::{load_balancing_loss, router_z_loss};
use crate::{error::ConfigError, routing::Routing};

/// Weights of the auxiliary losses.
#[derive(Config, Debug, PartialEq)]
pub struct AuxiliaryLossConfig {
    /// Weight of [`load_balancing_loss`]. Default: 0.01
    #[config(default = 0.01)]
    pub load_balancing: f64,
    /// Weight of [`router_z_loss`]. Default: 0.001
    #[config(default = 0.001)]
    pub router_z: f64,
}

/// Each loss on each layer, averaged over layers, then weighted.
#[derive(Debug, Clone, PartialEq)]
pub struct AuxiliaryLoss {
    config: AuxiliaryLossConfig,
}

/// One loss over all layers.
#[derive(Debug, Clone)]
pub struct LossTerm {
    /// The loss of each layer, unweighted, `[layers]`.
    pub per_layer: Tensor<1>,
    /// Their mean, unweighted, `[1]`.
    pub mean: Tensor<1>,
}

/// What [`AuxiliaryLoss::forward`] returns.
#[derive(Debug, Clone)]
pub struct AuxiliaryLossOutput {
    /// The weighted sum, `[1]`: add it to the task loss.
    pub total: Tensor<1>,
    /// See [`load_balancing_loss`].
    pub load_balancing: LossTerm,
    /// See [`router_z_loss`].
    pub router_z: LossTerm,
}

impl AuxiliaryLossConfig {
    /// Refuses weights that are negative or not finite.
    ///
    /// # Errors
    /// The first such weight, with its value.
    pub fn validate(&self) -> Result<(), ConfigError> {
        for (field, value) in [("load_balancing", self.load_balancing), ("router_z", self.router_z)] {
            if !(value.is_finite() && value >= 0.0) {
                return Err(ConfigError::OutOfRange { field, value, reason: "a loss weight must be finite and not negative" });
            }
        }
        Ok(())
    }

    /// The loss with these weights.
    ///
    /// # Panics
    /// With the text of [`validate`](Self::validate).
    pub fn init(&self) -> AuxiliaryLoss {
        crate::error::expect_valid(self.validate());
        AuxiliaryLoss { config: self.clone() }
    }
}

impl AuxiliaryLoss {
    /// The losses of the layers of one forward pass.
    ///
    /// # Panics
    /// When `routings` is empty: a model without a sparse layer has no auxiliary loss.
    pub fn forward(&self, routings: &[Routing]) -> AuxiliaryLossOutput {
        assert!(!routings.is_empty(), "auxiliary losses need the routing of at least one layer, got none");
        let term = |loss: fn(&Routing) -> Tensor<1>| {
            let per_layer = Tensor::cat(routings.iter().map(loss).collect(), 0);
            LossTerm { mean: per_layer.clone().mean(), per_layer }
        };
        let (load_balancing, router_z) = (term(load_balancing_loss), term(router_z_loss));
        let total = load_balancing.mean.clone() * self.config.load_balancing + router_z.mean.clone() * self.config.router_z;
        AuxiliaryLossOutput { total, load_balancing, router_z }
    }
}
