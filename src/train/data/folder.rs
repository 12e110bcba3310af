//! A user's own images with captions.

use std::path::Path;

use super::{Concept, DataError, ImageTextSet};
use crate::clip::{
    lists::{CaptionedImages, Columns},
    preprocess::{ImageError, ImagePreprocessor},
};

/// What [`load_folder`] read.
#[derive(Debug)]
pub struct LoadedFolder {
    /// The images that could be read, with their captions.
    pub set: ImageTextSet,
    /// Why each of the others could not.
    pub skipped: Vec<ImageError>,
}

/// Reads a list of image paths and captions ([`CaptionedImages::table`]), and the images. Paths are relative to the list. Each image is a concept of
/// its own. `preprocessor` prepares the images: take [`ImagePreprocessor::for_model`], so that a model is trained on images as it is used on them.
///
/// # Errors
/// When the list cannot be understood, or none of its images can be read.
pub fn load_folder(list: impl AsRef<Path>, preprocessor: &ImagePreprocessor) -> Result<LoadedFolder, DataError> {
    let list = list.as_ref();
    let mut table = CaptionedImages::table(list, &Columns::default())?;
    let folder = list.parent().unwrap_or(Path::new("."));
    let paths: Vec<_> = table.images.iter().map(|image| folder.join(image)).collect();
    let (mut pixels, mut kept, mut skipped) = (Vec::new(), Vec::new(), Vec::new());
    for (index, image) in preprocessor.open_all(&paths).into_iter().enumerate() {
        match image {
            Ok(image) => {
                pixels.extend(image);
                kept.push(index);
            }
            Err(error) => skipped.push(error),
        }
    }
    table.keep(&kept);
    if table.images.is_empty() {
        return Err(skipped.into_iter().next().map_or(DataError::NoImage { path: list.to_path_buf() }, DataError::Image));
    }
    let mut concepts: Vec<Concept> = kept.iter().map(|_| Concept { captions: Vec::new(), tags: Vec::new() }).collect();
    table.captions.into_iter().for_each(|(caption, image)| concepts[image].captions.push(caption));
    let set = ImageTextSet::new(preprocessor.image_size, pixels, (0..concepts.len()).collect(), concepts);
    Ok(LoadedFolder { set: set.with_preprocessing(preprocessor.preprocessing), skipped })
}
