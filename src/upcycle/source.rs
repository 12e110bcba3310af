//! Where the experts of an encoder's sparse blocks come from.

use burn::tensor::Tensor;

use super::{
    DenseFeedForward, DenseWeights, UpcycleError, UpcycleStrategy, UpcycledLayer,
    layer::{check_copies, copy, copy_soft, layer_of},
    many::{copy_many, experts_per_model},
    valid_rows,
};
use crate::{
    layer::{moe::MoeFeedForward, soft_moe::SoftMoeFeedForward},
    transformer::{Encoder, FeedForward, FeedForwardInputs, Mlp},
};

/// A source of experts for the sparse blocks of one encoder.
#[allow(clippy::large_enum_variant)] // two at most
pub(super) enum ExpertSource<'a> {
    /// The dense network of the same block, and what it reads, if the strategy needs that.
    Dense { strategy: UpcycleStrategy, calibration: Option<FeedForwardInputs> },
    /// The dense networks of the same block in several encoders that were checked; for each of them and each block, the routers' columns of
    /// its experts, `[E / number of encoders, D]`, if they are not kept.
    Models { encoders: Vec<&'a Encoder>, centroids: Option<Vec<BlockCentroids>> },
    /// None: only tells whether the dense network can be one of so many that become the experts.
    CheckOnly { models: usize },
}

/// For each block of an encoder, the centroids of what its feed-forward network reads; `None` for a block that stays dense.
pub(super) type BlockCentroids = Vec<Option<Tensor<2>>>;

impl ExpertSource<'_> {
    /// The layer of block `index` with its experts; `dense` is the network in its place.
    pub(super) fn moe(
        &self,
        index: usize,
        moe: MoeFeedForward,
        dense: &Mlp,
    ) -> Result<(MoeFeedForward, UpcycledLayer), UpcycleError> {
        match self {
            Self::Dense { strategy, calibration } => {
                let tokens = calibration.as_ref().map(|inputs| valid_rows(&inputs.tokens[index], inputs.valid.as_ref()));
                copy(moe, &dense.dense_weights()?, *strategy, tokens)
            }
            Self::Models { encoders, centroids } => {
                let weights: Vec<DenseWeights> =
                    encoders.iter().map(|encoder| dense_network(encoder, index).dense_weights()).collect::<Result<_, _>>()?;
                let of_block = |model: &BlockCentroids| model[index].clone().expect("a sparse block has centroids");
                let centroids = centroids.as_ref().map(|models| models.iter().map(of_block).collect());
                copy_many(moe, &weights, centroids)
            }
            Self::CheckOnly { models } => {
                let [num_experts, _, _] = moe.experts.dims();
                experts_per_model(num_experts, *models)?;
                check_copies(&moe, &dense.dense_weights()?)?;
                let layer = layer_of(&moe.experts, moe.assignment.active_experts(num_experts));
                Ok((moe, layer))
            }
        }
    }

    /// The same of a soft layer.
    pub(super) fn soft(&self, soft: SoftMoeFeedForward, dense: &Mlp) -> Result<(SoftMoeFeedForward, UpcycledLayer), UpcycleError> {
        match self {
            Self::Dense { strategy, .. } => copy_soft(soft, &dense.dense_weights()?, *strategy),
            Self::Models { .. } | Self::CheckOnly { .. } => Err(UpcycleError::models(
                "a soft layer mixes all tokens for each expert, so that no token goes to one model's experts",
            )),
        }
    }
}

/// The network of a block that is known to be dense.
pub(super) fn dense_network(encoder: &Encoder, block: usize) -> &Mlp {
    match &encoder.blocks[block].feed_forward {
        FeedForward::Dense(mlp) => mlp,
        FeedForward::Moe(_) | FeedForward::SoftMoe(_) => unreachable!("models that are sparse already were refused"),
    }
}
