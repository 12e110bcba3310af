//! What `tools/python/burn_moe_clip.py` reads: names that it knows, and checkpoints to try it on.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
};

use burn::module::{Module, Param};
use burn::nn::Linear;
use burn::tensor::{Device, Gradients, Int, Tensor};
use burn_moe::{
    Activation, AssignmentConfig, BalancingOptions, BalancingRule, Capacity, ExpertChoiceConfig, ExpertGroups, ExpertMlp,
    FeedForwardForm, FillOrder, GateNormalization, MoeFeedForward, RouterOptions, RouterScore, Routing, TokenChoiceConfig,
    TokenGroups,
    clip::{
        Clip, ClipConfig, EndOfText, ImagePreprocessing, Interpolation, Pooling, ResizeMode, TextConfig, TextTower, TokenizerKind,
        VisionConfig, VisionTower,
        checkpoint::{ClipCheckpoint, Precision, TextCheckpoint, Towers, VisionCheckpoint, towers_in},
        preprocess::ImagePreprocessor,
        tokenizer::ClipTokenizer,
    },
    transformer::{
        BlockSelection, Encoder, EncoderConfig, FeedForward, Padding, Protection, RotaryPositions, RoutedLayerConfig,
        SparseEncoderConfig, SparseLayer,
    },
};
use safetensors::{Dtype, SafeTensors, tensor::TensorView};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::support::{ROOT, numbers, values};

const CONFIG: &str = "burn_moe_config.json";
const WEIGHTS: &str = "burn_moe_model.safetensors";
/// Checkpoints that differ in their tensors; the others differ in what is computed with them.
const LAYOUTS: [&str; 11] = [
    "top-2",
    "shared-expert",
    "soft",
    "one-tower-dense",
    "int8",
    "image-tower-alone",
    "moe-vie",
    "dense-rotary",
    "clamped",
    "expert-groups",
    "int8-gated-blocks",
];

/// A checkpoint that `save_sparse` writes.
struct Case {
    name: &'static str,
    config: ClipConfig,
    /// What has the weights, if they are not drawn.
    fixture: Option<PathBuf>,
    precision: Precision,
    towers: Towers,
}

fn config(sparse: &SparseEncoderConfig) -> ClipConfig {
    let encoder = |d_model| EncoderConfig::new(d_model, 2, 2, 2 * d_model).with_sparse(Some(sparse.clone()));
    let text = TextConfig::new(encoder(12)).with_vocab_size(600).with_context_length(10);
    ClipConfig::new(VisionConfig::new(encoder(16), 16, 4), text, 6)
}

fn router() -> RouterOptions {
    // Far from ties, so that rounding decides nothing.
    RouterOptions::new().with_init_std(0.5)
}

/// The same capacity in training, so that gradients are those of inference.
fn token_choice(top_k: usize, capacity: Capacity) -> TokenChoiceConfig {
    TokenChoiceConfig::of_top_k(top_k).with_training_capacity(capacity).with_inference_capacity(capacity)
}

fn layer(assignment: impl Into<AssignmentConfig>) -> RoutedLayerConfig {
    RoutedLayerConfig::new().with_router(router()).with_assignment(assignment.into())
}

fn sparse(layer: impl Into<SparseLayer>) -> SparseEncoderConfig {
    // The first block too, so that what it makes of all tokens is in the embedding.
    SparseEncoderConfig::new().with_blocks(BlockSelection::EveryNth(1)).with_num_experts(4).with_layer(layer.into())
}

