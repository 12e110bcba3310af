//! Blocks and encoders.

use burn::module::Module;
use burn::nn::{LayerNorm, attention::MultiHeadAttention};
use burn::tensor::{Bool, Tensor};

use super::{
    Probe, ProbeTokens, UpcycleError, UpcycleFromDense, UpcycleOptions, UpcycleReport, Upcycled, UpcycledLayer, only_valid,
    report::deviation, source::ExpertSource,
};
use crate::{
    support::param::{frozen, with_floats, with_leaves_on},
    transformer::{Encoder, FeedForward, FeedForwardInputs, TokenMarks, TransformerBlock},
};

impl UpcycleFromDense<TransformerBlock> for TransformerBlock {
    fn upcycle_from_dense(self, dense: &TransformerBlock, options: &UpcycleOptions) -> Result<Upcycled<Self>, UpcycleError> {
        let dense = &with_floats(dense);
        options.probe.as_ref().map(|probe| tokens_of(probe, Some(dense))).transpose()?;
        let calibration = options
            .calibration_batch()?
            .map(|batch| tokens_of(&batch.on(dense), Some(dense)))
            .transpose()?
            .map(|(tokens, valid)| FeedForwardInputs { tokens: vec![dense.feed_forward_input(tokens, &marks(&valid))], valid });
        let (model, layer) = block(self, dense, 0, &ExpertSource::Dense { strategy: options.strategy, calibration })?;
        let layers: Vec<UpcycledLayer> = layer.into_iter().collect();
        if layers.is_empty() {
            return Err(UpcycleError::NotSparse);
        }
        let compare = |probe: &Probe| {
            let run = |block: &Self| -> Result<_, UpcycleError> {
                let (tokens, valid) = tokens_of(&probe.on(block), Some(block))?;
                Ok(only_valid(frozen(block).forward(tokens, None, &marks(&valid)).0, &valid))
            };
            deviation("the outputs on the probe batch", run(dense)?, run(&model)?)
        };
        let max_deviation = options.probe.as_ref().map(compare).transpose()?;
        let report = UpcycleReport::new(dense, &model, layers, max_deviation);
        Ok(Upcycled { model, report })
    }
}

/// The batch of an encoder with such a block.
pub(super) fn tokens_of(probe: &Probe, block: Option<&TransformerBlock>) -> Result<ProbeTokens, UpcycleError> {
    let block = block.ok_or(UpcycleError::NotSparse)?;
    if block.rotary.is_some() {
        let (expected, found) = ("images in a tower: its blocks have rotary positions, and tokens alone have no places", "tokens");
        return Err(UpcycleError::Probe { expected, found });
    }
    probe.tokens(block.norm_attention.gamma.dims()[0])
}

pub(super) fn encoder(
    mut sparse: Encoder,
    dense: &Encoder,
    experts: &ExpertSource,
) -> Result<(Encoder, Vec<UpcycledLayer>), UpcycleError> {
    UpcycleError::shapes("blocks", &[dense.blocks.len()], &[sparse.blocks.len()])?;
    let mut layers = Vec::new();
    let blocks = std::mem::take(&mut sparse.blocks);
    for (index, (target, source)) in blocks.into_iter().zip(&dense.blocks).enumerate() {
        let name = format!("blocks.{index}");
        let (block, layer) = block(target, source, index, experts).map_err(|error| error.within(&name))?;
        layers.extend(layer.map(|layer| layer.within(&name)));
        sparse.blocks.push(block);
    }
    Ok((sparse, layers))
}

fn block(
    mut sparse: TransformerBlock,
    dense: &TransformerBlock,
    index: usize,
    experts: &ExpertSource,
) -> Result<(TransformerBlock, Option<UpcycledLayer>), UpcycleError> {
    attention(&mut sparse.attention, &dense.attention).map_err(|error| error.within("attention"))?;
    UpcycleError::settings("rotary", dense.rotary, sparse.rotary)?;
    norm(&mut sparse.norm_attention, &dense.norm_attention).map_err(|error| error.within("norm_attention"))?;
    norm(&mut sparse.norm_feed_forward, &dense.norm_feed_forward).map_err(|error| error.within("norm_feed_forward"))?;
    let FeedForward::Dense(mlp) = &dense.feed_forward else {
        return Err(UpcycleError::NotDense { at: String::new() }.within("feed_forward"));
    };
    let within = |error: UpcycleError| error.within("feed_forward");
    let layer;
    (sparse.feed_forward, layer) = match sparse.feed_forward {
        FeedForward::Dense(target) => {
            let widths = |mlp: &crate::transformer::Mlp| mlp.linear_in.weight.dims();
            UpcycleError::shapes("linear_in", &widths(mlp), &widths(&target)).map_err(within)?;
            UpcycleError::settings("form", mlp.form(), target.form()).map_err(within)?;
            UpcycleError::settings("activation", mlp.activation, target.activation).map_err(within)?;
            (FeedForward::Dense(same_place(mlp, &target)), None)
        }
        FeedForward::Moe(target) => {
            let (moe, layer) = experts.moe(index, target, mlp).map_err(within)?;
            (FeedForward::Moe(moe), Some(layer.within("feed_forward")))
        }
        FeedForward::SoftMoe(target) => {
            let (soft, layer) = experts.soft(target, mlp).map_err(within)?;
            (FeedForward::SoftMoe(soft), Some(layer.within("feed_forward")))
        }
    };
    Ok((sparse, layer))
}

pub(super) fn marks(valid: &Option<Tensor<2, Bool>>) -> TokenMarks {
    TokenMarks { valid: valid.clone(), ..TokenMarks::default() }
}

/// A norm that both have, or neither.
#[cfg(feature = "clip")]
pub(super) fn optional_norm(
    name: &'static str,
    target: &mut Option<LayerNorm>,
    source: &Option<LayerNorm>,
) -> Result<(), UpcycleError> {
    UpcycleError::settings(name, source.is_some(), target.is_some())?;
    match (target, source) {
        (Some(target), Some(source)) => norm(target, source).map_err(|error| error.within(name)),
        _ => Ok(()),
    }
}

fn norm(target: &mut LayerNorm, source: &LayerNorm) -> Result<(), UpcycleError> {
    UpcycleError::shapes("gamma", &source.gamma.dims(), &target.gamma.dims())?;
    *target = same_place(source, target);
    Ok(())
}

fn attention(target: &mut MultiHeadAttention, source: &MultiHeadAttention) -> Result<(), UpcycleError> {
    UpcycleError::shapes("query", &source.query.weight.dims(), &target.query.weight.dims())?;
    UpcycleError::settings("n_heads", source.n_heads, target.n_heads)?;
    *target = same_place(source, target);
    Ok(())
}

/// The source where the target is. Parameters keep the source's identity, so that records and optimiser states of the dense
/// model still find them, and are trained if the source's are.
pub(super) fn same_place<M: Module>(source: &M, target: &M) -> M {
    match target.devices().first() {
        Some(device) => with_leaves_on(source.clone(), device),
        None => source.clone(),
    }
}
