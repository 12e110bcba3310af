//! The text tower.

use burn::config::Config;
use burn::module::{Module, Param};
use burn::nn::{Embedding, EmbeddingConfig, Initializer, LayerNorm, LayerNormConfig, Linear, LinearConfig};
use burn::tensor::{Bool, Device, Int, Tensor};
use serde::{Deserialize, Serialize};

use super::vision::normed;
use crate::{
    routing::Routing,
    support::{
        cost::Cost,
        error::{ConfigError, expect_valid},
    },
    transformer::{BlockRouter, Encoder, EncoderConfig, EncoderOutput, FeedForwardInputs, TokenMarks},
};

/// Which token of a text is its end, whose output is the embedding.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum EndOfText {
    /// The first occurrence of the highest id in the text (OpenAI, open_clip; transformers when `eos_token_id` is 2).
    HighestId,
    /// The first occurrence of this id; the first token of a text that does not have it (transformers otherwise).
    Id(i64),
}

/// Ids of CLIP's own vocabulary, with the start and end tokens.
pub(crate) const CLIP_VOCAB_SIZE: usize = 49408;

/// Ids without any merge: each byte inside and at the end of a word, and the start and end tokens.
#[cfg(any(feature = "preprocess", feature = "store"))]
pub(crate) const SMALLEST_CLIP_VOCAB_SIZE: usize = 514;

/// What made the token ids of the texts that a tower was trained on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum TokenizerKind {
    /// CLIP's byte-pair encoding. With fewer ids than its 49,408 its first merges only, as many as there are ids for.
    ClipBpe,
    /// Any other, which this crate does not have.
    Other,
}

/// Configuration of a [`TextTower`].
#[derive(Config, Debug)]
pub struct TextConfig {
    /// The transformer.
    pub encoder: EncoderConfig,
    /// Number of token ids. Default: 49408, CLIP's own
    #[config(default = "CLIP_VOCAB_SIZE")]
    pub vocab_size: usize,
    /// What makes the token ids. Default: `ClipBpe`
    #[config(default = "TokenizerKind::ClipBpe")]
    pub tokenizer: TokenizerKind,
    /// Most tokens in a text. Default: 77
    #[config(default = 77)]
    pub context_length: usize,
    /// Which token is the end. Default: `HighestId`
    #[config(default = "EndOfText::HighestId")]
    pub end_of_text: EndOfText,
    /// Whether the projection has a bias; open_clip's `proj_bias`. Default: false
    #[config(default = false)]
    pub projection_bias: bool,
    /// Whether there is a norm behind the blocks. Default: true
    #[config(default = true)]
    pub norm_final: bool,
}

/// A causal transformer; the end-of-text token's output is the embedding. What follows that token is padding and is kept out of
/// routing.
#[derive(Module, Debug)]
pub struct TextTower {
    /// `[vocab_size, D]`
    pub token_embedding: Embedding,
    /// `[context_length, D]`
    pub position_embedding: Param<Tensor<2>>,
    /// The blocks.
    pub encoder: Encoder,
    /// Behind the blocks.
    pub norm_final: Option<LayerNorm>,
    /// To the shared embedding space, `[D, P]`; with a bias in some checkpoints.
    pub projection: Linear,
    /// Which token is the end.
    #[module(skip)]
    pub end_of_text: EndOfText,
    /// What makes the token ids.
    #[module(skip)]
    pub tokenizer: TokenizerKind,
}

/// What a [`TextTower`] returns (`B` texts of `N` tokens).
#[derive(Debug, Clone)]
pub struct TextOutput {
    /// Embedding, not normalised, `[B, P]`.
    pub embedding: Tensor<2>,
    /// Tokens behind the final norm, if there is one, `[B, N, D]`; in training of no meaning behind the end of a text.
    pub hidden: Tensor<3>,
    /// One per routed block.
    pub routings: Vec<Routing>,
}