fn cases() -> Vec<Case> {
    let top_2 = || token_choice(2, Capacity::Dropless);
    let balancing =
        BalancingOptions::new(1e-3).with_rule(BalancingRule::ZScore).with_momentum(0.9).with_cap(Some(0.5)).with_warmup_steps(10);
    let biased = |balancing| router().with_score(RouterScore::Sigmoid).with_balancing(Some(balancing));
    let gated = |sparse: SparseEncoderConfig| sparse.with_form(Some(FeedForwardForm::Gated));
    let shared_expert = gated(sparse(
        layer(top_2().with_gate_normalization(GateNormalization::AfterDrop))
            .with_router(biased(balancing))
            .with_shared_expert(Some(5)),
    ))
    .with_d_ff(Some(7));
    let soft = || sparse(SparseLayer::Soft { slots_per_expert: 3 });
    let expert_choice = |capacity, groups| ExpertChoiceConfig::new().with_capacity(capacity).with_groups(groups);

    let mut one_tower_dense = config(&sparse(layer(top_2())).with_blocks(BlockSelection::List(vec![0])));
    one_tower_dense.vision.encoder.sparse = None;
    one_tower_dense.text = one_tower_dense.text.with_end_of_text(EndOfText::Id(7)).with_projection_bias(true);
    one_tower_dense.vision.encoder.activation = Activation::QuickGelu;
    let mut other_images = config(&sparse(layer(top_2())).with_blocks(BlockSelection::Last(1)));
    other_images.text.encoder.sparse = None;
    other_images.vision.encoder.norm_epsilon = 1e-3;
    other_images.vision.preprocessing = ImagePreprocessing::new()
        .with_mean([0.5; 3])
        .with_std([0.4, 0.5, 0.6])
        .with_resize_mode(ResizeMode::Squash)
        .with_interpolation(Interpolation::Bilinear)
        .with_resize_to(Some(20));
    let mut grey = config(&sparse(layer(top_2())));
    grey.vision = grey.vision.with_channels(1);

    let plain = [
        ("dense-rotary", dense_rotary()),
        ("gated-blocks", gated_blocks()),
        ("expert-groups", expert_groups(&biased(BalancingOptions::new(1e-3)))),
        // Limits that are reached.
        (
            "clamped",
            config(
                &sparse(layer(top_2()).with_router(router().with_bias(true)))
                    .with_form(Some(FeedForwardForm::ClampedGated { limit: 0.4, alpha: 1.702 })),
            )
            .activation(Activation::Silu),
        ),
        (
            "top-1-constant",
            config(&sparse(layer(
                token_choice(1, Capacity::Dropless).with_gate_normalization(GateNormalization::ConstantOne).with_gate_scale(0.7),
            ))),
        ),
        ("capacity-without-class-token", {
            let capacity = token_choice(2, Capacity::Fixed(5)).with_groups(TokenGroups::PerSample);
            let mut config = config(&sparse(layer(capacity)));
            config.vision = config.vision.with_class_token(false).with_pooling(Pooling::Attention { n_heads: 4 });
            config
        }),
        ("top-2", config(&sparse(layer(top_2())))),
        ("top-1", config(&sparse(layer(token_choice(1, Capacity::Dropless)))).activation(Activation::QuickGelu)),
        (
            "top-3-not-normalised",
            config(&sparse(layer(token_choice(3, Capacity::Dropless).with_gate_normalization(GateNormalization::None))))
                .activation(Activation::Relu),
        ),
        ("shared-expert", config(&shared_expert).activation(Activation::Silu)),
        (
            "normalised-logits",
            config(&gated(sparse(layer(top_2()).with_router(router().with_logit_normalization(Some(1.5))))))
                .activation(Activation::GeluTanh),
        ),
        (
            "capacity",
            config(&sparse(layer(token_choice(2, Capacity::OfBalancedLoad(0.6))).with_router(biased(BalancingOptions::new(1e-3))))),
        ),
        (
            "capacity-after-drop",
            config(&sparse(layer(token_choice(3, Capacity::OfTokens(1.1)).with_gate_normalization(GateNormalization::AfterDrop)))),
        ),
        (
            "capacity-token-major",
            config(&sparse(
                layer(
                    token_choice(2, Capacity::OfTokens(1.0))
                        .with_fill_order(FillOrder::TokenMajor)
                        .with_groups(TokenGroups::OfSize(7)),
                )
                .with_protection(Protection::None),
            )),
        ),
        (
            "capacity-batch-priority",
            config(&sparse(layer(token_choice(3, Capacity::Fixed(9)).with_fill_order(FillOrder::BatchPriority)))),
        ),
        (
            "capacity-of-sample",
            config(
                &sparse(layer(
                    token_choice(2, Capacity::Fixed(3))
                        .with_fill_order(FillOrder::BatchPriority)
                        .with_groups(TokenGroups::PerSample)
                        .with_gate_normalization(GateNormalization::None),
                ))
                .with_padding(Padding::Routed),
            ),
        ),
        ("expert-choice", config(&sparse(layer(expert_choice(Capacity::OfTokens(2.0), TokenGroups::Whole))))),
        (
            "expert-choice-of-groups",
            config(
                &sparse(
                    layer(expert_choice(Capacity::OfBalancedLoad(1.5), TokenGroups::OfSize(8)))
                        .with_router(router().with_score(RouterScore::Sigmoid)),
                )
                .with_padding(Padding::Routed),
            ),
        ),
        // All scores are equal.
        (
            "capacity-with-ties",
            config(&sparse(
                layer(token_choice(2, Capacity::OfBalancedLoad(0.7)).with_fill_order(FillOrder::BatchPriority))
                    .with_router(RouterOptions::new().with_init_std(0.0)),
            )),
        ),
        (
            "expert-choice-with-ties",
            config(&sparse(
                layer(expert_choice(Capacity::OfTokens(1.5), TokenGroups::PerSample))
                    .with_router(RouterOptions::new().with_init_std(0.0)),
            )),
        ),
        ("soft", config(&gated(soft()))),
        ("soft-with-padding", config(&soft().with_padding(Padding::Routed))),
        ("one-tower-dense", one_tower_dense),
        ("other-images", other_images),
        ("grey", grey),
    ];
    let case = |(name, config)| Case { name, config, fixture: None, precision: Precision::F32, towers: Towers::Both };
    let of = |name, sparse: &SparseEncoderConfig, precision, towers| Case { precision, towers, ..case((name, config(sparse))) };
    let moe_vie = Path::new(ROOT).join("tests/fixtures/moevie");
    let moe_vie_config = ClipCheckpoint::load(&moe_vie, &Device::default()).unwrap().config;
    let mut cases: Vec<Case> = plain.into_iter().map(case).collect();
    cases.extend([
        of("f16", &shared_expert, Precision::F16, Towers::Both),
        of("bf16", &shared_expert, Precision::BF16, Towers::Both),
        of("int8", &shared_expert, Precision::Int8, Towers::Both),
        of("int8-soft", &gated(soft()), Precision::Int8, Towers::Both),
        Case { precision: Precision::Int8, ..case(("int8-gated-blocks", gated_blocks())) },
        Case { fixture: Some(moe_vie), ..case(("moe-vie", moe_vie_config)) },
        of("image-tower-alone", &sparse(layer(top_2())), Precision::F32, Towers::Vision),
        of("text-tower-alone", &sparse(layer(top_2())), Precision::F32, Towers::Text),
    ]);
    cases
}

