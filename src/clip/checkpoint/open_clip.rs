//! open_clip's format.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::{
    CheckpointError,
    burn_moe::sparse_layer,
    config::{Channels, ConfigFileError, LEFT_OUT, Result, refuse, refuse_beyond_clip},
    format::{Described, Format, no_constants},
    table::{Entry, Form, Table},
};
use crate::{
    clip::{
        ClipConfig, EndOfText, IMAGE_MEAN, IMAGE_STD, ImagePreprocessing, Interpolation, Pooling, ResizeMode, TextConfig,
        TokenizerKind, VisionConfig,
        text::{CLIP_VOCAB_SIZE, SMALLEST_CLIP_VOCAB_SIZE},
    },
    layer::experts::Activation,
    transformer::EncoderConfig,
};

pub(super) const FORMAT: Format = Format {
    config: "open_clip_config.json",
    // The second is the name that open_clip wrote first.
    weights: &[
        "open_clip_model.safetensors",
        "open_clip_pytorch_model.safetensors",
        "open_clip_pytorch_model.bin",
        "open_clip_pytorch_model.pt",
    ],
    read,
    processor: None,
    blocks: ["visual.transformer.resblocks.", "transformer.resblocks."],
    entries,
    constants: no_constants,
};

/// Our name for the file of the merges, which open_clip calls `bpe_path`.
pub(super) const MERGES: &str = "merges.txt.gz";

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
    #[serde(default = "left_out")]
    layers: usize,
    #[serde(default = "vision_width")]
    width: usize,
    #[serde(default = "head_width")]
    head_width: usize,
    #[serde(default = "patch_size")]
    patch_size: usize,
    #[serde(default = "image_size")]
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
    #[serde(default = "text_width")]
    width: usize,
    #[serde(default = "heads")]
    heads: usize,
    #[serde(default = "left_out")]
    layers: usize,
    #[serde(default = "mlp_ratio")]
    mlp_ratio: f64,
    #[serde(default)]
    proj_bias: bool,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    tokenizer_kwargs: Option<TokenizerKwargs>,
    #[serde(flatten)]
    rest: Map<String, Value>,
}

/// Arguments of open_clip's tokenizer; the others change nothing in what is trained on.
#[derive(Deserialize, Serialize, Default)]
struct TokenizerKwargs {
    /// The file of the merges, packed with gzip, if they are not CLIP's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    bpe_path: Option<String>,
}

// What open_clip takes for settings that a file leaves out.

fn left_out() -> usize {
    LEFT_OUT
}

fn vision_width() -> usize {
    768
}

fn patch_size() -> usize {
    16
}

fn image_size() -> usize {
    224
}

fn text_width() -> usize {
    512
}

