//! What an upcycling did.

use std::fmt;

use burn::module::Module;
use burn::tensor::{FloatDType, Tensor};

use super::UpcycleError;
use crate::support::param::placed;

/// What became sparse, what it costs, and how far the result is from the dense module.
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
pub struct UpcycleReport {
    /// The layers that became sparse.
    pub layers: Vec<UpcycledLayer>,
    /// Parameters of the dense module; of several, those of one.
    pub params_dense: usize,
    /// Parameters of the sparse module.
    pub params_total: usize,
    /// Parameters of the sparse module that one token passes through: of the experts, `K` out of `E`.
    pub params_active: usize,
    /// Largest absolute difference of the outputs on the probe batch, over valid tokens; of a CLIP or a tower, of the normalised embeddings. `None` without a probe, and for several dense
    /// models, which have their own deviations.
    pub max_deviation: Option<f64>,
    /// The dense models, where there were several; see [`UpcycleFromMany`](super::UpcycleFromMany).
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub models: Vec<UpcycledModel>,
}

/// One layer that became sparse.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct UpcycledLayer {
    /// Path in the module; empty for the module itself.
    pub path: String,
    /// Experts, `E`.
    pub num_experts: usize,
    /// Experts that a token passes through, `K`.
    pub active_experts: usize,
    /// Parameters of one expert.
    pub params_per_expert: usize,
}

/// One of several dense models that became experts, and what the sparse module makes of its probe. Deviations are largest absolute differences
/// over valid tokens; for a CLIP and its towers, of normalised embeddings.
#[derive(Clone, Debug, Default, PartialEq, serde::Serialize)]
pub struct UpcycledModel {
    /// For each sparse layer, the deviation of the model's experts from its own feed-forward network, both on what that network reads: 0 up to
    /// rounding. Empty without probes.
    pub layer_deviations: Vec<f64>,
    /// Deviation of the sparse module's output from the model's if every token passes experts of this model only: 0 up to rounding if the rest is
    /// this model's, too. `None` without probes.
    pub own_experts_deviation: Option<f64>,
    /// Deviation of the sparse module's output, as its routers decide, from the model's: 0 up to rounding only if all models are the same.
    /// `None` without probes.
    pub max_deviation: Option<f64>,
    /// For each sparse layer, the share of the tokens that the model's own network reads for which one of its experts has the highest score:
    /// about `1 / n` of `n` models if the router does not tell their data apart. Empty without probes.
    pub first_choices: Vec<f64>,
}

impl UpcycledLayer {
    pub(super) fn within(mut self, name: &str) -> Self {
        self.path = if self.path.is_empty() { name.to_string() } else { format!("{name}.{}", self.path) };
        self
    }
}

impl UpcycleReport {
    pub(super) fn new<D: Module, S: Module>(dense: &D, sparse: &S, layers: Vec<UpcycledLayer>, max_deviation: Option<f64>) -> Self {
        Self::with_counts(dense.num_params(), sparse.num_params(), layers, max_deviation)
    }

    pub(super) fn with_counts(
        params_dense: usize,
        params_total: usize,
        layers: Vec<UpcycledLayer>,
        max_deviation: Option<f64>,
    ) -> Self {
        let idle: usize = layers.iter().map(|l| (l.num_experts - l.active_experts) * l.params_per_expert).sum();
        Self { layers, params_dense, params_total, params_active: params_total - idle, max_deviation, models: Vec::new() }
    }
}

impl fmt::Display for UpcycleReport {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self.layers.len() {
            1 => writeln!(f, "1 sparse layer:")?,
            count => writeln!(f, "{count} sparse layers:")?,
        }
        for layer in &self.layers {
            let path = if layer.path.is_empty() { "(this layer)" } else { &layer.path };
            let (active, experts, params) = (layer.active_experts, layer.num_experts, layer.params_per_expert);
            writeln!(f, "  {path}: {active} of {experts} experts, {params} parameters each")?;
        }
        let (dense, total, active) = (self.params_dense, self.params_total, self.params_active);
        write!(f, "parameters: {dense} dense, {total} sparse, of which {active} active")?;
        if let Some(deviation) = self.max_deviation {
            write!(f, "\nlargest deviation from the dense outputs on the probe batch: {deviation:.1e}")?;
        }
        for (index, model) in self.models.iter().enumerate() {
            if let (Some(own), Some(routed)) = (model.own_experts_deviation, model.max_deviation) {
                let layers = model.layer_deviations.iter().copied().fold(0.0, f64::max);
                let first = 100.0 * model.first_choices.iter().sum::<f64>() / model.first_choices.len().max(1) as f64;
                write!(
                    f,
                    "\ndense model {index} on its probe batch: its experts deviate from its networks by {layers:.1e}, outputs "
                )?;
                write!(
                    f,
                    "through them alone from its own by {own:.1e}, outputs as routed by {routed:.1e}; its experts are the first "
                )?;
                write!(f, "choice of {first:.0} % of its tokens")?;
            }
        }
        Ok(())
    }
}

/// Largest absolute difference of outputs, which may be on different devices.
pub(super) fn deviation<const R: usize>(what: &str, dense: Tensor<R>, sparse: Tensor<R>) -> Result<f64, UpcycleError> {
    let device = dense.device().without_autodiff();
    let difference = (placed(dense, &device) - placed(sparse, &device)).abs();
    if difference.shape().num_elements() == 0 {
        return Ok(0.0);
    }
    crate::support::finite::check_finite(what, &difference)?;
    Ok(difference.max().cast(FloatDType::F32).into_scalar::<f32>().into())
}
