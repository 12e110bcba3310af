//! MoE layers of language models: files of other forms than the reference cases', and what is refused.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

use burn::tensor::{Device, Tensor};
use burn_moe::{
    AssignmentConfig, ExpertOptions, GateNormalization, MoeFeedForwardConfig, Precision, TokenChoiceConfig,
    language_models::{Family, LayerOptions, MoeCheckpoint, load_moe_layer, save_mixtral},
};
use safetensors::{Dtype, SafeTensors, tensor::TensorView};
use serde_json::{Value, json};

use super::support::{ROOT, largest_difference, numbers, values};

fn fixture(family: &str) -> PathBuf {
    Path::new(ROOT).join("tests/fixtures").join(format!("lm-{family}"))
}

/// A tensor as it is written.
#[derive(Clone)]
struct Stored {
    dtype: Dtype,
    shape: Vec<usize>,
    bytes: Vec<u8>,
}

/// A folder whose files a test changes before it writes them.
struct Folder {
    config: Value,
    tensors: BTreeMap<String, Stored>,
    folder: tempfile::TempDir,
}

impl Folder {
    fn of(family: &str) -> Self {
        let config = serde_json::from_str(&fs::read_to_string(fixture(family).join("config.json")).unwrap()).unwrap();
        let bytes = fs::read(fixture(family).join("model.safetensors")).unwrap();
        let file = SafeTensors::deserialize(&bytes).unwrap();
        let stored = |view: TensorView| Stored { dtype: view.dtype(), shape: view.shape().to_vec(), bytes: view.data().to_vec() };
        let tensors = file.tensors().into_iter().map(|(name, view)| (name, stored(view))).collect();
        Self { config, tensors, folder: tempfile::tempdir().unwrap() }
    }

    fn path(&self) -> &Path {
        self.folder.path()
    }

    fn write_tensors<'a>(&self, name: &str, tensors: impl Iterator<Item = (&'a String, &'a Stored)>) {
        let views = tensors.map(|(name, t)| (name.clone(), TensorView::new(t.dtype, t.shape.clone(), &t.bytes).unwrap()));
        safetensors::serialize_to_file(views, None, &self.path().join(name)).unwrap();
    }

    fn write(&self) -> &Path {
        fs::write(self.path().join("config.json"), self.config.to_string()).unwrap();
        self.write_tensors("model.safetensors", self.tensors.iter());
        self.path()
    }

    /// What loading block 0 says of it.
    fn error(&self) -> String {
        load_moe_layer(self.write(), 0, &Device::default()).map(|_| ()).unwrap_err().to_string()
    }
}

/// What a change of the configuration makes loading say.
fn refused(family: &str, setting: &str, value: Value) -> String {
    let mut folder = Folder::of(family);
    folder.config[setting] = value;
    folder.error()
}

fn output(folder: &Path, block: usize, options: &LayerOptions) -> Vec<f32> {
    let device = Device::default();
    let layer = MoeCheckpoint::open(folder).unwrap().load_layer_with(block, options, &device).unwrap();
    values(&layer.forward(numbers([40, 32], 7, &device)).output)
}

