//! The losses and gradients of one step, for the batch at once or by micro-batches.

use std::ops::Range;

use burn::module::Module;
use burn::optim::{GradientsAccumulator, GradientsParams};
use burn::tensor::{Device, Tensor};

use crate::{
    clip::{Clip, ClipAuxiliaryLoss, contrastive_loss, contrastive_loss_of_rows, normalize},
    routing::{BatchTotals, Routing},
    support::finite::{NonFiniteError, check_finite, check_finite_module},
    train::data::Batch,
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
    /// Share of choices that were dropped, the mean over routed layers.
    pub(super) dropped: f64,
    pub(super) gradients: GradientsParams,
    /// Of image and text routings.
    pub(super) totals: [BatchTotals; 2],
}

/// Computes a batch, in micro-batches of so many pairs where it is larger.
///
/// # Errors
/// When a loss is not finite; names the first bad tensor in the order in which they were computed.
pub(super) fn gradients(
    model: &Clip,
    batch: &Batch,
    auxiliary: &ClipAuxiliaryLoss,
    micro_batch: Option<usize>,
    seed: u64,
    device: &Device,
) -> Result<StepGradients, NonFiniteError> {
    match micro_batch {
        Some(size) if size < batch.len() => by_micro_batches(model, batch, auxiliary, size, seed, device),
        _ => at_once(model, batch, auxiliary, device),
    }
}

fn at_once(model: &Clip, batch: &Batch, auxiliary: &ClipAuxiliaryLoss, device: &Device) -> Result<StepGradients, NonFiniteError> {
    let output = model.forward(batch.images(device), batch.tokens(device));
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
    Ok(routed.with(losses, GradientsParams::from_grads(total.backward(), model)))
}

/// The gradients of the whole batch, in memory that does not grow with it (GradCache, [arXiv 2101.06983](https://arxiv.org/abs/2101.06983)): the
/// embeddings of all micro-batches, then the contrastive loss on them alone, then each micro-batch again from the gradients of its embeddings.
fn by_micro_batches(
    model: &Clip,
    batch: &Batch,
    auxiliary: &ClipAuxiliaryLoss,
    size: usize,
    seed: u64,
    device: &Device,
) -> Result<StepGradients, NonFiniteError> {
    let micro_batches: Vec<Range<usize>> =
        (0..batch.len()).step_by(size).map(|first| first..(first + size).min(batch.len())).collect();
    // Both passes must route alike, so they draw the same noise.
    let is_noisy = is_noisy(model);
    let embed = |model: &Clip, index: usize| {
        if is_noisy {
            device.seed(seed.wrapping_add(index as u64));
        }
        let part = batch.slice(micro_batches[index].clone());
        let (image, text) = (model.encode_image(part.images(device)), model.encode_text(part.tokens(device)));
        (normalize(image.embedding), normalize(text.embedding), image.routings, text.routings)
    };

    // Without gradients, but as in training.
    let untracked = model.clone().no_grad();
    let mut routed = Routed::default();
    let (mut images, mut texts) = (Vec::new(), Vec::new());
    for index in 0..micro_batches.len() {
        let (image, text, image_routings, text_routings) = embed(&untracked, index);
        routed.add(&image_routings, &text_routings);
        images.push(image);
        texts.push(text);
    }
    let mut cached = Cached::new(model, Tensor::cat(images, 0), Tensor::cat(texts, 0));

    let mut auxiliary_value = 0.0;
    for (index, range) in micro_batches.iter().enumerate() {
        let (image, text, image_routings, text_routings) = embed(model, index);
        let towards = |embeddings: Tensor<2>, gradients: &Tensor<2>| (embeddings * gradients.clone().slice([range.clone()])).sum();
        let mut total = towards(image, &cached.image_gradients) + towards(text, &cached.text_gradients);
        let totals = [&routed.totals[0], &routed.totals[1]];
        if let Some(part) = auxiliary.forward_micro_batch(&image_routings, &text_routings, totals) {
            auxiliary_value += scalar(&part);
            total = total + part;
        }
        cached.gradients.accumulate(model, GradientsParams::from_grads(total.backward(), model));
    }
    let losses = [cached.contrastive, auxiliary_value];
    check_losses(model, losses, &cached.images, &cached.texts)?;
    Ok(routed.with(losses, cached.gradients.grads()))
}

