//! A sparse model is its dense model, until it is trained.

use burn::module::Module;
use burn::nn::{Linear, LinearConfig, activation::ActivationConfig, transformer::PositionWiseFeedForwardConfig};
use burn::optim::{AdamWConfig, GradientsParams, ModuleOptimizer};
use burn::tensor::{Bool, Device, Int, Tensor};
use burn_moe::{
    Activation, AssignmentConfig, BalancingOptions, Capacity, ExpertChoiceConfig, ExpertOptions, FeedForwardForm,
    GateNormalization, MoeFeedForwardConfig, RouterOptions, RouterScore, SoftMoeFeedForwardConfig, TokenChoiceConfig,
    UpcycleFromDense, UpcycleOptions,
    clip::{Clip, ClipConfig, EndOfText, SparseClipConfig, TextConfig, VisionConfig},
    transformer::{Encoder, EncoderConfig, MlpConfig, RoutedLayerConfig, SparseEncoderConfig, TokenMarks},
    upcycle::{
        DenseFeedForward, DenseWeights, Probe, Reduction, UpcycleError, UpcycleStrategy, expert_similarity, upcycle_optimizer,
    },
};

use super::support::{largest_difference, numbers, values};

fn tokens_probe(shape: [usize; 3], device: &Device) -> UpcycleOptions {
    UpcycleOptions::default().with_probe(Probe::Tokens { tokens: numbers(shape, 6, device), valid: None })
}

#[test]
fn a_layer_equals_burns_own_feed_forward() {
    let device = Device::default();
    let dense = PositionWiseFeedForwardConfig::new(6, 24).init(&device);
    let sparse = MoeFeedForwardConfig::new(6, 24, 8).init(&device);
    let upcycled = sparse.upcycle_from_dense(&dense, &tokens_probe([2, 9, 6], &device)).unwrap();
    assert!(upcycled.report.max_deviation.unwrap() < 1e-5);
    let x = numbers([2, 9, 6], 7, &device);
    let difference = largest_difference(&values(&upcycled.model.forward(x.clone()).output), &values(&dense.forward(x)));
    assert!(difference < 1e-5, "{difference}");
    // 6 · 24 + 24 + 24 · 6 + 6 = 318 an expert; the router has 6 · 8.
    let report = upcycled.report;
    assert_eq!((report.params_dense, report.params_total, report.params_active), (318, 8 * 318 + 48, 2 * 318 + 48));
    assert_eq!((report.layers[0].num_experts, report.layers[0].active_experts, report.layers[0].params_per_expert), (8, 2, 318));
}

/// A feed-forward network as a user may have written it.
struct Mine {
    up: Linear,
    down: Linear,
}

impl DenseFeedForward for Mine {
    fn dense_weights(&self) -> Result<DenseWeights, UpcycleError> {
        Ok(DenseWeights {
            w_in: self.up.weight.val(),
            b_in: None,
            w_gate: None,
            b_gate: None,
            w_out: self.down.weight.val(),
            b_out: None,
            activation: Activation::Silu,
        })
    }
}

#[test]
fn a_layer_equals_a_users_own_feed_forward() {
    let device = Device::default();
    let linear = |d_in, d_out| LinearConfig::new(d_in, d_out).with_bias(false).init(&device);
    let dense = Mine { up: linear(5, 10), down: linear(10, 5) };
    let experts = ExpertOptions::new().with_activation(Activation::Silu).with_bias(false);
    let sparse = MoeFeedForwardConfig::new(5, 10, 4).with_experts(experts).init(&device);
    let report = sparse.upcycle_from_dense(&dense, &tokens_probe([1, 8, 5], &device)).unwrap().report;
    assert!(report.max_deviation.unwrap() < 1e-5);
}

fn encoder() -> EncoderConfig {
    EncoderConfig::new(8, 2, 4, 16)
}

#[test]
fn an_encoder_and_a_block_equal_their_dense_twins_over_valid_tokens() {
    let device = Device::default();
    let dense = encoder().init(&device);
    let config = encoder().with_sparse(Some(SparseEncoderConfig::new()));
    let valid = Tensor::<2, Bool>::from_data([[true, true, true, false], [true, true, true, true]], &device);
    let tokens = numbers([2, 4, 8], 3, &device);
    let probe = Probe::Tokens { tokens: tokens.clone(), valid: Some(valid) };
    let options = UpcycleOptions::default().with_probe(probe);

    let block = config.init(&device).blocks.remove(1);
    let block = block.upcycle_from_dense(&dense.blocks[1], &options).unwrap();
    assert!(block.report.max_deviation.unwrap() < 1e-5);
    assert_eq!(block.report.layers[0].path, "feed_forward");

    // Without padding: attention is not causal here, so a padded token would reach the others.
    let options = UpcycleOptions::default().with_probe(Probe::Tokens { tokens, valid: None });
    let encoder = config.init(&device).upcycle_from_dense(&dense, &options).unwrap();
    assert!(encoder.report.max_deviation.unwrap() < 1e-5);
    let paths: Vec<&str> = encoder.report.layers.iter().map(|layer| layer.path.as_str()).collect();
    assert_eq!(paths, ["blocks.1.feed_forward", "blocks.3.feed_forward"]);
}

fn small_clip() -> ClipConfig {
    let vision = VisionConfig::new(encoder(), 8, 4);
    let text = TextConfig::new(encoder()).with_vocab_size(50).with_context_length(6);
    ClipConfig::new(vision, text, 10)
}

