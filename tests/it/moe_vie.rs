//! MoE-ViE: its checkpoint, and the towers that it needs.

use std::{collections::BTreeMap, fs, path::PathBuf};

use burn::module::{Module, ModuleMapper, ModuleVisitor, Param};
use burn::tensor::{Device, Gradients, Int, Tensor};
use burn_moe::{
    Activation, BalancingOptions, BalancingRule, FeedForwardForm, GateNormalization, LoraOptions, MoeFeedForward, Precision,
    TokenChoiceConfig, UpcycleFromDense, UpcycleOptions,
    clip::{
        Clip, ClipConfig, ImageEmbedder, ImagePreprocessing, Pooling, ResizeMode, RetrievalMetrics, SparseClipConfig, TextConfig,
        TextEmbedder, TokenizerKind, VisionConfig, VisionTower,
        checkpoint::{ClipCheckpoint, LoadOptions, TextCheckpoint, VisionCheckpoint},
        contrastive_loss,
        preprocess::ImagePreprocessor,
    },
    kernels::{Kernels, with_kernels},
    pack_weights,
    transformer::{EncoderConfig, FeedForward, RotaryPositions, RoutedLayerConfig, SparseEncoderConfig, SparseLayer},
    upcycle::{Probe, Rest, RouterStart, UpcycleFromMany, UpcycleManyOptions},
};
use safetensors::{Dtype, SafeTensors, tensor::TensorView};

use super::{
    edge_cases::panic_of,
    support::{ROOT, largest_difference, numbers, values},
};

fn fixture(name: &str) -> PathBuf {
    PathBuf::from(ROOT).join("tests/fixtures/moevie").join(name)
}

fn load() -> ClipCheckpoint {
    ClipCheckpoint::load(fixture(""), &Device::default()).unwrap()
}

/// Every parameter by its path.
fn parameters<M: Module>(module: &M) -> BTreeMap<String, Vec<f32>> {
    struct Reader(Vec<String>, BTreeMap<String, Vec<f32>>);
    impl ModuleVisitor for Reader {
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
    let mut reader = Reader(Vec::new(), BTreeMap::new());
    module.visit(&mut reader);
    reader.1
}

/// A folder with the fixture's files of these names, after `edit` has changed the configuration.
fn folder(weights: &[&str], edit: impl Fn(&mut serde_json::Value)) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    for name in weights {
        fs::copy(fixture(name), folder.path().join(name)).unwrap();
    }
    let mut config = serde_json::from_str(&fs::read_to_string(fixture("moevie_config.json")).unwrap()).unwrap();
    edit(&mut config);
    fs::write(folder.path().join("moevie_config.json"), config.to_string()).unwrap();
    folder
}

#[test]
fn both_forms_of_the_checkpoint_are_the_same_model() {
    let safetensors = load();
    let pickled = folder(&["model.pt"], |_| ());
    let pickled = ClipCheckpoint::load(pickled.path(), &Device::default()).unwrap();
    assert_eq!(parameters(&pickled.model), parameters(&safetensors.model));

    let ClipConfig { vision, text, embed_dim, .. } = &safetensors.config;
    assert_eq!((*embed_dim, vision.encoder.d_ff, text.encoder.d_ff), (24, 85, 42));
    let preprocessing = ImagePreprocessing::new().with_mean([0.5; 3]).with_std([0.5; 3]).with_resize_mode(ResizeMode::Squash);
    assert_eq!((vision.preprocessing, text.tokenizer), (preprocessing, TokenizerKind::Other));
    let sparse = vision.encoder.sparse.as_ref().unwrap();
    assert_eq!((sparse.num_experts, sparse.d_ff, sparse.bias), (7, Some(43), false));
    assert_eq!(safetensors.config.cost().params_total, safetensors.model.num_params() as u64);
    let FeedForward::Moe(layer) = &safetensors.model.vision.encoder.blocks[1].feed_forward else { panic!("block 1 is sparse") };
    let balancing = layer.router.balancing.as_ref().unwrap();
    assert_eq!((balancing.rate, balancing.rule), (0.0, BalancingRule::ZScore));
    assert!(values(&layer.router.balancing_bias.as_ref().unwrap().val()).iter().any(|bias| *bias != 0.0));
}

