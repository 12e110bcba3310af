//! Checkpoints: Hugging Face's, open_clip's and sparse ones, in and out.
//!
//! One table per format says which stored tensor is which parameter, so that reading and writing cannot drift apart.
//! A file that does not fit yields an error and no model. Tensors are read and written one at a time, so that a model is never in memory
//! twice. `docs/checkpoints.md` has every name.

mod burn_moe;
mod config;
mod error;
mod format;
mod hugging_face;
mod naming;
mod numbers;
mod open_clip;
mod params;
mod table;
mod tensors;

pub use error::CheckpointError;

use std::{
    borrow::Cow,
    cell::RefCell,
    collections::{BTreeMap, BTreeSet},
    fs,
    path::Path,
};

use burn::tensor::Device;
use safetensors::{Dtype, tensor::View};

use super::{Clip, ClipConfig};
use format::{Format, found_in, no_weights};
use naming::{HARMLESS, Naming};
use params::Source;
use table::Entry;
use tensors::TensorFiles;

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
    /// 16 bits with the exponent of 32.
    BF16,
}

impl ClipCheckpoint {
    /// Reads a folder: `config.json` means Hugging Face's `CLIPModel` (with `model.safetensors`), `open_clip_config.json` means
    /// open_clip (with `open_clip_model.safetensors`), `burn_moe_config.json` means [`save_sparse`](Self::save_sparse). Instead of one file of
    /// weights there may be shards with an index (`model.safetensors.index.json`).
    /// Weights may be f32, f16, bf16 or f64; the model has f32. What the folder says of images (open_clip's `preprocess_cfg`, transformers'
    /// `preprocessor_config.json`) becomes [`VisionConfig::preprocessing`](crate::clip::VisionConfig).
    ///
    /// # Errors
    /// When a file is missing, truncated or of another kind, a setting is not known, or a tensor is missing, not expected, of
    /// another shape or not finite; each is named.
    pub fn load(folder: impl AsRef<Path>, device: &Device) -> Result<Self, CheckpointError> {
        let folder = folder.as_ref();
        let (config, weights, format) = found_in(folder)?;
        if !weights.is_file() && !tensors::index_of(&weights).is_file() {
            return Err(no_weights(folder, format));
        }
        let model = load_weights(&TensorFiles::open(&weights)?, &config, format, device)?;
        Ok(Self { config, model })
    }

    /// Reads the configuration of a folder, and no weights.
    ///
    /// # Errors
    /// When the configuration is missing, of another kind, or has a setting that is not known.
    pub fn read_config(folder: impl AsRef<Path>) -> Result<ClipConfig, CheckpointError> {
        Ok(found_in(folder.as_ref())?.0)
    }

    /// Writes `open_clip_config.json` and `open_clip_model.safetensors` into `folder`, which is made if need be.
    ///
    /// # Errors
    /// When the model is sparse, a value is not finite or beyond the precision, or on a failure of the file system; a file that was there before
    /// is then as it was.
    ///
    /// # Panics
    /// When the configuration is not the model's.
    pub fn save_open_clip(&self, folder: impl AsRef<Path>, precision: Precision) -> Result<(), CheckpointError> {
        let text = open_clip::to_text(&self.config)?;
        self.save_weights(folder.as_ref(), open_clip::FORMAT, precision)?;
        save_text(folder.as_ref(), open_clip::FORMAT.config, &text)
    }

    /// Writes `config.json`, `preprocessor_config.json` and `model.safetensors` as transformers does for a `CLIPModel` into `folder`, which is
    /// made if need be.
    ///
    /// # Errors
    /// When the model is sparse or its text projection has a bias, a value is not finite or beyond the precision, or on a failure of the file
    /// system; a file that was there before is then as it was.
    ///
    /// # Panics
    /// When the configuration is not the model's.
    pub fn save_hugging_face(&self, folder: impl AsRef<Path>, precision: Precision) -> Result<(), CheckpointError> {
        let text = hugging_face::to_text(&self.config)?;
        self.save_weights(folder.as_ref(), hugging_face::FORMAT, precision)?;
        save_text(folder.as_ref(), hugging_face::PROCESSOR, &hugging_face::processor_text(&self.config.vision))?;
        save_text(folder.as_ref(), hugging_face::FORMAT.config, &text)
    }

