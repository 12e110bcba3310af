//! Encoders, towers and CLIPs with the feed-forward networks of several models.

use burn::tensor::Tensor;

use super::{
    Rest, RouterStart, UpcycleFromMany, UpcycleManyOptions,
    average::average,
    layer::{OnlyModel, centroids_of_model, experts_per_model},
};
#[cfg(feature = "clip")]
use crate::clip::{Clip, TextTower, VisionTower};
use crate::{
    routing::{Routing, router::RouterOutput},
    support::param::{frozen, with_floats},
    transformer::{BlockTokens, Encoder, FeedForward, FeedForwardInputs},
    upcycle::{
        DenseFeedForward, Probe, UpcycleError, UpcycleReport, Upcycled, UpcycledModel,
        encoders::Encoders,
        source::{BlockCentroids, ExpertSource, dense_network},
        valid_rows,
    },
};

impl UpcycleFromMany<Encoder> for Encoder {
    fn upcycle_from_many(self, dense: &[&Self], options: &UpcycleManyOptions) -> Result<Upcycled<Self>, UpcycleError> {
        upcycle(self, dense, options)
    }
}

/// Deviations are those of the embeddings, normalised.
#[cfg(feature = "clip")]
impl UpcycleFromMany<Clip> for Clip {
    fn upcycle_from_many(self, dense: &[&Self], options: &UpcycleManyOptions) -> Result<Upcycled<Self>, UpcycleError> {
        upcycle(self, dense, options)
    }
}

/// A vision tower alone; probes are [`Probe::Images`], or [`Probe::ImagesAndTexts`] of which the images are taken.
#[cfg(feature = "clip")]
impl UpcycleFromMany<VisionTower> for VisionTower {
    fn upcycle_from_many(self, dense: &[&Self], options: &UpcycleManyOptions) -> Result<Upcycled<Self>, UpcycleError> {
        upcycle(self, dense, options)
    }
}

/// A text tower alone; probes are [`Probe::Texts`], or [`Probe::ImagesAndTexts`] of which the texts are taken.
#[cfg(feature = "clip")]
impl UpcycleFromMany<TextTower> for TextTower {
    fn upcycle_from_many(self, dense: &[&Self], options: &UpcycleManyOptions) -> Result<Upcycled<Self>, UpcycleError> {
        upcycle(self, dense, options)
    }
}

fn upcycle<M: Encoders>(mut sparse: M, dense: &[&M], options: &UpcycleManyOptions) -> Result<Upcycled<M>, UpcycleError> {
    let models = dense.len();
    options.check(models)?;
    let dense: Vec<M> = dense.iter().map(|dense| with_floats(*dense)).collect();
    let dense: &[&M] = &dense.iter().collect::<Vec<_>>();
    for (index, dense) in dense.iter().enumerate() {
        let sources: Vec<ExpertSource> = sparse.encoders().iter().map(|_| ExpertSource::CheckOnly { models }).collect();
        sparse.clone().take_over(dense, &sources).map_err(|error| error.of_model(index))?;
    }
    let mut centroids = sparse.encoders().iter().map(|_| Vec::new()).collect::<Vec<Vec<BlockCentroids>>>();
    if options.router == RouterStart::Centroids {
        for (index, (dense, probe)) in dense.iter().zip(&options.probes).enumerate() {
            let inputs = dense.inputs(probe).map_err(|error| error.of_model(index))?;
            for ((encoder, inputs), centroids) in sparse.encoders().into_iter().zip(&inputs).zip(&mut centroids) {
                centroids.push(centroids_of_blocks(encoder, inputs, models).map_err(|error| error.of_model(index))?);
            }
        }
    }
    let encoders: Vec<Vec<&Encoder>> = dense.iter().map(|dense| dense.encoders()).collect();
    let source_of = |(encoder, centroids): (usize, Vec<BlockCentroids>)| ExpertSource::Models {
        encoders: encoders.iter().map(|model| model[encoder]).collect(),
        centroids: (options.router == RouterStart::Centroids).then_some(centroids),
    };
    let sources: Vec<ExpertSource> = centroids.into_iter().enumerate().map(source_of).collect();
    let layers = match options.rest {
        Rest::First => sparse.take_over(dense[0], &sources)?,
        Rest::Average => sparse.take_over(&average(dense)?, &sources)?,
    };
    if layers.is_empty() {
        return Err(UpcycleError::NotSparse);
    }
    let mut reports = vec![UpcycledModel::default(); models];
    for (index, (dense, probe)) in dense.iter().zip(&options.probes).enumerate() {
        let report = compare_with_model(&sparse, *dense, probe, OnlyModel { index, models });
        reports[index] = report.map_err(|error| error.of_model(index))?;
    }
    let report = UpcycleReport::new(dense[0], &sparse, layers, None);
    Ok(Upcycled { model: sparse, report: UpcycleReport { models: reports, ..report } })
}

/// One model's columns for the routers of an encoder's sparse blocks.
fn centroids_of_blocks(sparse: &Encoder, inputs: &FeedForwardInputs, models: usize) -> Result<BlockCentroids, UpcycleError> {
    let of_block = |(index, tokens): (usize, &Tensor<3>)| {
        let FeedForward::Moe(moe) = &sparse.blocks[index].feed_forward else { return Ok(None) };
        let [num_experts, _, _] = moe.experts.dims();
        let count = experts_per_model(num_experts, models)?;
        let columns = centroids_of_model(valid_rows(tokens, inputs.valid.as_ref()), count);
        columns.map(Some).map_err(|error| error.within(&format!("blocks.{index}.feed_forward")))
    };
    inputs.tokens.iter().enumerate().map(of_block).collect()
}

/// What the result makes of one model's probe.
fn compare_with_model<M: Encoders>(sparse: &M, dense: &M, probe: &Probe, only: OnlyModel) -> Result<UpcycledModel, UpcycleError> {
    let mut report = UpcycledModel {
        own_experts_deviation: Some(sparse.deviation(dense, probe, Some(only))?),
        max_deviation: Some(sparse.deviation(dense, probe, None)?),
        ..UpcycledModel::default()
    };
    let inputs = dense.inputs(probe)?;
    for ((sparse, dense), inputs) in sparse.encoders().into_iter().zip(dense.encoders()).zip(&inputs) {
        for (index, tokens) in inputs.tokens.iter().enumerate() {
            let FeedForward::Moe(moe) = &sparse.blocks[index].feed_forward else { continue };
            let dense = dense_network(dense, index).dense_weights()?;
            let layer = only.compare_layer(&frozen(moe), &dense, &(tokens.clone(), inputs.valid.clone()))?;
            report.layer_deviations.extend(layer.layer_deviations);
            report.first_choices.extend(layer.first_choices);
        }
    }
    Ok(report)
}

impl OnlyModel {
    /// A router for the blocks of `sparse`.
    pub(in crate::upcycle) fn router(self, sparse: &Encoder) -> impl FnMut(BlockTokens) -> Routing {
        move |input: BlockTokens| {
            let FeedForward::Moe(moe) = &sparse.blocks[input.block].feed_forward else { unreachable!("only such blocks route") };
            let ([num_experts, _, _], [batch, len, _]) = (moe.experts.dims(), input.tokens.dims());
            let device = input.tokens.device();
            let plan = self.plan(num_experts, batch * len, &device);
            // Read by losses and statistics only, which are not asked for here.
            let unused = Tensor::zeros([batch * len, num_experts], &device);
            Routing::new(RouterOutput::new(unused.clone(), unused), plan)
        }
    }
}
