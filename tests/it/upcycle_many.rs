//! Several dense models as the experts of one sparse model.

use std::collections::BTreeMap;

use burn::module::{Module, ModuleVisitor, Param};
use burn::nn::transformer::{PositionWiseFeedForward, PositionWiseFeedForwardConfig};
use burn::tensor::{Bool, Device, Tensor, TensorData, activation::softmax};
use burn_moe::{
    Activation, ExpertOptions, MoeFeedForward, MoeFeedForwardConfig,
    clip::{Clip, ClipConfig, EndOfText, SparseClipConfig, TextConfig, VisionConfig},
    transformer::{Encoder, EncoderConfig, FeedForward, Mlp, MlpConfig, SparseEncoderConfig, SparseLayer, TokenMarks},
    upcycle::{
        DenseFeedForward, DenseWeights, Probe, Rest, RouterStart, UpcycleError, UpcycleFromMany, UpcycleManyOptions, UpcycledModel,
    },
};

use super::support::{largest_difference, numbers, values};

fn tokens(shape: [usize; 3], seed: u64, device: &Device) -> Probe {
    Probe::Tokens { tokens: numbers(shape, seed, device), valid: None }
}

fn options() -> UpcycleManyOptions {
    UpcycleManyOptions::default()
}

/// A network whose numbers are the same everywhere, biases included.
fn mlp(d_model: usize, d_ff: usize, seed: u64, device: &Device) -> Mlp {
    let mut mlp = MlpConfig::new(d_model, d_ff).init(device);
    mlp.linear_in.weight = Param::from_tensor(numbers([d_model, d_ff], seed, device));
    mlp.linear_in.bias = Some(Param::from_tensor(numbers([d_ff], seed + 1, device)));
    mlp.linear_out.weight = Param::from_tensor(numbers([d_ff, d_model], seed + 2, device));
    mlp.linear_out.bias = Some(Param::from_tensor(numbers([d_model], seed + 3, device)));
    mlp
}

/// The two largest of each row of `[T, E]`, as (expert, value), lower index first where they are equal.
fn two_largest(rows: &Tensor<2>) -> Vec<[(usize, f32); 2]> {
    let [_, num_experts] = rows.dims();
    let of_row = |row: &[f32]| {
        let mut order: Vec<usize> = (0..num_experts).collect();
        order.sort_by(|&a, &b| row[b].total_cmp(&row[a]));
        [order[0], order[1]].map(|expert| (expert, row[expert]))
    };
    values(rows).chunks_exact(num_experts).map(of_row).collect()
}

#[test]
fn a_layer_computes_its_models_weighted_by_the_gates_of_their_experts() {
    let device = Device::default();
    let mine = [mlp(6, 10, 1, &device), mlp(6, 10, 11, &device)];
    let burns = PositionWiseFeedForwardConfig::new(6, 10).init(&device);
    // Networks of several types at once.
    let models: [&dyn DenseFeedForward; 3] = [&mine[0], &burns, &mine[1]];
    let mut sparse = MoeFeedForwardConfig::new(6, 10, 6).init(&device);
    sparse.router.weight = Param::from_tensor(numbers([6, 6], 5, &device));
    let sparse = sparse.upcycle_from_many(&models, &options()).unwrap().model;

    let x = numbers([20, 6], 7, &device);
    let outputs = [mine[0].forward(x.clone()), burns.forward(x.clone()), mine[1].forward(x.clone())].map(|y| values(&y));
    let chosen = two_largest(&softmax(x.clone().matmul(numbers([6, 6], 5, &device)), 1));
    let mut used = [false; 3];
    let mut expected = Vec::new();
    for (token, [(a, p_a), (b, p_b)]) in chosen.into_iter().enumerate() {
        // Experts 0 and 1 are of model 0, 2 and 3 of model 1, 4 and 5 of model 2.
        let (model_a, model_b) = (a / 2, b / 2);
        (used[model_a], used[model_b]) = (true, true);
        let place = |d: usize| token * 6 + d;
        expected.extend((0..6).map(|d| (p_a * outputs[model_a][place(d)] + p_b * outputs[model_b][place(d)]) / (p_a + p_b)));
    }
    assert_eq!(used, [true; 3], "every model is used");
    let difference = largest_difference(&values(&sparse.forward(x).output), &expected);
    assert!(difference < 1e-5, "{difference}");
}

