//! open_clip's configuration.

use serde_json::{Map, Value, json};

use super::MERGES;
use crate::{
    clip::{
        ClipConfig, EndOfText, IMAGE_MEAN, IMAGE_STD, ImagePreprocessing, Interpolation, ResizeMode, TextConfig, TokenizerKind,
        VisionConfig,
        checkpoint::{
            CheckpointError,
            config::{ConfigFileError, Known, LEFT_OUT, Result, Section, refuse, refuse_beyond_clip},
            format::Described,
            tokenizer::TokenizerFiles,
        },
        text::{CLIP_VOCAB_SIZE, SMALLEST_CLIP_VOCAB_SIZE},
    },
    layer::experts::Activation,
    transformer::EncoderConfig,
};

// What each section may say beside what is read: what is so anyway, and what changes nothing at inference.

const MODEL: [Known; 5] = [
    ("custom_text", None),
    ("init_logit_scale", None),
    ("nonscalar_logit_scale", None),
    ("cast_dtype", None),
    ("output_dict", None),
];

const VISION: [Known; 11] = [
    ("pool_type", Some(&["tok"])),
    ("pos_embed_type", Some(&["learnable"])),
    ("block_type", Some(&["default"])),
    ("patch_dropout", None),
    // Of the attention pooling, which a CLIP has not.
    ("attn_pooler_queries", None),
    ("attn_pooler_heads", None),
    // Of timm's towers, one of which `timm_model_name` would name.
    ("timm_model_pretrained", None),
    ("timm_pool", None),
    ("timm_proj", None),
    ("timm_drop", None),
    ("timm_drop_path", None),
];

const TEXT: [Known; 6] = [
    ("proj_type", Some(&["linear"])),
    ("block_type", Some(&["default"])),
    ("pad_id", None),
    // Of transformers' towers, one of which `hf_model_name` would name.
    ("hf_model_pretrained", None),
    ("hf_proj_type", None),
    ("hf_pooler_type", None),
];

pub(super) fn read(text: &str) -> Result<Described> {
    let root: Map<String, Value> = serde_json::from_str(text)?;
    let root = Section { name: "open_clip_config", map: &root };
    let Some(model) = root.section("model_cfg", "model_cfg")? else {
        let is_bare = root.map.contains_key("vision_cfg");
        return Err(ConfigFileError(match is_bare {
            true => "this is the bare configuration of a model, without `preprocess_cfg`: write `{\"model_cfg\": …, \"preprocess_cfg\": {…}}`, \
                     with it in place of the dots, and in `preprocess_cfg` how the model's images are prepared (`{}`: as CLIP's)"
                .into(),
            false => "`model_cfg` is missing: this is not the configuration of an open_clip model".into(),
        }));
    };
    let part = |name| {
        let missing = || ConfigFileError(format!("`model_cfg.{name}` is missing: this is not the configuration of a CLIP"));
        model.section(name, name)?.ok_or_else(missing)
    };
    let (v, t) = (part("vision_cfg")?, part("text_cfg")?);
    check_family([&model, &v, &t])?;
    let quick_gelu = model.get("quick_gelu", false)?;
    let activation = if quick_gelu { Activation::QuickGelu } else { Activation::Gelu };
    let encoder = |section: &Section, width: usize, heads: usize| -> Result<EncoderConfig> {
        let hidden = width as f64 * section.get("mlp_ratio", 4.0)? + 1e-6;
        Ok(EncoderConfig::new(width, heads, section.get("layers", LEFT_OUT)?, hidden as usize))
    };
    let width: usize = v.get("width", 768)?;
    let heads = width.checked_div(v.get("head_width", 64)?).unwrap_or(0);
    let preprocessing =
        root.section("preprocess_cfg", "preprocess_cfg")?.map_or(Ok(ImagePreprocessing::new()), read_preprocessing)?;
    let vision = VisionConfig::new(encoder(&v, width, heads)?, v.side("image_size", 224)?, v.side("patch_size", 16)?)
        .with_preprocessing(preprocessing);
    let text = TextConfig::new(encoder(&t, t.get("width", 512)?, t.get("heads", 8)?)?)
        .with_vocab_size(t.get("vocab_size", CLIP_VOCAB_SIZE)?)
        .with_context_length(t.get("context_length", 77)?)
        .with_projection_bias(t.get("proj_bias", false)?);
    let embed_dim = model.needed("embed_dim")?;

    model.refuse_others(&["embed_dim", "quick_gelu", "vision_cfg", "text_cfg"], &MODEL)?;
    v.refuse_others(&["layers", "width", "head_width", "mlp_ratio", "image_size", "patch_size"], &VISION)?;
    let read = ["context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio", "proj_bias"];
    let checked = ["pool_type", "eos_id", "hf_tokenizer_name", "tokenizer_kwargs"];
    t.refuse_others(&[&read[..], &checked].concat(), &TEXT)?;
    check_pooling(&t, text.vocab_size)?;
    let tokenizer = read_tokenizer(&t, &text)?;
    Ok(Described { tokenizer, ..ClipConfig::new(vision, text, embed_dim).activation(activation).into() })
}