fn batch(device: &Device) -> (Tensor<4>, Tensor<2, Int>) {
    let tokens = [[48, 3, 4, 49, 0, 0], [48, 7, 49, 0, 0, 0], [48, 9, 8, 7, 6, 49]];
    (numbers([3, 3, 8, 8], 21, device), Tensor::from_data(tokens, device))
}

fn upcycled_clip(device: &Device) -> (Clip, Clip) {
    let dense = small_clip().init(device);
    let (images, tokens) = batch(device);
    let options = UpcycleOptions::default().with_probe(Probe::ImagesAndTexts { images, tokens });
    let sparse = small_clip().sparse(SparseClipConfig::clip_up()).init(device);
    let upcycled = sparse.upcycle_from_dense(&dense, &options).unwrap();
    assert!(upcycled.report.max_deviation.unwrap() < 1e-5, "{}", upcycled.report);
    assert_eq!(upcycled.report.layers.len(), 4);
    (dense, upcycled.model)
}

#[test]
fn a_clip_equals_its_dense_twin() {
    let device = Device::default();
    let (dense, sparse) = upcycled_clip(&device);
    let (images, tokens) = batch(&device);
    let (a, b) = (dense.forward(images.clone(), tokens.clone()), sparse.forward(images, tokens));
    assert!(largest_difference(&values(&a.image_embeds), &values(&b.image_embeds)) < 1e-5);
    assert!(largest_difference(&values(&a.text_embeds), &values(&b.text_embeds)) < 1e-5);
    assert_eq!((b.image_routings.len(), b.text_routings.len()), (2, 2));
    // What follows the end of a text gets no expert: 4 + 3 + 6 tokens ask for 2 experts each.
    assert_eq!(b.text_routings[0].plan.requested().iter().sum::<usize>(), 2 * 13);
}

#[test]
fn a_sample_alone_comes_out_as_in_a_batch() {
    let device = Device::default();
    let (_, sparse) = upcycled_clip(&device);
    let (images, tokens) = batch(&device);
    let together = sparse.forward(images.clone(), tokens.clone());
    for i in 0..3 {
        let alone = sparse.forward(images.clone().narrow(0, i, 1), tokens.clone().narrow(0, i, 1));
        for (alone, together) in [(&alone.image_embeds, &together.image_embeds), (&alone.text_embeds, &together.text_embeds)] {
            let row = together.clone().narrow(0, i, 1);
            assert!(largest_difference(&values(alone), &values(&row)) < 1e-6);
        }
    }
}

#[test]
fn padding_behind_the_end_of_a_text_changes_nothing() {
    let device = Device::default();
    let (_, sparse) = upcycled_clip(&device);
    let embed = |tokens: Tensor<2, Int>| values(&sparse.encode_text(tokens).embedding);
    let short = embed(Tensor::from_data([[48, 7, 49]], &device));
    for padding in [0, 5, 31] {
        let padded = Tensor::<2, Int>::from_data([[48, 7, 49, padding, padding, padding]], &device);
        assert!(largest_difference(&short, &embed(padded)) < 1e-6);
    }
}

/// Copies of one network under gates that sum to one: which experts are chosen cannot matter, so the router has nothing to learn
/// from the task, until the experts differ or a choice is dropped.
#[test]
fn the_routers_task_gradient_is_zero_right_after_upcycling_while_nothing_is_dropped() {
    let device = Device::default().autodiff();
    let dense = PositionWiseFeedForwardConfig::new(6, 24).init(&device);
    let router_gradient = |capacity, normalization| {
        let assignment = TokenChoiceConfig::new().with_training_capacity(capacity).with_gate_normalization(normalization);
        let sparse = MoeFeedForwardConfig::new(6, 24, 4).with_assignment(assignment.into()).init(&device);
        let sparse = sparse.upcycle_from_dense(&dense, &UpcycleOptions::default()).unwrap().model;
        let loss = sparse.forward(numbers([20, 6], 13, &device)).output.square().sum();
        let gradients = loss.backward();
        let router = values(&sparse.router.weight.grad(&gradients).unwrap());
        let experts = values(&sparse.experts.w_in.grad(&gradients).unwrap());
        assert!(experts.iter().any(|g| g.abs() > 1e-3), "the experts learn");
        router.into_iter().map(f32::abs).fold(0.0, f32::max)
    };
    assert!(router_gradient(Capacity::Dropless, GateNormalization::BeforeDrop) < 1e-5);
    assert!(router_gradient(Capacity::Fixed(6), GateNormalization::AfterDrop) < 1e-5);
    assert!(router_gradient(Capacity::Fixed(6), GateNormalization::BeforeDrop) > 1e-3);
}

#[test]
fn an_upcycled_model_trains_on_the_training_device() {
    let device = Device::default().autodiff();
    let (_, sparse) = upcycled_clip(&device);
    let (images, tokens) = batch(&device);
    let gradients = sparse.forward(images, tokens).logits_per_image.sum().backward();
    let burn_moe::transformer::FeedForward::Moe(moe) = &sparse.vision.encoder.blocks[1].feed_forward else {
        panic!("block 1 is sparse")
    };
    assert!(moe.experts.w_in.grad(&gradients).is_some() && sparse.logit_scale.grad(&gradients).is_some());
}

