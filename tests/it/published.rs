//! Checkpoints as others publish them.

use std::{borrow::Cow, collections::HashMap, fs, path::Path};

use burn::tensor::{Device, Tensor};
use burn_moe::{
    clip::{
        Clip, ClipConfig, EndOfText, PromptError, TextConfig, TextEmbedder, VisionConfig,
        checkpoint::{ClipCheckpoint, LoadOptions, Precision, Towers, VisionCheckpoint, towers_in},
        tokenizer::TokenizerMismatch,
    },
    transformer::EncoderConfig,
};
use safetensors::{Dtype, SafeTensors, tensor::View};
use serde_json::{Value, json};

use super::support::{numbers, values};

fn config() -> ClipConfig {
    let encoder = || EncoderConfig::new(8, 2, 2, 32);
    let text = TextConfig::new(encoder()).with_vocab_size(50).with_context_length(6);
    ClipConfig::new(VisionConfig::new(encoder(), 8, 4), text, 10)
}

/// A dense model and its open_clip checkpoint.
fn open_clip(device: &Device) -> (Clip, tempfile::TempDir) {
    let checkpoint = ClipCheckpoint { config: config(), model: config().init(device) };
    let folder = tempfile::tempdir().unwrap();
    checkpoint.save_open_clip(folder.path(), Precision::F32).unwrap();
    (checkpoint.model, folder)
}

fn hugging_face(device: &Device) -> (Clip, tempfile::TempDir) {
    let config = config().activation(burn_moe::Activation::QuickGelu);
    let checkpoint = ClipCheckpoint { model: config.init(device), config };
    let folder = tempfile::tempdir().unwrap();
    checkpoint.save_hugging_face(folder.path(), Precision::F32).unwrap();
    (checkpoint.model, folder)
}

fn edit(path: &Path, change: impl FnOnce(&mut Value)) {
    let mut value: Value = serde_json::from_str(&fs::read_to_string(path).unwrap()).unwrap();
    change(&mut value);
    fs::write(path, value.to_string()).unwrap();
}

fn edit_open_clip(folder: &Path, change: impl FnOnce(&mut Value)) {
    edit(&folder.join("open_clip_config.json"), change);
}

struct Stored(Dtype, Vec<usize>, Vec<u8>);

impl View for Stored {
    fn dtype(&self) -> Dtype {
        self.0
    }

    fn shape(&self) -> &[usize] {
        &self.1
    }

    fn data(&self) -> Cow<'_, [u8]> {
        (&self.2).into()
    }

    fn data_len(&self) -> usize {
        self.2.len()
    }
}

/// Writes the weights again under other names, with more tensors.
fn rename(path: &Path, name: impl Fn(&str) -> String, more: Vec<(&str, Stored)>) {
    let bytes = fs::read(path).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let tensors = file.iter().map(|(key, view)| (name(key), Stored(view.dtype(), view.shape().to_vec(), view.data().to_vec())));
    let tensors: HashMap<String, Stored> = tensors.chain(more.into_iter().map(|(key, stored)| (key.to_string(), stored))).collect();
    fs::write(path, safetensors::serialize(tensors, None).unwrap()).unwrap();
}

fn is_same(folder: &Path, model: &Clip, device: &Device) {
    let back = ClipCheckpoint::load(folder, device).unwrap_or_else(|error| panic!("{error}"));
    let images = numbers([2, 3, 8, 8], 4, device);
    let embeds = |model: &Clip| values(&model.encode_image(images.clone()).embedding);
    assert_eq!(embeds(&back.model), embeds(model));
    let texts = || Tensor::from_ints([[1, 5, 9, 49, 0, 0], [1, 7, 49, 0, 0, 0]], device);
    let embeds = |model: &Clip| values(&model.encode_text(texts()).embedding);
    assert_eq!(embeds(&back.model), embeds(model));
}

fn error(folder: &Path) -> String {
    let text = ClipCheckpoint::load(folder, &Device::default()).unwrap_err().to_string();
    assert!(text.len() < 600, "{} characters: {text}", text.len());
    text
}

