//! CLIP's image preprocessing, as open_clip does it at inference.

use std::{
    fs,
    io::Cursor,
    path::{Path, PathBuf},
    sync::mpsc,
    thread,
};

use burn::tensor::{Device, Tensor, TensorData};
use fast_image_resize::{FilterType, PixelType, ResizeAlg, ResizeOptions, Resizer, images::Image};
use image::{DynamicImage, ImageDecoder, ImageReader, Limits, metadata::Orientation as Turn};
use rayon::prelude::*;

use super::{ImagePreprocessing, Interpolation, ResizeMode, VisionConfig};

/// The most pixels that an image may have.
const MOST_PIXELS: u64 = 64_000_000;
/// The most memory that a decoder may take; its image may then be copied once, to other colours or turned.
const MOST_BYTES: u64 = 256 << 20;

/// What happens to the orientation that a camera writes into an image.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Orientation {
    /// Nothing, as in open_clip: a photo held upright may lie on its side.
    #[default]
    AsStored,
    /// The image is turned before anything else.
    Exif,
}

/// An image that cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ImageError {
    /// The file cannot be read or written.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What it said.
        source: std::io::Error,
    },
    /// Not an image of a known kind, damaged, or in need of more memory than is allowed.
    #[error("{} is no readable image: {reason}", path.display())]
    Decode {
        /// The file; empty for bytes in memory.
        path: PathBuf,
        /// What the decoder said.
        reason: String,
    },
    /// More pixels than are allowed.
    #[error("{} has {width} x {height} pixels; at most {MOST_PIXELS} are read", path.display())]
    TooLarge {
        /// The file; empty for bytes in memory.
        path: PathBuf,
        /// Pixels across.
        width: u32,
        /// Pixels down.
        height: u32,
    },
}

/// A square RGB image as bytes, row by row.
pub type Square = Vec<u8>;

/// Decodes, resizes with antialiasing, crops and normalises as [`ImagePreprocessing`] says.
///
/// Within 1/255 of open_clip's own transform on lossless images, whose quirks are kept: alpha is dropped after resizing, images with a palette
/// are resized without smoothing, and 16 bits of grey come out white. JPEG decoders differ among each other by a little more. PNG, JPEG and
/// WebP.
#[derive(Clone, Debug, PartialEq)]
pub struct ImagePreprocessor {
    /// Side of the result, in pixels.
    pub image_size: usize,
    /// How the image is resized and normalised.
    pub preprocessing: ImagePreprocessing,
    /// What happens to a camera's orientation.
    pub orientation: Orientation,
}

impl ImagePreprocessor {
    /// For a tower of this image size, with CLIP's own preprocessing; orientation as in open_clip.
    ///
    /// # Panics
    /// When the size is zero.
    pub fn new(image_size: usize) -> Self {
        assert!(image_size > 0, "an image of side 0 has no pixels");
        Self { image_size, preprocessing: ImagePreprocessing::new(), orientation: Orientation::AsStored }
    }

    /// What a vision tower expects; orientation as in open_clip.
    ///
    /// # Panics
    /// When its image size is zero.
    pub fn for_model(vision: &VisionConfig) -> Self {
        Self::new(vision.image_size).with_preprocessing(vision.preprocessing)
    }

    /// The same with another way of resizing and normalising.
    pub fn with_preprocessing(mut self, preprocessing: ImagePreprocessing) -> Self {
        self.preprocessing = preprocessing;
        self
    }

    /// The same with images turned the right way up.
    pub fn with_orientation(mut self, orientation: Orientation) -> Self {
        self.orientation = orientation;
        self
    }

    /// Reads one image from a file.
    ///
    /// # Errors
    /// When the file cannot be read, is no image, is damaged, or claims more than 64 megapixels.
    pub fn open(&self, path: impl AsRef<Path>) -> Result<Square, ImageError> {
        let path = path.as_ref();
        let io = |source| ImageError::Io { path: path.to_path_buf(), source };
        let size = fs::metadata(path).map_err(io)?.len();
        if size > MOST_BYTES {
            return Err(ImageError::Decode { path: path.to_path_buf(), reason: format!("a file of {size} bytes is not read") });
        }
        self.decode_named(&fs::read(path).map_err(io)?, path)
    }

