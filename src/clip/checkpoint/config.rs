//! Configuration files of each layout.

use serde::{Deserialize, Serialize, de::DeserializeOwned};
use serde_json::{Map, Value};

use super::{CheckpointError, images::OpenClipPreprocess};
use crate::{
    clip::{ClipConfig, EndOfText, ImagePreprocessing, TextConfig, VisionConfig},
    experts::Activation,
    transformer::{EncoderConfig, SparseEncoderConfig, SparseLayer},
};

/// What is wrong in a configuration file, in words.
pub(super) struct ConfigFileError(pub String);

impl From<serde_json::Error> for ConfigFileError {
    fn from(error: serde_json::Error) -> Self {
        Self(format!("not the JSON that was expected: {error}"))
    }
}

type Result<T> = std::result::Result<T, ConfigFileError>;

/// Version of `burn_moe_config.json`.
const VERSION: u64 = 4;
/// The oldest one that is still read.
const OLDEST: u64 = 2;

#[derive(Serialize, Deserialize)]
struct BurnMoeFile {
    version: u64,
    clip: Value,
}

pub(super) fn from_burn_moe(text: &str) -> Result<ClipConfig> {
    let mut file: BurnMoeFile = serde_json::from_str(text)?;
    if !(OLDEST..=VERSION).contains(&file.version) {
        let version = file.version;
        return Err(ConfigFileError(format!(
            "version {version} was written by another burn-moe; this one reads {OLDEST} to {VERSION}"
        )));
    }
    if file.version < VERSION {
        add_newer_fields(&mut file.clip)?;
    }
    Ok(serde_json::from_value(file.clip)?)
}

/// Older versions knew nothing of what these fields say, and did what their defaults say.
fn add_newer_fields(clip: &mut Value) -> Result<()> {
    // Since version 4.
    if let Some(Value::Object(vision)) = clip.get_mut("vision") {
        vision.entry("preprocessing").or_insert(serde_json::to_value(ImagePreprocessing::new())?);
    }
    // Since version 3.
    let Value::Object(defaults) = serde_json::to_value(SparseEncoderConfig::new())? else { unreachable!("a config is an object") };
    for tower in ["vision", "text"] {
        let Some(Value::Object(sparse)) = clip.pointer_mut(&format!("/{tower}/encoder/sparse")) else { continue };
        for field in ["layer", "form", "shared_expert", "padding"] {
            sparse.entry(field).or_insert_with(|| defaults[field].clone());
        }
    }
    if let Some(Value::Object(text)) = clip.get_mut("text") {
        text.entry("projection_bias").or_insert(Value::Bool(false));
    }
    Ok(())
}

pub(super) fn to_burn_moe(config: &ClipConfig) -> String {
    let clip = serde_json::to_value(config).expect("a configuration is JSON");
    serde_json::to_string_pretty(&BurnMoeFile { version: VERSION, clip }).expect("JSON can be written")
}

/// The largest size that any field may have: beyond it no model was ever made, and products of three still fit 64 bits.
const LARGEST: usize = 1 << 20;

/// Refuses sizes that only a damaged or hostile file has, before anything is computed from them.
pub(super) fn of_possible_size(config: ClipConfig) -> Result<ClipConfig> {
    let (vision, text) = (&config.vision, &config.text);
    let mut sizes = vec![
        ("embed_dim", config.embed_dim),
        ("image_size", vision.image_size),
        ("patch_size", vision.patch_size),
        ("channels", vision.channels),
        ("patches on a side", vision.image_size.checked_div(vision.patch_size).unwrap_or(0).saturating_pow(2)),
        ("vocab_size", text.vocab_size),
        ("context_length", text.context_length),
    ];
    for encoder in [&vision.encoder, &text.encoder] {
        let widths =
            [("width", encoder.d_model), ("heads", encoder.n_heads), ("layers", encoder.n_layers), ("hidden width", encoder.d_ff)];
        sizes.extend(widths);
        if let Some(sparse) = &encoder.sparse {
            let slots = match sparse.layer {
                SparseLayer::Routed => 1,
                SparseLayer::Soft { slots_per_expert } => slots_per_expert,
            };
            let hidden = [sparse.d_ff, sparse.shared_expert].into_iter().flatten().map(|width| ("hidden width of experts", width));
            sizes.extend(hidden.chain([("experts", sparse.num_experts), ("slots per expert", slots)]));
        }
    }
    match sizes.into_iter().find(|(_, size)| *size > LARGEST) {
        Some((field, size)) => Err(ConfigFileError(format!("{field} of {size}: at most {LARGEST} is possible"))),
        None => Ok(config),
    }
}