#[test]
fn what_does_not_fit_is_named() {
    let device = Device::default();
    let options = UpcycleOptions::default();
    let layer = |d, f| MoeFeedForwardConfig::new(d, f, 4).init(&device);
    let dense = PositionWiseFeedForwardConfig::new(6, 24).init(&device);
    let text = |error: UpcycleError| error.to_string();
    let error = text(layer(6, 20).upcycle_from_dense(&dense, &options).unwrap_err());
    assert_eq!(error, "`w_in` is [6, 24] in the dense module and [6, 20] in the sparse one");

    let relu = PositionWiseFeedForwardConfig::new(6, 24).with_activation(ActivationConfig::Relu).init(&device);
    let error = text(layer(6, 24).upcycle_from_dense(&relu, &options).unwrap_err());
    assert_eq!(error, "the dense activation is Relu, the experts' is Gelu");
    let tanh = PositionWiseFeedForwardConfig::new(6, 24).with_activation(ActivationConfig::Tanh).init(&device);
    assert!(text(layer(6, 24).upcycle_from_dense(&tanh, &options).unwrap_err()).contains("Tanh"));

    let unbiased = MoeFeedForwardConfig::new(6, 24, 4).with_experts(ExpertOptions::new().with_bias(false)).init(&device);
    let error = text(unbiased.upcycle_from_dense(&dense, &options).unwrap_err());
    assert_eq!(error, "`b_in`: the dense module has a bias, the sparse one has no bias");

    let mut broken = dense.clone();
    broken.linear_inner.weight =
        broken.linear_inner.weight.map(|w| w.mask_fill(Tensor::<2, Bool>::full([6, 24], true, &device), f32::NAN));
    let error = text(layer(6, 24).upcycle_from_dense(&broken, &options).unwrap_err());
    assert_eq!(error, "`w_in` holds 144 values that are not finite, of 144");

    let sparse = || small_clip().sparse(SparseClipConfig::clip_up());
    let clip = |config: ClipConfig, dense: &Clip| text(config.init(&device).upcycle_from_dense(dense, &options).unwrap_err());
    let dense = small_clip().init(&device);
    let mut wide = sparse();
    wide.text.encoder.d_ff = 32;
    let at = "text.encoder.blocks.0.feed_forward: ";
    assert_eq!(clip(wide, &dense), format!("{at}`linear_in` is [8, 16] in the dense module and [8, 32] in the sparse one"));
    let mut deep = sparse();
    deep.vision.encoder.n_layers = 6;
    assert_eq!(clip(deep, &dense), "vision.encoder: `blocks` is [4] in the dense module and [6] in the sparse one");
    assert_eq!(clip(small_clip(), &dense), "the module to upcycle to has no sparse block: its configuration names none");
    let twice = clip(sparse(), &sparse().init(&device));
    assert_eq!(twice, "vision.encoder.blocks.1.feed_forward: the module to upcycle from is sparse already");
    let mut heads = sparse();
    heads.vision.encoder.n_heads = 4;
    assert!(clip(heads, &dense).starts_with("vision.encoder.blocks.0.attention: `n_heads` is 2 in the dense module"));
    let mut end = sparse();
    end.text.end_of_text = EndOfText::Id(7);
    assert!(clip(end, &dense).contains("`end_of_text` is HighestId in the dense module and Id(7) in the sparse one"));
    let mut activation = sparse();
    activation.vision.encoder.activation = Activation::QuickGelu;
    assert!(clip(activation, &dense).starts_with("vision.encoder.blocks.0.feed_forward: `activation` is Gelu"));

    let wrong = tokens_probe([1, 2, 8], &device);
    let error = text(sparse().init(&device).upcycle_from_dense(&dense, &wrong).unwrap_err());
    assert_eq!(error, "the probe holds tokens, but this module takes images and texts");
}

#[test]
fn parameters_are_counted_as_the_cost_says() {
    let device = Device::default();
    let (dense, sparse) = (small_clip(), small_clip().sparse(SparseClipConfig::clip_up()));
    let report = sparse.init(&device).upcycle_from_dense(&dense.init(&device), &UpcycleOptions::default()).unwrap().report;
    assert_eq!(report.params_dense as u64, dense.cost().params_total);
    assert_eq!(report.params_total as u64, sparse.cost().params_total);
    assert_eq!(report.params_active as u64, sparse.cost().params_active);
    // A token's way through the dense model leaves no parameter out.
    assert_eq!(dense.cost().params_active, dense.cost().params_total);
    assert_eq!(dense.init(&device).num_params() as u64, dense.cost().params_total);
}

#[test]
fn granular_experts_compute_what_the_dense_network_computes() {
    let device = Device::default();
    for activation in [Activation::Gelu, Activation::QuickGelu, Activation::Relu, Activation::Silu] {
        let dense = MlpConfig::new(6, 24).with_activation(activation).init(&device);
        // Three parts of 8 hidden units: 4 copies make 12 experts, of which 2 · 3 are chosen.
        let assignment = TokenChoiceConfig::new().with_top_k(6);
        let sparse = MoeFeedForwardConfig::new(6, 8, 12)
            .with_assignment(assignment.into())
            .with_experts(ExpertOptions::new().with_activation(activation))
            .init(&device);
        let strategy = UpcycleStrategy::Granular { shards: 3 };
        let options = UpcycleOptions { strategy, ..tokens_probe([2, 9, 6], &device) };
        let upcycled = sparse.upcycle_from_dense(&dense, &options).unwrap();
        assert!(upcycled.report.max_deviation.unwrap() < 1e-5, "{activation:?}: {:?}", upcycled.report.max_deviation);
    }
}

#[test]
fn an_encoder_may_have_granular_experts() {
    let device = Device::default();
    let config = EncoderConfig::new(8, 2, 2, 16);
    let assignment = TokenChoiceConfig::new().with_top_k(4).into();
    let sparse = SparseEncoderConfig::new()
        .with_num_experts(8)
        .with_d_ff(Some(8))
        .with_layer(RoutedLayerConfig::new().with_assignment(assignment).into());
    let dense = config.init(&device);
    let options = UpcycleOptions { strategy: UpcycleStrategy::Granular { shards: 2 }, ..tokens_probe([2, 5, 8], &device) };
    let upcycled = config.with_sparse(Some(sparse)).init(&device).upcycle_from_dense(&dense, &options).unwrap();
    assert!(upcycled.report.max_deviation.unwrap() < 1e-5);
}

