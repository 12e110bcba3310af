//! Hugging Face's format: transformers' `CLIPModel` and its image processor.

use serde_json::{Map, Value, json};

use super::{
    CheckpointError,
    config::{ConfigFileError, Result, Section, Side, refuse, refuse_beyond_clip},
    format::{Described, Format, Processor, Towers, no_constants},
    table::{Entry, Form, Table},
    tokenizer::TokenizerFiles,
};
use crate::{
    clip::{ClipConfig, EndOfText, IMAGE_MEAN, IMAGE_STD, ImagePreprocessing, Interpolation, ResizeMode, TextConfig, VisionConfig},
    layer::experts::Activation,
    transformer::EncoderConfig,
};

pub(super) const FORMAT: Format = Format {
    config: "config.json",
    weights: &["model.safetensors", "pytorch_model.bin"],
    read,
    processor: Some(Processor { files: [PROCESSOR, "processor_config.json"], read: read_processor }),
    blocks: ["vision_model.encoder.layers.", "text_model.encoder.layers."],
    entries,
    constants: no_constants,
};

pub(super) const PROCESSOR: &str = "preprocessor_config.json";

fn read(text: &str) -> Result<Described> {
    let root: Map<String, Value> = serde_json::from_str(text)?;
    let towers = match root.get("model_type").and_then(Value::as_str) {
        None | Some("clip") => Towers::Both,
        Some("clip_vision_model") => Towers::Vision,
        Some("clip_text_model") => Towers::Text,
        Some(family) => {
            let text = format!(
                "`model_type` = \"{family}\": this family is not supported; `clip` is (models of CLIP's architecture that read CLIP's tokens)"
            );
            return Err(ConfigFileError(text));
        }
    };
    let architecture = root.get("architectures").and_then(|names| names.get(0)).and_then(Value::as_str);
    if let Some(name @ ("CLIPVisionModel" | "CLIPTextModel")) = architecture {
        let text = format!(
            "`architectures` = [\"{name}\"]: this model has no projection to embeddings: save a `{name}WithProjection` of the same CLIP"
        );
        return Err(ConfigFileError(text));
    }
    // The configuration of a tower alone is a section by itself; of the other one there is only what transformers takes by default.
    let (root, nothing) = (&root, &Map::new());
    let (vision, text) = match towers {
        Towers::Both => (tower(root, "vision_config")?, tower(root, "text_config")?),
        Towers::Vision => (Section { name: "config", map: root }, Section { name: "text_config", map: nothing }),
        Towers::Text => (Section { name: "vision_config", map: nothing }, Section { name: "config", map: root }),
    };
    // transformers leaves out what has its default value.
    let embed_dim: usize = Section { name: "config", map: root }.get("projection_dim", 512)?;
    let vision_encoder = encoder(&vision, [768, 12, 12, 3072])?;
    let text_encoder = encoder(&text, [512, 8, 12, 2048])?;
    let end_of_text = match text.get("eos_token_id", 49407i64)? {
        // An id from before transformers knew CLIP's: it then takes the highest id, and so do we.
        2 => EndOfText::HighestId,
        id => EndOfText::Id(id),
    };
    let vision = VisionConfig::new(vision_encoder, vision.side("image_size", 224)?, vision.side("patch_size", 32)?)
        .with_channels(vision.get("num_channels", 3)?);
    let text = TextConfig::new(text_encoder)
        .with_vocab_size(text.get("vocab_size", 49408)?)
        .with_context_length(text.get("max_position_embeddings", 77)?)
        .with_end_of_text(end_of_text);
    Ok(Described { config: ClipConfig::new(vision, text, embed_dim), towers, tokenizer: TokenizerFiles::Transformers })
}

pub(super) fn to_text(config: &ClipConfig) -> std::result::Result<String, CheckpointError> {
    let (vision, text) = (&config.vision, &config.text);
    refuse_beyond_clip("Hugging Face", config)?;
    for (refused, what) in [
        (text.projection_bias, "a bias of the text projection"),
        (text.hides_its_tokenizer(), "another tokenizer than CLIP's with as many ids"),
        // There, 2 means another rule.
        (text.end_of_text == EndOfText::Id(2), "an end of text of id 2"),
    ] {
        if refused {
            return Err(CheckpointError::NoPlace { format: "Hugging Face", what });
        }
    }
    let encoder = |encoder: &EncoderConfig| {
        json!({
            "hidden_size": encoder.d_model,
            "intermediate_size": encoder.d_ff,
            "num_attention_heads": encoder.n_heads,
            "num_hidden_layers": encoder.n_layers,
            "hidden_act": match encoder.activation {
                Activation::Gelu => "gelu",
                Activation::GeluTanh => "gelu_pytorch_tanh",
                Activation::QuickGelu => "quick_gelu",
                Activation::Relu => "relu",
                Activation::Silu => "silu",
            },
            "layer_norm_eps": encoder.norm_epsilon,
            "projection_dim": config.embed_dim,
        })
    };
    let with = |mut section: Value, more: Value| {
        let (Value::Object(section), Value::Object(more)) = (&mut section, more) else { unreachable!("both are objects") };
        section.extend(more);
        Value::Object(std::mem::take(section))
    };
    let file = json!({
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": config.embed_dim,
        "logit_scale_init_value": config.logit_scale_init,
        "vision_config": with(encoder(&vision.encoder), json!({
            "model_type": "clip_vision_model",
            "image_size": vision.image_size,
            "patch_size": vision.patch_size,
            "num_channels": vision.channels,
        })),
        "text_config": with(encoder(&text.encoder), json!({
            "model_type": "clip_text_model",
            "vocab_size": text.vocab_size,
            "max_position_embeddings": text.context_length,
            // 2 is how transformers marks the rule of the highest id.
            "eos_token_id": match text.end_of_text { EndOfText::HighestId => 2, EndOfText::Id(id) => id },
        })),
    });
    Ok(serde_json::to_string_pretty(&file).expect("JSON can be written"))
}

