//! Weights packed for inference compute what the plain ones do.

use std::{env, fs};

use burn::module::{Module, ModuleVisitor, Param, Quantizer};
use burn::nn::{Linear, LinearConfig, attention::MultiHeadAttentionConfig};
use burn::tensor::{
    Device, Int, Tensor,
    quantization::{Calibration, QuantScheme},
};
use burn_moe::{
    Activation, ExpertOptions, LoraOptions, MoeFeedForward, MoeFeedForwardConfig, PackedWeight, Precision, RouterOptions,
    SoftMoeFeedForwardConfig, TokenChoiceConfig, UpcycleFromDense, UpcycleOptions,
    clip::{
        Clip, ClipConfig, SparseClipConfig, TextConfig, VisionConfig,
        checkpoint::{ClipCheckpoint, LoadOptions, VisionCheckpoint},
        normalize,
        tokenizer::ClipTokenizer,
    },
    finite,
    kernels::{Kernels, with_kernels},
    pack_weights,
    train::{
        data::{EmojiPack, EmojiVendor, Language},
        evaluate,
    },
    transformer::{BlockSelection, EncoderConfig, MlpConfig, RoutedLayerConfig, SparseEncoderConfig},
};

use safetensors::{Dtype, SafeTensors, tensor::TensorView};

use super::{
    edge_cases::panic_of,
    support::{numbers, values},
};

const ALL: [Precision; 4] = [Precision::F32, Precision::F16, Precision::BF16, Precision::Int8];

/// The length of the difference over that of what is expected.
fn error(found: &[f32], expected: &[f32]) -> f32 {
    let length = |values: &mut dyn Iterator<Item = f32>| values.map(|v| v * v).sum::<f32>().sqrt();
    length(&mut found.iter().zip(expected).map(|(a, b)| a - b)) / length(&mut expected.iter().copied())
}

/// How far rounding of weights alone may take a network of two maps, and rounding of rows besides.
fn bounds(precision: Precision) -> (f32, f32) {
    match precision {
        Precision::F32 => (0.0, 1e-6),
        Precision::F16 => (1e-3, 1e-6),
        Precision::BF16 => (8e-3, 1e-6),
        Precision::Int8 => (2e-2, 3e-2),
    }
}

/// Packed against the same weights unpacked, and these against the weights that they were made of.
fn compare<M: Module>(module: &M, forward: impl Fn(&M) -> Tensor<2>) {
    let expected = values(&forward(module));
    for precision in ALL {
        let packed = pack_weights(module.clone(), precision);
        let found = values(&forward(&packed));
        let unpacked = values(&forward(&packed.clone().materialize()));
        let (of_weights, of_rows) = bounds(precision);
        assert!(error(&unpacked, &expected) <= of_weights, "{precision:?}, weights: {}", error(&unpacked, &expected));
        assert!(error(&found, &unpacked) <= of_rows, "{precision:?}, rows: {}", error(&found, &unpacked));
        // Without our kernels weights are unpacked.
        let reference = values(&with_kernels(Kernels::Reference, || forward(&packed)));
        assert!(error(&reference, &unpacked) < 1e-6, "{precision:?}, reference: {}", error(&reference, &unpacked));
        let back = values(&forward(&packed.train().valid()));
        assert!(back == found, "{precision:?}: packed weights are not lost on the way to training and back");
    }
}

#[test]
fn layers_with_packed_weights_compute_what_plain_ones_do() {
    let device = Device::flex();
    // Widths that fill no panel, no group and no vector, and wider ones; few rows and many.
    for (d_model, d_ff, rows) in [(5, 7, 3), (48, 70, 1), (96, 200, 301)] {
        let x = || numbers::<2>([rows, d_model], 7, &device);
        for options in [ExpertOptions::new(), ExpertOptions::swiglu(), ExpertOptions::new().with_bias(false)] {
            let config = MoeFeedForwardConfig::new(d_model, d_ff, 4).with_experts(options).with_shared_expert(Some(33));
            compare(&config.init(&device), |layer: &MoeFeedForward| layer.forward(x()).output);
        }
        for activation in [Activation::Gelu, Activation::QuickGelu, Activation::Relu] {
            compare(&MlpConfig::new(d_model, d_ff).with_activation(activation).init(&device), |mlp| mlp.forward(x()));
        }
        compare(&SoftMoeFeedForwardConfig::new(d_model, d_ff, 4).init(&device), |layer| layer.forward(x()).output);
    }
}

