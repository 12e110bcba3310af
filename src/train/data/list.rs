//! A user's own images with captions.

use std::path::{Path, PathBuf};

use super::{Caption, Concept, DataError, ImageTextSet};
use crate::clip::{
    lists::CaptionedImages,
    preprocess::{ImageError, ImagePreprocessor},
};

/// What [`load_images`] read.
#[derive(Debug)]
pub struct LoadedImages {
    /// The images that could be read, with their captions.
    pub set: ImageTextSet,
    /// Why each of the others could not.
    pub skipped: Vec<ImageError>,
}

/// Reads the images of a list, whose paths are relative to `folder`. Each image is a concept of its own; those with a caption in common never
/// stand in one batch. `preprocessor` prepares the images: take [`ImagePreprocessor::for_model`], so that a model is trained on images as it is
/// used on them. `progress` is called with the number of images that are done.
///
/// # Errors
/// When none of the images can be read.
pub fn load_images(
    mut list: CaptionedImages,
    folder: impl AsRef<Path>,
    preprocessor: &ImagePreprocessor,
    mut progress: impl FnMut(usize),
) -> Result<LoadedImages, DataError> {
    let folder = folder.as_ref();
    let paths: Vec<PathBuf> = list.images.iter().map(|image| folder.join(image)).collect();
    let (mut pixels, mut kept, mut skipped) = (Vec::new(), Vec::new(), Vec::new());
    let mut done = 0;
    for batch in preprocessor.batches(paths, 64) {
        for image in batch {
            match image {
                Ok(image) => {
                    pixels.extend(image);
                    kept.push(done);
                }
                Err(error) => skipped.push(error),
            }
            done += 1;
        }
        progress(done);
    }
    list.keep(&kept);
    if list.images.is_empty() {
        let none = DataError::NoImage { folder: folder.to_path_buf() };
        return Err(skipped.into_iter().next().map_or(none, DataError::Image));
    }
    let mut concepts: Vec<Concept> = kept.iter().map(|_| Concept { captions: Vec::new() }).collect();
    list.captions.into_iter().for_each(|(caption, image)| concepts[image].captions.push(Caption::new(caption)));
    let set = ImageTextSet::new(preprocessor.image_size, pixels, (0..concepts.len()).collect(), concepts);
    Ok(LoadedImages { set: set.with_preprocessing(preprocessor.preprocessing), skipped })
}
