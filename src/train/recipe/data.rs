//! What a run is trained on.

use std::thread;

use super::TrainConfig;
use crate::{
    clip::{ImagePreprocessing, tokenizer::ClipTokenizer},
    train::{
        CompactVocabulary,
        data::{Batch, BatchConfig, Batches, DataError, ImageTextSet},
        stream::{Part, Skipped, Stream, StreamBatches},
    },
};

/// What a run is trained on.
#[derive(Debug, Clone, Copy)]
pub enum TrainData<'a> {
    /// Images in memory.
    Set {
        /// The images with their captions.
        set: &'a ImageTextSet,
        /// How batches are drawn.
        batch: BatchConfig,
    },
    /// Samples that are read while they are needed.
    Stream {
        /// Where they come from.
        stream: &'a Stream,
        /// Threads that read and decode them on this rank; 0: as many as there are cores.
        threads: usize,
    },
}

impl TrainData<'_> {
    pub(super) fn validate(&self) -> Result<(), DataError> {
        match self {
            Self::Set { batch, .. } => batch.validate(),
            Self::Stream { stream, .. } => stream.config().validate(),
        }
    }

    /// Pairs in a batch, of all ranks.
    pub(super) fn batch_size(&self) -> usize {
        match self {
            Self::Set { batch, .. } => batch.batch_size,
            Self::Stream { stream, .. } => stream.config().batch_size,
        }
    }

    pub(super) fn context_length(&self) -> usize {
        match self {
            Self::Set { batch, .. } => batch.context_length,
            Self::Stream { stream, .. } => stream.config().context_length,
        }
    }

    pub(super) fn vocab_size(&self) -> usize {
        match self {
            Self::Set { batch, .. } => batch.vocab_size,
            Self::Stream { stream, .. } => stream.config().vocab_size,
        }
    }

    pub(super) fn image_size(&self) -> usize {
        match self {
            Self::Set { set, .. } => set.image_size(),
            Self::Stream { stream, .. } => stream.preprocessor().image_size,
        }
    }

    pub(super) fn preprocessing(&self) -> &ImagePreprocessing {
        match self {
            Self::Set { set, .. } => set.preprocessing(),
            Self::Stream { stream, .. } => &stream.preprocessor().preprocessing,
        }
    }

    /// The token ids that can occur.
    pub(super) fn vocabulary(&self, test: Option<&ImageTextSet>, tokenizer: &ClipTokenizer, part: Part) -> CompactVocabulary {
        match self {
            // All ranks need the same, and one evaluates.
            Self::Set { set, .. } if part.ranks == 1 => {
                let sets: Vec<&ImageTextSet> = [*set].into_iter().chain(test).collect();
                CompactVocabulary::of_sets(&sets, tokenizer)
            }
            Self::Set { .. } | Self::Stream { .. } => CompactVocabulary::whole(self.vocab_size()),
        }
    }
}

/// This rank's part of batch after batch.
pub(super) enum Pieces {
    Set { batches: Batches, part: Part, piece: usize },
    Stream(Box<StreamBatches>),
}

impl Pieces {
    pub(super) fn new(data: &TrainData, part: Part, config: &TrainConfig, first_step: usize) -> Result<Self, DataError> {
        part.check(data.batch_size())?;
        let own = part.of(data.batch_size()).len();
        let piece = config.micro_batch.map_or(own, |size| size.min(own));
        Ok(match data {
            TrainData::Set { set, batch } => {
                Self::Set { batches: Batches::new(set, *batch, config.seed, first_step)?, part, piece }
            }
            TrainData::Stream { stream, threads } => {
                let cores = || thread::available_parallelism().map_or(1, usize::from);
                let threads = if *threads == 0 { cores() } else { *threads };
                Self::Stream(Box::new(stream.batches(part, piece, threads, first_step)?))
            }
        })
    }

    /// The next batch in pieces, with places in the vocabulary for ids, and how many of its captions were cut.
    pub(super) fn next_batch(&mut self, vocabulary: &CompactVocabulary) -> Result<(Vec<Batch>, usize), DataError> {
        let mut cut = 0;
        let mut pieces = match self {
            Self::Set { batches, part, piece } => {
                let batch = batches.next().ok_or_else(|| DataError::Stopped { reason: "its thread is gone".into() })?;
                cut = batch.texts.truncated;
                let own = part.of(batch.len());
                if *piece >= batch.len() {
                    vec![batch]
                } else {
                    let starts = own.clone().step_by(*piece);
                    starts.map(|start| batch.slice(start..(start + *piece).min(own.end))).collect()
                }
            }
            Self::Stream(batches) => {
                (0..batches.pieces()).map(|_| batches.next_piece()).collect::<Result<Vec<Batch>, DataError>>()?
            }
        };
        // Parts of a batch in memory do not know it.
        let truncated = pieces.iter().map(|piece| piece.texts.truncated).sum::<usize>().max(cut);
        pieces.iter_mut().for_each(|piece| vocabulary.compact_ids(&mut piece.texts.ids));
        Ok((pieces, truncated))
    }

    /// Samples that could not be used so far.
    pub(super) fn skipped(&self) -> Option<&Skipped> {
        match self {
            Self::Set { .. } => None,
            Self::Stream(batches) => Some(batches.skipped()),
        }
    }
}