/// No experts. Heads of the image tower are 10 wide, of which rotary positions turn 8.
fn dense_rotary() -> ClipConfig {
    let encoder = |d_model| EncoderConfig::new(d_model, 2, 2, 2 * d_model).with_form(FeedForwardForm::Gated);
    let rotary = RotaryPositions::new().with_theta(100.0);
    let vision = VisionConfig::new(encoder(20).with_rotary(Some(rotary)), 16, 4).with_norm_pre(false);
    let text = TextConfig::new(encoder(12)).with_vocab_size(600).with_context_length(10).with_norm_final(false);
    ClipConfig::new(vision, text, 6)
}

/// A dense block and a sparse one in each tower, the experts of the image tower as its dense networks, the others plain. Patches know where they are
/// by rotary positions alone.
fn gated_blocks() -> ClipConfig {
    let own = sparse(layer(token_choice(2, Capacity::Dropless))).with_blocks(BlockSelection::EveryNth(2));
    let mut config = config(&own);
    config.text.encoder.sparse = Some(own.with_form(Some(FeedForwardForm::Plain)));
    for encoder in [&mut config.vision.encoder, &mut config.text.encoder] {
        (encoder.form, encoder.activation) = (FeedForwardForm::Gated, Activation::Silu);
    }
    config.vision.encoder.rotary = Some(RotaryPositions::new());
    config.vision = config.vision.with_position_table(false).with_norm_post(false).with_pooling(Pooling::Attention { n_heads: 4 });
    config
}