/// Refuses models whose towers are not CLIP's transformers, by what they are.
fn check_family([model, vision, text]: [&Section; 3]) -> Result<()> {
    const SUPPORTED: &str = "CLIPs of two transformers, as ViT-B-32, are supported";
    let is_set = |section: &Section, setting: &str| section.map.get(setting).is_some_and(|value| !value.is_null() && value != "");
    if vision.map.get("layers").is_some_and(Value::is_array) {
        return Err(vision.unsupported("layers", &format!("this is a ResNet; {SUPPORTED}")));
    }
    for (section, setting, what) in [
        (vision, "timm_model_name", "its vision tower is one of timm's"),
        (text, "hf_model_name", "its text tower is one of transformers'"),
        (model, "multimodal_cfg", "this is a CoCa"),
        (model, "init_logit_bias", "this is a SigLIP"),
    ] {
        if is_set(section, setting) {
            return Err(section.unsupported(setting, &format!("{what}; {SUPPORTED}")));
        }
    }
    Ok(())
}

/// Texts are read at the highest id, which is the last one of CLIP's tokenizer.
fn check_pooling(text: &Section, vocab_size: usize) -> Result<()> {
    // The default of open_clip's class.
    let end: usize = text.get("eos_id", 2)?;
    match text.get("pool_type", "argmax".to_string())?.as_str() {
        "argmax" => Ok(()),
        "eos" if end.checked_add(1) == Some(vocab_size) => Ok(()),
        "eos" => {
            Err(text
                .unsupported("pool_type", &format!("with `eos_id` {end}, texts would be read at another token than the last id")))
        }
        _ => Err(text.unsupported("pool_type", "expected \"argmax\", or \"eos\" with the last id as `eos_id`")),
    }
}

/// The tokenizer, as far as the configuration tells: ids of another one, or of texts that were cleaned otherwise, mean something else.
pub(in crate::clip::checkpoint) fn read_tokenizer(section: &Section, text: &TextConfig) -> Result<TokenizerFiles> {
    let name: String = section.get("hf_tokenizer_name", String::new())?;
    if !name.is_empty() && !name.to_lowercase().contains("clip-vit") {
        return Err(section.unsupported("hf_tokenizer_name", "texts are read with CLIP's tokenizer"));
    }
    let default = match text.vocab_size {
        // A tokenizer of transformers is read from the folder, whatever it is called.
        _ if !name.is_empty() => TokenizerFiles::Transformers,
        CLIP_VOCAB_SIZE => TokenizerFiles::None,
        _ => TokenizerFiles::Merges(MERGES),
    };
    let Some(settings) = section.section("tokenizer_kwargs", "text_cfg.tokenizer_kwargs")? else { return Ok(default) };
    // transformers' own have other settings, and cut nothing of CLIP's texts.
    let known: [Known; 1] = [("clean", Some(if name.is_empty() { &["lower"] } else { &["whitespace", "lower"] }))];
    settings.refuse_others(&["bpe_path", "context_length"], &known)?;
    if settings.find("context_length")?.is_some_and(|length: usize| length != text.context_length) {
        let why = format!("the model's texts have `context_length` {}", text.context_length);
        return Err(settings.unsupported("context_length", &why));
    }
    Ok(settings.find("bpe_path")?.map_or(default, TokenizerFiles::BpePath))
}