#[test]
fn older_names_of_weights() {
    let device = Device::default();
    let (model, folder) = open_clip(&device);
    let path = |name: &str| folder.path().join(name);
    fs::rename(path("open_clip_model.safetensors"), path("open_clip_pytorch_model.safetensors")).unwrap();
    is_same(folder.path(), &model, &device);
    fs::remove_file(path("open_clip_pytorch_model.safetensors")).unwrap();
    let text = error(folder.path());
    let expected = "no weights: expected open_clip_model.safetensors or open_clip_pytorch_model.safetensors or ";
    assert!(text.contains(expected), "{text}");
    fs::write(path("flax_model.msgpack"), "").unwrap();
    let text = error(folder.path());
    assert!(text.ends_with("there is `flax_model.msgpack`, of TensorFlow or Flax, which is not read: save the model from PyTorch"));
    fs::write(path("epoch_latest.pt"), "").unwrap();
    let text = error(folder.path());
    assert!(text.ends_with("; there is `epoch_latest.pt`: if it holds them, give it one of these names"), "{text}");
}

#[test]
fn sections_of_older_configurations_and_images_that_are_resized_to_more_than_is_kept() {
    let device = Device::default();
    let (model, folder) = hugging_face(&device);
    // transformers takes the older section where both are there.
    edit(&folder.path().join("config.json"), |file| {
        file["vision_config_dict"] = file["vision_config"].take();
        file["vision_config"] = json!({ "hidden_size": 999 });
        file["text_config_dict"] = Value::Null;
    });
    is_same(folder.path(), &model, &device);

    let processor = folder.path().join("preprocessor_config.json");
    let set = |size: Value, crop: Value| edit(&processor, |file| (file["size"], file["crop_size"]) = (size, crop));
    let resize_to = || ClipCheckpoint::read_config(folder.path()).map(|config| config.vision.preprocessing.resize_to);
    set(json!({ "shortest_edge": 10 }), json!(8));
    assert_eq!(resize_to().unwrap(), Some(10));
    // Written and read again, by both formats that have a place for it.
    let checkpoint = ClipCheckpoint::load(folder.path(), &device).unwrap();
    for as_transformers in [true, false] {
        let folder = tempfile::tempdir().unwrap();
        match as_transformers {
            true => checkpoint.save_hugging_face(folder.path(), Precision::F32).unwrap(),
            false => checkpoint.save_sparse(folder.path(), Precision::F32).unwrap(),
        }
        let back = ClipCheckpoint::read_config(folder.path()).unwrap();
        assert_eq!(back.vision.preprocessing, checkpoint.config.vision.preprocessing);
    }
    let error = checkpoint.save_open_clip(tempfile::tempdir().unwrap().path(), Precision::F32).unwrap_err().to_string();
    assert_eq!(error, "open_clip's format has no place for images that are resized to more than is kept");
    // For larger images, both grow.
    let larger =
        ClipCheckpoint::load_with(folder.path(), &LoadOptions::new().with_image_size(Some(16)), &device).unwrap().config.vision;
    assert_eq!((larger.image_size, larger.preprocessing.resize_to), (16, Some(20)));
    for (size, crop, named) in [
        (json!({ "shortest_edge": 6 }), json!(8), "`size` = 6 with a crop of 8 is not supported"),
        (json!({ "shortest_edge": 8 }), json!(6), "`crop_size` = 6 with an image size of 8 is not supported"),
        (json!({ "height": 8, "width": 9 }), json!(8), "`size` = 8 x 9 is not supported"),
        (
            json!({ "shortest_edge": u64::MAX }),
            json!(8),
            "size of resized images of 18446744073709551615: at most 1048576 is possible",
        ),
    ] {
        set(size, crop);
        let text = resize_to().unwrap_err().to_string();
        assert!(text.contains(named), "{text}");
    }
    let error = ClipCheckpoint::load_with(open_clip(&device).1.path(), &LoadOptions::new().with_image_size(Some(9)), &device)
        .unwrap_err()
        .to_string();
    assert!(error.contains("image_size") && error.contains('9'), "{error}");
}

