//! A layer's weights from files.

use std::collections::{BTreeMap, BTreeSet};

use burn::tensor::Device;

use super::{
    CheckpointError, MoeCheckpoint, WEIGHTS,
    layout::{Parameter, STACKED, is_idle, parameters},
};
#[cfg(feature = "flex")]
use crate::Precision;
use crate::{
    MoeFeedForward,
    checkpoint::{
        numbers,
        params::{self, Loaded},
        tensors::{TensorFiles, index_of},
    },
    support::finite::NonFiniteError,
};

/// How a layer is read.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LayerOptions {
    /// Packs the experts' weights as they are read, so that at most one of them is in memory in 32 bits: see [`pack_weights`](crate::pack_weights), on burn's
    /// CPU backend only. Default: plain weights.
    #[cfg(feature = "flex")]
    pub packed: Option<Precision>,
}

impl LayerOptions {
    /// The defaults.
    pub fn new() -> Self {
        Self::default()
    }

    /// With [`packed`](Self::packed) weights.
    #[cfg(feature = "flex")]
    pub fn with_packed(mut self, packed: Option<Precision>) -> Self {
        self.packed = packed;
        self
    }

    /// What weights `[E, D, F]` of a parameter become.
    fn loaded(&self, values: Vec<f32>, maps: Option<[usize; 3]>, tensor: impl Fn() -> String) -> Result<Loaded, CheckpointError> {
        #[cfg(feature = "flex")]
        if let (Some(precision), Some(dims)) = (self.packed, maps) {
            return match values.iter().filter(|value| !precision.holds(**value)).count() {
                0 => Ok(Loaded::Packed(values, dims, precision)),
                count => Err(CheckpointError::Packed { tensor: tensor(), count, precision }),
            };
        }
        let _ = (maps, tensor);
        Ok(Loaded::Plain(values))
    }
}

/// The names that the families give to a MoE layer in its block; in memory and in files they may differ.
const LAYERS: [&str; 2] = ["mlp.", "block_sparse_moe."];

pub(super) fn load(
    checkpoint: &MoeCheckpoint,
    block: usize,
    options: &LayerOptions,
    device: &Device,
) -> Result<MoeFeedForward, CheckpointError> {
    let path = checkpoint.folder.join(WEIGHTS);
    if !path.is_file() && !index_of(&path).is_file() {
        let expected = format!("`{WEIGHTS}`, or shards with `{WEIGHTS}.index.json`");
        return Err(CheckpointError::NoWeights { folder: checkpoint.folder.clone(), expected });
    }
    let files = TensorFiles::open_for(&path, |name| layer_prefix(name, block).is_some())?;
    let parameters = |is_stacked| parameters(checkpoint.family, &checkpoint.config, is_stacked);
    let mut prefixes: BTreeSet<&str> = files.names().filter_map(|name| layer_prefix(name, block)).collect();
    if prefixes.len() > 1 {
        // A vision tower has blocks, too.
        let keys: BTreeSet<String> = parameters(false).iter().map(|parameter| parameter.key(0)).collect();
        let holds_one = |prefix: &str| files.names().any(|name| name.strip_prefix(prefix).is_some_and(|key| keys.contains(key)));
        // Where none does, all are named.
        if prefixes.iter().any(|prefix| holds_one(prefix)) {
            prefixes.retain(|prefix| holds_one(prefix));
        }
    }
    let prefix = match prefixes.iter().collect::<Vec<_>>()[..] {
        [prefix] => *prefix,
        ref found => {
            let tensor = format!("model.layers.{block}.{}*", LAYERS[0]);
            let reason = match found.len() {
                0 => format!("no tensor is named `{tensor}` or `model.layers.{block}.{}*`", LAYERS[1]),
                _ => {
                    let names: Vec<String> = found.iter().map(|prefix| format!("`{prefix}*`")).collect();
                    format!("more than one layer may be that of block {block}: {}", names.join(", "))
                }
            };
            return Err(CheckpointError::ConfigFile { path: files.path.clone(), reason });
        }
    };
    let parameters = parameters(files.names().any(|name| name.strip_prefix(prefix) == Some(STACKED)));
    let is_idle = |key: &str| is_idle(checkpoint.family, &checkpoint.config, key);
    check(&files, prefix, &parameters, is_idle)?;

    let mut parameters: BTreeMap<&str, Parameter> = parameters.into_iter().map(|parameter| (parameter.path, parameter)).collect();
    let moe = params::replace(checkpoint.config.init(device), |path| {
        let parameter = parameters.remove(path).unwrap_or_else(|| panic!("no layout names the parameter `{path}`"));
        let values = read(&files, prefix, &parameter)?;
        options.loaded(values, parameter.maps, || format!("{prefix}{}", parameter.key(0)))
    })?;
    assert!(parameters.is_empty(), "no parameter for {:?}", parameters.keys());
    Ok(moe)
}

