//! The tokenizer of a checkpoint, as far as a folder tells.

use std::path::Path;

use serde::Deserialize;

use super::{CheckpointError, tensors};
use crate::clip::{TokenizerKind, text::CLIP_VOCAB_SIZE};

/// Bytes of the longest file of merges that is read; that of open_clip, which has more than CLIP uses, has three million.
#[cfg(feature = "preprocess")]
const LONGEST: u64 = 1 << 22;

/// Bytes of the longest `tokenizer.json` that is read; CLIP's has less than four million, and longer ones are others.
#[cfg(feature = "preprocess")]
const LONGEST_JSON: u64 = 1 << 24;

/// Which files of a folder tell what the tokenizer is. Without any, CLIP's vocabulary is taken for CLIP's tokenizer, and another one for another.
#[derive(Debug)]
pub(super) enum TokenizerFiles {
    /// None: the configuration tells it, or it is CLIP's.
    None,
    /// A file of merges that may be there.
    Merges(&'static str),
    /// A file of merges that open_clip's configuration names.
    BpePath(String),
    /// transformers' files, as far as they are there.
    Transformers,
}

/// What is read of `tokenizer_config.json`.
#[derive(Deserialize)]
struct TransformersConfig {
    tokenizer_class: Option<String>,
}

impl TokenizerFiles {
    /// The tokenizer of a model with `vocab_size` ids, where `folder` tells; `config` is the file of its configuration.
    pub(super) fn kind(&self, folder: &Path, vocab_size: usize, config: &Path) -> Result<Option<TokenizerKind>, CheckpointError> {
        let is_clip = match self {
            Self::None => return Ok(None),
            Self::Merges(name) => are_merges(&folder.join(name), vocab_size)?,
            Self::BpePath(name) => {
                // A path of the machine that trained the model: its file may have been copied here.
                let here = Path::new(name).file_name().map(|name| folder.join(name)).unwrap_or_default();
                let found = [folder.join(name), here].into_iter().find(|path| path.is_file()).ok_or_else(|| {
                    let reason = format!(
                        "`bpe_path` = \"{name}\": there is no such file: put it into the folder, or remove the setting if the tokenizer is CLIP's; the vision tower alone can be loaded without it"
                    );
                    CheckpointError::ConfigFile { path: config.to_path_buf(), reason }
                })?;
                are_merges(&found, vocab_size)?
            }
            Self::Transformers => transformers(folder, vocab_size)?,
        };
        Ok(match is_clip {
            Some(true) => Some(TokenizerKind::ClipBpe),
            Some(false) => Some(TokenizerKind::Other),
            None => (vocab_size != CLIP_VOCAB_SIZE).then_some(TokenizerKind::Other),
        })
    }
}

/// Whether transformers' files are those of CLIP's tokenizer; `None` where they do not tell.
fn transformers(folder: &Path, vocab_size: usize) -> Result<Option<bool>, CheckpointError> {
    let config = folder.join("tokenizer_config.json");
    let class = match config.is_file() {
        false => None,
        true => tensors::read_json::<TransformersConfig>(&config, 1 << 20)?.tokenizer_class,
    };
    let class = class.unwrap_or_default();
    // A class that reads any `tokenizer.json`.
    let is_general = class.starts_with("PreTrainedTokenizer") || class == "TokenizersBackend";
    // Which one that is, is compared with this feature alone.
    let is_unknown = is_general && cfg!(feature = "preprocess");
    if !class.is_empty() && !class.starts_with("CLIPTokenizer") && !is_general {
        return Ok(Some(false));
    }
    let told =
        [are_merges(&folder.join("merges.txt"), vocab_size)?, is_tokenizer_json(&folder.join("tokenizer.json"), vocab_size)?];
    let others = ["vocab.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model"];
    Ok(match told {
        [None, None] => (is_unknown || others.iter().any(|name| folder.join(name).is_file())).then_some(false),
        told => Some(!told.contains(&Some(false))),
    })
}

/// Whether the merges in `path` are CLIP's, if it is there.
#[cfg(feature = "preprocess")]
fn are_merges(path: &Path, vocab_size: usize) -> Result<Option<bool>, CheckpointError> {
    use std::io::{BufRead, BufReader, Read};

    use crate::support::content::other_kind;

    if !path.is_file() {
        return Ok(None);
    }
    let mut file = BufReader::new(std::fs::File::open(path).map_err(CheckpointError::io(path))?);
    let start = file.fill_buf().map_err(CheckpointError::io(path))?;
    let is_packed = start.starts_with(b"\x1f\x8b");
    if let Some(kind) = other_kind(start).filter(|_| !is_packed) {
        return Err(CheckpointError::ConfigFile { path: path.to_path_buf(), reason: format!("it is {kind}") });
    }
    let reader: Box<dyn Read> = if is_packed { Box::new(flate2::read::GzDecoder::new(file)) } else { Box::new(file) };
    // What stands in the first line is no merge, and those behind CLIP's last one are not read by others either.
    let lines = BufReader::new(reader.take(LONGEST)).lines().skip(1).take(MOST_MERGES);
    let lines: Vec<String> = lines.collect::<Result<_, _>>().map_err(CheckpointError::io(path))?;
    let end = lines.iter().rposition(|line| !line.trim().is_empty()).map_or(0, |last| last + 1);
    Ok(Some(are_clips(lines[..end].iter().map(|line| line.trim_end()), vocab_size)))
}

/// Whether the merges of a `tokenizer.json` are CLIP's, if it is there.
#[cfg(feature = "preprocess")]
fn is_tokenizer_json(path: &Path, vocab_size: usize) -> Result<Option<bool>, CheckpointError> {
    #[derive(Deserialize)]
    struct File {
        model: Model,
    }
    #[derive(Deserialize)]
    struct Model {
        #[serde(default)]
        merges: Vec<Merge>,
    }
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Merge {
        Pair([String; 2]),
        Line(String),
    }

    let Ok(about) = std::fs::metadata(path) else { return Ok(None) };
    if about.len() > LONGEST_JSON {
        return Ok(Some(false));
    }
    let merges = tensors::read_json::<File>(path, LONGEST_JSON)?.model.merges;
    let lines = merges.into_iter().map(|merge| match merge {
        Merge::Pair(pair) => pair.join(" "),
        Merge::Line(line) => line,
    });
    Ok(Some(are_clips(lines, vocab_size)))
}

#[cfg(feature = "preprocess")]
const MOST_MERGES: usize = CLIP_VOCAB_SIZE - crate::clip::text::SMALLEST_CLIP_VOCAB_SIZE;

/// Whether these are the merges of the first `vocab_size` ids of CLIP's vocabulary.
#[cfg(feature = "preprocess")]
fn are_clips(merges: impl Iterator<Item: AsRef<str>>, vocab_size: usize) -> bool {
    use crate::clip::tokenizer::{ClipTokenizer, first_merges};

    let count = vocab_size.checked_sub(ClipTokenizer::SMALLEST_VOCAB_SIZE).filter(|count| *count <= MOST_MERGES);
    let is_equal =
        |count| first_merges(count).lines().skip(1).map(str::to_string).eq(merges.map(|merge| merge.as_ref().to_string()));
    count.is_some_and(is_equal)
}

/// Without the tokenizer nothing is known of it, and nothing reads texts.
#[cfg(not(feature = "preprocess"))]
fn are_merges(_: &Path, _: usize) -> Result<Option<bool>, CheckpointError> {
    Ok(None)
}

#[cfg(not(feature = "preprocess"))]
fn is_tokenizer_json(_: &Path, _: usize) -> Result<Option<bool>, CheckpointError> {
    Ok(None)
}

/// The first merges of CLIP's vocabulary for one of `vocab_size` ids, packed as open_clip reads them. It counts lines, so that the last one must
/// not end.
#[cfg(feature = "preprocess")]
pub(super) fn packed_merges(vocab_size: usize) -> Vec<u8> {
    use std::io::Write;

    use crate::clip::tokenizer::{ClipTokenizer, first_merges};

    let merges = first_merges(vocab_size - ClipTokenizer::SMALLEST_VOCAB_SIZE);
    let mut packer = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::best());
    packer.write_all(merges.trim_end().as_bytes()).and_then(|()| packer.finish()).expect("memory can be written")
}