/// Three matrices with no biases, as in Llama.
struct Gated([Tensor<2>; 3]);

impl DenseFeedForward for Gated {
    fn dense_weights(&self) -> Result<DenseWeights, UpcycleError> {
        let [w_in, w_gate, w_out] = self.0.clone();
        Ok(DenseWeights { w_in, b_in: None, w_gate: Some(w_gate), b_gate: None, w_out, b_out: None, activation: Activation::Silu })
    }
}

#[test]
fn gated_networks_become_gated_experts_in_the_order_of_the_models() {
    let device = Device::default();
    let gated =
        |seed| Gated([numbers([4, 6], seed, &device), numbers([4, 6], seed + 1, &device), numbers([6, 4], seed + 2, &device)]);
    let models = [gated(1), gated(4), gated(7)];
    let sparse = MoeFeedForwardConfig::new(4, 6, 3).with_experts(ExpertOptions::swiglu().with_bias(false)).init(&device);
    let probes = (0..3).map(|seed| tokens([2, 5, 4], seed, &device)).collect();
    let upcycled = sparse.upcycle_from_many(&models.each_ref(), &options().with_probes(probes)).unwrap();
    let experts = upcycled.model.experts;
    for (expert, Gated(weights)) in models.iter().enumerate() {
        let w_gate = experts.w_gate.as_ref().unwrap();
        for (stacked, weight) in [&experts.w_in, w_gate, &experts.w_out].into_iter().zip(weights) {
            assert_eq!(values(&stacked.val().narrow(0, expert, 1)), values(weight));
        }
        let model = &upcycled.report.models[expert];
        assert!(model.own_experts_deviation.unwrap() < 1e-5 && model.max_deviation.unwrap() > 1e-2, "{model:?}");
    }
}

#[test]
fn equal_models_become_a_layer_that_equals_them() {
    let device = Device::default();
    let dense: PositionWiseFeedForward = PositionWiseFeedForwardConfig::new(6, 24).init(&device);
    for router in [RouterStart::Kept, RouterStart::Centroids] {
        let sparse = MoeFeedForwardConfig::new(6, 24, 8).init(&device);
        let probes = vec![tokens([2, 9, 6], 1, &device), tokens([1, 5, 6], 2, &device)];
        let upcycled = sparse.upcycle_from_many(&[&dense; 2], &options().with_router(router).with_probes(probes)).unwrap();
        let x = numbers([2, 9, 6], 7, &device);
        let difference = largest_difference(&values(&upcycled.model.forward(x.clone()).output), &values(&dense.forward(x)));
        assert!(difference < 1e-5, "{difference}");
        let report = upcycled.report;
        assert_eq!((report.params_dense, report.params_total, report.params_active), (318, 8 * 318 + 48, 2 * 318 + 48));
        assert_eq!((report.models.len(), report.max_deviation), (2, None));
        for model in report.models {
            assert!(model.layer_deviations[0] < 1e-5 && model.max_deviation.unwrap() < 1e-5, "{model:?}");
        }
    }
}

fn encoder() -> EncoderConfig {
    EncoderConfig::new(8, 2, 4, 16)
}

fn sparse_encoder(num_experts: usize) -> SparseEncoderConfig {
    SparseEncoderConfig::new().with_num_experts(num_experts)
}

fn small_clip() -> ClipConfig {
    let text = TextConfig::new(encoder()).with_vocab_size(50).with_context_length(6);
    ClipConfig::new(VisionConfig::new(encoder(), 8, 4), text, 10)
}

fn sparse_clip(num_experts: usize) -> ClipConfig {
    let tower = || Some(sparse_encoder(num_experts));
    small_clip().sparse(SparseClipConfig::new().with_vision(tower()).with_text(tower()))
}

fn images_and_texts(seed: u64, device: &Device) -> Probe {
    let texts = [[48, 3, 4, 49, 0, 0], [48, 7, 49, 0, 0, 0], [48, 9, 8, 7, 6, 49]];
    Probe::ImagesAndTexts { images: numbers([3, 3, 8, 8], seed, device), tokens: Tensor::from_data(texts, device) }
}

