//! A model's weights from files.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
};

use burn::module::Module;

use super::{
    CheckpointError,
    format::{Found, Towers, found_in, no_weights},
    naming::{HARMLESS, Naming},
    numbers, params,
    positions::{interpolated, side_of},
    table::Entry,
    tensors::{self, TensorFiles},
};
use crate::clip::ClipConfig;

/// The parameter that depends on the size of the images.
const POSITIONS: &str = "vision.position_embedding";

/// Reads `towers` of the checkpoint in a folder into a new model, for images of another size if one is named.
pub(super) fn load<M: Module>(
    folder: &Path,
    towers: Towers,
    image_size: Option<usize>,
    init: impl FnOnce(&ClipConfig) -> M,
) -> Result<(ClipConfig, M), CheckpointError> {
    let found = found_in(folder)?;
    found.expect(towers)?;
    let found = found.with_image_size(image_size)?;
    if !found.weights.is_file() && !tensors::index_of(&found.weights).is_file() {
        return Err(no_weights(folder, found.format));
    }
    let files = TensorFiles::open(&found.weights)?;
    let model = load_weights(&files, &found, towers, image_size.is_some(), init)?;
    Ok((found.config, model))
}

fn load_weights<M: Module>(
    files: &TensorFiles,
    found: &Found,
    towers: Towers,
    interpolate: bool,
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
    let expected = keys(&entries);
    // What a whole checkpoint holds beside the tower that is asked for.
    let ignored = if found.towers == Towers::Both { keys(&others) } else { BTreeSet::new() };
    let naming = Naming::of(files, &expected.union(&ignored).map(String::as_str).collect());
    let mut found = BTreeSet::new();
    for key in files.names().map(|name| naming.key_of(name)).filter(|key| !HARMLESS.contains(key)) {
        if !found.insert(key) {
            return Err(CheckpointError::Duplicate { path: files.path.clone(), tensor: key.to_string() });
        }
    }
    let missing: Vec<String> = expected.iter().filter(|key| !found.contains(key.as_str())).cloned().collect();
    let is_unexpected = |key: &&&str| !expected.contains(**key) && !ignored.contains(**key);
    let unexpected: Vec<String> = found.iter().filter(is_unexpected).map(|key| key.to_string()).collect();
    if !missing.is_empty() || !unexpected.is_empty() {
        return Err(CheckpointError::Keys { path: files.path.clone(), missing, unexpected });
    }
    // All shapes before the first number: what does not fit costs no memory.
    for entry in &entries {
        let info = files.info(&naming.stored(&entry.key));
        let is_scalar = entry.stored_shape.is_empty() && info.shape == [1];
        if info.shape == entry.stored_shape || is_scalar {
            continue;
        }
        let side = match (info.shape, &entry.stored_shape[..]) {
            ([rows, found], [_, width]) if entry.path == POSITIONS && found == width => side_of(*rows),
            _ => None,
        };
        match side {
            Some(_) if interpolate => {}
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
    let mut entries: BTreeMap<String, Entry> = entries.into_iter().map(|entry| (entry.path.clone(), entry)).collect();
    let model = params::replace(init(config), |path| {
        let path = format!("{}{path}", towers.prefix());
        let entry = entries.remove(&path).unwrap_or_else(|| panic!("no format names the parameter `{path}`"));
        let name = naming.stored(&entry.key);
        let info = files.info(&name);
        let bytes = files.read(&name, entry.part())?;
        let values = numbers::decode(info.dtype, &bytes).ok_or_else(|| CheckpointError::Dtype {
            path: info.path.to_path_buf(),
            tensor: entry.key.clone(),
            dtype: format!("{:?}", info.dtype),
        })?;
        let count = values.iter().filter(|v| !v.is_finite()).count();
        if count > 0 {
            let source = crate::support::finite::NonFiniteError { tensor: entry.key, count, total: values.len() };
            return Err(CheckpointError::NonFinite { path: info.path.to_path_buf(), source });
        }
        match (path == POSITIONS).then(|| side_of(info.shape[0])).flatten() {
            Some(side) if info.shape != entry.stored_shape => {
                Ok(interpolated(&values, side, config.vision.image_size / config.vision.patch_size))
            }
            _ => Ok(entry.load(values)),
        }
    })?;
    assert!(entries.is_empty(), "no parameter for {:?}", entries.keys());
    Ok(model)
}