/// A tower's section of a `CLIPModel`'s configuration. Older files have another one of it, `vision_config_dict`, which transformers takes
/// instead where both are there.
fn tower<'a>(root: &'a Map<String, Value>, name: &'static str) -> Result<Section<'a>> {
    match (root.get(&format!("{name}_dict")), root.get(name)) {
        (Some(Value::Object(map)), _) | (_, Some(Value::Object(map))) => Ok(Section { name, map }),
        _ => Err(ConfigFileError(format!("`{name}` is missing: this is not the configuration of a `CLIPModel`"))),
    }
}

fn encoder(section: &Section, [width, heads, layers, hidden]: [usize; 4]) -> Result<EncoderConfig> {
    let activation = match section.get("hidden_act", "quick_gelu".to_string())?.as_str() {
        "gelu" => Activation::Gelu,
        "gelu_new" | "gelu_pytorch_tanh" => Activation::GeluTanh,
        "quick_gelu" => Activation::QuickGelu,
        "relu" => Activation::Relu,
        "silu" | "swish" => Activation::Silu,
        _ => return Err(section.unsupported("hidden_act", "expected \"gelu\", \"quick_gelu\", \"relu\" or \"silu\"")),
    };
    let config = EncoderConfig::new(
        section.get("hidden_size", width)?,
        section.get("num_attention_heads", heads)?,
        section.get("num_hidden_layers", layers)?,
        section.get("intermediate_size", hidden)?,
    );
    Ok(config.with_activation(activation).with_norm_epsilon(section.get("layer_norm_eps", 1e-5)?))
}

/// A side and how images are resized to it, from a setting of an image processor.
fn size(file: &Section, setting: &str) -> Result<Option<(usize, ResizeMode)>> {
    let expected = "a whole number, `{\"shortest_edge\": …}` or `{\"height\": …, \"width\": …}`";
    match file.map.get(setting) {
        Some(Value::Object(map)) if map.get("shortest_edge").is_some_and(|side| !side.is_null()) => {
            let name = format!("{}.{setting}", file.name);
            let section = Section { name: &name, map };
            section.refuse_others(&["shortest_edge"], &[])?;
            Ok(Some((section.needed("shortest_edge")?, ResizeMode::Shortest)))
        }
        None | Some(Value::Null) => Ok(None),
        Some(Value::Number(_)) => Ok(file.find(setting)?.map(|side| (side, ResizeMode::Shortest))),
        Some(_) => match file.find::<Side>(setting).map_err(|_| file.wrong(setting, expected))? {
            Some(Side::Both([height, width]) | Side::Named { height, width }) if height != width => {
                refuse(setting, format!("{height} x {width}"))
            }
            side => Ok(side.map(|side| side.of_square(setting)).transpose()?.map(|side| (side, ResizeMode::Squash))),
        },
    }
}