#[test]
fn it_is_saved_in_our_format_and_comes_back_to_the_bit() {
    let device = Device::default();
    let checkpoint = load();
    let ours = tempfile::tempdir().unwrap();
    checkpoint.save_sparse(ours.path(), Precision::F32).unwrap();
    let back = ClipCheckpoint::load(ours.path(), &device).unwrap();
    assert_eq!(format!("{}", back.config), format!("{}", checkpoint.config));
    assert_eq!(parameters(&back.model), parameters(&checkpoint.model));
    let images = || numbers([2, 3, 32, 32], 5, &device);
    let [found, expected] = [&back, &checkpoint].map(|checkpoint| values(&checkpoint.model.vision.embedding(images())));
    assert_eq!(found, expected);

    // Towers alone, from both formats.
    for path in [fixture(""), ours.path().to_path_buf()] {
        let vision = VisionCheckpoint::load(&path, None, &device).unwrap();
        assert_eq!(parameters(&vision.model), parameters(&checkpoint.model.vision));
        let text = TextCheckpoint::load(&path, &device).unwrap();
        assert_eq!(parameters(&text.model), parameters(&checkpoint.model.text));
        let alone = tempfile::tempdir().unwrap();
        vision.save_sparse(alone.path(), Precision::F32).unwrap();
        let vision = VisionCheckpoint::load(alone.path(), None, &device).unwrap();
        assert_eq!(parameters(&vision.model), parameters(&checkpoint.model.vision));
    }
    let error = checkpoint.save_open_clip(ours.path(), Precision::F32).unwrap_err().to_string();
    assert_eq!(error, "open_clip's format has no place for sparse blocks");

    // In 8 bits, plain and packed.
    #[cfg(feature = "flex")]
    {
        checkpoint.save_sparse(ours.path(), Precision::Int8).unwrap();
        let plain = ClipCheckpoint::load(ours.path(), &device).unwrap();
        let options = LoadOptions::new().with_packed(Some(Precision::F32));
        for path in [fixture(""), ours.path().to_path_buf()] {
            let expected = if path == fixture("") { &checkpoint.model } else { &plain.model };
            let packed = ClipCheckpoint::load_with(&path, &options, &device).unwrap().model;
            let difference =
                largest_difference(&values(&packed.vision.embedding(images())), &values(&expected.vision.embedding(images())));
            assert!(difference < 1e-5, "{difference}");
        }
    }
}

#[test]
fn what_other_formats_have_no_place_for_is_named() {
    let device = Device::default();
    let encoder = || EncoderConfig::new(8, 2, 2, 16);
    let text = TextConfig::new(encoder()).with_vocab_size(50).with_context_length(6);
    let plain = ClipConfig::new(VisionConfig::new(encoder(), 8, 4), text, 10);
    let with = |edit: fn(&mut ClipConfig)| {
        let mut config = plain.clone();
        edit(&mut config);
        ClipCheckpoint { model: config.init(&device), config }
    };
    for (checkpoint, what) in [
        (with(|c| c.text.encoder.form = FeedForwardForm::Gated), "gated feed-forward networks"),
        (with(|c| c.vision.encoder.rotary = Some(RotaryPositions::new())), "rotary positions"),
        (with(|c| c.vision.pooling = Pooling::Attention { n_heads: 2 }), "attention pooling"),
        (with(|c| c.vision.position_table = false), "a vision tower without a table of positions"),
        (with(|c| c.vision.norm_pre = false), "a vision tower without a norm before its blocks"),
        (with(|c| c.vision.norm_post = false), "a tower without a norm behind its blocks"),
        (with(|c| c.text.norm_final = false), "a tower without a norm behind its blocks"),
    ] {
        let folder = tempfile::tempdir().unwrap();
        let error = checkpoint.save_open_clip(folder.path(), Precision::F32).unwrap_err().to_string();
        assert_eq!(error, format!("open_clip's format has no place for {what}"));
        let error = checkpoint.save_hugging_face(folder.path(), Precision::F32).unwrap_err().to_string();
        assert_eq!(error, format!("Hugging Face's format has no place for {what}"));
        // Ours has, and counts them.
        checkpoint.save_sparse(folder.path(), Precision::F32).unwrap();
        let back = ClipCheckpoint::load(folder.path(), &device).unwrap();
        assert_eq!(parameters(&back.model), parameters(&checkpoint.model));
        assert_eq!(back.config.cost().params_total, back.model.num_params() as u64);
    }
}

