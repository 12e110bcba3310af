//! Hugging Face's format: transformers' `CLIPModel` and its image processor.

use serde::{Deserialize, de::DeserializeOwned};
use serde_json::{Map, Value, json};

use super::{
    CheckpointError,
    config::{Channels, ConfigFileError, Result, refuse, refuse_beyond_clip},
    format::{Described, Format, Processor, Towers, no_constants},
    table::{Entry, Form, Table},
};
use crate::{
    clip::{
        ClipConfig, EndOfText, IMAGE_MEAN, IMAGE_STD, ImagePreprocessing, Interpolation, ResizeMode, TextConfig, VisionConfig,
        text::CLIP_VOCAB_SIZE,
    },
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
    // The configuration of a tower alone is a section by itself; of the other one there is only what transformers takes by default.
    let (root, nothing) = (&root, &Map::new());
    let (vision, text) = match towers {
        Towers::Both => (Section::tower(root, "vision_config")?, Section::tower(root, "text_config")?),
        Towers::Vision => (Section { name: "config", map: root }, Section { name: "text_config", map: nothing }),
        Towers::Text => (Section { name: "vision_config", map: nothing }, Section { name: "config", map: root }),
    };
    // transformers leaves out what has its default value.
    let embed_dim: usize = Section { name: "config", map: root }.get("projection_dim", 512)?;
    let vision_encoder = vision.encoder([768, 12, 12, 3072])?;
    let text_encoder = text.encoder([512, 8, 12, 2048])?;
    let end_of_text = match text.get("eos_token_id", 49407i64)? {
        // An id from before transformers knew CLIP's: it then takes the highest id, and so do we.
        2 => EndOfText::HighestId,
        id => EndOfText::Id(id),
    };
    let vision = VisionConfig::new(vision_encoder, vision.get("image_size", 224)?, vision.get("patch_size", 32)?)
        .with_channels(vision.get("num_channels", 3)?);
    let text = TextConfig::new(text_encoder)
        .with_vocab_size(text.get("vocab_size", 49408)?)
        .with_context_length(text.get("max_position_embeddings", 77)?)
        .with_end_of_text(end_of_text);
    let merges = (text.vocab_size != CLIP_VOCAB_SIZE).then(|| "merges.txt".to_string());
    Ok(Described { config: ClipConfig::new(vision, text, embed_dim), towers, merges })
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

/// An object inside Hugging Face's file.
struct Section<'a> {
    name: &'static str,
    map: &'a Map<String, Value>,
}

impl<'a> Section<'a> {
    /// A tower's section of a `CLIPModel`'s configuration. Older files have another one of it, `vision_config_dict`, which transformers takes
    /// instead where both are there.
    fn tower(root: &'a Map<String, Value>, name: &'static str) -> Result<Self> {
        match (root.get(&format!("{name}_dict")), root.get(name)) {
            (Some(Value::Object(map)), _) | (_, Some(Value::Object(map))) => Ok(Self { name, map }),
            _ => Err(ConfigFileError(format!("`{name}` is missing: this is not the configuration of a `CLIPModel`"))),
        }
    }

    fn get<T: DeserializeOwned>(&self, field: &str, default: T) -> Result<T> {
        match self.map.get(field) {
            None | Some(Value::Null) => Ok(default),
            Some(value) => serde_json::from_value(value.clone())
                .map_err(|error| ConfigFileError(format!("`{}.{field}` = {value}: {error}", self.name))),
        }
    }

    fn encoder(&self, [width, heads, layers, hidden]: [usize; 4]) -> Result<EncoderConfig> {
        let activation: String = self.get("hidden_act", "quick_gelu".to_string())?;
        let activation = match activation.as_str() {
            "gelu" => Activation::Gelu,
            "gelu_new" | "gelu_pytorch_tanh" => Activation::GeluTanh,
            "quick_gelu" => Activation::QuickGelu,
            "relu" => Activation::Relu,
            "silu" | "swish" => Activation::Silu,
            other => {
                let text = format!(
                    "`{}.hidden_act` = \"{other}\" is not supported: expected \"gelu\", \"quick_gelu\", \"relu\" or \"silu\"",
                    self.name
                );
                return Err(ConfigFileError(text));
            }
        };
        let config = EncoderConfig::new(
            self.get("hidden_size", width)?,
            self.get("num_attention_heads", heads)?,
            self.get("num_hidden_layers", layers)?,
            self.get("intermediate_size", hidden)?,
        );
        Ok(config.with_activation(activation).with_norm_epsilon(self.get("layer_norm_eps", 1e-5)?))
    }
}

/// transformers' `preprocessor_config.json`, or the part of `processor_config.json` that holds the same. What is left out has the value that a
/// `CLIPImageProcessor` gives it, but for sizes, which are then the model's.
#[derive(Deserialize)]
struct HuggingFaceProcessor {
    image_processor_type: Option<String>,
    /// The older name of the same; some files have both.
    feature_extractor_type: Option<String>,
    do_resize: Option<bool>,
    size: Option<Size>,
    resample: Option<u8>,
    do_center_crop: Option<bool>,
    crop_size: Option<Size>,
    do_rescale: Option<bool>,
    rescale_factor: Option<f64>,
    do_normalize: Option<bool>,
    image_mean: Option<Channels>,
    image_std: Option<Channels>,
}

#[derive(Deserialize, Clone, Copy)]
#[serde(untagged)]
enum Size {
    Side(usize),
    Shortest { shortest_edge: usize },
    Both { height: usize, width: usize },
}

impl Size {
    /// The side of a square.
    fn side(self, setting: &str) -> Result<usize> {
        match self {
            Self::Side(side) | Self::Shortest { shortest_edge: side } => Ok(side),
            Self::Both { height, width } if height == width => Ok(height),
            Self::Both { height, width } => refuse(setting, format!("{height} x {width}")),
        }
    }
}

fn read_processor(text: &str, image_size: usize) -> Result<ImagePreprocessing> {
    let mut value: Value = serde_json::from_str(text)?;
    if let Some(nested) = value.get_mut("image_processor") {
        value = nested.take();
    }
    let file: HuggingFaceProcessor = serde_json::from_value(value)?;
    let kind = file.image_processor_type.or(file.feature_extractor_type);
    if let Some(kind) = kind.filter(|kind| !kind.starts_with("CLIP")) {
        return refuse("image_processor_type", kind);
    }
    for (setting, done) in [("do_resize", file.do_resize), ("do_rescale", file.do_rescale)] {
        if done == Some(false) {
            return refuse(setting, false);
        }
    }
    let resize_mode = match file.size {
        Some(Size::Both { .. }) => ResizeMode::Squash,
        _ => ResizeMode::Shortest,
    };
    let resized = file.size.map_or(Ok(image_size), |size| size.side("size"))?;
    let is_cropped = file.do_center_crop != Some(false);
    let kept = match file.crop_size.filter(|_| is_cropped) {
        Some(size) => size.side("crop_size")?,
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
    if let Some(factor) = file.rescale_factor.filter(|factor| (factor * 255.0 - 1.0).abs() > 1e-6) {
        return refuse("rescale_factor", factor);
    }
    let interpolation = match file.resample {
        None | Some(3) => Interpolation::Bicubic,
        Some(2) => Interpolation::Bilinear,
        Some(other) => return refuse("resample", other),
    };
    let (mean, std) = match file.do_normalize {
        Some(false) => ([0.0; 3], [1.0; 3]),
        _ => (file.image_mean.map_or(IMAGE_MEAN, Channels::each), file.image_std.map_or(IMAGE_STD, Channels::each)),
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
