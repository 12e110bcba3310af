//! From a file's bytes to pixels, within limits.

use std::{error::Error, io::Cursor, panic::AssertUnwindSafe, path::Path};

use image::{
    ColorType, DynamicImage, ExtendedColorType, ImageDecoder, ImageFormat, ImageReader, Limits, Rgba,
    error::{ImageFormatHint, UnsupportedErrorKind},
    metadata::Orientation as Turn,
};

use super::{CropBox, ImageError, Orientation, content, pixels::Pixels};
use crate::support::content::other_kind;

/// The most pixels that an image may have.
pub(super) const MOST_PIXELS: u64 = 64_000_000;
/// The most memory that a decoder may take; its image may then be copied once, to other colours or turned.
pub(super) const MOST_BYTES: u64 = 256 << 20;

/// Decodes the bytes of a file. `kept` says from width and height as stored which part is kept; `crop` the same of that part, after any turn.
/// A decoder that panics on a file has found it damaged.
pub(super) fn decode(
    bytes: &[u8],
    path: &Path,
    orientation: Orientation,
    kept: impl FnOnce(u32, u32) -> Result<CropBox, ImageError>,
    crop: impl FnOnce(u32, u32) -> CropBox,
) -> Result<Pixels, ImageError> {
    let bad = |reason: String| ImageError::Decode { path: path.to_path_buf(), reason };
    let other = if bytes.is_empty() { Some("empty".to_string()) } else { other_kind(bytes) };
    if let Some(kind) = other {
        return Err(bad(format!("it is {kind}")));
    }
    let whole = content::with_its_end(bytes);
    let bytes = whole.as_ref();
    let image = AssertUnwindSafe(|| turned(bytes, path, orientation, kept));
    let (image, is_one_bit) = std::panic::catch_unwind(image).unwrap_or_else(|_| Err(bad("its decoder stopped on it".into())))?;
    let (width, height) = (image.width(), image.height());
    let image = cut(image, crop(width, height));
    Ok(Pixels::of(image, is_one_bit || content::has_palette(bytes), bytes))
}

/// The image the right way up, and whether its pixels are single bits.
fn turned(
    bytes: &[u8],
    path: &Path,
    orientation: Orientation,
    kept: impl FnOnce(u32, u32) -> Result<CropBox, ImageError>,
) -> Result<(DynamicImage, bool), ImageError> {
    let bad = |reason: String| ImageError::Decode { path: path.to_path_buf(), reason };
    let mut reader = ImageReader::new(Cursor::new(bytes)).with_guessed_format().map_err(|error| bad(error.to_string()))?;
    if reader.format() == Some(ImageFormat::Jpeg) && !content::jpeg_has_an_end(bytes) {
        return Err(bad("a JPEG that is cut off before its end".into()));
    }
    let mut limits = Limits::default();
    limits.max_alloc = Some(MOST_BYTES);
    reader.limits(limits.clone());
    let is_tiff = reader.format() == Some(ImageFormat::Tiff);
    let mut decoder = reader.into_decoder().map_err(|error| bad(in_words(&error)))?;
    let (width, height) = decoder.dimensions();
    if u64::from(width) * u64::from(height) > MOST_PIXELS {
        return Err(ImageError::TooLarge { path: path.to_path_buf(), width, height });
    }
    if width == 0 || height == 0 {
        return Err(bad("it has no pixels".into()));
    }
    let kept = kept(width, height)?;
    limits.reserve(decoder.total_bytes()).map_err(|error| bad(in_words(&error)))?;
    let turn = match orientation {
        // Pillow turns TIFFs as it opens them, whoever asks.
        Orientation::AsStored if !is_tiff => Turn::NoTransforms,
        _ => decoder.orientation().unwrap_or(Turn::NoTransforms),
    };
    let is_one_bit = decoder.original_color_type() == ExtendedColorType::L1;
    // A TIFF of colours in 32 bits, whose range nothing says.
    let colours = decoder.color_type();
    if matches!(colours, ColorType::Rgb32F | ColorType::Rgba32F) {
        return Err(bad(of_these_colours(colours.bits_per_pixel())));
    }
    let mut image = DynamicImage::from_decoder(decoder).map_err(|error| bad(in_words(&error)))?;
    if let (Some(rgba), Some(([left, top, right, bottom], [r, g, b]))) = (image.as_mut_rgba8(), content::gif_surroundings(bytes)) {
        let is_inside = |x: u32, y: u32| (left..right).contains(&x) && (top..bottom).contains(&y);
        rgba.enumerate_pixels_mut().filter(|(x, y, _)| !is_inside(*x, *y)).for_each(|(_, _, pixel)| *pixel = Rgba([r, g, b, 0]));
    }
    let mut image = cut(image, kept);
    image.apply_orientation(turn);
    Ok((image, is_one_bit))
}