#[test]
fn what_would_change_the_result_is_refused_by_name() {
    let error = |edit: fn(&mut serde_json::Value)| {
        let folder = folder(&["model.safetensors"], edit);
        ClipCheckpoint::load(folder.path(), &Device::default()).unwrap_err().to_string()
    };
    let end = |text: String, end: &str| assert!(text.ends_with(end), "{text}");
    end(error(|c| c["vision_cfg"]["window_size"] = 2.into()), "`vision_cfg.window_size` = 2 is not supported");
    let why = "is not supported: only models are in which each block looks at all patches, with -1";
    end(error(|c| c["vision_cfg"]["global_layers"] = 2.into()), &format!("`vision_cfg.global_layers` = 2 {why}"));
    end(
        error(|c| drop(c["vision_cfg"].as_object_mut().unwrap().remove("global_layers"))),
        &format!("`vision_cfg.global_layers` = nothing {why}"),
    );
    end(error(|c| c["text_cfg"]["heads"] = 3.into()), "`n_heads` (3) must divide `d_model` (16)");
    end(
        error(|c| c["vision_cfg"]["head_width"] = 2.into()),
        "`d_model / n_heads` is 2: rotary positions turn pairs of numbers by column and by row: heads need an even width of at least 4",
    );
    // Names and shapes say what is not as it should be.
    let text = error(|c| c["vision_cfg"]["use_ln_post"] = true.into());
    assert!(text.contains("missing tensors: 2 (`visual.ln_post.bias`, `visual.ln_post.weight`)"), "{text}");
    end(error(|c| c["vision_cfg"]["gpu_align"] = true.into()), "should be [96, 32], but is [85, 32]");

    // Frequencies of another base, and those of this one in 16 bits.
    let bytes = fs::read(fixture("model.safetensors")).unwrap();
    let stored = SafeTensors::deserialize(&bytes).unwrap();
    let name = "visual.transformer.resblocks.0.attn.attn.rope.freqs";
    let with_frequencies = |dtype, data: Vec<u8>| {
        let folder = folder(&[], |_| ());
        let tensors = stored.tensors().into_iter().filter(|(key, _)| key != name || !data.is_empty()).map(|(key, view)| {
            let own = key == name;
            let (dtype, data) = if own { (dtype, data.as_slice()) } else { (view.dtype(), view.data()) };
            (key, TensorView::new(dtype, view.shape().to_vec(), data).unwrap())
        });
        safetensors::serialize_to_file(tensors, None, &folder.path().join("model.safetensors")).unwrap();
        ClipCheckpoint::load(folder.path(), &Device::default()).map(|_| ()).map_err(|error| error.to_string())
    };
    let f32s = |values: [f32; 2]| values.iter().flat_map(|value| value.to_le_bytes()).collect::<Vec<u8>>();
    let expected =
        format!("`{name}` is not the frequencies of rotary positions with the base 10,000: the model would compute something else");
    end(with_frequencies(Dtype::F32, f32s([1.0, 0.02])).unwrap_err(), &expected);
    assert_eq!(with_frequencies(Dtype::F32, f32s([1.0, 0.01])), Ok(()));
    // 0.01 in bf16 is 0x3c24.
    assert_eq!(with_frequencies(Dtype::BF16, vec![0x80, 0x3f, 0x24, 0x3c]), Ok(()));
    assert_eq!(with_frequencies(Dtype::F32, Vec::new()), Ok(()));
}

#[test]
fn settings_of_no_effect_and_left_out_ones_are_as_in_their_code() {
    let device = Device::default();
    let same = folder(&["model.safetensors"], |config| {
        config["quick_gelu"] = true.into();
        config["vision_cfg"]["pool_type"] = "avg".into();
        config["vision_cfg"]["final_ln_after_pool"] = true.into();
        config["vision_cfg"]["image_size"] = [32, 32].into();
        config["vision_cfg"]["global_layers"] = 3.into();
        // What names no block is no block.
        config["vision_cfg"]["moe_layers"] = [2, 1, 7, -1].into();
        config["text_cfg"]["mlp_ratio"] = 4.into();
    });
    let found = ClipCheckpoint::load(same.path(), &device).unwrap();
    assert_eq!(parameters(&found.model), parameters(&load().model));
    let images = || numbers([2, 3, 32, 32], 5, &device);
    assert_eq!(values(&found.model.vision.embedding(images())), values(&load().model.vision.embedding(images())));
    // Without a size, 224.
    let unsized_ = folder(&["model.safetensors"], |c| drop(c["vision_cfg"].as_object_mut().unwrap().remove("image_size")));
    assert_eq!(ClipCheckpoint::read_config(unsized_.path()).unwrap().vision.image_size, 224);
    // Rotary positions need no table: another size is a matter of the images alone.
    let options = LoadOptions::new().with_image_size(Some(48));
    let large = ClipCheckpoint::load_with(fixture(""), &options, &device).unwrap();
    assert_eq!(parameters(&large.model), parameters(&load().model));
    assert_eq!(large.model.vision.embedding(numbers([1, 3, 48, 48], 5, &device)).dims(), [1, 24]);
}

/// Two experts of four halves less one: one to choose from three, with the gate 1.
#[test]
fn a_single_choice_has_the_gate_one() {
    let device = Device::default();
    let folder = folder(&[], |config| {
        config["vision_cfg"]["k"] = 1.into();
        config["vision_cfg"]["num_of_expert"] = 2.into();
    });
    let config = ClipCheckpoint::read_config(folder.path()).unwrap();
    let SparseLayer::Routed(routed) = &config.vision.encoder.sparse.as_ref().unwrap().layer else { panic!("routed") };
    let burn_moe::AssignmentConfig::TokenChoice(choice) = &routed.assignment else { panic!("token choice") };
    assert_eq!((choice.top_k, choice.gate_normalization), (1, GateNormalization::ConstantOne));
    let model = config.vision.init(8, &device);
    let output = model.forward(numbers([2, 3, 32, 32], 5, &device));
    assert!(output.routings.iter().all(|routing| values(&routing.plan.gates()).iter().all(|gate| *gate == 1.0)));
    let error = TokenChoiceConfig::new().with_gate_normalization(GateNormalization::ConstantOne).validate(4).unwrap_err();
    assert!(error.to_string().starts_with("`top_k` is 2: `ConstantOne` is the gate of a single choice"));
}

/// A small one, with heads of 6 of which 2 numbers are not turned.
fn tower() -> VisionConfig {
    let encoder = EncoderConfig::new(12, 2, 2, 10)
        .with_form(FeedForwardForm::Gated)
        .with_activation(Activation::Silu)
        .with_rotary(Some(RotaryPositions::new()));
    VisionConfig::new(encoder, 6, 2)
        .with_class_token(false)
        .with_position_table(false)
        .with_norm_pre(false)
        .with_pooling(Pooling::Attention { n_heads: 3 })
}

