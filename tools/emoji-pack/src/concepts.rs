//! The concepts of the pack, from emojibase-data.

use std::collections::BTreeMap;
use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::iconset::read_json;

/// The group number of components: skin tones and hair.
const COMPONENTS: u8 = 2;
/// The group number of flags.
const FLAGS: u8 = 9;
/// The flags that mean a thing and not a place; all other flags are left out.
const KEPT_FLAGS: [&str; 8] =
    ["1F3C1", "1F6A9", "1F38C", "1F3F4", "1F3F3", "1F3F3-FE0F-200D-1F308", "1F3F3-FE0F-200D-26A7-FE0F", "1F3F4-200D-2620-FE0F"];

/// One entry of `data.json`; skin tones are not read.
#[derive(Debug, Clone, Deserialize)]
pub struct Entry {
    pub label: String,
    pub hexcode: String,
    #[serde(default)]
    pub tags: Vec<String>,
    pub order: Option<u32>,
    pub group: Option<u8>,
    pub subgroup: Option<u8>,
}

/// Label and tags in one language.
#[derive(Debug, Clone, Serialize, PartialEq)]
pub struct Caption {
    pub label: String,
    pub tags: Vec<String>,
}

/// Reads the entries of one language.
pub fn read_entries(emojibase: &Path, language: &str) -> Result<Vec<Entry>> {
    read_json(&emojibase.join(language).join("data.json"))
}

/// Whether an entry becomes a concept: it has a group, it is no component, and it is not the flag
/// of a place.
pub fn is_concept(entry: &Entry) -> bool {
    match entry.group {
        None | Some(COMPONENTS) => false,
        Some(FLAGS) => KEPT_FLAGS.contains(&entry.hexcode.as_str()),
        Some(_) => true,
    }
}

/// Fails with the names when two entries share a label or a hexcode.
pub fn check_unique(entries: &[&Entry]) -> Result<()> {
    let mut labels: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    let mut hexcodes: BTreeMap<&str, usize> = BTreeMap::new();
    for entry in entries {
        labels.entry(&entry.label).or_default().push(&entry.hexcode);
        *hexcodes.entry(&entry.hexcode).or_default() += 1;
    }
    let twice: Vec<String> = labels
        .iter()
        .filter(|(_, codes)| codes.len() > 1)
        .map(|(label, codes)| format!("{label:?} ({})", codes.join(", ")))
        .collect();
    if !twice.is_empty() {
        return Err(Error::DuplicateLabels { labels: twice });
    }
    let twice: Vec<String> = hexcodes.iter().filter(|(_, count)| **count > 1).map(|(code, _)| (*code).to_owned()).collect();
    if !twice.is_empty() {
        return Err(Error::DuplicateHexcodes { hexcodes: twice });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(label: &str, hexcode: &str, group: Option<u8>) -> Entry {
        Entry { label: label.into(), hexcode: hexcode.into(), tags: Vec::new(), order: None, group, subgroup: None }
    }

    #[test]
    fn components_and_flags_of_places_are_no_concepts() {
        assert!(is_concept(&entry("dog", "1F415", Some(3))));
        assert!(!is_concept(&entry("regional indicator F", "1F1EB", None)));
        assert!(!is_concept(&entry("light skin tone", "1F3FB", Some(2))));
        assert!(!is_concept(&entry("flag: France", "1F1EB-1F1F7", Some(9))));
        assert!(is_concept(&entry("chequered flag", "1F3C1", Some(9))));
    }

    #[test]
    fn shared_labels_are_named() {
        let (a, b) = (entry("dog", "1", Some(3)), entry("dog", "2", Some(3)));
        let error = check_unique(&[&a, &b]).expect_err("two dogs");
        assert!(matches!(&error, Error::DuplicateLabels { labels } if labels.len() == 1));
        assert!(error.to_string().contains("\"dog\" (1, 2)"), "{error}");
        let c = entry("cat", "1", Some(3));
        let error = check_unique(&[&a, &c]).expect_err("one hexcode for two");
        assert!(matches!(error, Error::DuplicateHexcodes { .. }));
        assert!(check_unique(&[&b, &c]).is_ok());
    }
}
