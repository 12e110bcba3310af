//! A user's own images with captions.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

use serde::Deserialize;

use super::{Concept, DataError, ImageTextSet};
use crate::clip::preprocess::ImagePreprocessor;

#[derive(Deserialize)]
struct Row {
    path: PathBuf,
    caption: String,
}

/// Reads a list of image paths and captions, and the images. Paths are relative to the list. The list is a `.csv` with a header
/// line `path,caption`, or a `.jsonl` with `{"path": …, "caption": …}` in every line. Several lines may name one image: it then
/// has several captions. Each image is a concept of its own. `preprocessor` prepares the images: take
/// [`ImagePreprocessor::for_model`], so that a model is trained on images as it is used on them.
///
/// # Errors
/// When the list cannot be understood, a caption is empty, or an image is none; each with the file and the line.
pub fn load_folder(list: impl AsRef<Path>, preprocessor: &ImagePreprocessor) -> Result<ImageTextSet, DataError> {
    let list = list.as_ref();
    let text = fs::read_to_string(list).map_err(|source| DataError::Io { path: list.to_path_buf(), source })?;
    let bad = |line: u64, reason: String| DataError::Line { path: list.to_path_buf(), line, reason };
    let rows: Vec<(u64, Row)> = match list.extension().and_then(|e| e.to_str()) {
        Some("csv") => csv::Reader::from_reader(text.as_bytes())
            .into_deserialize()
            .enumerate()
            .map(|(index, row)| {
                // The header is line 1. A quoted line break makes this a row number, which csv's own text corrects.
                let line = index as u64 + 2;
                row.map(|row| (line, row)).map_err(|error| bad(line, error.to_string()))
            })
            .collect::<Result<_, _>>()?,
        Some("jsonl" | "ndjson") => text
            .lines()
            .enumerate()
            .filter(|(_, line)| !line.trim().is_empty())
            .map(|(index, line)| {
                let number = index as u64 + 1;
                serde_json::from_str(line).map(|row| (number, row)).map_err(|error| bad(number, error.to_string()))
            })
            .collect::<Result<_, _>>()?,
        _ => return Err(DataError::Kind { path: list.to_path_buf() }),
    };
    let folder = list.parent().unwrap_or(Path::new("."));
    let mut captions: BTreeMap<PathBuf, Vec<String>> = BTreeMap::new();
    for (line, row) in rows {
        let caption = row.caption.trim();
        if caption.is_empty() {
            return Err(bad(line, format!("the caption of {} is empty", row.path.display())));
        }
        captions.entry(folder.join(row.path)).or_default().push(caption.to_string());
    }
    let paths: Vec<&PathBuf> = captions.keys().collect();
    let mut pixels = Vec::new();
    for image in preprocessor.open_all(&paths) {
        pixels.extend(image?);
    }
    let concepts: Vec<Concept> = captions.into_values().map(|captions| Concept { captions, tags: Vec::new() }).collect();
    let set = ImageTextSet::new(preprocessor.image_size, pixels, (0..concepts.len()).collect(), concepts);
    Ok(set.with_preprocessing(preprocessor.preprocessing))
}
