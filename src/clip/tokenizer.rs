//! CLIP's byte-pair encoding.

mod merges;

#[cfg(feature = "store")]
mod export;

#[cfg(feature = "store")]
pub(super) use export::hugging_face_files;
#[cfg(feature = "store")]
pub(super) use merges::first_merges;

use std::collections::HashMap;

use burn::tensor::{Device, Int, Tensor, TensorData};
use instant_clip_tokenizer::{Token, Tokenizer};
use unicode_normalization::UnicodeNormalization;

use super::{
    EndOfText, TextTower, TokenizerKind,
    text::{CLIP_VOCAB_SIZE, SMALLEST_CLIP_VOCAB_SIZE},
};

/// CLIP's own tokenizer with open_clip's treatment of long texts. The vocabulary comes with it.
///
/// A small model does not need all of its 49,408 ids: [`with_vocab_size`](Self::with_vocab_size) applies the first merges only, so that texts
/// become more and shorter tokens.
pub struct ClipTokenizer {
    tokenizer: Tokenizer,
}

impl std::fmt::Debug for ClipTokenizer {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        f.debug_struct("ClipTokenizer").finish_non_exhaustive()
    }
}

/// A text tower that was trained with another tokenizer than CLIP's.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum TokenizerMismatch {
    /// The model's token ids are not those of the tokenizer.
    #[error(
        "the model's {model} token ids are not known to be those of CLIP's tokenizer ({} ids, or its first merges): this model was trained with another \
         tokenizer, by its number of ids or by the files beside it (`merges.txt`, `tokenizer.json`, `tokenizer_config.json`, `bpe_path`)",
        ClipTokenizer::VOCAB_SIZE
    )]
    Vocabulary {
        /// Rows of the model's token embedding.
        model: usize,
    },
    /// The model looks for the end of a text at an id that stands for something else.
    #[error(
        "the model's texts end with token {model}, but those of CLIP's tokenizer with {tokenizer}: this model was trained with another tokenizer"
    )]
    EndOfText {
        /// The id that the model looks for.
        model: i64,
        /// The id that the tokenizer writes.
        tokenizer: i64,
    },
}

/// Texts as token ids of one length.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TokenizedTexts {
    /// `[B · N]`: start token, text, end token, zeros.
    pub ids: Vec<i32>,
    /// Tokens per text, `N`.
    pub len: usize,
    /// How many texts were cut because they did not fit.
    pub truncated: usize,
}

impl Default for ClipTokenizer {
    fn default() -> Self {
        Self::new()
    }
}

impl ClipTokenizer {
    /// Ids of the whole vocabulary, with the start and end tokens.
    pub const VOCAB_SIZE: usize = CLIP_VOCAB_SIZE;
    /// Ids without any merge: each byte inside and at the end of a word, and the start and end tokens.
    pub const SMALLEST_VOCAB_SIZE: usize = SMALLEST_CLIP_VOCAB_SIZE;

    /// The whole vocabulary. It takes a moment to unpack: keep it.
    pub fn new() -> Self {
        Self { tokenizer: Tokenizer::new() }
    }

    /// The same with the first merges only, so that there are `vocab_size` ids; those of the start and the end token are the last two.
    ///
    /// # Panics
    /// When the size is below [`SMALLEST_VOCAB_SIZE`](Self::SMALLEST_VOCAB_SIZE) or above [`VOCAB_SIZE`](Self::VOCAB_SIZE).
    pub fn with_vocab_size(vocab_size: usize) -> Self {
        let (least, most) = (Self::SMALLEST_VOCAB_SIZE, Self::VOCAB_SIZE);
        assert!((least..=most).contains(&vocab_size), "CLIP's tokenizer has {least} to {most} ids, not {vocab_size}");
        if vocab_size == Self::VOCAB_SIZE {
            return Self::new();
        }
        let merges = merges::first_merges(vocab_size - Self::SMALLEST_VOCAB_SIZE);
        let tokenizer = Tokenizer::with_vocabulary(merges.as_bytes(), vocab_size as u16);
        Self { tokenizer: tokenizer.expect("the merges are CLIP's") }
    }