#[test]
fn noise_and_drops_change_experts_by_as_much_as_they_say() {
    let device = Device::default();
    let dense = MlpConfig::new(32, 64).init(&device);
    let upcycle = |strategy| {
        let sparse = MoeFeedForwardConfig::new(32, 64, 4).init(&device);
        sparse.upcycle_from_dense(&dense, &UpcycleOptions::default().with_strategy(strategy)).unwrap().model.experts
    };
    let dense_in = values(&dense.linear_in.weight.val());
    let std = |values: &[f32]| (values.iter().map(|v| v * v).sum::<f32>() / values.len() as f32).sqrt();

    let noisy = upcycle(UpcycleStrategy::CopyWithNoise { relative_std: 0.1 });
    let noisy_in = values(&noisy.w_in.val());
    let changes: Vec<f32> = noisy_in.iter().zip(dense_in.iter().cycle()).map(|(a, b)| a - b).collect();
    assert!((std(&changes) / std(&dense_in) - 0.1).abs() < 0.01);
    assert_ne!(noisy_in[..dense_in.len()], noisy_in[dense_in.len()..2 * dense_in.len()]);

    let dropped = upcycle(UpcycleStrategy::Drop { ratio: 0.25 });
    let (w_in, w_out) = (values(&dropped.w_in.val()), values(&dropped.w_out.val()));
    let dense_out = values(&dense.linear_out.weight.val());
    let mut drawn = Vec::new();
    for expert in 0..4 {
        let changed_in: Vec<usize> =
            (0..64).filter(|f| (0..32).any(|d| w_in[(expert * 32 + d) * 64 + f] != dense_in[d * 64 + f])).collect();
        let changed_out: Vec<usize> =
            (0..64).filter(|f| (0..32).any(|d| w_out[(expert * 64 + f) * 32 + d] != dense_out[f * 32 + d])).collect();
        assert_eq!(changed_in.len(), 16);
        assert_eq!(changed_in, changed_out);
        drawn.push(changed_in);
    }
    assert!(drawn.iter().any(|units| *units != drawn[0]), "each expert draws its own");
}

#[test]
fn strategies_that_do_not_fit_are_refused() {
    let device = Device::default();
    let dense = MlpConfig::new(6, 24).init(&device);
    let error = |strategy| {
        let sparse = MoeFeedForwardConfig::new(6, 24, 8).init(&device);
        sparse.upcycle_from_dense(&dense, &UpcycleOptions::default().with_strategy(strategy)).unwrap_err().to_string()
    };
    assert_eq!(
        error(UpcycleStrategy::Granular { shards: 4 }),
        "strategy `granular with 4 shards` is refused: it must divide the 8 experts and the 2 choices of each token"
    );
    assert_eq!(
        error(UpcycleStrategy::Granular { shards: 2 }),
        "`w_in` is [6, 24] in the dense module and [6, 48] in the sparse one"
    );
    assert_eq!(error(UpcycleStrategy::Drop { ratio: 1.5 }), "strategy `drop of 1.5` is refused: the number is out of range");
    assert!(error(UpcycleStrategy::CopyWithNoise { relative_std: f64::NAN }).contains("out of range"));
}

#[test]
fn sparse_parts_that_no_dense_network_has_are_refused() {
    let device = Device::default();
    let dense = MlpConfig::new(6, 24).init(&device);
    let error = |config: MoeFeedForwardConfig| {
        config.init(&device).upcycle_from_dense(&dense, &UpcycleOptions::default()).unwrap_err().to_string()
    };
    let config = MoeFeedForwardConfig::new(6, 24, 8);
    let gated = config.clone().with_experts(ExpertOptions::geglu());
    assert_eq!(error(gated), "`form` is Plain in the dense module and Gated in the sparse one");
    assert_eq!(error(config.with_shared_expert(Some(4))), "`shared_expert` is none in the dense module and one in the sparse one");
}

#[test]
fn copies_go_back_to_the_dense_network_they_came_from() {
    let device = Device::default();
    let dense = MlpConfig::new(6, 24).init(&device);
    let sparse = MoeFeedForwardConfig::new(6, 24, 4).init(&device);
    let sparse = sparse.upcycle_from_dense(&dense, &UpcycleOptions::default()).unwrap().model;
    let x = numbers([9, 6], 3, &device);
    let expected = values(&dense.forward(x.clone()));
    let load = [0.1, 0.2, 0.3, 0.4];
    for reduction in [Reduction::Average, Reduction::Prune { count: 3 }, Reduction::Merge { count: 2 }] {
        let reduced = sparse.reduce(&reduction, &load, Some(x.clone())).unwrap();
        assert!(reduced.report.relative_deviation.unwrap() < 1e-6, "{reduction:?}");
        assert!(largest_difference(&values(&reduced.model.forward(x.clone()).output), &expected) < 1e-5, "{reduction:?}");
        assert!(reduced.report.params_after < reduced.report.params_before);
    }
    let average = sparse.reduce(&Reduction::Average, &load, None).unwrap().model.dense().unwrap();
    assert!(largest_difference(&values(&average.forward(x)), &expected) < 1e-5);
}