/// The contrastive loss of embeddings, and its gradients.
struct Cached {
    /// Normalised, `[B, P]`.
    images: Tensor<2>,
    texts: Tensor<2>,
    contrastive: f64,
    image_gradients: Tensor<2>,
    text_gradients: Tensor<2>,
    /// Of the logit scale so far.
    gradients: GradientsAccumulator<Clip>,
}

impl Cached {
    fn new(model: &Clip, images: Tensor<2>, texts: Tensor<2>) -> Self {
        let [batch, _] = images.dims();
        let rows = (LOGITS / batch).clamp(1, batch);
        let (images, texts) = (images.detach(), texts.detach());
        let mut gradients = GradientsAccumulator::new();
        let mut contrastive = 0.0;
        let mut sums: Option<[Tensor<2>; 2]> = None;
        for first in (0..batch).step_by(rows) {
            let own = first..(first + rows).min(batch);
            let leaves = [&images, &texts].map(|embeddings| embeddings.clone().detach().require_grad());
            let logits = |from: &Tensor<2>, to: &Tensor<2>| {
                from.clone().slice([own.clone()]).matmul(to.clone().transpose()) * model.scale().unsqueeze()
            };
            let [image, text] = &leaves;
            let part = contrastive_loss_of_rows(logits(image, text), logits(text, image), first);
            contrastive += scalar(&part);
            let mut found = part.backward();
            let of_rows = leaves.map(|leaf| leaf.grad_remove(&mut found).expect("the loss depends on every embedding"));
            sums = Some(match sums {
                None => of_rows,
                Some([image, text]) => {
                    let [more_image, more_text] = of_rows;
                    [image + more_image, text + more_text]
                }
            });
            gradients.accumulate(model, GradientsParams::from_grads(found, model));
        }
        let [image_gradients, text_gradients] = sums.expect("a batch has a pair");
        Self { images, texts, contrastive, image_gradients, text_gradients, gradients }
    }
}

/// What was routed so far.
#[derive(Default)]
struct Routed {
    totals: [BatchTotals; 2],
    dropped: f64,
    layers: usize,
}

impl Routed {
    fn add(&mut self, image_routings: &[Routing], text_routings: &[Routing]) {
        let [image, text] = &mut self.totals;
        image.add(image_routings);
        text.add(text_routings);
        for routing in image_routings.iter().chain(text_routings) {
            self.dropped += routing.plan.dropped();
            self.layers += 1;
        }
    }

    fn with(self, [contrastive, auxiliary]: [f64; 2], gradients: GradientsParams) -> StepGradients {
        let dropped = self.dropped / self.layers.max(1) as f64;
        StepGradients { contrastive, auxiliary, dropped, gradients, totals: self.totals }
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
        train::data::Pixels,
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
        let whole = gradients(&model, &batch, &losses, None, 0, &device()).unwrap();
        let expected = values(&model, &whole);
        assert!(expected.iter().filter(|(_, gradient)| !gradient.is_empty()).count() > 20);
        // 5 leaves a last one of a single pair.
        for size in [8, 5, 4, 1] {
            let found = gradients(&model, &batch, &losses, Some(size), 0, &device()).unwrap();
            let worst = difference(&expected, &values(&model, &found));
            assert!(worst < 1e-5, "{size} at a time: {worst}");
            assert!((found.contrastive / whole.contrastive - 1.0).abs() < 1e-6, "{size} at a time");
            assert!((found.auxiliary / whole.auxiliary - 1.0).abs() < 1e-6, "{size} at a time");
            assert_eq!(found.totals, whole.totals);
        }
    }

    #[test]
    fn both_passes_draw_the_same_noise() {
        let (model, batch, losses) = (model(RouterOptions::new().with_noise(1.0)), batch(8), losses().init());
        // Tests that run at the same time draw from the same generator: some attempts are undisturbed.
        let attempt = |_| {
            device().seed(40);
            let whole = gradients(&model, &batch, &losses, None, 0, &device()).unwrap();
            let found = by_micro_batches(&model, &batch, &losses, 8, 40, &device()).unwrap();
            difference(&values(&model, &whole), &values(&model, &found))
        };
        assert!((0..100).map(attempt).any(|difference| difference < 1e-5));
        let [found, other] = [40, 41].map(|seed| by_micro_batches(&model, &batch, &losses, 8, seed, &device()).unwrap());
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
        let cached = Cached::new(&model, images.clone(), texts.clone());
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
