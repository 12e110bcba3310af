//! What each layout says of a model's images.

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::config::ConfigFileError;
use crate::clip::{IMAGE_MEAN, IMAGE_STD, ImagePreprocessing, Interpolation, ResizeMode, VisionConfig};

type Result<T> = std::result::Result<T, ConfigFileError>;

/// A number for every channel, or one for all.
#[derive(Deserialize, Serialize, Clone, Copy)]
#[serde(untagged)]
enum Channels {
    Each([f32; 3]),
    All(f32),
}

impl Channels {
    fn each(self) -> [f32; 3] {
        match self {
            Self::Each(values) => values,
            Self::All(value) => [value; 3],
        }
    }
}

fn refuse<T>(setting: &str, value: impl std::fmt::Display) -> Result<T> {
    Err(ConfigFileError(format!("`{setting}` = {value} is not supported: images would not be those that the model was trained on")))
}

/// open_clip's `preprocess_cfg`. It takes the size from the model, whatever is said here.
#[derive(Deserialize, Serialize, Default)]
pub(super) struct OpenClipPreprocess {
    mean: Option<Channels>,
    std: Option<Channels>,
    interpolation: Option<String>,
    resize_mode: Option<String>,
    mode: Option<String>,
}

impl OpenClipPreprocess {
    pub(super) fn read(self) -> Result<ImagePreprocessing> {
        let interpolation = match self.interpolation.as_deref() {
            // A random choice is made in training only.
            None | Some("bicubic" | "random") => Interpolation::Bicubic,
            Some("bilinear") => Interpolation::Bilinear,
            Some(other) => return refuse("preprocess_cfg.interpolation", other),
        };
        let resize_mode = match self.resize_mode.as_deref() {
            None | Some("shortest") => ResizeMode::Shortest,
            Some("squash") => ResizeMode::Squash,
            Some(other) => return refuse("preprocess_cfg.resize_mode", other),
        };
        if let Some(mode) = self.mode.filter(|mode| mode != "RGB") {
            return refuse("preprocess_cfg.mode", mode);
        }
        Ok(ImagePreprocessing {
            mean: self.mean.map_or(IMAGE_MEAN, Channels::each),
            std: self.std.map_or(IMAGE_STD, Channels::each),
            resize_mode,
            interpolation,
        })
    }

    pub(super) fn of(preprocessing: &ImagePreprocessing) -> Self {
        let interpolation = match preprocessing.interpolation {
            Interpolation::Bicubic => "bicubic",
            Interpolation::Bilinear => "bilinear",
        };
        let resize_mode = match preprocessing.resize_mode {
            ResizeMode::Shortest => "shortest",
            ResizeMode::Squash => "squash",
        };
        Self {
            mean: Some(Channels::Each(preprocessing.mean)),
            std: Some(Channels::Each(preprocessing.std)),
            interpolation: Some(interpolation.into()),
            resize_mode: Some(resize_mode.into()),
            mode: Some("RGB".into()),
        }
    }
}

/// transformers' `preprocessor_config.json`, or the part of `processor_config.json` that holds the same. What is left out has the value that a
/// `CLIPImageProcessor` gives it, but for sizes, which are then the model's.
#[derive(Deserialize)]
struct HuggingFaceProcessor {
    #[serde(alias = "feature_extractor_type")]
    image_processor_type: Option<String>,
    do_resize: Option<bool>,
    size: Option<Size>,
    resample: Option<u8>,
    do_center_crop: Option<bool>,
    crop_size: Option<Size>,
    do_rescale: Option<bool>,
    rescale_factor: Option<f64>,
    do_normalize: Option<bool>,
    image_mean: Option<Channels>,
    image_std: Option<Channels>,
}

#[derive(Deserialize, Clone, Copy)]
#[serde(untagged)]
enum Size {
    Side(usize),
    Shortest { shortest_edge: usize },
    Both { height: usize, width: usize },
}

impl Size {
    /// Refuses what does not lead to a square of this side.
    fn expect(self, setting: &str, side: usize) -> Result<()> {
        let (height, width) = match self {
            Self::Side(side) | Self::Shortest { shortest_edge: side } => (side, side),
            Self::Both { height, width } => (height, width),
        };
        if (height, width) == (side, side) {
            Ok(())
        } else {
            refuse(setting, format!("{height} x {width} with an image size of {side}"))
        }
    }
}

pub(super) fn from_hugging_face(text: &str, image_size: usize) -> Result<ImagePreprocessing> {
    let mut value: Value = serde_json::from_str(text)?;
    if let Some(nested) = value.get_mut("image_processor") {
        value = nested.take();
    }
    let file: HuggingFaceProcessor = serde_json::from_value(value)?;
    if let Some(kind) = file.image_processor_type.filter(|kind| !kind.starts_with("CLIP")) {
        return refuse("image_processor_type", kind);
    }
    for (setting, done) in [("do_resize", file.do_resize), ("do_rescale", file.do_rescale)] {
        if done == Some(false) {
            return refuse(setting, false);
        }
    }
    let resize_mode = match file.size {
        Some(Size::Both { .. }) => ResizeMode::Squash,
        _ => ResizeMode::Shortest,
    };
    if let Some(size) = file.size {
        size.expect("size", image_size)?;
    }
    match (file.do_center_crop, file.crop_size) {
        (Some(false), _) if resize_mode == ResizeMode::Shortest => return refuse("do_center_crop", false),
        (Some(false), _) | (_, None) => {}
        (_, Some(size)) => size.expect("crop_size", image_size)?,
    }
    if let Some(factor) = file.rescale_factor.filter(|factor| (factor * 255.0 - 1.0).abs() > 1e-6) {
        return refuse("rescale_factor", factor);
    }
    let interpolation = match file.resample {
        None | Some(3) => Interpolation::Bicubic,
        Some(2) => Interpolation::Bilinear,
        Some(other) => return refuse("resample", other),
    };
    let (mean, std) = match file.do_normalize {
        Some(false) => ([0.0; 3], [1.0; 3]),
        _ => (file.image_mean.map_or(IMAGE_MEAN, Channels::each), file.image_std.map_or(IMAGE_STD, Channels::each)),
    };
    Ok(ImagePreprocessing { mean, std, resize_mode, interpolation })
}

pub(super) fn to_hugging_face(vision: &VisionConfig) -> String {
    let ImagePreprocessing { mean, std, resize_mode, interpolation } = vision.preprocessing;
    let square = json!({ "height": vision.image_size, "width": vision.image_size });
    let file = json!({
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": true,
        "do_resize": true,
        "size": match resize_mode {
            ResizeMode::Shortest => json!({ "shortest_edge": vision.image_size }),
            ResizeMode::Squash => square.clone(),
        },
        "resample": match interpolation { Interpolation::Bicubic => 3, Interpolation::Bilinear => 2 },
        "do_center_crop": true,
        "crop_size": square,
        "do_rescale": true,
        "rescale_factor": 1.0 / 255.0,
        "do_normalize": true,
        "image_mean": mean,
        "image_std": std,
    });
    serde_json::to_string_pretty(&file).expect("JSON can be written")
}