fn clip() -> ClipConfig {
    let encoder = || EncoderConfig::new(64, 2, 2, 96);
    let text = TextConfig::new(encoder()).with_vocab_size(50).with_context_length(9);
    // All experts: rounding changes which ones are chosen, which is not what is compared here.
    let layer = RoutedLayerConfig::new().with_assignment(TokenChoiceConfig::of_top_k(4).into());
    let sparse = Some(SparseEncoderConfig::new().with_num_experts(4).with_layer(layer.into()));
    let towers = SparseClipConfig::new().with_vision(sparse.clone()).with_text(sparse);
    ClipConfig::new(VisionConfig::new(encoder(), 16, 4), text, 10).sparse(towers)
}

fn embeddings(model: &Clip, batch: usize) -> [Tensor<2>; 2] {
    let device = Device::flex();
    let ids = [[48, 1, 2, 3, 4, 5, 6, 7, 49], [48, 49, 0, 0, 0, 0, 0, 0, 0], [48, 1, 2, 49, 3, 49, 0, 0, 0]];
    let tokens = Tensor::<2, Int>::from_data(ids, &device).narrow(0, 0, batch);
    [model.vision.embedding(numbers([3, 3, 16, 16], 4, &device).narrow(0, 0, batch)), model.text.embedding(tokens)]
}

#[test]
fn a_packed_clip_embeds_as_the_plain_one_and_each_sample_by_itself() {
    let model = clip().init(&Device::flex());
    let expected = embeddings(&model, 3).map(|x| values(&x));
    for (precision, bound) in ALL.into_iter().zip([1e-6, 2e-3, 1e-2, 3e-2]) {
        let packed = pack_weights(model.clone(), precision);
        // The choice of kernels holds for all of a tower, on whichever thread it is computed.
        let unpacked = embeddings(&packed.clone().materialize(), 3);
        let reference = with_kernels(Kernels::Reference, || embeddings(&packed, 3));
        for (reference, unpacked) in reference.iter().zip(&unpacked) {
            let difference = error(&values(reference), &values(unpacked));
            assert!(difference < 2e-6, "{precision:?}, reference: {difference}");
        }
        for ((found, alone), expected) in embeddings(&packed, 3).iter().zip(embeddings(&packed, 1)).zip(&expected) {
            let found = values(found);
            assert!(error(&found, expected) < bound, "{precision:?}: {}", error(&found, expected));
            let alone = values(&alone);
            assert!(error(&alone, &found[..alone.len()]) < 1e-6, "{precision:?}: {}", error(&alone, &found[..alone.len()]));
        }
    }
}

/// Paths of the packed weights, and numbers that are stored otherwise.
#[derive(Default)]
struct Packed {
    path: Vec<String>,
    packed: Vec<String>,
    plain: usize,
}

impl ModuleVisitor for Packed {
    fn enter_module(&mut self, name: &str, _: &str) {
        self.path.push(name.to_string());
        if name == "packed" {
            self.packed.push(self.path.join("."));
        }
    }

    fn exit_module(&mut self, _: &str, _: &str) {
        self.path.pop();
    }

    fn visit_float<const D: usize>(&mut self, _: &Param<Tensor<D>>) {
        self.plain += 1;
    }
}

#[test]
fn experts_feed_forward_networks_attention_and_patches_are_packed_and_nothing_else() {
    let model = pack_weights(clip().init(&Device::flex()), Precision::Int8);
    let of_tower = |packed: &[String], tower: &str| packed.iter().filter(|path| path.starts_with(tower)).count();
    let mut found = Packed::default();
    model.visit(&mut found);
    // Two blocks of attention with four maps, a dense network and experts of two each; and patches.
    assert_eq!((of_tower(&found.packed, "vision."), of_tower(&found.packed, "text.")), (13, 12), "{:?}", found.packed);
    let precision = |linear: &Linear| linear.weight.reparameterization::<PackedWeight>().map(PackedWeight::precision);
    assert_eq!(precision(&model.vision.encoder.blocks[0].attention.query), Some(Precision::Int8));
    assert_eq!(precision(&model.vision.patch_embedding), Some(Precision::F32));
    // A field of that name elsewhere, and burn's own attention, have no use for it.
    #[derive(Module, Debug)]
    struct Other {
        patch_embedding: Linear,
    }
    let other = Other { patch_embedding: LinearConfig::new(8, 8).init(&Device::flex()) };
    assert_eq!(precision(&pack_weights(other, Precision::F32).patch_embedding), None);
    let own = pack_weights(MultiHeadAttentionConfig::new(8, 2).init(&Device::flex()), Precision::F32);
    assert!(own.query.weight.reparameterization::<PackedWeight>().is_none());
}

