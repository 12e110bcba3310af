//! Routing statistics, computed from [`Routing`] alone.

use std::sync::{Arc, Mutex, PoisonError};

use burn::tensor::{Tensor, read_sync};

use crate::routing::{BatchTotals, Routing, entropy};

/// Figures of one layer on one batch, on the host.
#[derive(Debug, Clone, PartialEq, serde::Serialize)]
pub struct RoutingStats {
    /// Share of all rows that each expert computes, `[E]`; sums to one unless no choice has a slot. Where slots are limited, an expert that is
    /// chosen too often computes no more rows than it has slots: `requested` shows how uneven the choices are.
    pub load: Vec<f64>,
    /// Share of all choices that request each expert, with a slot or without, `[E]`; sums to one unless there is no choice.
    pub requested: Vec<f64>,
    /// Share of requested choices without a slot, `1 − kept / requested`.
    pub dropped: f64,
    /// The same by rank: first choices, second choices, … (by expert for expert choice), `[M]`.
    pub dropped_per_choice: Vec<f64>,
    /// Mean over valid tokens of their largest probability: 1 for one-hot routing, `1 / E` for uniform.
    pub confidence: f64,
    /// Mean over valid tokens of the entropy of their probabilities, in nats: 0 for one-hot routing, `ln E` for uniform.
    pub entropy: f64,
    /// Valid tokens.
    pub num_valid: usize,
    /// Valid tokens whose probabilities are finite: those that have a share in the figures above.
    pub num_counted: usize,
}

impl RoutingStats {
    /// Reads one routing; waits for its device.
    ///
    /// # Panics
    /// On a device that the host cannot wait for, as in a browser: see [`new_async`](Self::new_async).
    pub fn new(routing: &Routing) -> Self {
        read_sync(Self::new_async(routing))
    }

    /// The same for a device that the host cannot wait for, as in a browser.
    pub async fn new_async(routing: &Routing) -> Self {
        routing.read_async().await;
        let plan = &routing.plan;
        let shares = |counts: Vec<usize>| {
            let total = counts.iter().sum::<usize>().max(1) as f64;
            counts.into_iter().map(|count| count as f64 / total).collect::<Vec<f64>>()
        };
        let probs = routing.router.clean_probs.clone().detach();
        let mean = async |per_token: Tensor<2>| {
            let mean = routing.mean_over_valid(per_token).into_scalar_async::<f32>().await;
            f64::from(mean.expect("the device can be read"))
        };
        let counted = routing.counted().into_scalar_async::<f32>().await.expect("the device can be read");
        let share_dropped =
            |(&kept, &requested): (&usize, &usize)| if requested == 0 { 0.0 } else { 1.0 - kept as f64 / requested as f64 };
        Self {
            load: shares(plan.load()),
            requested: shares(plan.requested().to_vec()),
            dropped: plan.dropped(),
            dropped_per_choice: plan.kept_per_choice().iter().zip(plan.requested_per_choice()).map(share_dropped).collect(),
            confidence: mean(probs.clone().max_dim(1)).await,
            entropy: mean(entropy(probs)).await,
            num_valid: routing.num_valid(),
            num_counted: counted as usize,
        }
    }

    /// The mean of several batches of the same layer, weighted by the tokens that count in each; `None` for no batch.
    pub fn mean(stats: &[Self]) -> Option<Self> {
        let first = stats.first()?;
        let total: usize = stats.iter().map(|s| s.num_counted).sum();
        let weight = |s: &Self| s.num_counted as f64 / total.max(1) as f64;
        let of = |value: &dyn Fn(&Self) -> f64| stats.iter().map(|s| weight(s) * value(s)).sum();
        Some(Self {
            load: (0..first.load.len()).map(|expert| of(&|s| s.load[expert])).collect(),
            requested: (0..first.requested.len()).map(|expert| of(&|s| s.requested[expert])).collect(),
            dropped: of(&|s| s.dropped),
            dropped_per_choice: (0..first.dropped_per_choice.len()).map(|rank| of(&|s| s.dropped_per_choice[rank])).collect(),
            confidence: of(&|s| s.confidence),
            entropy: of(&|s| s.entropy),
            num_valid: stats.iter().map(|s| s.num_valid).sum(),
            num_counted: total,
        })
    }

    /// Load of the busiest expert over the mean load: 1 when perfectly even. Where slots are limited, this is limited too; see
    /// [`peak_requested`](Self::peak_requested).
    pub fn peak_load(&self) -> f64 {
        peak(&self.load)
    }

    /// Choices of the expert that is chosen most over their mean, with a slot or without: 1 when perfectly even.
    pub fn peak_requested(&self) -> f64 {
        peak(&self.requested)
    }
}

fn peak(shares: &[f64]) -> f64 {
    shares.iter().copied().fold(0.0, f64::max) * shares.len() as f64
}

/// Counts the requested choices of each expert over micro-batches, threads and devices, to update a balancing bias once per batch. Clones share
/// the counts, so that a model can hold a counter as a `#[module(skip)]` field and count in a step that borrows the model.
#[derive(Debug, Clone, Default)]
pub struct LoadCounter(Arc<Mutex<BatchTotals>>);