impl TextConfig {
    /// Refuses what no tower can be built from.
    ///
    /// # Errors
    /// The first field that cannot be used, with its value.
    pub fn validate(&self) -> Result<(), ConfigError> {
        ConfigError::non_zero("vocab_size", self.vocab_size)?;
        ConfigError::non_zero("context_length", self.context_length)?;
        if self.encoder.rotary.is_some() {
            let reason = "the tokens of a text have no column and row: leave it `None`, texts have a table of positions";
            return Err(ConfigError::Refused { field: "text.encoder.rotary", reason });
        }
        self.encoder.validate()
    }

    /// Whether a reader who is told only the number of ids would take the tokenizer for CLIP's, and it is not.
    #[cfg(feature = "store")]
    pub(super) fn hides_its_tokenizer(&self) -> bool {
        self.tokenizer == TokenizerKind::Other && self.vocab_size == CLIP_VOCAB_SIZE
    }

    /// Cost of one text of `context_length` tokens. An embedding look-up counts as no operation.
    pub fn cost(&self, embed_dim: usize) -> Cost {
        let d = self.encoder.d_model;
        let norm = if self.norm_final { 2 } else { 0 };
        let embeddings = Cost::params((self.vocab_size + self.context_length + norm) * d); // tokens, positions, one norm
        embeddings + self.encoder.cost(self.context_length) + Cost::linear(1, d, embed_dim, self.projection_bias)
    }

    /// A new tower with embeddings of width `embed_dim`.
    ///
    /// # Panics
    /// With the text of [`validate`](Self::validate).
    pub fn init(&self, embed_dim: usize, device: &Device) -> TextTower {
        expect_valid(self.validate());
        let d_model = self.encoder.d_model;
        let normal = |std| Initializer::Normal { mean: 0.0, std };
        TextTower {
            token_embedding: EmbeddingConfig::new(self.vocab_size, d_model).with_initializer(normal(0.02)).init(device),
            position_embedding: normal(0.01).init([self.context_length, d_model], device),
            encoder: self.encoder.init(device),
            norm_final: self.norm_final.then(|| LayerNormConfig::new(d_model).with_epsilon(self.encoder.norm_epsilon).init(device)),
            projection: LinearConfig::new(d_model, embed_dim)
                .with_bias(self.projection_bias)
                .with_initializer(normal((d_model as f64).powf(-0.5)))
                .init(device),
            end_of_text: self.end_of_text,
            tokenizer: self.tokenizer,
        }
    }
}

impl TextTower {
    /// Embeds texts.
    ///
    /// # Shapes
    /// - tokens: `[B, N]` token ids with start and end tokens, `N` at most `context_length`
    ///
    /// # Panics
    /// When a text is longer than `context_length`.
    pub fn forward(&self, tokens: Tensor<2, Int>) -> TextOutput {
        let (x, marks, end) = self.embed(tokens);
        self.project(self.encoder.forward(x, marks, true), end)
    }

    /// The embeddings of texts alone: those of [`forward`](Self::forward) to rounding, from what they depend on. On a CPU, what follows the end of a
    /// text costs nothing, and the last block is computed for that end only (on an autodiff device, in whole).
    ///
    /// # Shapes
    /// - tokens: `[B, N]` token ids with start and end tokens, `N` at most `context_length`
    /// - output: `[B, P]`, not normalised
    ///
    /// # Panics
    /// As [`forward`](Self::forward).
    pub fn embedding(&self, tokens: Tensor<2, Int>) -> Tensor<2> {
        let (x, marks, end) = self.embed(tokens);
        let ends = self.encoder.forward_at(x, marks, true, end);
        self.projection.forward(normed(&self.norm_final, ends))
    }

    /// The same as [`forward`](Self::forward) with a router of your own for the routed blocks; see [`Encoder::forward_with`].
    ///
    /// # Panics
    /// As [`forward`](Self::forward), and when a plan does not fit its block.
    pub fn forward_with(&self, tokens: Tensor<2, Int>, router: &mut dyn BlockRouter) -> TextOutput {
        let (x, marks, end) = self.embed(tokens);
        self.project(self.encoder.forward_with(x, marks, true, router), end)
    }

