//! The text of a list, however an editor saved it.

use std::{fs, path::Path};

use super::{ListError, format_error};
use crate::support::{content::other_kind, text::decode};

/// A text with `\n` at the ends of its lines, and without byte order marks.
pub(super) fn read_text(path: &Path) -> Result<String, ListError> {
    let bytes = fs::read(path).map_err(|source| ListError::Io { path: path.to_path_buf(), source })?;
    if let Some(kind) = other_kind(&bytes) {
        return Err(format_error(path, format!("it is {kind}")));
    }
    let mut text = decode(bytes).map_err(|reason| format_error(path, reason))?;
    if let Some(at) = text.find('\0') {
        let line = 1 + text[..at].matches('\n').count();
        return Err(format_error(path, format!("line {line} holds a zero byte, which no text has: save the file as UTF-8")));
    }
    // Macs of long ago end lines with a carriage return alone.
    if !text.contains('\n') {
        text = text.replace('\r', "\n");
    }
    // Files that were joined have a mark at each joint.
    Ok(if text.contains("\n\u{feff}") { text.replace("\n\u{feff}", "\n") } else { text })
}