#[test]
fn packed_weights_pass_gradients_and_have_none() {
    let device = Device::flex();
    let layer = pack_weights(MoeFeedForwardConfig::new(16, 24, 4).init(&device), Precision::Int8);
    let plain = layer.clone().materialize();
    let x = numbers::<2>([20, 16], 3, &device.autodiff());
    let [(packed, none), (unpacked, some)] = [layer, plain].map(|layer| {
        let (layer, x) = (layer.train(), x.clone().require_grad());
        let gradients = layer.forward(x.clone()).output.powi_scalar(2).sum().backward();
        (values(&x.grad(&gradients).expect("of the input")), layer.experts.w_in.base().grad(&gradients))
    });
    assert!(error(&packed, &unpacked) < 1e-6 && none.is_none() && some.is_some());
}

#[test]
fn records_of_packed_modules_hold_plain_weights_and_loaded_ones_count() {
    let device = Device::flex();
    let config = MoeFeedForwardConfig::new(16, 24, 4);
    let x = || numbers::<2>([20, 16], 3, &device);
    let (layer, other) = (config.init(&device), config.init(&device));
    let [expected, of_other] = [&layer, &other].map(|layer| values(&layer.forward(x()).output));
    let packed = pack_weights(layer, Precision::F32);
    let loaded = config.init(&device).load_record(packed.clone().into_record());
    assert!(error(&values(&loaded.forward(x()).output), &expected) < 1e-6);
    let changed = packed.load_record(other.into_record());
    assert!(error(&values(&changed.forward(x()).output), &of_other) < 1e-6);
    assert!(error(&expected, &of_other) > 0.1);
    // A model that has diverged is loaded, too.
    let mut diverged = config.init(&device);
    diverged.experts.w_in = diverged.experts.w_in.map(|weight| weight * f32::NAN);
    let changed = changed.load_record(diverged.into_record());
    assert!(values(&changed.forward(x()).output).into_iter().all(f32::is_nan));
}

#[test]
fn adapters_are_merged_and_packing_twice_rounds_once_more() {
    let device = Device::flex();
    let x = || numbers::<2>([20, 16], 3, &device);
    let mut experts = MoeFeedForwardConfig::new(16, 24, 4).init(&device);
    experts.experts = experts.experts.with_lora(&LoraOptions::new());
    let expected = values(&experts.forward(x()).output);
    let packed = pack_weights(pack_weights(experts, Precision::F32), Precision::F16);
    assert_eq!(packed.experts.w_in.reparameterization::<PackedWeight>().map(PackedWeight::precision), Some(Precision::F16));
    assert!(error(&values(&packed.forward(x()).output), &expected) < 1e-3);
}

#[test]
fn a_token_that_is_not_finite_spoils_no_other() {
    let device = Device::flex();
    let config = MoeFeedForwardConfig::new(16, 24, 4).with_router(RouterOptions::new());
    let layer = config.init(&device);
    let x = numbers::<2>([6, 16], 3, &device);
    let bad = x.clone().slice_fill([2..3, 4..5], f32::NAN);
    for precision in ALL {
        let packed = pack_weights(layer.clone(), precision);
        let [clean, spoiled] = [&x, &bad].map(|x| values(&packed.forward(x.clone()).output));
        for (token, (a, b)) in clean.chunks(16).zip(spoiled.chunks(16)).enumerate() {
            assert!(if token == 2 { b.iter().all(|v| v.is_nan()) } else { a == b }, "{precision:?}: token {token}");
        }
    }
}

#[test]
fn other_tools_on_packed_weights_are_refused_or_get_plain_ones() {
    let device = Device::flex();
    let x = || numbers::<2>([20, 16], 3, &device);
    let config = MoeFeedForwardConfig::new(16, 24, 4);
    let packed = pack_weights(config.init(&device), Precision::F32);
    let quantized = packed.clone().quantize_weights(&mut Quantizer::new(Calibration::MinMax, QuantScheme::default()));
    assert!(panic_of(|| quantized.forward(x())).contains("make them plain first, by `materialize`"));
    assert!(panic_of(|| packed.experts.clone().with_lora(&LoraOptions::new())).contains("packed weights take no adapter"));
    assert!(finite::check_finite_module(&packed).is_ok());
    // A dense model of which a sparse one is made.
    let dense = clip().dense();
    let (model, options) = (dense.init(&device), UpcycleOptions::default());
    let upcycled = |dense: &Clip| clip().init(&device).upcycle_from_dense(dense, &options).unwrap().model;
    let sparse = upcycled(&pack_weights(model.clone(), Precision::F32));
    assert!(sparse.vision.encoder.blocks[0].attention.query.weight.reparameterization::<PackedWeight>().is_none());
    for (found, expected) in embeddings(&sparse, 3).iter().zip(embeddings(&model, 3)) {
        assert!(error(&values(found), &values(&expected)) < 1e-5);
    }
}