#[test]
fn a_layer_of_sigmoid_scores_is_averaged_too() {
    let device = Device::default();
    let router = RouterOptions::new().with_score(RouterScore::Sigmoid).with_balancing(Some(BalancingOptions::new(0.1)));
    let dense = MlpConfig::new(6, 24).init(&device);
    let sparse = MoeFeedForwardConfig::new(6, 24, 4).with_router(router).init(&device);
    let sparse = sparse.upcycle_from_dense(&dense, &UpcycleOptions::default()).unwrap().model;
    let average = sparse.reduce(&Reduction::Average, &[0.25; 4], Some(numbers([9, 6], 3, &device))).unwrap();
    assert!(average.report.relative_deviation.unwrap() < 1e-6, "{:?}", average.report);
}

#[test]
fn a_layer_whose_gate_depends_on_the_token_is_no_dense_network() {
    let device = Device::default();
    let x = numbers([9, 6], 3, &device);
    let layer = |score, assignment: AssignmentConfig| {
        let router = RouterOptions::new().with_score(score).with_init_std(1.0);
        MoeFeedForwardConfig::new(6, 24, 1).with_router(router).with_assignment(assignment).init(&device)
    };
    let by = |gates| TokenChoiceConfig::new().with_top_k(1).with_gate_normalization(gates).into();
    for (score, assignment) in [
        (RouterScore::Softmax, by(GateNormalization::None)),
        (RouterScore::Sigmoid, by(GateNormalization::ConstantOne)),
        (RouterScore::Softmax, ExpertChoiceConfig::new().into()),
    ] {
        let layer = layer(score, assignment);
        let difference =
            largest_difference(&values(&layer.dense().unwrap().forward(x.clone())), &values(&layer.forward(x.clone()).output));
        assert!(difference < 1e-6, "{difference}");
    }
    for assignment in [by(GateNormalization::None), ExpertChoiceConfig::new().into()] {
        let error = layer(RouterScore::Sigmoid, assignment).dense().unwrap_err();
        let text = "`gate` is the same for all tokens in the dense module and the sigmoid of each token's logit in the sparse one";
        assert_eq!(error.to_string(), text);
    }
}

#[test]
fn the_scale_of_gates_is_in_the_dense_network() {
    let device = Device::default();
    let choice = TokenChoiceConfig::new().with_gate_scale(2.5).with_inference_capacity(Capacity::Dropless);
    let dense = MlpConfig::new(6, 24).init(&device);
    let sparse = MoeFeedForwardConfig::new(6, 24, 4).with_assignment(choice.into()).init(&device);
    let sparse = sparse.upcycle_from_dense(&dense, &UpcycleOptions::default()).unwrap().model;
    let x = numbers([9, 6], 3, &device);
    let average = sparse.reduce(&Reduction::Average, &[0.25; 4], Some(x.clone())).unwrap();
    assert!(average.report.relative_deviation.unwrap() < 1e-6, "{:?}", average.report);
    let (found, expected) = (average.model.dense().unwrap().forward(x.clone()), dense.forward(x) * 2.5);
    assert!(largest_difference(&values(&found), &values(&expected)) < 1e-5);
}

#[test]
fn different_experts_are_averaged_by_their_load() {
    let device = Device::default();
    let layer = MoeFeedForwardConfig::new(3, 5, 3).init(&device);
    let load = [0.5, 0.3, 0.2];
    let mean = |stacked: Vec<f32>, len: usize| -> Vec<f32> {
        (0..len).map(|i| (0..3).map(|e| load[e] as f32 * stacked[e * len + i]).sum()).collect()
    };
    let average = layer.reduce(&Reduction::Average, &load, None).unwrap().model;
    for (before, after) in [(&layer.experts.w_in, &average.experts.w_in), (&layer.experts.w_out, &average.experts.w_out)] {
        assert!(largest_difference(&values(&after.val()), &mean(values(&before.val()), 15)) < 1e-6);
    }
    let columns = |layer: &burn_moe::MoeFeedForward| values(&layer.router.weight.val().transpose());
    assert!(largest_difference(&columns(&average), &mean(columns(&layer), 3)) < 1e-6);
}

#[test]
fn an_upcycled_encoder_goes_back_to_the_dense_one() {
    let device = Device::default();
    let config = EncoderConfig::new(8, 2, 4, 16);
    let dense = config.init(&device);
    let sparse = config.with_sparse(Some(SparseEncoderConfig::new())).init(&device);
    let sparse = sparse.upcycle_from_dense(&dense, &UpcycleOptions::default()).unwrap().model;
    let back = sparse.clone().to_dense(&[vec![0.125; 8], vec![0.125; 8]]).unwrap();
    let run = |encoder: &burn_moe::transformer::Encoder| {
        values(&encoder.forward(numbers([2, 5, 8], 1, &device), TokenMarks::default(), false).hidden)
    };
    assert!(largest_difference(&run(&back), &run(&dense)) < 1e-5);
    assert_eq!(back.num_params(), dense.num_params());
    let error = sparse.to_dense(&[vec![0.125; 8]]).unwrap_err().to_string();
    assert_eq!(error, "reduction `Average` is refused: there are loads of 1 layers and 2 routed blocks");
}