fn small_clip() -> ClipConfig {
    let text = EncoderConfig::new(8, 2, 2, 10).with_form(FeedForwardForm::Gated).with_activation(Activation::Silu);
    ClipConfig::new(tower(), TextConfig::new(text).with_vocab_size(50).with_context_length(6).with_norm_final(false), 7)
}

/// The module with the same numbers in each run, around one for the scales of norms.
fn with_numbers<M: Module>(module: M, device: &Device) -> M {
    struct Put<'a>(u64, Vec<String>, &'a Device);
    impl ModuleMapper for Put<'_> {
        fn enter_module(&mut self, name: &str, _: &str) {
            self.1.push(name.to_string());
        }
        fn exit_module(&mut self, _: &str, _: &str) {
            self.1.pop();
        }
        fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
            self.0 += 1;
            let middle = if self.1.last().is_some_and(|name| name == "gamma") { 1.0 } else { 0.0 };
            let numbers = numbers(param.shape().dims::<D>(), self.0, self.2) * 0.5 + middle;
            param.map(|_| numbers.detach().require_grad())
        }
    }
    module.map(&mut Put(0, Vec::new(), device))
}

/// The vision tower in f64, number by number.
struct ByHand(BTreeMap<String, Vec<f64>>);

type Rows = Vec<Vec<f64>>;

impl ByHand {
    fn linear(&self, name: &str, x: &Rows) -> Rows {
        let (weight, bias) = (&self.0[&format!("{name}.weight")], self.0.get(&format!("{name}.bias")));
        let d_out = weight.len() / x[0].len();
        let row = |x: &Vec<f64>| {
            let column = |j: usize| {
                let sum: f64 = x.iter().enumerate().map(|(i, x)| x * weight[i * d_out + j]).sum();
                sum + bias.map_or(0.0, |bias| bias[j])
            };
            (0..d_out).map(column).collect()
        };
        x.iter().map(row).collect()
    }

    fn norm(&self, name: &str, x: &Rows) -> Rows {
        let (gamma, beta) = (&self.0[&format!("{name}.gamma")], &self.0[&format!("{name}.beta")]);
        let row = |x: &Vec<f64>| {
            let mean = x.iter().sum::<f64>() / x.len() as f64;
            let variance = x.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / x.len() as f64;
            let scale = 1.0 / (variance + 1e-5).sqrt();
            x.iter().zip(gamma).zip(beta).map(|((x, gamma), beta)| (x - mean) * scale * gamma + beta).collect()
        };
        x.iter().map(row).collect()
    }

    /// Queries of some tokens look at all keys.
    fn look(queries: &Rows, keys: &Rows, values: &Rows, heads: usize) -> Rows {
        let width = keys[0].len() / heads;
        let of = |query: &Vec<f64>| {
            let head = |head: usize| {
                let range = head * width..(head + 1) * width;
                let score = |key: &Vec<f64>| {
                    let sum: f64 = query[range.clone()].iter().zip(&key[range.clone()]).map(|(q, k)| q * k).sum();
                    (sum / (width as f64).sqrt()).exp()
                };
                let scores: Vec<f64> = keys.iter().map(score).collect();
                let total: f64 = scores.iter().sum();
                range
                    .clone()
                    .map(|j| scores.iter().zip(values).map(|(score, value)| score / total * value[j]).sum::<f64>())
                    .collect::<Vec<f64>>()
            };
            (0..heads).flat_map(head).collect()
        };
        queries.iter().map(of).collect()
    }

    /// Heads of 6: pair 0 by column, pair 1 by row, each with the frequency 1.
    fn turned(x: Rows, columns: usize) -> Rows {
        let turn = |(place, mut x): (usize, Vec<f64>)| {
            for head in x.chunks_exact_mut(6) {
                for (pair, cell) in [place % columns, place / columns].into_iter().enumerate() {
                    let (sin, cos) = ((cell + 1) as f64).sin_cos();
                    let (a, b) = (head[2 * pair], head[2 * pair + 1]);
                    (head[2 * pair], head[2 * pair + 1]) = (a * cos - b * sin, b * cos + a * sin);
                }
            }
            x
        };
        x.into_iter().enumerate().map(turn).collect()
    }

