//! Training on the part of the vocabulary that occurs.

use std::iter;

use burn::module::Param;
use burn::tensor::{IndexingUpdateOp, Int, Tensor, TensorData};

use super::data::ImageTextSet;
use crate::{
    clip::{Clip, EndOfText, tokenizer::ClipTokenizer},
    support::param::with_value,
};

/// The token ids that occur in a data set, in ascending order, and their places.
///
/// An optimiser moves every row of the token embedding at every step; of CLIP's 49,408 a small data set has a few thousand. Rows
/// that never occur get no gradient, so leaving them out and putting them back changes no result (the recipe does not decay
/// embeddings). Order is kept, so the end-of-text token still has the highest id.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CompactVocabulary {
    ids: Vec<i32>,
}

impl CompactVocabulary {
    /// The ids that occur, and 0, which pads.
    pub fn new(occurring: impl IntoIterator<Item = i32>) -> Self {
        let mut ids: Vec<i32> = occurring.into_iter().chain([0]).collect();
        ids.sort_unstable();
        ids.dedup();
        Self { ids }
    }

    /// All ids, for captions that are not known beforehand.
    pub fn whole(vocab_size: usize) -> Self {
        Self { ids: (0..vocab_size as i32).collect() }
    }

    /// The ids of all captions and tags of some sets.
    pub fn of_sets(sets: &[&ImageTextSet], tokenizer: &ClipTokenizer) -> Self {
        let captions = sets.iter().flat_map(|set| set.concepts()).flat_map(|concept| &concept.captions);
        let texts = captions.flat_map(|caption| iter::once(&caption.text).chain(&caption.tags));
        let mut ids: Vec<i32> = texts.flat_map(|text| tokenizer.encode(text)).collect();
        ids.extend(tokenizer.encode(","));
        ids.extend(tokenizer.pack::<[i32; 0]>(&[[]], 2).ids);
        Self::new(ids)
    }

    /// Number of ids that occur.
    pub fn len(&self) -> usize {
        self.ids.len()
    }

    /// Never: padding is always there.
    pub fn is_empty(&self) -> bool {
        self.ids.is_empty()
    }

    /// The place of an id.
    ///
    /// # Panics
    /// When the id does not occur.
    pub fn place(&self, id: i32) -> i32 {
        self.ids.binary_search(&id).unwrap_or_else(|_| panic!("token id {id} is not in the compact vocabulary")) as i32
    }

    /// Replaces every id by its place.
    ///
    /// # Panics
    /// When an id does not occur.
    pub fn compact_ids(&self, ids: &mut [i32]) {
        ids.iter_mut().for_each(|id| *id = self.place(*id));
    }

    /// The model with only the embeddings of occurring ids; a fixed end-of-text id becomes its place.
    ///
    /// # Panics
    /// When a fixed end-of-text id does not occur.
    pub fn compact(&self, mut model: Clip) -> Clip {
        model.text.token_embedding.weight = self.map(model.text.token_embedding.weight, |weight, ids| weight.select(0, ids));
        if let EndOfText::Id(id) = model.text.end_of_text {
            model.text.end_of_text = EndOfText::Id(self.place(id as i32).into());
        }
        model
    }

    /// The compact model's embeddings back in the place they had in `full`.
    pub fn restore(&self, mut compact: Clip, full: &Clip) -> Clip {
        compact.text.end_of_text = full.text.end_of_text;
        let original = full.text.token_embedding.weight.val().detach();
        compact.text.token_embedding.weight = self.map(compact.text.token_embedding.weight, |weight, ids| {
            let original = Tensor::from_data(original.into_data(), &weight.device());
            let change = weight - original.clone().select(0, ids.clone());
            original.select_assign(0, ids, change, IndexingUpdateOp::Add)
        });
        compact
    }

    fn map(&self, weight: Param<Tensor<2>>, f: impl FnOnce(Tensor<2>, Tensor<1, Int>) -> Tensor<2>) -> Param<Tensor<2>> {
        with_value(weight, |weight| {
            let ids = Tensor::from_data(TensorData::new(self.ids.clone(), [self.ids.len()]), &weight.device());
            f(weight, ids)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clip::ClipConfig;
    use burn::module::Module;
    use burn::tensor::Device;

    #[test]
    fn a_compact_model_embeds_the_same_and_finds_its_way_back() {
        let device = Device::default();
        let full = ClipConfig::tiny().init(&device);
        let vocabulary = CompactVocabulary::new([49406, 320, 49407, 320]);
        assert_eq!(vocabulary.len(), 4);
        let compact = vocabulary.compact(full.clone());
        let ids = [49406, 320, 49407, 0];
        let tokens = Tensor::<2, Int>::from_data([ids], &device);
        let places = Tensor::<2, Int>::from_data([ids.map(|id| vocabulary.place(id))], &device);
        let same = compact.encode_text(places).embedding.equal(full.encode_text(tokens).embedding);
        assert!(same.all().into_scalar::<bool>());
        let back = vocabulary.restore(compact, &full);
        let same = back.text.token_embedding.weight.val().equal(full.text.token_embedding.weight.val());
        assert!(same.all().into_scalar::<bool>());
        assert_eq!(back.num_params(), full.num_params());
    }
}
