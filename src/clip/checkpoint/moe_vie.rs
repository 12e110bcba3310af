//! MoE-ViE's format: the configuration of a model in facebookresearch/moe_vie, and the state dict of its code. It is read and not written.

use std::sync::Arc;

use serde_json::{Map, Value};

use super::{
    config::{ConfigFileError, Known, Result, Section},
    format::{Described, Format},
    open_clip::read_tokenizer,
    table::{Constant, Entry, Form, Table},
};
use crate::{
    clip::{
        ClipConfig, TextConfig,
        moe_vie::{MoeVieExperts, encoder, hidden_width, vision},
        text::CLIP_VOCAB_SIZE,
    },
    transformer::{EncoderConfig, RotaryPositions, SparseEncoderConfig},
};

pub(super) const FORMAT: Format = Format {
    config: "moevie_config.json",
    // The last ones are the names under which the models were published.
    weights: &["model.safetensors", "model.pt", "MoEViE-B16-224.pt", "MoEViE-L16-384.pt", "MoEViE-H14-448.pt"],
    read,
    processor: None,
    blocks: ["visual.transformer.resblocks.", "transformer.resblocks."],
    entries,
    constants,
};

fn unsupported(field: &str, value: impl std::fmt::Display, why: &str) -> ConfigFileError {
    ConfigFileError(format!("`{field}` = {value} is not supported: {why}"))
}

/// Settings that MoE-ViE's code takes and does not read, or of which nothing depends once weights are loaded.
const WITHOUT_EFFECT: [Known; 7] = [
    ("quick_gelu", None),
    ("init_logit_scale", None),
    ("init_logit_bias", None),
    ("output_dict", None),
    ("cast_dtype", None),
    ("pool_type", None),
    ("final_ln_after_pool", None),
];

/// Left out, a setting has the value that MoE-ViE's code gives it.
fn read(text: &str) -> Result<Described> {
    let root: Map<String, Value> = serde_json::from_str(text)?;
    let model = Section { name: "moevie_config", map: &root };
    let part = |name| {
        let missing = || ConfigFileError(format!("`{name}` is missing: this is not the configuration of a MoE-ViE"));
        model.section(name, name)?.ok_or_else(missing)
    };
    let (v, t) = (part("vision_cfg")?, part("text_cfg")?);
    let width = v.get("width", 768)?;
    let heads = usize::checked_div(width, v.get("head_width", 64)?).unwrap_or(0);
    let layers = v.get("layers", 12)?;
    let d_ff = hidden_width(width, v.get("mlp_ratio", 4.0)?, v.get("gpu_align", false)?);
    let rotary = match v.get("relative_pos_embed_type", String::new())?.as_str() {
        "rope_2d" => Some(RotaryPositions::new()),
        "" => None,
        other => return Err(unsupported("vision_cfg.relative_pos_embed_type", other, "expected `rope_2d` or nothing")),
    };
    // In the other blocks of theirs, each patch looks at itself alone.
    let global: Option<i64> = v.find("global_layers")?;
    if global != Some(-1) && global != i64::try_from(layers).ok() {
        let value = global.map_or("nothing".to_string(), |layers| layers.to_string());
        let why = "only models are in which each block looks at all patches, with -1";
        return Err(unsupported("vision_cfg.global_layers", value, why));
    }
    let sparse = experts(&v, layers)?.map(|experts| experts.config(d_ff));
    let blocks = encoder(width, heads, layers, d_ff).with_rotary(rotary).with_sparse(sparse);
    let (image_size, patch_size) = (v.side("image_size", 224)?, v.side("patch_size", 16)?);
    let vision = vision(blocks, image_size, patch_size, v.get("attn_pooler_heads", 8)?)
        .with_norm_pre(!v.get("no_ln_pre", false)?)
        .with_norm_post(v.get("use_ln_post", true)?);
    let width = t.get("width", 512)?;
    let d_ff = hidden_width(width, t.get("mlp_ratio", 4.0)?, t.get("gpu_align", false)?);
    let text = TextConfig::new(encoder(width, t.get("heads", 8)?, t.get("layers", 12)?, d_ff))
        .with_vocab_size(t.get("vocab_size", CLIP_VOCAB_SIZE)?)
        .with_context_length(t.get("context_length", 77)?)
        .with_norm_final(t.get("use_ln_post", true)?);
    let embed_dim = model.needed("embed_dim")?;
    model.refuse_others(&["embed_dim", "vision_cfg", "text_cfg"], &WITHOUT_EFFECT[..5])?;
    v.refuse_others(&VISION, &WITHOUT_EFFECT[5..])?;
    t.refuse_others(&TEXT, &[])?;
    let tokenizer = read_tokenizer(&t, &text)?;
    let config = ClipConfig::new(vision, text, embed_dim);
    let is_sized = v.map.get("image_size").is_some_and(|size| !size.is_null());
    let config = if is_sized { config } else { of_published_size(config)? };
    Ok(Described { tokenizer, ..config.into() })
}

// What is read of each section.