    /// Of one image, `[3, 6, 6]`.
    fn embed(&self, image: &[f64]) -> Vec<f64> {
        let add =
            |a: &Rows, b: &Rows| -> Rows { a.iter().zip(b).map(|(a, b)| a.iter().zip(b).map(|(a, b)| a + b).collect()).collect() };
        let patch = |place: usize| {
            let (left, top) = (place % 3 * 2, place / 3 * 2);
            let pixel = |i: usize| image[i / 4 * 36 + (top + i / 2 % 2) * 6 + left + i % 2];
            (0..12).map(pixel).collect()
        };
        let mut x = self.linear("patch_embedding", &(0..9).map(patch).collect());
        for block in 0..2 {
            let name = |part: &str| format!("encoder.blocks.{block}.{part}");
            let normed = self.norm(&name("norm_attention"), &x);
            let [query, key, value] =
                ["query", "key", "value"].map(|part| self.linear(&name(&format!("attention.{part}")), &normed));
            let seen = Self::look(&Self::turned(query, 3), &Self::turned(key, 3), &value, 2);
            x = add(&x, &self.linear(&name("attention.output"), &seen));
            let normed = self.norm(&name("norm_feed_forward"), &x);
            let [gate, up] =
                ["linear_gate", "linear_in"].map(|map| self.linear(&name(&format!("feed_forward.Dense.{map}")), &normed));
            let silu = |gate: f64| gate / (1.0 + (-gate).exp());
            let hidden =
                gate.iter().zip(&up).map(|(gate, up)| gate.iter().zip(up).map(|(gate, up)| silu(*gate) * up).collect()).collect();
            x = add(&x, &self.linear(&name("feed_forward.Dense.linear_out"), &hidden));
        }
        let x = self.norm("norm_post", &x);
        let query = self.linear("pooling.attention.query", &vec![self.0["pooling.probe"].clone()]);
        let [key, value] = ["key", "value"].map(|part| self.linear(&format!("pooling.attention.{part}"), &x));
        let seen = self.linear("pooling.attention.output", &Self::look(&query, &key, &value, 3));
        let hidden = self.linear("pooling.mlp.linear_in", &self.norm("pooling.norm", &seen));
        let hidden = hidden.into_iter().map(|row| row.into_iter().map(gelu).collect()).collect();
        let pooled = add(&seen, &self.linear("pooling.mlp.linear_out", &hidden));
        self.linear("projection", &pooled).remove(0)
    }
}

/// `x · Φ(x)`, with the error function as a series.
fn gelu(x: f64) -> f64 {
    let z = x / 2f64.sqrt();
    let (mut term, mut sum) = (z, z);
    for n in 1..200 {
        term *= -z * z / n as f64;
        sum += term / (2 * n + 1) as f64;
    }
    0.5 * x * (1.0 + sum * 2.0 / std::f64::consts::PI.sqrt())
}

fn gradients_of<M: Module>(module: &M, found: &Gradients) -> BTreeMap<String, Vec<f32>> {
    struct Reader<'a>(Vec<String>, &'a Gradients, BTreeMap<String, Vec<f32>>);
    impl ModuleVisitor for Reader<'_> {
        fn enter_module(&mut self, name: &str, _: &str) {
            self.0.push(name.to_string());
        }
        fn exit_module(&mut self, _: &str, _: &str) {
            self.0.pop();
        }
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
            let path = self.0.join(".");
            let gradient = param.val().grad(self.1).unwrap_or_else(|| panic!("no gradient of {path}"));
            self.2.insert(path, values(&gradient));
        }
    }
    let mut reader = Reader(Vec::new(), found, BTreeMap::new());
    module.visit(&mut reader);
    reader.2
}

#[test]
fn a_tower_and_its_gradients_are_those_of_the_formulas() {
    let device = Device::default().autodiff();
    let model: VisionTower = with_numbers(tower().init(7, &device), &device);
    let by_hand = |model: &VisionTower| {
        ByHand(parameters(model).into_iter().map(|(path, values)| (path, values.into_iter().map(f64::from).collect())).collect())
    };
    let images = numbers([2, 3, 6, 6], 9, &device);
    let pixels: Vec<f64> = values(&images).into_iter().map(f64::from).collect();
    let cotangent = numbers([2, 7], 10, &device);
    let weights: Vec<f64> = values(&cotangent).into_iter().map(f64::from).collect();
    let mut hand = by_hand(&model);
    let all = |hand: &ByHand| -> Vec<f64> { pixels.chunks_exact(108).flat_map(|image| hand.embed(image)).collect() };
    let loss = |hand: &ByHand| all(hand).iter().zip(&weights).map(|(a, b)| a * b).sum::<f64>();
    let expected = all(&hand);
    // The kernel of short samples, plain operations, and what embeds without a gradient.
    let mut found = Vec::new();
    for kernels in [Kernels::Fastest, Kernels::Reference] {
        with_kernels(kernels, || {
            let embedding = model.forward(images.clone()).embedding;
            for embedding in [embedding.clone(), model.valid().embedding(images.clone().inner())] {
                for (found, expected) in values(&embedding).iter().zip(&expected) {
                    assert!((f64::from(*found) - expected).abs() < 1e-5, "{kernels:?}: {found} instead of {expected}");
                }
            }
            found.push(gradients_of(&model, &(embedding * cotangent.clone()).sum().backward()));
        });
    }
    let paths: Vec<String> = hand.0.keys().cloned().collect();
    assert_eq!(paths.len(), 2 * 18 + 15 + 4, "{paths:?}");
    let largest_of = |path: &String| found[0][path].iter().fold(0f32, |max, x| max.max(x.abs()));
    let most = paths.iter().map(largest_of).fold(0f32, f32::max);
    for path in paths {
        let count = hand.0[&path].len();
        // A bias of all keys changes no attention: what is found for it is rounding.
        let largest = largest_of(&path).max(0.01 * most);
        // The first and the last numbers, and some between.
        for place in (0..count).step_by((count / 5).max(1)).chain([count - 1]) {
            let step = 1e-5;
            let mut moved = |by: f64| {
                hand.0.get_mut(&path).unwrap()[place] += by;
                loss(&hand)
            };
            let (up, down) = (moved(step), moved(-2.0 * step));
            moved(step);
            let expected = (up - down) / (2.0 * step);
            for found in &found {
                let error = (f64::from(found[&path][place]) - expected).abs() / f64::from(largest);
                assert!(error < 1e-4, "{path}[{place}]: {} instead of {expected}", found[&path][place]);
            }
        }
    }
}

