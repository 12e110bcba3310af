//! burn's own tools on our modules: quantization of weights, LoRA, and gradient checkpointing.

use burn::module::{Lora, Module, ModuleMapper, ModuleVisitor, Param, ParamGroup, Quantizer, Reparameterization};
use burn::tensor::{
    DType, Device, FloatDType, Gradients, Int, Tensor,
    quantization::{Calibration, QuantScheme},
};
use burn_moe::{
    AssignmentConfig, AuxiliaryLossConfig, BalancingOptions, ExpertChoiceConfig, ExpertLora, ExpertOptions, FeedForwardForm,
    LoraOptions, MoeFeedForward, MoeFeedForwardConfig, RouterOptions, SoftMoeFeedForwardConfig, TokenChoiceConfig,
    UpcycleFromDense, UpcycleOptions,
    clip::{Clip, ClipConfig, Pooling, SparseClipConfig, TextConfig, VisionConfig, contrastive_loss},
    kernels::{Kernels, with_kernels},
    transformer::{EncoderConfig, MlpConfig, RotaryPositions, RoutedLayerConfig, SparseEncoderConfig},
};

use super::{
    edge_cases::{cast, panic_of},
    support::{numbers, values},
};

pub(crate) fn quantizer() -> Quantizer {
    Quantizer::new(Calibration::MinMax, QuantScheme::default())
}

fn cosine(a: &Tensor<2>, b: &Tensor<2>) -> f32 {
    let (a, b) = (values(a), values(b));
    let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f32>();
    dot(&a, &b) / (dot(&a, &a) * dot(&b, &b)).sqrt()
}

/// Every token goes to all experts: the rounding of a router may change who is chosen, which is not what is compared here.
fn all_experts(num_experts: usize) -> AssignmentConfig {
    TokenChoiceConfig::of_top_k(num_experts).into()
}

/// `forward` of a module and of the same with burn's 8-bit weights, with and without kernels, and where there could be gradients.
fn nearly_the_same<M: Module>(init: impl Fn(&Device) -> M, forward: impl Fn(&M, &Device) -> Tensor<2>) {
    for device in [Device::default(), Device::default().autodiff()] {
        let model = init(&device);
        let quantized = model.clone().quantize_weights(&mut quantizer());
        for kernels in [Kernels::Fastest, Kernels::Reference] {
            let [a, b] = with_kernels(kernels, || [&model, &quantized].map(|model| forward(model, &device)));
            let cosine = cosine(&a, &b);
            assert!(cosine > 0.99 && values(&a) != values(&b), "{cosine} {kernels:?}");
        }
    }
}

#[test]
fn quantized_layers_compute_nearly_the_same() {
    let router = RouterOptions::new().with_balancing(Some(BalancingOptions::new(0.1)));
    let x = |device: &Device| numbers::<2>([20, 16], 3, device);
    for experts in [ExpertOptions::new(), ExpertOptions::swiglu(), ExpertOptions::new().with_bias(false)] {
        let config = MoeFeedForwardConfig::new(16, 24, 4).with_experts(experts).with_router(router.clone());
        let config = config.with_assignment(all_experts(4)).with_shared_expert(Some(8));
        nearly_the_same(|device| config.init(device), |layer, device| layer.forward(x(device)).output);
    }
    nearly_the_same(
        |device| SoftMoeFeedForwardConfig::new(16, 24, 4).init(device),
        |layer, device| layer.forward(x(device)).output,
    );
    nearly_the_same(|device| MlpConfig::new(16, 24).init(device), |mlp, device| mlp.forward(x(device)));
}

#[test]
fn a_quantized_clip_computes_nearly_the_same() {
    let encoder = || EncoderConfig::new(16, 2, 2, 32);
    let text = TextConfig::new(encoder()).with_vocab_size(50).with_context_length(6);
    let layer = RoutedLayerConfig::new().with_assignment(all_experts(2));
    let sparse = Some(SparseEncoderConfig::new().with_num_experts(2).with_layer(layer.into()));
    let sparse = SparseClipConfig::new().with_vision(sparse.clone()).with_text(sparse);
    let gated = encoder().with_form(FeedForwardForm::Gated).with_rotary(Some(RotaryPositions::new()));
    let pooled = VisionConfig::new(gated, 8, 4).with_class_token(false).with_position_table(false);
    for vision in [VisionConfig::new(encoder(), 8, 4), pooled.with_pooling(Pooling::Attention { n_heads: 2 })] {
        let config = ClipConfig::new(vision, text.clone(), 10).sparse(sparse.clone());
        nearly_the_same(
            |device| config.init(device),
            |model, device| {
                let tokens = Tensor::<2, Int>::from_data([[48, 1, 2, 49, 0, 0], [48, 49, 0, 0, 0, 0]], device);
                let images = numbers([2, 3, 8, 8], 4, device);
                Tensor::cat(vec![model.encode_image(images).embedding, model.text.embedding(tokens)], 0)
            },
        );
    }
}

