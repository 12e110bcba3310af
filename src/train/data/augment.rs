//! Small changes to images, so that a model learns what does not matter.

use burn::config::Config;
use rand::{Rng, RngExt};

use super::DataError;
use crate::clip::ImagePreprocessing;

/// How far images may be changed. Zero everywhere leaves them as they are.
#[derive(Config, Debug, Copy, PartialEq)]
pub struct AugmentConfig {
    /// Largest shift along each axis, as a share of the side. Default: 0.1
    #[config(default = 0.1)]
    pub shift: f32,
    /// Largest change of size, as a natural logarithm; half of it also changes the aspect ratio. Default: 0.15
    #[config(default = 0.15)]
    pub scale: f32,
    /// Largest rotation, in degrees. Default: 8
    #[config(default = 8.0)]
    pub rotation: f32,
    /// Strength of the changes of contrast, saturation, tint and brightness. Default: 0.3
    #[config(default = 0.3)]
    pub colour: f32,
}

impl AugmentConfig {
    /// No change at all.
    pub fn none() -> Self {
        Self { shift: 0.0, scale: 0.0, rotation: 0.0, colour: 0.0 }
    }

    /// Refuses negative and non-finite strengths.
    pub(super) fn validate(&self) -> Result<(), DataError> {
        for (field, value) in [("shift", self.shift), ("scale", self.scale), ("rotation", self.rotation), ("colour", self.colour)] {
            if !(value.is_finite() && value >= 0.0) {
                return Err(DataError::OutOfRange { field, value: value.into(), reason: "must be finite and not negative" });
            }
        }
        Ok(())
    }

    /// Writes a changed and normalised copy of `image` (`[side, side, 3]`) into `out` (`[3, side, side]`). What comes into view from
    /// outside has the colour of the nearest edge.
    pub(super) fn apply(&self, image: &[u8], side: usize, preprocessing: &ImagePreprocessing, out: &mut [f32], rng: &mut impl Rng) {
        let mut draw = |limit: f32| if limit > 0.0 { rng.random_range(-limit..=limit) } else { 0.0 };
        let size = draw(self.scale).exp();
        let aspect = draw(self.scale / 2.0).exp();
        let (sin, cos) = draw(self.rotation).to_radians().sin_cos();
        let shift = [draw(self.shift), draw(self.shift)].map(|s| s * side as f32);
        let contrast = draw(self.colour).exp();
        let saturation = draw(1.5 * self.colour).exp();
        let tint = [(); 3].map(|()| draw(self.colour / 2.0).exp());
        let brightness = 255.0 * draw(self.colour / 2.0);

        let area = side * side;
        let centre = (side as f32 - 1.0) / 2.0;
        let mut mean = 0.0;
        let mut moved = vec![[0.0f32; 3]; area];
        for (pixel, value) in moved.iter_mut().enumerate() {
            let (y, x) = ((pixel / side) as f32 - centre, (pixel % side) as f32 - centre);
            let from_x = size * (aspect * cos * x - sin * y) + centre + shift[0];
            let from_y = size * (sin * x + cos / aspect * y) + centre + shift[1];
            *value = sample(image, side, from_x, from_y);
            mean += value.iter().sum::<f32>();
        }
        mean /= 3.0 * area as f32;
        for (pixel, value) in moved.into_iter().enumerate() {
            let value = value.map(|v| mean + (v - mean) * contrast);
            let grey = value.iter().sum::<f32>() / 3.0;
            for channel in 0..3 {
                let v = (grey + (value[channel] - grey) * saturation) * tint[channel] + brightness;
                out[channel * area + pixel] = preprocessing.normalize(v, channel);
            }
        }
    }
}

/// Bilinear, with the edge repeated outside.
fn sample(image: &[u8], side: usize, x: f32, y: f32) -> [f32; 3] {
    let last = (side - 1) as f32;
    let (x, y) = (x.clamp(0.0, last), y.clamp(0.0, last));
    let (x0, y0) = (x as usize, y as usize);
    let (x1, y1) = ((x0 + 1).min(side - 1), (y0 + 1).min(side - 1));
    let (fx, fy) = (x - x0 as f32, y - y0 as f32);
    let at = |x: usize, y: usize, channel: usize| f32::from(image[(y * side + x) * 3 + channel]);
    std::array::from_fn(|channel| {
        let top = at(x0, y0, channel) * (1.0 - fx) + at(x1, y0, channel) * fx;
        let bottom = at(x0, y1, channel) * (1.0 - fx) + at(x1, y1, channel) * fx;
        top * (1.0 - fy) + bottom * fy
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::{SeedableRng, rngs::StdRng};

    use crate::clip::{IMAGE_MEAN, IMAGE_STD, Interpolation, ResizeMode};

    const CLIP: ImagePreprocessing = ImagePreprocessing {
        mean: IMAGE_MEAN,
        std: IMAGE_STD,
        resize_mode: ResizeMode::Shortest,
        interpolation: Interpolation::Bicubic,
        resize_to: None,
    };

    #[test]
    fn no_strength_means_no_change() {
        let image: Vec<u8> = (0..4 * 4 * 3).map(|i| (i * 5) as u8).collect();
        let mut out = vec![0.0; 48];
        AugmentConfig::none().apply(&image, 4, &CLIP, &mut out, &mut StdRng::seed_from_u64(0));
        for (pixel, rgb) in image.chunks(3).enumerate() {
            for channel in 0..3 {
                let want = CLIP.normalize(rgb[channel].into(), channel);
                assert!((out[channel * 16 + pixel] - want).abs() < 1e-5);
            }
        }
    }

    #[test]
    fn a_plain_image_stays_plain_when_moved() {
        let image = vec![200u8; 8 * 8 * 3];
        let config = AugmentConfig::new().with_colour(0.0).with_shift(0.5).with_rotation(45.0);
        let mut out = vec![0.0; 192];
        config.apply(&image, 8, &CLIP, &mut out, &mut StdRng::seed_from_u64(3));
        assert!(out[..64].iter().all(|v| (v - CLIP.normalize(200.0, 0)).abs() < 1e-4));
    }
}
