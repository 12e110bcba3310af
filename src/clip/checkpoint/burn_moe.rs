//! This crate's own format, which sparse models have: open_clip's names, and a configuration with every setting.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::{
    config::{ConfigFileError, Result},
    format::{Described, Format, Towers, no_constants},
    open_clip,
    table::Table,
    tokenizer::TokenizerFiles,
};
use crate::{
    clip::{ClipConfig, ImagePreprocessing, Pooling, TokenizerKind, text::CLIP_VOCAB_SIZE},
    layer::experts::FeedForwardForm,
    routing::balancing::BalancingOptions,
    transformer::{EncoderConfig, SparseEncoderConfig, SparseLayer},
};

pub(super) const FORMAT: Format = Format {
    config: "burn_moe_config.json",
    // The second is the name that version 2 had.
    weights: &["burn_moe_model.safetensors", "model.safetensors"],
    read,
    processor: None,
    blocks: open_clip::FORMAT.blocks,
    entries: open_clip::entries,
    constants: no_constants,
};

/// Version of `burn_moe_config.json`.
const VERSION: u64 = 9;
/// The oldest one that is still read.
const OLDEST: u64 = 2;

#[derive(Serialize, Deserialize)]
struct BurnMoeFile {
    version: u64,
    clip: Value,
}

fn read(text: &str) -> Result<Described> {
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
    // A tower alone stands in the place of a whole CLIP.
    let towers = match (file.clip.get("vision").is_some(), file.clip.get("text").is_some()) {
        (true, false) => Towers::Vision,
        (false, true) => Towers::Text,
        _ => Towers::Both,
    };
    if towers != Towers::Both
        && let Value::Object(clip) = &mut file.clip
        && let Value::Object(mut other) = serde_json::to_value(ClipConfig::tiny())?
    {
        for field in ["vision", "text", "logit_scale_init"] {
            if let Some(value) = other.remove(field) {
                clip.entry(field).or_insert(value);
            }
        }
    }
    Ok(Described { config: serde_json::from_value(file.clip)?, towers, tokenizer: TokenizerFiles::None })
}

/// Older versions knew nothing of what these fields say, and did what their defaults say.
fn add_newer_fields(clip: &mut Value) -> Result<()> {
    // Since version 4.
    if let Some(Value::Object(vision)) = clip.get_mut("vision") {
        vision.entry("preprocessing").or_insert(serde_json::to_value(ImagePreprocessing::new())?);
        // Since version 9.
        for part in ["class_token", "position_table", "norm_pre", "norm_post"] {
            vision.entry(part).or_insert(Value::Bool(true));
        }
        vision.entry("pooling").or_insert(serde_json::to_value(Pooling::ClassToken)?);
    }
    for tower in ["vision", "text"] {
        if let Some(Value::Object(encoder)) = clip.pointer_mut(&format!("/{tower}/encoder")) {
            // Since version 9.
            encoder.entry("form").or_insert(json!("Plain"));
        }
        let Some(Value::Object(sparse)) = clip.pointer_mut(&format!("/{tower}/encoder/sparse")) else { continue };
        // Since version 3.
        sparse.entry("form").or_insert(json!("Plain"));
        sparse.entry("padding").or_insert(json!("Excluded"));
        // Since version 9.
        sparse.entry("bias").or_insert(Value::Bool(true));
        // Since version 5.
        nest_routing(sparse);
        // Since version 8.
        if let Some(Value::Object(router)) = sparse.get_mut("layer").and_then(|layer| layer.pointer_mut("/Routed/router"))
            && let Some(rate) = router.remove("balancing_rate").and_then(|rate| rate.as_f64())
        {
            router.insert("balancing".into(), serde_json::to_value(BalancingOptions::new(rate))?);
        }
        // Since version 9.
        for (at, field, value) in [
            ("/Routed", "shared_expert_gate", json!(false)),
            ("/Routed/router", "bias", json!(false)),
            ("/Routed/assignment/TokenChoice", "gate_scale", json!(1.0)),
        ] {
            if let Some(Value::Object(settings)) = sparse.get_mut("layer").and_then(|layer| layer.pointer_mut(at)) {
                settings.entry(field).or_insert(value);
            }
        }
    }
    if let Some(Value::Object(text)) = clip.get_mut("text") {
        text.entry("projection_bias").or_insert(Value::Bool(false));
        // Since version 9.
        text.entry("norm_final").or_insert(Value::Bool(true));
        // Since version 7.
        let is_clip = text.get("vocab_size").and_then(Value::as_u64) == Some(CLIP_VOCAB_SIZE as u64);
        let tokenizer = if is_clip { TokenizerKind::ClipBpe } else { TokenizerKind::Other };
        text.entry("tokenizer").or_insert(serde_json::to_value(tokenizer)?);
    }
    Ok(())
}

