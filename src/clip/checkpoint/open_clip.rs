//! open_clip's format.

mod config;

#[cfg(feature = "preprocess")]
pub(super) use config::has_merges;
pub(super) use config::{read_tokenizer, to_text};

use super::{
    burn_moe::sparse_layer,
    format::{Format, no_constants},
    table::{Entry, Form, Table},
};
use crate::{
    clip::{ClipConfig, Pooling},
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
    read: config::read,
    processor: None,
    blocks: ["visual.transformer.resblocks.", "transformer.resblocks."],
    entries,
    constants: no_constants,
};

/// Our name for the file of the merges, which open_clip calls `bpe_path`.
pub(super) const MERGES: &str = "merges.txt.gz";

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
