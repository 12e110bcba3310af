//! What can be wrong with a checkpoint.

use std::{
    io,
    path::{Path, PathBuf},
};

use crate::support::error::ConfigError;

/// A checkpoint that cannot be read or written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CheckpointError {
    /// The file cannot be read or written.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What it said.
        source: io::Error,
    },
    /// The folder is no checkpoint.
    #[error(
        "{} holds no checkpoint: expected `config.json` (Hugging Face), `open_clip_config.json` (open_clip), \
         `moevie_config.json` (MoE-ViE) or `burn_moe_config.json` (burn-moe)",
        folder.display()
    )]
    NoConfig {
        /// The folder.
        folder: PathBuf,
    },
    /// The configuration file cannot be understood.
    #[error("{}: {reason}", path.display())]
    ConfigFile {
        /// The file.
        path: PathBuf,
        /// What is wrong in it.
        reason: String,
    },
    /// The configuration is understood, but no model can be built from it.
    #[error("{}: {source}", path.display())]
    Config {
        /// The file.
        path: PathBuf,
        /// The field that cannot be used.
        source: ConfigError,
    },
    /// The weights are not there.
    #[error("{}: no weights: expected {expected}", folder.display())]
    NoWeights {
        /// The folder.
        folder: PathBuf,
        /// The names that are looked for.
        expected: String,
    },
    /// The file is of a kind that holds no weights.
    #[error("{} holds no weights: it is {kind}", path.display())]
    NotWeights {
        /// The file.
        path: PathBuf,
        /// What it is, and what to do.
        kind: String,
    },
    /// The weights file is damaged or is no safetensors file.
    #[error("{} is not a whole safetensors file: {source}", path.display())]
    Safetensors {
        /// The file.
        path: PathBuf,
        /// Where reading stopped.
        source: safetensors::SafeTensorError,
    },
    /// The pickled weights cannot be read.
    #[error("{}: these pickled weights cannot be read: {reason}", path.display())]
    Pickle {
        /// The file.
        path: PathBuf,
        /// Why, and what to do.
        reason: String,
    },
    /// The folder holds one tower, and both are asked for, or the other one.
    #[error("{} holds a {found} tower alone, but {expected} asked for", path.display())]
    Tower {
        /// The file.
        path: PathBuf,
        /// Which tower is there.
        found: &'static str,
        /// What should be.
        expected: &'static str,
    },
    /// The position embeddings are for images of another size.
    #[error(
        "{}: `{tensor}` is for images of {found} x {found} pixels, and the model's have {expected} x {expected}: load it for an image size \
         (`--image-size` in the examples) to have it interpolated",
        path.display()
    )]
    ImageSize {
        /// The file.
        path: PathBuf,
        /// Its name in the file.
        tensor: String,
        /// The side that it is for, in pixels.
        found: usize,
        /// The side of the model's images, in pixels.
        expected: usize,
    },
    /// Two tensors of a file are the same one of the model, by their names.
    #[error("{} has `{}` and `{}`, which would be the same weights of the model: keep one of them", path.display(), tensors[0], tensors[1])]
    SameTensor {
        /// The file.
        path: PathBuf,
        /// Their names in the file.
        tensors: [String; 2],
    },
    /// The header names a tensor twice.
    #[error("{} has `{tensor}` twice", path.display())]
    Duplicate {
        /// The file.
        path: PathBuf,
        /// Its name in the file.
        tensor: String,
    },
    /// The weights file has other tensors than the configuration asks for.
    #[error("{}: {}", path.display(), differences(missing, unexpected))]
    Keys {
        /// The file.
        path: PathBuf,
        /// Expected, not found.
        missing: Vec<String>,
        /// Found, not expected.
        unexpected: Vec<String>,
    },
    /// The weights file cannot hold as many blocks as the configuration names.
    #[error("{}: the configuration names {blocks} blocks, and there are {tensors} tensors", path.display())]
    Blocks {
        /// The file.
        path: PathBuf,
        /// Blocks of both towers.
        blocks: usize,
        /// Tensors in the file.
        tensors: usize,
    },
    /// A tensor has another shape than the configuration says.
    #[error("{}: `{tensor}` should be {expected:?}, but is {found:?}", path.display())]
    Shape {
        /// The file.
        path: PathBuf,
        /// Its name in the file.
        tensor: String,
        /// What the configuration says.
        expected: Vec<usize>,
        /// What the file has.
        found: Vec<usize>,
    },
    /// A tensor's numbers are of a kind that is no weight.
    #[error("{}: `{tensor}` has dtype {dtype}; expected F32, F16, BF16 or F64", path.display())]
    Dtype {
        /// The file.
        path: PathBuf,
        /// Its name in the file.
        tensor: String,
        /// What the file has.
        dtype: String,
    },
    /// A tensor that is no parameter, but decides what the parameters mean, has other numbers than the model computes with.
    #[error("{}: `{tensor}` is not {expected}: the model would compute something else", path.display())]
    Constant {
        /// The file.
        path: PathBuf,
        /// Its name in the file.
        tensor: String,
        /// What it should be.
        expected: &'static str,
    },
    /// A tensor holds NaN or infinity.
    #[error("{}: {source}", path.display())]
    NonFinite {
        /// The file.
        path: PathBuf,
        /// The tensor.
        source: crate::support::finite::NonFiniteError,
    },
    /// A value that is not finite, or does not fit the precision it should be written with.
    #[error("`{tensor}` holds {count} values that cannot be written: not finite, or beyond what the precision holds")]
    Overflow {
        /// Its name in the file.
        tensor: String,
        /// How many values.
        count: usize,
    },
    /// Weights do not fit the precision that they should be packed in.
    #[error("`{tensor}` holds {count} values that are too large for weights packed as {precision}: choose another precision")]
    Packed {
        /// Its name in the file.
        tensor: String,
        /// How many values.
        count: usize,
        /// What they should be packed in.
        precision: crate::Precision,
    },
    /// The format has no place for something this model has.
    #[error("{format}'s format has no place for {what}")]
    NoPlace {
        /// Whose format.
        format: &'static str,
        /// What it is.
        what: &'static str,
    },
}

/// Names in short: the first three and how many there are.
fn some_of(names: &[String]) -> String {
    let first: Vec<String> = names.iter().take(3).map(|name| format!("`{name}`")).collect();
    let dots = if names.len() > 3 { ", …" } else { "" };
    format!("{} ({}{dots})", names.len(), first.join(", "))
}

fn differences(missing: &[String], unexpected: &[String]) -> String {
    let part = |what: &str, names: &[String]| (!names.is_empty()).then(|| format!("{what} tensors: {}", some_of(names)));
    let parts: Vec<String> = [part("missing", missing), part("unexpected", unexpected)].into_iter().flatten().collect();
    format!("the tensors are not those of the configuration; {}", parts.join("; "))
}

impl CheckpointError {
    pub(crate) fn io(path: &Path) -> impl FnOnce(io::Error) -> Self + use<> {
        let path = path.to_path_buf();
        move |source| Self::Io { path, source }
    }

    pub(crate) fn safetensors(path: &Path) -> impl Fn(safetensors::SafeTensorError) -> Self + use<> {
        let path = path.to_path_buf();
        move |source| Self::Safetensors { path: path.clone(), source }
    }
}
