//! MoE-ViE's format: the configuration of a model in facebookresearch/moe_vie, and the state dict of its code. It is read and not written.

use std::sync::Arc;

use serde::Deserialize;
use serde_json::{Map, Value};

use super::{
    config::{ConfigFileError, Known, Result, Section, Side},
    format::{Described, Format},
    open_clip::MERGES,
    table::{Constant, Entry, Form, Table},
    tokenizer::TokenizerFiles,
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

#[derive(Deserialize)]
struct MoeVieFile {
    embed_dim: usize,
    vision_cfg: MoeVieVision,
    text_cfg: MoeVieText,
    #[serde(flatten)]
    rest: Map<String, Value>,
}

/// Left out, a setting has the value that MoE-ViE's code gives it.
#[derive(Deserialize)]
#[serde(default)]
struct MoeVieVision {
    layers: usize,
    width: usize,
    head_width: usize,
    mlp_ratio: f64,
    patch_size: Side,
    image_size: Option<Side>,
    attn_pooler_heads: usize,
    no_ln_pre: bool,
    use_ln_post: bool,
    gpu_align: bool,
    mixture_of_expert: bool,
    num_of_expert: usize,
    moe_layers: Option<Vec<i64>>,
    split: usize,
    k: usize,
    relative_pos_embed_type: Option<String>,
    global_layers: Option<i64>,
    #[serde(flatten)]
    rest: Map<String, Value>,
}

#[derive(Deserialize)]
#[serde(default)]
struct MoeVieText {
    context_length: usize,
    vocab_size: usize,
    tokenizer_kwargs: Option<TokenizerKwargs>,
    width: usize,
    heads: usize,
    layers: usize,
    mlp_ratio: f64,
    use_ln_post: bool,
    gpu_align: bool,
    #[serde(flatten)]
    rest: Map<String, Value>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct TokenizerKwargs {
    bpe_path: Option<String>,
}

impl Default for MoeVieVision {
    fn default() -> Self {
        Self {
            layers: 12,
            width: 768,
            head_width: 64,
            mlp_ratio: 4.0,
            patch_size: Side::Square(16),
            image_size: None,
            attn_pooler_heads: 8,
            no_ln_pre: false,
            use_ln_post: true,
            gpu_align: false,
            mixture_of_expert: false,
            num_of_expert: 1,
            moe_layers: None,
            split: 1,
            k: 1,
            relative_pos_embed_type: None,
            global_layers: None,
            rest: Map::new(),
        }
    }
}

impl Default for MoeVieText {
    fn default() -> Self {
        Self {
            context_length: 77,
            vocab_size: CLIP_VOCAB_SIZE,
            tokenizer_kwargs: None,
            width: 512,
            heads: 8,
            layers: 12,
            mlp_ratio: 4.0,
            use_ln_post: true,
            gpu_align: false,
            rest: Map::new(),
        }
    }
}

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

fn read(text: &str) -> Result<Described> {
    let MoeVieFile { embed_dim, vision_cfg: v, text_cfg: t, rest } = serde_json::from_str(text)?;
    Section { name: "model", map: &rest }.refuse_others(&[], &WITHOUT_EFFECT[..5])?;
    Section { name: "vision_cfg", map: &v.rest }.refuse_others(&[], &WITHOUT_EFFECT[5..])?;
    Section { name: "text_cfg", map: &t.rest }.refuse_others(&[], &[])?;
    let d_ff = hidden_width(v.width, v.mlp_ratio, v.gpu_align);
    let rotary = match v.relative_pos_embed_type.as_deref() {
        Some("rope_2d") => Some(RotaryPositions::new()),
        None | Some("") => None,
        Some(other) => return Err(unsupported("vision_cfg.relative_pos_embed_type", other, "expected `rope_2d` or nothing")),
    };
    // In the other blocks of theirs, each patch looks at itself alone.
    if v.global_layers != Some(-1) && v.global_layers != i64::try_from(v.layers).ok() {
        let value = v.global_layers.map_or("nothing".to_string(), |layers| layers.to_string());
        let why = "only models are in which each block looks at all patches, with -1";
        return Err(unsupported("vision_cfg.global_layers", value, why));
    }
    let heads = v.width.checked_div(v.head_width).unwrap_or(0);
    let sparse = experts(&v)?.map(|experts| experts.config(d_ff));
    let blocks = encoder(v.width, heads, v.layers, d_ff).with_rotary(rotary).with_sparse(sparse);
    let image_size = v.image_size.map(|side| side.of_square("vision_cfg.image_size")).transpose()?;
    let patch_size = v.patch_size.of_square("vision_cfg.patch_size")?;
    let vision = vision(blocks, image_size.unwrap_or(224), patch_size, v.attn_pooler_heads)
        .with_norm_pre(!v.no_ln_pre)
        .with_norm_post(v.use_ln_post);
    let text = TextConfig::new(encoder(t.width, t.heads, t.layers, hidden_width(t.width, t.mlp_ratio, t.gpu_align)))
        .with_vocab_size(t.vocab_size)
        .with_context_length(t.context_length)
        .with_norm_final(t.use_ln_post);
    let tokenizer = match t.tokenizer_kwargs.and_then(|kwargs| kwargs.bpe_path) {
        Some(file) => TokenizerFiles::BpePath(file),
        None if t.vocab_size == CLIP_VOCAB_SIZE => TokenizerFiles::None,
        None => TokenizerFiles::Merges(MERGES),
    };
    let config = ClipConfig::new(vision, text, embed_dim);
    let config = if image_size.is_none() { of_published_size(config)? } else { config };
    Ok(Described { tokenizer, ..config.into() })
}

/// The experts that the configuration names, if blocks have any.
fn experts(v: &MoeVieVision) -> Result<Option<MoeVieExperts>> {
    // Their code asks for each block whether the list has it.
    let is_block = |index: &i64| usize::try_from(*index).ok().filter(|index| *index < v.layers);
    let mut blocks: Vec<usize> = v.moe_layers.iter().flatten().filter_map(is_block).collect();
    blocks.sort_unstable();
    blocks.dedup();
    if !v.mixture_of_expert || blocks.is_empty() {
        return Ok(None);
    }
    let experts = MoeVieExperts { count: v.num_of_expert, split: v.split, k: v.k, blocks };
    if experts.numbers().is_none() {
        let numbers = format!("{}, `k` = {} and `split` = {}", v.num_of_expert, v.k, v.split);
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