#[test]
fn prefixes_and_sizes_among_the_weights() {
    let device = Device::default();
    let (model, folder) = open_clip(&device);
    let weights = folder.path().join("open_clip_model.safetensors");
    let size = |value: i64| Stored(Dtype::I64, vec![], value.to_le_bytes().to_vec());
    rename(&weights, str::to_string, vec![("input_resolution", size(8)), ("context_length", size(6)), ("vocab_size", size(50))]);
    is_same(folder.path(), &model, &device);
    let is_text = |key: &str| !key.starts_with("visual.") && key != "logit_scale";
    let custom = |key: &str| if is_text(key) { format!("text.{key}") } else { key.to_string() };
    for name in [
        &|key: &str| format!("module.{key}") as String,
        &|key: &str| format!("_orig_mod.module.{key}"),
        &|key: &str| custom(key),
        &|key: &str| format!("module.{}", custom(key)),
        // Some names without the prefix, and wrappers of single blocks.
        &|key: &str| if key == "logit_scale" { key.to_string() } else { format!("module.{key}") },
        &|key: &str| key.replace("resblocks.0.", "resblocks.0._orig_mod."),
        &|key: &str| format!("model.{}", key.replace("resblocks.1.", "resblocks.1._checkpoint_wrapped_module.")),
    ] as [&dyn Fn(&str) -> String; 7]
    {
        let (model, folder) = open_clip(&device);
        // As `AveragedModel` writes.
        let more = vec![("n_averaged", size(5)), ("num_batches_tracked", size(0))];
        rename(&folder.path().join("open_clip_model.safetensors"), name, more);
        is_same(folder.path(), &model, &device);
    }
    let (_, lightning) = open_clip(&device);
    let loss = Stored(Dtype::F32, vec![2], vec![0; 8]);
    rename(&lightning.path().join("open_clip_model.safetensors"), |key| format!("model.{key}"), vec![("loss.weight", loss)]);
    let text = error(lightning.path());
    assert!(text.ends_with("the tensors are not those of the configuration; unexpected tensors: 1 (`loss.weight`)"), "{text}");
    let twice = Stored(Dtype::F32, vec![8], vec![0; 32]);
    let (_, folder_with_twice) = open_clip(&device);
    let path = folder_with_twice.path().join("open_clip_model.safetensors");
    rename(&path, |key| if is_text(key) { format!("text.{key}") } else { key.to_string() }, vec![("ln_final.weight", twice)]);
    let text = error(folder_with_twice.path());
    assert!(text.contains("has `ln_final.weight` and `text.ln_final.weight`, which would be the same weights"), "{text}");
    rename(&weights, |key| format!("a.{key}").replace("a.visual", "b.visual"), vec![]);
    let text = error(folder.path());
    assert!(text.contains("missing tensors: ") && text.contains("unexpected tensors: ") && text.contains(", …)"), "{text}");
}

#[test]
fn settings_of_open_clip_that_change_nothing_and_defaults_left_out() {
    let device = Device::default();
    for (part, setting, value) in [
        ("vision_cfg", "patch_dropout", json!(0.5)),
        ("vision_cfg", "pos_embed_type", json!("learnable")),
        ("text_cfg", "proj_type", json!("linear")),
        ("text_cfg", "eos_id", json!(49407)),
        // The defaults of open_clip's classes, written out.
        ("text_cfg", "eos_id", json!(2)),
        ("text_cfg", "pool_type", json!("argmax")),
        ("text_cfg", "block_type", Value::Null),
        ("text_cfg", "hf_model_pretrained", json!(true)),
        ("text_cfg", "hf_proj_type", json!("mlp")),
        ("text_cfg", "hf_pooler_type", json!("mean_pooler")),
        ("text_cfg", "tokenizer_kwargs", json!({ "clean": "lower", "reduction_mask": "", "context_length": 6 })),
        ("vision_cfg", "pool_type", json!("tok")),
        ("vision_cfg", "timm_pool", json!("avg")),
        ("vision_cfg", "timm_proj", json!("linear")),
        ("vision_cfg", "timm_model_name", Value::Null),
        ("vision_cfg", "attn_pooler_queries", json!(256)),
        ("text_cfg", "hf_tokenizer_name", json!("")),
        ("text_cfg", "hf_tokenizer_name", json!("openai/clip-vit-base-patch32")),
    ] {
        let (model, folder) = open_clip(&device);
        edit_open_clip(folder.path(), |file| file["model_cfg"][part][setting] = value);
        is_same(folder.path(), &model, &device);
    }
    let (model, folder) = open_clip(&device);
    edit_open_clip(folder.path(), |file| {
        for part in ["vision_cfg", "text_cfg"] {
            let part = file["model_cfg"][part].as_object_mut().unwrap();
            ["layers", "mlp_ratio"].into_iter().for_each(|field| drop(part.remove(field).unwrap()));
        }
    });
    is_same(folder.path(), &model, &device);
    // Without weights, open_clip's own default counts.
    fs::remove_file(folder.path().join("open_clip_model.safetensors")).unwrap();
    let read = ClipCheckpoint::read_config(folder.path()).unwrap();
    assert_eq!((read.vision.encoder.n_layers, read.text.encoder.n_layers), (12, 12));
}

