//! The emoji pack of this repository (`data/emoji`).

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

use serde::{Deserialize, de::DeserializeOwned};

use super::{Caption, Concept, DataError, ImageTextSet};
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

/// A language of the pack's captions.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Language {
    /// English.
    En,
    /// Danish.
    Da,
    /// German.
    De,
    /// Spanish.
    Es,
    /// Estonian.
    Et,
    /// Finnish.
    Fi,
    /// French.
    Fr,
    /// Hungarian.
    Hu,
    /// Italian.
    It,
    /// Lithuanian.
    Lt,
    /// Malay.
    Ms,
    /// Norwegian (Bokmål).
    Nb,
    /// Dutch.
    Nl,
    /// Polish.
    Pl,
    /// Portuguese.
    Pt,
    /// Swedish.
    Sv,
}

impl Language {
    /// All of the pack.
    pub const ALL: [Self; 16] = [
        Self::En,
        Self::Da,
        Self::De,
        Self::Es,
        Self::Et,
        Self::Fi,
        Self::Fr,
        Self::Hu,
        Self::It,
        Self::Lt,
        Self::Ms,
        Self::Nb,
        Self::Nl,
        Self::Pl,
        Self::Pt,
        Self::Sv,
    ];

    /// Code of two letters (ISO 639-1), which the pack uses.
    pub fn code(&self) -> &'static str {
        match self {
            Self::En => "en",
            Self::Da => "da",
            Self::De => "de",
            Self::Es => "es",
            Self::Et => "et",
            Self::Fi => "fi",
            Self::Fr => "fr",
            Self::Hu => "hu",
            Self::It => "it",
            Self::Lt => "lt",
            Self::Ms => "ms",
            Self::Nb => "nb",
            Self::Nl => "nl",
            Self::Pl => "pl",
            Self::Pt => "pt",
            Self::Sv => "sv",
        }
    }
}

/// The pack's captions, and where its pictures are.
#[derive(Debug, Clone)]
pub struct EmojiPack {
    folder: PathBuf,
    rows: Vec<Row>,
    /// For each row the captions in other languages than English, by code.
    others: Vec<BTreeMap<String, Words>>,
}

/// A line of `captions.jsonl`.
#[derive(Debug, Clone, Deserialize)]
struct Row {
    hexcode: String,
    #[serde(flatten)]
    english: Words,
    tiles: BTreeMap<String, usize>,
}

/// A line of `captions-multilingual.jsonl`.
#[derive(Debug, Clone, Deserialize)]
struct OtherRow {
    hexcode: String,
    #[serde(flatten)]
    languages: BTreeMap<String, Words>,
}

#[derive(Debug, Clone, Deserialize)]
struct Words {
    label: String,
    tags: Vec<String>,
}

/// The lines of a file of JSON.
fn lines<T: DeserializeOwned>(path: &Path) -> Result<Vec<T>, DataError> {
    let text = fs::read_to_string(path).map_err(|source| DataError::Io { path: path.to_path_buf(), source })?;
    let bad = |line, reason| DataError::Line { path: path.to_path_buf(), line, reason };
    let rows = text.lines().zip(1..).map(|(text, line)| serde_json::from_str(text).map_err(|error| bad(line, error.to_string())));
    rows.collect()
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
        let rows: Vec<Row> = lines(&path)?;
        let path = folder.join("captions-multilingual.jsonl");
        let others: Vec<OtherRow> = lines(&path)?;
        for (line, row) in rows.iter().enumerate() {
            let found = others.get(line).map_or("nothing", |other| &other.hexcode);
            if found != row.hexcode {
                let reason = format!("expected the captions of {}, found those of {found}", row.hexcode);
                return Err(DataError::Line { path, line: line as u64 + 1, reason });
            }
        }
        Ok(Self { rows, others: others.into_iter().map(|other| other.languages).collect(), folder })
    }

    /// The images of some vendors. Concepts are those of the whole pack, so that sets can be compared by concept. Each has its label in each of
    /// `languages` for captions, in this order. Without `tags` there is nothing else, as the test asks for.
    ///
    /// # Errors
    /// When a vendor's sheet is missing, damaged, or too small for its tiles, or a caption is missing.
    pub fn load(&self, vendors: &[EmojiVendor], languages: &[Language], tags: bool) -> Result<ImageTextSet, DataError> {
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
                    return Err(bad(format!("tile {tile} of \"{}\" is outside its {tiles} tiles", row.english.label)));
                }
                let (x, y) = (tile % columns * TILE, tile / columns * TILE);
                for line in 0..TILE {
                    let start = ((y + line) * sheet.width() as usize + x) * 3;
                    pixels.extend_from_slice(&sheet.as_raw()[start..start + TILE * 3]);
                }
                concept_of_image.push(concept);
            }
        }
        let concepts = self.rows.iter().zip(&self.others).enumerate().map(|(line, (row, others))| {
            let caption = |language: &Language| {
                let words = if *language == Language::En { Some(&row.english) } else { others.get(language.code()) };
                let Words { label, tags: words } = words.ok_or_else(|| DataError::Line {
                    path: self.folder.join("captions-multilingual.jsonl"),
                    line: line as u64 + 1,
                    reason: format!("{} has no caption in the language `{}`", row.hexcode, language.code()),
                })?;
                let tags = if tags { words.clone() } else { Vec::new() };
                Ok(Caption { text: label.clone(), tags, language: Some(language.code().to_string()) })
            };
            Ok(Concept { captions: languages.iter().map(caption).collect::<Result<_, DataError>>()? })
        });
        Ok(ImageTextSet::new(TILE, pixels, concept_of_image, concepts.collect::<Result<_, DataError>>()?))
    }
}
