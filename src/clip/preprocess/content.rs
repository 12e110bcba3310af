//! What the bytes of an image's file tell that its decoder does not.

/// The depth and the kind of colours of a PNG.
fn png_colours(bytes: &[u8]) -> Option<[u8; 2]> {
    let is_png = bytes.starts_with(b"\x89PNG\r\n\x1a\n");
    bytes.get(24..26).filter(|_| is_png).map(|colours| [colours[0], colours[1]])
}

/// Whether the pixels of a file name entries of a palette that is more than a scale of greys, or are one bit of grey.
pub(super) fn has_palette(bytes: &[u8]) -> bool {
    match bytes {
        [b'B', b'M', ..] => bmp_has_palette(bytes).unwrap_or(false),
        [b'G', b'I', b'F', ..] => !gif_palette(bytes).is_some_and(is_grey_scale),
        _ => matches!(png_colours(bytes), Some([_, 3] | [1, 0])),
    }
}

/// Whether each entry is grey, and as light as its place says.
fn is_grey_scale<const N: usize>(palette: &[[u8; N]]) -> bool {
    palette.iter().enumerate().all(|(place, colour)| colour[..3].iter().all(|value| usize::from(*value) == place))
}

/// Whether a BMP has a palette that is more than a scale of greys; `None` where it ends too early.
fn bmp_has_palette(bytes: &[u8]) -> Option<bool> {
    let number = |at: usize| bytes.get(at..at + 4).map(|bytes| u32::from_le_bytes(bytes.try_into().expect("four bytes")) as usize);
    let is_more = |colours: usize, is_grey_scale: bool| colours <= 2 || !is_grey_scale;
    let header = number(14)?;
    // OS/2's header is shorter, and so are the entries of its palette.
    if header == 12 {
        let bits = *bytes.get(24)?;
        let palette = || bytes.get(26..)?.as_chunks::<3>().0.get(..1 << bits);
        return Some(bits <= 8 && is_more(1 << bits, is_grey_scale(palette()?)));
    }
    let bits = *bytes.get(28)?;
    if bits > 8 {
        return Some(false);
    }
    let colours = Some(number(46)?).filter(|used| *used > 0).unwrap_or(1 << bits).min(256);
    let palette = bytes.get(14usize.checked_add(header)?..)?.as_chunks::<4>().0.get(..colours)?;
    Some(is_more(colours, is_grey_scale(palette)))
}

/// The palette of a GIF's first image.
fn gif_palette(bytes: &[u8]) -> Option<&[[u8; 3]]> {
    let table = |at: usize, flags: u8| {
        let entries = (flags & 0x80 > 0).then_some(2usize << (flags & 7))?;
        bytes.get(at..)?.as_chunks().0.get(..entries)
    };
    let whole = table(13, *bytes.get(10)?);
    let mut at = 13 + whole.map_or(0, |palette| 3 * palette.len());
    // Over extensions, which are made of blocks that say their length, to the first image, which may have a palette of its own.
    while *bytes.get(at)? == 0x21 {
        at += 2;
        while *bytes.get(at)? > 0 {
            at += 1 + usize::from(bytes[at]);
        }
        at += 1;
    }
    bytes.get(at + 9).and_then(|flags| table(at + 10, *flags)).or(whole)
}

/// Whether what a decoder takes for alpha can only be a colour that the file declares transparent (tRNS): its pixels have no alpha.
pub(super) fn has_transparent_colour(bytes: &[u8]) -> bool {
    matches!(png_colours(bytes), Some([_, 0 | 2]))
}

/// Whether a JPEG goes on to its end marker. Decoders fill what is missing with grey.
pub(super) fn jpeg_has_an_end(bytes: &[u8]) -> bool {
    let mut at = 2;
    loop {
        // To the next marker: 0xff before anything but 0xff (fill), 0 (a byte of data) and the restart markers among the data.
        let Some(next) = bytes[at.min(bytes.len())..].iter().position(|byte| *byte == 0xff) else { return false };
        at += next + 1;
        match bytes.get(at) {
            None => return false,
            Some(0xff) => {}
            Some(0 | 1 | 0xd0..=0xd8) => at += 1,
            Some(0xd9) => return true,
            // A segment, which says its length.
            Some(_) => match bytes.get(at + 1..at + 3) {
                None => return false,
                Some(length) => at += 1 + usize::from(u16::from_be_bytes([length[0], length[1]])).max(2),
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Cursor;

    use super::*;
    use crate::clip::preprocess::ImagePreprocessor;

    #[test]
    fn palettes_of_bitmaps_are_found() {
        // A file with OS/2's short header, whose palette has three bytes a colour, and one of 24 bits with a dark first pixel.
        let short = |bits: u8, palette: &[[u8; 3]]| {
            let mut file = b"BM\0\0\0\0\0\0\0\0\0\0\0\0\x0c\0\0\0\x08\0\x08\0\x01\0".to_vec();
            file.extend([bits, 0]);
            file.extend(palette.as_flattened());
            file.resize(file.len() + 800, 7);
            file
        };
        let greys: Vec<[u8; 3]> = (0..=255).map(|grey| [grey; 3]).collect();
        assert!(!has_palette(&short(24, &[])));
        assert!(!has_palette(&short(8, &greys)));
        let mut colours = greys;
        colours[7] = [1, 2, 3];
        assert!(has_palette(&short(8, &colours)));
        assert!(has_palette(&short(1, &[[0; 3], [255; 3]])));
    }

    #[test]
    fn a_jpeg_without_its_end_is_an_error() {
        let mut jpeg = Cursor::new(Vec::new());
        let image = image::RgbImage::from_fn(64, 64, |x, y| image::Rgb([(x * 3) as u8, (y * 3) as u8, (x * y) as u8]));
        image.write_to(&mut jpeg, image::ImageFormat::Jpeg).unwrap();
        let bytes = jpeg.into_inner();
        let preprocessor = ImagePreprocessor::new(8);
        assert!(preprocessor.decode(&bytes).is_ok());
        assert!(preprocessor.decode(&[&bytes[..], b"something behind it"].concat()).is_ok());
        for end in [bytes.len() - 1, bytes.len() - 2, bytes.len() / 2, 700] {
            let error = preprocessor.decode(&bytes[..end]).unwrap_err().to_string();
            assert!(error.contains("cut off before its end"), "{end}: {error}");
        }
    }
}