#[test]
fn the_busiest_experts_stay_and_the_most_similar_ones_are_merged() {
    let device = Device::default();
    let mut layer = MoeFeedForwardConfig::new(4, 6, 4).init(&device);
    // Experts 1 and 3 are nearly the same.
    let w_in = layer.experts.w_in.val();
    let one = w_in.clone().narrow(0, 1, 1) + 1e-4;
    layer.experts.w_in = burn::module::Param::from_tensor(Tensor::cat(vec![w_in.narrow(0, 0, 3), one], 0));
    for field in ["w_out", "b_in", "b_out"] {
        let experts = &mut layer.experts;
        let same3 = |w: Tensor<3>| Tensor::cat(vec![w.clone().narrow(0, 0, 3), w.narrow(0, 1, 1)], 0);
        let same2 = |b: Tensor<2>| Tensor::cat(vec![b.clone().narrow(0, 0, 3), b.narrow(0, 1, 1)], 0);
        match field {
            "w_out" => experts.w_out = burn::module::Param::from_tensor(same3(experts.w_out.val())),
            "b_in" => experts.b_in = experts.b_in.take().map(|b| burn::module::Param::from_tensor(same2(b.val()))),
            _ => experts.b_out = experts.b_out.take().map(|b| burn::module::Param::from_tensor(same2(b.val()))),
        }
    }
    let similarity = expert_similarity(&layer.experts);
    assert!(similarity[1][3] > 0.999 && similarity[0][2] < 0.9 && (similarity[2][2] - 1.0).abs() < 1e-9);
    let load = [0.3, 0.2, 0.4, 0.1];
    let made_from = |reduction| layer.reduce(&reduction, &load, None).unwrap().report.made_from;
    assert_eq!(made_from(Reduction::Prune { count: 2 }), [vec![0], vec![2]]);
    assert_eq!(made_from(Reduction::Merge { count: 3 }), [vec![0], vec![1, 3], vec![2]]);
    let error = |reduction, load: &[f64]| layer.reduce(&reduction, load, None).unwrap_err().to_string();
    assert_eq!(
        error(Reduction::Prune { count: 1 }, &load),
        "reduction `Prune { count: 1 }` is refused: between 2 and 4 experts can be left"
    );
    assert_eq!(error(Reduction::Average, &[1.0]), "reduction `Average` is refused: [1.0] is no load of 4 experts");
}

/// Tokens in four tight bundles around directions at right angles, twelve each, in turn.
fn bundles(device: &Device) -> Tensor<2> {
    let centres = Tensor::<2>::eye(4, device).repeat(&[12, 2]) * 3.0;
    centres + numbers([48, 8], 5, device) * 0.2
}

#[test]
fn the_router_of_clusters_sends_each_cluster_to_its_own_expert() {
    let device = Device::default();
    let dense = MlpConfig::new(8, 16).init(&device);
    let tokens = bundles(&device);
    let probe = Probe::Tokens { tokens: tokens.clone().unsqueeze_dim(0), valid: None };
    let options = |energy| {
        let options = UpcycleOptions::default().with_strategy(UpcycleStrategy::ClusterAware { energy });
        options.with_calibration(probe.clone()).with_probe(probe.clone())
    };
    let upcycle = |energy| MoeFeedForwardConfig::new(8, 16, 4).init(&device).upcycle_from_dense(&dense, &options(energy)).unwrap();
    // All of the energy: copies, with another router.
    let copies = upcycle(1.0);
    assert!(copies.report.max_deviation.unwrap() < 1e-5);

    // Less of it: each expert is near the dense network on its own cluster, and further from it elsewhere.
    let model = upcycle(0.98).model;
    let router = model.router.weight.val();
    let lengths = values(&router.clone().square().sum_dim(0));
    assert!(lengths.iter().all(|length| (length - 1.0).abs() < 1e-5), "{lengths:?}");
    let first: Vec<i32> = tokens.clone().matmul(router).argmax(1).try_into_vec_as().unwrap();
    let mut experts = first[..4].to_vec();
    assert!(first.chunks(4).all(|bundle| *bundle == experts[..]), "{first:?}");
    experts.sort_unstable();
    assert_eq!(experts, [0, 1, 2, 3]);
    let expected = dense.forward(tokens.clone());
    for (bundle, &expert) in first[..4].iter().enumerate() {
        let only = |stacked: Tensor<3>| stacked.narrow(0, expert as usize, 1).squeeze_dim::<2>(0);
        let alone = DenseWeights {
            w_in: only(model.experts.w_in.val()),
            b_in: model.experts.b_in.as_ref().map(|b| b.val().narrow(0, expert as usize, 1).squeeze_dim(0)),
            w_gate: None,
            b_gate: None,
            w_out: only(model.experts.w_out.val()),
            b_out: model.experts.b_out.as_ref().map(|b| b.val().narrow(0, expert as usize, 1).squeeze_dim(0)),
            activation: Activation::Gelu,
        };
        let error = values(&(alone.forward(tokens.clone()) - expected.clone()).square().sum_dim(1));
        let mean = |of: &dyn Fn(usize) -> bool| {
            let errors: Vec<f32> = (0..48).filter(|i| of(*i)).map(|i| error[i]).collect();
            errors.iter().sum::<f32>() / errors.len() as f32
        };
        let (own, other) = (mean(&|i| i % 4 == bundle), mean(&|i| i % 4 != bundle));
        assert!(other > 5.0 * own, "expert {expert}: {own} on its own cluster, {other} elsewhere");
    }
}