/// Reads transformers' `preprocessor_config.json`, or the part of `processor_config.json` that holds the same. What is left out has the value that
/// a `CLIPImageProcessor` gives it, but for sizes, which are then the model's.
fn read_processor(text: &str, image_size: usize) -> Result<ImagePreprocessing> {
    let root: Map<String, Value> = serde_json::from_str(text)?;
    let root = Section { name: "processor", map: &root };
    let file = root.section("image_processor", "image_processor")?.unwrap_or(root);
    // The second is the older name of the first; some files have both.
    let kind: Option<String> = match file.find("image_processor_type")? {
        Some(kind) => Some(kind),
        None => file.find("feature_extractor_type")?,
    };
    if let Some(kind) = kind.filter(|kind| !kind.starts_with("CLIP")) {
        return refuse("image_processor_type", kind);
    }
    for setting in ["do_resize", "do_rescale"] {
        if !file.get(setting, true)? {
            return refuse(setting, false);
        }
    }
    let resized = size(&file, "size")?;
    let resize_mode = resized.map_or(ResizeMode::Shortest, |(_, mode)| mode);
    let resized = resized.map_or(image_size, |(side, _)| side);
    let is_cropped = file.get("do_center_crop", true)?;
    let crop = if is_cropped { size(&file, "crop_size")? } else { None };
    let kept = match crop {
        Some((side, _)) => side,
        // Without a crop, a photo keeps its proportions.
        None if !is_cropped && resize_mode == ResizeMode::Shortest => return refuse("do_center_crop", false),
        None if is_cropped => image_size,
        None => resized,
    };
    if kept != image_size {
        return refuse("crop_size", format!("{kept} with an image size of {image_size}"));
    }
    if resized < kept {
        // transformers would put a black frame around the image.
        return refuse("size", format!("{resized} with a crop of {kept}"));
    }
    let resize_to = (resized != image_size).then_some(resized);
    if let Some(factor) = file.find("rescale_factor")?.filter(|factor: &f64| (factor * 255.0 - 1.0).abs() > 1e-6) {
        return refuse("rescale_factor", factor);
    }
    let interpolation = match file.map.get("resample") {
        None | Some(Value::Null) => Interpolation::Bicubic,
        Some(value) => match value.as_i64() {
            Some(3) => Interpolation::Bicubic,
            Some(2) => Interpolation::Bilinear,
            Some(other) => return refuse("resample", other),
            None => return Err(file.wrong("resample", "3 (bicubic) or 2 (bilinear)")),
        },
    };
    let (mean, std) = match file.get("do_normalize", true)? {
        false => ([0.0; 3], [1.0; 3]),
        true => (file.channels("image_mean", IMAGE_MEAN)?, file.channels("image_std", IMAGE_STD)?),
    };
    Ok(ImagePreprocessing { mean, std, resize_mode, interpolation, resize_to })
}

pub(super) fn processor_text(vision: &VisionConfig) -> String {
    let ImagePreprocessing { mean, std, resize_mode, interpolation, resize_to } = vision.preprocessing;
    let square = |side: usize| json!({ "height": side, "width": side });
    let resize_to = resize_to.unwrap_or(vision.image_size);
    let file = json!({
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": true,
        "do_resize": true,
        "size": match resize_mode {
            ResizeMode::Shortest => json!({ "shortest_edge": resize_to }),
            ResizeMode::Squash => square(resize_to),
        },
        "resample": match interpolation { Interpolation::Bicubic => 3, Interpolation::Bilinear => 2 },
        "do_center_crop": true,
        "crop_size": square(vision.image_size),
        "do_rescale": true,
        "rescale_factor": 1.0 / 255.0,
        "do_normalize": true,
        "image_mean": mean,
        "image_std": std,
    });
    serde_json::to_string_pretty(&file).expect("JSON can be written")
}

/// Every tensor of a configuration.
fn entries(config: &ClipConfig) -> Vec<Entry> {
    let mut table = Table::default();
    let (vision, text, embed) = (&config.vision, &config.text, config.embed_dim);
    let (vd, td, patch) = (vision.encoder.d_model, text.encoder.d_model, vision.patch_size);
    let conv = vec![vd, vision.channels, patch, patch];
    table.add("logit_scale", vec![], "logit_scale", Form::Scalar);
    let name = "vision_model.embeddings";
    table.add(&format!("{name}.patch_embedding.weight"), conv, "vision.patch_embedding.weight", Form::OutputFirst);
    table.same(&format!("{name}.class_embedding"), &[vd], "vision.class_embedding");
    let positions = &[vision.num_tokens(), vd];
    table.same(&format!("{name}.position_embedding.weight"), positions, "vision.position_embedding");
    // The name is misspelt in transformers.
    table.norm("vision_model.pre_layrnorm", vd, "vision.norm_pre");
    table.norm("vision_model.post_layernorm", vd, "vision.norm_post");
    table.weight("visual_projection", vd, embed, "vision.projection");
    let name = "text_model.embeddings";
    table.same(&format!("{name}.token_embedding.weight"), &[text.vocab_size, td], "text.token_embedding.weight");
    let positions = &[text.context_length, td];
    table.same(&format!("{name}.position_embedding.weight"), positions, "text.position_embedding");
    table.norm("text_model.final_layer_norm", td, "text.norm_final");
    table.weight("text_projection", td, embed, "text.projection");
    blocks(&mut table, "vision_model.encoder.layers", "vision.encoder.blocks", &vision.encoder);
    blocks(&mut table, "text_model.encoder.layers", "text.encoder.blocks", &text.encoder);
    table.entries
}

fn blocks(table: &mut Table, key: &str, path: &str, encoder: &EncoderConfig) {
    let (d, f) = (encoder.d_model, encoder.d_ff);
    for index in 0..encoder.n_layers {
        let (key, path) = (format!("{key}.{index}"), format!("{path}.{index}"));
        for (theirs, ours) in [("q_proj", "query"), ("k_proj", "key"), ("v_proj", "value"), ("out_proj", "output")] {
            table.linear(&format!("{key}.self_attn.{theirs}"), d, d, &format!("{path}.attention.{ours}"));
        }
        table.norm(&format!("{key}.layer_norm1"), d, &format!("{path}.norm_attention"));
        table.norm(&format!("{key}.layer_norm2"), d, &format!("{path}.norm_feed_forward"));
        table.mlp(&key, ["mlp.fc1", "mlp.fc2"], d, f, &path);
    }
}
