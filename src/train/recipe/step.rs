//! The losses and gradients of one step, for the batch at once or by pieces, alone or with other ranks.

use std::ops::Range;

use burn::module::Module;
use burn::optim::GradientsParams;
use burn::tensor::{DType, Device, Tensor};

use super::gradients::{accumulate, sum_over_ranks};
use crate::{
    clip::{Clip, ClipAuxiliaryLoss, contrastive_loss, contrastive_loss_of_rows, normalize},
    routing::{BatchTotals, Routing},
    support::finite::{NonFiniteError, check_finite, check_finite_module},
    train::{
        data::Batch,
        ranks::{RankError, Ranks},
    },
    transformer::FeedForward,
};

/// Logits that are there at once, where the batch is computed by micro-batches.
const LOGITS: usize = 1 << 22;

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
    /// Of what a router draws.
    pub(super) seed: u64,
}

/// Computes this rank's part of a batch, which came in pieces.
///
/// # Errors
/// When a loss is not finite; names the first bad tensor in the order in which they were computed.
pub(super) fn gradients(model: &Clip, pieces: &[Batch], setting: StepSetting) -> Result<StepGradients, StepError> {
    match pieces {
        [batch] if !setting.ranks.has_others() => at_once(model, batch, setting),
        pieces => by_pieces(model, pieces, setting),
    }
}

fn at_once(model: &Clip, batch: &Batch, setting: StepSetting) -> Result<StepGradients, StepError> {
    let StepSetting { auxiliary, device, seed, .. } = setting;
    if is_noisy(model) {
        device.seed(seed);
    }
    let output = model.forward(images_for(model, batch, device), batch.tokens(device));
    let contrastive = contrastive_loss(output.logits_per_image.clone());
    let auxiliary = auxiliary.forward(&output.image_routings, &output.text_routings).map(|losses| losses.total);
    let total = match &auxiliary {
        Some(auxiliary) => contrastive.clone() + auxiliary.clone(),
        None => contrastive.clone(),
    };
    let mut routed = Routed::default();
    routed.add(&output.image_routings, &output.text_routings);
    let losses = [scalar(&contrastive), auxiliary.as_ref().map_or(0.0, scalar)];
    check_losses(model, losses, &output.image_embeds, &output.text_embeds)?;
    Ok(routed.with(losses, batch.len(), GradientsParams::from_grads(total.backward(), model)))
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
    fn new(model: &Clip, piece: &Batch, device: &Device) -> Self {
        let (image, text) = (model.encode_image(images_for(model, piece, device)), model.encode_text(piece.tokens(device)));
        Self {
            image: normalize(image.embedding),
            text: normalize(text.embedding),
            image_routings: image.routings,
            text_routings: text.routings,
        }
    }
}

/// Images in the model's own number type.
fn images_for(model: &Clip, batch: &Batch, device: &Device) -> Tensor<4> {
    batch.images(device).cast(model.vision.patch_embedding.weight.dtype())
}

