//! What a file calls the tensors of a format.

use std::collections::BTreeSet;

use super::tensors::TensorFiles;

/// Tensors of other writers' files that hold no parameter: masks, positions, and the sizes that OpenAI wrote among its weights.
pub(super) const HARMLESS: [&str; 6] = [
    "attn_mask",
    "text_model.embeddings.position_ids",
    "vision_model.embeddings.position_ids",
    "input_resolution",
    "context_length",
    "vocab_size",
];

/// How the names in a file differ from a format's keys.
#[derive(Debug, Default)]
pub(super) struct Naming {
    /// What wrappers put before every name (`module.`, `_orig_mod.`).
    prefix: String,
    /// Whether the text tower's names begin with `text.`, as in open_clip's `CustomTextCLIP`.
    text: bool,
}

impl Naming {
    /// The naming under which the file has the `expected` keys, if there is one.
    pub(super) fn of(files: &TensorFiles, expected: &BTreeSet<&str>) -> Self {
        let mut naming = Self::default();
        let has = |naming: &Self, key: &str| files.names().any(|name| naming.key_of(name) == key);
        if !expected.iter().any(|key| has(&naming, key)) {
            naming.prefix = common_prefix(files.names());
        }
        let token_embedding = "token_embedding.weight";
        naming.text = expected.contains(token_embedding)
            && !has(&naming, token_embedding)
            && has(&naming, &format!("text.{token_embedding}"));
        naming
    }

    /// The key of a tensor in the file.
    pub(super) fn key_of<'a>(&self, name: &'a str) -> &'a str {
        let key = name.strip_prefix(&self.prefix).unwrap_or(name);
        if self.text { key.strip_prefix("text.").unwrap_or(key) } else { key }
    }

    /// What the file calls the tensor of a key.
    pub(super) fn stored(&self, key: &str) -> String {
        let is_text = self.text && !key.starts_with("visual.") && key != "logit_scale";
        format!("{}{}{key}", self.prefix, if is_text { "text." } else { "" })
    }
}

/// What all names begin with, up to its last dot.
fn common_prefix<'a>(mut names: impl Iterator<Item = &'a str>) -> String {
    let Some(first) = names.next() else { return String::new() };
    let common = names.fold(first, |common, name| {
        let same = common.bytes().zip(name.bytes()).take_while(|(a, b)| a == b).count();
        // Names of another writer may not be ASCII: never cut inside a letter.
        let same = (0..=same).rev().find(|end| common.is_char_boundary(*end)).unwrap_or(0);
        &common[..same]
    });
    common.rfind('.').map_or(String::new(), |dot| common[..=dot].to_string())
}
