//! A model's weights into a file.

use std::{borrow::Cow, cell::RefCell, collections::BTreeMap, fs, path::Path, rc::Rc};

use burn::module::Module;
use safetensors::{Dtype, tensor::View};

use super::{
    CheckpointError, Precision,
    format::{Format, Towers},
    params::{self, Source},
    table::Entry,
};
use crate::{clip::ClipConfig, ops::quantize};

/// Writes the weights of a model with the `towers` of `config`.
pub(super) fn save_weights<M: Module>(
    model: &M,
    config: &ClipConfig,
    towers: Towers,
    folder: &Path,
    format: Format,
    precision: Precision,
) -> Result<(), CheckpointError> {
    fs::create_dir_all(folder).map_err(CheckpointError::io(folder))?;
    let mut sources = params::sources(model);
    let mut stored: BTreeMap<String, StoredTensor> = BTreeMap::new();
    let overflow = RefCell::new(None);
    let prefix = towers.prefix();
    for entry in (format.entries)(config) {
        let Some(path) = entry.path.strip_prefix(prefix) else { continue };
        let source = sources.remove(path).unwrap_or_else(|| panic!("the model has no parameter `{}`", entry.path));
        let new = |shape: &[usize], kind| StoredTensor { shape: shape.to_vec(), parts: Vec::new(), kind, overflow: &overflow };
        let (entry, source) = (Rc::new(entry), Rc::new(source));
        let mut push = |key: String, shape: &[usize], kind| {
            let parts = &mut stored.entry(key).or_insert_with(|| new(shape, kind)).parts;
            parts.push((entry.clone(), source.clone()));
        };
        if precision == Precision::Int8 && entry.maps().is_some() {
            let (key, shape) = entry.scales();
            push(key, &shape, Kind::Scales);
            push(entry.key.clone(), &entry.stored_shape, Kind::Bytes);
        } else {
            push(entry.key.clone(), &entry.stored_shape, Kind::Numbers(precision));
        }
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

pub(super) fn save_text(folder: &Path, name: &str, text: &str) -> Result<(), CheckpointError> {
    save_file(folder, name, text.as_bytes())
}

pub(super) fn save_file(folder: &Path, name: &str, bytes: &[u8]) -> Result<(), CheckpointError> {
    let path = folder.join(name);
    crate::support::files::write_atomic(&path, bytes).map_err(CheckpointError::io(&path))
}

/// What is written of a parameter.
#[derive(Clone, Copy)]
enum Kind {
    Numbers(Precision),
    /// Weights in 8 bits.
    Bytes,
    /// The scales of weights in 8 bits.
    Scales,
}

/// A tensor of the file, made of the parameters behind it when it is written.
struct StoredTensor<'a> {
    shape: Vec<usize>,
    /// One, or the three of a fused projection in order.
    parts: Vec<(Rc<Entry>, Rc<Source>)>,
    kind: Kind,
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
        match self.kind {
            Kind::Numbers(precision) => precision.dtype(),
            Kind::Bytes => Dtype::I8,
            Kind::Scales => Dtype::F32,
        }
    }

    fn shape(&self) -> &[usize] {
        &self.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        let mut bytes = Vec::with_capacity(self.data_len());
        for (entry, source) in &self.parts {
            let precision = match self.kind {
                Kind::Numbers(precision) => precision,
                Kind::Bytes | Kind::Scales => Precision::Int8,
            };
            let values = source.values();
            let count = precision.overflows(&values);
            if count > 0 {
                self.overflow.borrow_mut().get_or_insert_with(|| (entry.key.clone(), count));
            }
            let quantized = || {
                let [_, d_in, d_out] = entry.maps().expect("only such weights are in 8 bits");
                quantize(&values, d_in, d_out)
            };
            match self.kind {
                Kind::Numbers(precision) => bytes.extend(precision.encode(&entry.store(values))),
                Kind::Bytes => {
                    let values = entry.store(quantized().0.into_iter().map(f32::from).collect());
                    bytes.extend(values.into_iter().map(|value| (value as i8).cast_unsigned()));
                }
                Kind::Scales => bytes.extend(Precision::F32.encode(&quantized().1)),
            }
        }
        assert!(bytes.len() == self.data_len(), "`{}` does not have the shape {:?} of its configuration", self.name(), self.shape);
        bytes.into()
    }

    fn data_len(&self) -> usize {
        self.shape.iter().product::<usize>() * self.dtype().bitsize() / 8
    }
}
