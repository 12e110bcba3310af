//! Checkpoints: Hugging Face and open_clip in, open_clip and sparse ones out.
//!
//! One table per layout says which stored tensor is which parameter, so that reading and writing cannot drift apart.
//! Everything is checked before a model is built: a file that does not fit yields an error and no model.

mod config;
mod error;
mod layout;
mod params;

pub use error::CheckpointError;

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
};

use burn::tensor::Device;
use safetensors::{Dtype, SafeTensors, tensor::TensorView};

use super::{Clip, ClipConfig};
use layout::{Array, Layout};

/// A model read from disk, with the configuration that describes it.
#[derive(Debug, Clone)]
pub struct ClipCheckpoint {
    /// Sizes and options.
    pub config: ClipConfig,
    /// The weights.
    pub model: Clip,
}

/// How numbers are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Precision {
    /// 32 bits.
    F32,
    /// 16 bits, IEEE half precision.
    F16,
}

/// Tensors of other writers' files that hold no parameter.
const HARMLESS: [&str; 3] = ["attn_mask", "text_model.embeddings.position_ids", "vision_model.embeddings.position_ids"];

impl ClipCheckpoint {
    /// Reads a folder: `config.json` means Hugging Face's `CLIPModel` (with `model.safetensors`), `open_clip_config.json` means
    /// open_clip (with `open_clip_model.safetensors`), `burn_moe_config.json` means [`save_sparse`](Self::save_sparse).
    /// Weights may be f32, f16, bf16 or f64; the model has f32.
    ///
    /// # Errors
    /// When a file is missing, truncated or of another kind, a setting is not known, or a tensor is missing, not expected, of
    /// another shape or not finite; each is named.
    pub fn load(folder: impl AsRef<Path>, device: &Device) -> Result<Self, CheckpointError> {
        let folder = folder.as_ref();
        let kinds = [
            ("burn_moe_config.json", "model.safetensors", Layout::OpenClip),
            ("open_clip_config.json", "open_clip_model.safetensors", Layout::OpenClip),
            ("config.json", "model.safetensors", Layout::HuggingFace),
        ];
        // Some folders hold the configurations of several layouts: the one whose weights are there counts.
        let has = |name: &str| folder.join(name).is_file();
        let whole = kinds.into_iter().find(|kind| has(kind.0) && has(kind.1));
        let Some((config_name, weights_name, layout)) = whole.or_else(|| kinds.into_iter().find(|kind| has(kind.0))) else {
            return Err(CheckpointError::NoConfig { folder: folder.to_path_buf() });
        };
        let config_path = folder.join(config_name);
        let text = fs::read_to_string(&config_path).map_err(CheckpointError::io(&config_path))?;
        let config = match config_name {
            "burn_moe_config.json" => config::from_burn_moe(&text),
            "open_clip_config.json" => config::from_open_clip(&text),
            _ => config::from_hugging_face(&text),
        };
        let config = config.map_err(|error| error.at(&config_path))?;
        config.validate().map_err(|source| CheckpointError::Config { path: config_path, source })?;

        let weights_path = folder.join(weights_name);
        let bytes = fs::read(&weights_path).map_err(CheckpointError::io(&weights_path))?;
        let model = load_weights(&weights_path, &bytes, &config, layout, device)?;
        Ok(Self { config, model })
    }

    /// Writes `open_clip_config.json` and `open_clip_model.safetensors` into `folder`, which is made if need be.
    ///
    /// # Errors
    /// When the model is sparse, or on a failure of the file system; a file that was there before is then as it was.
    pub fn save_open_clip(&self, folder: impl AsRef<Path>, precision: Precision) -> Result<(), CheckpointError> {
        let text = config::to_open_clip(&self.config)?;
        self.save(folder.as_ref(), ["open_clip_config.json", "open_clip_model.safetensors"], &text, precision)
    }

    /// Writes `burn_moe_config.json` and `model.safetensors` into `folder`, which is made if need be. Tensor names are
    /// open_clip's; a sparse block has `moe.router.weight` `[D, E]`, `moe.experts.w_in` `[E, D, F]`, `moe.experts.b_in` `[E, F]`,
    /// `moe.experts.w_out` `[E, F, D]` and `moe.experts.b_out` `[E, D]` where a dense one has `mlp`; if it has them also
    /// `moe.router.balancing_bias` `[E]`, `moe.experts.w_gate` and `b_gate` (as `w_in` and `b_in`), and `moe.shared_expert.*` (as `moe.experts.*`
    /// with `E` 1). A soft one has `moe.slots` `[D, E · S]` and no router.
    ///
    /// # Errors
    /// On a failure of the file system; a file that was there before is then as it was.
    pub fn save_sparse(&self, folder: impl AsRef<Path>, precision: Precision) -> Result<(), CheckpointError> {
        let text = config::to_burn_moe(&self.config);
        self.save(folder.as_ref(), ["burn_moe_config.json", "model.safetensors"], &text, precision)
    }

