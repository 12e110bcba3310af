//! CLIP's vocabulary as transformers' `CLIPTokenizer` reads it.

use std::collections::{BTreeMap, HashMap};

use instant_clip_tokenizer::{Token, Tokenizer};
use serde_json::json;

use super::ClipTokenizer;
use crate::clip::TextConfig;

const START: &str = "<|startoftext|>";
const END: &str = "<|endoftext|>";
/// What marks the last token of a word.
const END_OF_WORD: &str = "</w>";

/// The names and texts of a tokenizer's files; none for a model with another vocabulary than CLIP's.
pub(in crate::clip) fn hugging_face_files(text: &TextConfig) -> Vec<(&'static str, String)> {
    if text.vocab_size != ClipTokenizer::VOCAB_SIZE {
        return Vec::new();
    }
    let names = names(&Tokenizer::new());
    let mut merges = "#version: 0.2\n".to_string();
    for [left, right] in merges_of(&names) {
        merges += &format!("{} {}\n", names[left].1, names[right].1);
    }
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

/// The letter that stands for each byte, and the bytes in the order of their tokens: printable ones stand for themselves, and come first.
fn alphabet() -> Vec<(u8, char)> {
    let is_printable = |byte: &u8| matches!(byte, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff);
    let (printable, others): (Vec<u8>, Vec<u8>) = (0..=255).partition(is_printable);
    let others = others.into_iter().zip('\u{100}'..);
    printable.into_iter().map(|byte| (byte, char::from(byte))).chain(others).collect()
}

/// Every token but the two special ones: its bytes, and its name in the alphabet of bytes.
fn names(tokenizer: &Tokenizer) -> Vec<(Vec<u8>, String)> {
    let alphabet = alphabet();
    let letter_of: HashMap<u8, char> = alphabet.iter().copied().collect();
    let token_of: HashMap<u8, u16> = (0..).zip(&alphabet).map(|(token, (byte, _))| (*byte, token)).collect();
    let letters = |bytes: &[u8]| bytes.iter().map(|byte| letter_of[byte]).collect::<String>();
    let single = |end: &'static str| alphabet.iter().map(move |(byte, letter)| (vec![*byte], format!("{letter}{end}")));
    let mut names: Vec<(Vec<u8>, String)> = single("").chain(single(END_OF_WORD)).collect();
    for id in names.len() as u16..tokenizer.start_of_text().to_u16() {
        let (bytes, is_end) = bytes_of(tokenizer, &token_of, id);
        let name = letters(&bytes) + if is_end { END_OF_WORD } else { "" };
        names.push((bytes, name));
    }
    names
}

/// The bytes of a token, and whether it ends a word. The tokenizer decodes to text only, so that a token which begins or ends inside of a
/// letter is decoded between bytes that complete one.
fn bytes_of(tokenizer: &Tokenizer, token_of: &HashMap<u8, u16>, id: u16) -> (Vec<u8>, bool) {
    const BEFORE: [&[u8]; 8] = [&[], &[0xc3], &[0xe2], &[0xe2, 0x80], &[0xf0], &[0xf0, 0x9f], &[0xf0, 0x9f, 0x98], &[0xf0, 0x90]];
    const BEHIND: [&[u8]; 4] = [&[], &[0x98], &[0xa0, 0x98], &[0x9f, 0x98, 0x98]];
    let between = |before: &[u8], behind: &[u8]| {
        let ids = before.iter().map(|byte| token_of[byte]).chain([id]).chain(behind.iter().map(|byte| token_of[byte]));
        tokenizer.decode(ids.map(|id| Token::from_u16(id, tokenizer).expect("an id of the vocabulary")))
    };
    for before in BEFORE {
        for behind in BEHIND {
            let text = between(before, behind);
            let is_end = text.ends_with(' ');
            let bytes = text.strip_suffix(' ').unwrap_or(&text).as_bytes();
            if !text.contains(char::REPLACEMENT_CHARACTER) && !bytes.contains(&b' ') {
                return (bytes[before.len()..bytes.len() - behind.len()].to_vec(), is_end);
            }
        }
    }
    // One token is the replacement character itself.
    let text = between(&[], &[]);
    (text.trim_end().as_bytes().to_vec(), text.ends_with(' '))
}

/// The two tokens of which each token beyond the single bytes is made: what its bytes become when only the merges before it are applied.
fn merges_of(names: &[(Vec<u8>, String)]) -> Vec<[usize; 2]> {
    let token_of: HashMap<u8, usize> = names.iter().take(256).enumerate().map(|(token, (bytes, _))| (bytes[0], token)).collect();
    let mut merged: HashMap<[usize; 2], usize> = HashMap::new();
    let mut merges = Vec::new();
    for (id, (bytes, name)) in names.iter().enumerate().skip(512) {
        let mut parts: Vec<usize> = bytes.iter().map(|byte| token_of[byte]).collect();
        if name.ends_with(END_OF_WORD) {
            *parts.last_mut().expect("a token has bytes") += 256;
        }
        while parts.len() > 2 {
            let pairs = parts.windows(2).enumerate().filter_map(|(at, pair)| Some((*merged.get(&[pair[0], pair[1]])?, at)));
            let (token, at) = pairs.min().unwrap_or_else(|| panic!("token {id} of CLIP's vocabulary is not made of others"));
            parts.splice(at..at + 2, [token]);
        }
        let pair = [parts[0], parts[1]];
        merged.insert(pair, id);
        merges.push(pair);
    }
    merges
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
