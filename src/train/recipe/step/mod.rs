//! The losses and gradients of one step, for the batch at once or by pieces, alone or with other ranks.

mod blocks;
mod cached;
mod routed;

use burn::module::Module;
use burn::optim::GradientsParams;
use burn::tensor::{DType, Device, Gradients, Int, Tensor, TensorData};
use rand::{SeedableRng, rngs::StdRng, seq::SliceRandom};

use blocks::Recomputable;
use cached::Cached;
use routed::Routed;

use super::gradients::{accumulate, sum_over_ranks};
use crate::{
    clip::{Clip, ClipAuxiliaryLoss, contrastive_loss, normalize},
    routing::{BatchTotals, Routing},
    support::finite::{NonFiniteError, check_finite, check_finite_module},
    train::{
        data::Batch,
        ranks::{RankError, Ranks},
        stream::Part,
    },
    transformer::FeedForward,
};

/// The losses of one batch, their gradients, and what was routed.
#[derive(Debug)]
pub(super) struct StepGradients {
    pub(super) contrastive: f64,
    /// Weighted; 0 for a dense model.
    pub(super) auxiliary: f64,
    /// Pairs of all ranks.
    pub(super) pairs: usize,
    pub(super) gradients: GradientsParams,
    /// Of image and text routings.
    pub(super) totals: [BatchTotals; 2],
    /// Choices of each layer that were not dropped.
    pub(super) kept: [Vec<usize>; 2],
}

/// Why a step could not be computed.
#[derive(Debug)]
pub(super) enum StepError {
    NonFinite(NonFiniteError),
    Ranks(RankError),
}

impl From<NonFiniteError> for StepError {
    fn from(error: NonFiniteError) -> Self {
        Self::NonFinite(error)
    }
}

impl From<RankError> for StepError {
    fn from(error: RankError) -> Self {
        Self::Ranks(error)
    }
}

/// What a step is computed with.
#[derive(Clone, Copy)]
pub(super) struct StepSetting<'a> {
    pub(super) auxiliary: &'a ClipAuxiliaryLoss,
    pub(super) ranks: &'a dyn Ranks,
    pub(super) device: &'a Device,
    /// Of what a router draws, and of the patches that are seen.
    pub(super) seed: u64,
    /// Share of the patches that are not seen.
    pub(super) patch_dropout: f64,
    /// Whether blocks are computed again in the backward pass, instead of keeping what they computed.
    pub(super) recompute_blocks: bool,
}

/// Computes this rank's part of a batch, which came in pieces.
///
/// # Errors
/// When a loss is not finite; names the first bad tensor in the order in which they were computed.
pub(super) fn gradients(model: &Clip, pieces: &[Batch], setting: StepSetting) -> Result<StepGradients, StepError> {
    match pieces {
        [batch] if !setting.ranks.has_others() && !setting.recompute_blocks => at_once(model, batch, setting),
        pieces => by_pieces(model, pieces, setting),
    }
}

fn at_once(model: &Clip, batch: &Batch, setting: StepSetting) -> Result<StepGradients, StepError> {
    let StepSetting { auxiliary, device, seed, .. } = setting;
    if is_noisy(model) {
        device.seed(seed);
    }
    let Embedded { image, text, image_routings, text_routings } = Embedded::new(model, batch, 0, setting);
    let contrastive = contrastive_loss(image.clone().matmul(text.clone().transpose()) * model.scale().unsqueeze());
    let auxiliary = auxiliary.forward(&image_routings, &text_routings).map(|losses| losses.total.cast(DType::F32));
    let total = match &auxiliary {
        Some(auxiliary) => contrastive.clone() + auxiliary.clone(),
        None => contrastive.clone(),
    };
    let mut routed = Routed::default();
    routed.add(&image_routings, &text_routings);
    let losses = [scalar(&contrastive), auxiliary.as_ref().map_or(0.0, scalar)];
    check_losses(model, losses, &image, &text)?;
    // As 32-bit floats.
    let mut gradients = GradientsParams::new();
    accumulate(model, &mut gradients, GradientsParams::from_grads(total.backward(), model));
    Ok(routed.with(losses, batch.len(), gradients))
}

/// A piece that has passed the model.
struct Embedded {
    /// Normalised, `[B, P]`.
    image: Tensor<2>,
    text: Tensor<2>,
    image_routings: Vec<Routing>,
    text_routings: Vec<Routing>,
}

impl Embedded {
    /// A piece whose first pair is the batch's `first`.
    fn new(model: &Clip, piece: &Batch, first: usize, setting: StepSetting) -> Self {
        let images = piece.images(setting.device).cast(model.vision.patch_embedding.weight.dtype());
        let image = match seen_patches(model, piece.len(), first, setting) {
            None => model.encode_image(images),
            Some(patches) => model.vision.forward_patches(images, patches),
        };
        let text = model.encode_text(piece.tokens(setting.device));
        Self {
            image: embedded(image.embedding),
            text: embedded(text.embedding),
            image_routings: image.routings,
            text_routings: text.routings,
        }
    }
}

