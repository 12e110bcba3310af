//! A model's weights from files.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
};

use burn::module::Module;
use safetensors::Dtype;

use super::{
    CheckpointError,
    format::{Found, Towers, described_by, found_in, no_weights},
    naming::Naming,
    numbers,
    params::{self, Loaded},
    positions::{interpolated, side_of},
    table::{Constant, Entry},
    tensors::{self, StoredInfo, TensorFiles},
};
use crate::clip::ClipConfig;

/// The parameter that depends on the size of the images.
const POSITIONS: &str = "vision.position_embedding";

/// How a checkpoint is read.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LoadOptions {
    /// Side of the images in pixels, if it should be another than the checkpoint's: its position embeddings are then interpolated, bicubic and
    /// antialiased, as open_clip does with `force_image_size`. A model loses some of its accuracy by that until it is trained a little further.
    /// Default: the checkpoint's own size, to which its position embeddings must fit.
    pub image_size: Option<usize>,
    /// Packs the weights as they are read, so that at most one of them is in memory in 32 bits: see [`pack_weights`](crate::pack_weights), on burn's CPU
    /// backend only. Default: plain weights.
    #[cfg(feature = "flex")]
    pub packed: Option<crate::Precision>,
}

impl LoadOptions {
    /// The defaults.
    pub fn new() -> Self {
        Self::default()
    }

    /// With another [`image_size`](Self::image_size).
    pub fn with_image_size(mut self, image_size: Option<usize>) -> Self {
        self.image_size = image_size;
        self
    }

    /// With [`packed`](Self::packed) weights.
    #[cfg(feature = "flex")]
    pub fn with_packed(mut self, packed: Option<crate::Precision>) -> Self {
        self.packed = packed;
        self
    }

    fn loaded(&self, entry: &Entry, values: Vec<f32>) -> Result<Loaded, CheckpointError> {
        #[cfg(feature = "flex")]
        if let Some((dims, precision)) = self.packed.and_then(|precision| entry.packed_in(precision)) {
            return match values.iter().filter(|value| !precision.holds(**value)).count() {
                0 => Ok(Loaded::Packed(values, dims, precision)),
                count => Err(CheckpointError::Packed { tensor: entry.key.clone(), count, precision }),
            };
        }
        let _ = entry;
        Ok(Loaded::Plain(values))
    }
}

/// Reads `towers` of the checkpoint in a folder into a new model, for images of another size if one is named.
pub(super) fn load<M: Module>(
    folder: &Path,
    towers: Towers,
    options: &LoadOptions,
    init: impl FnOnce(&ClipConfig) -> M,
) -> Result<(ClipConfig, M), CheckpointError> {
    let found = found_in(folder, towers)?;
    found.expect(towers)?;
    let found = found.with_image_size(options.image_size)?;
    if !found.weights.is_file() && !tensors::index_of(&found.weights).is_file() {
        return Err(no_weights(folder, found.format));
    }
    let files = TensorFiles::open(&found.weights)?;
    let model = load_weights(&files, &found, towers, options, init)?;
    Ok((found.config, model))
}

/// A whole CLIP in this crate's format from what its two files hold.
pub(super) fn load_from_memory<M: Module>(
    config: &str,
    weights: Vec<u8>,
    options: &LoadOptions,
    init: impl FnOnce(&ClipConfig) -> M,
) -> Result<(ClipConfig, M), CheckpointError> {
    let found = described_by(config)?;
    found.expect(Towers::Both)?;
    let found = found.with_image_size(options.image_size)?;
    let files = TensorFiles::in_memory(&found.weights, weights)?;
    let model = load_weights(&files, &found, Towers::Both, options, init)?;
    Ok((found.config, model))
}

