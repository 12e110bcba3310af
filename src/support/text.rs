//! Text in files that people made.

/// The text of a file in UTF-8, or in UTF-16 with a byte order mark; no mark is left in front.
///
/// # Errors
/// What is wrong, in words.
pub(crate) fn decode(bytes: Vec<u8>) -> Result<String, String> {
    // What spreadsheets call Unicode.
    let utf16 = match bytes.first_chunk() {
        Some([0xff, 0xfe]) => Some(u16::from_le_bytes as fn([u8; 2]) -> u16),
        Some([0xfe, 0xff]) => Some(u16::from_be_bytes as fn([u8; 2]) -> u16),
        _ => None,
    };
    if let Some(unit) = utf16 {
        let (units, rest) = bytes[2..].as_chunks();
        let units: Vec<u16> = units.iter().map(|bytes| unit(*bytes)).collect();
        let text = String::from_utf16(&units).ok().filter(|_| rest.is_empty());
        return text.ok_or("no whole UTF-16: save the file as UTF-8".into());
    }
    let text = String::from_utf8(bytes).map_err(|error| {
        let good = &error.as_bytes()[..error.utf8_error().valid_up_to()];
        let line = 1 + good.iter().filter(|byte| **byte == b'\n').count();
        format!("line {line} is no UTF-8: save the file in this encoding")
    })?;
    Ok(match text.strip_prefix('\u{feff}') {
        Some(text) => text.to_string(),
        None => text,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn marks_are_left_out_and_other_encodings_are_named() {
        assert_eq!(decode(b"\xef\xbb\xbfcaf\xc3\xa9".to_vec()).unwrap(), "café");
        assert_eq!(decode(vec![0xff, 0xfe, b'a', 0, 0xe9, 0]).unwrap(), "aé");
        assert_eq!(decode(vec![0xfe, 0xff, 0, b'a', 0, 0xe9]).unwrap(), "aé");
        assert!(decode(vec![0xff, 0xfe, b'a']).is_err());
        assert_eq!(decode(b"a\nb\xe9".to_vec()).unwrap_err(), "line 2 is no UTF-8: save the file in this encoding");
    }
}