/// The patches of each pair that are seen, `[B, M]`; `None`: all. They depend on the seed and the place of the pair in the batch alone, so that
/// both passes, all arms and any number of ranks see the same.
fn seen_patches(model: &Clip, pairs: usize, first: usize, setting: StepSetting) -> Option<Tensor<2, Int>> {
    if setting.patch_dropout == 0.0 {
        return None;
    }
    let patches = model.vision.num_patches();
    let seen = ((patches as f64 * (1.0 - setting.patch_dropout)) as usize).max(1);
    let of_pair = |pair: usize| {
        let mut bytes = [0; 32];
        bytes[..8].copy_from_slice(&setting.seed.to_le_bytes());
        bytes[8..16].copy_from_slice(&((first + pair) as u64).to_le_bytes());
        let mut order: Vec<i32> = (0..patches as i32).collect();
        order.partial_shuffle(&mut StdRng::from_seed(bytes), seen).0.to_vec()
    };
    let places: Vec<i32> = (0..pairs).flat_map(of_pair).collect();
    Some(Tensor::from_data(TensorData::new(places, [pairs, seen]), setting.device))
}

impl Embedded {
    /// From the gradients of the embeddings and the auxiliary losses; returns these.
    fn backward(
        self,
        [image, text]: [Tensor<2>; 2],
        auxiliary: &ClipAuxiliaryLoss,
        totals: [&BatchTotals; 2],
        add: &mut dyn FnMut(Gradients),
    ) -> f64 {
        let mut total = towards(self.image, image) + towards(self.text, text);
        let mut value = 0.0;
        if let Some(part) = auxiliary.forward_micro_batch(&self.image_routings, &self.text_routings, totals) {
            value = scalar(&part);
            total = total + part.cast(DType::F32);
        }
        add(total.backward());
        value
    }
}

/// What the loss compares: embeddings of length 1, in 32 bits.
fn embedded(embedding: Tensor<2>) -> Tensor<2> {
    normalize(embedding.cast(DType::F32))
}

/// A value whose gradient by `tensor` is `gradient`.
fn towards<const D: usize>(tensor: Tensor<D>, gradient: Tensor<D>) -> Tensor<1> {
    // A constant: outside of any graph, it takes the checkpointing strategy of the other factor.
    (tensor.clone() * gradient.cast(tensor.dtype())).sum().cast(DType::F32)
}

/// A piece after its first pass.
#[allow(clippy::large_enum_variant)] // one at a time
enum Passed<'a> {
    Graph(Embedded),
    Recomputable(Recomputable<'a>),
}

impl Passed<'_> {
    /// Embeddings and routings of images and texts.
    fn parts(&self) -> ([&Tensor<2>; 2], &[Routing], &[Routing]) {
        match self {
            Self::Graph(Embedded { image, text, image_routings, text_routings }) => ([image, text], image_routings, text_routings),
            Self::Recomputable(passed) => (passed.embeddings(), passed.image_routings(), passed.text_routings()),
        }
    }
}

