//! What can be wrong with a data set.

use std::{io, path::PathBuf};

/// Data that cannot be read or trained on.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DataError {
    /// The file cannot be read or written.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What it said.
        source: io::Error,
    },
    /// The embedded emoji are not in the published package.
    #[error(
        "no emoji pack in {}: the data is not in the published package; take it from the repository's `data/emoji`, or build it \
         with `tools/emoji-pack/build.sh`",
        path.display()
    )]
    NoPack {
        /// Where it was looked for.
        path: PathBuf,
    },
    /// A line cannot be understood.
    #[error("{}, line {line}: {reason}", path.display())]
    Line {
        /// The file.
        path: PathBuf,
        /// From 1.
        line: u64,
        /// What is wrong.
        reason: String,
    },
    /// A file that should be an image cannot be used.
    #[error(transparent)]
    Image(#[from] crate::clip::preprocess::ImageError),
    /// The list of images and captions cannot be understood.
    #[error(transparent)]
    List(#[from] crate::clip::lists::ListError),
    /// No image of the list can be read.
    #[error("{}: none of its images can be read", folder.display())]
    NoImage {
        /// The folder of the images.
        folder: PathBuf,
    },
    /// Fewer concepts than a batch needs.
    #[error(
        "a batch of {batch_size} needs as many concepts, because none may stand in it twice; the data has {concepts} (those with a caption in \
         common count as one)"
    )]
    TooFewConcepts {
        /// Samples in a batch.
        batch_size: usize,
        /// Concepts in the set.
        concepts: usize,
    },
    /// A number outside its range.
    #[error("`{field}` is {value}: {reason}")]
    OutOfRange {
        /// Name of the field.
        field: &'static str,
        /// The value as written.
        value: f64,
        /// The range that is allowed, in words.
        reason: &'static str,
    },
}