/// Two groups of two experts, of which a token may use one, and a shared expert with a gate; no biases.
fn expert_groups(router: &RouterOptions) -> ClipConfig {
    let choice =
        token_choice(2, Capacity::Dropless).with_expert_groups(Some(ExpertGroups { count: 2, per_token: 1 })).with_gate_scale(2.5);
    let layer = layer(choice).with_router(router.clone()).with_shared_expert(Some(5)).with_shared_expert_gate(true);
    config(&sparse(layer).with_form(Some(FeedForwardForm::Gated)).with_bias(false))
}

impl Case {
    fn model(&self, device: &Device) -> Clip {
        if let Some(folder) = &self.fixture {
            return ClipCheckpoint::load(folder, device).unwrap().model;
        }
        let mut model = self.config.init(device);
        for encoder in [&mut model.vision.encoder, &mut model.text.encoder] {
            move_biases(encoder, device);
        }
        model
    }

    fn save(&self, folder: &Path, device: &Device) {
        let model = self.model(device);
        let (Clip { vision, text, .. }, embed_dim) = (model.clone(), self.config.embed_dim);
        let written = match self.towers {
            Towers::Both => ClipCheckpoint { config: self.config.clone(), model }.save_sparse(folder, self.precision),
            Towers::Vision => VisionCheckpoint { config: self.config.vision.clone(), embed_dim, model: vision }
                .save_sparse(folder, self.precision),
            Towers::Text => {
                TextCheckpoint { config: self.config.text.clone(), embed_dim, model: text }.save_sparse(folder, self.precision)
            }
        };
        written.unwrap();
    }
}

/// As if some steps had been trained.
fn move_biases(encoder: &mut Encoder, device: &Device) {
    for (block, seed) in encoder.blocks.iter_mut().zip(20..) {
        let FeedForward::Moe(layer) = &mut block.feed_forward else { continue };
        let moved = |state: Option<Param<Tensor<1>>>| {
            state.map(|state| Param::from_tensor(numbers(state.shape().dims(), seed, device) * 0.3).set_require_grad(false))
        };
        let router = &mut layer.router;
        router.balancing_bias = moved(router.balancing_bias.take());
        router.balancing_momentum = moved(router.balancing_momentum.take());
        router.balancing_warmup = moved(router.balancing_warmup.take());
        router.bias = moved(router.bias.take()).map(|bias| bias.set_require_grad(true));
    }
}

/// Whether each gate is the same number, whatever the router says.
fn has_constant_gates(layer: &MoeFeedForward) -> bool {
    matches!(&layer.assignment, AssignmentConfig::TokenChoice(choice) if choice.gate_normalization == GateNormalization::ConstantOne)
}

/// What was written: settings of configurations, and tensors of the [`LAYOUTS`] with types and shapes.
#[derive(Debug, Default, PartialEq, Serialize, Deserialize)]
struct Names {
    config: BTreeSet<String>,
    tensors: BTreeMap<String, BTreeMap<String, String>>,
}

impl Names {
    fn add(&mut self, name: &str, folder: &Path) {
        let config = serde_json::from_slice(&fs::read(folder.join(CONFIG)).unwrap()).unwrap();
        self.add_settings("", &config);
        if LAYOUTS.contains(&name) {
            let bytes = fs::read(folder.join(WEIGHTS)).unwrap();
            let file = SafeTensors::deserialize(&bytes).unwrap();
            let about = |view: TensorView| format!("{:?} {:?}", view.dtype(), view.shape());
            let tensors = file.tensors().into_iter().map(|(name, view)| (name, about(view))).collect();
            self.tensors.insert(name.to_string(), tensors);
        }
    }

