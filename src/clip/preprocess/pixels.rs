//! Resizing in the colours of the file.

use fast_image_resize::{PixelType, ResizeAlg, ResizeOptions, Resizer, images::Image};
use image::DynamicImage;

/// Pixels as Pillow resizes them: in the colours of the file.
pub(super) enum Pixels {
    /// RGB.
    Opaque(Image<'static>),
    /// RGBA. Resized with alpha multiplied in, and divided out again.
    Transparent(Image<'static>),
    /// RGB from a palette: the nearest pixel is taken.
    Palette(Image<'static>),
}

impl Pixels {
    /// `nearest`: whether the file's pixels name colours, so that no others may come between them.
    pub(super) fn of(image: DynamicImage, nearest: bool, bytes: &[u8]) -> Self {
        let (width, height) = (image.width(), image.height());
        let image_of =
            |values: Vec<u8>, kind| Image::from_vec_u8(width, height, values, kind).expect("as many values as pixels and channels");
        // Pillow keeps the high byte of a colour's 16 bits.
        let high = |values: Vec<u16>| values.into_iter().map(|value| (value >> 8) as u8).collect::<Vec<u8>>();
        match if super::content::has_transparent_colour(bytes) { without_its_alpha(image) } else { image } {
            image if nearest => Self::Palette(image_of(image.into_rgb8().into_raw(), PixelType::U8x3)),
            DynamicImage::ImageLuma16(image) => {
                let rgb = high(image.into_raw()).into_iter().flat_map(|grey| [grey; 3]).collect();
                Self::Opaque(image_of(rgb, PixelType::U8x3))
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

    pub(super) fn dims(&self) -> (usize, usize) {
        let (Self::Opaque(image) | Self::Transparent(image) | Self::Palette(image)) = self;
        (image.width() as usize, image.height() as usize)
    }

    /// RGB bytes of another size.
    pub(super) fn resized(self, width: usize, height: usize, filter: ResizeAlg) -> Result<Vec<u8>, String> {
        let is_same = self.dims() == (width, height);
        match self {
            Self::Opaque(image) if is_same => Ok(image.into_vec()),
            Self::Palette(image) if is_same => Ok(image.into_vec()),
            Self::Opaque(image) => Ok(smooth(image, width, height, filter)?.into_vec()),
            Self::Palette(image) => Ok(resize(&image, width, height, ResizeAlg::Nearest)?.into_vec()),
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

fn without_its_alpha(image: DynamicImage) -> DynamicImage {
    match image {
        DynamicImage::ImageLumaA8(_) => image.into_luma8().into(),
        DynamicImage::ImageRgba8(_) => image.into_rgb8().into(),
        DynamicImage::ImageLumaA16(_) => image.into_luma16().into(),
        DynamicImage::ImageRgba16(_) => image.into_rgb16().into(),
        image => image,
    }
}