    /// The tokenizer that a text tower was trained with, or is to be trained with.
    ///
    /// # Errors
    /// When that is not CLIP's, or the tower looks for the end of a text at another token.
    pub fn for_model(text: &TextTower) -> Result<Self, TokenizerMismatch> {
        let [model, _] = text.token_embedding.weight.lazy_shape().dims();
        if text.tokenizer != TokenizerKind::ClipBpe || !(Self::SMALLEST_VOCAB_SIZE..=Self::VOCAB_SIZE).contains(&model) {
            return Err(TokenizerMismatch::Vocabulary { model });
        }
        let tokenizer = model as i64 - 1;
        match text.end_of_text {
            EndOfText::Id(model) if model != tokenizer => Err(TokenizerMismatch::EndOfText { model, tokenizer }),
            EndOfText::Id(_) | EndOfText::HighestId => Ok(Self::with_vocab_size(model)),
        }
    }

    /// Number of ids.
    pub fn vocab_size(&self) -> usize {
        usize::from(self.tokenizer.end_of_text().to_u16()) + 1
    }

    /// Token ids of a text, without start and end. As in open_clip's clean-up, curly quotes count as straight ones, HTML entities as what they
    /// stand for (twice, as `&amp;lt;` is common), a letter and its accent as one letter (NFC), and white space as single spaces. What else ftfy
    /// mends (mojibake, ligatures, full-width letters) is left as it is.
    pub fn encode(&self, text: &str) -> Vec<i32> {
        let once = htmlize::unescape(text);
        let twice = htmlize::unescape(once.as_ref());
        let mut straight = String::with_capacity(twice.len());
        for word in twice.split_whitespace() {
            if !straight.is_empty() {
                straight.push(' ');
            }
            straight.extend(word.nfc().map(|c| match c {
                '\u{2bc}' | '\u{2018}'..='\u{201b}' => '\'',
                '\u{201c}'..='\u{201f}' => '"',
                c => c,
            }));
        }
        let mut tokens = Vec::new();
        self.tokenizer.encode(&straight, &mut tokens);
        tokens.into_iter().map(|token: Token| i32::from(token.to_u16())).collect()
    }

    /// The text of some ids. A token that ends a word ends with a space; start and end are `<start_of_text>` and `<end_of_text>`; bytes that are no
    /// whole letter become the replacement character.
    ///
    /// # Panics
    /// When an id is not one of the tokenizer's.
    pub fn decode(&self, ids: &[i32]) -> String {
        let token = |id: &i32| {
            let found = u16::try_from(*id).ok().and_then(|id| Token::from_u16(id, &self.tokenizer));
            found.unwrap_or_else(|| panic!("{id} is no id of a tokenizer of {} ids", self.vocab_size()))
        };
        self.tokenizer.decode(ids.iter().map(token))
    }

    /// Puts start and end tokens around encoded texts and pads them to the longest. A text that does not fit into
    /// `context_length` keeps its beginning and its end token, as in open_clip.
    ///
    /// # Panics
    /// When the context has no room for the start and end tokens.
    pub fn pack<T: AsRef<[i32]>>(&self, texts: &[T], context_length: usize) -> TokenizedTexts {
        assert!(context_length >= 2, "a context of {context_length} has no room for the start and end tokens");
        let room = context_length - 2;
        let [start, end] = [self.tokenizer.start_of_text(), self.tokenizer.end_of_text()].map(|token| i32::from(token.to_u16()));
        let longest = texts.iter().map(|text| text.as_ref().len()).max().unwrap_or(0);
        let len = longest.min(room) + 2;
        let mut ids = Vec::with_capacity(texts.len() * len);
        for text in texts {
            let text = text.as_ref();
            let kept = &text[..text.len().min(room)];
            ids.push(start);
            ids.extend_from_slice(kept);
            ids.push(end);
            ids.resize(ids.len() + len - 2 - kept.len(), 0);
        }
        let truncated = texts.iter().filter(|text| text.as_ref().len() > room).count();
        TokenizedTexts { ids, len, truncated }
    }