/// The model with other feed-forward networks, all else shared, as in CLIP-MoE.
fn with_other_networks(mut clip: Clip, seed: u64, device: &Device) -> Clip {
    for (index, block) in clip.vision.encoder.blocks.iter_mut().chain(&mut clip.text.encoder.blocks).enumerate() {
        // Only the blocks that become sparse: the networks of the others are part of what is shared.
        if index % 2 == 1 {
            block.feed_forward = FeedForward::Dense(mlp(8, 16, seed + 10 * index as u64, device));
        }
    }
    clip
}

fn deviations(models: &[UpcycledModel]) -> Vec<(f64, f64, f64)> {
    let of_model = |model: &UpcycledModel| {
        assert_eq!(model.layer_deviations.len(), 4);
        let layers = model.layer_deviations.iter().copied().fold(0.0, f64::max);
        (layers, model.own_experts_deviation.unwrap(), model.max_deviation.unwrap())
    };
    models.iter().map(of_model).collect()
}

#[test]
fn equal_clips_become_a_clip_that_equals_them() {
    let device = Device::default();
    let dense = small_clip().init(&device);
    for (rest, router) in [(Rest::First, RouterStart::Kept), (Rest::Average, RouterStart::Centroids)] {
        let probes = vec![images_and_texts(1, &device), images_and_texts(2, &device), images_and_texts(3, &device)];
        let options = options().with_rest(rest).with_router(router).with_probes(probes);
        let upcycled = sparse_clip(6).init(&device).upcycle_from_many(&[&dense; 3], &options).unwrap();
        for (layers, own, routed) in deviations(&upcycled.report.models) {
            assert!(layers < 1e-5 && own < 1e-5 && routed < 1e-5, "{}", upcycled.report);
        }
        let Probe::ImagesAndTexts { images, tokens } = images_and_texts(4, &device) else { unreachable!() };
        let (a, b) = (dense.forward(images.clone(), tokens.clone()), upcycled.model.forward(images, tokens));
        assert!(largest_difference(&values(&a.logits_per_image), &values(&b.logits_per_image)) < 1e-4);
        assert_eq!((b.image_routings.len(), b.text_routings.len()), (2, 2));
    }
}

#[test]
fn through_one_models_experts_a_clip_is_that_model_if_they_share_the_rest() {
    let device = Device::default();
    let first = small_clip().init(&device);
    let second = with_other_networks(first.clone(), 100, &device);
    let probes = || vec![images_and_texts(1, &device), images_and_texts(2, &device)];
    for rest in [Rest::First, Rest::Average] {
        let options = options().with_rest(rest).with_probes(probes());
        let upcycled = sparse_clip(4).init(&device).upcycle_from_many(&[&first, &second], &options).unwrap();
        for (layers, own, routed) in deviations(&upcycled.report.models) {
            assert!(layers < 1e-5 && own < 1e-5 && routed > 1e-3, "{}", upcycled.report);
        }
    }

    // With another rest, the first's, the second model's experts are still its own networks, but the whole is not the second model.
    let other = small_clip().init(&device);
    let sparse = sparse_clip(4).init(&device);
    let report = sparse.upcycle_from_many(&[&first, &other], &options().with_probes(probes())).unwrap().report;
    let [(layers, own, _), (other_layers, other_own, _)] = deviations(&report.models)[..] else { panic!("two models") };
    assert!(layers < 1e-5 && own < 1e-5 && other_layers < 1e-5 && other_own > 1e-3, "{report}");
    let text = report.to_string();
    assert!(text.contains("\ndense model 1 on its probe batch: its experts deviate"), "{text}");
}

/// Every float parameter by its path.
fn parameters<M: Module>(module: &M) -> BTreeMap<String, Vec<f32>> {
    #[derive(Default)]
    struct Lister(Vec<String>, BTreeMap<String, Vec<f32>>);
    impl ModuleVisitor for Lister {
        fn enter_module(&mut self, name: &str, _: &str) {
            self.0.push(name.to_string());
        }

        fn exit_module(&mut self, _: &str, _: &str) {
            self.0.pop();
        }

        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
            self.1.insert(self.0.join("."), values(&param.val()));
        }
    }
    let mut lister = Lister::default();
    module.visit(&mut lister);
    lister.1
}