#[test]
fn numbers_may_have_16_bits_and_stand_in_shards() {
    let exact = output(&fixture("gpt_oss"), 1, &LayerOptions::new());
    for dtype in [Dtype::F16, Dtype::BF16] {
        let mut folder = Folder::of("gpt_oss");
        for tensor in folder.tensors.values_mut() {
            let numbers = tensor.bytes.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b));
            tensor.bytes = match dtype {
                Dtype::F16 => numbers.flat_map(|v| half::f16::from_f32(v).to_le_bytes()).collect(),
                _ => numbers.flat_map(|v| half::bf16::from_f32(v).to_le_bytes()).collect(),
            };
            tensor.dtype = dtype;
        }
        let rounded = output(folder.write(), 1, &LayerOptions::new());
        let difference = largest_difference(&rounded, &exact);
        assert!(difference > 0.0 && difference < 0.03, "{dtype:?}: {difference}");
    }

    let folder = Folder::of("gpt_oss");
    let shard_of = |name: &str| if name.contains("layers.1.") { "b.safetensors" } else { "a.safetensors" };
    let index: BTreeMap<&String, &str> = folder.tensors.keys().map(|name| (name, shard_of(name))).collect();
    fs::write(folder.path().join("config.json"), folder.config.to_string()).unwrap();
    fs::write(folder.path().join("model.safetensors.index.json"), json!({ "weight_map": index }).to_string()).unwrap();
    // Those of other blocks need not be there.
    folder.write_tensors("b.safetensors", folder.tensors.iter().filter(|(name, _)| shard_of(name) == "b.safetensors"));
    assert_eq!(output(folder.path(), 1, &LayerOptions::new()), exact);
    let error = load_moe_layer(folder.path(), 0, &Device::default()).unwrap_err().to_string();
    assert!(error.contains("a.safetensors"), "{error}");
}

#[test]
fn blocks_without_a_moe_layer_are_named() {
    let checkpoint = MoeCheckpoint::open(fixture("deepseek_v3")).unwrap();
    assert_eq!((checkpoint.family(), checkpoint.num_blocks(), checkpoint.moe_blocks()), (Family::DeepseekV3, 2, &[1][..]));
    let error = checkpoint.load_layer(0, &Device::default()).unwrap_err().to_string();
    assert!(error.ends_with("config.json: block 0 has no MoE layer; blocks that have one: 1"), "{error}");

    let mut folder = Folder::of("qwen3_moe");
    folder.config["num_hidden_layers"] = json!(12);
    folder.config["decoder_sparse_step"] = json!(2);
    folder.config["mlp_only_layers"] = json!([3, 5]);
    let blocks = MoeCheckpoint::open(folder.write()).unwrap().moe_blocks().to_vec();
    assert_eq!(blocks, [1, 7, 9, 11]);
    folder.config["decoder_sparse_step"] = json!(1);
    let error = {
        folder.config["mlp_only_layers"] = json!([0, 7, 8]);
        folder.error()
    };
    assert!(error.ends_with("block 0 has no MoE layer; blocks that have one: 1 to 6, 9 to 11"), "{error}");
}

#[test]
fn settings_that_are_not_known_are_refused_by_name() {
    for (family, setting, value, expected) in [
        ("mixtral", "model_type", json!("llama4"), "`model_type` = \"llama4\" is not supported; MoE layers are read of mixtral,"),
        ("mixtral", "quantization_config", json!({ "quant_method": "mxfp4" }), "quantized by \"mxfp4\" are not read"),
        ("mixtral", "hidden_act", json!("mish"), "`hidden_act` = \"mish\" is not supported"),
        ("mixtral", "router_scale", json!(2.0), "`router_scale` = 2.0 is not a setting of `mixtral` that is known here"),
        ("mixtral", "num_experts", json!(8), "`num_local_experts` and `num_experts` are two names of one setting, and differ"),
        ("mixtral", "num_experts_per_tok", json!(5), "`top_k` is 5, but there are only 4 experts"),
        ("mixtral", "num_experts_per_tok", json!(-1), "expected a whole number that is not negative"),
        ("mixtral", "hidden_size", Value::Null, "`hidden_size` is missing"),
        ("mixtral", "hidden_size", json!(1u64 << 40), "at most 1048576 is possible"),
        ("mixtral", "num_hidden_layers", json!(5000), "at most 4096 is possible"),
        ("qwen2_moe", "decoder_sparse_step", json!(0), "`decoder_sparse_step` must be at least 1, got 0"),
        ("deepseek_v3", "scoring_func", json!("softmax"), "`scoring_func` = \"softmax\" is not supported: expected \"sigmoid\""),
        ("deepseek_v3", "topk_method", json!("greedy"), "`topk_method` = \"greedy\" is not supported"),
        (
            "mixtral",
            "scoring_func",
            json!("sigmoid"),
            "`scoring_func` = \"sigmoid\" is not a setting of `mixtral` that is known here",
        ),
        ("qwen3_moe", "shared_intermediate_size", json!(8), "`shared_intermediate_size` = 8 is not a setting of `qwen3_moe`"),
        ("deepseek_v3", "n_group", Value::Null, "`n_group` = null: expected a number"),
        ("deepseek_v3", "routed_scaling_factor", Value::Null, "`routed_scaling_factor` = null: expected a number"),
        ("deepseek_v3", "n_group", json!(3), "must divide `num_experts` (8)"),
        ("deepseek_v3", "topk_group", json!(1), "fewer experts than each token chooses"),
        ("glm4_moe", "routed_scaling_factor", json!(0.0), "`gate_scale` is 0"),
        ("gpt_oss", "swiglu_limit", json!(-1.0), "`form.limit` is -1"),
    ] {
        let error = refused(family, setting, value);
        assert!(error.contains(expected) && error.contains("config.json"), "{family}, {setting}: {error}");
    }
}