#[test]
fn settings_of_open_clip_that_would_make_another_model_are_named() {
    let device = Device::default();
    for (part, setting, value, expected) in [
        ("text_cfg", "pool_type", json!("tok"), "`text_cfg.pool_type` = \"tok\" is not supported: expected \"argmax\", or \"eos\""),
        (
            "text_cfg",
            "pool_type",
            json!("eos"),
            "`text_cfg.pool_type` = \"eos\" is not supported: with `eos_id` 2, texts would be read",
        ),
        ("text_cfg", "proj_type", json!("none"), "`text_cfg.proj_type` = \"none\" is not supported"),
        ("text_cfg", "no_causal_mask", json!(true), "`text_cfg.no_causal_mask` = true is not supported"),
        ("text_cfg", "hf_model_name", json!("roberta-base"), "`text_cfg.hf_model_name` = \"roberta-base\" is not supported"),
        ("vision_cfg", "pool_type", json!("argmax"), "`vision_cfg.pool_type` = \"argmax\" is not supported"),
        ("vision_cfg", "timm_model_name", json!("vit_small"), "`vision_cfg.timm_model_name` = \"vit_small\" is not supported"),
        ("vision_cfg", "eos_id", json!(49407), "`vision_cfg.eos_id` = 49407 is not supported"),
        ("vision_cfg", "layers", json!([3, 4, 6, 3]), "`vision_cfg.layers` = [3,4,6,3] is not supported: this is a ResNet"),
    ] {
        let (_, folder) = open_clip(&device);
        edit_open_clip(folder.path(), |file| file["model_cfg"][part][setting] = value);
        let text = error(folder.path());
        assert!(text.contains(expected), "{text}");
    }
    let (_, folder) = open_clip(&device);
    edit_open_clip(folder.path(), |file| file["model_cfg"]["init_logit_bias"] = json!(-10));
    assert!(error(folder.path()).contains("`model_cfg.init_logit_bias` = -10 is not supported: this is a SigLIP"));
    // Texts that are cleaned otherwise have other ids.
    for (setting, value) in [
        ("clean", json!("canonicalize")),
        ("clean", json!("whitespace")),
        ("reduction_mask", json!("syntax")),
        ("strip_sep_token", json!(true)),
        ("context_length", json!(77)),
        ("additional_special_tokens", json!(["<x>"])),
    ] {
        let (_, folder) = open_clip(&device);
        edit_open_clip(folder.path(), |file| file["model_cfg"]["text_cfg"]["tokenizer_kwargs"] = json!({ setting: value.clone() }));
        let text = error(folder.path());
        assert!(text.contains(&format!("`text_cfg.tokenizer_kwargs.{setting}` = {value} is not supported")), "{text}");
    }
    let (model, folder) = open_clip(&device);
    edit_open_clip(folder.path(), |file| {
        file["model_cfg"]["text_cfg"]["pool_type"] = "eos".into();
        file["model_cfg"]["text_cfg"]["eos_id"] = json!(49);
        file["model_cfg"]["output_dict"] = json!(true);
        file["model_cfg"]["cast_dtype"] = "fp16".into();
    });
    is_same(folder.path(), &model, &device);
}

