//! The formats of a folder.

use std::path::{Path, PathBuf};

use super::{
    CheckpointError, burn_moe,
    config::{LEFT_OUT, Result, of_possible_size},
    hugging_face, moe_vie,
    naming::unwrapped,
    open_clip,
    table::{Constant, Entry},
    tensors::{self, TensorFiles},
    tokenizer::TokenizerFiles,
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
    pub read: fn(&str) -> Result<Described>,
    /// How images are prepared, where that has a file of its own.
    pub processor: Option<Processor>,
    /// What stands before the number of a block of each tower, vision first.
    pub blocks: [&'static str; 2],
    /// Which stored tensor is which parameter.
    pub entries: fn(&ClipConfig) -> Vec<Entry>,
    /// What the file may hold beside the parameters.
    pub constants: fn(&ClipConfig) -> Vec<Constant>,
}

/// Of a format whose files hold parameters only.
pub(super) fn no_constants(_: &ClipConfig) -> Vec<Constant> {
    Vec::new()
}

/// What a configuration describes.
pub(super) struct Described {
    /// Of a tower that is not there, any possible configuration.
    pub config: ClipConfig,
    /// The towers that are there.
    pub towers: Towers,
    /// Which files of the folder tell what the tokenizer is.
    pub tokenizer: TokenizerFiles,
}

impl From<ClipConfig> for Described {
    fn from(config: ClipConfig) -> Self {
        Self { config, towers: Towers::Both, tokenizer: TokenizerFiles::None }
    }
}

/// The towers of a checkpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Towers {
    /// A CLIP.
    Both,
    /// A vision tower alone.
    Vision,
    /// A text tower alone.
    Text,
}

impl Towers {
    /// What the paths of the parameters begin with.
    pub(super) fn prefix(self) -> &'static str {
        match self {
            Self::Both => "",
            Self::Vision => "vision.",
            Self::Text => "text.",
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Both => "two towers are",
            Self::Vision => "a vision tower is",
            Self::Text => "a text tower is",
        }
    }
}

/// A folder of which the configuration was read.
pub(super) struct Found {
    pub config: ClipConfig,
    pub towers: Towers,
    pub format: Format,
    pub weights: PathBuf,
    /// The configuration's file.
    pub path: PathBuf,
}

impl Found {
    /// Refuses a folder that lacks one of the towers that are asked for.
    pub(super) fn expect(&self, asked: Towers) -> std::result::Result<(), CheckpointError> {
        if self.towers == Towers::Both || self.towers == asked {
            return Ok(());
        }
        let found = if self.towers == Towers::Vision { "vision" } else { "text" };
        Err(CheckpointError::Tower { path: self.path.clone(), found, expected: asked.name() })
    }

    /// The model for images of another size.
    pub(super) fn with_image_size(mut self, image_size: Option<usize>) -> std::result::Result<Self, CheckpointError> {
        let Some(side) = image_size else { return Ok(self) };
        let vision = &mut self.config.vision;
        let resized = |resize_to: usize| resize_to.saturating_mul(side).div_ceil(vision.image_size.max(1));
        vision.preprocessing.resize_to = vision.preprocessing.resize_to.map(resized);
        vision.image_size = side;
        self.config = checked(self.config, &self.path)?;
        Ok(self)
    }
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
const FORMATS: [Format; 4] = [burn_moe::FORMAT, open_clip::FORMAT, moe_vie::FORMAT, hugging_face::FORMAT];

/// How many blocks the names of the weights count, if they can be read.
fn blocks_in(weights: &Path, blocks: &str) -> std::result::Result<Option<usize>, CheckpointError> {
    let is_there = weights.is_file() || tensors::index_of(weights).is_file();
    let files = is_there.then(|| TensorFiles::open(weights)).transpose()?;
    let index = |name: &str| -> Option<usize> {
        let rest = name.split_once(blocks).filter(|(before, _)| before.is_empty() || before.ends_with('.'))?.1;
        rest.split('.').next()?.parse().ok()
    };
    // `transformer.` is the end of `visual.transformer.`, too.
    let own = |name: &String| blocks.starts_with("visual.") || !name.contains("visual.");
    let last = |files: TensorFiles| files.names().map(unwrapped).filter(own).filter_map(|name| index(&name)).max();
    Ok(files.and_then(last).map(|last| last.saturating_add(1)))
}

/// What is said of a folder without the weights of a format.
pub(super) fn no_weights(folder: &Path, format: Format) -> CheckpointError {
    let of_endings = |endings: &[&str]| {
        let files = std::fs::read_dir(folder).into_iter().flatten().flatten();
        let names = files.map(|file| file.file_name().to_string_lossy().into_owned());
        let is_one = |name: &String| endings.contains(&name.rsplit_once('.').map_or("", |(_, ending)| ending));
        let mut found: Vec<String> = names.filter(is_one).map(|name| format!("`{name}`")).collect();
        found.sort();
        found.truncate(3);
        found.join(", ")
    };
    let mut expected = format.weights.join(" or ");
    let [others, of_others] = [&["safetensors", "bin", "pt", "pth", "ckpt"][..], &["h5", "msgpack"]].map(of_endings);
    if !others.is_empty() {
        expected += &format!("; there is {others}: if it holds them, give it one of these names");
    } else if !of_others.is_empty() {
        expected += &format!("; there is {of_others}, of TensorFlow or Flax, which is not read: save the model from PyTorch");
    }
    CheckpointError::NoWeights { folder: folder.to_path_buf(), expected }
}

/// A checkpoint in this crate's format of which only the text of its configuration is there.
pub(super) fn described_by(text: &str) -> std::result::Result<Found, CheckpointError> {
    let format = burn_moe::FORMAT;
    let path = PathBuf::from(format.config);
    let Described { config, towers, .. } = (format.read)(text).map_err(|error| error.at(&path))?;
    let config = checked(config, &path)?;
    Ok(Found { config, towers, format, weights: format.weights[0].into(), path })
}

/// A configuration from which a model can be built.
fn checked(config: ClipConfig, path: &Path) -> std::result::Result<ClipConfig, CheckpointError> {
    let config = of_possible_size(config).map_err(|error| error.at(path))?;
    config.validate().map_err(|source| CheckpointError::Config { path: path.to_path_buf(), source })?;
    Ok(config)
}

/// The configuration of a folder, where its weights are, and their format. What the tokenizer is matters, and is looked for, where a text tower is
/// `asked` for.
pub(super) fn found_in(folder: &Path, asked: Towers) -> std::result::Result<Found, CheckpointError> {
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
    let Described { mut config, towers, tokenizer } = (format.read)(&text).map_err(|error| error.at(&path))?;
    if towers != Towers::Vision
        && asked != Towers::Vision
        && let Some(kind) = tokenizer.kind(folder, config.text.vocab_size, &path)?
    {
        config.text.tokenizer = kind;
    }
    for (encoder, blocks) in [(&mut config.vision.encoder, format.blocks[0]), (&mut config.text.encoder, format.blocks[1])] {
        if encoder.n_layers == LEFT_OUT {
            encoder.n_layers = blocks_in(&folder.join(weights), blocks)?.unwrap_or(12);
        }
    }
    if let Some(processor) = format.processor
        && let Some(path) = processor.files.map(|name| folder.join(name)).into_iter().find(|path| path.is_file())
    {
        let text = tensors::read_text(&path, LONGEST_CONFIG)?;
        config.vision.preprocessing = (processor.read)(&text, config.vision.image_size).map_err(|error| error.at(&path))?;
    }
    let config = checked(config, &path)?;
    Ok(Found { config, towers, format, weights: folder.join(weights), path })
}