/// Whether a checkpoint needs a file of merges: open_clip has those of CLIP's whole vocabulary itself.
pub(in crate::clip::checkpoint) fn has_merges(text: &TextConfig) -> bool {
    text.tokenizer == TokenizerKind::ClipBpe && (SMALLEST_CLIP_VOCAB_SIZE..CLIP_VOCAB_SIZE).contains(&text.vocab_size)
}

pub(in crate::clip::checkpoint) fn to_text(config: &ClipConfig) -> std::result::Result<String, CheckpointError> {
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
    let tower =
        |encoder: &EncoderConfig| json!({ "layers": encoder.n_layers, "width": encoder.d_model, "mlp_ratio": ratio(encoder) });
    let mut file = json!({
        "model_cfg": {
            "embed_dim": config.embed_dim,
            "quick_gelu": vision.encoder.activation == Activation::QuickGelu,
            "vision_cfg": tower(&vision.encoder),
            "text_cfg": tower(&text.encoder),
        },
        "preprocess_cfg": written(&vision.preprocessing),
    });
    let mut add = |part: &str, settings: Value| {
        let section = file["model_cfg"][part].as_object_mut().expect("it is an object");
        section.extend(settings.as_object().expect("they are an object").clone());
    };
    let head_width = vision.encoder.d_model / vision.encoder.n_heads;
    add("vision_cfg", json!({ "head_width": head_width, "patch_size": vision.patch_size, "image_size": vision.image_size }));
    add(
        "text_cfg",
        json!({
            "context_length": text.context_length,
            "vocab_size": text.vocab_size,
            "heads": text.encoder.n_heads,
            "proj_bias": text.projection_bias,
        }),
    );
    if has_merges(text) {
        add("text_cfg", json!({ "tokenizer_kwargs": { "bpe_path": MERGES } }));
    }
    Ok(serde_json::to_string_pretty(&file).expect("JSON can be written"))
}

/// Reads `preprocess_cfg`. open_clip takes the size from the model, whatever is said here.
fn read_preprocessing(section: Section) -> Result<ImagePreprocessing> {
    let text = |setting: &str, default: &str| section.get(setting, default.to_string());
    let interpolation = match text("interpolation", "bicubic")?.as_str() {
        // A random choice is made in training only.
        "bicubic" | "random" => Interpolation::Bicubic,
        "bilinear" => Interpolation::Bilinear,
        other => return refuse("preprocess_cfg.interpolation", other),
    };
    let resize_mode = match text("resize_mode", "shortest")?.as_str() {
        "shortest" => ResizeMode::Shortest,
        "squash" => ResizeMode::Squash,
        other => return refuse("preprocess_cfg.resize_mode", other),
    };
    let mode = text("mode", "RGB")?;
    if mode != "RGB" {
        return refuse("preprocess_cfg.mode", mode);
    }
    let (mean, std) = (section.channels("mean", IMAGE_MEAN)?, section.channels("std", IMAGE_STD)?);
    Ok(ImagePreprocessing { mean, std, resize_mode, interpolation, resize_to: None })
}

fn written(preprocessing: &ImagePreprocessing) -> Value {
    json!({
        "mean": preprocessing.mean,
        "std": preprocessing.std,
        "interpolation": match preprocessing.interpolation {
            Interpolation::Bicubic => "bicubic",
            Interpolation::Bilinear => "bilinear",
        },
        "resize_mode": match preprocessing.resize_mode {
            ResizeMode::Shortest => "shortest",
            ResizeMode::Squash => "squash",
        },
        "mode": "RGB",
    })
}
