//! A device whose numbers have 16 bits unless something else is asked for.
//!
//! A binary of its own, because a device's number type is set once for the whole process.

use std::sync::Once;

use burn::module::Module;
use burn::tensor::{DType, Device, Distribution, FloatDType, Int, IntDType, Tensor};
use burn_moe::{
    AuxiliaryLossConfig, ExpertOptions, MoeFeedForward, MoeFeedForwardConfig, Precision, SoftMoeFeedForwardConfig,
    UpcycleFromDense, UpcycleOptions,
    clip::{ClipConfig, SparseClipConfig, TextConfig, VisionConfig},
    kernels::{Kernels, with_kernels},
    pack_weights,
    routing::BatchTotals,
    transformer::{EncoderConfig, MlpConfig},
    upcycle::Probe,
};

/// The device, set to bf16.
fn device() -> Device {
    static SET: Once = Once::new();
    let mut device = Device::flex();
    SET.call_once(|| device.configure((FloatDType::BF16, IntDType::I32)).expect("the device computes in bf16"));
    device
}

fn tokens(dtype: DType, device: &Device) -> Tensor<2> {
    Tensor::random([12, 6], Distribution::Normal(0.0, 1.0), (device, dtype))
}

/// The same layer with weights of another number type.
fn of_type<M: Module>(module: M, dtype: DType) -> M {
    struct Cast(DType);
    impl burn::module::ModuleMapper for Cast {
        fn map_float<const D: usize>(&mut self, param: burn::module::Param<Tensor<D>>) -> burn::module::Param<Tensor<D>> {
            param.map(|value| {
                let tracked = value.is_require_grad();
                value.cast(self.0).detach().set_require_grad(tracked)
            })
        }
    }
    module.map(&mut Cast(dtype))
}

fn layer(bias: bool, device: &Device) -> MoeFeedForward {
    MoeFeedForwardConfig::new(6, 10, 4).with_experts(ExpertOptions::new().with_bias(bias)).init(device)
}

#[test]
fn losses_are_computed_in_32_bits_and_returned_in_the_tokens_type() {
    let device = device().autodiff();
    for dtype in [DType::BF16, DType::F32] {
        let layer = of_type(layer(true, &device), dtype);
        let routings = [layer.forward(tokens(dtype, &device)).routing];
        let loss = AuxiliaryLossConfig::new().init();
        let whole = loss.forward(&routings).total;
        let mut totals = BatchTotals::default();
        totals.add(&routings);
        let part = loss.forward_micro_batch(&routings, &totals);
        assert_eq!((whole.dtype(), part.dtype()), (dtype, dtype));
        assert!(((whole.clone() - part).abs().into_scalar::<f32>()) < 1e-2);
        whole.backward();
    }
}

#[test]
fn experts_without_biases_compute_in_the_rows_type() {
    for device in [device(), device().autodiff()] {
        for dtype in [DType::BF16, DType::F32] {
            for kernels in [Kernels::Fastest, Kernels::Reference] {
                with_kernels(kernels, || {
                    let x = tokens(dtype, &device);
                    assert_eq!(of_type(layer(false, &device), dtype).forward(x.clone()).output.dtype(), dtype);
                    assert_eq!(of_type(MlpConfig::new(6, 10).init(&device), dtype).forward(x).dtype(), dtype);
                });
            }
        }
    }
}

#[test]
fn packed_experts_without_biases_compute_in_32_bits() {
    let layer = of_type(layer(false, &device()), DType::F32);
    let packed = pack_weights(layer, Precision::BF16);
    assert_eq!(packed.forward(tokens(DType::F32, &device())).output.dtype(), DType::F32);
}

#[test]
fn a_clip_is_upcycled_and_computes() {
    let device = device().autodiff();
    let encoder = || EncoderConfig::new(8, 2, 2, 16);
    let text = TextConfig::new(encoder()).with_vocab_size(50).with_context_length(6);
    let config = ClipConfig::new(VisionConfig::new(encoder(), 8, 4), text, 10);
    let images = Tensor::<4>::random([2, 3, 8, 8], Distribution::Normal(0.0, 1.0), &device);
    let tokens = Tensor::<2, Int>::from_data([[48, 3, 4, 49, 0, 0], [48, 7, 49, 0, 0, 0]], &device);
    let options = UpcycleOptions::default().with_probe(Probe::ImagesAndTexts { images: images.clone(), tokens: tokens.clone() });
    let sparse = config.clone().sparse(SparseClipConfig::clip_up()).init(&device);
    let upcycled = sparse.upcycle_from_dense(&config.init(&device), &options).unwrap();
    assert!(upcycled.report.max_deviation.unwrap() < 0.05, "{}", upcycled.report);
    let output = upcycled.model.forward(images, tokens);
    let loss = AuxiliaryLossConfig::new().init().forward(&output.image_routings).total + output.image_embeds.sum();
    loss.backward();
    let soft = SoftMoeFeedForwardConfig::new(6, 10, 2).init(&device);
    assert_eq!(soft.forward(Tensor::<2>::random([5, 6], Distribution::Default, &device)).output.dtype(), DType::BF16);
}