/// The gradients of the whole batch, in memory that does not grow with it (GradCache, [arXiv 2101.06983](https://arxiv.org/abs/2101.06983)): the
/// embeddings of all pieces of all ranks, then the contrastive loss on them alone, then each piece again from the gradients of its embeddings. No
/// sum over ranks is within the graph.
fn by_pieces(model: &Clip, pieces: &[Batch], setting: StepSetting) -> Result<StepGradients, StepError> {
    let StepSetting { auxiliary, ranks, device, seed, .. } = setting;
    let pieces: Vec<&Batch> = pieces.iter().filter(|piece| !piece.is_empty()).collect();
    let own: usize = pieces.iter().map(|piece| piece.len()).sum();
    let counts = ranks.gather_counts(own)?;
    let before: usize = counts[..ranks.part().rank].iter().sum();
    let all: usize = counts.iter().sum();
    if all == 0 {
        let Part { rank, ranks } = ranks.part();
        let reason = "none of the samples of a batch can be used, on any rank".into();
        return Err(RankError { rank, ranks, reason }.into());
    }
    let firsts = pieces.iter().scan(0, |next, piece| {
        let first = *next;
        *next += piece.len();
        Some(first)
    });
    let firsts: Vec<usize> = firsts.collect();

    // Both passes must route alike, so they draw the same noise.
    let is_noisy = is_noisy(model);
    let embed = |model: &Clip, index: usize| {
        if is_noisy {
            device.seed(seed.wrapping_add((before + firsts[index]) as u64));
        }
        Embedded::new(model, pieces[index], before + firsts[index], setting)
    };
    let untracked = model.clone().no_grad();
    let recompute = |index: usize| Recomputable::new(&untracked, pieces[index], before + firsts[index], is_noisy, setting);
    // A single piece is kept. Of others, the first pass is without gradients, but as in training.
    let mut kept = None;
    let mut routed = Routed::default();
    let (mut images, mut texts) = (Vec::new(), Vec::new());
    for index in 0..pieces.len() {
        let passed = match (setting.recompute_blocks, pieces.len()) {
            (true, _) => Passed::Recomputable(recompute(index)),
            (false, 1) => Passed::Graph(embed(model, index)),
            (false, _) => Passed::Graph(embed(&untracked, index)),
        };
        let (embeddings, image_routings, text_routings) = passed.parts();
        routed.add(image_routings, text_routings);
        let [image, text] = embeddings.map(|embedding| embedding.clone().detach());
        images.push(image);
        texts.push(text);
        kept = (pieces.len() == 1).then_some(passed);
    }
    routed.sum_over(ranks, model)?;
    let [images, texts] = [images, texts].map(|own| gathered(own, model, before, all, ranks));
    let mut cached = Cached::new(model, images?, texts?, before..before + own);
    if ranks.has_others() {
        for gradient in [&mut cached.image_gradients, &mut cached.text_gradients] {
            let shape = gradient.dims();
            *gradient = ranks.sum_tensor(gradient.clone().reshape([-1]))?.reshape(shape);
        }
    }

    let mut auxiliary_value = 0.0;
    for (index, piece) in pieces.iter().enumerate() {
        let first = before + firsts[index];
        let rows = first..first + piece.len();
        let gradients = [&cached.image_gradients, &cached.text_gradients].map(|all| all.clone().slice([rows.clone()]));
        let totals = [&routed.totals[0], &routed.totals[1]];
        let passed = kept.take().unwrap_or_else(|| match setting.recompute_blocks {
            true => Passed::Recomputable(recompute(index)),
            false => Passed::Graph(embed(model, index)),
        });
        let mut add = |found: Gradients| accumulate(model, &mut cached.gradients, GradientsParams::from_grads(found, model));
        auxiliary_value += match passed {
            Passed::Graph(embedded) => embedded.backward(gradients, auxiliary, totals, &mut add),
            Passed::Recomputable(recomputable) => recomputable.backward(model, piece, gradients, totals, &mut add),
        };
    }
    let mut losses = [cached.contrastive as f32, auxiliary_value as f32];
    if ranks.has_others() {
        ranks.sum(&mut losses)?;
        sum_over_ranks(model, &mut cached.gradients, ranks)?;
    }
    let losses = losses.map(f64::from);
    check_losses(model, losses, &cached.images, &cached.texts)?;
    Ok(routed.with(losses, all, cached.gradients))
}

/// The embeddings of all ranks, `[B, P]`, from those of the pieces of this one. A sum of rows that are zeros elsewhere is exact.
fn gathered(own: Vec<Tensor<2>>, model: &Clip, before: usize, all: usize, ranks: &dyn Ranks) -> Result<Tensor<2>, RankError> {
    if !ranks.has_others() {
        return Ok(Tensor::cat(own, 0).cast(DType::F32).without_autodiff());
    }
    let [_, width] = model.text.projection.weight.dims();
    let options = (&model.text.projection.weight.device().inner(), DType::F32);
    let rows: usize = own.iter().map(|rows| rows.dims()[0]).sum();
    let zeros = |rows: usize| (rows > 0).then(|| Tensor::<2>::zeros([rows, width], options));
    let own = own.into_iter().map(|rows| rows.cast(DType::F32).without_autodiff());
    let parts: Vec<Tensor<2>> = zeros(before).into_iter().chain(own).chain(zeros(all - before - rows)).collect();
    Ok(ranks.sum_tensor(Tensor::cat(parts, 0).reshape([-1]))?.reshape([all, width]))
}

fn scalar(loss: &Tensor<1>) -> f64 {
    f64::from(loss.clone().detach().into_scalar::<f32>())
}

/// Whether a router of the model draws random numbers in training.
pub(super) fn is_noisy(model: &Clip) -> bool {
    let blocks = model.vision.encoder.blocks.iter().chain(&model.text.encoder.blocks);
    blocks.into_iter().any(|block| match &block.feed_forward {
        FeedForward::Moe(moe) => moe.router.noise > 0.0 || moe.router.jitter > 0.0,
        FeedForward::Dense(_) | FeedForward::SoftMoe(_) => false,
    })
}

fn check_losses(model: &Clip, losses: [f64; 2], images: &Tensor<2>, texts: &Tensor<2>) -> Result<(), NonFiniteError> {
    if losses.iter().all(|loss| loss.is_finite()) {
        return Ok(());
    }
    check_finite_module(model)?;
    check_finite("image embeddings", images)?;
    check_finite("text embeddings", texts)?;
    Err(NonFiniteError { tensor: "loss".into(), count: 1, total: 1 })
}

#[cfg(all(test, feature = "flex"))]
mod tests;