#[derive(Deserialize)]
struct OpenClipFile {
    model_cfg: OpenClipModel,
    #[serde(default)]
    preprocess_cfg: Option<OpenClipPreprocess>,
}

#[derive(Deserialize, Serialize)]
struct OpenClipModel {
    embed_dim: usize,
    #[serde(default)]
    quick_gelu: bool,
    vision_cfg: OpenClipVision,
    text_cfg: OpenClipText,
    #[serde(flatten)]
    rest: Map<String, Value>,
}

#[derive(Deserialize, Serialize)]
struct OpenClipVision {
    layers: usize,
    width: usize,
    #[serde(default = "head_width")]
    head_width: usize,
    patch_size: usize,
    image_size: usize,
    #[serde(default = "mlp_ratio")]
    mlp_ratio: f64,
    #[serde(flatten)]
    rest: Map<String, Value>,
}

#[derive(Deserialize, Serialize)]
struct OpenClipText {
    #[serde(default = "context_length")]
    context_length: usize,
    #[serde(default = "vocab_size")]
    vocab_size: usize,
    width: usize,
    heads: usize,
    layers: usize,
    #[serde(default = "mlp_ratio")]
    mlp_ratio: f64,
    #[serde(default)]
    proj_bias: bool,
    #[serde(flatten)]
    rest: Map<String, Value>,
}

fn head_width() -> usize {
    64
}

fn mlp_ratio() -> f64 {
    4.0
}

fn context_length() -> usize {
    77
}

fn vocab_size() -> usize {
    49408
}

/// Settings whose value here says what is so anyway, or that say nothing about the weights.
const KNOWN: [(&str, Option<&str>); 5] = [
    ("pool_type", Some("tok")),
    ("pool_type", Some("argmax")),
    ("init_logit_scale", None),
    ("hf_tokenizer_name", None),
    ("tokenizer_kwargs", None),
];

/// A setting that is not known changes nothing when it is off; otherwise the model would be another one.
fn refuse_unknown(part: &str, rest: &Map<String, Value>) -> Result<()> {
    for (name, value) in rest {
        let off = match value {
            Value::Null | Value::Bool(false) => true,
            Value::Number(number) => number.as_f64() == Some(0.0),
            Value::Object(map) => map.is_empty(),
            Value::Array(list) => list.is_empty(),
            _ => false,
        };
        let known = KNOWN.iter().any(|(known, wanted)| known == name && wanted.is_none_or(|wanted| value == wanted));
        if !off && !known {
            return Err(ConfigFileError(format!("`{part}.{name}` = {value} is not supported")));
        }
    }
    Ok(())
}

pub(super) fn from_open_clip(text: &str) -> Result<ClipConfig> {
    let OpenClipFile { model_cfg: model, preprocess_cfg } = serde_json::from_str(text)?;
    refuse_unknown("model_cfg", &model.rest)?;
    refuse_unknown("vision_cfg", &model.vision_cfg.rest)?;
    refuse_unknown("text_cfg", &model.text_cfg.rest)?;
    let activation = if model.quick_gelu { Activation::QuickGelu } else { Activation::Gelu };
    let encoder =
        |width: usize, heads, layers, ratio: f64| EncoderConfig::new(width, heads, layers, (width as f64 * ratio + 1e-6) as usize);
    let v = model.vision_cfg;
    let heads = v.width.checked_div(v.head_width).unwrap_or(0);
    let vision = VisionConfig::new(encoder(v.width, heads, v.layers, v.mlp_ratio), v.image_size, v.patch_size)
        .with_preprocessing(preprocess_cfg.unwrap_or_default().read()?);
    let t = model.text_cfg;
    let text = TextConfig::new(encoder(t.width, t.heads, t.layers, t.mlp_ratio))
        .with_vocab_size(t.vocab_size)
        .with_context_length(t.context_length)
        .with_projection_bias(t.proj_bias);
    Ok(ClipConfig::new(vision, text, model.embed_dim).activation(activation))
}

