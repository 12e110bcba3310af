//! Dense and sparse models on different devices, and dense models whose weights are not plain floats.

use burn::module::{Module, ModuleVisitor, Param, Quantizer};
use burn::tensor::{
    Bool, DType, Device, Int, Tensor,
    quantization::{Calibration, QuantScheme},
};
use burn_moe::{
    MoeFeedForwardConfig, SoftMoeFeedForwardConfig, TokenChoiceConfig, UpcycleFromDense, UpcycleOptions,
    clip::{Clip, ClipConfig, SparseClipConfig, TextConfig, VisionConfig},
    transformer::{EncoderConfig, MlpConfig, SparseEncoderConfig, TokenMarks},
    upcycle::{Probe, Reduction, Rest, RouterStart, UpcycleFromMany, UpcycleManyOptions, UpcycleStrategy, expert_similarity},
};

use super::support::{largest_difference, numbers, values};

fn encoder() -> EncoderConfig {
    EncoderConfig::new(8, 2, 4, 16)
}

fn small_clip() -> ClipConfig {
    let text = TextConfig::new(encoder()).with_vocab_size(50).with_context_length(6);
    ClipConfig::new(VisionConfig::new(encoder(), 8, 4), text, 10)
}

fn sparse_clip() -> ClipConfig {
    small_clip().sparse(SparseClipConfig::clip_up())
}

fn images_and_texts(device: &Device) -> Probe {
    let tokens = Tensor::<2, Int>::from_data([[48, 3, 4, 49, 0, 0], [48, 7, 49, 0, 0, 0], [48, 9, 8, 7, 6, 49]], device);
    Probe::ImagesAndTexts { images: numbers([3, 3, 8, 8], 21, device), tokens }
}

fn tokens(device: &Device) -> Probe {
    let valid = Tensor::<2, Bool>::from_data([[true, true, true, false, true], [true; 5]], device);
    Probe::Tokens { tokens: numbers([2, 5, 8], 3, device), valid: Some(valid) }
}

/// Devices of one kind that burn tells apart by what they do about gradients.
fn devices() -> [Device; 3] {
    let device = Device::default();
    [device.clone(), device.clone().autodiff(), device.autodiff().gradient_checkpointing()]
}

type Place = (String, String, bool);

/// The parameters that are not where they are expected.
fn changed<M: Module>(module: &M, expected: &[Place]) -> Vec<Place> {
    let found = places(module);
    assert_eq!(found.len(), expected.len(), "as many parameters");
    found.into_iter().zip(expected).filter(|(found, expected)| found != *expected).map(|(found, _)| found).collect()
}

/// Every parameter: its path, what its device does about gradients, and whether it gets one.
fn places<M: Module>(module: &M) -> Vec<Place> {
    #[derive(Default)]
    struct Places(Vec<String>, Vec<Place>);
    impl ModuleVisitor for Places {
        fn enter_module(&mut self, name: &str, _: &str) {
            self.0.push(name.to_string());
        }

        fn exit_module(&mut self, _: &str, _: &str) {
            self.0.pop();
        }

        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
            let value = param.val();
            self.1.push((self.0.join("."), format!("{:?}", value.gradient_checkpointing_strategy()), value.is_require_grad()));
        }
    }
    let mut places = Places::default();
    module.visit(&mut places);
    places.1
}

#[test]
fn what_is_copied_is_as_trainable_as_the_experts_whatever_device_the_dense_model_is_on() {
    for from in devices() {
        for to in devices() {
            let dense = small_clip().init(&from);
            let sparse = sparse_clip().init(&to);
            let expected = places(&sparse_clip().init(&to));
            // A comparison is at inference, and leaves the model as it is.
            let options = UpcycleOptions::default().with_probe(images_and_texts(&from));
            let sparse = sparse.upcycle_from_dense(&dense, &options).unwrap().model;
            assert_eq!(changed(&sparse, &expected), [], "{from:?} to {to:?}");
            assert_eq!(sparse.vision.projection.weight.id, dense.vision.projection.weight.id);

            let encoders = encoder().with_sparse(Some(SparseEncoderConfig::new()));
            let (dense, sparse) = (encoder().init(&from), encoders.init(&to));
            let expected = places(&encoders.init(&to));
            let sparse = sparse.upcycle_from_dense(&dense, &UpcycleOptions::default()).unwrap().model;
            assert_eq!(changed(&sparse, &expected), [], "{from:?} to {to:?}");
            // Nothing is dropped on a device without gradients, and a pass on one with them computes gradients for all that is copied.
            let output = sparse.forward(numbers([2, 5, 8], 3, &to), TokenMarks::default(), false).hidden;
            assert_eq!(output.is_autodiff(), to.is_autodiff());
            if to.is_autodiff() {
                let grads = output.square().sum().backward();
                assert!(sparse.blocks[0].attention.query.weight.val().grad(&grads).is_some());
            }
        }
    }
}