#[test]
fn processors_with_both_names_of_their_kind() {
    let device = Device::default();
    let (model, folder) = hugging_face(&device);
    let path = folder.path().join("preprocessor_config.json");
    edit(&path, |file| file["feature_extractor_type"] = "CLIPFeatureExtractor".into());
    is_same(folder.path(), &model, &device);
    edit(&path, |file| {
        file["image_processor_type"] = "SiglipImageProcessor".into();
    });
    assert!(error(folder.path()).contains("`image_processor_type` = SiglipImageProcessor is not supported"));
}

#[test]
fn other_families_and_other_tokenizers_are_named() {
    let device = Device::default();
    let (_, folder) = hugging_face(&device);
    for family in ["siglip", "metaclip_2", "blip"] {
        edit(&folder.path().join("config.json"), |file| file["model_type"] = family.into());
        let text = error(folder.path());
        assert!(text.contains(&format!("`model_type` = \"{family}\": this family is not supported; `clip` is")), "{text}");
    }
    edit(&folder.path().join("config.json"), |file| {
        file["model_type"] = "clip_vision_model".into();
        file["architectures"] = json!(["CLIPVisionModel"]);
    });
    let text = error(folder.path());
    assert!(text.ends_with("has no projection to embeddings: save a `CLIPVisionModelWithProjection` of the same CLIP"), "{text}");
    let (_, folder) = open_clip(&device);
    edit_open_clip(folder.path(), |file| file["model_cfg"]["text_cfg"]["hf_tokenizer_name"] = "bert-base-uncased".into());
    assert!(error(folder.path()).contains("`text_cfg.hf_tokenizer_name` = \"bert-base-uncased\" is not supported"));

    // The model's own vocabulary and end of text, where nothing else tells.
    let embedder = |text: TextConfig| {
        let mut config = config();
        config.text = text;
        TextEmbedder::new(&config.init(&device).text, &device)
    };
    let vocabulary = TokenizerMismatch::Vocabulary { model: 50 };
    assert_eq!(embedder(config().text).unwrap_err(), vocabulary);
    // A larger one would hide it.
    let larger = embedder(config().text.with_vocab_size(60_000)).unwrap_err();
    assert_eq!(larger, TokenizerMismatch::Vocabulary { model: 60_000 });
    let text = config().text.with_vocab_size(49408);
    let end = TokenizerMismatch::EndOfText { model: 2, tokenizer: 49407 };
    assert_eq!(embedder(text.clone().with_end_of_text(EndOfText::Id(2))).unwrap_err(), end);
    let embedder = embedder(text).unwrap();
    let error = embedder.prompts(&["cat"], &["a photo"]).unwrap_err();
    assert!(matches!(error, PromptError::Template { .. }), "{error}");
    assert_eq!(embedder.prompts(&["cat"], &[] as &[&str]).unwrap_err(), PromptError::NoTemplate);
    for (classes, expected) in [
        (&["cat", "dog", ""][..], "class 3 has no name: every class needs one of its own"),
        (&["cat", "\u{a0}", "dog"], "class 2 has no name: every class needs one of its own"),
    ] {
        assert_eq!(embedder.prompts(classes, &["a {}"]).unwrap_err().to_string(), expected);
    }
}