#[test]
fn the_rest_is_the_first_models_or_the_mean_of_all() {
    let device = Device::default();
    let mut models = [small_clip().init(&device), small_clip().init(&device), small_clip().init(&device)];
    for (model, scale) in models.iter_mut().zip([1.0, 2.0, 4.5]) {
        model.logit_scale = Param::from_tensor(Tensor::full([1], scale, &device));
    }
    let dense: Vec<BTreeMap<String, Vec<f32>>> = models.iter().map(parameters).collect();
    let expected_mean = |path: &str| -> Vec<f32> {
        (0..dense[0][path].len()).map(|i| dense.iter().map(|p| p[path][i]).sum::<f32>() / 3.0).collect()
    };
    for rest in [Rest::First, Rest::Average] {
        let sparse = sparse_clip(3).init(&device);
        let sparse = sparse.upcycle_from_many(&models.each_ref(), &options().with_rest(rest)).unwrap().model;
        let mut compared = 0;
        for (path, found) in parameters(&sparse) {
            if path.contains(".Moe.") {
                continue;
            }
            let expected = if rest == Rest::First { dense[0][&path].clone() } else { expected_mean(&path) };
            assert!(largest_difference(&found, &expected) < 1e-6, "{rest:?} {path}");
            compared += 1;
        }
        // All parameters of a dense model but 2 · 2 networks of 4 parameters.
        assert_eq!(compared, dense[0].len() - 16);
        for (block, expert) in [(1, 0), (3, 2)] {
            let FeedForward::Moe(moe) = &sparse.text.encoder.blocks[block].feed_forward else { panic!("block {block} is sparse") };
            let FeedForward::Dense(mlp) = &models[expert].text.encoder.blocks[block].feed_forward else { unreachable!() };
            assert_eq!(values(&moe.experts.w_in.val().narrow(0, expert, 1)), values(&mlp.linear_in.weight.val()));
            let b_out = moe.experts.b_out.as_ref().unwrap().val().narrow(0, expert, 1);
            assert_eq!(values(&b_out), values(&mlp.linear_out.bias.as_ref().unwrap().val()));
        }
    }
    let scale = sparse_clip(3).init(&device).upcycle_from_many(&models.each_ref(), &options().with_rest(Rest::Average)).unwrap();
    assert!((values(&scale.model.logit_scale.val())[0] - 2.5).abs() < 1e-6);
}

/// The mean direction of rows of `width`, of length 1.
fn mean_direction(rows: &[f32], width: usize) -> Vec<f32> {
    let unit = |row: &[f32]| -> Vec<f32> {
        let length = row.iter().map(|v| v * v).sum::<f32>().sqrt();
        row.iter().map(|v| v / length).collect()
    };
    let mut sum = vec![0.0; width];
    rows.chunks_exact(width).map(unit).for_each(|row| sum.iter_mut().zip(row).for_each(|(sum, v)| *sum += v));
    unit(&sum)
}

fn columns(layer: &MoeFeedForward) -> Vec<f32> {
    values(&layer.router.weight.val().transpose())
}

#[test]
fn a_routers_columns_are_the_mean_directions_of_what_each_models_network_reads() {
    let device = Device::default();
    let (a, b) = (mlp(4, 8, 1, &device), mlp(4, 8, 11, &device));
    let valid = Tensor::<2, Bool>::from_data([[true, true, false], [true, false, false]], &device);
    let x = [numbers([2, 3, 4], 21, &device), numbers([1, 5, 4], 22, &device)];
    let probes =
        vec![Probe::Tokens { tokens: x[0].clone(), valid: Some(valid) }, Probe::Tokens { tokens: x[1].clone(), valid: None }];
    let options = options().with_router(RouterStart::Centroids).with_probes(probes);
    let sparse = MoeFeedForwardConfig::new(4, 8, 2).init(&device);
    let upcycled = sparse.upcycle_from_many(&[&a, &b], &options).unwrap();
    let layer = upcycled.model;
    // Valid tokens of the first probe: 0 and 1 of the first sample, 0 of the second.
    let read = values(&x[0]);
    let mut expected = mean_direction(&[&read[..8], &read[12..16]].concat(), 4);
    expected.extend(mean_direction(&values(&x[1]), 4));
    assert!(largest_difference(&columns(&layer), &expected) < 1e-5);

    // Two columns: the larger product is the first choice.
    let product = |token: &[f32], column: usize| (0..4).map(|d| token[d] * expected[4 * column + d]).sum::<f32>();
    let share = |tokens: &[f32], own: usize| {
        let first = tokens.chunks_exact(4).filter(|token| product(token, own) > product(token, 1 - own)).count();
        first as f64 / (tokens.len() / 4) as f64
    };
    let shares = [share(&[&read[..8], &read[12..16]].concat(), 0), share(&values(&x[1]), 1)];
    assert_eq!(upcycled.report.models.iter().map(|model| model.first_choices[0]).collect::<Vec<f64>>(), shares);
}

