//! The text of a list, however an editor saved it.

use std::{fs, path::Path};

use super::{ListError, format_error};
use crate::support::content::other_kind;

/// A text with `\n` at the ends of its lines, and without byte order marks.
pub(super) fn read_text(path: &Path) -> Result<String, ListError> {
    let bytes = fs::read(path).map_err(|source| ListError::Io { path: path.to_path_buf(), source })?;
    if let Some(kind) = other_kind(&bytes) {
        return Err(format_error(path, format!("it is {kind}")));
    }
    let mut text = decoded(bytes).map_err(|reason| format_error(path, reason))?;
    if let Some(at) = text.find('\0') {
        let line = 1 + text[..at].matches('\n').count();
        return Err(format_error(path, format!("line {line} holds a zero byte, which no text has: save the file as UTF-8")));
    }
    // Macs of long ago end lines with a carriage return alone.
    if text.contains('\r') {
        text = text.replace("\r\n", "\n").replace('\r', "\n");
    }
    // Files that were joined have a mark at each joint.
    Ok(text.strip_prefix('\u{feff}').unwrap_or(&text).replace("\n\u{feff}", "\n"))
}

fn decoded(bytes: Vec<u8>) -> Result<String, String> {
    // What spreadsheets call Unicode.
    if let Some(unit) = utf16(&bytes) {
        let (pairs, rest) = bytes.as_chunks();
        let units: Vec<u16> = pairs.iter().map(|pair| unit(*pair)).collect();
        let text = String::from_utf16(&units).ok().filter(|_| rest.is_empty());
        return text.ok_or_else(|| "no whole UTF-16: save the file as UTF-8".into());
    }
    String::from_utf8(bytes).map_err(|error| {
        let good = &error.as_bytes()[..error.utf8_error().valid_up_to()];
        let line = 1 + good.iter().filter(|byte| **byte == b'\n').count();
        format!("line {line} is no UTF-8: save the file in this encoding")
    })
}

/// How two bytes make a unit of UTF-16, if a text is that: by its mark, or as every second byte of its first letters is zero.
fn utf16(bytes: &[u8]) -> Option<fn([u8; 2]) -> u16> {
    match bytes {
        [0xff, 0xfe, ..] => Some(u16::from_le_bytes),
        [0xfe, 0xff, ..] => Some(u16::from_be_bytes),
        [1..=255, 0, 1..=255, 0, ..] => Some(u16::from_le_bytes),
        [0, 1..=255, 0, 1..=255, ..] => Some(u16::from_be_bytes),
        _ => None,
    }
}
