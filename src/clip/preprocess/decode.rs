//! From a file's bytes to pixels, within limits.

use std::{io::Cursor, panic::AssertUnwindSafe, path::Path};

use image::{DynamicImage, ExtendedColorType, ImageDecoder, ImageFormat, ImageReader, Limits, metadata::Orientation as Turn};

use super::{CropBox, ImageError, Orientation, content, pixels::Pixels};

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
    let mut decoder = reader.into_decoder().map_err(|error| bad(error.to_string()))?;
    let (width, height) = decoder.dimensions();
    if u64::from(width) * u64::from(height) > MOST_PIXELS {
        return Err(ImageError::TooLarge { path: path.to_path_buf(), width, height });
    }
    if width == 0 || height == 0 {
        return Err(bad("it has no pixels".into()));
    }
    let kept = kept(width, height)?;
    limits.reserve(decoder.total_bytes()).map_err(|error| bad(error.to_string()))?;
    let turn = match orientation {
        // Pillow turns TIFFs as it opens them, whoever asks.
        Orientation::AsStored if !is_tiff => Turn::NoTransforms,
        _ => decoder.orientation().unwrap_or(Turn::NoTransforms),
    };
    let is_one_bit = decoder.original_color_type() == ExtendedColorType::L1;
    let image = DynamicImage::from_decoder(decoder).map_err(|error| bad(error.to_string()))?;
    let mut image = cut(image, kept);
    image.apply_orientation(turn);
    Ok((image, is_one_bit))
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