#[test]
fn the_routers_of_an_encoder_read_what_each_dense_encoder_reads() {
    let device = Device::default();
    let models = [encoder().init(&device), encoder().init(&device)];
    let inputs = [numbers([1, 5, 8], 1, &device), numbers([2, 7, 8], 2, &device)];
    let valid = Tensor::<2, Bool>::from_data([[true, true, true, false, false]], &device);
    let probes = vec![
        Probe::Tokens { tokens: inputs[0].clone(), valid: Some(valid) },
        Probe::Tokens { tokens: inputs[1].clone(), valid: None },
    ];
    let options = options().with_router(RouterStart::Centroids).with_probes(probes);
    let sparse: Encoder = encoder().with_sparse(Some(sparse_encoder(2))).init(&device);
    let upcycled = sparse.upcycle_from_many(&models.each_ref(), &options).unwrap();
    assert_eq!(upcycled.report.models[0].layer_deviations.len(), 2);
    for block in [1, 3] {
        let FeedForward::Moe(moe) = &upcycled.model.blocks[block].feed_forward else { panic!("block {block} is sparse") };
        let of_model = |model: usize, num_valid: usize| {
            let inputs = models[model].feed_forward_inputs(inputs[model].clone(), TokenMarks::default(), false);
            mean_direction(&values(&inputs.tokens[block])[..8 * num_valid], 8)
        };
        let expected = [of_model(0, 3), of_model(1, 14)].concat();
        assert!(largest_difference(&columns(moe), &expected) < 1e-5, "block {block}");
    }
}

#[test]
fn several_experts_of_one_model_get_the_clusters_of_its_tokens() {
    let device = Device::default();
    let (a, b) = (mlp(8, 16, 1, &device), mlp(8, 16, 11, &device));
    // Tokens near two axes each: the first model reads axes 0 and 1, the second 2 and 3.
    let near = |axes: [usize; 2], seed| {
        let mut rows = vec![0.0f32; 24 * 8];
        (0..24).for_each(|token| rows[token * 8 + axes[token % 2]] = 3.0);
        let rows = Tensor::<2>::from_data(TensorData::new(rows, [24, 8]), &device);
        Probe::Tokens { tokens: (rows + numbers([24, 8], seed, &device) * 0.2).unsqueeze_dim(0), valid: None }
    };
    let options = options().with_router(RouterStart::Centroids).with_probes(vec![near([0, 1], 5), near([2, 3], 6)]);
    let sparse = MoeFeedForwardConfig::new(8, 16, 4).init(&device);
    let upcycled = sparse.upcycle_from_many(&[&a, &b], &options).unwrap();
    assert_eq!(upcycled.report.models.iter().map(|model| model.first_choices[0]).collect::<Vec<f64>>(), [1.0, 1.0]);
    let layer = upcycled.model;
    let axis_of = |column: &[f32]| {
        let length: f32 = column.iter().map(|v| v * v).sum();
        assert!((length - 1.0).abs() < 1e-5);
        (0..8).find(|&axis| column[axis] > 0.95).expect("a column near an axis")
    };
    let mut axes: Vec<usize> = columns(&layer).chunks_exact(8).map(axis_of).collect();
    axes[..2].sort_unstable();
    axes[2..].sort_unstable();
    assert_eq!(axes, [0, 1, 2, 3]);
}

#[test]
fn the_towers_of_clips_are_upcycled_by_themselves() {
    let device = Device::default();
    let (first, second) = (small_clip().init(&device), small_clip().init(&device));
    let options = options()
        .with_router(RouterStart::Centroids)
        .with_rest(Rest::Average)
        .with_probes(vec![images_and_texts(1, &device), images_and_texts(2, &device)]);
    let sparse = sparse_clip(2).init(&device);
    let whole = sparse_clip(2).init(&device).upcycle_from_many(&[&first, &second], &options).unwrap().model;
    let vision = sparse.vision.upcycle_from_many(&[&first.vision, &second.vision], &options).unwrap();
    let text = sparse.text.upcycle_from_many(&[&first.text, &second.text], &options).unwrap();
    assert_eq!(parameters(&vision.model), parameters(&whole.vision));
    assert_eq!(parameters(&text.model), parameters(&whole.text));
    for model in vision.report.models.iter().chain(&text.report.models) {
        assert!(model.layer_deviations.iter().all(|deviation| *deviation < 1e-5) && model.max_deviation.unwrap() > 1e-3);
    }
}