#[test]
fn what_the_dense_model_has_frozen_stays_frozen() {
    for from in devices() {
        let mut dense = encoder().init(&from);
        dense.blocks[0].attention = dense.blocks[0].attention.clone().no_grad();
        let sparse = encoder().with_sparse(Some(SparseEncoderConfig::new())).init(&Device::default().autodiff());
        let sparse = sparse.upcycle_from_dense(&dense.valid(), &UpcycleOptions::default()).unwrap().model;
        let is_trained = |block: usize| sparse.blocks[block].attention.query.weight.val().is_require_grad();
        assert_eq!((is_trained(0), is_trained(1)), (false, true));
    }
}

#[test]
fn probes_and_calibration_batches_may_be_on_any_device() {
    for (from, to) in devices().iter().flat_map(|from| devices().map(|to| (from.clone(), to))) {
        for of_probe in devices() {
            let cluster = UpcycleStrategy::ClusterAware { energy: 1.0 };
            for strategy in [UpcycleStrategy::Copy, cluster] {
                let near = |report: burn_moe::upcycle::UpcycleReport| assert!(report.max_deviation.unwrap() < 1e-4, "{report}");
                let options = |probe: fn(&Device) -> Probe| {
                    let options = UpcycleOptions::default().with_probe(probe(&of_probe));
                    options.with_strategy(strategy).with_calibration(probe(&of_probe))
                };
                let mlp = MlpConfig::new(8, 16).init(&from);
                near(MoeFeedForwardConfig::new(8, 16, 2).init(&to).upcycle_from_dense(&mlp, &options(tokens)).unwrap().report);
                if strategy == UpcycleStrategy::Copy {
                    // A soft layer computes something else, on every device.
                    SoftMoeFeedForwardConfig::new(8, 16, 2).init(&to).upcycle_from_dense(&mlp, &options(tokens)).unwrap();
                }
                let config = encoder().with_sparse(Some(SparseEncoderConfig::new().with_num_experts(2)));
                let (dense, sparse) = (encoder().init(&from), config.init(&to));
                let block = sparse.blocks[1].clone();
                near(block.upcycle_from_dense(&dense.blocks[1], &options(tokens)).unwrap().report);
                let all_valid = |device: &Device| Probe::Tokens { tokens: numbers([2, 5, 8], 3, device), valid: None };
                near(sparse.upcycle_from_dense(&dense, &options(all_valid)).unwrap().report);
                let (dense, sparse) = (small_clip().init(&from), sparse_clip().init(&to));
                if strategy == UpcycleStrategy::Copy {
                    near(sparse.upcycle_from_dense(&dense, &options(images_and_texts)).unwrap().report);
                }
            }
            let many = |probe: fn(&Device) -> Probe| {
                let options = UpcycleManyOptions::default().with_router(RouterStart::Centroids);
                options.with_probes(vec![probe(&of_probe), probe(&Device::default())])
            };
            let first = small_clip().init(&from);
            let second = first.clone();
            let upcycled = sparse_clip().init(&to).upcycle_from_many(&[&first, &second], &many(images_and_texts)).unwrap();
            assert!(upcycled.report.models.iter().all(|model| model.max_deviation.unwrap() < 1e-4), "{}", upcycled.report);
            let (a, b) = (MlpConfig::new(8, 16).init(&from), MlpConfig::new(8, 16).init(&to));
            let sparse = MoeFeedForwardConfig::new(8, 16, 2).init(&to);
            let upcycled = sparse.upcycle_from_many(&[&a, &b], &many(tokens)).unwrap();
            assert!(upcycled.report.models.iter().all(|model| model.layer_deviations[0] < 1e-4), "{}", upcycled.report);
        }
    }
}