#[test]
fn weights_that_cannot_be_stored_are_refused() {
    let mut mlp = MlpConfig::new(2, 3).init(&Device::flex());
    mlp.linear_in.weight = mlp.linear_in.weight.map(|weight| weight.slice_fill([0..1, 0..1], 1e5));
    let message = panic_of(|| {
        pack_weights(mlp, Precision::F16);
    });
    assert!(message.contains("1 of 6 values of the weight `linear_in.weight` are not finite, or too large for f16"), "{message}");
    let config = clip();
    let mut model = config.init(&Device::flex());
    let query = &mut model.text.encoder.blocks[0].attention.query.weight;
    *query = query.clone().map(|weight| weight.slice_fill([0..1, 0..2], -1e5));
    let folder = tempfile::tempdir().unwrap();
    ClipCheckpoint { model, config }.save_sparse(folder.path(), Precision::F32).unwrap();
    let options = LoadOptions::new().with_packed(Some(Precision::F16));
    let error = ClipCheckpoint::load_with(folder.path(), &options, &Device::flex()).unwrap_err().to_string();
    assert!(
        error.contains("`transformer.resblocks.0.attn.in_proj_weight` holds 2 values that are too large for weights packed as f16"),
        "{error}"
    );
}

fn loaded(folder: &tempfile::TempDir, packed: Option<Precision>) -> Clip {
    ClipCheckpoint::load_with(folder.path(), &LoadOptions::new().with_packed(packed), &Device::flex()).unwrap().model
}

#[test]
fn checkpoints_hold_weights_in_8_bits() {
    let config = clip();
    let (model, folder, again) = (config.init(&Device::flex()), tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let checkpoint = |model: &Clip| ClipCheckpoint { config: config.clone(), model: model.clone() };
    checkpoint(&model).save_sparse(folder.path(), Precision::Int8).unwrap();
    let packed = pack_weights(model.clone(), Precision::Int8);
    let embed = |model: &Clip| embeddings(model, 3).map(|x| values(&x));
    let near = |found: [Vec<f32>; 2], expected: [Vec<f32>; 2]| {
        found.iter().zip(&expected).for_each(|(a, b)| assert!(error(a, b) < 2e-5, "{}", error(a, b)));
    };
    near(embed(&loaded(&folder, None)), embed(&packed.clone().materialize()));
    near(embed(&loaded(&folder, Some(Precision::Int8))), embed(&packed));
    // What is written of a packed model are its weights, and they are not rounded once more.
    for model in [&packed, &loaded(&folder, None)] {
        checkpoint(model).save_sparse(again.path(), Precision::Int8).unwrap();
        let [first, second] = [&folder, &again].map(|folder| fs::read(folder.path().join("burn_moe_model.safetensors")).unwrap());
        let [first, second] = [&first, &second].map(|bytes| SafeTensors::deserialize(bytes).unwrap());
        for (name, tensor) in first.iter() {
            let other = second.tensor(name).unwrap();
            assert_eq!((tensor.dtype(), tensor.shape()), (other.dtype(), other.shape()));
            assert!(tensor.dtype() != Dtype::I8 || tensor.data() == other.data(), "{name}");
        }
        assert_eq!(first.iter().filter(|(_, tensor)| tensor.dtype() == Dtype::I8).count(), 16);
    }
    checkpoint(&packed).save_sparse(again.path(), Precision::F32).unwrap();
    near(embed(&loaded(&again, None)), embed(&packed.materialize()));
    // A tower alone out of it.
    let options = LoadOptions::new().with_packed(Some(Precision::Int8));
    let vision = VisionCheckpoint::load_with(folder.path(), &options, &Device::flex()).unwrap().model;
    assert!(vision.encoder.blocks[1].attention.output.weight.reparameterization::<PackedWeight>().is_some());
}

#[test]
fn scales_that_are_missing_or_do_not_fit_are_named() {
    let config = clip();
    let folder = tempfile::tempdir().unwrap();
    let checkpoint = ClipCheckpoint { model: config.init(&Device::flex()), config };
    checkpoint.save_sparse(folder.path(), Precision::Int8).unwrap();
    let file = folder.path().join("burn_moe_model.safetensors");
    let bytes = fs::read(&file).unwrap();
    let name = "transformer.resblocks.1.moe.experts.w_in.scale";
    let error_with = |change: &dyn Fn(TensorView) -> Option<TensorView<'static>>| {
        let tensors = SafeTensors::deserialize(&bytes).unwrap().tensors();
        let changed = tensors.into_iter().filter_map(|(key, tensor)| {
            let view = if key == name {
                change(tensor)?
            } else {
                TensorView::new(tensor.dtype(), tensor.shape().to_vec(), tensor.data()).unwrap()
            };
            Some((key, view))
        });
        fs::write(&file, safetensors::serialize(changed.collect::<Vec<_>>(), None).unwrap()).unwrap();
        ClipCheckpoint::load(folder.path(), &Device::flex()).unwrap_err().to_string()
    };
    let missing = error_with(&|_| None);
    assert!(missing.contains("missing") && missing.contains(name), "{missing}");
    let flat = error_with(&|_| Some(TensorView::new(Dtype::F32, vec![2], &[0; 8]).unwrap()));
    assert!(flat.contains(name) && flat.contains("[4, 96]") && flat.contains("[2]"), "{flat}");
    let integers = error_with(&|_| Some(TensorView::new(Dtype::I32, vec![4, 96], &[0; 4 * 4 * 96]).unwrap()));
    assert!(integers.contains(name) && integers.contains("I32"), "{integers}");
    // Others' formats have no such weights.
    let dense = ClipConfig::tiny();
    let checkpoint = ClipCheckpoint { model: dense.init(&Device::flex()), config: dense };
    for error in
        [checkpoint.save_open_clip(folder.path(), Precision::Int8), checkpoint.save_hugging_face(folder.path(), Precision::Int8)]
    {
        let error = error.unwrap_err().to_string();
        assert!(error.ends_with("has no place for weights in 8 bits: `save_sparse` writes them"), "{error}");
    }
}

