//! The tokenizer of a checkpoint, as far as a folder tells.

use std::path::Path;

use super::CheckpointError;
use crate::clip::TokenizerKind;

/// Bytes of the longest file of merges that is read; that of CLIP's whole vocabulary has half a million.
#[cfg(feature = "preprocess")]
const LONGEST: u64 = 1 << 22;

/// The tokenizer of a vocabulary with the merges in `path`, which may be missing or not CLIP's.
#[cfg(feature = "preprocess")]
pub(super) fn kind_of(path: &Path, vocab_size: usize) -> Result<TokenizerKind, CheckpointError> {
    use std::io::Read;

    use crate::clip::tokenizer::{ClipTokenizer, first_merges};

    if !path.is_file() || !(ClipTokenizer::SMALLEST_VOCAB_SIZE..=ClipTokenizer::VOCAB_SIZE).contains(&vocab_size) {
        return Ok(TokenizerKind::Other);
    }
    let file = std::fs::File::open(path).map_err(CheckpointError::io(path))?;
    let is_packed = path.extension().is_some_and(|extension| extension == "gz");
    let reader: Box<dyn Read> = if is_packed { Box::new(flate2::read::GzDecoder::new(file)) } else { Box::new(file) };
    let mut text = String::new();
    reader.take(LONGEST).read_to_string(&mut text).map_err(CheckpointError::io(path))?;
    let first = first_merges(vocab_size - ClipTokenizer::SMALLEST_VOCAB_SIZE);
    // What stands in the first line is no merge.
    let is_clip = text.trim_end().lines().skip(1).eq(first.lines().skip(1));
    Ok(if is_clip { TokenizerKind::ClipBpe } else { TokenizerKind::Other })
}

/// Without the tokenizer nothing is known of it, and nothing reads texts.
#[cfg(not(feature = "preprocess"))]
pub(super) fn kind_of(_: &Path, _: usize) -> Result<TokenizerKind, CheckpointError> {
    Ok(TokenizerKind::Other)
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