#[test]
fn tensors_that_do_not_fit_are_named() {
    let moe = "model.layers.0.block_sparse_moe";
    let mut folder = Folder::of("mixtral");
    let removed = folder.tensors.remove(&format!("{moe}.experts.3.w2.weight")).unwrap();
    assert!(folder.error().contains("missing tensors: 1 (`model.layers.0.block_sparse_moe.experts.3.w2.weight`)"));
    folder.tensors.insert(format!("{moe}.experts.3.w2.weight"), removed.clone());
    folder.tensors.insert(format!("{moe}.experts.4.w2.weight"), removed.clone());
    assert!(folder.error().contains("unexpected tensors: 1 (`model.layers.0.block_sparse_moe.experts.4.w2.weight`)"));
    folder.tensors.remove(&format!("{moe}.experts.4.w2.weight"));
    folder.tensors.get_mut(&format!("{moe}.experts.0.w1.weight")).unwrap().shape = vec![32, 48];
    assert!(folder.error().contains("`model.layers.0.block_sparse_moe.experts.0.w1.weight` should be [48, 32], but is [32, 48]"));

    let mut folder = Folder::of("mixtral");
    folder.tensors.get_mut(&format!("{moe}.experts.2.w3.weight")).unwrap().bytes[..4].copy_from_slice(&f32::NAN.to_le_bytes());
    assert!(folder.error().contains("experts.2.w3.weight"), "{}", folder.error());

    let mut folder = Folder::of("mixtral");
    folder.tensors = folder.tensors.into_iter().map(|(name, tensor)| (name.replace("layers.0", "layers.2"), tensor)).collect();
    assert!(folder.error().contains("no tensor is named `model.layers.0.mlp.*` or `model.layers.0.block_sparse_moe.*`"));

    // A tower beside it has blocks, too.
    let mut folder = Folder::of("mixtral");
    folder.tensors.insert("vision_tower.layers.0.mlp.fc1.weight".into(), removed);
    load_moe_layer(folder.write(), 0, &Device::default()).unwrap();

    let mut folder = Folder::of("mixtral");
    let other = folder.tensors.iter().filter(|(name, _)| name.starts_with(moe));
    let other: Vec<_> = other.map(|(name, tensor)| (name.replacen("model", "draft", 1), tensor.clone())).collect();
    folder.tensors.extend(other);
    let expected = "block 0: `draft.layers.0.block_sparse_moe.*`, `model.layers.0.block_sparse_moe.*`";
    assert!(folder.error().contains(expected), "{}", folder.error());

    let folder = Folder::of("mixtral");
    fs::remove_file(folder.write().join("model.safetensors")).unwrap();
    let error = load_moe_layer(folder.path(), 0, &Device::default()).unwrap_err().to_string();
    assert!(error.contains("no weights: expected `model.safetensors`, or shards with `model.safetensors.index.json`"), "{error}");
}