    /// Writes `burn_moe_config.json` and `burn_moe_model.safetensors` into `folder`, which is made if need be. Tensor names are
    /// open_clip's; a sparse block has `moe.router.weight` `[D, E]`, `moe.experts.w_in` `[E, D, F]`, `moe.experts.b_in` `[E, F]`,
    /// `moe.experts.w_out` `[E, F, D]` and `moe.experts.b_out` `[E, D]` where a dense one has `mlp`; if it has them also
    /// `moe.router.balancing_bias` `[E]`, `moe.experts.w_gate` and `b_gate` (as `w_in` and `b_in`), and `moe.shared_expert.*` (as `moe.experts.*`
    /// with `E` 1). A soft one has `moe.slots` `[D, E · S]` and no router.
    ///
    /// # Errors
    /// When a value is not finite or beyond the precision, or on a failure of the file system; a file that was there before is then as it was.
    ///
    /// # Panics
    /// When the configuration is not the model's.
    pub fn save_sparse(&self, folder: impl AsRef<Path>, precision: Precision) -> Result<(), CheckpointError> {
        let text = burn_moe::to_text(&self.config);
        self.save_weights(folder.as_ref(), burn_moe::FORMAT, precision)?;
        save_text(folder.as_ref(), burn_moe::FORMAT.config, &text)
    }

    fn save_weights(&self, folder: &Path, format: Format, precision: Precision) -> Result<(), CheckpointError> {
        fs::create_dir_all(folder).map_err(CheckpointError::io(folder))?;
        let mut sources = params::sources(&self.model);
        let mut stored: BTreeMap<String, StoredTensor> = BTreeMap::new();
        let overflow = RefCell::new(None);
        for entry in (format.entries)(&self.config) {
            let source = sources.remove(&entry.path).unwrap_or_else(|| panic!("the model has no parameter `{}`", entry.path));
            let new = || StoredTensor { shape: entry.stored_shape.clone(), parts: Vec::new(), precision, overflow: &overflow };
            stored.entry(entry.key.clone()).or_insert_with(new).parts.push((entry, source));
        }
        assert!(sources.is_empty(), "parameters that no format names: {:?}", sources.keys());
        let weights = folder.join(format.weights[0]);
        crate::support::files::write_aside(
            &weights,
            |error| CheckpointError::Io { path: weights.clone(), source: error },
            |aside| {
                // The crate would make a file that nobody else may read; one that is there keeps its rights.
                fs::File::create(aside).map_err(CheckpointError::io(&weights))?;
                // transformers refuses files that do not say so.
                let about = [("format".to_string(), "pt".to_string())].into();
                let written = safetensors::serialize_to_file(stored, Some(about), aside);
                written.map_err(CheckpointError::safetensors(&weights))?;
                overflow.take().map_or(Ok(()), |(tensor, count)| Err(CheckpointError::Overflow { tensor, count }))
            },
        )
    }
}

fn save_text(folder: &Path, name: &str, text: &str) -> Result<(), CheckpointError> {
    let path = folder.join(name);
    crate::support::files::write_atomic(&path, text.as_bytes()).map_err(CheckpointError::io(&path))
}

/// A tensor of the file, made of the parameters behind it when it is written.
struct StoredTensor<'a> {
    shape: Vec<usize>,
    /// One, or the three of a fused projection in order.
    parts: Vec<(Entry, Source)>,
    precision: Precision,
    /// The first tensor that the precision cannot hold, and how many of its values.
    overflow: &'a RefCell<Option<(String, usize)>>,
}