    /// Keys, and the names of variants, which are keys or strings.
    fn add_settings(&mut self, path: &str, value: &Value) {
        match value {
            Value::Object(map) => map.iter().for_each(|(key, value)| self.add_settings(&format!("{path}.{key}"), value)),
            Value::String(variant) => drop(self.config.insert(format!("{path}.{variant}"))),
            _ if path == ".version" => drop(self.config.insert(format!("{path} {value}"))),
            _ => drop(self.config.insert(path.to_string())),
        }
    }
}

#[test]
fn the_python_reader_knows_the_names_that_are_written() {
    let device = Device::default();
    let mut found = Names::default();
    for case in cases() {
        let folder = tempfile::tempdir().unwrap();
        case.save(folder.path(), &device);
        found.add(case.name, folder.path());
    }
    let advice = "the sparse checkpoint has changed: make tools/python/burn_moe_clip.py read it, add a case for what is new to tests/it/python.rs, \
                  and run tools/python/test_burn_moe_clip.py --write-names, which writes tests/data/sparse_names.json again";
    let known = fs::read_to_string(Path::new(ROOT).join("tests/data/sparse_names.json")).unwrap();
    let known: Names = serde_json::from_str(&known).unwrap();
    let difference: Vec<_> = found.config.symmetric_difference(&known.config).collect();
    assert!(difference.is_empty(), "{advice}. Settings: {difference:?}");
    for (name, found) in &found.tensors {
        let known = known.tensors.get(name);
        let difference: Vec<_> =
            found.iter().filter(|(tensor, about)| known.and_then(|known| known.get(*tensor)) != Some(about)).collect();
        assert!(difference.is_empty(), "{advice}. Tensors of `{name}`: {difference:?}");
    }
    assert!(found == known, "{advice}. Something is no longer written: {found:?}");

    let reader = fs::read_to_string(Path::new(ROOT).join("tools/python/burn_moe_clip.py")).unwrap();
    let parts: BTreeSet<&str> = known.config.iter().flat_map(|setting| setting.split(['.', ' ']).skip(1)).collect();
    let is_known = |part: &&&str| reader.contains(&format!("\"{part}\"")) || part.parse::<u64>().is_ok();
    let missing: Vec<_> = parts.iter().filter(|part| !is_known(part)).collect();
    assert!(missing.is_empty(), "burn_moe_clip.py does not name {missing:?}");
}

/// Tensors for a safetensors file.
#[derive(Default)]
struct Recorded(BTreeMap<String, (Dtype, Vec<usize>, Vec<u8>)>);

impl Recorded {
    fn add<const D: usize>(&mut self, name: &str, tensor: Tensor<D>) {
        let bytes = values(&tensor).into_iter().flat_map(f32::to_le_bytes).collect();
        self.0.insert(name.to_string(), (Dtype::F32, tensor.dims().to_vec(), bytes));
    }

    fn add_ids(&mut self, name: &str, ids: Tensor<2, Int>) {
        let bytes = ids.clone().try_into_vec_as::<i64>().unwrap().into_iter().flat_map(i64::to_le_bytes).collect();
        self.0.insert(name.to_string(), (Dtype::I64, ids.dims().to_vec(), bytes));
    }

    /// How many choices had no slot.
    fn add_dropped(&mut self, name: &str, routings: &[Routing]) {
        let dropped: usize =
            routings.iter().map(|routing| routing.plan.requested().iter().sum::<usize>() - routing.plan.num_rows()).sum();
        self.0.insert(name.to_string(), (Dtype::I64, vec![], (dropped as i64).to_le_bytes().to_vec()));
    }

    /// The gradient of a weight, if there is one, by the weight's name in the file.
    fn add_gradient<const D: usize>(&mut self, name: &str, weight: Option<&Param<Tensor<D>>>, gradients: &Gradients) {
        if let Some(weight) = weight {
            self.add(&format!("gradient.{name}"), weight.grad(gradients).unwrap());
        }
    }

