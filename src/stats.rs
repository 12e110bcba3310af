//! What a researcher asks of a routing, read only from [`Routing`].

use crate::routing::{Routing, entropy};

/// Figures of one layer on one batch, on the host.
#[derive(Debug, Clone, PartialEq, serde::Serialize)]
pub struct RoutingStats {
    /// Share of all rows that each expert computes, `[E]`; sums to one unless nothing is seated.
    pub load: Vec<f64>,
    /// Share of asked choices without a slot, `1 − kept / asked`.
    pub dropped: f64,
    /// Mean over valid tokens of the entropy of their probabilities, in nats: 0 for one-hot routing, `ln E` for uniform.
    pub entropy: f64,
    /// Valid tokens.
    pub num_valid: usize,
}

impl RoutingStats {
    /// Reads one routing.
    pub fn new(routing: &Routing) -> Self {
        let plan = &routing.plan;
        let rows = plan.num_rows();
        let entropy = entropy(routing.clean_probs.clone().detach());
        Self {
            load: plan.load().into_iter().map(|load| load as f64 / rows.max(1) as f64).collect(),
            dropped: plan.dropped(),
            entropy: routing.mean_over_valid(entropy).into_scalar::<f32>().into(),
            num_valid: routing.num_valid(),
        }
    }

    /// The mean of several batches of the same layer, weighted by their valid tokens; `None` for no batch.
    pub fn mean(stats: &[Self]) -> Option<Self> {
        let first = stats.first()?;
        let total: usize = stats.iter().map(|s| s.num_valid).sum();
        let weight = |s: &Self| s.num_valid as f64 / total.max(1) as f64;
        let mut mean = Self { load: vec![0.0; first.load.len()], dropped: 0.0, entropy: 0.0, num_valid: total };
        for s in stats {
            mean.load.iter_mut().zip(&s.load).for_each(|(sum, load)| *sum += weight(s) * load);
            mean.dropped += weight(s) * s.dropped;
            mean.entropy += weight(s) * s.entropy;
        }
        Some(mean)
    }

    /// Load of the busiest expert over the mean load: 1 when perfectly even.
    pub fn peak_load(&self) -> f64 {
        self.load.iter().copied().fold(0.0, f64::max) * self.load.len() as f64
    }
}
