//! How well a model retrieves, and what its experts did.

use std::collections::BTreeMap;

use burn::module::Module;
use burn::tensor::{Device, Tensor};

use super::{
    CompactVocabulary,
    data::{Caption, ImageTextSet},
};
use crate::{
    clip::{Clip, Recall, RetrievalError, RetrievalMetrics, tokenizer::ClipTokenizer},
    routing::Routing,
    stats::RoutingStats,
};

/// Samples in one forward pass. A result does not depend on it while inference is dropless.
const BATCH: usize = 256;

/// What a model scores on a set.
#[derive(Debug, Clone, PartialEq)]
pub struct Evaluation {
    /// Retrieval in both directions.
    pub retrieval: RetrievalMetrics,
    /// Text to image by the language of the caption, where the set says it.
    pub by_language: BTreeMap<String, Recall>,
    /// One per routed block; empty for a dense model.
    pub layers: Vec<LayerStats>,
    /// Captions that were cut to the context.
    pub truncated: usize,
}

/// Routing statistics of one routed block over a whole set.
#[derive(Debug, Clone, PartialEq, serde::Serialize)]
pub struct LayerStats {
    /// Path in the model.
    pub path: String,
    /// Means over the batches.
    #[serde(flatten)]
    pub stats: RoutingStats,
}

impl Evaluation {
    /// An evaluation of which only the ranks are left.
    pub(super) fn from_ranks(set: &ImageTextSet, text_ranks: Vec<usize>, image_ranks: Vec<usize>) -> Self {
        let by_language = by_language(set, &text_ranks);
        Self { retrieval: RetrievalMetrics::from_ranks(text_ranks, image_ranks), by_language, layers: Vec::new(), truncated: 0 }
    }
}

fn by_language(set: &ImageTextSet, text_ranks: &[usize]) -> BTreeMap<String, Recall> {
    let mut ranks: BTreeMap<&String, Vec<usize>> = BTreeMap::new();
    for ((_, caption), rank) in set.queries().zip(text_ranks) {
        if let Some(language) = &caption.language {
            ranks.entry(language).or_default().push(*rank);
        }
    }
    ranks.into_iter().map(|(language, ranks)| (language.clone(), Recall::from_ranks(&ranks))).collect()
}

/// Embeds every image and every caption of its concept, and ranks them. Equal captions are one: every image with a caption equal to the query
/// is a right answer ([`RetrievalMetrics::with_equal_texts`]).
///
/// # Errors
/// When the set is empty, or an embedding is not finite.
///
/// # Panics
/// When the images were prepared in another way than the model expects.
pub fn evaluate(
    model: &Clip,
    set: &ImageTextSet,
    tokenizer: &ClipTokenizer,
    context_length: usize,
    vocabulary: Option<&CompactVocabulary>,
    device: &Device,
) -> Result<Evaluation, RetrievalError> {
    let (found, expected) = (set.preprocessing(), &model.vision.preprocessing);
    assert!(found == expected, "the images were prepared with {found:?}, but the model expects {expected:?}");
    let model = model.valid();
    let device = device.clone().inner();
    let mut collector = Collector::default();

    let images = (0..set.len()).step_by(BATCH).map(|start| {
        let output = model.encode_image(set.images(start..(start + BATCH).min(set.len()), &device));
        collector.add("vision", &output.routings);
        output.embedding
    });
    let images: Vec<Tensor<2>> = images.collect();

    let captions: Vec<(usize, &Caption)> = set.queries().collect();
    if images.is_empty() || captions.is_empty() {
        return Err(RetrievalError::Empty { images: set.len(), texts: captions.len() });
    }
    let all: Vec<&String> = captions.iter().map(|(_, caption)| &caption.text).collect();
    let same_text = tokenizer.same_text(&all);
    let mut truncated = 0;
    let mut texts = Vec::new();
    for batch in all.chunks(BATCH) {
        let mut tokens = tokenizer.tokenize(batch, context_length);
        truncated += tokens.truncated;
        if let Some(vocabulary) = vocabulary {
            vocabulary.compact_ids(&mut tokens.ids);
        }
        let output = model.encode_text(tokens.tensor(&device));
        collector.add("text", &output.routings);
        texts.push(output.embedding);
    }
    let image_of_text: Vec<usize> = captions.iter().map(|(image, _)| *image).collect();
    let retrieval = RetrievalMetrics::with_equal_texts(Tensor::cat(images, 0), Tensor::cat(texts, 0), &image_of_text, &same_text)?;
    let by_language = by_language(set, &retrieval.text_ranks);
    Ok(Evaluation { retrieval, by_language, layers: collector.finish(&model), truncated })
}

/// Routing statistics by tower and place among its routed blocks.
#[derive(Default)]
struct Collector {
    batches: Vec<(&'static str, usize, RoutingStats)>,
}

impl Collector {
    fn add(&mut self, tower: &'static str, routings: &[Routing]) {
        self.batches.extend(routings.iter().enumerate().map(|(place, routing)| (tower, place, RoutingStats::new(routing))));
    }

    fn finish(&self, model: &Clip) -> Vec<LayerStats> {
        let towers = [("vision", &model.vision.encoder), ("text", &model.text.encoder)];
        let mut layers = Vec::new();
        for (tower, encoder) in towers {
            for (place, block) in encoder.routed_blocks().enumerate() {
                let batches: Vec<RoutingStats> =
                    self.batches.iter().filter(|b| (b.0, b.1) == (tower, place)).map(|b| b.2.clone()).collect();
                if let Some(stats) = RoutingStats::mean(&batches) {
                    layers.push(LayerStats { path: format!("{tower}.encoder.blocks.{block}"), stats });
                }
            }
        }
        layers
    }
}
