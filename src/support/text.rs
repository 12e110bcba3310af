//! Text in files that people made.

/// The text of a file in UTF-8 or UTF-16, without a byte order mark in front.
///
/// # Errors
/// What is wrong, in words.
pub(crate) fn decode(bytes: Vec<u8>) -> Result<String, String> {
    let text = match utf16(&bytes) {
        // What spreadsheets call Unicode.
        Some(unit) => {
            let (pairs, rest) = bytes.as_chunks();
            let units: Vec<u16> = pairs.iter().map(|pair| unit(*pair)).collect();
            let text = String::from_utf16(&units).ok().filter(|_| rest.is_empty());
            text.ok_or("no whole UTF-16: save the file as UTF-8")?
        }
        None => String::from_utf8(bytes).map_err(|error| {
            let good = &error.as_bytes()[..error.utf8_error().valid_up_to()];
            let line = 1 + good.iter().filter(|byte| **byte == b'\n').count();
            format!("line {line} is no UTF-8: save the file in this encoding")
        })?,
    };
    Ok(match text.strip_prefix('\u{feff}') {
        Some(text) => text.to_string(),
        None => text,
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn marks_are_left_out_and_other_encodings_are_named() {
        assert_eq!(decode(b"\xef\xbb\xbfcaf\xc3\xa9".to_vec()).unwrap(), "café");
        assert_eq!(decode(vec![0xff, 0xfe, b'a', 0, 0xe9, 0]).unwrap(), "aé");
        assert_eq!(decode(vec![0xfe, 0xff, 0, b'a', 0, 0xe9]).unwrap(), "aé");
        assert_eq!(decode(vec![b'a', 0, 0xe9, 0]).unwrap(), "aé");
        assert!(decode(vec![0xff, 0xfe, b'a']).is_err());
        assert_eq!(decode(b"a\nb\xe9".to_vec()).unwrap_err(), "line 2 is no UTF-8: save the file in this encoding");
    }
}