#[test]
fn patches_that_are_kept_keep_their_places() {
    let device = Device::default();
    for (class_token, position_table) in [(false, false), (false, true), (true, true), (true, false)] {
        let config = tower().with_class_token(class_token).with_position_table(position_table);
        let model = config.init(7, &device);
        assert_eq!(config.cost(7).params_total, model.num_params() as u64);
        let images = numbers([2, 3, 6, 6], 9, &device);
        let order = Tensor::<2, Int>::from_data([[8, 0, 7, 1, 6, 2, 5, 3, 4], [0, 1, 2, 3, 4, 5, 6, 8, 7]], &device);
        let whole = values(&model.forward(images.clone()).embedding);
        assert!(largest_difference(&values(&model.forward_patches(images.clone(), order).embedding), &whole) < 1e-5);
        assert!(largest_difference(&values(&model.embedding(images.clone())), &whole) < 1e-5);
        // Others than the first ones are others.
        let some = |cells: [i32; 3]| {
            let cells = Tensor::<2, Int>::from_data([cells, cells], &device);
            values(&model.forward_patches(images.clone(), cells).embedding)
        };
        assert!(largest_difference(&some([0, 4, 8]), &some([8, 4, 0])) < 1e-5);
        assert!(largest_difference(&some([0, 4, 8]), &some([0, 1, 2])) > 1e-4);
    }
    // A class token that is the embedding: the last block for it alone.
    let config = tower().with_class_token(true).with_pooling(Pooling::ClassToken);
    for kernels in [Kernels::Fastest, Kernels::Reference] {
        with_kernels(kernels, || {
            let (model, images) = (config.init(7, &device), numbers([2, 3, 6, 6], 9, &device));
            let whole = values(&model.forward(images.clone()).embedding);
            assert!(largest_difference(&values(&model.embedding(images)), &whole) < 1e-5);
        });
    }
}

#[test]
fn options_that_do_not_go_together_are_named() {
    let text = |config: VisionConfig| config.validate().unwrap_err().to_string();
    let error = text(tower().with_pooling(Pooling::ClassToken));
    assert!(error.starts_with("`class_token` is refused: without a class token, the embedding needs another source"), "{error}");
    let error = text(tower().with_pooling(Pooling::Attention { n_heads: 5 }));
    assert_eq!(error, "`pooling.n_heads` (5) must divide `encoder.d_model` (12)");
    let config = TextConfig::new(tower().encoder);
    assert!(config.validate().unwrap_err().to_string().starts_with("`text.encoder.rotary` is refused: "));
    let device = Device::default();
    let encoder = tower().encoder.init(&device);
    let panic = panic_of(|| encoder.forward(numbers([1, 9, 12], 3, &device), Default::default(), false));
    assert!(panic.contains("rotary positions need to know where tokens are: set `TokenMarks::grid`"), "{panic}");
}

fn batch(device: &Device) -> (Tensor<4>, Tensor<2, Int>) {
    let tokens = [[48, 3, 4, 49, 0, 0], [48, 7, 49, 0, 0, 0], [48, 9, 8, 7, 6, 49]];
    (numbers([3, 3, 6, 6], 21, device), Tensor::from_data(tokens, device))
}

