//! Checkpoints: Hugging Face's, open_clip's and sparse ones, in and out, and MoE-ViE's, in; whole CLIPs, and towers.
//!
//! One table per format says which stored tensor is which parameter, so that reading and writing cannot drift apart.
//! A file that does not fit yields an error and no model. Tensors are read and written one at a time, so that a model is never in memory
//! twice. `docs/checkpoints.md` has every name.

mod burn_moe;
mod config;
mod format;
mod hugging_face;
mod moe_vie;
mod naming;
mod open_clip;
mod positions;
mod read;
mod table;
mod tokenizer;
mod tower;
mod write;

pub use crate::Precision;
pub use crate::checkpoint::CheckpointError;
pub use format::Towers;
pub use read::LoadOptions;
pub use tower::{TextCheckpoint, VisionCheckpoint};

use std::path::Path;

use burn::tensor::Device;

use super::{Clip, ClipConfig};
use crate::checkpoint::{numbers, params, tensors};
use format::found_in;
#[cfg(feature = "preprocess")]
use write::save_file;
use write::{save_text, save_weights};

/// The towers of the checkpoint in a folder, of which the configuration is read and no weights.
///
/// # Errors
/// As [`ClipCheckpoint::read_config`].
pub fn towers_in(folder: impl AsRef<Path>) -> Result<Towers, CheckpointError> {
    Ok(found_in(folder.as_ref(), Towers::Vision)?.towers)
}

/// A model read from disk, with the configuration that describes it.
#[derive(Debug, Clone)]
pub struct ClipCheckpoint {
    /// Sizes and options.
    pub config: ClipConfig,
    /// The weights.
    pub model: Clip,
}

impl ClipCheckpoint {
    /// Reads a folder: `config.json` means Hugging Face's `CLIPModel` (with `model.safetensors` or `pytorch_model.bin`),
    /// `open_clip_config.json` means open_clip (with `open_clip_model.safetensors` or `open_clip_pytorch_model.bin`),
    /// `burn_moe_config.json` means [`save_sparse`](Self::save_sparse), `moevie_config.json` means MoE-ViE (with `model.safetensors`, `model.pt` or the published
    /// file). Instead of one file of weights there may be shards with an index
    /// (`model.safetensors.index.json`). No code in a pickled file (`.bin`) is run; those of PyTorch before 1.6 are refused.
    /// Weights may be f32, f16, bf16, f64 or, as [`save_sparse`](Self::save_sparse) writes them, 8 bits; the model has f32. What the folder says of images (open_clip's `preprocess_cfg`, transformers'
    /// `preprocessor_config.json`) becomes [`VisionConfig::preprocessing`](crate::clip::VisionConfig).
    ///
    /// # Errors
    /// When a file is missing, truncated or of another kind, a setting is not known, or a tensor is missing, not expected, of
    /// another shape or not finite; each is named.
    pub fn load(folder: impl AsRef<Path>, device: &Device) -> Result<Self, CheckpointError> {
        Self::load_with(folder, &LoadOptions::new(), device)
    }

    /// The same with options.
    ///
    /// # Errors
    /// As [`load`](Self::load), when the size of images is no multiple of the patch size, and when a weight that is to be packed is beyond the precision.
    ///
    /// # Panics
    /// When weights are to be packed and `device` is not burn's CPU backend, or one has more than 65,536 rows and 8 bits.
    pub fn load_with(folder: impl AsRef<Path>, options: &LoadOptions, device: &Device) -> Result<Self, CheckpointError> {
        let (config, model) = read::load(folder.as_ref(), Towers::Both, options, |config| config.init(device))?;
        Ok(Self { config, model })
    }

    /// Reads a checkpoint that [`save_sparse`](Self::save_sparse) wrote from the text of its `burn_moe_config.json` and the bytes of its
    /// `burn_moe_model.safetensors`: where there is no file system, as in a browser.
    ///
    /// # Errors
    /// As [`load_with`](Self::load_with); an error names these files.
    ///
    /// # Panics
    /// As [`load_with`](Self::load_with).
    pub fn from_bytes(config: &str, weights: Vec<u8>, options: &LoadOptions, device: &Device) -> Result<Self, CheckpointError> {
        let (config, model) = read::load_from_memory(config, weights, options, |config| config.init(device))?;
        Ok(Self { config, model })
    }

    /// Reads the configuration of a folder, and no weights.
    ///
    /// # Errors
    /// When the configuration is missing, of another kind, or of a tower alone, or has a setting that is not known.
    pub fn read_config(folder: impl AsRef<Path>) -> Result<ClipConfig, CheckpointError> {
        let found = found_in(folder.as_ref(), Towers::Both)?;
        found.expect(Towers::Both)?;
        Ok(found.config)
    }