/// Made of what it writes; its own `state_dict`s of six families were compared by `examples/verify.rs` (docs/experiments.md).
#[test]
fn experts_as_transformers_5_has_them_in_memory_are_the_same() {
    for (family, block, layer, names) in [
        ("mixtral", 0, "model.layers.0.block_sparse_moe", ["w1", "w3", "w2"]),
        ("qwen2_moe", 1, "model.layers.1.mlp", ["gate_proj", "up_proj", "down_proj"]),
        ("deepseek_v3", 1, "model.layers.1.mlp", ["gate_proj", "up_proj", "down_proj"]),
    ] {
        let mut folder = Folder::of(family);
        let expected = output(&fixture(family), block, &LayerOptions::new());
        let of_expert = |expert: usize, name: &str| format!("{layer}.experts.{expert}.{name}.weight");
        let num_experts = (0..).take_while(|expert| folder.tensors.contains_key(&of_expert(*expert, names[0]))).count();
        let mut stacked = [("gate_up_proj", &names[..2]), ("down_proj", &names[2..])].map(|(name, parts)| {
            let parts: Vec<Stored> = (0..num_experts)
                .flat_map(|expert| parts.iter().map(move |part| (expert, *part)))
                .map(|(expert, part)| folder.tensors.remove(&of_expert(expert, part)).unwrap())
                .collect();
            let rows = parts[0].shape[0] * parts.len() / num_experts;
            let shape = vec![num_experts, rows, parts[0].shape[1]];
            let bytes = parts.iter().flat_map(|part| part.bytes.clone()).collect();
            (format!("{layer}.experts.{name}"), Stored { dtype: parts[0].dtype, shape, bytes })
        });
        folder.tensors.extend(stacked.clone());
        assert_eq!(output(folder.write(), block, &LayerOptions::new()), expected, "{family}");
        let [_, (name, down)] = &mut stacked;
        down.shape.swap(1, 2);
        folder.tensors.insert(name.clone(), down.clone());
        let error = load_moe_layer(folder.write(), block, &Device::default()).unwrap_err().to_string();
        assert!(error.contains("experts.down_proj` should be ["), "{error}");
    }
}

#[test]
fn one_expert_per_token_has_the_gate_that_transformers_gives_it() {
    let mut folder = Folder::of("mixtral");
    folder.config["num_experts_per_tok"] = json!(1);
    let device = Device::default();
    let layer = load_moe_layer(folder.write(), 0, &device).unwrap();
    let gates = layer.forward(numbers::<2>([9, 32], 1, &device)).routing.plan.gates();
    assert!(values(&gates).iter().all(|gate| *gate == 1.0), "{gates}");
}

#[test]
fn the_chosen_groups_and_scale_are_those_of_the_configuration() {
    let folder = Folder::of("glm4_moe");
    let config = MoeCheckpoint::open(folder.write()).unwrap().config().clone();
    let AssignmentConfig::TokenChoice(choice) = &config.assignment else { panic!("{config}") };
    assert_eq!(choice.gate_scale, 1.5);
    assert_eq!(choice.expert_groups.as_ref().map(|groups| (groups.count, groups.per_token)), Some((2, 1)));
    // The gates of a token sum to the scale.
    let device = Device::default();
    let layer = load_moe_layer(folder.path(), 1, &device).unwrap();
    let plan = layer.forward(numbers::<2>([50, 32], 3, &device)).routing.plan;
    assert!(values(&plan.gates().sum_dim(1)).iter().all(|sum| (sum - 1.5).abs() < 1e-5));
    // Both experts are of one half.
    let experts = plan.row_expert();
    assert!(plan.choice_row().chunks(2).all(|rows| experts[rows[0] as usize] / 4 == experts[rows[1] as usize] / 4));
}

