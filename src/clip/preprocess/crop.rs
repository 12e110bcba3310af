//! Random parts of images, for training.

use burn::config::Config;

use crate::support::error::ConfigError;

/// How often a part is drawn that does not fit into the image, before the middle is taken.
const ATTEMPTS: usize = 10;

/// A part of an image, in pixels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CropBox {
    /// Pixels to its left.
    pub left: u32,
    /// Pixels above it.
    pub top: u32,
    /// Pixels across.
    pub width: u32,
    /// Pixels down.
    pub height: u32,
}

impl CropBox {
    /// All of an image.
    pub fn whole(width: u32, height: u32) -> Self {
        Self { left: 0, top: 0, width, height }
    }
}

/// A random part of an image, of random proportions: torchvision's `RandomResizedCrop`, with open_clip's defaults.
#[derive(Config, Debug, Copy, PartialEq)]
pub struct RandomCropConfig {
    /// The least and the most of an image's area that is kept. Default: 0.9 to 1
    #[config(default = "[0.9, 1.0]")]
    pub area: [f64; 2],
    /// The least and the most width over height of the part. Default: 3/4 to 4/3
    #[config(default = "[3.0 / 4.0, 4.0 / 3.0]")]
    pub aspect: [f64; 2],
}

impl RandomCropConfig {
    /// Refuses what no part of an image has.
    ///
    /// # Errors
    /// The first field that cannot be used, with its value.
    pub fn validate(&self) -> Result<(), ConfigError> {
        let refuse = |field, value, reason| Err(ConfigError::OutOfRange { field, value, reason });
        let [[least, most], [narrowest, widest]] = [self.area, self.aspect];
        if !(0.0 < least && least <= most && most <= 1.0) {
            return refuse("area", least, "from more than 0 to at most 1, the smaller one first");
        }
        if !(0.0 < narrowest && narrowest <= widest && widest.is_finite()) {
            return refuse("aspect", narrowest, "from more than 0 to what is finite, the smaller one first");
        }
        Ok(())
    }

    /// Draws a part of an image of `width` times `height` pixels. `uniform` gives numbers from 0 to below 1: area, proportions, and, where these
    /// fit, top and left. From the same numbers, torchvision takes the same part.
    pub fn draw(&self, width: u32, height: u32, mut uniform: impl FnMut() -> f32) -> CropBox {
        let area = f64::from(width) * f64::from(height);
        // torch computes them with 32 bits.
        let mut between = |low: f32, high: f32| uniform() * (high - low) + low;
        let [narrowest, widest] = self.aspect.map(|aspect| (aspect as f32).ln());
        let [least, most] = self.area.map(|share| share as f32);
        for _ in 0..ATTEMPTS {
            let kept = area * f64::from(between(least, most));
            let aspect = f64::from(between(narrowest, widest).exp());
            let [across, down] = [kept * aspect, kept / aspect].map(|square| square.sqrt().round_ties_even());
            if (1.0..=f64::from(width)).contains(&across) && (1.0..=f64::from(height)).contains(&down) {
                let (across, down) = (across as u32, down as u32);
                let mut below = |count: u32| ((f64::from(between(0.0, 1.0)) * f64::from(count)) as u32).min(count - 1);
                let top = below(height - down + 1);
                let left = below(width - across + 1);
                return CropBox { left, top, width: across, height: down };
            }
        }
        self.middle(width, height)
    }

    /// As much of the middle as the proportions allow.
    fn middle(&self, width: u32, height: u32) -> CropBox {
        let [narrowest, widest] = self.aspect;
        let aspect = f64::from(width) / f64::from(height);
        let rounded = |length: f64| length.round_ties_even().max(1.0) as u32;
        let (across, down) = if aspect < narrowest {
            (width, rounded(f64::from(width) / narrowest).min(height))
        } else if aspect > widest {
            (rounded(f64::from(height) * widest).min(width), height)
        } else {
            (width, height)
        };
        CropBox { left: (width - across) / 2, top: (height - down) / 2, width: across, height: down }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_lie_within_the_image_and_have_the_area() {
        let config = RandomCropConfig::new().with_area([0.2, 0.6]);
        let mut state = 1u32;
        let mut uniform = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / (1 << 24) as f32
        };
        for (width, height) in [(640, 480), (33, 100), (7, 7)] {
            for _ in 0..500 {
                let part = config.draw(width, height, &mut uniform);
                assert!(part.left + part.width <= width && part.top + part.height <= height, "{part:?}");
                let share = f64::from(part.width * part.height) / f64::from(width * height);
                let rounding = 1.5 / f64::from(width.min(height));
                assert!((0.2 - rounding..=0.6 + rounding).contains(&share), "{share} of {width} x {height}");
            }
        }
    }

    #[test]
    fn an_image_without_such_a_part_gives_its_middle() {
        let part = RandomCropConfig::new().draw(1000, 10, || 0.5);
        assert_eq!(part, CropBox { left: 493, top: 0, width: 13, height: 10 });
        let part = RandomCropConfig::new().draw(1, 1, || 0.999);
        assert_eq!(part, CropBox::whole(1, 1));
    }

    #[test]
    fn bad_ranges_are_named() {
        let error = |config: RandomCropConfig| config.validate().unwrap_err().to_string();
        assert!(error(RandomCropConfig::new().with_area([0.0, 1.0])).starts_with("`area` is 0"));
        assert!(error(RandomCropConfig::new().with_area([0.5, 1.5])).starts_with("`area`"));
        assert!(error(RandomCropConfig::new().with_aspect([2.0, 1.0])).starts_with("`aspect` is 2"));
        RandomCropConfig::new().validate().unwrap();
    }
}
