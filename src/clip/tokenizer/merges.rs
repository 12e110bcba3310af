//! The merges of CLIP's vocabulary, which the tokenizer does not tell: they follow from the order of its tokens.

use std::collections::HashMap;

use instant_clip_tokenizer::{Token, Tokenizer};

/// What marks the last token of a word.
const END_OF_WORD: &str = "</w>";

/// The first merges, in the form of the file `merges.txt`; as many as there are if `count` is larger.
pub(in crate::clip) fn first_merges(count: usize) -> String {
    merges_text(&names(&Tokenizer::new(), count))
}

/// The merges that make these tokens, in the form of the file `merges.txt`.
pub(super) fn merges_text(names: &[(Vec<u8>, String)]) -> String {
    let mut text = "#version: 0.2\n".to_string();
    for [left, right] in merges_of(names) {
        text += &format!("{} {}\n", names[left].1, names[right].1);
    }
    text
}

/// The letter that stands for each byte, and the bytes in the order of their tokens: printable ones stand for themselves, and come first.
fn alphabet() -> Vec<(u8, char)> {
    let is_printable = |byte: &u8| matches!(byte, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff);
    let (printable, others): (Vec<u8>, Vec<u8>) = (0..=255).partition(is_printable);
    let others = others.into_iter().zip('\u{100}'..);
    printable.into_iter().map(|byte| (byte, char::from(byte))).chain(others).collect()
}

/// The tokens that single bytes and the first merges make: their bytes, and their names in the alphabet of bytes.
pub(super) fn names(tokenizer: &Tokenizer, merges: usize) -> Vec<(Vec<u8>, String)> {
    let alphabet = alphabet();
    let letter_of: HashMap<u8, char> = alphabet.iter().copied().collect();
    let token_of: HashMap<u8, u16> = (0..).zip(&alphabet).map(|(token, (byte, _))| (*byte, token)).collect();
    let letters = |bytes: &[u8]| bytes.iter().map(|byte| letter_of[byte]).collect::<String>();
    let single = |end: &'static str| alphabet.iter().map(move |(byte, letter)| (vec![*byte], format!("{letter}{end}")));
    let mut names: Vec<(Vec<u8>, String)> = single("").chain(single(END_OF_WORD)).collect();
    let end = names.len().saturating_add(merges).min(tokenizer.start_of_text().to_u16().into());
    for id in names.len() as u16..end as u16 {
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
