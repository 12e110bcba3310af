//! How well a model retrieves, and what its experts did.

use burn::module::Module;
use burn::tensor::{Device, Tensor};

use super::{CompactVocabulary, data::ImageTextSet};
use crate::{
    clip::{Clip, RetrievalError, RetrievalMetrics, tokenizer::ClipTokenizer},
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
    pub(super) fn from_ranks(text_ranks: Vec<usize>, image_ranks: Vec<usize>) -> Self {
        Self { retrieval: RetrievalMetrics::from_ranks(text_ranks, image_ranks), layers: Vec::new(), truncated: 0 }
    }
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

    let captions: Vec<(usize, &String)> = set
        .concept_of_image()
        .iter()
        .enumerate()
        .flat_map(|(image, &concept)| set.concepts()[concept].captions.iter().map(move |caption| (image, caption)))
        .collect();
    if images.is_empty() || captions.is_empty() {
        return Err(RetrievalError::Empty { images: set.len(), texts: captions.len() });
    }
    let tokenizer = ClipTokenizer::new();
    let all: Vec<&String> = captions.iter().map(|(_, caption)| *caption).collect();
    let same_text = tokenizer.same_text(&all);
    let mut truncated = 0;
    let mut texts = Vec::new();
    for batch in captions.chunks(BATCH) {
        let batch: Vec<&String> = batch.iter().map(|(_, caption)| *caption).collect();
        let mut tokens = tokenizer.tokenize(&batch, context_length);
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
    Ok(Evaluation { retrieval, layers: collector.finish(&model), truncated })
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