/// transformers writes the tensors of a network of width 0, too.
#[test]
fn a_shared_expert_of_no_width_is_none() {
    let device = Device::default();
    let x: Tensor<2> = numbers([20, 32], 5, &device);
    for (family, setting, shared) in [
        ("deepseek_v3", "n_shared_experts", "shared_experts"),
        ("glm4_moe", "n_shared_experts", "shared_experts"),
        ("qwen2_moe", "shared_expert_intermediate_size", "shared_expert"),
    ] {
        let mut with = load_moe_layer(fixture(family), 1, &device).unwrap();
        (with.shared_expert, with.shared_expert_gate) = (None, None);
        let mut folder = Folder::of(family);
        folder.config[setting] = json!(0);
        for (name, tensor) in &mut folder.tensors {
            if name.contains(&format!("{shared}.")) {
                let width = tensor.shape.iter_mut().find(|size| **size != 32).unwrap();
                *width = 0;
                tensor.bytes.clear();
            }
        }
        let without = load_moe_layer(folder.write(), 1, &device).unwrap();
        assert!(without.shared_expert.is_none());
        assert_eq!(values(&without.forward(x.clone()).output), values(&with.forward(x.clone()).output), "{family}");
    }
}

#[test]
fn settings_that_transformers_reads_otherwise_than_they_look() {
    let config = |family: &str, changes: &[(&str, Value)]| {
        let mut folder = Folder::of(family);
        changes.iter().for_each(|(setting, value)| folder.config[*setting] = value.clone());
        MoeCheckpoint::open(folder.write()).unwrap().config().clone()
    };
    let choice = |config: &MoeFeedForwardConfig| match &config.assignment {
        AssignmentConfig::TokenChoice(choice) => (choice.top_k, choice.gate_normalization),
        other => panic!("{other:?}"),
    };
    let null = config("deepseek_v3", &[("norm_topk_prob", Value::Null)]);
    assert_eq!(choice(&null), (3, GateNormalization::None));
    let idle = config("gpt_oss", &[("experts_per_token", json!(2)), ("router_z_loss_coef", json!(0.1))]);
    assert_eq!(choice(&idle), (4, GateNormalization::BeforeDrop));
    assert_eq!(config("qwen2_moe", &[("num_local_experts", json!(3))]).num_experts, 6);
}

#[cfg(feature = "flex")]
#[test]
fn layers_are_packed_as_they_are_read() {
    for family in Family::ALL.map(Family::model_type) {
        let exact = output(&fixture(family), 1, &LayerOptions::new());
        let packed = output(&fixture(family), 1, &LayerOptions::new().with_packed(Some(Precision::F32)));
        assert!(largest_difference(&packed, &exact) < 1e-5, "{family}");
        let rounded = output(&fixture(family), 1, &LayerOptions::new().with_packed(Some(Precision::BF16)));
        let difference = largest_difference(&rounded, &exact);
        assert!(difference > 0.0 && difference < 0.05, "{family}: {difference}");
    }
}

#[test]
fn layers_in_mixtrals_layout_come_back_to_the_bit() {
    let device = Device::default();
    let config = MoeFeedForwardConfig::new(16, 24, 4).with_experts(ExpertOptions::swiglu().with_bias(false));
    let layers = [config.init(&device), config.init(&device)];
    let folder = tempfile::tempdir().unwrap();
    save_mixtral(&layers, folder.path(), Precision::F32).unwrap();
    let x: Tensor<2> = numbers([30, 16], 5, &device);
    for (block, layer) in layers.iter().enumerate() {
        let read = load_moe_layer(folder.path(), block, &device).unwrap();
        assert_eq!(values(&read.forward(x.clone()).output), values(&layer.forward(x.clone()).output));
    }
}