#[test]
fn what_was_made_of_several_models_trains() {
    let device = Device::default().autodiff();
    let (first, second) = (small_clip().init(&device), small_clip().init(&device));
    let options = options()
        .with_rest(Rest::Average)
        .with_router(RouterStart::Centroids)
        .with_probes(vec![images_and_texts(1, &device), images_and_texts(2, &device)]);
    let sparse = sparse_clip(2).init(&device).upcycle_from_many(&[&first, &second], &options).unwrap().model;
    let Probe::ImagesAndTexts { images, tokens } = images_and_texts(3, &device) else { unreachable!() };
    let gradients = sparse.forward(images, tokens).logits_per_image.square().sum().backward();
    let FeedForward::Moe(moe) = &sparse.vision.encoder.blocks[1].feed_forward else { panic!("block 1 is sparse") };
    for gradient in [values(&moe.router.weight.grad(&gradients).unwrap()), values(&moe.experts.w_in.grad(&gradients).unwrap())] {
        assert!(gradient.iter().any(|g| *g != 0.0) && gradient.iter().all(|g| g.is_finite()));
    }
    assert!(sparse.vision.class_embedding.as_ref().unwrap().grad(&gradients).is_some());
}

#[test]
fn models_that_do_not_fit_are_named() {
    let device = Device::default();
    let layer = |num_experts| MoeFeedForwardConfig::new(6, 24, num_experts).init(&device);
    let error = |layer: MoeFeedForward, models: &[&dyn DenseFeedForward], options: &UpcycleManyOptions| {
        layer.upcycle_from_many(models, options).unwrap_err().to_string()
    };
    let dense = MlpConfig::new(6, 24).init(&device);
    assert_eq!(error(layer(4), &[], &options()), "these dense models cannot be combined: there are none");
    let three: [&dyn DenseFeedForward; 3] = [&dense; 3];
    let cannot = "these dense models cannot be combined: 4 experts are no multiple of 3 models";
    assert_eq!(error(layer(4), &three, &options()), cannot);
    let narrow = MlpConfig::new(6, 20).init(&device);
    assert_eq!(
        error(layer(4), &[&dense, &narrow], &options()),
        "dense model 1: `w_in` is [6, 20] in the dense module and [6, 24] in the sparse one"
    );
    let relu = MlpConfig::new(6, 24).with_activation(Activation::Relu).init(&device);
    assert_eq!(error(layer(4), &[&relu, &dense], &options()), "dense model 0: the dense activation is Relu, the experts' is Gelu");
    let mut unbiased = dense.clone();
    unbiased.linear_out.bias = None;
    assert_eq!(
        error(layer(4), &[&dense, &unbiased], &options()),
        "dense model 1: `b_out`: the dense module has no bias, the sparse one has a bias"
    );
    let mut broken = dense.clone();
    broken.linear_in.weight = Param::from_tensor(Tensor::full([6, 24], f32::NAN, &device));
    assert_eq!(
        error(layer(4), &[&dense, &broken], &options()),
        "dense model 1: `w_in` holds 144 values that are not finite, of 144"
    );
    let shared = MoeFeedForwardConfig::new(6, 24, 4).with_shared_expert(Some(4)).init(&device);
    assert!(error(shared, &[&dense, &dense], &options()).contains("`shared_expert` is none in the dense module"));

    let centroids = options().with_router(RouterStart::Centroids);
    let two: [&dyn DenseFeedForward; 2] = [&dense; 2];
    assert_eq!(
        error(layer(4), &two, &centroids),
        "these dense models cannot be combined: centroids need a probe for each model, and there are none"
    );
    assert_eq!(
        error(layer(4), &two, &options().with_probes(vec![tokens([1, 2, 6], 1, &device)])),
        "these dense models cannot be combined: there are 2 models and 1 probes, not one for each model"
    );
    let probes = |b: Probe| vec![tokens([1, 2, 6], 1, &device), b];
    assert_eq!(
        error(layer(4), &two, &options().with_probes(probes(tokens([1, 2, 5], 1, &device)))),
        "dense model 1: the tokens of the probe or calibration batch are [1, 2, 5], but this module takes [B, N, 6]"
    );
    assert_eq!(
        error(layer(4), &two, &centroids.clone().with_probes(probes(tokens([1, 1, 6], 1, &device)))),
        "dense model 1: strategy `centroids` is refused: 1 valid tokens of the probe make no 2 centroids"
    );
    let not_a_number = Probe::Tokens { tokens: Tensor::full([1, 2, 6], f32::NAN, &device), valid: None };
    assert_eq!(
        error(layer(4), &two, &centroids.with_probes(probes(not_a_number))),
        "dense model 1: `the tokens of the probe` holds 12 values that are not finite, of 12"
    );
}