/// Adapters that change something: those of the second factor start at zero.
struct Changed;

impl ModuleMapper for Changed {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        if !param.is_require_grad() {
            return param;
        }
        param.map(|value| (numbers::<D>(value.dims(), 7, &value.device()) * 0.3).detach().require_grad())
    }
}

#[test]
fn adapters_of_experts_are_a_low_rank_change_and_only_they_are_trained() {
    let device = Device::default().autodiff();
    let x = numbers::<2>([20, 16], 3, &device);
    let near = |a: &[f32], b: &[f32]| assert!(a.iter().zip(b).all(|(a, b)| (a - b).abs() < 1e-5), "{a:?} {b:?}");
    for experts in [ExpertOptions::new(), ExpertOptions::swiglu(), ExpertOptions::new().with_bias(false)] {
        for kernels in [Kernels::Fastest, Kernels::Reference] {
            let config = MoeFeedForwardConfig::new(16, 24, 4).with_experts(experts.clone());
            let plain = config.init(&device);
            let forward = |layer: &MoeFeedForward| with_kernels(kernels, || layer.forward(x.clone()).output);
            let mut layer = plain.clone();
            layer.experts = layer.experts.with_lora(&LoraOptions::new().with_rank(3));
            near(&values(&forward(&layer)), &values(&forward(&plain)));

            layer.experts = layer.experts.map(&mut Changed);
            let output = forward(&layer);
            assert_ne!(values(&output), values(&forward(&plain)));
            // The same with the change in the weights, and its gradients by the factors.
            let mut merged = layer.clone();
            merged.experts = merged.experts.materialize();
            assert_eq!(merged.experts.num_params(), plain.experts.num_params());
            near(&values(&output), &values(&forward(&merged)));

            let gradients = output.square().sum().backward();
            let experts = &layer.experts;
            assert!(experts.w_in.base().grad(&gradients).is_none());
            assert!(experts.b_in.as_ref().is_none_or(|bias| bias.val().grad(&gradients).is_none()));
            let lora = experts.w_in.reparameterization::<ExpertLora>().unwrap();
            assert_eq!((lora.a.dims(), lora.b.dims()), ([4, 16, 3], [4, 3, 24]));
            merged.experts.w_in = merged.experts.w_in.set_require_grad(true);
            let merged_gradients = forward(&merged).square().sum().backward();
            let of_weight = merged.experts.w_in.val().grad(&merged_gradients).unwrap();
            let (a, b) = (lora.a.val().inner(), lora.b.val().inner());
            let expected = [of_weight.clone().matmul(b.transpose()) * lora.scale, a.transpose().matmul(of_weight) * lora.scale];
            for (found, expected) in [&lora.a, &lora.b].map(|factor| factor.val().grad(&gradients).unwrap()).iter().zip(&expected) {
                let scale = expected.clone().abs().max().into_scalar::<f32>();
                assert!((found.clone() - expected.clone()).abs().max().into_scalar::<f32>() < 1e-4 * scale);
            }
        }
    }
}

#[test]
fn adapters_have_the_number_type_of_their_weights() {
    let device = Device::default().autodiff();
    for dtype in [FloatDType::F16, FloatDType::BF16] {
        let dense = cast(MlpConfig::new(16, 24).init(&device), dtype);
        let layer = MoeFeedForwardConfig::new(16, 24, 4).init(&device);
        let mut layer = layer.upcycle_from_dense(&dense, &UpcycleOptions::default()).unwrap().model;
        layer.experts = layer.experts.with_lora(&LoraOptions::new());
        let x = numbers::<2>([20, 16], 3, &device).cast(dtype);
        let output = layer.forward(x.clone()).output;
        let lora = layer.experts.w_in.reparameterization::<ExpertLora>().unwrap();
        let (a, b) = (lora.a.val(), lora.b.val());
        assert!([output.dtype(), a.dtype(), b.dtype()].iter().all(|found| *found == DType::from(dtype)));
        assert!(b.grad(&output.clone().square().sum().backward()).is_some());
        let merged = layer.clone().materialize();
        assert_eq!(merged.experts.w_in.val().dtype(), DType::from(dtype));
        assert_eq!(values(&merged.forward(x).output), values(&output));
        // Adapters of another type than the weight, as of a record that was made before, are merged in theirs.
        let wide = ExpertLora {
            a: lora.a.clone().map(|a| a.cast(FloatDType::F32).detach()),
            b: lora.b.clone().map(|b| b.cast(FloatDType::F32).detach()),
            scale: 1.0,
        };
        assert_eq!(wide.apply(layer.experts.w_in.base()).dtype(), DType::F32);
    }
}