    /// For each text the place of the first one that is equal to it, as CLIP's tokenizer reads them: capitals and the number of blanks do not
    /// count.
    pub fn same_text<T: AsRef<str>>(&self, texts: &[T]) -> Vec<usize> {
        first_of_equal(&texts.iter().map(|text| self.encode(text.as_ref())).collect::<Vec<_>>())
    }

    /// [`encode`](Self::encode) and [`pack`](Self::pack).
    pub fn tokenize<T: AsRef<str>>(&self, texts: &[T], context_length: usize) -> TokenizedTexts {
        let encoded: Vec<Vec<i32>> = texts.iter().map(|text| self.encode(text.as_ref())).collect();
        self.pack(&encoded, context_length)
    }
}

/// For each text the place of the first one with the same tokens, of which `tokens` are the ids: texts that no model can tell apart.
pub(crate) fn first_of_equal<T: AsRef<[i32]>>(tokens: &[T]) -> Vec<usize> {
    let mut first = HashMap::new();
    tokens.iter().enumerate().map(|(place, tokens)| *first.entry(tokens.as_ref()).or_insert(place)).collect()
}

impl TokenizedTexts {
    /// `[B, N]`
    pub fn tensor(&self, device: &Device) -> Tensor<2, Int> {
        let batch = self.ids.len() / self.len;
        Tensor::from_data(TensorData::new(self.ids.clone(), [batch, self.len]), device)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_are_padded_to_the_longest_and_cut_before_the_end_token() {
        let tokenizer = ClipTokenizer::new();
        // "hi" is 1883, "there" 997 in CLIP's vocabulary; 49406 and 49407 are start and end.
        let fits = tokenizer.tokenize(&["Hi", "hi there"], 77);
        assert_eq!(fits.ids, [49406, 1883, 49407, 0, 49406, 1883, 997, 49407]);
        assert_eq!((fits.len, fits.truncated), (4, 0));
        let cut = tokenizer.tokenize(&["hi there hi", "hi"], 4);
        assert_eq!(cut.ids, [49406, 1883, 997, 49407, 49406, 1883, 49407, 0]);
        assert_eq!((cut.len, cut.truncated), (4, 1));
    }

    #[test]
    fn a_smaller_vocabulary_has_the_first_merges() {
        let small = ClipTokenizer::with_vocab_size(1024);
        assert_eq!(small.vocab_size(), 1024);
        let ids = small.tokenize(&["hi there"], 24).ids;
        assert_eq!((ids[0], *ids.last().unwrap()), (1022, 1023));
        assert_eq!(small.decode(&ids), "<start_of_text>hi there <end_of_text>");
        // Merges come in order: what the whole vocabulary does with its first ones, the smaller one does with all of its own.
        let whole = ClipTokenizer::new();
        for word in ["in", "the", "and", "you"] {
            assert_eq!(small.encode(word), whole.encode(word), "{word}");
        }
        assert!(small.encode("watermelon").len() > whole.encode("watermelon").len());
        // Without any merge, a token is a byte.
        assert_eq!(ClipTokenizer::with_vocab_size(514).encode("caf\u{e9}").len(), 5);
    }

    #[test]
    #[should_panic(expected = "514 to 49408 ids, not 100")]
    fn a_vocabulary_holds_every_byte() {
        ClipTokenizer::with_vocab_size(100);
    }

    #[test]
    fn curly_quotes_are_straight_ones_and_accents_belong_to_their_letters() {
        let tokenizer = ClipTokenizer::new();
        assert_eq!(tokenizer.encode("cafe\u{301} a\u{30a}"), tokenizer.encode("caf\u{e9} \u{e5}"));
        assert_eq!(tokenizer.same_text(&["A dog", "a cat", "a  dog ", "dog"]), [0, 1, 0, 3]);
        assert_eq!(tokenizer.encode("woman\u{2019}s boot"), tokenizer.encode("woman's boot"));
    }
}