#[test]
fn a_smaller_vocabulary_of_clips_tokenizer_is_known_by_its_merges() {
    let device = Device::default();
    let mut config = config();
    config.text = config.text.with_vocab_size(600);
    let checkpoint = ClipCheckpoint { model: config.init(&device), config };
    let folder = tempfile::tempdir().unwrap();
    let embeds = |name: &str| {
        let model = ClipCheckpoint::load(folder.path().join(name), &device).unwrap().model;
        TextEmbedder::new(&model.text, &device).map(|embedder| embedder.texts(&["a cat"], |_| ()).embeddings)
    };
    checkpoint.save_open_clip(folder.path().join("open_clip"), Precision::F32).unwrap();
    checkpoint.save_hugging_face(folder.path().join("hugging_face"), Precision::F32).unwrap();
    checkpoint.save_sparse(folder.path().join("burn_moe"), Precision::F32).unwrap();
    let expected = values(&embeds("burn_moe").unwrap());
    for format in ["open_clip", "hugging_face"] {
        assert_eq!(values(&embeds(format).unwrap()), expected, "{format}");
    }
    let merges = fs::read_to_string(folder.path().join("hugging_face/merges.txt")).unwrap();
    assert!(merges.starts_with("#version: 0.2\ni n\nt h\n") && merges.lines().count() == 87, "86 merges: {merges}");

    // Other merges are another tokenizer, and so are none.
    let other = TokenizerMismatch::Vocabulary { model: 600 };
    fs::write(folder.path().join("hugging_face/merges.txt"), merges.replace("t h\n", "h t\n")).unwrap();
    assert_eq!(embeds("hugging_face").unwrap_err(), other);
    fs::remove_file(folder.path().join("open_clip/merges.txt.gz")).unwrap();
    assert!(error(&folder.path().join("open_clip")).contains("`bpe_path` = \"merges.txt.gz\": there is no such file"));
    // Without merges, a vocabulary of this size is nobody's.
    edit_open_clip(&folder.path().join("open_clip"), |file| {
        file["model_cfg"]["text_cfg"].as_object_mut().unwrap().remove("tokenizer_kwargs").unwrap();
    });
    assert_eq!(embeds("open_clip").unwrap_err(), other);
}

#[test]
fn another_tokenizer_with_as_many_ids_is_not_taken_for_clips() {
    let device = Device::default();
    let mut config = config();
    config.text = config.text.with_vocab_size(49408);
    let checkpoint = ClipCheckpoint { model: config.init(&device), config };
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let other = TokenizerMismatch::Vocabulary { model: 49408 };
    let read = || TextEmbedder::new(&ClipCheckpoint::load(folder.path(), &device).unwrap().model.text, &device).map(|_| ());
    checkpoint.save_hugging_face(folder.path(), Precision::F32).unwrap();
    assert_eq!(read(), Ok(()));
    let merges = fs::read_to_string(path("merges.txt")).unwrap();
    let foreign = merges.replacen("t h\n", "h t\n", 1);
    fs::write(path("merges.txt"), &foreign).unwrap();
    assert_eq!(read(), Err(other.clone()));
    // What transformers 5 writes has its merges in `tokenizer.json` alone, as pairs; older ones as lines.
    fs::remove_file(path("merges.txt")).unwrap();
    let tokenizer = |pairs: bool, merges: &str| {
        let pair = |line: &str| if pairs { json!(line.split(' ').collect::<Vec<_>>()) } else { json!(line) };
        let merges: Vec<Value> = merges.lines().skip(1).map(pair).collect();
        fs::write(path("tokenizer.json"), json!({ "model": { "type": "BPE", "merges": merges } }).to_string()).unwrap();
    };
    for (pairs, merges, expected) in [(true, &merges, Ok(())), (false, &merges, Ok(())), (true, &foreign, Err(other.clone()))] {
        tokenizer(pairs, merges);
        assert_eq!(read(), expected);
    }
    tokenizer(true, &merges);
    for (class, expected) in [
        (json!("CLIPTokenizerFast"), Ok(())),
        (json!("PreTrainedTokenizerFast"), Ok(())),
        (Value::Null, Ok(())),
        (json!("XLMRobertaTokenizer"), Err(other.clone())),
    ] {
        edit(&path("tokenizer_config.json"), |file| file["tokenizer_class"] = class);
        assert_eq!(read(), expected);
    }
    ["tokenizer.json", "tokenizer_config.json", "vocab.json"].into_iter().for_each(|name| fs::remove_file(path(name)).unwrap());
    assert_eq!(read(), Ok(()));
    fs::write(path("vocab.txt"), "[PAD]\n").unwrap();
    assert_eq!(read(), Err(other.clone()));
    assert!(other.to_string().contains("`merges.txt`"), "{other}");

    // open_clip's own file has more merges than are used.
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let read = || TextEmbedder::new(&ClipCheckpoint::load(folder.path(), &device).unwrap().model.text, &device).map(|_| ());
    checkpoint.save_open_clip(folder.path(), Precision::F32).unwrap();
    let named = |name: &str| {
        edit_open_clip(folder.path(), |file| file["model_cfg"]["text_cfg"]["tokenizer_kwargs"] = json!({ "bpe_path": name }));
    };
    named("bpe.txt");
    fs::write(path("bpe.txt"), format!("{merges}one more\nand another\n")).unwrap();
    assert_eq!(read(), Ok(()));
    named("/home/them/bpe.txt");
    assert_eq!(read(), Ok(()));
    fs::write(path("bpe.txt"), &foreign).unwrap();
    assert_eq!(read(), Err(other.clone()));
    named("/home/them/own.txt.gz");
    let text = error(folder.path());
    assert!(text.contains("`bpe_path` = \"/home/them/own.txt.gz\": there is no such file: put it into the folder"), "{text}");
    // Images need no tokenizer.
    assert_eq!(towers_in(folder.path()).unwrap(), Towers::Both);
    VisionCheckpoint::load(folder.path(), None, &device).unwrap();
    // A tokenizer of transformers has its files in the folder.
    let named = json!({ "context_length": checkpoint.config.text.context_length });
    edit_open_clip(folder.path(), |file| {
        file["model_cfg"]["text_cfg"]["tokenizer_kwargs"] = named;
        file["model_cfg"]["text_cfg"]["hf_tokenizer_name"] = "openai/clip-vit-base-patch32".into();
    });
    assert_eq!(read(), Ok(()));
    fs::write(path("merges.txt"), foreign).unwrap();
    assert_eq!(read(), Err(other));
}