#[test]
fn clips_that_do_not_fit_are_named() {
    let device = Device::default();
    let dense = small_clip().init(&device);
    let error = |sparse: ClipConfig, second: ClipConfig, options: &UpcycleManyOptions| {
        let sparse = sparse.init(&device);
        sparse.upcycle_from_many(&[&dense, &second.init(&device)], options).unwrap_err().to_string()
    };
    let mut end = small_clip();
    end.text.end_of_text = EndOfText::Id(7);
    assert_eq!(
        error(sparse_clip(4), end, &options()),
        "dense model 1: text: `end_of_text` is Id(7) in the dense module and HighestId in the sparse one"
    );
    let mut vocabulary = small_clip();
    vocabulary.text.vocab_size = 60;
    assert_eq!(
        error(sparse_clip(4), vocabulary, &options()),
        "dense model 1: text: `token_embedding` is [60, 8] in the dense module and [50, 8] in the sparse one"
    );
    let mut wide = small_clip();
    wide.vision.encoder.d_ff = 32;
    assert_eq!(
        error(sparse_clip(4), wide, &options()),
        "dense model 1: vision.encoder.blocks.0.feed_forward: `linear_in` is [8, 32] in the dense module and [8, 16] in the sparse one"
    );
    assert_eq!(
        error(sparse_clip(4), sparse_clip(4), &options()),
        "dense model 1: vision.encoder.blocks.1.feed_forward: the module to upcycle from is sparse already"
    );
    assert_eq!(
        error(sparse_clip(3), small_clip(), &options()),
        "vision.encoder.blocks.1.feed_forward: these dense models cannot be combined: 3 experts are no multiple of 2 models"
    );
    assert_eq!(
        error(small_clip(), small_clip(), &options()),
        "the module to upcycle to has no sparse block: its configuration names none"
    );
    let mut soft = sparse_clip(4);
    soft.text.encoder.sparse = Some(sparse_encoder(4).with_layer(SparseLayer::Soft { slots_per_expert: 1 }));
    let refused = error(soft, small_clip(), &options());
    assert!(
        refused.starts_with("text.encoder.blocks.1.feed_forward: these dense models cannot be combined: a soft layer"),
        "{refused}"
    );
    let images = Probe::Images(numbers([1, 3, 8, 8], 1, &device));
    assert_eq!(
        error(sparse_clip(4), small_clip(), &options().with_probes(vec![images_and_texts(1, &device), images])),
        "dense model 1: the probe holds images, but this module takes images and texts"
    );

    // What the sparse module takes from either is not averaged where it differs.
    let mut epsilon = small_clip();
    epsilon.vision.encoder.norm_epsilon = 1e-6;
    let refused = error(sparse_clip(4), epsilon.clone(), &options().with_rest(Rest::Average));
    let expected = "these dense models cannot be combined: no mean of model 0, which has `norm_pre: LayerNorm {";
    assert!(refused.starts_with(expected) && refused.contains("0.000001") && refused.contains("model 1"), "{refused}");
    sparse_clip(4).init(&device).upcycle_from_many(&[&dense, &epsilon.init(&device)], &options()).unwrap();
    let mut biased = small_clip();
    biased.text.projection_bias = true;
    let refused = error(sparse_clip(4), biased, &options().with_rest(Rest::Average));
    assert!(refused.contains("bias: false") && refused.contains("bias: true"), "{refused}");
}
