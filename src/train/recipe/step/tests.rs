//! Gradients by pieces, by ranks and from blocks that are computed again.

use super::{cached::LOGITS, *};
use burn::module::{ModuleVisitor, Param};

use crate::{
    AuxiliaryLossConfig, Capacity, LoraOptions, RouterOptions, TokenChoiceConfig,
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
    let pixels = (0..pairs * 3 * side * side).map(|i| ((i * 7919 % 1000) as f32 / 500.0 - 1.0) * (1.0 + (i % 5) as f32)).collect();
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
fn found(model: &Clip, batch: &Batch, auxiliary: &ClipAuxiliaryLoss, size: usize, seed: u64) -> Result<StepGradients, StepError> {
    let device = device();
    let setting = StepSetting { seed, ..alone(auxiliary, &device) };
    if size == batch.len() {
        gradients(model, std::slice::from_ref(batch), setting)
    } else {
        gradients(model, &pieces(batch, size), setting)
    }
}

/// A plain step of one rank.
fn alone<'a>(auxiliary: &'a ClipAuxiliaryLoss, device: &'a Device) -> StepSetting<'a> {
    StepSetting { auxiliary, ranks: &Solo, device, seed: 0, patch_dropout: 0.0, recompute_blocks: false }
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
            let setting = StepSetting { ranks: &ranks, ..alone(&losses, &device) };
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
        let setting = StepSetting { ranks: &ranks, ..alone(&losses, &device) };
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
fn a_batch_without_a_pair_on_any_rank_is_an_error() {
    let (model, batch, losses) = (model(RouterOptions::new()), batch(1), losses().init());
    let step = |ranks: Threads| {
        let device = device();
        let setting = StepSetting { ranks: &ranks, ..alone(&losses, &device) };
        match gradients(&model, &[batch.slice(0..0)], setting) {
            Err(StepError::Ranks(error)) => error.reason,
            other => panic!("{other:?}"),
        }
    };
    std::thread::scope(|scope| {
        let threads: Vec<_> = Threads::new(2).into_iter().map(|rank| scope.spawn(|| step(rank))).collect();
        for thread in threads {
            assert_eq!(thread.join().unwrap(), "none of the samples of a batch can be used, on any rank");
        }
    });
}

#[test]
fn blocks_that_are_computed_again_have_the_same_gradients() {
    let batch = batch(16);
    let losses = losses().init();
    let device = device();
    let setting = StepSetting { seed: 7, ..alone(&losses, &device) };
    let model = model(RouterOptions::new());
    for (patch_dropout, size) in [(0.0, 16), (0.0, 5), (0.5, 16), (0.5, 5)] {
        let setting = StepSetting { patch_dropout, ..setting };
        let expected = gradients(&model, &pieces(&batch, 16), setting).unwrap();
        let again = StepSetting { recompute_blocks: true, ..setting };
        let found = gradients(&model, &pieces(&batch, size), again).unwrap();
        let worst = difference(&values(&model, &expected), &values(&model, &found));
        assert!(worst < 1e-5, "{patch_dropout}, {size} at a time: {worst}");
        assert!((found.contrastive / expected.contrastive - 1.0).abs() < 1e-6);
        assert!((found.auxiliary / expected.auxiliary - 1.0).abs() < 1e-6);
        assert_eq!((&found.totals, &found.kept), (&expected.totals, &expected.kept));
    }
    // Adapters of frozen towers get theirs.
    let adapted = model.clone().with_lora(&LoraOptions::new().with_rank(2));
    let expected = gradients(&adapted, &pieces(&batch, 8), setting).unwrap();
    let found = gradients(&adapted, &pieces(&batch, 8), StepSetting { recompute_blocks: true, ..setting }).unwrap();
    let all = values(&adapted, &expected);
    assert!(all.iter().any(|(_, gradient)| gradient.is_empty()) && all.iter().any(|(_, gradient)| !gradient.is_empty()));
    assert!(difference(&values(&adapted, &expected), &values(&adapted, &found)) < 1e-5);
    // A tower that is frozen gets no gradient.
    let half = Clip { vision: model.vision.clone().freeze(), ..model.clone() };
    let expected = gradients(&half, &pieces(&batch, 8), setting).unwrap();
    let found = gradients(&half, &pieces(&batch, 8), StepSetting { recompute_blocks: true, ..setting }).unwrap();
    assert!(difference(&values(&half, &expected), &values(&half, &found)) < 1e-5);
    assert!((found.auxiliary / expected.auxiliary - 1.0).abs() < 1e-6);
}

/// Rotary positions of those patches that are seen, gated networks, attention pooling, and no class token.
#[test]
fn so_have_towers_of_other_parts() {
    use crate::{BalancingOptions, BalancingRule, FeedForwardForm, RouterScore, clip::Pooling, transformer::RotaryPositions};
    let mut config = ClipConfig::tiny();
    config.vision = config.vision.with_class_token(false).with_position_table(false).with_norm_post(false);
    config.vision.pooling = Pooling::Attention { n_heads: 2 };
    config.vision.encoder.rotary = Some(RotaryPositions::new());
    config.vision.encoder.form = FeedForwardForm::Gated;
    config.text.encoder.form = FeedForwardForm::Gated;
    config.text.norm_final = false;
    let router = RouterOptions::new()
        .with_score(RouterScore::Sigmoid)
        .with_balancing(Some(BalancingOptions::new(0.01).with_rule(BalancingRule::ZScore)));
    let tokens = TokenChoiceConfig::new().with_training_capacity(Capacity::Dropless);
    let layer = RoutedLayerConfig::new().with_router(router).with_assignment(tokens.into()).with_shared_expert(Some(16));
    let experts = SparseEncoderConfig::new().with_bias(false).with_d_ff(Some(16)).with_layer(layer.into());
    let device = device();
    let model = config.sparse(SparseClipConfig::new().with_vision(Some(experts))).init(&device);
    let weights = AuxiliaryLossConfig::new().with_load_balancing(0.5).with_router_z(0.0);
    let losses = ClipAuxiliaryLossConfig::both(weights).init();
    let batch = batch(8);
    for (patch_dropout, size) in [(0.0, 3), (0.5, 8), (0.5, 3)] {
        let setting = StepSetting { seed: 7, patch_dropout, ..alone(&losses, &device) };
        let expected = gradients(&model, &pieces(&batch, 8), setting).unwrap();
        let all = values(&model, &expected);
        // All parameters have one but the balancing biases.
        assert!(all.iter().filter(|(_, gradient)| gradient.is_empty()).count() == model.vision.encoder.routed_blocks().count());
        for setting in [setting, StepSetting { recompute_blocks: true, ..setting }] {
            let found = gradients(&model, &pieces(&batch, size), setting).unwrap();
            let worst = difference(&all, &values(&model, &found));
            assert!(worst < 1e-5, "{patch_dropout}, {size} at a time: {worst}");
            assert_eq!(found.totals, expected.totals);
        }
    }
}

#[test]
fn patches_that_are_seen_depend_on_the_seed_and_the_pair_alone() {
    let model = model(RouterOptions::new());
    let device = device();
    let losses = losses().init();
    let setting = StepSetting { seed: 7, patch_dropout: 0.75, ..alone(&losses, &device) };
    let seen = |pairs, first, seed| -> Vec<i32> {
        let patches = seen_patches(&model, pairs, first, StepSetting { seed, ..setting }).unwrap();
        patches.try_into_vec_as().unwrap()
    };
    let all = seen(6, 0, 7);
    let patches = model.vision.num_patches();
    let each = patches / 4;
    assert_eq!(all.len(), 6 * each);
    assert!(all.chunks(each).all(|own| own.iter().all(|patch| (0..patches as i32).contains(patch))));
    assert!(all.chunks(each).all(|patches| patches.iter().collect::<std::collections::HashSet<_>>().len() == each));
    assert_eq!(all[2 * each..], seen(4, 2, 7));
    assert_ne!(all, seen(6, 0, 8));
    // All patches in any order are the image.
    let images = batch(2).images(&device);
    let order: Vec<i32> = (0..patches as i32).rev().collect();
    let patches = Tensor::from_data(TensorData::new([order.clone(), order].concat(), [2, patches]), &device);
    let whole = model.encode_image(images.clone()).embedding;
    let apart = (model.vision.forward_patches(images, patches).embedding - whole).abs().max().into_scalar::<f32>();
    assert!(apart < 1e-5, "{apart}");
}

#[test]
fn both_passes_draw_the_same_noise() {
    let (model, batch, losses) = (model(RouterOptions::new().with_noise(1.0)), batch(8), losses().init());
    // Tests that run at the same time draw from the same generator: some attempts are undisturbed.
    let attempt = |_| {
        let whole = found(&model, &batch, &losses, 8, 40).unwrap();
        let device = device();
        let setting = StepSetting { seed: 40, ..alone(&losses, &device) };
        // One piece and an empty one: both passes.
        let parts = by_pieces(&model, &[batch.clone(), batch.slice(0..0)], setting).unwrap();
        difference(&values(&model, &whole), &values(&model, &parts))
    };
    assert!((0..100).map(attempt).any(|difference| difference < 1e-5));
    // Blocks that are computed again draw what they drew before.
    let attempt = |_| {
        let device = device();
        let setting = StepSetting { seed: 40, recompute_blocks: true, ..alone(&losses, &device) };
        let found = gradients(&model, &pieces(&batch, 4), setting).unwrap();
        let again = gradients(&model, &pieces(&batch, 4), setting).unwrap();
        found.totals == again.totals && difference(&values(&model, &found), &values(&model, &again)) == 0.0
    };
    assert!((0..100).any(attempt));
    let [found, other] = [40, 41].map(|seed| self::found(&model, &batch, &losses, 4, seed).unwrap());
    assert!(difference(&values(&model, &found), &values(&model, &other)) > 1e-3);
}

#[test]
fn losses_that_need_the_whole_batch_are_refused_by_name() {
    let weights = AuxiliaryLossConfig::new().with_importance(0.1);
    let error = ClipAuxiliaryLossConfig::both(weights).validate_micro_batches().unwrap_err().to_string();
    let end = "this loss needs the whole batch at once: set its weight to 0, or train on one rank, without micro-batches and recomputation";
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