#[test]
fn sizes_and_texts_of_settings_are_named_when_they_are_wrong() {
    let device = Device::default();
    let (model, folder) = open_clip(&device);
    edit_open_clip(folder.path(), |file| {
        file["model_cfg"]["vision_cfg"]["image_size"] = json!([8, 8]);
        file["model_cfg"]["vision_cfg"]["patch_size"] = json!([4, 4]);
    });
    is_same(folder.path(), &model, &device);
    for (part, setting, value, expected) in [
        (
            "vision_cfg",
            "image_size",
            json!([8, 16]),
            "`vision_cfg.image_size` = 8 x 16 is not supported: images and patches are squares",
        ),
        (
            "vision_cfg",
            "image_size",
            json!("8"),
            "`vision_cfg.image_size` = \"8\": expected a whole number, or two for height and width",
        ),
        (
            "vision_cfg",
            "layers",
            json!([2]),
            "`vision_cfg.layers` = [2] is not supported: this is a ResNet; CLIPs of two transformers, as ViT-B-32, are supported",
        ),
        ("text_cfg", "width", json!(8.5), "`text_cfg.width` = 8.5: expected a whole number from 0 on"),
        ("text_cfg", "mlp_ratio", json!("4"), "`text_cfg.mlp_ratio` = \"4\": expected a number"),
        ("text_cfg", "tokenizer_kwargs", json!([1]), "`text_cfg.tokenizer_kwargs` = [1]: expected an object, `{…}`"),
    ] {
        let (_, folder) = open_clip(&device);
        edit_open_clip(folder.path(), |file| file["model_cfg"][part][setting] = value);
        let text = error(folder.path());
        assert!(text.ends_with(&format!("open_clip_config.json: {expected}")), "{text}");
    }
    let whole = |change: fn(&mut Value)| {
        let (_, folder) = open_clip(&device);
        edit_open_clip(folder.path(), change);
        error(folder.path())
    };
    let text = whole(|file| *file = file["model_cfg"].take());
    assert!(text.contains("the bare configuration of a model") && text.contains("{\"model_cfg\": …"), "{text}");
    assert!(whole(|file| drop(file.as_object_mut().unwrap().remove("model_cfg"))).contains("`model_cfg` is missing"));
    assert!(
        whole(|file| drop(file["model_cfg"].as_object_mut().unwrap().remove("embed_dim")))
            .contains("`model_cfg.embed_dim` is missing")
    );
    let text = whole(|file| file["preprocess_cfg"]["mean"] = json!([0.5]));
    assert!(text.ends_with("`preprocess_cfg.mean` = [0.5]: expected a number, or one for each of three channels"), "{text}");

    let (model, folder) = hugging_face(&device);
    edit(&folder.path().join("config.json"), |file| {
        file["vision_config"]["image_size"] = json!([8, 8]);
        file["vision_config"]["patch_size"] = json!({ "height": 4, "width": 4 });
    });
    is_same(folder.path(), &model, &device);
    edit(&folder.path().join("config.json"), |file| file["vision_config"]["image_size"] = json!([8, 16]));
    assert!(error(folder.path()).contains("`vision_config.image_size` = 8 x 16 is not supported"));
    for (setting, value, expected) in [
        (
            "size",
            json!({ "longest_edge": 8 }),
            "`processor.size` = {\"longest_edge\":8}: expected a whole number, `{\"shortest_edge\": …}` or",
        ),
        ("size", json!({ "shortest_edge": 8, "longest_edge": 9 }), "`processor.size.longest_edge` = 9 is not supported"),
        ("size", json!([8, 9]), "`size` = 8 x 9 is not supported"),
        ("image_mean", json!([0.5]), "`processor.image_mean` = [0.5]: expected a number, or one for each of three channels"),
        ("resample", json!("bicubic"), "`processor.resample` = \"bicubic\": expected 3 (bicubic) or 2 (bilinear)"),
        ("do_resize", json!("true"), "`processor.do_resize` = \"true\": expected true or false"),
    ] {
        let (_, folder) = hugging_face(&device);
        edit(&folder.path().join("preprocessor_config.json"), |file| file[setting] = value);
        let text = error(folder.path());
        assert!(text.contains("preprocessor_config.json: ") && text.contains(expected), "{text}");
    }
    let (model, folder) = hugging_face(&device);
    edit(&folder.path().join("preprocessor_config.json"), |file| {
        file["crop_size"] = json!([8, 8]);
    });
    is_same(folder.path(), &model, &device);
    edit(&folder.path().join("preprocessor_config.json"), |file| file["size"] = json!([8, 8]));
    let read = ClipCheckpoint::read_config(folder.path()).unwrap().vision.preprocessing;
    assert_eq!(read.resize_mode, burn_moe::clip::ResizeMode::Squash);
}