#[test]
fn what_a_reduction_costs_is_measured_without_freezing_the_layer() {
    let device = Device::default().autodiff();
    let config = MoeFeedForwardConfig::new(8, 16, 2).with_shared_expert(Some(4)).with_shared_expert_gate(true);
    let (layer, expected) = (config.init(&device), places(&config.init(&device)));
    layer.reduce(&Reduction::Average, &[0.5, 0.5], Some(numbers([3, 8], 4, &device))).unwrap();
    assert_eq!(changed(&layer, &expected), []);
}

fn quantized<M: Module>(module: M) -> M {
    module.quantize_weights(&mut Quantizer::new(Calibration::MinMax, QuantScheme::default()))
}

#[test]
fn models_that_burn_quantized_are_upcycled_to_floats_that_can_be_trained() {
    for from in devices() {
        let to = Device::default().autodiff();
        let mlp = quantized(MlpConfig::new(8, 16).init(&from));
        let options = UpcycleOptions::default().with_probe(tokens(&from));
        let layer = MoeFeedForwardConfig::new(8, 16, 4).init(&to).upcycle_from_dense(&mlp, &options).unwrap();
        assert!(layer.report.max_deviation.unwrap() < 1e-5, "{}", layer.report);
        assert_eq!(layer.model.experts.w_in.val().dtype(), DType::F32);
        let many = UpcycleManyOptions::default().with_probes(vec![tokens(&from), tokens(&from)]);
        let layer = MoeFeedForwardConfig::new(8, 16, 4).init(&to).upcycle_from_many(&[&mlp, &mlp], &many).unwrap();
        assert!(layer.report.models[0].max_deviation.unwrap() < 1e-5, "{}", layer.report);

        let dense: Clip = quantized(small_clip().init(&from));
        let expected = places(&sparse_clip().init(&to));
        let options = UpcycleOptions::default().with_probe(images_and_texts(&from));
        let upcycled = sparse_clip().init(&to).upcycle_from_dense(&dense, &options).unwrap();
        assert!(upcycled.report.max_deviation.unwrap() < 1e-4, "{}", upcycled.report);
        assert_eq!(changed(&upcycled.model, &expected), []);
        for rest in [Rest::First, Rest::Average] {
            let options = UpcycleManyOptions::default().with_rest(rest).with_router(RouterStart::Centroids);
            let options = options.with_probes(vec![images_and_texts(&from), images_and_texts(&from)]);
            let upcycled = sparse_clip().init(&to).upcycle_from_many(&[&dense, &dense], &options).unwrap();
            assert!(upcycled.report.models[1].max_deviation.unwrap() < 1e-4, "{}", upcycled.report);
            assert_eq!(changed(&upcycled.model, &expected), []);
        }
    }
}

#[test]
fn layers_that_burn_quantized_are_reduced_as_floats() {
    let device = Device::default();
    let x = numbers::<2>([9, 8], 4, &device);
    let layer = quantized(MoeFeedForwardConfig::new(8, 16, 4).init(&device));
    for reduction in [Reduction::Average, Reduction::Prune { count: 4 }, Reduction::Merge { count: 3 }] {
        let reduced = layer.reduce(&reduction, &[0.25; 4], Some(x.clone())).unwrap();
        assert_eq!(reduced.model.experts.w_in.val().dtype(), DType::F32, "{reduction:?}");
        if reduction == (Reduction::Prune { count: 4 }) {
            assert!(reduced.report.relative_deviation.unwrap() < 1e-5, "{:?}", reduced.report);
        }
    }
    let one = MoeFeedForwardConfig::new(8, 16, 1).with_assignment(TokenChoiceConfig::of_top_k(1).into()).init(&device);
    let one = quantized(one);
    let (found, expected) = (one.dense().unwrap().forward(x.clone()), one.forward(x).output);
    assert!(largest_difference(&values(&found), &values(&expected)) < 1e-5);
    assert_eq!(expert_similarity(&layer.experts).len(), 4);
}
