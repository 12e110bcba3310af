//! CLIP's vocabulary as transformers' `CLIPTokenizer` reads it.

use std::collections::BTreeMap;

use instant_clip_tokenizer::Tokenizer;
use serde_json::json;

use super::{
    ClipTokenizer,
    merges::{merges_text, names},
};
use crate::clip::{TextConfig, TokenizerKind};

const START: &str = "<|startoftext|>";
const END: &str = "<|endoftext|>";
/// The names and texts of a tokenizer's files; none for a model with another tokenizer than CLIP's.
pub(in crate::clip) fn hugging_face_files(text: &TextConfig) -> Vec<(&'static str, String)> {
    let sizes = ClipTokenizer::SMALLEST_VOCAB_SIZE..=ClipTokenizer::VOCAB_SIZE;
    if text.tokenizer != TokenizerKind::ClipBpe || !sizes.contains(&text.vocab_size) {
        return Vec::new();
    }
    let names = names(&Tokenizer::new(), text.vocab_size - ClipTokenizer::SMALLEST_VOCAB_SIZE);
    let merges = merges_text(&names);
    let ids: BTreeMap<usize, &str> = names.iter().map(|(_, name)| name.as_str()).chain([START, END]).enumerate().collect();
    let entry = |(id, name): (usize, &str)| format!("{}:{id}", json!(name));
    let vocabulary: Vec<String> = ids.into_iter().map(entry).collect();
    let config = json!({
        "tokenizer_class": "CLIPTokenizer",
        "do_lower_case": true,
        "add_prefix_space": false,
        "errors": "replace",
        "model_max_length": text.context_length,
        "bos_token": START,
        "eos_token": END,
        "pad_token": END,
        "unk_token": END,
    });
    vec![
        ("vocab.json", format!("{{{}}}", vocabulary.join(","))),
        ("merges.txt", merges),
        ("tokenizer_config.json", serde_json::to_string_pretty(&config).expect("JSON can be written")),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_files_are_those_of_clip() {
        let files = hugging_face_files(&crate::clip::ClipConfig::tiny().text);
        let text = |name: &str| &files.iter().find(|(file, _)| *file == name).unwrap().1;
        let vocabulary: BTreeMap<String, usize> = serde_json::from_str(text("vocab.json")).unwrap();
        assert_eq!(vocabulary.len(), ClipTokenizer::VOCAB_SIZE);
        // As in the published vocab.json.
        for (name, id) in [("!", 0), ("a</w>", 320), ("cat</w>", 2368), (END, 49407), ("in", 512)] {
            assert_eq!(vocabulary[name], id, "{name}");
        }
        let merges = text("merges.txt");
        assert!(merges.starts_with("#version: 0.2\ni n\nt h\n"), "{}", &merges[..40]);
        assert_eq!(merges.lines().count(), 48_895);
        // FNV-1a of the published merges, of which CLIP takes the first 48,894.
        let hash =
            merges.bytes().fold(0xcbf2_9ce4_8422_2325u64, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3));
        assert_eq!(hash, 0x0f46_2047_b8e6_81cf);
        let other = crate::clip::ClipConfig::tiny().text.with_vocab_size(100);
        assert!(hugging_face_files(&other).is_empty());
    }
}
