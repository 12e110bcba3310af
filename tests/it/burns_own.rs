//! burn's own tools on our modules: quantization of weights, and LoRA.

use burn::module::{Module, Quantizer};
use burn::tensor::{
    Device, Int, Tensor,
    quantization::{Calibration, QuantScheme},
};
use burn_moe::{
    ExpertOptions, MoeFeedForwardConfig, RouterOptions, SoftMoeFeedForwardConfig,
    clip::{ClipConfig, SparseClipConfig, TextConfig, VisionConfig},
    kernels::{Kernels, with_kernels},
    transformer::{EncoderConfig, MlpConfig},
};

use super::support::{numbers, values};

fn quantizer() -> Quantizer {
    Quantizer::new(Calibration::MinMax, QuantScheme::default())
}

fn cosine(a: &Tensor<2>, b: &Tensor<2>) -> f32 {
    let (a, b) = (values(a), values(b));
    let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f32>();
    dot(&a, &b) / (dot(&a, &a) * dot(&b, &b)).sqrt()
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
    let router = RouterOptions::new().with_balancing_rate(Some(0.1));
    let x = |device: &Device| numbers::<2>([20, 16], 3, device);
    for experts in [ExpertOptions::new(), ExpertOptions::swiglu(), ExpertOptions::new().with_bias(false)] {
        let config = MoeFeedForwardConfig::new(16, 24, 4).with_experts(experts).with_router(router.clone());
        let config = config.with_shared_expert(Some(8));
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
    let config = ClipConfig::new(VisionConfig::new(encoder(), 8, 4), text, 10).sparse(SparseClipConfig::clip_up());
    nearly_the_same(
        |device| config.init(device),
        |model, device| {
            let tokens = Tensor::<2, Int>::from_data([[48, 1, 2, 49, 0, 0], [48, 49, 0, 0, 0, 0]], device);
            let images = numbers([2, 3, 8, 8], 4, device);
            Tensor::cat(vec![model.encode_image(images).embedding, model.text.embedding(tokens)], 0)
        },
    );
}
