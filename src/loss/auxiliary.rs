//! The weighted sum that is added to the task loss.

use burn::config::Config;
use burn::tensor::{DType, Tensor};

use super::{
    global_entropy_loss, importance_loss,
    load_balancing::{own_share, with_share},
    load_loss, local_entropy_loss, router_z_loss,
};
use crate::{routing::Routing, support::error::ConfigError};

/// Weights of the auxiliary losses; a loss of weight 0 is not computed. For weights that differ between modalities, make one
/// [`AuxiliaryLoss`] for each and add up the totals.
#[derive(Config, Debug, PartialEq)]
pub struct AuxiliaryLossConfig {
    /// Weight of [`load_balancing_loss`](super::load_balancing_loss). Default: 0.01
    #[config(default = 0.01)]
    pub load_balancing: f64,
    /// Weight of [`router_z_loss`]; needs softmax scores. Default: 0.001
    #[config(default = 0.001)]
    pub router_z: f64,
    /// Weight of [`importance_loss`]. Default: 0
    #[config(default = 0.0)]
    pub importance: f64,
    /// Weight of [`load_loss`]; needs router noise. Default: 0
    #[config(default = 0.0)]
    pub load: f64,
    /// Weight of [`local_entropy_loss`]. Default: 0
    #[config(default = 0.0)]
    pub local_entropy: f64,
    /// Weight of [`global_entropy_loss`]. Default: 0
    #[config(default = 0.0)]
    pub global_entropy: f64,
    /// Number of experts that [`global_entropy_loss`] aims at. Default: 4
    #[config(default = 4.0)]
    pub experts_in_use: f64,
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

/// What [`AuxiliaryLoss::forward`] returns; a term is `None` when its weight is 0.
#[derive(Debug, Clone)]
pub struct AuxiliaryLossOutput {
    /// The weighted sum, `[1]`, in the number type of the tokens: add it to the task loss. Terms are f32.
    pub total: Tensor<1>,
    /// See [`load_balancing_loss`](super::load_balancing_loss).
    pub load_balancing: Option<LossTerm>,
    /// See [`router_z_loss`].
    pub router_z: Option<LossTerm>,
    /// See [`importance_loss`].
    pub importance: Option<LossTerm>,
    /// See [`load_loss`].
    pub load: Option<LossTerm>,
    /// See [`local_entropy_loss`].
    pub local_entropy: Option<LossTerm>,
    /// See [`global_entropy_loss`].
    pub global_entropy: Option<LossTerm>,
}

/// One layer's loss, `[1]`. The last argument makes the shares of the batch's requested choices that name each expert, `[1, E]`.
type LayerLoss = fn(&AuxiliaryLossConfig, &Routing, &dyn Fn() -> Tensor<2>) -> Tensor<1>;

/// A loss and its weight.
pub(super) struct Weighted {
    pub field: &'static str,
    pub weight: f64,
    /// Whether the mean over a batch is a sum over its tokens once the totals of the batch are known.
    pub is_sum: bool,
    pub loss: LayerLoss,
}

impl AuxiliaryLossConfig {
    /// Refuses weights that are negative or not finite.
    ///
    /// # Errors
    /// The first such weight, with its value.
    pub fn validate(&self) -> Result<(), ConfigError> {
        for Weighted { field, weight: value, .. } in self.losses() {
            if !(value.is_finite() && value >= 0.0) {
                return Err(ConfigError::OutOfRange { field, value, reason: "a loss weight must be finite and not negative" });
            }
        }
        if !(self.experts_in_use.is_finite() && self.experts_in_use >= 1.0) {
            let reason = "a modality uses at least one expert";
            return Err(ConfigError::OutOfRange { field: "experts_in_use", value: self.experts_in_use, reason });
        }
        Ok(())
    }

    /// All losses, in the order of their fields.
    pub(super) fn losses(&self) -> [Weighted; 6] {
        let sum = |field, weight, loss: LayerLoss| Weighted { field, weight, is_sum: true, loss };
        let of_batch = |field, weight, loss: LayerLoss| Weighted { field, weight, is_sum: false, loss };
        [
            sum("load_balancing", self.load_balancing, |_, routing, share| with_share(routing, share())),
            sum("router_z", self.router_z, |_, routing, _| router_z_loss(routing)),
            of_batch("importance", self.importance, |_, routing, _| importance_loss(routing)),
            of_batch("load", self.load, |_, routing, _| load_loss(routing)),
            sum("local_entropy", self.local_entropy, |_, routing, _| local_entropy_loss(routing)),
            of_batch("global_entropy", self.global_entropy, |config, routing, _| {
                global_entropy_loss(routing, config.experts_in_use)
            }),
        ]
    }

    /// The loss with these weights.
    ///
    /// # Panics
    /// With the text of [`validate`](Self::validate).
    pub fn init(&self) -> AuxiliaryLoss {
        crate::support::error::expect_valid(self.validate());
        AuxiliaryLoss { config: self.clone() }
    }
}

impl AuxiliaryLoss {
    pub(super) fn config(&self) -> &AuxiliaryLossConfig {
        &self.config
    }

    /// The losses of the layers of one forward pass.
    ///
    /// # Panics
    /// When `routings` is empty (a model without a routed layer has no auxiliary loss), the router z-loss meets sigmoid scores, or the load loss a
    /// router without noise.
    #[track_caller]
    pub fn forward(&self, routings: &[Routing]) -> AuxiliaryLossOutput {
        assert!(!routings.is_empty(), "auxiliary losses need the routing of at least one layer, got none");
        let mut total = Tensor::zeros([1], (&routings[0].router.probs.device(), DType::F32));
        let [load_balancing, router_z, importance, load, local_entropy, global_entropy] =
            self.config.losses().map(|Weighted { weight, loss, .. }| {
                (weight > 0.0).then(|| {
                    let of_layer = |routing: &Routing| loss(&self.config, routing, &|| own_share(routing));
                    let per_layer = Tensor::cat(routings.iter().map(of_layer).collect(), 0);
                    let mean = per_layer.clone().mean();
                    total = total.clone() + mean.clone() * weight;
                    LossTerm { mean, per_layer }
                })
            });
        let total = total.cast(routings[0].token_dtype);
        AuxiliaryLossOutput { total, load_balancing, router_z, importance, load, local_entropy, global_entropy }
    }
}
