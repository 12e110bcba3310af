//! CLIP's image preprocessing, as open_clip does it at inference.

mod content;
mod crop;
mod decode;
mod pixels;

pub use crop::{CropBox, RandomCropConfig};

use std::{
    fs,
    path::{Path, PathBuf},
    sync::mpsc,
    thread,
};

use burn::tensor::{Device, Tensor, TensorData};
use decode::{MOST_BYTES, MOST_PIXELS, decode};
use fast_image_resize::{FilterType, ResizeAlg};
use pixels::Pixels;
use rayon::prelude::*;

use super::{ImagePreprocessing, Interpolation, ResizeMode, VisionConfig};

/// The most pixels of a resized image, in parts of the square of its shorter side: beyond that, only the middle is resized.
const LONGEST_SHAPE: usize = 64;

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
/// PNG, JPEG, WebP, GIF (its first frame), BMP and TIFF are read; the content of a file tells its kind, not its name.
///
/// Within 1/255 of open_clip's own transform on lossless images, whose habits are kept: alpha is dropped after resizing, a colour that a PNG
/// declares transparent (tRNS) counts as any other, and images with a palette are resized without smoothing. JPEG decoders differ among each
/// other by a little more. One habit is not kept: 16 bits of grey are scaled to 8, as colours are, where open_clip makes them white.
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
    /// When the file cannot be read, is no image, is damaged or cut off, or claims more than 64 megapixels.
    pub fn open(&self, path: impl AsRef<Path>) -> Result<Square, ImageError> {
        let path = path.as_ref();
        let io = |source| ImageError::Io { path: path.to_path_buf(), source };
        let about = fs::metadata(path).map_err(io)?;
        let bad = |reason: String| ImageError::Decode { path: path.to_path_buf(), reason };
        if !about.is_file() {
            return Err(bad("it is no file".into()));
        }
        if about.len() > MOST_BYTES {
            return Err(bad(format!("a file of {} bytes is not read", about.len())));
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

    /// Reads a part of an image from memory and resizes it to a square, whatever its proportions: a sample for training. `crop` gets width and
    /// height, after any turn, and says which part.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    ///
    /// # Panics
    /// When the part does not lie within the image.
    pub fn decode_cropped(&self, bytes: &[u8], crop: impl FnOnce(u32, u32) -> CropBox) -> Result<Square, ImageError> {
        let path = Path::new("");
        let pixels = decode(bytes, path, self.orientation, |width, height| Ok(CropBox::whole(width, height)), crop)?;
        pixels
            .resized(self.image_size, self.image_size, self.filter())
            .map_err(|reason| ImageError::Decode { path: path.to_path_buf(), reason })
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

    fn decode_named(&self, bytes: &[u8], path: &Path) -> Result<Square, ImageError> {
        let kept = |width, height| {
            let middle = self.middle_of(width, height);
            // The resized image counts too: a long and thin one becomes larger.
            let [across, down] = self.resized_size(middle.width as usize, middle.height as usize).map(|side| side as u64);
            let largest = across.saturating_mul(middle.height.into()).max(across.saturating_mul(down));
            if largest > MOST_PIXELS {
                return Err(ImageError::TooLarge { path: path.to_path_buf(), width, height });
            }
            Ok(middle)
        };
        let pixels = decode(bytes, path, self.orientation, kept, CropBox::whole)?;
        self.square(pixels).map_err(|reason| ImageError::Decode { path: path.to_path_buf(), reason })
    }

    /// What is decoded and then resized: all of an image, unless it is so thin that the whole would become too large when resized. Then it is the
    /// middle, four times as long as wide, of which the crop takes a part.
    fn middle_of(&self, width: u32, height: u32) -> CropBox {
        let [across, down] = self.resized_size(width as usize, height as usize);
        let fits = across.max(down) <= LONGEST_SHAPE * across.min(down);
        let length = |long: u32, short: u32| {
            // As odd or even as the whole, so that the middle stays where it was.
            let kept = short.max(1).saturating_mul(4);
            (kept + (long - kept.min(long)) % 2).min(long)
        };
        if fits || self.preprocessing.resize_mode == ResizeMode::Squash {
            CropBox::whole(width, height)
        } else if width > height {
            let kept = length(width, height);
            CropBox { left: (width - kept) / 2, top: 0, width: kept, height }
        } else {
            let kept = length(height, width);
            CropBox { left: 0, top: (height - kept) / 2, width, height: kept }
        }
    }

    /// Width and height after resizing: both at least `image_size`.
    fn resized_size(&self, width: usize, height: usize) -> [usize; 2] {
        let side = self.preprocessing.resize_to.unwrap_or(self.image_size).max(self.image_size);
        if self.preprocessing.resize_mode == ResizeMode::Squash {
            return [side; 2];
        }
        let short = width.min(height).max(1);
        [width, height].map(|long| if long == short { side } else { side.saturating_mul(long) / short })
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

#[cfg(test)]
mod tests {
    use std::io::Cursor;

    use super::*;

    use image::ImageFormat;

    #[test]
    fn halves_are_rounded_as_python_rounds() {
        assert_eq!([0, 1, 2, 3, 4, 5, 7].map(half_to_even), [0, 0, 1, 2, 2, 2, 4]);
    }

    #[test]
    fn what_is_no_image_or_too_large_is_named() {
        let preprocessor = ImagePreprocessor::new(8);
        let error = |bytes: &[u8]| preprocessor.decode(bytes).unwrap_err().to_string();
        assert!(error(b"I am no picture").contains("is no readable image: it begins as no image of a known kind does"));
        assert!(error(b"").ends_with("it is empty"));
        assert!(
            error(b"version https://git-lfs.github.com/spec/v1\noid").contains("it is a pointer of Git LFS in place of the file")
        );
        assert!(error(b"\0\0\0\x18ftypheic\0\0\0\0mif1").contains("a HEIC photo, which is not read: save it as JPEG or PNG"));
        assert!(error(b"<!DOCTYPE html>").contains("a web page"));
        assert!(error(b"P6\n1 1\n255\n...").ends_with("Pnm images are not read: save it as PNG or JPEG"));
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
        for (width, height) in [(1, 50_000), (50_001, 1), (3, 60_000)] {
            assert_eq!(of(width, height, 224).unwrap().len(), 3 * 224 * 224, "{width} x {height}");
        }
        assert!(matches!(of(9_000, 9_000, 8), Err(ImageError::TooLarge { .. })));
    }

    #[test]
    fn the_middle_of_a_thin_image_is_that_of_the_whole() {
        for (width, height) in [(401, 2), (2, 401), (400, 2), (201, 1), (3, 1_001)] {
            let image = image::RgbImage::from_fn(width, height, |x, y| {
                let at = x.max(y);
                image::Rgb([(at * 37 % 251) as u8, (at * 11 % 241) as u8, (at * 5 % 239) as u8])
            });
            let preprocessor = ImagePreprocessor::new(24);
            let middle = preprocessor.middle_of(width, height);
            assert!(middle.width * middle.height < width * height, "the middle is cut out");
            let mut png = Cursor::new(Vec::new());
            image.write_to(&mut png, ImageFormat::Png).unwrap();
            let cut = preprocessor.decode(png.get_ref()).unwrap();
            let whole = preprocessor.square(Pixels::of(image.into(), false, &[])).unwrap();
            let largest = cut.iter().zip(&whole).map(|(a, b)| a.abs_diff(*b)).max().unwrap();
            // Three pixels across: the whole is not an even number of times as long, so that its scale differs a little.
            let allowed = if width.min(height) == 3 { 12 } else { 1 };
            assert!(largest <= allowed, "{width} x {height}: {largest} of 255");
        }
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