/// Until version 4, the settings of routed layers stood beside those of all sparse layers, and a balancing bias was an enum.
fn nest_routing(sparse: &mut Map<String, Value>) {
    let mut routed: Map<String, Value> = ["router", "assignment", "shared_expert", "protection"]
        .into_iter()
        .filter_map(|field| sparse.remove(field).map(|value| (field.to_string(), value)))
        .collect();
    if let Some(Value::Object(router)) = routed.get_mut("router")
        && let Some(bias) = router.remove("balancing_bias")
    {
        router.insert("balancing_rate".into(), bias.pointer("/Sign/rate").cloned().unwrap_or(Value::Null));
    }
    let is_routed = sparse.get("layer").is_none_or(|layer| layer == "Routed");
    if is_routed {
        sparse.insert("layer".into(), json!({ "Routed": routed }));
    }
}

pub(super) fn to_text(config: &ClipConfig, towers: Towers) -> String {
    let mut clip = serde_json::to_value(config).expect("a configuration is JSON");
    let absent: &[&str] = match towers {
        Towers::Both => &[],
        Towers::Vision => &["text", "logit_scale_init"],
        Towers::Text => &["vision", "logit_scale_init"],
    };
    absent.iter().for_each(|field| drop(clip.as_object_mut().and_then(|clip| clip.remove(*field))));
    serde_json::to_string_pretty(&BurnMoeFile { version: VERSION, clip }).expect("JSON can be written")
}

/// The tensors of a sparse layer.
pub(super) fn sparse_layer(table: &mut Table, key: &str, encoder: &EncoderConfig, sparse: &SparseEncoderConfig, path: &str) {
    let (e, d, f) = (sparse.num_experts, encoder.d_model, sparse.d_ff.unwrap_or(encoder.d_ff));
    let (form, bias) = (encoder.form_of_experts(sparse), sparse.bias);
    let experts = |table: &mut Table, key: &str, sizes, path: &str| experts(table, key, (form, bias), sizes, path);
    match &sparse.layer {
        SparseLayer::Routed(routed) => {
            let path = format!("{path}.feed_forward.Moe");
            table.same(&format!("{key}.router.weight"), &[d, e], &format!("{path}.router.weight"));
            if routed.router.bias {
                table.same(&format!("{key}.router.bias"), &[e], &format!("{path}.router.bias"));
            }
            if let Some(balancing) = &routed.router.balancing {
                let mut state =
                    |name: &str, len| table.same(&format!("{key}.router.{name}"), &[len], &format!("{path}.router.{name}"));
                state("balancing_bias", e);
                if balancing.has_momentum() {
                    state("balancing_momentum", e);
                }
                if balancing.has_warmup() {
                    state("balancing_warmup", 1);
                }
            }
            experts(table, &format!("{key}.experts"), [e, d, f], &format!("{path}.experts"));
            if let Some(f) = routed.shared_expert {
                experts(table, &format!("{key}.shared_expert"), [1, d, f], &format!("{path}.shared_expert"));
            }
            if routed.shared_expert_gate {
                table.same(&format!("{key}.shared_expert_gate"), &[d, 1], &format!("{path}.shared_expert_gate"));
            }
        }
        SparseLayer::Soft { slots_per_expert } => {
            let path = format!("{path}.feed_forward.SoftMoe");
            table.same(&format!("{key}.slots"), &[d, e * slots_per_expert], &format!("{path}.slots"));
            experts(table, &format!("{key}.experts"), [e, d, f], &format!("{path}.experts"));
        }
    }
}

fn experts(table: &mut Table, key: &str, (form, bias): (FeedForwardForm, bool), [e, d, f]: [usize; 3], path: &str) {
    let mut map = |name: &str, d_in: usize, d_out: usize| {
        table.same(&format!("{key}.w_{name}"), &[e, d_in, d_out], &format!("{path}.w_{name}"));
        if bias {
            table.same(&format!("{key}.b_{name}"), &[e, d_out], &format!("{path}.b_{name}"));
        }
    };
    map("in", d, f);
    if form.is_gated() {
        map("gate", d, f);
    }
    map("out", f, d);
}