impl LoadCounter {
    /// Counts the routings of one micro-batch, one per layer.
    ///
    /// # Panics
    /// When there are not as many layers, or experts in one of them, as before.
    pub fn add(&self, routings: &[Routing]) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).add(routings);
    }

    /// What was counted since the last call, `[layers][E]`, for [`Router::update_balancing_bias`](crate::Router::update_balancing_bias); empty
    /// when nothing was.
    pub fn take(&self) -> Vec<Vec<usize>> {
        std::mem::take(&mut *self.0.lock().unwrap_or_else(PoisonError::into_inner)).requested
    }
}

/// How often two experts compute the same token, `[E][E]`: the tokens that have a row of both, divided by the tokens that have a row of the
/// first; 0 if the first has no rows, otherwise 1 on the diagonal. Compare the values of images and texts.
pub fn co_firing(routing: &Routing) -> Vec<Vec<f64>> {
    let plan = &routing.plan;
    let row_expert = plan.row_expert();
    let mut counts = vec![vec![0.0; plan.num_experts()]; plan.num_experts()];
    for rows in plan.choice_row().chunks_exact(plan.num_choices()) {
        let mut experts: Vec<usize> = rows.iter().filter_map(|&row| usize::try_from(row).ok()).map(|row| row_expert[row]).collect();
        // A plan that was made elsewhere may send a token to one expert twice.
        experts.sort_unstable();
        experts.dedup();
        for &a in &experts {
            experts.iter().for_each(|&b| counts[a][b] += 1.0);
        }
    }
    for (expert, row) in counts.iter_mut().enumerate() {
        let own = row[expert];
        row.iter_mut().for_each(|count| *count = if own > 0.0 { *count / own } else { 0.0 });
    }
    counts
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn::tensor::Device;

    use crate::{
        Capacity, MoeFeedForwardConfig, TokenChoiceConfig,
        routing::{DispatchPlan, RouterOutput},
    };

    #[test]
    fn a_token_that_names_an_expert_twice_is_one_token_of_it() {
        let device = Device::default();
        let experts = Tensor::from_data([[1, 0, 1], [1, 2, -1]], &device);
        let plan = DispatchPlan::from_choices(3, experts, Tensor::ones([2, 3], &device));
        let probs = Tensor::<2>::full([2, 3], 1.0 / 3.0, &device);
        let routing = Routing::new(RouterOutput::new(probs.clone().log(), probs), plan);
        assert_eq!(co_firing(&routing), [vec![1.0, 1.0, 0.0], vec![0.5, 1.0, 0.5], vec![0.0, 1.0, 1.0]]);
    }

    #[test]
    fn second_choices_are_dropped_and_pairs_are_counted() {
        // Tokens 0 and 1 choose experts 0 and 1, token 2 chooses 2 and 1; each expert has one slot.
        let device = Device::default();
        let config = TokenChoiceConfig::new().with_inference_capacity(Capacity::Fixed(1));
        let mut layer = MoeFeedForwardConfig::new(3, 4, 3).with_assignment(config.into()).init(&device);
        layer.router.weight = burn::module::Param::from_tensor(Tensor::eye(3, &device));
        let x = Tensor::<2>::from_floats([[5.0, 3.0, 0.0], [5.0, 3.0, 0.0], [0.0, 3.0, 5.0]], &device);
        let routing = layer.forward(x.clone()).routing;
        let stats = RoutingStats::new(&routing);
        // First choices: 0 kept, 1 dropped, 2 kept. Second choices all want expert 1: one of three.
        let near = |a: &[f64], b: &[f64]| a.iter().zip(b).all(|(a, b)| (a - b).abs() < 1e-6);
        assert!(near(&stats.dropped_per_choice, &[1.0 / 3.0, 2.0 / 3.0]), "{:?}", stats.dropped_per_choice);
        // Each expert computes its one slot; of six choices, half want expert 1.
        assert!(near(&stats.load, &[1.0 / 3.0; 3]) && near(&stats.requested, &[1.0 / 3.0, 0.5, 1.0 / 6.0]), "{stats:?}");
        assert!(near(&[stats.peak_load(), stats.peak_requested()], &[1.0, 1.5]), "{stats:?}");
        // e⁵ / (e⁵ + e³ + 1)
        assert!((stats.confidence - 0.8756).abs() < 1e-4, "{}", stats.confidence);
        assert_eq!(co_firing(&routing), [vec![1.0, 1.0, 0.0], vec![1.0, 1.0, 0.0], vec![0.0, 0.0, 1.0]]);
        let counter = LoadCounter::default();
        counter.add(std::slice::from_ref(&routing));
        counter.clone().add(&[routing]);
        assert_eq!((counter.take(), counter.take()), (vec![vec![4, 6, 2]], vec![]));
        assert_eq!(read_sync(RoutingStats::new_async(&layer.forward(x).routing)), stats);
        let mean = RoutingStats::mean(&[stats.clone(), stats.clone()]).unwrap();
        assert!(mean.confidence == stats.confidence && near(&mean.requested, &stats.requested));
    }
}
