//! One layer with the feed-forward networks of several models.

use burn::module::Module;
use burn::tensor::{Device, FloatDType, Int, Tensor};

use super::{RouterStart, UpcycleFromMany, UpcycleManyOptions};
use crate::{
    layer::moe::MoeFeedForward,
    routing::{DispatchPlan, Phase},
    support::param::{frozen, placed},
    upcycle::{
        DenseFeedForward, DenseWeights, ProbeTokens, UpcycleError, UpcycleReport, Upcycled, UpcycledLayer, UpcycledModel,
        cluster::centroids,
        layer::{check_copies, compare, layer_of, put, replace},
        strategy::{Stacked, copies},
        valid_rows,
    },
};

impl<Dense: DenseFeedForward + ?Sized> UpcycleFromMany<Dense> for MoeFeedForward {
    fn upcycle_from_many(self, dense: &[&Dense], options: &UpcycleManyOptions) -> Result<Upcycled<Self>, UpcycleError> {
        options.check(dense.len())?;
        let [num_experts, d_model, _] = self.experts.dims();
        let count = experts_per_model(num_experts, dense.len())?;
        let mut weights = Vec::new();
        for (index, dense) in dense.iter().enumerate() {
            let of_model = |error: UpcycleError| error.for_experts(self.experts.activation).of_model(index);
            let dense = DenseWeights::of(*dense).map_err(of_model)?;
            check_copies(&self, &dense).map_err(of_model)?;
            weights.push(dense);
        }
        let mut probes = Vec::new();
        for (index, probe) in options.probes.iter().enumerate() {
            probes.push(probe.tokens(d_model).map_err(|error| error.of_model(index))?);
        }
        let columns = match options.router {
            RouterStart::Kept => None,
            RouterStart::Centroids => {
                let of_model = |(index, (tokens, valid)): (usize, &ProbeTokens)| {
                    centroids_of_model(valid_rows(tokens, valid.as_ref()), count).map_err(|error| error.of_model(index))
                };
                Some(probes.iter().enumerate().map(of_model).collect::<Result<_, _>>()?)
            }
        };
        let (model, layer) = copy_many(self, &weights, columns)?;

        let mut models = vec![UpcycledModel::default(); dense.len()];
        let (sparse, device) = (frozen(&model), model.router.weight.lazy_device());
        for (index, probe) in probes.into_iter().enumerate() {
            let (only, dense) = (OnlyModel { index, models: dense.len() }, &weights[index]);
            let compared = only.compare_layer(&sparse, dense, &probe).and_then(|report| {
                let routed = compare(dense, &probe, &device, |input| sparse.forward(input).output)?;
                let own = report.layer_deviations.first().copied();
                Ok(UpcycledModel { own_experts_deviation: own, max_deviation: Some(routed), ..report })
            });
            models[index] = compared.map_err(|error| error.of_model(index))?;
        }
        let report = UpcycleReport::with_counts(weights[0].num_params(), model.num_params(), vec![layer], None);
        Ok(Upcycled { model, report: UpcycleReport { models, ..report } })
    }
}

/// How many experts each of so many models has.
pub(in crate::upcycle) fn experts_per_model(num_experts: usize, models: usize) -> Result<usize, UpcycleError> {
    if num_experts.is_multiple_of(models) {
        return Ok(num_experts / models);
    }
    Err(UpcycleError::models(format!("{num_experts} experts are no multiple of {models} models")))
}

/// The layer with copies of each of the networks, which are known to fit, and of the columns `[E / number of models, D]` of each model's experts in
/// its router, if there are some.
pub(in crate::upcycle) fn copy_many(
    mut moe: MoeFeedForward,
    models: &[DenseWeights],
    columns: Option<Vec<Tensor<2>>>,
) -> Result<(MoeFeedForward, UpcycledLayer), UpcycleError> {
    let [num_experts, _, _] = moe.experts.dims();
    let count = experts_per_model(num_experts, models.len())?;
    // Outside of any graph, and where the sparse layer lives.
    let device = moe.experts.w_in.lazy_device().inner();
    let stacks = models.iter().map(|weights| copies(&weights.moved(&device), count)).collect();
    put(&mut moe.experts, Stacked::cat(stacks), models[0].w_in.dtype());
    if let Some(columns) = columns {
        let columns = columns.into_iter().map(|columns| Tensor::from_data(columns.into_data(), &device)).collect();
        moe.router.weight = replace(moe.router.weight, Tensor::<2>::cat(columns, 0).transpose());
    }
    let layer = layer_of(&moe.experts, moe.assignment.active_experts(num_experts));
    Ok((moe, layer))
}

/// Unit directions of what one model's network reads, `[T, D] -> [count, D]`.
pub(super) fn centroids_of_model(tokens: Tensor<2>, count: usize) -> Result<Tensor<2>, UpcycleError> {
    let [found, _] = tokens.dims();
    if found < count {
        let reason = format!("{found} valid tokens of the probe make no {count} centroids");
        return Err(UpcycleError::Strategy { strategy: "centroids".into(), reason });
    }
    centroids(tokens.cast(FloatDType::F32), count)
}

/// Sends tokens to the experts of one model and to no other.
#[derive(Clone, Copy)]
pub(in crate::upcycle) struct OnlyModel {
    pub index: usize,
    pub models: usize,
}

impl OnlyModel {
    /// Every token to one of the model's experts, in turn, with the gate 1.
    pub(super) fn plan(self, num_experts: usize, num_tokens: usize, device: &Device) -> DispatchPlan {
        let count = num_experts / self.models;
        let experts = Tensor::<1, Int>::arange(0..num_tokens as i64, device) % count as i64 + (self.index * count) as i64;
        DispatchPlan::from_choices(num_experts, experts.unsqueeze_dim(1), Tensor::ones([num_tokens, 1], device))
    }

    /// The experts of the model in a layer, on tokens that its own network reads.
    pub(super) fn compare_layer(
        self,
        layer: &MoeFeedForward,
        dense: &DenseWeights,
        probe: &ProbeTokens,
    ) -> Result<UpcycledModel, UpcycleError> {
        let ([num_experts, d_model, _], [batch, len, _]) = (layer.experts.dims(), probe.0.dims());
        let device = layer.router.weight.lazy_device();
        let plan = self.plan(num_experts, batch * len, &device);
        let deviation = compare(dense, probe, &device, |input| layer.forward_with(input, &plan))?;

        let tokens = placed(probe.0.clone(), &device).reshape([batch * len, d_model]);
        let scores = layer.router.forward(tokens, Phase::Inference).scores;
        let scores: Vec<f32> = scores.detach().try_into_vec_as().expect("scores are floats");
        let is_first = |scores: &[f32]| {
            let first = (1..num_experts).fold(0, |first, expert| if scores[expert] > scores[first] { expert } else { first });
            first * self.models / num_experts == self.index
        };
        let valid = probe.1.as_ref().map(|valid| valid.clone().into_data().iter::<bool>().collect::<Vec<bool>>());
        let rows = scores.chunks_exact(num_experts).enumerate();
        let firsts: Vec<bool> =
            rows.filter(|(row, _)| valid.as_ref().is_none_or(|valid| valid[*row])).map(|(_, scores)| is_first(scores)).collect();
        let share = firsts.iter().filter(|&&is_first| is_first).count() as f64 / firsts.len().max(1) as f64;
        Ok(UpcycledModel { layer_deviations: vec![deviation], first_choices: vec![share], ..UpcycledModel::default() })
    }
}