#[test]
fn a_model_of_which_a_clone_gets_adapters_is_trained_as_before() {
    fn frozen<M: Module>(module: &M) -> usize {
        struct Frozen(usize);
        impl ModuleVisitor for Frozen {
            fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
                self.0 += usize::from(!param.val().is_require_grad());
            }
        }
        let mut frozen = Frozen(0);
        module.visit(&mut frozen);
        frozen.0
    }
    let device = Device::default().autodiff();
    let experts = MoeFeedForwardConfig::new(16, 24, 4).with_experts(ExpertOptions::swiglu()).init(&device).experts;
    let adapted = experts.clone().with_lora(&LoraOptions::new());
    assert_eq!((frozen(&experts), frozen(&adapted)), (0, 6));
    let encoder = || EncoderConfig::new(8, 2, 2, 16);
    let text = TextConfig::new(encoder()).with_vocab_size(50).with_context_length(6);
    let config = ClipConfig::new(VisionConfig::new(encoder(), 8, 4), text, 10).sparse(SparseClipConfig::clip_up());
    let model = config.init(&device);
    let adapted = model.clone().with_lora(&LoraOptions::new());
    assert!(frozen(&model) == 0 && frozen(&adapted) > 0);
}

#[test]
fn adapters_of_a_clip_are_saved_and_loaded_alone() {
    let device = Device::default().autodiff();
    let encoder = || EncoderConfig::new(16, 2, 2, 32);
    let text = TextConfig::new(encoder()).with_vocab_size(50).with_context_length(6);
    let config = ClipConfig::new(VisionConfig::new(encoder(), 8, 4), text, 10).sparse(SparseClipConfig::clip_up());
    let plain = config.init(&device);
    let images = numbers([2, 3, 8, 8], 4, &device);
    let embeds = |model: &burn_moe::clip::Clip| values(&model.vision.embedding(images.clone()));
    let options = LoraOptions::new().with_rank(2);
    let model = plain.clone().with_lora(&options).map(&mut Changed);
    assert_ne!(embeds(&model), embeds(&plain));

    let bytes = model.clone().into_record_group(ParamGroup::from_predicate(".lora.")).into_bytes().unwrap();
    assert!(bytes.len() < 4 * plain.num_params() / 2, "{} bytes", bytes.len());
    let record = burn::store::ModuleRecord::from_bytes(bytes).unwrap();
    let again = plain.clone().with_lora(&options).load_record(record.allow_partial(true));
    assert_eq!(embeds(&again), embeds(&model));
    let panic = panic_of(|| again.clone().with_lora(&options));
    assert_eq!(panic, "the model has adapters already: merge them first, by `materialize`");
    let merged = again.materialize();
    assert_eq!(merged.num_params(), plain.num_params());
    assert!(embeds(&merged).iter().zip(embeds(&model)).all(|(a, b)| (a - b).abs() < 1e-4));
}

#[test]
fn adapters_that_burn_would_put_across_experts_are_refused() {
    let device = Device::default();
    let layer = MoeFeedForwardConfig::new(4, 8, 2).init(&device).apply_lora(Lora::new(2, 4.0));
    let panic = panic_of(|| layer.forward(numbers::<2>([3, 4], 1, &device)).output);
    assert!(panic.starts_with("burn's `apply_lora` took the experts' biases for matrices: leave experts out"), "{panic}");

    let layer = MoeFeedForwardConfig::new(4, 8, 2).init(&device);
    let panic = panic_of(|| layer.experts.clone().with_lora(&LoraOptions::new().with_rank(0)));
    assert_eq!(panic, "`rank` must be at least 1, got 0");
    let panic = panic_of(|| layer.experts.clone().with_lora(&LoraOptions::new()).with_lora(&LoraOptions::new()));
    assert_eq!(panic, "the experts have an adapter already: merge it first, by `materialize`");
}

/// A module on another autodiff device, with the same numbers, as trainable as before.
struct On(Device);