    /// Those of an encoder's networks and attention.
    fn add_gradients(&mut self, blocks: &str, encoder: &Encoder, gradients: &Gradients) {
        for (index, block) in encoder.blocks.iter().enumerate() {
            let path = format!("{blocks}.{index}");
            let attention = [&block.attention.query, &block.attention.key, &block.attention.value];
            // The file has linear layers as `[out, in]`.
            let stored = |linear: &Linear| linear.weight.grad(gradients).unwrap().transpose();
            self.add(&format!("gradient.{path}.attn.in_proj_weight"), Tensor::cat(attention.map(stored).to_vec(), 0));
            let experts = match &block.feed_forward {
                FeedForward::Dense(mlp) => {
                    let maps = [("c_fc", Some(&mlp.linear_in)), ("c_gate", mlp.linear_gate.as_ref())];
                    for (name, linear) in maps.into_iter().filter_map(|(name, linear)| Some((name, linear?))) {
                        self.add(&format!("gradient.{path}.mlp.{name}.weight"), stored(linear));
                    }
                    continue;
                }
                FeedForward::Moe(layer) => {
                    // A gate that is always 1 moves no router.
                    if !has_constant_gates(layer) {
                        self.add_gradient(&format!("{path}.moe.router.weight"), Some(&layer.router.weight), gradients);
                    }
                    self.add_gradient(&format!("{path}.moe.router.bias"), layer.router.bias.as_ref(), gradients);
                    self.add_gradient(&format!("{path}.moe.shared_expert_gate"), layer.shared_expert_gate.as_ref(), gradients);
                    if let Some(shared) = &layer.shared_expert {
                        self.add_experts(&format!("{path}.moe.shared_expert"), shared, gradients);
                    }
                    &layer.experts
                }
                FeedForward::SoftMoe(layer) => {
                    self.add_gradient(&format!("{path}.moe.slots"), Some(&layer.slots), gradients);
                    &layer.experts
                }
            };
            self.add_experts(&format!("{path}.moe.experts"), experts, gradients);
        }
    }

    fn add_experts(&mut self, path: &str, experts: &ExpertMlp, gradients: &Gradients) {
        for (name, weight) in [("w_in", Some(&experts.w_in)), ("w_gate", experts.w_gate.as_ref()), ("w_out", Some(&experts.w_out))]
        {
            self.add_gradient(&format!("{path}.{name}"), weight, gradients);
        }
        for (name, bias) in [("b_in", &experts.b_in), ("b_gate", &experts.b_gate), ("b_out", &experts.b_out)] {
            self.add_gradient(&format!("{path}.{name}"), bias.as_ref(), gradients);
        }
    }

    fn add_images(&mut self, config: &VisionConfig, tower: &VisionTower, device: &Device) {
        let images = || numbers([5, config.channels, config.image_size, config.image_size], 1, device) * 2.0;
        let inference = tower.valid().forward(images().inner());
        let cotangent = numbers(inference.embedding.dims(), 2, device);
        self.add("images", images());
        self.add("image_features", inference.embedding);
        self.add_dropped("images_dropped", &inference.routings);
        let gradients = (tower.forward(images()).embedding * cotangent.clone()).sum().backward();
        self.add("image_cotangent", cotangent);
        self.add_gradient("visual.positional_embedding", tower.position_embedding.as_ref(), &gradients);
        self.add_gradient("visual.class_embedding", tower.class_embedding.as_ref(), &gradients);
        let patches = tower.patch_embedding.weight.grad(&gradients).unwrap().transpose();
        let shape = [config.encoder.d_model, config.channels, config.patch_size, config.patch_size];
        self.add("gradient.visual.conv1.weight", patches.reshape(shape));
        self.add_gradient("visual.attn_pool.probe", tower.pooling.as_ref().map(|pooling| &pooling.probe), &gradients);
        self.add_gradients("visual.transformer.resblocks", &tower.encoder, &gradients);
        if config.channels == 3 {
            let preprocessor = ImagePreprocessor::for_model(config);
            let path = Path::new(ROOT).join("tests/data/preprocess/rgb.png");
            self.add("rgb.png", preprocessor.tensor(&[preprocessor.open(path).unwrap()], device));
        }
    }