    /// From what comes out of the blocks.
    pub(crate) fn project(&self, encoded: EncoderOutput, end: Tensor<2, Int>) -> TextOutput {
        let [batch, _, d_model] = encoded.hidden.dims();
        let hidden = normed(&self.norm_final, encoded.hidden);
        let index = end.reshape([batch, 1, 1]).expand([batch, 1, d_model]);
        let embedding = self.projection.forward::<2>(hidden.clone().gather(1, index).squeeze_dim(1));
        TextOutput { embedding, hidden, routings: encoded.routings }
    }

    /// What the feed-forward network of each block reads for these texts.
    ///
    /// # Panics
    /// As [`forward`](Self::forward).
    pub fn feed_forward_inputs(&self, tokens: Tensor<2, Int>) -> FeedForwardInputs {
        let (x, marks, _) = self.embed(tokens);
        self.encoder.feed_forward_inputs(x, marks, true)
    }

    /// What goes into the blocks, `[B, N, D]`, and where each text ends, `[B, 1]`.
    pub(crate) fn embed(&self, tokens: Tensor<2, Int>) -> (Tensor<3>, TokenMarks, Tensor<2, Int>) {
        let [_, len] = tokens.dims();
        let [context_length, _] = self.position_embedding.shape().dims();
        assert!(len <= context_length, "texts of {len} tokens are longer than the context of {context_length}");
        let end = self.end_of_text.position(tokens.clone());
        let marks = TokenMarks { valid: Some(not_after(&end, len)), protected: Some(is_at(&end, len)), grid: None };

        let positions = self.position_embedding.val().narrow(0, 0, len);
        (self.token_embedding.forward(tokens) + positions.unsqueeze(), marks, end)
    }
}

impl EndOfText {
    /// Position of each text's end, `[B, N] -> [B, 1]`.
    pub(crate) fn position(&self, tokens: Tensor<2, Int>) -> Tensor<2, Int> {
        let [batch, len] = tokens.dims();
        let is_end = match self {
            Self::HighestId => tokens.clone().equal(tokens.clone().max_dim(1).expand([batch, len])),
            Self::Id(id) => tokens.clone().equal_elem(*id),
        };
        let positions = Tensor::<1, Int>::arange(0..len as i64, &tokens.device()).unsqueeze::<2>().expand([batch, len]);
        let first = positions.mask_fill(is_end.bool_not(), len as i64).min_dim(1);
        let absent = first.clone().equal_elem(len as i64);
        first.mask_fill(absent, 0)
    }
}

/// `[B, N]`, true up to and including each end.
fn not_after(end: &Tensor<2, Int>, len: usize) -> Tensor<2, Bool> {
    let [batch, _] = end.dims();
    positions(end, len).lower_equal(end.clone().expand([batch, len]))
}

/// `[B, N]`, true at each end.
fn is_at(end: &Tensor<2, Int>, len: usize) -> Tensor<2, Bool> {
    let [batch, _] = end.dims();
    positions(end, len).equal(end.clone().expand([batch, len]))
}

fn positions(end: &Tensor<2, Int>, len: usize) -> Tensor<2, Int> {
    let [batch, _] = end.dims();
    Tensor::<1, Int>::arange(0..len as i64, &end.device()).unsqueeze::<2>().expand([batch, len])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_end_is_the_first_of_its_kind() {
        let tokens = Tensor::<2, Int>::from_data([[1, 5, 9, 9, 0], [1, 2, 3, 4, 9], [1, 2, 3, 4, 5]], &Device::default());
        let at = |rule: EndOfText| rule.position(tokens.clone()).try_into_vec_as::<i32>().unwrap();
        assert_eq!(at(EndOfText::HighestId), [2, 4, 4]);
        assert_eq!(at(EndOfText::Id(9)), [2, 4, 0]);
    }

    #[test]
    #[should_panic(expected = "texts of 5 tokens are longer than the context of 4")]
    fn a_text_must_fit_the_context() {
        let device = Device::default();
        let config = TextConfig::new(EncoderConfig::new(8, 2, 1, 16)).with_vocab_size(10).with_context_length(4);
        config.init(4, &device).forward(Tensor::zeros([1, 5], &device));
    }
}
