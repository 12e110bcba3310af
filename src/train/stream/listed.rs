//! Samples that are files of their own.

use std::{
    collections::BTreeMap,
    fs,
    hash::{Hash, Hasher},
    path::PathBuf,
};

use super::{Sample, SampleError, SampleId, Samples};
use crate::{clip::lists::CaptionedImages, support::hash::StableHasher, train::data::DataError};

/// The images of a list, each read from its file when it is needed. They are shuffled altogether.
#[derive(Debug)]
pub struct ListedImages {
    folder: PathBuf,
    list: CaptionedImages,
    /// Where the captions of each image begin, and where the last ones end.
    captions: Vec<usize>,
    /// Why the captions of an image cannot be read.
    unreadable: BTreeMap<usize, String>,
}

impl ListedImages {
    /// The images of a list, whose paths are relative to `folder`.
    pub fn new(mut list: CaptionedImages, folder: impl Into<PathBuf>) -> Self {
        list.captions.retain(|(caption, _)| !caption.trim().is_empty());
        list.captions.sort_by_key(|(_, image)| *image);
        let count = list.images.len();
        let captions = (0..=count).map(|image| list.captions.partition_point(|(_, of)| *of < image)).collect();
        Self { folder: folder.into(), list, captions, unreadable: BTreeMap::new() }
    }

    /// The same with images whose captions cannot be read, each with the reason.
    pub(super) fn with_unreadable(self, unreadable: BTreeMap<usize, String>) -> Self {
        Self { unreadable, ..self }
    }
}

impl Samples for ListedImages {
    /// Each image is one, so that all of them are shuffled.
    fn shards(&self) -> usize {
        self.list.images.len()
    }

    fn has(&self, id: SampleId) -> Result<bool, DataError> {
        Ok(id.place == 0)
    }

    fn read(&self, id: SampleId) -> Result<Sample, SampleError> {
        let path = self.folder.join(&self.list.images[id.shard]);
        if self.captions[id.shard] == self.captions[id.shard + 1] {
            let reason = self.unreadable.get(&id.shard).cloned().unwrap_or("it has no caption".into());
            return Err(SampleError { sample: path.display().to_string(), reason });
        }
        let image =
            fs::read(&path).map_err(|error| SampleError { sample: path.display().to_string(), reason: error.to_string() })?;
        let captions = &self.list.captions[self.captions[id.shard]..self.captions[id.shard + 1]];
        Ok(Sample {
            name: path.display().to_string(),
            image,
            captions: captions.iter().map(|(caption, _)| caption.clone()).collect(),
        })
    }

    fn fingerprint(&self) -> String {
        let CaptionedImages { images, captions } = &self.list;
        // Wherever the folder is. Of images of the same names, sizes of some tell others.
        let some = images.iter().step_by(images.len().div_ceil(64).max(1));
        let sizes: Vec<u64> = some.map(|image| fs::metadata(self.folder.join(image)).map_or(0, |file| file.len())).collect();
        let images: Vec<&[u8]> = images.iter().map(|image| image.as_os_str().as_encoded_bytes()).collect();
        let mut hasher = StableHasher::default();
        (&images, captions, sizes).hash(&mut hasher);
        format!("{} images, {} captions, {:016x}", images.len(), captions.len(), hasher.finish())
    }
}
