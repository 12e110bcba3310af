//! The emoji pack of this repository (`data/emoji`).

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

use serde::Deserialize;

use super::{Concept, DataError, ImageTextSet};
use crate::clip::preprocess::ImageError;

/// Who drew the emoji.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum EmojiVendor {
    /// Google, today.
    Noto,
    /// Google's first series, the "blobs".
    NotoV1,
    /// Mozilla.
    FxEmoji,
    /// Microsoft, flat.
    FluentFlat,
    /// EmojiOne 2.
    EmojiOne,
    /// Twitter: the test gallery, never trained on.
    Twemoji,
}

impl EmojiVendor {
    /// All that may be trained on.
    pub const TRAINING: [Self; 5] = [Self::Noto, Self::NotoV1, Self::FxEmoji, Self::FluentFlat, Self::EmojiOne];

    /// Name in the pack.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Noto => "noto",
            Self::NotoV1 => "noto-v1",
            Self::FxEmoji => "fxemoji",
            Self::FluentFlat => "fluent-emoji-flat",
            Self::EmojiOne => "emojione",
            Self::Twemoji => "twemoji",
        }
    }
}

/// The pack's captions, and where its pictures are.
#[derive(Debug, Clone)]
pub struct EmojiPack {
    folder: PathBuf,
    rows: Vec<Row>,
}

#[derive(Debug, Clone, Deserialize)]
struct Row {
    label: String,
    tags: Vec<String>,
    tiles: BTreeMap<String, usize>,
}

const TILE: usize = 32;

impl EmojiPack {
    /// Reads the captions.
    ///
    /// # Errors
    /// When the pack is not there, or a line in it cannot be understood.
    pub fn open(folder: impl AsRef<Path>) -> Result<Self, DataError> {
        let folder = folder.as_ref().to_path_buf();
        let path = folder.join("captions.jsonl");
        if !path.is_file() {
            return Err(DataError::NoPack { path: folder });
        }
        let text = fs::read_to_string(&path).map_err(|source| DataError::Io { path: path.clone(), source })?;
        let rows = text.lines().enumerate().map(|(index, line)| {
            serde_json::from_str(line).map_err(|error| DataError::Line {
                path: path.clone(),
                line: index as u64 + 1,
                reason: error.to_string(),
            })
        });
        Ok(Self { rows: rows.collect::<Result<_, _>>()?, folder })
    }

    /// The images of some vendors. Concepts are those of the whole pack, so that sets can be compared by concept. With
    /// `tags` off a concept has its English label only, as the test asks for.
    ///
    /// # Errors
    /// When a vendor's sheet is missing, damaged, or too small for its tiles.
    pub fn load(&self, vendors: &[EmojiVendor], tags: bool) -> Result<ImageTextSet, DataError> {
        let mut pixels = Vec::new();
        let mut concept_of_image = Vec::new();
        for vendor in vendors {
            let path = self.folder.join(format!("{}.png", vendor.name()));
            let bad = |reason: String| DataError::from(ImageError::Decode { path: path.clone(), reason });
            let sheet = image::open(&path).map_err(|error| bad(error.to_string()))?.into_rgb8();
            let columns = sheet.width() as usize / TILE;
            let tiles = columns * (sheet.height() as usize / TILE);
            for (concept, row) in self.rows.iter().enumerate() {
                let Some(&tile) = row.tiles.get(vendor.name()) else { continue };
                if tile >= tiles {
                    return Err(bad(format!("tile {tile} of \"{}\" is outside its {tiles} tiles", row.label)));
                }
                let (x, y) = (tile % columns * TILE, tile / columns * TILE);
                for line in 0..TILE {
                    let start = ((y + line) * sheet.width() as usize + x) * 3;
                    pixels.extend_from_slice(&sheet.as_raw()[start..start + TILE * 3]);
                }
                concept_of_image.push(concept);
            }
        }
        let concepts = self
            .rows
            .iter()
            .map(|row| Concept { captions: vec![row.label.clone()], tags: if tags { row.tags.clone() } else { Vec::new() } });
        Ok(ImageTextSet::new(TILE, pixels, concept_of_image, concepts.collect()))
    }
}