    /// Reads one image from memory.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub fn decode(&self, bytes: &[u8]) -> Result<Square, ImageError> {
        self.decode_named(bytes, Path::new(""))
    }

    /// Reads many images, on all threads; one result each, in order.
    pub fn open_all<P: AsRef<Path> + Sync>(&self, paths: &[P]) -> Vec<Result<Square, ImageError>> {
        paths.par_iter().map(|path| self.open(path)).collect()
    }

    /// Reads images batch by batch, the next ones while the last are being used.
    pub fn batches(&self, paths: Vec<PathBuf>, batch_size: usize) -> impl Iterator<Item = Vec<Result<Square, ImageError>>> + use<> {
        let (sender, batches) = mpsc::sync_channel(2);
        let preprocessor = self.clone();
        thread::spawn(move || {
            for batch in paths.chunks(batch_size.max(1)) {
                // Nobody listens any more: nothing is left to do.
                if sender.send(preprocessor.open_all(batch)).is_err() {
                    return;
                }
            }
        });
        batches.into_iter()
    }

    /// What a model takes, `[B, 3, image_size, image_size]`.
    ///
    /// # Panics
    /// When an image has another size.
    pub fn tensor(&self, images: &[Square], device: &Device) -> Tensor<4> {
        let area = self.image_size * self.image_size;
        let mut values = vec![0.0; images.len() * 3 * area];
        values.par_chunks_mut(3 * area).zip(images).for_each(|(planes, image)| {
            assert!(image.len() == 3 * area, "{} bytes are no image of side {}", image.len(), self.image_size);
            for (channel, plane) in planes.chunks_exact_mut(area).enumerate() {
                for (value, pixel) in plane.iter_mut().zip(image.chunks_exact(3)) {
                    *value = self.preprocessing.normalize(pixel[channel].into(), channel);
                }
            }
        });
        Tensor::from_data(TensorData::new(values, [images.len(), 3, self.image_size, self.image_size]), device)
    }

    /// Decodes; a decoder that panics on a file has found it damaged.
    fn decode_named(&self, bytes: &[u8], path: &Path) -> Result<Square, ImageError> {
        let decode = std::panic::AssertUnwindSafe(|| self.decode_or_panic(bytes, path));
        std::panic::catch_unwind(decode)
            .unwrap_or_else(|_| Err(ImageError::Decode { path: path.to_path_buf(), reason: "its decoder stopped on it".into() }))
    }

    fn decode_or_panic(&self, bytes: &[u8], path: &Path) -> Result<Square, ImageError> {
        let bad = |reason: String| ImageError::Decode { path: path.to_path_buf(), reason };
        let mut reader = ImageReader::new(Cursor::new(bytes)).with_guessed_format().map_err(|error| bad(error.to_string()))?;
        let mut limits = Limits::default();
        limits.max_alloc = Some(MOST_BYTES);
        reader.limits(limits.clone());
        let mut decoder = reader.into_decoder().map_err(|error| bad(error.to_string()))?;
        let (width, height) = decoder.dimensions();
        // The resized image counts too: a long and thin one becomes larger.
        let [across, down] = self.resized_size(width as usize, height as usize).map(|side| side as u64);
        let largest = [u64::from(width) * u64::from(height), across.saturating_mul(height.into()), across.saturating_mul(down)];
        if largest.into_iter().any(|pixels| pixels > MOST_PIXELS) {
            return Err(ImageError::TooLarge { path: path.to_path_buf(), width, height });
        }
        limits.reserve(decoder.total_bytes()).map_err(|error| bad(error.to_string()))?;
        let turn = match self.orientation {
            Orientation::AsStored => Turn::NoTransforms,
            Orientation::Exif => decoder.orientation().unwrap_or(Turn::NoTransforms),
        };
        let mut image = DynamicImage::from_decoder(decoder).map_err(|error| bad(error.to_string()))?;
        image.apply_orientation(turn);
        self.square(Pixels::of(image, bytes)).map_err(bad)
    }

    /// Width and height after resizing: both at least `image_size`.
    fn resized_size(&self, width: usize, height: usize) -> [usize; 2] {
        if self.preprocessing.resize_mode == ResizeMode::Squash {
            return [self.image_size; 2];
        }
        let short = width.min(height).max(1);
        [width, height].map(|side| if side == short { self.image_size } else { self.image_size * side / short })
    }

    fn filter(&self) -> ResizeAlg {
        ResizeAlg::Convolution(match self.preprocessing.interpolation {
            Interpolation::Bicubic => FilterType::CatmullRom,
            Interpolation::Bilinear => FilterType::Bilinear,
        })
    }

    /// Resizes, and takes the middle; sizes and offsets as torchvision rounds them.
    fn square(&self, pixels: Pixels) -> Result<Square, String> {
        let (width, height) = pixels.dims();
        if width == 0 || height == 0 {
            return Err("it has no pixels".into());
        }
        let size = self.image_size;
        let [new_width, new_height] = self.resized_size(width, height);
        let rgb = pixels.resized(new_width, new_height, self.filter())?;
        let (left, top) = (half_to_even(new_width - size), half_to_even(new_height - size));
        let rows = rgb.chunks_exact(3 * new_width).skip(top).take(size);
        Ok(rows.flat_map(|row| &row[3 * left..3 * (left + size)]).copied().collect())
    }
}