#[test]
fn dense_ones_are_upcycled_to_experts_of_their_form() {
    let device = Device::default();
    let dense = small_clip().init(&device);
    let (images, tokens) = batch(&device);
    let probe = || Probe::ImagesAndTexts { images: images.clone(), tokens: tokens.clone() };
    let options = UpcycleOptions::default().with_probe(probe());
    let config = small_clip().sparse(SparseClipConfig::clip_up());
    let sparse = config.init(&device).upcycle_from_dense(&dense, &options).unwrap();
    assert!(sparse.report.max_deviation.unwrap() < 1e-5, "{}", sparse.report);
    let FeedForward::Moe(layer) = &sparse.model.vision.encoder.blocks[1].feed_forward else { panic!("block 1 is sparse") };
    assert!(layer.experts.w_gate.is_some() && layer.experts.b_gate.is_some());
    // It is saved and comes back.
    let folder = tempfile::tempdir().unwrap();
    let checkpoint = ClipCheckpoint { config, model: sparse.model };
    checkpoint.save_sparse(folder.path(), Precision::F32).unwrap();
    let back = ClipCheckpoint::load(folder.path(), &device).unwrap().model;
    assert_eq!(parameters(&back), parameters(&checkpoint.model));
    // And back to a dense one.
    let loads = vec![vec![1.0; 8]];
    let again = checkpoint.model.vision.encoder.clone().to_dense(&loads).unwrap();
    let mut vision = checkpoint.model.vision;
    vision.encoder = again;
    let difference =
        largest_difference(&values(&vision.embedding(images.clone())), &values(&dense.vision.embedding(images.clone())));
    assert!(difference < 1e-5, "{difference}");

    // From several.
    let other = small_clip().init(&device);
    for rest in [Rest::First, Rest::Average] {
        let options = UpcycleManyOptions { rest, router: RouterStart::Centroids, probes: vec![probe(), probe()] };
        let sparse = small_clip().sparse(SparseClipConfig::clip_up()).init(&device);
        let upcycled = sparse.upcycle_from_many(&[&dense, &other], &options).unwrap();
        let layers = &upcycled.report.models;
        assert!(layers.iter().flat_map(|model| &model.layer_deviations).all(|deviation| *deviation < 1e-4), "{}", upcycled.report);
    }

    // What differs is named.
    let error = |edit: fn(&mut ClipConfig)| {
        let mut config = small_clip().sparse(SparseClipConfig::clip_up());
        edit(&mut config);
        config.init(&device).upcycle_from_dense(&dense, &UpcycleOptions::default()).unwrap_err().to_string()
    };
    let plain = error(|c| c.vision.encoder.sparse.as_mut().unwrap().form = Some(FeedForwardForm::Plain));
    assert_eq!(plain, "vision.encoder.blocks.1.feed_forward: `form` is Gated in the dense module and Plain in the sparse one");
    let plain = error(|c| c.vision.encoder.form = FeedForwardForm::Plain);
    assert_eq!(plain, "vision.encoder.blocks.0.feed_forward: `form` is Gated in the dense module and Plain in the sparse one");
    let bias = error(|c| c.text.encoder.sparse.as_mut().unwrap().bias = false);
    assert!(bias.contains("`b_in`: the dense module has a bias, the sparse one has no bias"), "{bias}");
    let heads = error(|c| c.vision.pooling = Pooling::Attention { n_heads: 4 });
    assert_eq!(heads, "vision: `heads of attention pooling` is Some(3) in the dense module and Some(4) in the sparse one");
    let rotary = error(|c| c.vision.encoder.rotary = Some(RotaryPositions::new().with_theta(100.0)));
    assert!(rotary.starts_with("vision.encoder.blocks.0: `rotary` is "), "{rotary}");
    let norm = error(|c| c.text.norm_final = true);
    assert_eq!(norm, "text: `norm_final` is false in the dense module and true in the sparse one");

    // Tokens alone have no places.
    let encoder = tower().encoder;
    let sparse = encoder.clone().with_sparse(Some(SparseEncoderConfig::new())).init(&device);
    let options = UpcycleOptions::default().with_probe(Probe::Tokens { tokens: numbers([1, 9, 12], 3, &device), valid: None });
    let error = sparse.upcycle_from_dense(&encoder.init(&device), &options).unwrap_err().to_string();
    assert!(error.contains("its blocks have rotary positions, and tokens alone have no places"), "{error}");
}

fn layers(model: &Clip) -> Vec<&MoeFeedForward> {
    let of = |block: &burn_moe::transformer::TransformerBlock| matches!(block.feed_forward, FeedForward::Moe(_));
    let blocks = model.vision.encoder.blocks.iter().filter(|block| of(block));
    blocks
        .map(|block| match &block.feed_forward {
            FeedForward::Moe(moe) => moe,
            _ => unreachable!("filtered"),
        })
        .collect()
}

#[test]
fn a_training_step_moves_the_balancing_bias_by_the_z_score() {
    let device = Device::default().autodiff();
    let mut model = ClipCheckpoint::load(fixture(""), &device).unwrap().model;
    let rate = 0.5;
    for block in &mut model.vision.encoder.blocks {
        if let FeedForward::Moe(moe) = &mut block.feed_forward {
            moe.router.balancing = moe.router.balancing.take().map(|balancing| BalancingOptions { rate, ..balancing });
        }
    }
    let tokens = Tensor::<2, Int>::from_data([[97, 3, 4, 98, 0, 0], [97, 7, 98, 0, 0, 0]], &device);
    let output = model.forward(numbers([2, 3, 32, 32], 5, &device), tokens);
    let gradients = contrastive_loss(output.logits_per_image.clone()).backward();
    // Everything in the blocks is trained, the shared expert as well; the choice has no gradient.
    for layer in layers(&model) {
        let shared = layer.shared_expert.as_ref().unwrap();
        for weight in [&layer.experts.w_in, shared.w_gate.as_ref().unwrap(), &shared.w_out] {
            let gradient = weight.val().grad(&gradients).unwrap();
            assert!(gradient.abs().max().into_scalar::<f32>() > 0.0);
        }
        assert!(layer.router.weight.val().grad(&gradients).is_some());
    }
    let bias = |model: &Clip| -> Vec<Vec<f32>> {
        layers(model).iter().map(|layer| values(&layer.router.balancing_bias.as_ref().unwrap().val())).collect()
    };
    let (before, loads) = (bias(&model), output.image_routings.clone());
    let model = model.update_balancing_bias(&output.image_routings, &output.text_routings);
    for ((before, after), routing) in before.iter().zip(bias(&model)).zip(&loads) {
        let load: Vec<f64> = routing.plan.requested().iter().map(|load| *load as f64).collect();
        assert_eq!(load.iter().sum::<f64>(), 2.0 * 16.0 * 3.0, "3 choices of every patch, none of a class token");
        let mean = load.iter().sum::<f64>() / load.len() as f64;
        let deviation = (load.iter().map(|load| (load - mean).powi(2)).sum::<f64>() / load.len() as f64).sqrt();
        for ((before, after), load) in before.iter().zip(after).zip(&load) {
            let expected = f64::from(*before) + rate * (mean - load) / deviation;
            assert!((f64::from(after) - expected).abs() < 1e-5, "{after} instead of {expected}");
        }
    }
}

