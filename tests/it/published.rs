//! Checkpoints as others publish them.

use std::{borrow::Cow, collections::HashMap, fs, path::Path};

use burn::tensor::{Device, Tensor};
use burn_moe::{
    clip::{
        Clip, ClipConfig, EndOfText, PromptError, TextConfig, TextEmbedder, VisionConfig,
        checkpoint::{ClipCheckpoint, LoadOptions, Precision},
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
    for name in [&|key: &str| format!("module.{key}") as String, &|key: &str| format!("_orig_mod.module.{key}"), &|key: &str| {
        if is_text(key) { format!("text.{key}") } else { key.to_string() }
    }] as [&dyn Fn(&str) -> String; 3]
    {
        let (model, folder) = open_clip(&device);
        rename(&folder.path().join("open_clip_model.safetensors"), name, vec![]);
        is_same(folder.path(), &model, &device);
    }
    let twice = Stored(Dtype::F32, vec![8], vec![0; 32]);
    let (_, folder_with_twice) = open_clip(&device);
    let path = folder_with_twice.path().join("open_clip_model.safetensors");
    rename(&path, |key| if is_text(key) { format!("text.{key}") } else { key.to_string() }, vec![("ln_final.weight", twice)]);
    assert!(error(folder_with_twice.path()).ends_with("has `ln_final.weight` twice"));
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
    let error = TokenizerMismatch::Vocabulary { model: 600 };
    fs::write(folder.path().join("hugging_face/merges.txt"), merges.replace("t h\n", "h t\n")).unwrap();
    assert_eq!(embeds("hugging_face").unwrap_err(), error);
    fs::remove_file(folder.path().join("open_clip/merges.txt.gz")).unwrap();
    assert_eq!(embeds("open_clip").unwrap_err(), error);
    // open_clip's models with a list of their own.
    edit_open_clip(&folder.path().join("open_clip"), |file| {
        file["model_cfg"]["text_cfg"]["tokenizer_kwargs"]["bpe_path"] = "/home/them/own_bpe.txt.gz".into();
    });
    assert_eq!(embeds("open_clip").unwrap_err(), error);
}

#[test]
fn what_is_written_says_that_it_is_for_pytorch() {
    let (_, folder) = hugging_face(&Device::default());
    let bytes = fs::read(folder.path().join("model.safetensors")).unwrap();
    let (_, metadata) = SafeTensors::read_metadata(&bytes).unwrap();
    assert_eq!(metadata.metadata().as_ref().unwrap()["format"], "pt");
}