impl ModuleMapper for On {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        param.map(|value| {
            let tracked = value.is_require_grad();
            Tensor::from_data(value.into_data(), &self.0).set_require_grad(tracked)
        })
    }
}

/// The gradients of all parameters that have one.
struct GradientsOf<'a>(&'a Gradients, Vec<Vec<f32>>);

impl ModuleVisitor for GradientsOf<'_> {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        self.1.extend(param.base().grad(self.0).map(|gradient| values(&gradient)));
    }
}

/// The loss of a module on an autodiff device and all gradients are the same with and without burn's gradient checkpointing.
fn checkpointing_changes_nothing<M: Module>(name: &str, model: &M, loss: impl Fn(&M, &Device) -> Tensor<1>) {
    let device = Device::default().autodiff();
    for kernels in [Kernels::Fastest, Kernels::Reference] {
        let run = |device: Device| {
            let model = model.clone().map(&mut On(device.clone()));
            let loss = with_kernels(kernels, || loss(&model, &device));
            let value = values(&loss);
            let gradients = loss.backward();
            let mut of_model = GradientsOf(&gradients, Vec::new());
            model.visit(&mut of_model);
            (value, of_model.1)
        };
        let (plain, checkpointed) = (run(device.clone()), run(device.clone().gradient_checkpointing()));
        assert!(plain.1.len() >= 4 && plain.1.iter().flatten().any(|&value| value != 0.0), "{name}");
        assert!(plain == checkpointed, "{name}, {kernels:?}");
    }
}

#[test]
fn gradient_checkpointing_changes_nothing_in_a_layer() {
    let device = Device::default().autodiff();
    let x = |device: &Device| numbers::<2>([40, 16], 3, device);
    let router = RouterOptions::new().with_init_std(1.0);
    let moe = || MoeFeedForwardConfig::new(16, 24, 4).with_router(router.clone());
    let with_adapters = |config: MoeFeedForwardConfig| {
        let mut layer = config.init(&device);
        layer.experts = layer.experts.with_lora(&LoraOptions::new().with_rank(3)).map(&mut Changed);
        layer
    };
    let without_trained_router = |config: MoeFeedForwardConfig| {
        let mut layer = config.init(&device);
        layer.router = layer.router.freeze();
        layer
    };
    let layers = [
        ("token choice", moe().init(&device)),
        ("expert choice", moe().with_assignment(ExpertChoiceConfig::new().into()).init(&device)),
        ("gated", moe().with_experts(ExpertOptions::swiglu()).init(&device)),
        ("shared, no bias", moe().with_shared_expert(Some(8)).with_experts(ExpertOptions::new().with_bias(false)).init(&device)),
        ("adapters", with_adapters(moe())),
        ("router not trained", without_trained_router(moe())),
    ];
    for (name, layer) in layers {
        checkpointing_changes_nothing(name, &layer, |layer, device| {
            // Two layers, so that what comes out of one is computed again for the other.
            let first = layer.forward(x(device));
            let second = layer.forward(x(device) + first.output);
            let auxiliary = AuxiliaryLossConfig::new().init().forward(&[first.routing, second.routing]).total;
            second.output.square().sum() + auxiliary
        });
    }
    let soft = SoftMoeFeedForwardConfig::new(16, 24, 4).init(&device);
    checkpointing_changes_nothing("soft", &soft, |layer, device| layer.forward(x(device)).output.square().sum());
}

#[test]
fn gradient_checkpointing_changes_nothing_in_a_clip() {
    let device = Device::default().autodiff();
    let encoder = || EncoderConfig::new(16, 2, 3, 32);
    let text = TextConfig::new(encoder()).with_vocab_size(50).with_context_length(6);
    let config = ClipConfig::new(VisionConfig::new(encoder(), 8, 4), text, 10);
    let loss = |model: &Clip, device: &Device| {
        let tokens = Tensor::<2, Int>::from_data([[48, 1, 2, 49, 0, 0], [48, 49, 0, 0, 0, 0]], device);
        let output = model.forward(numbers([2, 3, 8, 8], 4, device), tokens);
        let routings: Vec<_> = output.image_routings.into_iter().chain(output.text_routings).collect();
        contrastive_loss(output.logits_per_image) + AuxiliaryLossConfig::new().init().forward(&routings).total
    };
    let model = config.sparse(SparseClipConfig::clip_up()).init(&device);
    checkpointing_changes_nothing("sparse", &model, loss);
    checkpointing_changes_nothing("adapters", &model.with_lora(&LoraOptions::new().with_rank(2)).map(&mut Changed), loss);
}