impl StoredTensor<'_> {
    fn name(&self) -> &str {
        self.parts.first().map_or("", |(entry, _)| &entry.key)
    }
}

impl View for StoredTensor<'_> {
    fn dtype(&self) -> Dtype {
        self.precision.dtype()
    }

    fn shape(&self) -> &[usize] {
        &self.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        let mut bytes = Vec::with_capacity(self.data_len());
        for (entry, source) in &self.parts {
            let values = entry.store(source.values());
            let count = self.precision.overflows(&values);
            if count > 0 {
                self.overflow.borrow_mut().get_or_insert_with(|| (entry.key.clone(), count));
            }
            bytes.extend(self.precision.encode(&values));
        }
        assert!(bytes.len() == self.data_len(), "`{}` does not have the shape {:?} of its configuration", self.name(), self.shape);
        bytes.into()
    }

    fn data_len(&self) -> usize {
        self.shape.iter().product::<usize>() * self.dtype().bitsize() / 8
    }
}

fn load_weights(files: &TensorFiles, config: &ClipConfig, format: Format, device: &Device) -> Result<Clip, CheckpointError> {
    // Every block has tensors of its own: what claims more blocks than that is not worth a table.
    let blocks = config.vision.encoder.n_layers + config.text.encoder.n_layers;
    if blocks > files.names().count() {
        return Err(CheckpointError::Blocks { path: files.path.clone(), blocks, tensors: files.names().count() });
    }
    let entries = (format.entries)(config);
    let expected: BTreeSet<&str> = entries.iter().map(|entry| entry.key.as_str()).collect();
    let naming = Naming::of(files, &expected);
    let mut found = BTreeSet::new();
    for key in files.names().map(|name| naming.key_of(name)).filter(|key| !HARMLESS.contains(key)) {
        if !found.insert(key) {
            return Err(CheckpointError::Duplicate { path: files.path.clone(), tensor: key.to_string() });
        }
    }
    let names = |set: std::collections::btree_set::Difference<&str>| set.map(|name| name.to_string()).collect::<Vec<_>>();
    let missing = names(expected.difference(&found));
    let unexpected = names(found.difference(&expected));
    if !missing.is_empty() || !unexpected.is_empty() {
        return Err(CheckpointError::Keys { path: files.path.clone(), missing, unexpected });
    }
    // All shapes before the first number: what does not fit costs no memory.
    for entry in &entries {
        let (path, info) = files.info(&naming.stored(&entry.key));
        let is_scalar = entry.stored_shape.is_empty() && info.shape == [1];
        if info.shape != entry.stored_shape && !is_scalar {
            return Err(CheckpointError::Shape {
                path: path.to_path_buf(),
                tensor: entry.key.clone(),
                expected: entry.stored_shape.clone(),
                found: info.shape.clone(),
            });
        }
    }
    let mut entries: BTreeMap<String, Entry> = entries.into_iter().map(|entry| (entry.path.clone(), entry)).collect();
    let model = params::replace(config.init(device), |path| {
        let entry = entries.remove(path).unwrap_or_else(|| panic!("no format names the parameter `{path}`"));
        let name = naming.stored(&entry.key);
        let (file, info) = files.info(&name);
        let bytes = files.read(&name, entry.part())?;
        let values = numbers::decode(info.dtype, &bytes).ok_or_else(|| CheckpointError::Dtype {
            path: file.to_path_buf(),
            tensor: entry.key.clone(),
            dtype: format!("{:?}", info.dtype),
        })?;
        let count = values.iter().filter(|v| !v.is_finite()).count();
        if count > 0 {
            let source = crate::support::finite::NonFiniteError { tensor: entry.key, count, total: values.len() };
            return Err(CheckpointError::NonFinite { path: file.to_path_buf(), source });
        }
        Ok(entry.load(values))
    })?;
    assert!(entries.is_empty(), "no parameter for {:?}", entries.keys());
    Ok(model)
}