const VISION: [&str; 17] = [
    "layers",
    "width",
    "head_width",
    "mlp_ratio",
    "patch_size",
    "image_size",
    "attn_pooler_heads",
    "no_ln_pre",
    "use_ln_post",
    "gpu_align",
    "mixture_of_expert",
    "num_of_expert",
    "moe_layers",
    "split",
    "k",
    "relative_pos_embed_type",
    "global_layers",
];

const TEXT: [&str; 10] = [
    "context_length",
    "vocab_size",
    "hf_tokenizer_name",
    "tokenizer_kwargs",
    "width",
    "heads",
    "layers",
    "mlp_ratio",
    "use_ln_post",
    "gpu_align",
];

/// The experts that the configuration names, if blocks have any.
fn experts(v: &Section, layers: usize) -> Result<Option<MoeVieExperts>> {
    // Their code asks for each block whether the list has it.
    let is_block = |index: i64| usize::try_from(index).ok().filter(|index| *index < layers);
    let named: Vec<i64> = v.get("moe_layers", Vec::new())?;
    let mut blocks: Vec<usize> = named.into_iter().filter_map(is_block).collect();
    blocks.sort_unstable();
    blocks.dedup();
    let (count, split, k) = (v.get("num_of_expert", 1)?, v.get("split", 1)?, v.get("k", 1)?);
    if !v.get("mixture_of_expert", false)? || blocks.is_empty() {
        return Ok(None);
    }
    let experts = MoeVieExperts { count, split, k, blocks };
    if experts.numbers().is_none() {
        let numbers = format!("{count}, `k` = {k} and `split` = {split}");
        return Err(unsupported(
            "vision_cfg.num_of_expert",
            numbers,
            "one of each is the shared expert, and none is left to choose",
        ));
    }
    Ok(Some(experts))
}

/// The published configurations leave out the size of images, which their code takes from the command line.
fn of_published_size(config: ClipConfig) -> Result<ClipConfig> {
    for published in [ClipConfig::moe_vie_b_16(), ClipConfig::moe_vie_l_16(), ClipConfig::moe_vie_h_14()] {
        let mut sized = config.clone();
        sized.vision.image_size = published.vision.image_size;
        if serde_json::to_value(&sized)? == serde_json::to_value(&published)? {
            return Ok(sized);
        }
    }
    Ok(config)
}

fn entries(config: &ClipConfig) -> Vec<Entry> {
    let mut table = Table::default();
    let (vision, text, embed) = (&config.vision, &config.text, config.embed_dim);
    let (vd, td, patch) = (vision.encoder.d_model, text.encoder.d_model, vision.patch_size);
    let conv = vec![vd, vision.channels, patch, patch];
    table.add("logit_scale", vec![], "logit_scale", Form::Scalar);
    table.add("visual.conv1.weight", conv, "vision.patch_embedding.weight", Form::OutputFirst);
    table.norms(config);
    table.same("visual.attn_pool.probe", &[1, 1, vd], "vision.pooling.probe");
    table.pooling("visual.attn_pool", vd, "vision.pooling");
    table.same("visual.proj", &[vd, embed], "vision.projection.weight");
    table.same("token_embedding.weight", &[text.vocab_size, td], "text.token_embedding.weight");
    table.same("positional_embedding", &[text.context_length, td], "text.position_embedding");
    table.same("text_projection", &[td, embed], "text.projection.weight");
    blocks(&mut table, FORMAT.blocks[0], "vision.encoder.blocks.", &vision.encoder);
    blocks(&mut table, FORMAT.blocks[1], "text.encoder.blocks.", &text.encoder);
    table.entries
}

fn blocks(table: &mut Table, key: &str, path: &str, encoder: &EncoderConfig) {
    let (d, f) = (encoder.d_model, encoder.d_ff);
    for index in 0..encoder.n_layers {
        let (key, path) = (format!("{key}{index}"), format!("{path}{index}"));
        table.norm(&format!("{key}.attn.ln"), d, &format!("{path}.norm_attention"));
        table.attention(&format!("{key}.attn.attn"), d, &format!("{path}.attention"));
        table.norm(&format!("{key}.mlp.ln"), d, &format!("{path}.norm_feed_forward"));
        match encoder.sparse_block(index) {
            None => {
                table.mlp(&key, ["mlp.mlp.up_proj", "mlp.mlp.down_proj"], d, f, &path);
                table.gate(&format!("{key}.mlp.mlp.gate_proj"), d, f, &path);
            }
            Some(sparse) => experts_of(table, &format!("{key}.mlp.moe"), sparse, d, &format!("{path}.feed_forward.Moe")),
        }
    }
}

fn experts_of(table: &mut Table, key: &str, sparse: &SparseEncoderConfig, d: usize, path: &str) {
    let (e, f) = (sparse.num_experts, sparse.d_ff.expect("the width was told"));
    table.weight(&format!("{key}._gate_module"), d, e, &format!("{path}.router"));
    table.same(&format!("{key}.expert_bias"), &[e], &format!("{path}.router.balancing_bias"));
    for (half, name) in ["w_gate", "w_in"].into_iter().enumerate() {
        let form = Form::Experts { half: Some(half) };
        table.add(&format!("{key}.w1"), vec![e, 2 * f, d], &format!("{path}.experts.{name}"), form);
    }
    table.add(&format!("{key}.w2"), vec![e, d, f], &format!("{path}.experts.w_out"), Form::Experts { half: None });
    for (stored, shape, name) in [("gate_proj", [f, d], "w_gate"), ("up_proj", [f, d], "w_in"), ("down_proj", [d, f], "w_out")] {
        let (key, path) = (format!("{key}._shared_module.{stored}.weight"), format!("{path}.shared_expert.{name}"));
        table.add(&key, shape.to_vec(), &path, Form::OutputFirst);
    }
}

