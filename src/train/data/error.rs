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
    /// A tar file, or an archive that is read from a pipe, that cannot be read.
    #[error("{}: {reason}", path.display())]
    Shard {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// A source has nothing to train on.
    #[error("the data holds no sample: shards need images (jpg, png, webp, …) with captions (txt or json) of the same name")]
    NoSample,
    /// A name of data that cannot be understood.
    #[error("{reason}")]
    Name {
        /// What is wrong with it.
        reason: String,
    },
    /// None of the samples of a whole batch, or of a set, can be used.
    #[error("none of {samples} samples can be used; the last one: {last}")]
    NoGoodSample {
        /// How many there are; of a batch, on this rank.
        samples: usize,
        /// Why the last one cannot.
        last: crate::train::stream::SampleError,
    },
    /// An archive that can be read only once is over, and more samples are needed.
    #[error(
        "{name} ended after {samples} samples, and more are needed: train on fewer, or name tar files, which can be read again"
    )]
    StreamEnded {
        /// What stands for it.
        name: String,
        /// Samples that it held.
        samples: usize,
    },
    /// An archive that only one process can read, and several ranks that need it.
    #[error("{name} can only be read by one rank, and there are {ranks}: name tar files, which all of them can read")]
    NotShared {
        /// What stands for it.
        name: String,
        /// Ranks that share a batch.
        ranks: usize,
    },
    /// The threads that read samples are gone.
    #[error("reading the data has stopped: {reason}")]
    Stopped {
        /// Why.
        reason: String,
    },
    /// A setting cannot be used.
    #[error(transparent)]
    Config(#[from] crate::support::error::ConfigError),
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