/// The gradients of the whole batch, in memory that does not grow with it (GradCache, [arXiv 2101.06983](https://arxiv.org/abs/2101.06983)): the
/// embeddings of all pieces of all ranks, then the contrastive loss on them alone, then each piece again from the gradients of its embeddings. No
/// sum over ranks is within the graph.
fn by_pieces(model: &Clip, pieces: &[Batch], setting: StepSetting) -> Result<StepGradients, StepError> {
    let StepSetting { auxiliary, ranks, device, seed } = setting;
    let pieces: Vec<&Batch> = pieces.iter().filter(|piece| !piece.is_empty()).collect();
    let own: usize = pieces.iter().map(|piece| piece.len()).sum();
    let counts = ranks.gather_counts(own)?;
    let before: usize = counts[..ranks.part().rank].iter().sum();
    let all: usize = counts.iter().sum();
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
        Embedded::new(model, pieces[index], device)
    };
    // A single piece is kept. Of others, the first pass is without gradients, but as in training.
    let mut kept = (pieces.len() == 1).then(|| embed(model, 0));
    let untracked = model.clone().no_grad();
    let mut routed = Routed::default();
    let (mut images, mut texts) = (Vec::new(), Vec::new());
    for index in 0..pieces.len() {
        let passed;
        let embedded = match &kept {
            Some(kept) => kept,
            None => {
                passed = embed(&untracked, index);
                &passed
            }
        };
        routed.add(&embedded.image_routings, &embedded.text_routings);
        images.push(embedded.image.clone().detach());
        texts.push(embedded.text.clone().detach());
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
        let Embedded { image, text, image_routings, text_routings } = kept.take().unwrap_or_else(|| embed(model, index));
        let first = before + firsts[index];
        let rows = first..first + piece.len();
        let towards = |embeddings: Tensor<2>, gradients: &Tensor<2>| {
            let gradients = Tensor::from_inner(gradients.clone().slice([rows.clone()]).cast(embeddings.dtype()));
            (embeddings * gradients).sum()
        };
        let mut total = towards(image, &cached.image_gradients) + towards(text, &cached.text_gradients);
        let totals = [&routed.totals[0], &routed.totals[1]];
        if let Some(part) = auxiliary.forward_micro_batch(&image_routings, &text_routings, totals) {
            auxiliary_value += scalar(&part);
            total = total + part;
        }
        accumulate(model, &mut cached.gradients, GradientsParams::from_grads(total.backward(), model));
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

/// The contrastive loss of embeddings, and its gradients.
struct Cached {
    /// Normalised, `[B, P]`, of all ranks.
    images: Tensor<2>,
    texts: Tensor<2>,
    /// The part of the own rows.
    contrastive: f64,
    /// By the loss of the own rows, on the device without autodiff.
    image_gradients: Tensor<2>,
    text_gradients: Tensor<2>,
    /// Of the logit scale so far.
    gradients: GradientsParams,
}

impl Cached {
    /// Compares the pairs `own` with all.
    fn new(model: &Clip, images: Tensor<2>, texts: Tensor<2>, own: Range<usize>) -> Self {
        let [batch, _] = images.dims();
        let rows = (LOGITS / batch).clamp(1, batch);
        let mut gradients = GradientsParams::new();
        let mut contrastive = 0.0;
        let [mut image_gradients, mut text_gradients] = [&images, &texts].map(|embeddings| embeddings.zeros_like());
        for first in own.clone().step_by(rows) {
            let rows = first..(first + rows).min(own.end);
            let leaves = [&images, &texts].map(|embeddings| Tensor::from_inner(embeddings.clone()).require_grad());
            let scale = model.scale().cast(DType::F32);
            let logits = |from: &Tensor<2>, to: &Tensor<2>| {
                from.clone().slice([rows.clone()]).matmul(to.clone().transpose()) * scale.clone().unsqueeze()
            };
            let [image, text] = &leaves;
            let part = contrastive_loss_of_rows(logits(image, text), logits(text, image), first);
            contrastive += scalar(&part);
            let mut found = part.backward();
            let [image, text] = leaves.map(|leaf| leaf.grad_remove(&mut found).expect("the loss depends on every embedding"));
            image_gradients = image_gradients + image;
            text_gradients = text_gradients + text;
            accumulate(model, &mut gradients, GradientsParams::from_grads(found, model));
        }
        Self { images, texts, contrastive, image_gradients, text_gradients, gradients }
    }
}

/// What was routed so far.
#[derive(Default)]
struct Routed {
    totals: [BatchTotals; 2],
    kept: [Vec<usize>; 2],
}

impl Routed {
    fn add(&mut self, image_routings: &[Routing], text_routings: &[Routing]) {
        for ((totals, kept), routings) in self.totals.iter_mut().zip(&mut self.kept).zip([image_routings, text_routings]) {
            totals.add(routings);
            kept.resize(routings.len(), 0);
            kept.iter_mut().zip(routings).for_each(|(kept, routing)| *kept += routing.plan.num_rows());
        }
    }

    /// What all ranks routed.
    fn sum_over(&mut self, ranks: &dyn Ranks, model: &Clip) -> Result<(), RankError> {
        if !ranks.has_others() {
            return Ok(());
        }
        let encoders = [&model.vision.encoder, &model.text.encoder];
        for ((totals, kept), encoder) in self.totals.iter_mut().zip(&mut self.kept).zip(encoders) {
            // A rank without a pair has counted nothing.
            if totals.requested.is_empty() {
                totals.requested = encoder.experts_of_routed_blocks().map(|experts| vec![0; experts]).collect();
                totals.tokens = vec![0; totals.requested.len()];
                *kept = totals.tokens.clone();
            }
            for requested in &mut totals.requested {
                ranks.sum_counts(requested)?;
            }
            ranks.sum_counts(&mut totals.tokens)?;
            ranks.sum_counts(kept)?;
        }
        Ok(())
    }

    fn with(self, [contrastive, auxiliary]: [f64; 2], pairs: usize, gradients: GradientsParams) -> StepGradients {
        StepGradients { contrastive, auxiliary, pairs, gradients, totals: self.totals, kept: self.kept }
    }
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
mod tests {
    use super::*;
    use burn::module::{ModuleVisitor, Param};

    use crate::{
        AuxiliaryLossConfig, Capacity, RouterOptions, TokenChoiceConfig,
        clip::{ClipAuxiliaryLossConfig, ClipConfig, SparseClipConfig, tokenizer::TokenizedTexts},
        train::{
            data::Pixels,
            ranks::{Solo, Threads},
        },
        transformer::{BlockSelection, RoutedLayerConfig, SparseEncoderConfig},
    };

    fn device() -> Device {
        Device::flex().autodiff()
    }

    /// A small sparse CLIP whose experts differ.
    fn model(router: RouterOptions) -> Clip {
        let tokens = TokenChoiceConfig::new().with_training_capacity(Capacity::Dropless);
        let layer = RoutedLayerConfig::new().with_router(router).with_assignment(tokens.into());
        let encoder = SparseEncoderConfig::new().with_blocks(BlockSelection::EveryNth(1)).with_layer(layer.into());
        let sparse = SparseClipConfig::new().with_vision(Some(encoder.clone())).with_text(Some(encoder));
        device().seed(3);
        ClipConfig::tiny().sparse(sparse).init(&device())
    }

    fn batch(pairs: usize) -> Batch {
        let side = ClipConfig::tiny().vision.image_size;
        let pixels =
            (0..pairs * 3 * side * side).map(|i| ((i * 7919 % 1000) as f32 / 500.0 - 1.0) * (1.0 + (i % 5) as f32)).collect();
        let text = |pair: usize| {
            let words = 1 + pair % 5;
            let mut ids = vec![0; 8];
            ids[0] = 49406;
            (0..words).for_each(|word| ids[1 + word] = (300 + 97 * pair + 31 * word) as i32);
            ids[1 + words] = 49407;
            ids
        };
        let texts = TokenizedTexts { ids: (0..pairs).flat_map(text).collect(), len: 8, truncated: 0 };
        Batch { pixels: Pixels::Normalized(pixels), image_size: side, texts, concepts: (0..pairs).collect() }
    }

    fn pieces(batch: &Batch, size: usize) -> Vec<Batch> {
        (0..batch.len()).step_by(size).map(|first| batch.slice(first..(first + size).min(batch.len()))).collect()
    }

    /// Alone, from pieces of so many pairs.
    fn found(
        model: &Clip,
        batch: &Batch,
        auxiliary: &ClipAuxiliaryLoss,
        size: usize,
        seed: u64,
    ) -> Result<StepGradients, StepError> {
        let device = device();
        let setting = StepSetting { auxiliary, ranks: &Solo, device: &device, seed };
        if size == batch.len() {
            gradients(model, std::slice::from_ref(batch), setting)
        } else {
            gradients(model, &pieces(batch, size), setting)
        }
    }

    /// All gradients in the order of the parameters.
    fn values(model: &Clip, found: &StepGradients) -> Vec<(usize, Vec<f32>)> {
        struct Values<'a>(&'a GradientsParams, Vec<(usize, Vec<f32>)>);
        impl ModuleVisitor for Values<'_> {
            fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
                let gradient = self.0.get::<D>(param.id).map(|gradient| gradient.try_into_vec_as().unwrap());
                self.1.push((self.1.len(), gradient.unwrap_or_default()));
            }
        }
        let mut values = Values(&found.gradients, Vec::new());
        model.visit(&mut values);
        values.1
    }

    /// How far two gradients are apart, over the length of the first.
    fn difference(a: &[(usize, Vec<f32>)], b: &[(usize, Vec<f32>)]) -> f64 {
        let [mut apart, mut length] = [0.0, 0.0];
        for ((index, a), (_, b)) in a.iter().zip(b) {
            assert_eq!(a.len(), b.len(), "gradient {index}");
            for (&a, &b) in a.iter().zip(b) {
                apart += f64::from(a - b).powi(2);
                length += f64::from(a).powi(2);
            }
        }
        (apart / length).sqrt()
    }

    fn losses() -> ClipAuxiliaryLossConfig {
        let weights = AuxiliaryLossConfig::new().with_load_balancing(0.5).with_router_z(0.1).with_local_entropy(0.2);
        ClipAuxiliaryLossConfig { image: weights, text: AuxiliaryLossConfig::new() }
    }

    #[test]
    fn micro_batches_have_the_gradients_of_the_batch() {
        let (model, batch, losses) = (model(RouterOptions::new()), batch(16), losses().init());
        let whole = found(&model, &batch, &losses, batch.len(), 0).unwrap();
        let expected = values(&model, &whole);
        assert!(expected.iter().filter(|(_, gradient)| !gradient.is_empty()).count() > 20);
        // 5 leaves a last one of a single pair.
        for size in [8, 5, 4, 1] {
            let found = found(&model, &batch, &losses, size, 0).unwrap();
            let worst = difference(&expected, &values(&model, &found));
            assert!(worst < 1e-5, "{size} at a time: {worst}");
            assert!((found.contrastive / whole.contrastive - 1.0).abs() < 1e-6, "{size} at a time");
            assert!((found.auxiliary / whole.auxiliary - 1.0).abs() < 1e-6, "{size} at a time");
            assert_eq!(found.totals, whole.totals);
        }
    }

    #[test]
    fn ranks_have_the_gradients_of_the_batch() {
        let (model, batch, losses) = (model(RouterOptions::new()), batch(13), losses().init());
        let whole = found(&model, &batch, &losses, 13, 0).unwrap();
        let expected = values(&model, &whole);
        // 13 pairs: ranks have parts of other sizes; of 4, in pieces of 2 as well.
        for (ranks, size) in [(2, 13), (4, 13), (4, 2)] {
            let step = |ranks: Threads| {
                let own = batch.slice(ranks.part().of(batch.len()));
                let device = device();
                let setting = StepSetting { auxiliary: &losses, ranks: &ranks, device: &device, seed: 0 };
                let found = gradients(&model, &pieces(&own, size), setting).unwrap();
                (values(&model, &found), found.contrastive, found.auxiliary, found.totals, found.pairs)
            };
            let results: Vec<_> = std::thread::scope(|scope| {
                let threads: Vec<_> = Threads::new(ranks).into_iter().map(|rank| scope.spawn(|| step(rank))).collect();
                threads.into_iter().map(|thread| thread.join().unwrap()).collect()
            });
            for (found, contrastive, auxiliary, totals, pairs) in &results {
                let worst = difference(&expected, found);
                assert!(worst < 1e-5, "{ranks} ranks: {worst}");
                assert!((contrastive / whole.contrastive - 1.0).abs() < 1e-6);
                assert!((auxiliary / whole.auxiliary - 1.0).abs() < 1e-6);
                assert_eq!((totals, *pairs), (&whole.totals, 13));
                assert_eq!(found, &results[0].0, "the same bits on every rank");
            }
        }
        // A rank without a pair takes part.
        let few = batch.slice(0..2);
        let whole = found(&model, &few, &losses, 2, 0).unwrap();
        let step = |ranks: Threads| {
            let own = few.slice(ranks.part().of(2));
            let device = device();
            let setting = StepSetting { auxiliary: &losses, ranks: &ranks, device: &device, seed: 0 };
            values(&model, &gradients(&model, &[own], setting).unwrap())
        };
        std::thread::scope(|scope| {
            let threads: Vec<_> = Threads::new(3).into_iter().map(|rank| scope.spawn(|| step(rank))).collect();
            for thread in threads {
                assert!(difference(&values(&model, &whole), &thread.join().unwrap()) < 1e-5);
            }
        });
    }

    #[test]
    fn both_passes_draw_the_same_noise() {
        let (model, batch, losses) = (model(RouterOptions::new().with_noise(1.0)), batch(8), losses().init());
        // Tests that run at the same time draw from the same generator: some attempts are undisturbed.
        let attempt = |_| {
            let whole = found(&model, &batch, &losses, 8, 40).unwrap();
            let device = device();
            let setting = StepSetting { auxiliary: &losses, ranks: &Solo, device: &device, seed: 40 };
            // One piece and an empty one: both passes.
            let parts = by_pieces(&model, &[batch.clone(), batch.slice(0..0)], setting).unwrap();
            difference(&values(&model, &whole), &values(&model, &parts))
        };
        assert!((0..100).map(attempt).any(|difference| difference < 1e-5));
        let [found, other] = [40, 41].map(|seed| self::found(&model, &batch, &losses, 4, seed).unwrap());
        assert!(difference(&values(&model, &found), &values(&model, &other)) > 1e-3);
    }

    #[test]
    fn losses_that_need_the_whole_batch_are_refused_by_name() {
        let weights = AuxiliaryLossConfig::new().with_importance(0.1);
        let error = ClipAuxiliaryLossConfig::both(weights).validate_micro_batches().unwrap_err().to_string();
        let end = "this loss needs the whole batch at once: set its weight to 0, or train without micro-batches";
        assert_eq!(error, format!("`importance` is 0.1: {end}"));
    }

    #[test]
    fn logits_are_made_by_rows() {
        // So many pairs that their logits do not fit at once.
        let pairs = 2100;
        assert!(pairs * pairs > LOGITS);
        let model = model(RouterOptions::new());
        let embeddings = |factor: usize| {
            let values: Vec<f32> = (0..pairs * 4).map(|i| (i * factor % 1013) as f32 / 500.0 - 1.0).collect();
            normalize(Tensor::from_data(burn::tensor::TensorData::new(values, [pairs, 4]), &device()))
        };
        let (images, texts) = (embeddings(7919), embeddings(104_729));
        let inner = |embeddings: &Tensor<2>| embeddings.clone().detach().without_autodiff();
        let cached = Cached::new(&model, inner(&images), inner(&texts), 0..pairs);
        let [images, texts] = [images, texts].map(|embeddings| embeddings.detach().require_grad());
        let loss = contrastive_loss(images.clone().matmul(texts.clone().transpose()) * model.scale().unsqueeze());
        assert!((cached.contrastive - scalar(&loss)).abs() < 1e-5);
        let found = loss.backward();
        for (leaf, gradient) in [(images, cached.image_gradients), (texts, cached.text_gradients)] {
            let expected = leaf.grad(&found).unwrap();
            let largest = expected.clone().abs().max().into_scalar::<f32>();
            assert!((expected - gradient).abs().max().into_scalar::<f32>() < 1e-5 * largest);
        }
    }
}