pub(super) fn to_open_clip(config: &ClipConfig) -> std::result::Result<String, CheckpointError> {
    let (vision, text) = (&config.vision, &config.text);
    for (refused, what) in [
        (config.is_sparse(), "sparse blocks"),
        (vision.encoder.activation != text.encoder.activation, "another activation in each tower"),
        (!matches!(vision.encoder.activation, Activation::Gelu | Activation::QuickGelu), "this activation"),
        (text.end_of_text != EndOfText::HighestId, "an end-of-text id"),
        (vision.channels != 3, "other than 3 colour channels"),
        (vision.encoder.norm_epsilon != 1e-5 || text.encoder.norm_epsilon != 1e-5, "another layer-norm epsilon than 1e-5"),
    ] {
        if refused {
            return Err(CheckpointError::NoPlace { layout: "open_clip", what });
        }
    }
    // open_clip cuts the fraction off the product; rounding in the quotient must not cost the last unit.
    let ratio = |encoder: &EncoderConfig| {
        let ratio = encoder.d_ff as f64 / encoder.d_model as f64;
        if (ratio * encoder.d_model as f64) as usize == encoder.d_ff {
            ratio
        } else {
            (encoder.d_ff as f64 + 1e-7) / encoder.d_model as f64
        }
    };
    let model = OpenClipModel {
        embed_dim: config.embed_dim,
        quick_gelu: vision.encoder.activation == Activation::QuickGelu,
        vision_cfg: OpenClipVision {
            layers: vision.encoder.n_layers,
            width: vision.encoder.d_model,
            head_width: vision.encoder.d_model / vision.encoder.n_heads,
            patch_size: vision.patch_size,
            image_size: vision.image_size,
            mlp_ratio: ratio(&vision.encoder),
            rest: Map::new(),
        },
        text_cfg: OpenClipText {
            context_length: text.context_length,
            vocab_size: text.vocab_size,
            width: text.encoder.d_model,
            heads: text.encoder.n_heads,
            layers: text.encoder.n_layers,
            mlp_ratio: ratio(&text.encoder),
            proj_bias: text.projection_bias,
            rest: Map::new(),
        },
        rest: Map::new(),
    };
    let file = serde_json::json!({ "model_cfg": model, "preprocess_cfg": OpenClipPreprocess::of(&vision.preprocessing) });
    Ok(serde_json::to_string_pretty(&file).expect("JSON can be written"))
}

pub(super) fn from_hugging_face(text: &str) -> Result<ClipConfig> {
    let root: Map<String, Value> = serde_json::from_str(text)?;
    let vision = Section::new(&root, "vision_config")?;
    let text = Section::new(&root, "text_config")?;
    // transformers leaves out what has its default value.
    let embed_dim: usize = Section { name: "config", map: &root }.get("projection_dim", 512)?;
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
    Ok(ClipConfig::new(vision, text, embed_dim))
}

pub(super) fn to_hugging_face(config: &ClipConfig) -> std::result::Result<String, CheckpointError> {
    let (vision, text) = (&config.vision, &config.text);
    for (refused, what) in [
        (config.is_sparse(), "sparse blocks"),
        (text.projection_bias, "a bias of the text projection"),
        // There, 2 means another rule.
        (text.end_of_text == EndOfText::Id(2), "an end of text of id 2"),
    ] {
        if refused {
            return Err(CheckpointError::NoPlace { layout: "Hugging Face", what });
        }
    }
    let encoder = |encoder: &EncoderConfig| {
        serde_json::json!({
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
    let file = serde_json::json!({
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": config.embed_dim,
        "logit_scale_init_value": config.logit_scale_init,
        "vision_config": with(encoder(&vision.encoder), serde_json::json!({
            "model_type": "clip_vision_model",
            "image_size": vision.image_size,
            "patch_size": vision.patch_size,
            "num_channels": vision.channels,
        })),
        "text_config": with(encoder(&text.encoder), serde_json::json!({
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
    fn new(root: &'a Map<String, Value>, name: &'static str) -> Result<Self> {
        match root.get(name) {
            Some(Value::Object(map)) => Ok(Self { name, map }),
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