/// The main job's dense model, and a sparse one of it, among drawings and labels that it was not trained on.
#[test]
fn a_trained_model_finds_as_much_with_weights_in_8_bits() {
    let device = Device::flex();
    let root = env!("CARGO_MANIFEST_DIR");
    let ClipCheckpoint { config, model } = ClipCheckpoint::load(format!("{root}/data/clip-emoji"), &device).unwrap();
    let sparse = SparseEncoderConfig::new().with_blocks(BlockSelection::EveryNth(1));
    let towers = SparseClipConfig::new().with_vision(Some(sparse.clone())).with_text(Some(sparse));
    let sparse = config.clone().sparse(towers).init(&device);
    let sparse = sparse.upcycle_from_dense(&model, &UpcycleOptions::default()).unwrap().model;
    // Without optimisation a part of the drawings.
    let count = if cfg!(debug_assertions) { 100 } else { usize::MAX };
    let pack = EmojiPack::open(format!("{root}/data/emoji")).unwrap();
    let set = pack.load(&[EmojiVendor::Twemoji], &Language::ALL, false).unwrap().select(|image| image < count);
    let set = set.with_preprocessing(model.vision.preprocessing);
    let tokenizer = ClipTokenizer::for_model(&model.text).unwrap();
    let texts: Vec<&String> = set.queries().map(|(_, caption)| &caption.text).collect();
    let tokens = tokenizer.tokenize(&texts[..200], config.text.context_length).tensor(&device);
    // One that the main job has trained, if its folder is named.
    let trained = env::var_os("BURN_MOE_SPARSE").map(|folder| ClipCheckpoint::load(folder, &device).unwrap().model);
    for model in [model, sparse].into_iter().chain(trained) {
        let packed = pack_weights(model.clone(), Precision::Int8);
        let embeddings = |model: &Clip| [model.vision.embedding(set.images(0..100, &device)), model.text.embedding(tokens.clone())];
        for (found, expected) in embeddings(&packed).into_iter().zip(embeddings(&model)) {
            let cosines = values(&(normalize(found) * normalize(expected)).sum_dim(1));
            let mean = cosines.iter().sum::<f32>() / cosines.len() as f32;
            let least = cosines.iter().copied().fold(1.0, f32::min);
            println!("cosine in the mean {mean}, least {least}");
            assert!(mean >= 0.999, "{mean}");
        }
        let recall = |model: &Clip| {
            evaluate(model, &set, &tokenizer, config.text.context_length, None, &device).unwrap().retrieval.text_to_image.r1
        };
        let (found, expected) = (recall(&packed), recall(&model));
        println!("recall {found}, with plain weights {expected}");
        assert!((found - expected).abs() <= if cfg!(debug_assertions) { 0.01 } else { 0.003 }, "{found} and {expected}");
    }
}
