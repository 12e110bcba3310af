//! One tower alone.

use std::path::Path;

use burn::tensor::Device;

use super::{CheckpointError, LoadOptions, Precision, Towers, burn_moe, read, save_text, save_weights};
use crate::clip::{ClipConfig, TextConfig, TextTower, VisionConfig, VisionTower};

/// A vision tower read from disk: transformers' `CLIPVisionModelWithProjection`, or the one of a whole checkpoint.
#[derive(Debug, Clone)]
pub struct VisionCheckpoint {
    /// Sizes and options.
    pub config: VisionConfig,
    /// Width of the embeddings, `P`.
    pub embed_dim: usize,
    /// The weights.
    pub model: VisionTower,
}

/// A text tower read from disk: transformers' `CLIPTextModelWithProjection`, or the one of a whole checkpoint.
#[derive(Debug, Clone)]
pub struct TextCheckpoint {
    /// Sizes and options.
    pub config: TextConfig,
    /// Width of the embeddings, `P`.
    pub embed_dim: usize,
    /// The weights.
    pub model: TextTower,
}

impl VisionCheckpoint {
    /// Reads a folder of any format that [`ClipCheckpoint::load`](super::ClipCheckpoint::load) reads, which may hold a vision tower alone, for images
    /// of another size if one is named; see [`LoadOptions::image_size`].
    ///
    /// # Errors
    /// As [`ClipCheckpoint::load_with`](super::ClipCheckpoint::load_with), and when the folder holds a text tower alone.
    pub fn load(folder: impl AsRef<Path>, image_size: Option<usize>, device: &Device) -> Result<Self, CheckpointError> {
        Self::load_with(folder, &LoadOptions::new().with_image_size(image_size), device)
    }

    /// The same with options.
    ///
    /// # Errors
    /// As [`load`](Self::load).
    ///
    /// # Panics
    /// As [`ClipCheckpoint::load_with`](super::ClipCheckpoint::load_with).
    pub fn load_with(folder: impl AsRef<Path>, options: &LoadOptions, device: &Device) -> Result<Self, CheckpointError> {
        let init = |config: &ClipConfig| config.vision.init(config.embed_dim, device);
        let (config, model) = read::load(folder.as_ref(), Towers::Vision, options, init)?;
        Ok(Self { config: config.vision, embed_dim: config.embed_dim, model })
    }

    /// Writes `burn_moe_config.json` and `burn_moe_model.safetensors`; see [`ClipCheckpoint::save_sparse`](super::ClipCheckpoint::save_sparse).
    ///
    /// # Errors
    /// As there.
    ///
    /// # Panics
    /// When the configuration is not the model's.
    pub fn save_sparse(&self, folder: impl AsRef<Path>, precision: Precision) -> Result<(), CheckpointError> {
        let config = ClipConfig::new(self.config.clone(), ClipConfig::tiny().text, self.embed_dim);
        save_weights(&self.model, &config, Towers::Vision, folder.as_ref(), burn_moe::FORMAT, precision)?;
        save_text(folder.as_ref(), burn_moe::FORMAT.config, &burn_moe::to_text(&config, Towers::Vision))
    }
}

impl TextCheckpoint {
    /// Reads a folder of any format that [`ClipCheckpoint::load`](super::ClipCheckpoint::load) reads, which may hold a text tower alone.
    ///
    /// # Errors
    /// As there, and when the folder holds a vision tower alone.
    pub fn load(folder: impl AsRef<Path>, device: &Device) -> Result<Self, CheckpointError> {
        Self::load_with(folder, &LoadOptions::new(), device)
    }

    /// The same with options.
    ///
    /// # Errors
    /// As [`load`](Self::load).
    ///
    /// # Panics
    /// As [`ClipCheckpoint::load_with`](super::ClipCheckpoint::load_with).
    pub fn load_with(folder: impl AsRef<Path>, options: &LoadOptions, device: &Device) -> Result<Self, CheckpointError> {
        let init = |config: &ClipConfig| config.text.init(config.embed_dim, device);
        let (config, model) = read::load(folder.as_ref(), Towers::Text, options, init)?;
        Ok(Self { config: config.text, embed_dim: config.embed_dim, model })
    }

    /// Writes `burn_moe_config.json` and `burn_moe_model.safetensors`; see [`ClipCheckpoint::save_sparse`](super::ClipCheckpoint::save_sparse).
    ///
    /// # Errors
    /// As there.
    ///
    /// # Panics
    /// When the configuration is not the model's.
    pub fn save_sparse(&self, folder: impl AsRef<Path>, precision: Precision) -> Result<(), CheckpointError> {
        let config = ClipConfig::new(ClipConfig::tiny().vision, self.config.clone(), self.embed_dim);
        save_weights(&self.model, &config, Towers::Text, folder.as_ref(), burn_moe::FORMAT, precision)?;
        save_text(folder.as_ref(), burn_moe::FORMAT.config, &burn_moe::to_text(&config, Towers::Text))
    }
}