#[test]
fn adapters_and_packed_weights_reach_every_map() {
    let device = Device::flex();
    let model = load().model;
    let (images, ids) = (numbers([2, 3, 32, 32], 5, &device), [[97, 3, 4, 98, 0, 0], [97, 7, 98, 0, 0, 0]]);
    let embed = |model: &Clip| {
        let tokens = Tensor::<2, Int>::from_data(ids, &device);
        [values(&model.vision.embedding(images.clone())), values(&model.text.embedding(tokens))].concat()
    };
    let packed = pack_weights(model.clone(), Precision::F32);
    assert!(largest_difference(&embed(&packed), &embed(&model)) < 1e-5);
    assert_eq!(parameters(&packed.clone().materialize()), parameters(&model));
    // One of the pooling, of a gate, and of experts.
    let rounded = pack_weights(model.clone(), Precision::BF16).materialize();
    let (rounded, plain) = (parameters(&rounded), parameters(&model));
    for path in [
        "vision.pooling.attention.key.weight",
        "vision.pooling.mlp.linear_in.weight",
        "vision.encoder.blocks.0.feed_forward.Dense.linear_gate.weight",
        "vision.encoder.blocks.1.feed_forward.Moe.shared_expert.w_gate",
    ] {
        assert_ne!(rounded[path], plain[path], "{path}");
    }

    let tuned = model.clone().with_lora(&LoraOptions::new().with_rank(2));
    assert!(largest_difference(&embed(&tuned), &embed(&model)) < 1e-5);
    let adapters: Vec<String> = parameters(&tuned).into_keys().filter(|path| path.ends_with(".lora.a")).collect();
    for part in ["pooling.attention.query.", "pooling.mlp.linear_out.", "linear_gate.", "shared_expert.w_gate"] {
        assert!(adapters.iter().any(|path| path.contains(part)), "{part}: {adapters:?}");
    }
}

#[test]
fn one_with_clips_tokenizer_embeds_files_and_texts_and_finds_them() {
    let device = Device::default();
    let mut config = small_clip();
    config.text = config.text.with_vocab_size(49408).with_context_length(144);
    let experts =
        SparseEncoderConfig::new().with_bias(false).with_layer(RoutedLayerConfig::new().with_shared_expert(Some(5)).into());
    let config = config.sparse(SparseClipConfig::new().with_vision(Some(experts)));
    let folder = tempfile::tempdir().unwrap();
    ClipCheckpoint { model: config.init(&device), config }.save_sparse(folder.path(), Precision::F32).unwrap();
    let ClipCheckpoint { config, model } = ClipCheckpoint::load(folder.path(), &device).unwrap();
    let files = ["rgb.png", "gray.png", "rgb.jpg"].map(|name| PathBuf::from(ROOT).join("tests/data/preprocess").join(name));
    let preprocessor = ImagePreprocessor::for_model(&config.vision);
    let images = ImageEmbedder::new(&model.vision, preprocessor, &device).images(files.to_vec(), |_| ());
    let long = vec!["word"; 140].join(" ");
    let texts = ["a cat", "two dogs on a beach", long.as_str()];
    let texts = TextEmbedder::new(&model.text, &device).unwrap().texts(&texts, |_| ());
    assert_eq!((images.skipped.len(), texts.truncated), (0, 0));
    let metrics = RetrievalMetrics::new(images.embeddings, texts.embeddings, &[0, 1, 2]).unwrap();
    assert_eq!(metrics.text_to_image.r5, 1.0);
    // The recorded one has ids of its own.
    let error = TextEmbedder::new(&load().model.text, &device).unwrap_err().to_string();
    assert!(error.contains("99"), "{error}");
}

#[test]
fn memory_counts_gates_and_pooling() {
    let gated = small_clip().memory(4);
    let mut config = small_clip();
    config.vision.encoder.form = FeedForwardForm::Plain;
    assert!(config.memory(4).training_activations < gated.training_activations);
    config.vision = config.vision.with_class_token(true).with_pooling(Pooling::ClassToken);
    assert!(config.memory(4).training_activations < gated.training_activations);
}
