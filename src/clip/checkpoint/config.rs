//! What the configuration files of all formats have in common.

use std::path::Path;

use serde::{Deserialize, de::DeserializeOwned};
use serde_json::{Map, Value};

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

/// A type of a setting, with what is said when a file has another one.
pub(super) trait Setting: DeserializeOwned {
    const EXPECTED: &str;
}

impl Setting for usize {
    const EXPECTED: &str = "a whole number from 0 on";
}

impl Setting for i64 {
    const EXPECTED: &str = "a whole number";
}

impl Setting for f64 {
    const EXPECTED: &str = "a number";
}

impl Setting for bool {
    const EXPECTED: &str = "true or false";
}

impl Setting for String {
    const EXPECTED: &str = "a text";
}

impl Setting for Vec<i64> {
    const EXPECTED: &str = "a list of whole numbers";
}

impl Setting for Side {
    const EXPECTED: &str = "a whole number, or two for height and width";
}

impl Setting for Channels {
    const EXPECTED: &str = "a number, or one for each of three channels";
}

/// What a setting may be that is not read: any of these values, or everything (`None`).
pub(super) type Known = (&'static str, Option<&'static [&'static str]>);

/// An object of a configuration file. Its settings are read one by one, so that an error names the one that is wrong.
#[derive(Clone, Copy)]
pub(super) struct Section<'a> {
    pub name: &'a str,
    pub map: &'a Map<String, Value>,
}

impl<'a> Section<'a> {
    /// A setting; `None` where it is left out or null.
    pub(super) fn find<T: Setting>(&self, setting: &str) -> Result<Option<T>> {
        let value = self.map.get(setting).filter(|value| !value.is_null());
        let read = |value: &Value| serde_json::from_value(value.clone()).map_err(|_| self.wrong(setting, T::EXPECTED));
        value.map(read).transpose()
    }

    /// The same with what it is where it is left out.
    pub(super) fn get<T: Setting>(&self, setting: &str, default: T) -> Result<T> {
        Ok(self.find(setting)?.unwrap_or(default))
    }

    /// A setting without a default.
    pub(super) fn needed<T: Setting>(&self, setting: &str) -> Result<T> {
        let missing = || ConfigFileError(format!("`{}.{setting}` is missing: expected {}", self.name, T::EXPECTED));
        self.find(setting)?.ok_or_else(missing)
    }

    /// The side of a square, or of an area of two equal sides.
    pub(super) fn side(&self, setting: &str, default: usize) -> Result<usize> {
        self.find::<Side>(setting)?.map_or(Ok(default), |side| side.of_square(&format!("{}.{setting}", self.name)))
    }

    /// A number for every channel.
    pub(super) fn channels(&self, setting: &str, default: [f32; 3]) -> Result<[f32; 3]> {
        Ok(match self.find(setting)? {
            None => default,
            Some(Channels::Each(values)) => values,
            Some(Channels::All(value)) => [value; 3],
        })
    }

    /// An object inside of this one; `name` is what errors call it.
    pub(super) fn section<'b>(&self, setting: &str, name: &'b str) -> Result<Option<Section<'b>>>
    where
        'a: 'b,
    {
        match self.map.get(setting) {
            None | Some(Value::Null) => Ok(None),
            Some(Value::Object(map)) => Ok(Some(Section { name, map })),
            Some(_) => Err(self.wrong(setting, "an object, `{…}`")),
        }
    }

    /// The error of a setting that is there and is not what was `expected`.
    pub(super) fn wrong(&self, setting: &str, expected: &str) -> ConfigFileError {
        ConfigFileError(format!("`{}.{setting}` = {}: expected {expected}", self.name, shown(&self.map[setting])))
    }

    /// Refuses what was not `read` and is not `known`. A setting that is not known changes nothing when it is off; otherwise the model would be
    /// another one. Null is as left out.
    pub(super) fn refuse_others(&self, read: &[&str], known: &[Known]) -> Result<()> {
        let others = self.map.iter().filter(|(name, value)| !value.is_null() && !read.contains(&name.as_str()));
        for (name, value) in others {
            let text = value.as_str().map_or_else(|| value.to_string(), str::to_string);
            let is_good = match known.iter().find(|(known, _)| known == name) {
                Some((_, values)) => values.is_none_or(|values| values.contains(&&*text)),
                None => is_off(value),
            };
            if !is_good {
                return Err(self.unsupported(name, ""));
            }
        }
        Ok(())
    }

    /// The error of a setting of which the model has no equal; `why` may be empty.
    pub(super) fn unsupported(&self, setting: &str, why: &str) -> ConfigFileError {
        let colon = if why.is_empty() { "" } else { ": " };
        ConfigFileError(format!("`{}.{setting}` = {} is not supported{colon}{why}", self.name, shown(&self.map[setting])))
    }
}

fn is_off(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => true,
        Value::Number(number) => number.as_f64() == Some(0.0),
        Value::Object(map) => map.is_empty(),
        Value::Array(list) => list.is_empty(),
        Value::String(text) => text.is_empty(),
        Value::Bool(true) => false,
    }
}

/// A value for an error, in short.
fn shown(value: &Value) -> String {
    let text = value.to_string();
    match text.char_indices().nth(80) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text,
    }
}

/// A side of a square, or both sides of an area.
#[derive(Clone, Copy, Deserialize)]
#[serde(untagged)]
pub(super) enum Side {
    Square(usize),
    Both([usize; 2]),
    Named { height: usize, width: usize },
}

impl Side {
    /// The side of a square, or of an area of two equal sides.
    pub(super) fn of_square(self, setting: &str) -> Result<usize> {
        match self {
            Self::Square(side) => Ok(side),
            Self::Both([height, width]) | Self::Named { height, width } if height == width => Ok(width),
            Self::Both([height, width]) | Self::Named { height, width } => {
                Err(ConfigFileError(format!("`{setting}` = {height} x {width} is not supported: images and patches are squares")))
            }
        }
    }
}

/// A number for every channel, or one for all.
#[derive(Deserialize, Clone, Copy)]
#[serde(untagged)]
enum Channels {
    Each([f32; 3]),
    All(f32),
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