/// The frequencies of rotary positions, which their code stores in each block.
fn constants(config: &ClipConfig) -> Vec<Constant> {
    let encoder = &config.vision.encoder;
    let Some(rotary) = &encoder.rotary else { return Vec::new() };
    let frequencies = rotary.frequencies(encoder.d_model / encoder.n_heads);
    let values: Arc<[f32]> = frequencies.into_iter().map(|frequency| frequency as f32).collect();
    let of_block = |index| Constant {
        key: format!("{}{index}.attn.attn.rope.freqs", FORMAT.blocks[0]),
        values: values.clone(),
        what: "the frequencies of rotary positions with the base 10,000",
    };
    (0..encoder.n_layers).map(of_block).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The configuration of a published model, with the given settings.
    fn file(vision: &str, text: &str) -> String {
        format!(
            r#"{{"embed_dim": 1024, "quick_gelu": false, "vision_cfg": {{"global_layers": -1, "relative_pos_embed_type": "rope_2d", "use_ln_post": false,
            "mixture_of_expert": true, "num_of_expert": 8, "split": 4, {vision}}}, "text_cfg": {{"context_length": 144, "vocab_size": 49408, "heads": 16,
            "use_ln_post": false, {text}}}}}"#
        )
    }

    #[test]
    fn the_published_configurations_are_the_presets() {
        let blocks = |layers: usize| format!("{:?}", (1..layers).collect::<Vec<_>>());
        let text_24 = r#""width": 1024, "layers": 24"#;
        let b = format!(
            r#""attn_pooler_heads": 8, "layers": 12, "width": 768, "patch_size": 16, "k": 1, "moe_layers": {}"#,
            blocks(12)
        );
        let l = format!(
            r#""attn_pooler_heads": 8, "gpu_align": true, "layers": 24, "width": 1024, "patch_size": 16, "k": 1, "moe_layers": {}"#,
            blocks(24)
        );
        let h = format!(
            r#""attn_pooler_heads": 16, "layers": 32, "width": 1280, "head_width": 80, "patch_size": 14, "k": 2, "moe_layers": {}"#,
            blocks(32)
        );
        for (file, preset) in [
            (file(&b, text_24), ClipConfig::moe_vie_b_16()),
            (file(&l, &format!(r#"{text_24}, "gpu_align": true"#)), ClipConfig::moe_vie_l_16()),
            (file(&h, r#""width": 1408, "mlp_ratio": 4, "layers": 34"#), ClipConfig::moe_vie_h_14()),
        ] {
            let Ok(described) = read(&file) else { panic!("{file}") };
            assert_eq!(serde_json::to_value(&described.config).unwrap(), serde_json::to_value(&preset).unwrap());
        }
    }

    #[test]
    fn settings_that_would_change_the_result_are_named() {
        let error = |vision: &str, text: &str| match read(&file(vision, text)) {
            Ok(_) => panic!("{vision} {text} is accepted"),
            Err(ConfigFileError(text)) => text,
        };
        let text = r#""width": 64"#;
        for (vision, expected) in [
            (r#""global_layer": 3"#, "`vision_cfg.global_layer` = 3 is not supported"),
            (r#""image_size": [32, 64]"#, "`vision_cfg.image_size` = 32 x 64 is not supported: images and patches are squares"),
            (
                r#""moe_layers": [1], "k": 0"#,
                "`vision_cfg.num_of_expert` = 8, `k` = 0 and `split` = 4 is not supported: one of each is the shared expert, and none is left to choose",
            ),
        ] {
            assert_eq!(error(vision, text), expected);
        }
        assert_eq!(error(r#""width": "64""#, text), "`vision_cfg.width` = \"64\": expected a whole number from 0 on");
        assert_eq!(error(r#""moe_layers": 3"#, text), "`vision_cfg.moe_layers` = 3: expected a list of whole numbers");
        assert_eq!(error(r#""width": 64"#, r#""pool": "mean""#), "`text_cfg.pool` = \"mean\" is not supported");
        let replaced = |from: &str, to: &str| match read(&file(r#""width": 64"#, text).replace(from, to)) {
            Ok(_) => panic!("{to} is accepted"),
            Err(ConfigFileError(text)) => text,
        };
        let text = replaced(r#""global_layers": -1"#, r#""global_layers": 4"#);
        assert!(text.starts_with("`vision_cfg.global_layers` = 4 is not supported: "), "{text}");
        let text = replaced("rope_2d", "alibi");
        assert!(text.starts_with("`vision_cfg.relative_pos_embed_type` = alibi is not supported"), "{text}");
    }
}