fn load_weights<M: Module>(
    files: &TensorFiles,
    found: &Found,
    towers: Towers,
    options: &LoadOptions,
    init: impl FnOnce(&ClipConfig) -> M,
) -> Result<M, CheckpointError> {
    let Found { config, format, .. } = found;
    // Every block has tensors of its own: what claims more blocks than that is not worth a table.
    let (vision, text) = (config.vision.encoder.n_layers, config.text.encoder.n_layers);
    let blocks = match found.towers {
        Towers::Both => vision + text,
        Towers::Vision => vision,
        Towers::Text => text,
    };
    if blocks > files.names().count() {
        return Err(CheckpointError::Blocks { path: files.path.clone(), blocks, tensors: files.names().count() });
    }
    let (entries, others): (Vec<Entry>, Vec<Entry>) =
        (format.entries)(config).into_iter().partition(|entry| entry.path.starts_with(towers.prefix()));
    let keys = |entries: &[Entry]| entries.iter().map(|entry| entry.key.clone()).collect::<BTreeSet<String>>();
    let mut expected = keys(&entries);
    // What a whole checkpoint holds beside the tower that is asked for.
    let mut ignored = if found.towers == Towers::Both { keys(&others) } else { BTreeSet::new() };
    let naming = Naming::of(files, &expected.union(&ignored).map(String::as_str).collect())?;
    let scales = |entries: &[Entry], keys: &BTreeSet<String>| {
        let is_int8 = |entry: &&Entry| naming.find(&entry.key).is_some_and(|name| is_int8(entry, &files.info(name)));
        entries.iter().filter(is_int8).map(|entry| entry.scales().0).chain(keys.iter().cloned()).collect::<BTreeSet<String>>()
    };
    expected = scales(&entries, &expected);
    ignored = scales(&others, &ignored);
    let constants = (format.constants)(config);
    ignored.extend(constants.iter().map(|constant| constant.key.clone()));
    let missing: Vec<String> = expected.iter().filter(|key| naming.find(key).is_none()).cloned().collect();
    let is_unexpected = |(key, _): &(&String, &String)| !expected.contains(*key) && !ignored.contains(*key);
    let unexpected: Vec<String> = naming.all().filter(is_unexpected).map(|(_, name)| name.clone()).collect();
    if !missing.is_empty() || !unexpected.is_empty() {
        return Err(CheckpointError::Keys { path: files.path.clone(), missing, unexpected });
    }
    let ahead = usize::from(config.vision.class_token);
    // All shapes before the first number: what does not fit costs no memory.
    for entry in &entries {
        let info = files.info(naming.stored(&entry.key));
        if is_int8(entry, &info) {
            let (key, expected) = entry.scales();
            let scales = files.info(naming.stored(&key));
            if scales.shape != expected || scales.dtype != Dtype::F32 {
                return Err(match scales.dtype {
                    Dtype::F32 => CheckpointError::Shape {
                        path: scales.path.to_path_buf(),
                        tensor: key,
                        expected,
                        found: scales.shape.to_vec(),
                    },
                    dtype => CheckpointError::Dtype { path: scales.path.to_path_buf(), tensor: key, dtype: format!("{dtype:?}") },
                });
            }
        }
        let is_scalar = entry.stored_shape.is_empty() && info.shape == [1];
        if info.shape == entry.stored_shape || is_scalar {
            continue;
        }
        let side = match (info.shape, &entry.stored_shape[..]) {
            ([rows, found], [_, width]) if entry.path == POSITIONS && found == width => side_of(*rows, ahead),
            _ => None,
        };
        match side {
            Some(_) if options.image_size.is_some() => {}
            Some(side) => {
                return Err(CheckpointError::ImageSize {
                    path: info.path.to_path_buf(),
                    tensor: entry.key.clone(),
                    found: side * config.vision.patch_size,
                    expected: config.vision.image_size,
                });
            }
            None => {
                return Err(CheckpointError::Shape {
                    path: info.path.to_path_buf(),
                    tensor: entry.key.clone(),
                    expected: entry.stored_shape.clone(),
                    found: info.shape.to_vec(),
                });
            }
        }
    }
    for constant in &constants {
        if let Some(name) = naming.find(&constant.key) {
            check_constant(files, name, constant)?;
        }
    }
    let mut entries: BTreeMap<String, Entry> = entries.into_iter().map(|entry| (entry.path.clone(), entry)).collect();
    let model = params::replace(init(config), |path| {
        let path = format!("{}{path}", towers.prefix());
        let entry = entries.remove(&path).unwrap_or_else(|| panic!("no format names the parameter `{path}`"));
        let name = naming.stored(&entry.key);
        let info = files.info(name);
        let bytes = files.read(name, entry.part())?;
        let values = if is_int8(&entry, &info) {
            let scales = files.read(naming.stored(&entry.scales().0), entry.part())?;
            entry.scaled(numbers::decode_int8(&bytes), &numbers::decode(Dtype::F32, &scales).expect("it is a number type"))
        } else {
            numbers::decode(info.dtype, &bytes).ok_or_else(|| CheckpointError::Dtype {
                path: info.path.to_path_buf(),
                tensor: entry.key.clone(),
                dtype: format!("{:?}", info.dtype),
            })?
        };
        let count = values.iter().filter(|v| !v.is_finite()).count();
        if count > 0 {
            let source = crate::support::finite::NonFiniteError { tensor: entry.key, count, total: values.len() };
            return Err(CheckpointError::NonFinite { path: info.path.to_path_buf(), source });
        }
        match (path == POSITIONS).then(|| side_of(info.shape[0], ahead)).flatten() {
            Some(side) if info.shape != entry.stored_shape => {
                Ok(Loaded::Plain(interpolated(&values, ahead, side, config.vision.image_size / config.vision.patch_size)))
            }
            _ => options.loaded(&entry, entry.load(values)),
        }
    })?;
    assert!(entries.is_empty(), "no parameter for {:?}", entries.keys());
    Ok(model)
}

/// Refuses a constant of other numbers, as far as the number type of the file tells them apart.
fn check_constant(files: &TensorFiles, name: &str, constant: &Constant) -> Result<(), CheckpointError> {
    let info = files.info(name);
    let shape = vec![constant.values.len()];
    if info.shape != shape {
        let (path, tensor) = (info.path.to_path_buf(), constant.key.clone());
        return Err(CheckpointError::Shape { path, tensor, expected: shape, found: info.shape.to_vec() });
    }
    let rounding = match info.dtype {
        Dtype::BF16 => 1.0 / 256.0,
        Dtype::F16 => 1.0 / 2048.0,
        _ => 1e-6,
    };
    let found = numbers::decode(info.dtype, &files.read(name, None)?);
    let near = |(found, expected): (&f32, &f32)| (found - expected).abs() <= rounding * expected.abs();
    if found.is_some_and(|found| found.iter().zip(constant.values.iter()).all(near)) {
        return Ok(());
    }
    Err(CheckpointError::Constant { path: info.path.to_path_buf(), tensor: constant.key.clone(), expected: constant.what })
}

/// Whether a weight is in 8 bits, and its scales beside it.
fn is_int8(entry: &Entry, info: &StoredInfo) -> bool {
    info.dtype == Dtype::I8 && entry.may_be_int8()
}
