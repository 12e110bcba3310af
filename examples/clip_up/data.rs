//! What the models are trained and tested on.

use std::{error::Error, path::PathBuf};

use burn_moe::{
    clip::{
        VisionConfig,
        preprocess::{ImagePreprocessor, Orientation},
    },
    train::data::{DataError, EmojiPack, EmojiVendor, ImageTextSet, LoadedImages, load_images},
};

use super::{
    Args,
    support::{languages_by_code, progress, report_skipped, vendor_by_name},
};

/// Both sets.
pub(crate) struct Data {
    pub(crate) set: ImageTextSet,
    pub(crate) test: ImageTextSet,
    /// Images that could not be read, and why.
    pub(crate) skipped: Vec<String>,
}

impl Data {
    /// From the list that the options name, or the emoji pack.
    pub(crate) fn read(args: &Args, vision: &VisionConfig) -> Result<Self, Box<dyn Error>> {
        if args.list.is_none() && args.columns.images.is_some() {
            return Err("--images is the folder of a list's images: name the list with --list".into());
        }
        if let Some(list) = &args.list {
            let preprocessor = ImagePreprocessor::for_model(vision).with_orientation(Orientation::Exif);
            let mut skipped = Vec::new();
            let mut read = |list: &PathBuf| -> Result<ImageTextSet, Box<dyn Error>> {
                let (list, folder) = args.columns.read(list)?;
                let bar = progress("images", list.images.len());
                let loaded = load_images(list, folder, &preprocessor, |done| bar.set_position(done as u64))?;
                bar.finish_and_clear();
                let LoadedImages { set, skipped: bad } = loaded;
                report_skipped(&bad, set.len(), args.strict)?;
                skipped.extend(bad.iter().map(ToString::to_string));
                Ok(set)
            };
            let all = read(list)?;
            if let Some(test) = &args.test {
                let test = read(test)?;
                return Ok(Data { set: all, test, skipped });
            }
            if all.len() < 10 {
                let (list, images) = (list.display(), all.len());
                return Err(format!("{list}: {images} images; at least 10 are needed, because every tenth is held out").into());
            }
            return Ok(Data { set: all.select(|image| image % 10 != 9), test: all.select(|image| image % 10 == 9), skipped });
        }
        let pack = EmojiPack::open(concat!(env!("CARGO_MANIFEST_DIR"), "/data/emoji"))?;
        let test = match &args.hold_out {
            None => EmojiVendor::Twemoji,
            Some(name) => vendor_by_name(name, &EmojiVendor::TRAINING)?,
        };
        let vendors: Vec<_> = EmojiVendor::TRAINING.into_iter().filter(|vendor| *vendor != test).collect();
        let languages = languages_by_code(&args.languages)?;
        let load = |vendors: &[EmojiVendor], tags| {
            Ok::<_, DataError>(pack.load(vendors, &languages, tags)?.with_preprocessing(vision.preprocessing))
        };
        Ok(Self { set: load(&vendors, args.tags)?, test: load(&[test], false)?, skipped: Vec::new() })
    }
}

/// The first captions of a set.
pub(crate) fn captions(set: &ImageTextSet, count: usize) -> Vec<&String> {
    set.queries().take(count).map(|(_, caption)| &caption.text).collect()
}