/// What a decoder said, without the names that Rust's Debug form has.
fn in_words(error: &image::ImageError) -> String {
    let unsupported = match error {
        image::ImageError::Unsupported(error) => error.kind(),
        image::ImageError::Limits(_) => return "it needs more memory than is allowed".into(),
        error => return without_braces(&error.to_string()),
    };
    match unsupported {
        UnsupportedErrorKind::Format(ImageFormatHint::Exact(format)) => {
            format!("{format:?} images are not read: save it as PNG or JPEG")
        }
        UnsupportedErrorKind::Format(_) => "it begins as no image of a known kind does".into(),
        UnsupportedErrorKind::Color(colours) | UnsupportedErrorKind::ColorLayout(colours) => {
            of_these_colours(colours.bits_per_pixel())
        }
        _ => {
            let text = error.source().map_or_else(|| error.to_string(), ToString::to_string);
            format!("{}: save it again as PNG", without_braces(&text))
        }
    }
}

/// What is said of an image whose colours are not read.
fn of_these_colours(bits: u16) -> String {
    format!("its kind of colours, of {bits} bits a pixel, is not read: save it again as PNG, or in RGB or grey of 8 bits")
}

/// A text in which a chunk of a PNG has its name alone.
fn without_braces(text: &str) -> String {
    let parts = text.split_once("ChunkType { type: ").and_then(|(before, rest)| {
        let (chunk, behind) = rest.split_once(" }")?;
        Some((before, chunk.split(',').next()?, behind.strip_prefix(" chunk").unwrap_or(behind)))
    });
    parts.map_or_else(|| text.to_string(), |(before, name, behind)| without_braces(&format!("{before}the chunk {name}{behind}")))
}

fn cut(image: DynamicImage, CropBox { left, top, width, height }: CropBox) -> DynamicImage {
    let fits = |start: u32, length: u32, whole: u32| length > 0 && start.checked_add(length).is_some_and(|end| end <= whole);
    assert!(
        fits(left, width, image.width()) && fits(top, height, image.height()),
        "a part of {width} x {height} pixels at {left}, {top} does not lie within an image of {} x {}",
        image.width(),
        image.height()
    );
    if (width, height) == (image.width(), image.height()) { image } else { image.crop_imm(left, top, width, height) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clip::preprocess::ImagePreprocessor;

    fn png_of(image: image::DynamicImage) -> Vec<u8> {
        let mut png = Cursor::new(Vec::new());
        image.write_to(&mut png, ImageFormat::Png).unwrap();
        png.into_inner()
    }

    #[test]
    fn what_is_wrong_in_a_file_is_said_in_words() {
        let image = image::RgbImage::from_fn(16, 16, |x, y| image::Rgb([x as u8, y as u8, (x * y) as u8]));
        let preprocessor = ImagePreprocessor::new(8);
        let whole = png_of(image.into());
        let mut damaged = whole.clone();
        damaged[29] ^= 1;
        let error = preprocessor.decode(&damaged).unwrap_err().to_string();
        assert!(error.contains("while decoding the chunk IHDR") && !error.contains('{'), "{error}");
        let floats = image::ImageBuffer::from_pixel(4, 4, image::Rgb([0.5f32; 3]));
        let mut tiff = Cursor::new(Vec::new());
        image::DynamicImage::from(floats).write_to(&mut tiff, ImageFormat::Tiff).unwrap();
        let mut bytes = tiff.into_inner();
        let error = preprocessor.decode(&bytes).unwrap_err().to_string();
        assert!(error.contains("of 96 bits a pixel, is not read"), "{error}");
        // The entry of the kind of colours (tag 262, one short): 8 is CIE Lab.
        let entry = bytes.windows(8).position(|entry| entry == [6, 1, 3, 0, 1, 0, 0, 0]).unwrap();
        bytes[entry + 8] = 8;
        let error = preprocessor.decode(&bytes).unwrap_err().to_string();
        assert!(error.contains("save it again as PNG"), "{error}");
    }

    #[test]
    fn a_png_without_its_last_chunk_is_whole_and_one_without_pixels_is_not() {
        let image = image::RgbImage::from_fn(64, 64, |x, y| image::Rgb([(x * y) as u8, (y * 7) as u8, (x * 3) as u8]));
        let preprocessor = ImagePreprocessor::new(8);
        let png = png_of(image.into());
        let whole = preprocessor.decode(&png).unwrap();
        assert_eq!(preprocessor.decode(&png[..png.len() - 12]).unwrap(), whole);
        for end in [33, png.len() - 13, png.len() - 20, png.len() / 2] {
            assert!(preprocessor.decode(&png[..end]).is_err(), "{end}");
        }
        // Half of the pixels in a chunk that is whole.
        let data = png.windows(4).position(|name| name == b"IDAT").unwrap();
        let half = (png.len() - 12 - data) / 2;
        let mut cut = png[..data - 4].to_vec();
        cut.extend((half as u32).to_be_bytes());
        cut.extend(&png[data..data + 4 + half]);
        let mut sum = !0u32;
        for byte in &png[data..data + 4 + half] {
            sum ^= u32::from(*byte);
            (0..8).for_each(|_| sum = (sum >> 1) ^ (0xedb8_8320 * (sum & 1)));
        }
        cut.extend((!sum).to_be_bytes());
        assert!(preprocessor.decode(&cut).is_err());
    }
}