#[test]
fn what_is_no_weights_or_no_configuration_is_told() {
    let pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a21\nsize 605143316\n";
    for (name, bytes, expected) in [
        (
            "model.safetensors",
            pointer,
            "model.safetensors holds no weights: it is a pointer of Git LFS in place of the file, which `git lfs pull`",
        ),
        ("pytorch_model.bin", pointer, "pytorch_model.bin holds no weights: it is a pointer of Git LFS"),
        ("pytorch_model.bin", "<!doctype html><html>", "holds no weights: it is a web page"),
        (
            "model.safetensors",
            "Entry not found",
            "holds no weights: it is what a server answered in place of the file (\"Entry not found\")",
        ),
        ("model.safetensors", "", "holds no weights: it is empty"),
        (
            "pytorch_model.bin",
            "PK\u{3}\u{4} and so on model/constants.pkl",
            "it is a TorchScript archive, as OpenAI's are; write its weights",
        ),
        ("config.json", pointer, "config.json: it is a pointer of Git LFS"),
        ("preprocessor_config.json", "<html>", "preprocessor_config.json: it is a web page"),
        ("merges.txt", pointer, "merges.txt: it is a pointer of Git LFS"),
        ("tokenizer_config.json", "Entry not found", "tokenizer_config.json: it is what a server answered"),
    ] {
        let (_, folder) = hugging_face(&Device::default());
        if name == "pytorch_model.bin" {
            fs::remove_file(folder.path().join("model.safetensors")).unwrap();
        }
        fs::write(folder.path().join(name), bytes).unwrap();
        let text = error(folder.path());
        assert!(text.contains(expected), "{text}");
    }
}

#[test]
fn what_is_written_says_that_it_is_for_pytorch() {
    let (_, folder) = hugging_face(&Device::default());
    let bytes = fs::read(folder.path().join("model.safetensors")).unwrap();
    let (_, metadata) = SafeTensors::read_metadata(&bytes).unwrap();
    assert_eq!(metadata.metadata().as_ref().unwrap()["format"], "pt");
}