    fn save(&self, folder: &Path, names: [&str; 2], config: &str, precision: Precision) -> Result<(), CheckpointError> {
        fs::create_dir_all(folder).map_err(CheckpointError::io(folder))?;
        let mut stored = params::read(&self.model);
        let mut fused: BTreeMap<String, Array> = BTreeMap::new();
        for entry in layout::entries(&self.config, Layout::OpenClip) {
            let array = stored.remove(&entry.path).unwrap_or_else(|| panic!("the model has no parameter `{}`", entry.path));
            entry.store(array, fused.entry(entry.key.clone()).or_insert_with(|| Array::zeros(entry.stored_shape.clone())));
        }
        assert!(stored.is_empty(), "parameters that no layout names: {:?}", stored.keys());
        for (tensor, array) in &fused {
            let count = layout::overflows(&array.values, precision);
            if count > 0 {
                return Err(CheckpointError::Overflow { tensor: tensor.clone(), count });
            }
        }
        let dtype = match precision {
            Precision::F32 => Dtype::F32,
            Precision::F16 => Dtype::F16,
        };
        let bytes: Vec<(String, Vec<usize>, Vec<u8>)> =
            fused.into_iter().map(|(key, array)| (key, array.shape, layout::encode(&array.values, precision))).collect();
        let views = bytes.iter().map(|(key, shape, bytes)| {
            (key.as_str(), TensorView::new(dtype, shape.clone(), bytes).expect("sizes follow from the shape"))
        });
        let weights = folder.join(names[1]);
        let file = safetensors::serialize(views, None).map_err(CheckpointError::safetensors(&weights))?;
        crate::write_atomic(&weights, &file).map_err(CheckpointError::io(&weights))?;
        let config_path = folder.join(names[0]);
        crate::write_atomic(&config_path, config.as_bytes()).map_err(CheckpointError::io(&config_path))
    }
}

fn load_weights(path: &Path, bytes: &[u8], config: &ClipConfig, layout: Layout, device: &Device) -> Result<Clip, CheckpointError> {
    let file = SafeTensors::deserialize(bytes).map_err(CheckpointError::safetensors(path))?;
    let entries = layout::entries(config, layout);
    let expected: BTreeSet<&str> = entries.iter().map(|entry| entry.key.as_str()).collect();
    let found: BTreeSet<&str> = file.names().into_iter().filter(|name| !HARMLESS.contains(name)).collect();
    let names = |set: std::collections::btree_set::Difference<&str>| set.map(|name| name.to_string()).collect::<Vec<_>>();
    let missing = names(expected.difference(&found));
    let unexpected = names(found.difference(&expected));
    if !missing.is_empty() || !unexpected.is_empty() {
        return Err(CheckpointError::Keys { path: path.to_path_buf(), missing, unexpected });
    }
    let mut loaded = BTreeMap::new();
    for entry in entries {
        let view = file.tensor(&entry.key).map_err(CheckpointError::safetensors(path))?;
        let is_scalar = entry.stored_shape.is_empty() && view.shape() == [1];
        if view.shape() != entry.stored_shape && !is_scalar {
            return Err(CheckpointError::Shape {
                path: path.to_path_buf(),
                tensor: entry.key,
                expected: entry.stored_shape,
                found: view.shape().to_vec(),
            });
        }
        let values = layout::decode(&view).ok_or_else(|| CheckpointError::Dtype {
            path: path.to_path_buf(),
            tensor: entry.key.clone(),
            dtype: format!("{:?}", view.dtype()),
        })?;
        let count = values.iter().filter(|v| !v.is_finite()).count();
        if count > 0 {
            let source = crate::NonFiniteError { tensor: entry.key, count, total: values.len() };
            return Err(CheckpointError::NonFinite { path: path.to_path_buf(), source });
        }
        let array = entry.load(Array { shape: entry.stored_shape.clone(), values });
        loaded.insert(entry.path, array);
    }
    Ok(params::write(config.init(device), loaded))
}

/// Names the file in the errors of the configuration readers, which see only its text.
impl config::ConfigFileError {
    fn at(self, path: &Path) -> CheckpointError {
        CheckpointError::ConfigFile { path: PathBuf::from(path), reason: self.0 }
    }
}
