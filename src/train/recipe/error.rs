//! Why a run stopped.

use std::path::PathBuf;

use crate::{
    clip::RetrievalError,
    support::{error::ConfigError, finite::NonFiniteError},
    train::{data::DataError, ranks::RankError},
};

/// Why a run stopped.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TrainError {
    /// The data cannot be trained on.
    #[error(transparent)]
    Data(#[from] DataError),
    /// The model cannot be evaluated.
    #[error(transparent)]
    Evaluation(#[from] RetrievalError),
    /// A setting cannot be used.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// Another rank is gone, or holds another model.
    #[error(transparent)]
    Ranks(#[from] RankError),
    /// A value is NaN or infinite. The first tensor that is affected is named.
    #[error("{arm}, step {step}: {source}; a lower learning rate is the usual cure")]
    NonFinite {
        /// Name of the arm.
        arm: String,
        /// Counts from 1.
        step: usize,
        /// The tensor.
        source: NonFiniteError,
    },
    /// A model that does not speak CLIP's own tokens, or does not take RGB images of the data's size.
    #[error("{arm}: `{what}` should be {expected}, but is {found}")]
    Model {
        /// Name of the arm.
        arm: String,
        /// What was compared.
        what: &'static str,
        /// What the data and CLIP's tokenizer need.
        expected: String,
        /// What the model has.
        found: String,
    },
    /// The images were prepared in another way than the model expects.
    #[error(
        "{arm}: the model expects images prepared with {expected}; the data has {found}: load it with the model's own preprocessing"
    )]
    Preprocessing {
        /// Name of the arm.
        arm: String,
        /// What the model expects.
        expected: String,
        /// How the data was prepared.
        found: String,
    },
    /// A checkpoint of the run cannot be read or written.
    #[error("{}: {reason}", path.display())]
    Checkpoint {
        /// The file or folder.
        path: PathBuf,
        /// What went wrong.
        reason: String,
    },
}

impl TrainError {
    /// The error of a checkpoint that was to be written because of another error.
    pub(super) fn because(self, error: &dyn std::error::Error) -> Self {
        match self {
            Self::Checkpoint { path, reason } => {
                Self::Checkpoint { path, reason: format!("{reason}; it was to be kept as {error}") }
            }
            other => other,
        }
    }
}
