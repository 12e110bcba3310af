//! What the configuration files of all formats have in common.

use std::path::Path;

use serde::{Deserialize, Serialize};

use super::CheckpointError;
use crate::{
    clip::{ClipConfig, Pooling},
    layer::experts::FeedForwardForm,
    transformer::{EncoderConfig, SparseLayer},
};

/// What is wrong in a configuration file, in words.
pub(super) struct ConfigFileError(pub String);

impl ConfigFileError {
    /// Names the file, of which readers see only the text.
    pub(super) fn at(self, path: &Path) -> CheckpointError {
        CheckpointError::ConfigFile { path: path.to_path_buf(), reason: self.0 }
    }
}

impl From<serde_json::Error> for ConfigFileError {
    fn from(error: serde_json::Error) -> Self {
        Self(format!("not the JSON that was expected: {error}"))
    }
}

pub(super) type Result<T> = std::result::Result<T, ConfigFileError>;

/// A number of blocks that the configuration leaves out: the weights then say it.
pub(super) const LEFT_OUT: usize = usize::MAX;

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
        ("size of resized images", vision.preprocessing.resize_to.unwrap_or(0)),
    ];
    if let Pooling::Attention { n_heads } = vision.pooling {
        sizes.push(("heads of pooling", n_heads));
    }
    for encoder in [&vision.encoder, &text.encoder] {
        let widths =
            [("width", encoder.d_model), ("heads", encoder.n_heads), ("layers", encoder.n_layers), ("hidden width", encoder.d_ff)];
        sizes.extend(widths);
        if let Some(sparse) = &encoder.sparse {
            let (shared, slots) = match &sparse.layer {
                SparseLayer::Routed(routed) => (routed.shared_expert, 1),
                SparseLayer::Soft { slots_per_expert } => (None, *slots_per_expert),
            };
            let hidden = [sparse.d_ff, shared].into_iter().flatten().map(|width| ("hidden width of experts", width));
            sizes.extend(hidden.chain([("experts", sparse.num_experts), ("slots per expert", slots)]));
        }
    }
    match sizes.into_iter().find(|(_, size)| *size > LARGEST) {
        Some((field, size)) => Err(ConfigFileError(format!("{field} of {size}: at most {LARGEST} is possible"))),
        None => Ok(config),
    }
}

/// A number for every channel, or one for all.
#[derive(Deserialize, Serialize, Clone, Copy)]
#[serde(untagged)]
pub(super) enum Channels {
    Each([f32; 3]),
    All(f32),
}

impl Channels {
    pub(super) fn each(self) -> [f32; 3] {
        match self {
            Self::Each(values) => values,
            Self::All(value) => [value; 3],
        }
    }
}

/// Refuses a setting of image preparation.
pub(super) fn refuse<T>(setting: &str, value: impl std::fmt::Display) -> Result<T> {
    Err(ConfigFileError(format!("`{setting}` = {value} is not supported: images would not be those that the model was trained on")))
}

/// Refuses to write a model in a format that knows CLIP's own architecture only.
pub(super) fn refuse_beyond_clip(format: &'static str, config: &ClipConfig) -> std::result::Result<(), CheckpointError> {
    let (vision, text) = (&config.vision, &config.text);
    let is_gated = |encoder: &EncoderConfig| encoder.form != FeedForwardForm::Plain;
    for (refused, what) in [
        (config.is_sparse(), "sparse blocks"),
        (is_gated(&vision.encoder) || is_gated(&text.encoder), "gated feed-forward networks"),
        (vision.encoder.rotary.is_some(), "rotary positions"),
        (vision.pooling != Pooling::ClassToken, "attention pooling"),
        (!vision.class_token, "a vision tower without a class token"),
        (!vision.position_table, "a vision tower without a table of positions"),
        (!vision.norm_pre, "a vision tower without a norm before its blocks"),
        (!vision.norm_post || !text.norm_final, "a tower without a norm behind its blocks"),
    ] {
        if refused {
            return Err(CheckpointError::NoPlace { format, what });
        }
    }
    Ok(())
}