/// What transformers' `MixtralModel.from_pretrained` was tried with: tools/python/test_mixtral.py.
#[test]
fn what_is_written_for_mixtral_is_what_transformers_read() {
    let device = Device::default();
    let config = MoeFeedForwardConfig::new(6, 10, 2).with_experts(ExpertOptions::swiglu().with_bias(false));
    let folder = tempfile::tempdir().unwrap();
    let layers = [config.init(&device), config.init(&device)];
    let advice = "read by transformers before: run tools/python/test_mixtral.py, and write down here what it reads";
    for (precision, dtype) in [(Precision::F32, Dtype::F32), (Precision::BF16, Dtype::BF16)] {
        save_mixtral(&layers, folder.path(), precision).unwrap();
        let bytes = fs::read(folder.path().join("model.safetensors")).unwrap();
        let file = SafeTensors::deserialize(&bytes).unwrap();
        assert!(file.tensors().iter().all(|(_, view)| view.dtype() == dtype), "{advice}");
        let mut found: Vec<_> = file.tensors().into_iter().map(|(name, view)| (name, view.shape().to_vec())).collect();
        found.sort();
        let expected = [
            ("layers.0.block_sparse_moe.experts.0.w1.weight", [10, 6]),
            ("layers.0.block_sparse_moe.experts.0.w2.weight", [6, 10]),
            ("layers.0.block_sparse_moe.experts.0.w3.weight", [10, 6]),
            ("layers.0.block_sparse_moe.experts.1.w1.weight", [10, 6]),
            ("layers.0.block_sparse_moe.experts.1.w2.weight", [6, 10]),
            ("layers.0.block_sparse_moe.experts.1.w3.weight", [10, 6]),
            ("layers.0.block_sparse_moe.gate.weight", [2, 6]),
            ("layers.1.block_sparse_moe.experts.0.w1.weight", [10, 6]),
            ("layers.1.block_sparse_moe.experts.0.w2.weight", [6, 10]),
            ("layers.1.block_sparse_moe.experts.0.w3.weight", [10, 6]),
            ("layers.1.block_sparse_moe.experts.1.w1.weight", [10, 6]),
            ("layers.1.block_sparse_moe.experts.1.w2.weight", [6, 10]),
            ("layers.1.block_sparse_moe.experts.1.w3.weight", [10, 6]),
            ("layers.1.block_sparse_moe.gate.weight", [2, 6]),
        ];
        assert_eq!(found, expected.map(|(name, shape)| (name.to_string(), shape.to_vec())), "{advice}");
    }
    let config: Value = serde_json::from_str(&fs::read_to_string(folder.path().join("config.json")).unwrap()).unwrap();
    let expected = json!({
        "architectures": ["MixtralModel"],
        "model_type": "mixtral",
        "hidden_size": 6,
        "intermediate_size": 10,
        "num_local_experts": 2,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 2,
        "hidden_act": "silu",
        "router_jitter_noise": 0.0,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "head_dim": 2,
        "vocab_size": 2,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "dtype": "bfloat16",
    });
    assert_eq!(config, expected, "{advice}");
}

#[test]
fn what_mixtral_has_no_place_for_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let device = Device::default();
    let save = |config: MoeFeedForwardConfig, precision| {
        save_mixtral(&[config.init(&device)], folder.path(), precision).unwrap_err().to_string()
    };
    let swiglu = MoeFeedForwardConfig::new(8, 8, 4).with_experts(ExpertOptions::swiglu().with_bias(false));
    assert!(save(MoeFeedForwardConfig::new(8, 8, 4), Precision::F32).contains("experts that are not SwiGLU networks"));
    assert!(save(swiglu.clone().with_experts(ExpertOptions::swiglu()), Precision::F32).contains("biases of experts"));
    assert!(save(swiglu.clone().with_shared_expert(Some(8)), Precision::F32).contains("a shared expert"));
    let gates = TokenChoiceConfig::new().with_gate_normalization(GateNormalization::None);
    assert!(save(swiglu.clone().with_assignment(gates.into()), Precision::F32).contains("gates that are not divided by their sum"));
    assert!(save(swiglu, Precision::Int8).contains("weights in 8 bits"));
    assert!(save_mixtral(&[], folder.path(), Precision::F32).unwrap_err().to_string().contains("without layers"));
    assert!(fs::read_dir(folder.path()).unwrap().next().is_none());
}