/// `model.layers.3.mlp.` of `model.layers.3.mlp.gate.weight`, if it is a tensor of block 3's feed-forward layer.
fn layer_prefix(name: &str, block: usize) -> Option<&str> {
    let at = format!("layers.{block}.");
    let (before, _) = name.split_once(&at)?;
    if !(before.is_empty() || before.ends_with('.')) {
        return None;
    }
    let start = before.len() + at.len();
    LAYERS.iter().find(|layer| name[start..].starts_with(*layer)).map(|layer| &name[..start + layer.len()])
}

/// Refuses other tensors and other shapes than the layout says, before any number is read.
fn check(
    files: &TensorFiles,
    prefix: &str,
    parameters: &[Parameter],
    is_idle: impl Fn(&str) -> bool,
) -> Result<(), CheckpointError> {
    // A network of width 0, which transformers writes too, computes nothing.
    let counts = |name: &&str| {
        let key = name.strip_prefix(prefix);
        key.is_some_and(|key| !is_idle(key)) && !files.info(name).shape.contains(&0)
    };
    let found: BTreeSet<&str> = files.names().filter(counts).collect();
    let most = parameters.iter().map(Parameter::num_tensors).max().unwrap_or(0);
    // What claims more experts than there are tensors is not worth a list of them.
    let listed = most.min(found.len() + 1);
    let mut expected = BTreeSet::new();
    for parameter in parameters {
        expected.extend((0..parameter.num_tensors().min(listed)).map(|expert| format!("{prefix}{}", parameter.key(expert))));
    }
    let missing: Vec<String> = expected.iter().filter(|name| !found.contains(name.as_str())).cloned().collect();
    let unexpected: Vec<String> = found.iter().filter(|name| !expected.contains(**name)).map(|name| name.to_string()).collect();
    if !missing.is_empty() || !unexpected.is_empty() {
        return Err(CheckpointError::Keys { path: files.path.clone(), missing, unexpected });
    }
    for parameter in parameters {
        for expert in 0..parameter.num_tensors() {
            let tensor = format!("{prefix}{}", parameter.key(expert));
            let info = files.info(&tensor);
            let path = info.path.to_path_buf();
            if info.shape != parameter.shape() {
                let (expected, found) = (parameter.shape(), info.shape.to_vec());
                return Err(CheckpointError::Shape { path, tensor, expected, found });
            }
            if numbers::decode(info.dtype, &[]).is_none() {
                return Err(CheckpointError::Dtype { path, tensor, dtype: format!("{:?}", info.dtype) });
            }
        }
    }
    Ok(())
}

/// The numbers of a parameter, expert by expert.
fn read(files: &TensorFiles, prefix: &str, parameter: &Parameter) -> Result<Vec<f32>, CheckpointError> {
    let len = parameter.len();
    let mut values = vec![0.0; len * parameter.experts];
    for (expert, own) in values.chunks_exact_mut(len).enumerate() {
        let tensor = format!("{prefix}{}", parameter.key(expert));
        let info = files.info(&tensor);
        let bytes = files.read_share(&tensor, parameter.share(expert))?;
        let stored = numbers::decode(info.dtype, &bytes).expect("the number type was checked");
        drop(bytes);
        let count = stored.iter().filter(|value| !value.is_finite()).count();
        if count > 0 {
            let source = NonFiniteError { tensor, count, total: stored.len() };
            return Err(CheckpointError::NonFinite { path: info.path.to_path_buf(), source });
        }
        parameter.fill(&stored, own);
    }
    Ok(values)
}