#[test]
fn a_clip_is_upcycled_by_the_clusters_of_its_own_tokens() {
    let device = Device::default();
    let config = small_clip();
    let dense = config.init(&device);
    let batch = Probe::ImagesAndTexts {
        images: numbers([6, 3, 8, 8], 1, &device),
        tokens: Tensor::<2, Int>::from_data([[1, 2, 3, 49, 0, 0], [4, 5, 49, 0, 0, 0], [6, 7, 8, 9, 10, 49]], &device),
    };
    let strategy = UpcycleStrategy::ClusterAware { energy: 1.0 };
    let options = UpcycleOptions::default().with_strategy(strategy).with_calibration(batch.clone()).with_probe(batch);
    let sparse = || config.clone().sparse(SparseClipConfig::clip_up()).init(&device);
    let upcycled = sparse().upcycle_from_dense(&dense, &options).unwrap();
    assert!(upcycled.report.max_deviation.unwrap() < 1e-5);
    let missing = UpcycleOptions { calibration: None, ..options.clone() };
    let error = sparse().upcycle_from_dense(&dense, &missing).unwrap_err().to_string();
    assert_eq!(error, "strategy `cluster-aware with an energy of 1` is refused: it needs a calibration batch");
    let few = Probe::ImagesAndTexts {
        images: numbers([6, 3, 8, 8], 1, &device),
        tokens: Tensor::<2, Int>::from_data([[1, 2, 3, 49, 0, 0]], &device),
    };
    let error = sparse().upcycle_from_dense(&dense, &options.with_calibration(few)).unwrap_err().to_string();
    assert_eq!(error, "strategy `cluster-aware with an energy of 1` is refused: 4 calibration tokens make no 8 clusters");
}

#[test]
fn a_soft_layer_of_copies_computes_the_dense_network_of_its_mixtures() {
    let device = Device::default();
    let dense = MlpConfig::new(6, 24).init(&device);
    let soft = SoftMoeFeedForwardConfig::new(6, 24, 4).with_slots_per_expert(2).init(&device);
    let upcycled = soft.upcycle_from_dense(&dense, &tokens_probe([2, 9, 6], &device)).unwrap();
    assert!(upcycled.report.max_deviation.unwrap() > 0.0);
    assert_eq!(upcycled.report.params_active, upcycled.report.params_total);
    // One token: every slot is that token, and every expert the dense network.
    let x = numbers([1, 6], 3, &device);
    assert!(largest_difference(&values(&upcycled.model.forward(x.clone()).output), &values(&dense.forward(x))) < 1e-5);
    let soft = SoftMoeFeedForwardConfig::new(6, 12, 4).init(&device);
    let options = UpcycleOptions::default().with_strategy(UpcycleStrategy::Granular { shards: 2 });
    let error = soft.upcycle_from_dense(&dense, &options).unwrap_err().to_string();
    assert_eq!(error, "strategy `granular with 2 shards` is refused: a soft layer chooses no experts");
}

#[test]
fn an_upcycled_optimizer_goes_on_without_a_jump() {
    for form in [FeedForwardForm::Plain, FeedForwardForm::Gated] {
        goes_on_without_a_jump(EncoderConfig::new(8, 2, 2, 16).with_form(form));
    }
}

fn goes_on_without_a_jump(config: EncoderConfig) {
    let device = Device::default().autodiff();
    device.seed(4);
    let (x, target) = (numbers([4, 5, 8], 1, &device), numbers([4, 5, 8], 2, &device) * 0.5);
    let loss =
        |encoder: &Encoder| (encoder.forward(x.clone(), TokenMarks::default(), false).hidden - target.clone()).square().mean();
    let adam = || AdamWConfig::new().with_epsilon(1e-8).with_weight_decay(0.0).init();
    let step = |encoder: Encoder, optimizer: &mut ModuleOptimizer| {
        let gradients = GradientsParams::from_grads(loss(&encoder).backward(), &encoder);
        optimizer.step(3e-3, encoder, gradients)
    };
    let scalar = |encoder: &Encoder| loss(encoder).into_scalar::<f32>();
    let (mut dense, mut optimizer) = (config.init(&device), adam());
    (0..150).for_each(|_| dense = step(dense.clone(), &mut optimizer));

    let dropless = TokenChoiceConfig::new().with_training_capacity(Capacity::Dropless);
    let dropless = SparseEncoderConfig::new().with_layer(RoutedLayerConfig::new().with_assignment(dropless.into()).into());
    let sparse = config.clone().with_sparse(Some(dropless)).init(&device);
    let sparse = sparse.upcycle_from_dense(&dense, &UpcycleOptions::default()).unwrap().model;
    let before = scalar(&sparse);
    assert!((before - scalar(&dense)).abs() < 1e-5);
    let largest_loss = |mut optimizer: ModuleOptimizer| {
        let mut sparse = sparse.clone();
        let losses = (0..10).map(|_| {
            sparse = step(sparse.clone(), &mut optimizer);
            scalar(&sparse)
        });
        losses.fold(0.0, f32::max)
    };
    let record = upcycle_optimizer(&optimizer, &dense, &sparse).unwrap();
    let (with, without) = (largest_loss(adam().load_record(record)), largest_loss(adam()));
    assert!(with <= before * 1.02, "from {before} to {with}: the loss jumps with the moments");
    assert!(without > before * 1.1, "from {before} to {without}: there is no jump to avoid");

    // Another dense model: nothing of it was trained.
    let error = upcycle_optimizer(&optimizer, &config.init(&device), &config.init(&device)).unwrap_err().to_string();
    assert!(error.contains("it holds nothing of the dense model's parameters"), "{error}");
    let narrow = config.with_sparse(Some(SparseEncoderConfig::new().with_d_ff(Some(4)))).init(&device);
    let error = upcycle_optimizer(&optimizer, &dense, &narrow).unwrap_err().to_string();
    assert!(error.contains("of `blocks.1.feed_forward.Moe.experts.") && error.contains("cannot be taken over"), "{error}");
}

/// A gated network, as in Llama and Qwen.
struct Gated(DenseWeights);

impl DenseFeedForward for Gated {
    fn dense_weights(&self) -> Result<DenseWeights, UpcycleError> {
        Ok(self.0.clone())
    }
}

