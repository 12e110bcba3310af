//! What a vision tower expects of its images.

use std::hash::{Hash, Hasher};

use burn::config::Config;
use serde::{Deserialize, Serialize};

use crate::support::error::ConfigError;

/// Mean of each channel, red first, as CLIP's preprocessing subtracts it (values from 0 to 1).
pub const IMAGE_MEAN: [f32; 3] = [0.481_454_66, 0.457_827_5, 0.408_210_73];
/// Standard deviation of each channel, by which CLIP's preprocessing divides.
pub const IMAGE_STD: [f32; 3] = [0.268_629_54, 0.261_302_6, 0.275_777_1];

/// How an image of any shape becomes a square.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum ResizeMode {
    /// The shorter side is resized, the longer one in proportion, and the middle is kept.
    #[default]
    Shortest,
    /// Both sides are resized, whatever the proportions.
    Squash,
}

/// The filter of a resize; both smooth when they make an image smaller.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Interpolation {
    /// Cubic, with a = -0.5 as in Pillow.
    #[default]
    Bicubic,
    /// Linear.
    Bilinear,
}

/// How images were prepared when a vision tower was trained, which they must be whenever it is used. The defaults are CLIP's own; some
/// checkpoints have others. Read by [`ImagePreprocessor::for_model`](super::preprocess::ImagePreprocessor::for_model).
#[derive(Config, Debug, Copy, PartialEq)]
pub struct ImagePreprocessing {
    /// Subtracted from each channel, red first, values from 0 to 1. Default: [`IMAGE_MEAN`]
    #[config(default = "IMAGE_MEAN")]
    pub mean: [f32; 3],
    /// Divides each channel. Default: [`IMAGE_STD`]
    #[config(default = "IMAGE_STD")]
    pub std: [f32; 3],
    /// To a square. Default: [`ResizeMode::Shortest`]
    #[config(default = "ResizeMode::Shortest")]
    pub resize_mode: ResizeMode,
    /// The resize filter. Default: [`Interpolation::Bicubic`]
    #[config(default = "Interpolation::Bicubic")]
    pub interpolation: Interpolation,
    /// The side that images are resized to, in pixels, before the middle of the model's image size is taken. Default: the model's image size
    pub resize_to: Option<usize>,
}

/// By the bits of its numbers.
impl Hash for ImagePreprocessing {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.mean.iter().chain(&self.std).for_each(|value| value.to_bits().hash(state));
        (self.resize_mode, self.interpolation, self.resize_to).hash(state);
    }
}

impl Default for ImagePreprocessing {
    fn default() -> Self {
        Self::new()
    }
}

impl ImagePreprocessing {
    /// What a model takes for a pixel of `value` (0 to 255) in `channel`, red first: `(value / 255 − mean) / std`.
    pub fn normalize(&self, value: f32, channel: usize) -> f32 {
        (value / 255.0 - self.mean[channel]) / self.std[channel]
    }

    /// Refuses numbers from which no image of side `image_size` follows.
    ///
    /// # Errors
    /// The first field that cannot be used, with its value.
    pub fn validate(&self, image_size: usize) -> Result<(), ConfigError> {
        if let Some(side) = self.resize_to.filter(|side| *side < image_size) {
            let reason = "must be at least the image size, which is cut out of the resized image";
            return Err(ConfigError::OutOfRange { field: "resize_to", value: side as f64, reason });
        }
        let refuse = |field, value: f32, reason| Err(ConfigError::OutOfRange { field, value: value.into(), reason });
        if let Some(&mean) = self.mean.iter().find(|mean| !mean.is_finite()) {
            return refuse("mean", mean, "must be finite");
        }
        match self.std.iter().find(|std| !(std.is_finite() && **std > 0.0)) {
            Some(&std) => refuse("std", std, "must be finite and above 0"),
            None => Ok(()),
        }
    }
}