    /// Writes `open_clip_config.json` and `open_clip_model.safetensors` into `folder`, which is made if need be.
    ///
    /// # Errors
    /// When the model is sparse or has another part that open_clip's CLIP does not have, a value is not finite or beyond the precision, or on a failure of the file system; a file that was there before
    /// is then as it was.
    ///
    /// # Panics
    /// When the configuration is not the model's.
    pub fn save_open_clip(&self, folder: impl AsRef<Path>, precision: Precision) -> Result<(), CheckpointError> {
        let text = open_clip::to_text(&self.config)?;
        without_int8("open_clip", precision)?;
        save_weights(&self.model, &self.config, Towers::Both, folder.as_ref(), open_clip::FORMAT, precision)?;
        #[cfg(feature = "preprocess")]
        if open_clip::has_merges(&self.config.text) {
            save_file(folder.as_ref(), open_clip::MERGES, &tokenizer::packed_merges(self.config.text.vocab_size))?;
        }
        save_text(folder.as_ref(), open_clip::FORMAT.config, &text)
    }

    /// Writes `config.json`, `preprocessor_config.json` and `model.safetensors` as transformers does for a `CLIPModel` into `folder`, which is
    /// made if need be. With the feature `preprocess`, and for a model with CLIP's vocabulary, also `vocab.json`, `merges.txt` and
    /// `tokenizer_config.json`, so that both `CLIPModel.from_pretrained` and `CLIPProcessor.from_pretrained` read the folder.
    ///
    /// # Errors
    /// When the model is sparse, has another part that a `CLIPModel` does not have, or its text projection has a bias, a value is not finite or beyond the precision, or on a failure of the file
    /// system; a file that was there before is then as it was.
    ///
    /// # Panics
    /// When the configuration is not the model's.
    pub fn save_hugging_face(&self, folder: impl AsRef<Path>, precision: Precision) -> Result<(), CheckpointError> {
        let text = hugging_face::to_text(&self.config)?;
        without_int8("Hugging Face", precision)?;
        save_weights(&self.model, &self.config, Towers::Both, folder.as_ref(), hugging_face::FORMAT, precision)?;
        #[cfg(feature = "preprocess")]
        for (name, text) in super::tokenizer::hugging_face_files(&self.config.text) {
            save_text(folder.as_ref(), name, &text)?;
        }
        save_text(folder.as_ref(), hugging_face::PROCESSOR, &hugging_face::processor_text(&self.config.vision))?;
        save_text(folder.as_ref(), hugging_face::FORMAT.config, &text)
    }

    /// Writes `burn_moe_config.json` and `burn_moe_model.safetensors` into `folder`, which is made if need be. Tensor names are
    /// open_clip's; a sparse block has `moe.router.weight` `[D, E]`, `moe.experts.w_in` `[E, D, F]`, `moe.experts.b_in` `[E, F]`,
    /// `moe.experts.w_out` `[E, F, D]` and `moe.experts.b_out` `[E, D]` where a dense one has `mlp`; if it has them also
    /// `moe.router.balancing_bias` `[E]`, `balancing_momentum` `[E]` and `balancing_warmup` `[1]`, `moe.experts.w_gate` and `b_gate` (as `w_in` and `b_in`), and
    /// `moe.shared_expert.*` (as `moe.experts.*` with `E` 1); without [`SparseEncoderConfig::bias`](crate::transformer::SparseEncoderConfig::bias) no biases. What towers of
    /// other parts have besides is in `docs/checkpoints.md`. A soft one has `moe.slots` `[D, E · S]` and no router. With [`Precision::Int8`], each weight in 8
    /// bits has its scales beside it: `NAME.scale`, f32, one for each output column.
    ///
    /// # Errors
    /// When a value is not finite or beyond the precision, or on a failure of the file system; a file that was there before is then as it was.
    ///
    /// # Panics
    /// When the configuration is not the model's.
    pub fn save_sparse(&self, folder: impl AsRef<Path>, precision: Precision) -> Result<(), CheckpointError> {
        let text = burn_moe::to_text(&self.config, Towers::Both);
        save_weights(&self.model, &self.config, Towers::Both, folder.as_ref(), burn_moe::FORMAT, precision)?;
        save_text(folder.as_ref(), burn_moe::FORMAT.config, &text)
    }
}

/// Formats of others have no place for weights in 8 bits.
fn without_int8(format: &'static str, precision: Precision) -> Result<(), CheckpointError> {
    match precision {
        Precision::Int8 => Err(CheckpointError::NoPlace { format, what: "weights in 8 bits: `save_sparse` writes them" }),
        _ => Ok(()),
    }
}
