//! What a file calls the tensors of a format.

use std::collections::{BTreeMap, BTreeSet};

use super::{CheckpointError, tensors::TensorFiles};

/// Tensors of other writers' files that hold no parameter: masks, positions, counters, and the sizes that OpenAI wrote among its weights.
const HARMLESS: [&str; 8] = [
    "attn_mask",
    "text_model.embeddings.position_ids",
    "vision_model.embeddings.position_ids",
    "input_resolution",
    "context_length",
    "vocab_size",
    "n_averaged",
    "num_batches_tracked",
];

/// What wrappers of a module inside of a model put into its names: `torch.compile`, activation checkpointing, FSDP.
const WRAPPERS: [&str; 3] = ["_orig_mod.", "_checkpoint_wrapped_module.", "_fsdp_wrapped_module."];

const TOKEN_EMBEDDING: &str = "token_embedding.weight";

/// What a file calls the tensor of each key.
#[derive(Debug)]
pub(super) struct Naming {
    names: BTreeMap<String, String>,
}

impl Naming {
    /// The naming under which the file has the most of the `expected` keys: behind what a wrapper of the whole model puts in front (`module.`,
    /// `model.`), which a few names may lack. The text tower's names may begin with `text.`, as in open_clip's `CustomTextCLIP`.
    ///
    /// # Errors
    /// When two names stand for one key.
    pub(super) fn of(files: &TensorFiles, expected: &BTreeSet<&str>) -> Result<Self, CheckpointError> {
        let plain: Vec<(String, &str)> = files.names().map(|name| (unwrapped(name), name)).collect();
        let prefix = prefix(plain.iter().map(|(name, _)| name.as_str()), expected);
        let bare = |name: &str| name.strip_prefix(&prefix).unwrap_or(name).to_string();
        let mut keys: Vec<(String, &str)> = plain.iter().map(|(plain, name)| (bare(plain), *name)).collect();
        let has = |key: &str| keys.iter().any(|(name, _)| name == key);
        if expected.contains(TOKEN_EMBEDDING) && !has(TOKEN_EMBEDDING) && has(&format!("text.{TOKEN_EMBEDDING}")) {
            keys.iter_mut().for_each(|(key, _)| *key = key.strip_prefix("text.").unwrap_or(key).to_string());
        }
        let mut names = BTreeMap::new();
        for (key, name) in keys.into_iter().filter(|(key, _)| !HARMLESS.contains(&key.as_str())) {
            if let Some(other) = names.insert(key, name.to_string()) {
                let tensors = [other, name.to_string()];
                return Err(CheckpointError::SameTensor { path: files.path.clone(), tensors });
            }
        }
        Ok(Self { names })
    }

    /// The keys of all tensors that may hold parameters, and their names in the file.
    pub(super) fn all(&self) -> impl Iterator<Item = (&String, &String)> {
        self.names.iter()
    }

    /// What the file calls the tensor of a key, if it has it.
    pub(super) fn find(&self, key: &str) -> Option<&str> {
        self.names.get(key).map(String::as_str)
    }

    /// What the file calls the tensor of a key that it has.
    pub(super) fn stored(&self, key: &str) -> &str {
        self.find(key).unwrap_or_else(|| panic!("`{key}` was found in the file"))
    }
}

/// A name without what wrappers put into it.
pub(super) fn unwrapped(name: &str) -> String {
    WRAPPERS.into_iter().fold(name.to_string(), |name, wrapper| name.replace(wrapper, ""))
}

/// What stands in front of the most of the expected keys; of several, the shortest.
fn prefix<'a>(names: impl Iterator<Item = &'a str>, expected: &BTreeSet<&str>) -> String {
    let mut found: BTreeMap<&str, usize> = BTreeMap::new();
    for name in names {
        for at in std::iter::once(0).chain(name.match_indices('.').map(|(dot, _)| dot + 1)) {
            let (before, key) = name.split_at(at);
            if expected.contains(key) || key.strip_prefix("text.").is_some_and(|key| expected.contains(key)) {
                *found.entry(before).or_default() += 1;
            }
        }
    }
    let most = found.into_iter().max_by_key(|(prefix, count)| (*count, std::cmp::Reverse(prefix.len())));
    most.map(|(prefix, _)| prefix.to_string()).unwrap_or_default()
}