#[test]
fn gated_experts_of_a_gated_network_compute_what_it_computes_and_go_back_to_it() {
    let device = Device::default();
    let weights = |bias: bool| DenseWeights {
        w_in: numbers([6, 8], 1, &device),
        b_in: bias.then(|| numbers([8], 2, &device)),
        w_gate: Some(numbers([6, 8], 3, &device)),
        b_gate: bias.then(|| numbers([8], 4, &device)),
        w_out: numbers([8, 6], 5, &device),
        b_out: bias.then(|| numbers([6], 6, &device)),
        activation: Activation::Silu,
    };
    let x = numbers([1, 9, 6], 7, &device);
    for (bias, strategy, d_ff, top_k) in [
        (false, UpcycleStrategy::Copy, 8, 2),
        (true, UpcycleStrategy::Copy, 8, 2),
        (true, UpcycleStrategy::Granular { shards: 2 }, 4, 4),
    ] {
        let dense = Gated(weights(bias));
        let config = MoeFeedForwardConfig::new(6, d_ff, 8).with_experts(ExpertOptions::swiglu().with_bias(bias));
        let layer = config.with_assignment(TokenChoiceConfig::new().with_top_k(top_k).into()).init(&device);
        let options =
            UpcycleOptions::default().with_strategy(strategy).with_probe(Probe::Tokens { tokens: x.clone(), valid: None });
        let upcycled = layer.upcycle_from_dense(&dense, &options).unwrap();
        assert!(upcycled.report.max_deviation.unwrap() < 1e-5, "{strategy:?}");
        assert_eq!(upcycled.report.params_dense, 3 * 6 * 8 + if bias { 8 + 8 + 6 } else { 0 });
        if strategy == UpcycleStrategy::Copy {
            let back = upcycled.model.reduce(&Reduction::Average, &[1.0; 8], None).unwrap().model.dense().unwrap();
            let tokens = x.clone().reshape([9, 6]);
            assert!(largest_difference(&values(&back.forward(tokens.clone())), &values(&dense.0.forward(tokens))) < 1e-5);
        }
    }
    // Other strategies change the gate with the rest, or are refused.
    let layer = |experts| MoeFeedForwardConfig::new(6, 8, 4).with_experts(experts).init(&device);
    let swiglu = || ExpertOptions::swiglu().with_bias(false);
    let with = |strategy| UpcycleOptions::default().with_strategy(strategy);
    let dense = Gated(weights(false));
    for strategy in [UpcycleStrategy::CopyWithNoise { relative_std: 0.5 }, UpcycleStrategy::Drop { ratio: 0.5 }] {
        let model = layer(swiglu()).upcycle_from_dense(&dense, &with(strategy)).unwrap().model;
        let gate = values(&model.experts.w_gate.unwrap().val());
        assert!(largest_difference(&gate[..48], &values(&weights(false).w_gate.unwrap())) > 0.0, "{strategy:?}");
    }
    let probe = Probe::Tokens { tokens: x, valid: None };
    let clusters = with(UpcycleStrategy::ClusterAware { energy: 0.9 }).with_calibration(probe);
    let error = layer(swiglu()).upcycle_from_dense(&dense, &clusters).unwrap_err().to_string();
    assert!(error.ends_with("is refused: it is for plain networks, not for gated ones"), "{error}");
    let plain = ExpertOptions::new().with_bias(false).with_activation(Activation::Silu);
    let error = layer(plain).upcycle_from_dense(&dense, &UpcycleOptions::default()).unwrap_err().to_string();
    assert_eq!(error, "`form` is Gated in the dense module and Plain in the sparse one");
}

#[test]
fn a_probe_of_other_sizes_than_the_module_takes_is_refused() {
    let device = Device::default();
    let of_width = |width| Probe::Tokens { tokens: Tensor::ones([2, 3, width], &device), valid: None };
    let dense = burn::nn::transformer::PositionWiseFeedForwardConfig::new(16, 32).init(&device);
    let sparse = || MoeFeedForwardConfig::new(16, 32, 4).init(&device);
    let error = |probe| sparse().upcycle_from_dense(&dense, &UpcycleOptions::default().with_probe(probe)).unwrap_err().to_string();
    assert_eq!(error(of_width(8)), "the tokens of the probe or calibration batch are [2, 3, 8], but this module takes [B, N, 16]");
    let valid = Tensor::<2, Bool>::full([3, 2], true, &device);
    let masked = Probe::Tokens { tokens: Tensor::ones([2, 3, 16], &device), valid: Some(valid) };
    assert_eq!(error(masked), "the valid flags of the probe or calibration batch are [3, 2], but this module takes [2, 3]");

    let config = ClipConfig::tiny();
    let dense = config.init(&device);
    let sparse = config.sparse(SparseClipConfig::clip_up()).init(&device);
    let options = |images: [usize; 4], texts: [usize; 2]| {
        UpcycleOptions::default()
            .with_probe(Probe::ImagesAndTexts { images: Tensor::zeros(images, &device), tokens: Tensor::zeros(texts, &device) })
    };
    let error = |images, texts| sparse.clone().upcycle_from_dense(&dense, &options(images, texts)).unwrap_err().to_string();
    let text = error([1, 3, 16, 32], [1, 9]);
    assert_eq!(text, "the images of the probe or calibration batch are [1, 3, 16, 32], but this module takes [B, 3, 32, 32]");
    let text = error([1, 3, 32, 32], [1, 25]);
    assert_eq!(text, "the token ids of the probe or calibration batch are [1, 25], but this module takes [B, N], N at most 24");
}