    fn add_texts(&mut self, config: &TextConfig, tower: &TextTower, device: &Device) {
        // Short and long ones, whose ends are 599 or 7; without such an end; with other ids behind it.
        let rows = [
            [598, 31, 599, 7, 7, 7, 7, 7, 7, 7],
            [598, 599, 0, 0, 0, 0, 0, 0, 0, 0],
            [598, 40, 41, 42, 43, 44, 45, 46, 47, 599],
            [598, 7, 599, 599, 12, 0, 0, 0, 0, 0],
            [598, 5, 7, 9, 0, 0, 0, 0, 0, 0],
        ];
        // Of a smaller vocabulary, the last two ids.
        let rows = rows.map(|row| row.map(|id| if id < 598 { id } else { id + config.vocab_size as i64 - 600 }));
        let padding = config.context_length - 10;
        let ids = || Tensor::<2, Int>::from_data(rows, device).pad((0, padding, 0, 0), 0);
        let inference = tower.valid().forward(ids().inner());
        let cotangent = numbers(inference.embedding.dims(), 3, device);
        self.add_ids("texts", ids());
        self.add("text_features", inference.embedding);
        self.add("short_text_features", tower.valid().forward(ids().inner().narrow(1, 0, 4)).embedding);
        self.add_dropped("texts_dropped", &inference.routings);
        let gradients = (tower.forward(ids()).embedding * cotangent.clone()).sum().backward();
        self.add("text_cotangent", cotangent);
        self.add_gradient("positional_embedding", Some(&tower.position_embedding), &gradients);
        self.add_gradients("transformer.resblocks", &tower.encoder, &gradients);
        if config.tokenizer == TokenizerKind::ClipBpe {
            let tokenizer = ClipTokenizer::with_vocab_size(config.vocab_size);
            let texts = tokenizer.tokenize(&["A cat’s cradle & 42 naïve dogs", "yes"], config.context_length);
            self.add_ids("tokenized", texts.tensor(device));
        }
    }

    fn write(&self, path: &Path) {
        let view = |(dtype, shape, bytes)| TensorView::new(dtype, shape, bytes).unwrap();
        let views = self.0.iter().map(|(name, (dtype, shape, bytes))| (name, view((*dtype, shape.clone(), bytes))));
        fs::write(path, safetensors::serialize(views, None).unwrap()).unwrap();
    }
}

#[test]
#[ignore = "tools/python/test_burn_moe_clip.py runs it"]
fn write_checkpoints_for_the_python_reader() {
    let out = PathBuf::from(std::env::var_os("BURN_MOE_PYTHON_OUT").expect("BURN_MOE_PYTHON_OUT is the folder to write into"));
    let device = Device::default().autodiff();
    let mut names = Names::default();
    for case in cases() {
        let folder = out.join(case.name);
        case.save(&folder, &device);
        names.add(case.name, &folder);
        // Of what was written, so that rounding by the precision is in it.
        let mut recorded = Recorded::default();
        let towers = towers_in(&folder).unwrap();
        if towers != Towers::Text {
            let VisionCheckpoint { config, model, .. } = VisionCheckpoint::load(&folder, None, &device).unwrap();
            recorded.add_images(&config, &model, &device);
        }
        if towers != Towers::Vision {
            let TextCheckpoint { config, model, .. } = TextCheckpoint::load(&folder, &device).unwrap();
            recorded.add_texts(&config, &model, &device);
        }
        recorded.write(&folder.join("reference.safetensors"));
    }
    fs::write(out.join("sparse_names.json"), serde_json::to_string_pretty(&names).unwrap() + "\n").unwrap();
}