fn heads() -> usize {
    8
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

/// Settings whose value here says what is so anyway; any value (`None`) of those that change nothing at inference.
const KNOWN: [(&str, Option<&str>); 14] = [
    ("pool_type", Some("tok")),
    ("pool_type", Some("argmax")),
    ("proj_type", Some("linear")),
    ("pos_embed_type", Some("learnable")),
    ("eos_id", Some("49407")),
    ("pad_id", None),
    ("custom_text", None),
    ("patch_dropout", None),
    ("init_logit_scale", None),
    ("nonscalar_logit_scale", None),
    ("attn_pooler_queries", None),
    ("attn_pooler_heads", None),
    ("timm_drop", None),
    ("timm_drop_path", None),
];

/// A setting that is not known changes nothing when it is off; otherwise the model would be another one.
pub(super) fn refuse_unknown(part: &str, rest: &Map<String, Value>, known: &[(&str, Option<&str>)]) -> Result<()> {
    for (name, value) in rest {
        let off = match value {
            Value::Null | Value::Bool(false) => true,
            Value::Number(number) => number.as_f64() == Some(0.0),
            Value::Object(map) => map.is_empty(),
            Value::Array(list) => list.is_empty(),
            Value::String(text) => text.is_empty(),
            _ => false,
        };
        let text = value.as_str().map_or_else(|| value.to_string(), str::to_string);
        let known = known.iter().any(|(known, wanted)| known == name && wanted.is_none_or(|wanted| text == wanted));
        if name == "hf_tokenizer_name" && !off {
            // The ids of another tokenizer mean something else, whatever their number.
            if text.to_lowercase().contains("clip-vit") {
                continue;
            }
            return Err(ConfigFileError(format!(
                "`{part}.{name}` = {value} is not supported: texts are read with CLIP's tokenizer"
            )));
        }
        if !off && !known {
            return Err(ConfigFileError(format!("`{part}.{name}` = {value} is not supported")));
        }
    }
    Ok(())
}

fn read(text: &str) -> Result<Described> {
    let OpenClipFile { model_cfg: model, preprocess_cfg } = serde_json::from_str(text)?;
    refuse_unknown("model_cfg", &model.rest, &KNOWN)?;
    refuse_unknown("vision_cfg", &model.vision_cfg.rest, &KNOWN)?;
    refuse_unknown("text_cfg", &model.text_cfg.rest, &KNOWN)?;
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
    let other = (t.vocab_size != CLIP_VOCAB_SIZE).then(|| MERGES.to_string());
    let merges = t.tokenizer_kwargs.and_then(|kwargs| kwargs.bpe_path).or(other);
    Ok(Described { merges, ..ClipConfig::new(vision, text, model.embed_dim).activation(activation).into() })
}

/// Whether a checkpoint needs a file of merges: open_clip has those of CLIP's whole vocabulary itself.
pub(super) fn has_merges(text: &TextConfig) -> bool {
    text.tokenizer == TokenizerKind::ClipBpe && (SMALLEST_CLIP_VOCAB_SIZE..CLIP_VOCAB_SIZE).contains(&text.vocab_size)
}

pub(super) fn to_text(config: &ClipConfig) -> std::result::Result<String, CheckpointError> {
    let (vision, text) = (&config.vision, &config.text);
    refuse_beyond_clip("open_clip", config)?;
    for (refused, what) in [
        (vision.encoder.activation != text.encoder.activation, "another activation in each tower"),
        (!matches!(vision.encoder.activation, Activation::Gelu | Activation::QuickGelu), "this activation"),
        (text.end_of_text != EndOfText::HighestId, "an end-of-text id"),
        (text.hides_its_tokenizer(), "another tokenizer than CLIP's with as many ids"),
        (
            cfg!(not(feature = "preprocess")) && has_merges(text),
            "a cut vocabulary of CLIP's tokenizer, unless the feature `preprocess` is enabled",
        ),
        (vision.channels != 3, "other than 3 colour channels"),
        (
            vision.preprocessing.resize_to.is_some_and(|side| side != vision.image_size),
            "images that are resized to more than is kept",
        ),
        (vision.encoder.norm_epsilon != 1e-5 || text.encoder.norm_epsilon != 1e-5, "another layer-norm epsilon than 1e-5"),
    ] {
        if refused {
            return Err(CheckpointError::NoPlace { format: "open_clip", what });
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
            tokenizer_kwargs: has_merges(text).then(|| TokenizerKwargs { bpe_path: Some(MERGES.into()) }),
            rest: Map::new(),
        },
        rest: Map::new(),
    };
    let file = serde_json::json!({ "model_cfg": model, "preprocess_cfg": OpenClipPreprocess::of(&vision.preprocessing) });
    Ok(serde_json::to_string_pretty(&file).expect("JSON can be written"))
}

/// open_clip's `preprocess_cfg`. It takes the size from the model, whatever is said here.
#[derive(Deserialize, Serialize, Default)]
struct OpenClipPreprocess {
    mean: Option<Channels>,
    std: Option<Channels>,
    interpolation: Option<String>,
    resize_mode: Option<String>,
    mode: Option<String>,
}

impl OpenClipPreprocess {
    fn read(self) -> Result<ImagePreprocessing> {
        let interpolation = match self.interpolation.as_deref() {
            // A random choice is made in training only.
            None | Some("bicubic" | "random") => Interpolation::Bicubic,
            Some("bilinear") => Interpolation::Bilinear,
            Some(other) => return refuse("preprocess_cfg.interpolation", other),
        };
        let resize_mode = match self.resize_mode.as_deref() {
            None | Some("shortest") => ResizeMode::Shortest,
            Some("squash") => ResizeMode::Squash,
            Some(other) => return refuse("preprocess_cfg.resize_mode", other),
        };
        if let Some(mode) = self.mode.filter(|mode| mode != "RGB") {
            return refuse("preprocess_cfg.mode", mode);
        }
        Ok(ImagePreprocessing {
            mean: self.mean.map_or(IMAGE_MEAN, Channels::each),
            std: self.std.map_or(IMAGE_STD, Channels::each),
            resize_mode,
            interpolation,
            resize_to: None,
        })
    }

    fn of(preprocessing: &ImagePreprocessing) -> Self {
        let interpolation = match preprocessing.interpolation {
            Interpolation::Bicubic => "bicubic",
            Interpolation::Bilinear => "bilinear",
        };
        let resize_mode = match preprocessing.resize_mode {
            ResizeMode::Shortest => "shortest",
            ResizeMode::Squash => "squash",
        };
        Self {
            mean: Some(Channels::Each(preprocessing.mean)),
            std: Some(Channels::Each(preprocessing.std)),
            interpolation: Some(interpolation.into()),
            resize_mode: Some(resize_mode.into()),
            mode: Some("RGB".into()),
        }
    }
}

/// Every tensor of a configuration; a sparse layer has this crate's own names.
pub(super) fn entries(config: &ClipConfig) -> Vec<Entry> {
    let mut table = Table::default();
    let (vision, text, embed) = (&config.vision, &config.text, config.embed_dim);
    let (vd, td, patch) = (vision.encoder.d_model, text.encoder.d_model, vision.patch_size);
    let conv = vec![vd, vision.channels, patch, patch];
    table.add("logit_scale", vec![], "logit_scale", Form::Scalar);
    table.add("visual.conv1.weight", conv, "vision.patch_embedding.weight", Form::OutputFirst);
    if vision.class_token {
        table.same("visual.class_embedding", &[vd], "vision.class_embedding");
    }
    if vision.position_table {
        table.same("visual.positional_embedding", &[vision.num_tokens(), vd], "vision.position_embedding");
    }
    table.norms(config);
    if let Pooling::Attention { .. } = vision.pooling {
        table.same("visual.attn_pool.probe", &[vd], "vision.pooling.probe");
        table.pooling("visual.attn_pool", vd, "vision.pooling");
    }
    table.same("visual.proj", &[vd, embed], "vision.projection.weight");
    table.same("token_embedding.weight", &[text.vocab_size, td], "text.token_embedding.weight");
    table.same("positional_embedding", &[text.context_length, td], "text.position_embedding");
    match text.projection_bias {
        false => table.same("text_projection", &[td, embed], "text.projection.weight"),
        true => table.linear("text_projection", td, embed, "text.projection"),
    }
    blocks(&mut table, "visual.transformer.resblocks", "vision.encoder.blocks", &vision.encoder);
    blocks(&mut table, "transformer.resblocks", "text.encoder.blocks", &text.encoder);
    table.entries
}

fn blocks(table: &mut Table, key: &str, path: &str, encoder: &EncoderConfig) {
    let (d, f) = (encoder.d_model, encoder.d_ff);
    for index in 0..encoder.n_layers {
        let (key, path) = (format!("{key}.{index}"), format!("{path}.{index}"));
        table.attention(&format!("{key}.attn"), d, &format!("{path}.attention"));
        table.norm(&format!("{key}.ln_1"), d, &format!("{path}.norm_attention"));
        table.norm(&format!("{key}.ln_2"), d, &format!("{path}.norm_feed_forward"));
        match encoder.sparse_block(index) {
            None => {
                table.mlp(&key, ["mlp.c_fc", "mlp.c_proj"], d, f, &path);
                if encoder.form.is_gated() {
                    table.gate(&format!("{key}.mlp.c_gate"), d, f, &path);
                }
            }
            Some(sparse) => sparse_layer(table, &format!("{key}.moe"), encoder, sparse, &path),
        }
    }
}
