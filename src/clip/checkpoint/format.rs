//! The formats of a folder.

use std::path::{Path, PathBuf};

use super::{
    CheckpointError, burn_moe,
    config::{Result, of_possible_size},
    hugging_face, open_clip,
    table::Entry,
    tensors,
};
use crate::clip::{ClipConfig, ImagePreprocessing};

/// Bytes of the longest configuration that is read; those of real models have a few thousand.
const LONGEST_CONFIG: u64 = 1 << 20;

/// One way to lay out a checkpoint in a folder.
#[derive(Clone, Copy)]
pub(super) struct Format {
    /// The file of the configuration.
    pub config: &'static str,
    /// The file of the weights, and older names of it.
    pub weights: &'static [&'static str],
    /// From the text of the configuration's file.
    pub read: fn(&str) -> Result<ClipConfig>,
    /// How images are prepared, where that has a file of its own.
    pub processor: Option<Processor>,
    /// Which stored tensor is which parameter.
    pub entries: fn(&ClipConfig) -> Vec<Entry>,
}

/// The file that says how images are prepared.
#[derive(Clone, Copy)]
pub(super) struct Processor {
    /// The first of these that is there is read.
    pub files: [&'static str; 2],
    /// From its text and the size of the model's images.
    pub read: fn(&str, usize) -> Result<ImagePreprocessing>,
}

/// In the order in which they are looked for.
const FORMATS: [Format; 3] = [burn_moe::FORMAT, open_clip::FORMAT, hugging_face::FORMAT];

/// The configuration of a folder, where its weights are, and their format.
pub(super) fn found_in(folder: &Path) -> std::result::Result<(ClipConfig, PathBuf, Format), CheckpointError> {
    // Some folders hold the configurations of several formats: the one whose weights are there counts.
    let has = |name: &str| folder.join(name).is_file();
    let has_weights = |name: &&&str| has(name) || tensors::index_of(&folder.join(name)).is_file();
    let configured = || FORMATS.into_iter().filter(|format| has(format.config));
    let whole = configured().find_map(|format| Some((format, *format.weights.iter().find(has_weights)?)));
    let Some((format, weights)) = whole.or_else(|| configured().next().map(|format| (format, format.weights[0]))) else {
        return Err(CheckpointError::NoConfig { folder: folder.to_path_buf() });
    };
    let path = folder.join(format.config);
    let text = tensors::read_text(&path, LONGEST_CONFIG)?;
    let mut config = (format.read)(&text).and_then(of_possible_size).map_err(|error| error.at(&path))?;
    if let Some(processor) = format.processor
        && let Some(path) = processor.files.map(|name| folder.join(name)).into_iter().find(|path| path.is_file())
    {
        let text = tensors::read_text(&path, LONGEST_CONFIG)?;
        config.vision.preprocessing = (processor.read)(&text, config.vision.image_size).map_err(|error| error.at(&path))?;
    }
    config.validate().map_err(|source| CheckpointError::Config { path, source })?;
    Ok((config, folder.join(weights), format))
}
