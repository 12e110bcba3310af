//! Where samples come from.

use crate::{
    clip::preprocess::ImagePreprocessor,
    train::data::{Caption, Concept, DataError, ImageTextSet},
};

/// The place of a sample in a source.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SampleId {
    /// The shard, from 0.
    pub shard: usize,
    /// The place in the shard, from 0.
    pub place: usize,
}

/// An image with its captions, as they are stored.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sample {
    /// Its name, for errors.
    pub name: String,
    /// The bytes of an image file.
    pub image: Vec<u8>,
    /// At least one; training takes one of them at random.
    pub captions: Vec<String>,
}

/// A sample that cannot be used. Training goes on without it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{sample}: {reason}")]
pub struct SampleError {
    /// Which one.
    pub sample: String,
    /// What is wrong with it.
    pub reason: String,
}

/// A source of samples. A shard is read from its beginning to its end; the order of shards, and that of samples that are close to each other, is
/// shuffled. Implement it for a store of your own.
pub trait Samples: Send + Sync {
    /// Number of shards.
    fn shards(&self) -> usize;

    /// Whether a shard has a sample at this place. Asked for one place after the other, from 0 until the first `false`; a second time in the next
    /// epoch.
    ///
    /// # Errors
    /// When the shard cannot be read, which ends the training.
    fn has(&self, id: SampleId) -> Result<bool, DataError>;

    /// Reads a sample; called by several threads, once in an epoch for each.
    ///
    /// # Errors
    /// When it cannot be used.
    fn read(&self, id: SampleId) -> Result<Sample, SampleError>;

    /// Called instead of [`read`](Self::read) for a sample that another rank reads, or that was used before the run was resumed.
    fn pass(&self, _id: SampleId) {}

    /// Whether no other process can read the same samples; `false` unless it says otherwise.
    fn is_for_one_rank(&self) -> bool {
        false
    }

    /// What makes this source another one than others: names and sizes of its files. A run is not resumed on another source.
    fn fingerprint(&self) -> String;
}

/// Reads all samples into memory, each with all of its captions, prepared as at inference; and says which cannot be used.
///
/// # Errors
/// When the source cannot be read, or none of its samples can be used.
pub fn load_samples(
    samples: &dyn Samples,
    preprocessor: &ImagePreprocessor,
) -> Result<(ImageTextSet, Vec<SampleError>), DataError> {
    let (mut pixels, mut concepts, mut skipped) = (Vec::new(), Vec::new(), Vec::new());
    for shard in 0..samples.shards() {
        let ids = (0..).map(|place| SampleId { shard, place });
        for id in ids {
            if !samples.has(id)? {
                break;
            }
            let decoded = samples.read(id).and_then(|Sample { name, image, captions }| {
                let image = preprocessor.decode(&image);
                let image = image.map_err(|error| SampleError { sample: name, reason: error.to_string() })?;
                Ok((image, captions))
            });
            match decoded {
                Ok((image, captions)) => {
                    pixels.extend(image);
                    concepts.push(Concept { captions: captions.into_iter().map(Caption::new).collect() });
                }
                Err(error) => skipped.push(error),
            }
        }
    }
    match skipped.last() {
        _ if !concepts.is_empty() => {}
        Some(last) => return Err(DataError::NoGoodSample { samples: skipped.len(), last: last.clone() }),
        None => return Err(DataError::NoSample),
    }
    let set = ImageTextSet::new(preprocessor.image_size, pixels, (0..concepts.len()).collect(), concepts);
    Ok((set.with_preprocessing(preprocessor.preprocessing), skipped))
}