/// Half of a number, to the even neighbour when it is odd: Python's rounding.
fn half_to_even(number: usize) -> usize {
    let half = number / 2;
    if number.is_multiple_of(2) || half.is_multiple_of(2) { half } else { half + 1 }
}

/// Pixels as Pillow resizes them: in the colours of the file.
enum Pixels {
    /// RGB.
    Opaque(Image<'static>),
    /// RGBA. Resized with alpha multiplied in, and divided out again.
    Transparent(Image<'static>),
    /// RGB from a palette: the nearest pixel is taken.
    Palette(Image<'static>),
    /// 16 bits of grey, of which all above 255 become white.
    Grey(Image<'static>),
}

impl Pixels {
    fn of(image: DynamicImage, bytes: &[u8]) -> Self {
        let (width, height) = (image.width(), image.height());
        let image_of =
            |values: Vec<u8>, kind| Image::from_vec_u8(width, height, values, kind).expect("as many values as pixels and channels");
        // Pillow keeps the high byte of a colour's 16 bits.
        let high = |values: Vec<u16>| values.into_iter().map(|value| (value >> 8) as u8).collect::<Vec<u8>>();
        match image {
            image if is_palette_png(bytes) => Self::Palette(image_of(image.into_rgb8().into_raw(), PixelType::U8x3)),
            DynamicImage::ImageLuma16(image) => {
                let bytes = image.into_raw().iter().flat_map(|value| value.to_ne_bytes()).collect();
                Self::Grey(image_of(bytes, PixelType::U16))
            }
            DynamicImage::ImageRgb16(image) => Self::Opaque(image_of(high(image.into_raw()), PixelType::U8x3)),
            DynamicImage::ImageRgba16(image) => Self::Transparent(image_of(high(image.into_raw()), PixelType::U8x4)),
            DynamicImage::ImageLumaA16(image) => {
                let both = high(image.into_raw());
                let rgba = both.as_chunks().0.iter().flat_map(|&[grey, alpha]| [grey, grey, grey, alpha]).collect();
                Self::Transparent(image_of(rgba, PixelType::U8x4))
            }
            image if image.color().has_alpha() => Self::Transparent(image_of(image.into_rgba8().into_raw(), PixelType::U8x4)),
            image => Self::Opaque(image_of(image.into_rgb8().into_raw(), PixelType::U8x3)),
        }
    }

    fn dims(&self) -> (usize, usize) {
        let (Self::Opaque(image) | Self::Transparent(image) | Self::Palette(image) | Self::Grey(image)) = self;
        (image.width() as usize, image.height() as usize)
    }

    /// RGB bytes of another size.
    fn resized(self, width: usize, height: usize, filter: ResizeAlg) -> Result<Vec<u8>, String> {
        let is_same = self.dims() == (width, height);
        match self {
            Self::Opaque(image) if is_same => Ok(image.into_vec()),
            Self::Palette(image) if is_same => Ok(image.into_vec()),
            Self::Opaque(image) => Ok(smooth(image, width, height, filter)?.into_vec()),
            Self::Palette(image) => Ok(resize(&image, width, height, ResizeAlg::Nearest)?.into_vec()),
            Self::Grey(image) => {
                let image = if is_same { image } else { smooth(image, width, height, filter)? };
                let values = image.buffer().as_chunks().0.iter().map(|bytes| u16::from_ne_bytes(*bytes).min(255) as u8);
                Ok(values.flat_map(|value| [value; 3]).collect())
            }
            Self::Transparent(image) if is_same => Ok(without_alpha(image.buffer())),
            Self::Transparent(image) => resize_transparent(&image, width, height, filter),
        }
    }
}

/// Across, then down, with the result of the first rounded, as Pillow does it: in the other order, what overshoots an edge is cut off
/// differently.
fn smooth(image: Image<'static>, width: usize, height: usize, filter: ResizeAlg) -> Result<Image<'static>, String> {
    let across = resize(&image, width, image.height() as usize, filter)?;
    resize(&across, width, height, filter)
}

fn resize(image: &Image, width: usize, height: usize, filter: ResizeAlg) -> Result<Image<'static>, String> {
    let mut out = Image::new(width as u32, height as u32, image.pixel_type());
    let options = ResizeOptions::new().resize_alg(filter).use_alpha(false);
    Resizer::new().resize(image, &mut out, &options).map_err(|error| error.to_string())?;
    Ok(out)
}

/// RGBA to RGB. Dividing by a small alpha makes much of a small error, so the products are kept exact.
fn resize_transparent(image: &Image, width: usize, height: usize, filter: ResizeAlg) -> Result<Vec<u8>, String> {
    // A product of two bytes over 255, rounded.
    let by_alpha = |value: u8, alpha: u8| {
        let product = u32::from(value) * u32::from(alpha) + 128;
        ((product >> 8) + product) >> 8
    };
    let multiplied = |&[r, g, b, alpha]: &[u8; 4]| {
        [by_alpha(r, alpha), by_alpha(g, alpha), by_alpha(b, alpha), alpha.into()].map(|value| value as f32)
    };
    let whole = |image: Image<'static>| {
        let round = |bytes: &[u8; 4]| (f32::from_ne_bytes(*bytes) + 0.5).floor().clamp(0.0, 255.0);
        image.buffer().as_chunks().0.iter().map(round).collect::<Vec<f32>>()
    };
    let image_of = |values: &[f32], width: u32| {
        let mut image = Image::new(width, values.len() as u32 / 4 / width, PixelType::F32x4);
        let bytes = image.buffer_mut().as_chunks_mut().0.iter_mut();
        bytes.zip(values).for_each(|(bytes, value)| *bytes = value.to_ne_bytes());
        image
    };
    let mut across = Vec::with_capacity(4 * width * image.height() as usize);
    // Some rows at a time: numbers of four bytes take four times the image.
    for rows in image.buffer().chunks(4 * image.width() as usize * 64) {
        let rows: Vec<f32> = rows.as_chunks().0.iter().flat_map(multiplied).collect();
        let rows = image_of(&rows, image.width());
        let height = rows.height() as usize;
        across.extend(whole(resize(&rows, width, height, filter)?));
    }
    let both = whole(resize(&image_of(&across, width as u32), width, height, filter)?);
    let divided = both.as_chunks().0.iter().flat_map(|&[r, g, b, alpha]: &[f32; 4]| {
        let by_alpha = |value: f32| match alpha {
            0.0 | 255.0 => value as u8,
            alpha => (255.0 * value / alpha).floor().min(255.0) as u8,
        };
        [by_alpha(r), by_alpha(g), by_alpha(b)]
    });
    Ok(divided.collect())
}

fn without_alpha(rgba: &[u8]) -> Vec<u8> {
    rgba.as_chunks().0.iter().flat_map(|&[r, g, b, _]: &[u8; 4]| [r, g, b]).collect()
}

/// Whether a file is a PNG whose pixels name entries of a palette, or are one bit of grey.
fn is_palette_png(bytes: &[u8]) -> bool {
    let (signature, depth_and_colour) = (bytes.get(..8), bytes.get(24..26));
    signature == Some(b"\x89PNG\r\n\x1a\n") && matches!(depth_and_colour, Some([_, 3] | [1, 0]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn halves_are_rounded_as_python_rounds() {
        assert_eq!([0, 1, 2, 3, 4, 5, 7].map(half_to_even), [0, 0, 1, 2, 2, 2, 4]);
    }

    #[test]
    fn what_is_no_image_or_too_large_is_named() {
        let preprocessor = ImagePreprocessor::new(8);
        let error = |bytes: &[u8]| preprocessor.decode(bytes).unwrap_err().to_string();
        assert!(error(b"I am no picture").contains("is no readable image"));
        // A PNG that claims 40,000 x 40,000 pixels, with its checksum, and the beginning of its data.
        let mut png = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR".to_vec();
        png.extend([40_000u32.to_be_bytes(), 40_000u32.to_be_bytes()].concat());
        png.extend([8, 2, 0, 0, 0]);
        png.extend(0xde6e9952_u32.to_be_bytes());
        png.extend(b"\0\0\x10\0IDAT");
        assert!(error(&png).contains("40000 x 40000 pixels"), "{}", error(&png));
    }

    #[test]
    fn thin_images_are_resized_or_refused() {
        let of = |width, height, size| {
            let mut png = Cursor::new(Vec::new());
            let image = image::RgbaImage::from_fn(width, height, |x, y| image::Rgba([x as u8, y as u8, 7, (x + y) as u8]));
            image.write_to(&mut png, image::ImageFormat::Png).unwrap();
            ImagePreprocessor::new(size).decode(png.get_ref())
        };
        for (width, height) in [(1, 1), (1, 300), (300, 1), (2, 333), (333, 2), (8, 9)] {
            assert_eq!(of(width, height, 8).unwrap().len(), 3 * 64, "{width} x {height}");
        }
        assert!(matches!(of(1, 50_000, 224), Err(ImageError::TooLarge { .. })));
        assert!(matches!(of(50_000, 1, 224), Err(ImageError::TooLarge { .. })));
    }

    #[test]
    fn images_come_in_the_order_of_their_paths() {
        let folder = tempfile::tempdir().unwrap();
        let paths: Vec<PathBuf> = (0..5u8)
            .map(|shade| {
                let path = folder.path().join(format!("{shade}.png"));
                image::RgbImage::from_pixel(10, 6, image::Rgb([shade; 3])).save(&path).unwrap();
                path
            })
            .chain([folder.path().join("missing.png")])
            .collect();
        let batches: Vec<_> = ImagePreprocessor::new(4).batches(paths, 2).collect();
        assert_eq!(batches.iter().map(Vec::len).collect::<Vec<_>>(), [2, 2, 2]);
        let first = |batch: usize, index: usize| batches[batch][index].as_ref().unwrap()[0];
        assert_eq!([first(0, 0), first(0, 1), first(1, 0), first(2, 0)], [0, 1, 2, 4]);
        assert!(batches[2][1].as_ref().unwrap_err().to_string().contains("missing.png"));
    }
}
