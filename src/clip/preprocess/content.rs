//! What the bytes of an image's file tell that its decoder does not.

use std::borrow::Cow;

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
    Some(gif_start(bytes)?.palette).filter(|palette| !palette.is_empty())
}

/// Where a GIF's first image lies on its canvas (left, top, right, bottom), and the colour around it: the transparent one or, as there, the
/// first of its palette.
pub(super) fn gif_surroundings(bytes: &[u8]) -> Option<([u32; 4], [u8; 3])> {
    if !bytes.starts_with(b"GIF") {
        return None;
    }
    let GifStart { palette, transparent, at } = gif_start(bytes)?;
    let number = |at: usize| bytes.get(at..at + 2).map(|bytes| u32::from(u16::from_le_bytes([bytes[0], bytes[1]])));
    let (left, top) = (number(at + 1)?, number(at + 3)?);
    let colour = palette.get(usize::from(transparent.unwrap_or(0)))?;
    Some(([left, top, left + number(at + 5)?, top + number(at + 7)?], *colour))
}

/// What stands before the pixels of a GIF's first image.
struct GifStart<'a> {
    /// Empty where there is none.
    palette: &'a [[u8; 3]],
    transparent: Option<u8>,
    /// Where the image's description is.
    at: usize,
}

fn gif_start(bytes: &[u8]) -> Option<GifStart<'_>> {
    let table = |at: usize, flags: u8| {
        let entries = (flags & 0x80 > 0).then_some(2usize << (flags & 7))?;
        bytes.get(at..)?.as_chunks().0.get(..entries)
    };
    let whole = table(13, *bytes.get(10)?);
    let mut at = 13 + whole.map_or(0, |palette| 3 * palette.len());
    let mut transparent = None;
    // Over extensions, which are made of blocks that say their length, to the first image, which may have a palette of its own.
    while *bytes.get(at)? == 0x21 {
        if let Some([0xf9, 4..=255, flags, _, _, index]) = bytes.get(at + 1..at + 7) {
            transparent = (flags & 1 > 0).then_some(*index);
        }
        at += 2;
        while *bytes.get(at)? > 0 {
            at += 1 + usize::from(bytes[at]);
        }
        at += 1;
    }
    let own = bytes.get(at + 9).and_then(|flags| table(at + 10, *flags));
    Some(GifStart { palette: own.or(whole).unwrap_or_default(), transparent, at })
}

/// A PNG that ends before its last chunk, which holds nothing, with that one; all other files as they are.
pub(super) fn with_its_end(bytes: &[u8]) -> Cow<'_, [u8]> {
    const END: &[u8] = b"\0\0\0\0IEND\xaeB`\x82";
    let mut at = 8;
    while png_colours(bytes).is_some() {
        let Some(length) = bytes.get(at..at + 4) else { break };
        let length = u32::from_be_bytes([length[0], length[1], length[2], length[3]]) as usize;
        if bytes.get(at + 4..at + 8) == Some(b"IEND") {
            break;
        }
        at = at.saturating_add(12).saturating_add(length);
        if at == bytes.len() {
            return [bytes, END].concat().into();
        }
    }
    bytes.into()
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
    fn around_a_small_first_image_is_what_pillow_puts_there() {
        // 4 x 4 pixels, of which the first image has the middle 2 x 2; four colours.
        let gif = |control: &[u8]| {
            let mut file = b"GIF89a\x04\0\x04\0\x91\x02\0".to_vec();
            file.extend([[10, 20, 30], [200, 0, 0], [0, 200, 0], [0, 0, 200]].as_flattened());
            file.extend(control);
            file.extend(b"\x2c\x01\0\x01\0\x02\0\x02\0\0\x02\x03\x4c\x12\x05\0;");
            file
        };
        // Pillow 13 gives index 0 without a transparent colour, whatever the background (here 2), and that colour otherwise.
        for (control, around) in [(b"" as &[u8], [10, 20, 30]), (b"\x21\xf9\x04\x01\0\0\x03\0", [0, 0, 200])] {
            let square = ImagePreprocessor::new(4).decode(&gif(control)).unwrap();
            assert_eq!(square[..3], around);
            assert_eq!(square[45..], around);
            assert_ne!(square[15..18], around, "the image itself");
        }
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
