//! Cross-modal retrieval by LAION CLIP_benchmark's protocol.

use std::collections::{BTreeMap, BTreeSet};

use burn::tensor::Tensor;

/// Recall of one direction, as fractions of the queries.
#[derive(Debug, Clone, Copy, PartialEq, serde::Serialize)]
pub struct Recall {
    /// Queries with a positive at rank 1.
    pub r1: f64,
    /// Queries with a positive among the best 5.
    pub r5: f64,
    /// Queries with a positive among the best 10.
    pub r10: f64,
}

/// Recall of both directions, and the ranks behind it.
#[derive(Debug, Clone, PartialEq)]
pub struct RetrievalMetrics {
    /// Texts looking for images.
    pub text_to_image: Recall,
    /// Images looking for texts.
    pub image_to_text: Recall,
    /// For each text, how many wrong images are at least as similar as its best positive; for paired tests.
    pub text_ranks: Vec<usize>,
    /// For each image, how many wrong texts are at least as similar as its best positive.
    pub image_ranks: Vec<usize>,
}

/// Embeddings that cannot be compared.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum RetrievalError {
    /// Nothing to look for, or nothing to find.
    #[error("retrieval needs at least one image and one text, got {images} images and {texts} texts")]
    Empty {
        /// Number of image embeddings.
        images: usize,
        /// Number of text embeddings.
        texts: usize,
    },
    /// Not one positive per text.
    #[error("{texts} texts come with {positives} positives")]
    Positives {
        /// Number of text embeddings.
        texts: usize,
        /// Length of the list of positives.
        positives: usize,
    },
    /// A positive that is not in the gallery.
    #[error("text {text} names image {image} as its own, but there are {images} images")]
    NoSuchImage {
        /// Index of the text.
        text: usize,
        /// The image that it names.
        image: usize,
        /// Number of image embeddings.
        images: usize,
    },
    /// An image that no text belongs to.
    #[error("image {image} has no text of its own")]
    NoText {
        /// Index of the image.
        image: usize,
    },
    /// A class without a prompt has no direction.
    #[error("class {class} has no prompt")]
    NoPrompt {
        /// Index of the class.
        class: usize,
    },
    /// Not one class per image.
    #[error("{images} images come with {classes} classes")]
    Classes {
        /// Number of image embeddings.
        images: usize,
        /// Length of the list of classes.
        classes: usize,
    },
    /// A class that does not exist.
    #[error("image {image} is of class {class}, but there are {classes} classes")]
    NoSuchClass {
        /// Index of the image.
        image: usize,
        /// The class that it is said to be of.
        class: usize,
        /// Number of classes.
        classes: usize,
    },
    /// A similarity that is not a number cannot be ranked.
    #[error(transparent)]
    NonFinite(#[from] crate::support::finite::NonFiniteError),
}

impl RetrievalMetrics {
    /// Ranks every text against every image and the other way round by cosine similarity. A query is a hit at `k` if *any* of its
    /// positives is among the best `k`. A tie counts against the model: equal embeddings retrieve nothing. Similarities are made block by
    /// block, so that galleries may be large.
    ///
    /// A text's only positive is its own image, as CLIP_benchmark counts: where two images have the same caption, each is a wrong answer for the
    /// other. [`with_equal_texts`](Self::with_equal_texts) counts it as a right one.
    ///
    /// # Shapes
    /// - images: `[I, P]`, texts: `[S, P]`; need not be normalised
    /// - image_of_text: for each text the index of its image
    ///
    /// # Errors
    /// When sizes do not fit, an image has no text, or an embedding is not finite.
    pub fn new(images: Tensor<2>, texts: Tensor<2>, image_of_text: &[usize]) -> Result<Self, RetrievalError> {
        let each: Vec<usize> = (0..image_of_text.len()).collect();
        Self::with_equal_texts(images, texts, image_of_text, &each)
    }

    /// The same where equal texts are one: every image that has a caption equal to the query is a right answer, and so is every text equal to
    /// one of an image's own. `same_text` has one number for each text, equal for equal texts
    /// ([`ClipTokenizer::same_text`](super::tokenizer::ClipTokenizer::same_text)).
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn with_equal_texts(
        images: Tensor<2>,
        texts: Tensor<2>,
        image_of_text: &[usize],
        same_text: &[usize],
    ) -> Result<Self, RetrievalError> {
        let ([num_images, _], [num_texts, _]) = (images.dims(), texts.dims());
        if num_images == 0 || num_texts == 0 {
            return Err(RetrievalError::Empty { images: num_images, texts: num_texts });
        }
        for given in [image_of_text.len(), same_text.len()] {
            if num_texts != given {
                return Err(RetrievalError::Positives { texts: num_texts, positives: given });
            }
        }
        // What is equal, by its number: its texts and their images.
        let mut equal: BTreeMap<usize, (Vec<usize>, BTreeSet<usize>)> = BTreeMap::new();
        let mut own = vec![BTreeSet::new(); num_images];
        for (text, (&image, &same)) in image_of_text.iter().zip(same_text).enumerate() {
            let Some(own) = own.get_mut(image) else {
                return Err(RetrievalError::NoSuchImage { text, image, images: num_images });
            };
            own.insert(same);
            let (texts, images) = equal.entry(same).or_default();
            texts.push(text);
            images.insert(image);
        }
        if let Some(image) = own.iter().position(BTreeSet::is_empty) {
            return Err(RetrievalError::NoText { image });
        }
        crate::support::finite::check_finite("image embeddings", &images)?;
        crate::support::finite::check_finite("text embeddings", &texts)?;

        let (images, texts) = (super::model::normalize(images), super::model::normalize(texts));
        let images_of = |text: usize| equal[&same_text[text]].1.iter().copied().collect();
        let texts_of = |image: usize| own[image].iter().flat_map(|same| equal[same].0.iter().copied()).collect();
        Ok(Self::from_ranks(ranks(&texts, &images, images_of), ranks(&images, &texts, texts_of)))
    }

    /// Recall from the ranks of every query, counted from 0.
    pub fn from_ranks(text_ranks: Vec<usize>, image_ranks: Vec<usize>) -> Self {
        Self {
            text_to_image: Recall::from_ranks(&text_ranks),
            image_to_text: Recall::from_ranks(&image_ranks),
            text_ranks,
            image_ranks,
        }
    }
}

impl Recall {
    /// Recall from ranks that count from 0.
    pub fn from_ranks(ranks: &[usize]) -> Self {
        let at = |k: usize| ranks.iter().filter(|&&rank| rank < k).count() as f64 / ranks.len() as f64;
        Self { r1: at(1), r5: at(5), r10: at(10) }
    }
}

/// Similarities in memory at a time, 64 MiB.
const BLOCK: usize = 1 << 24;

/// For each query, how many wrong candidates are at least as similar as the best of its positives.
fn ranks(queries: &Tensor<2>, candidates: &Tensor<2>, positives: impl Fn(usize) -> Vec<usize>) -> Vec<usize> {
    let ([num_queries, _], [num_candidates, _]) = (queries.dims(), candidates.dims());
    let candidates = candidates.clone().transpose();
    let block = (BLOCK / num_candidates).max(1);
    let mut ranks = Vec::with_capacity(num_queries);
    for start in (0..num_queries).step_by(block) {
        let count = block.min(num_queries - start);
        let similarities = queries.clone().narrow(0, start, count).matmul(candidates.clone());
        let similarities = similarities.try_into_vec_as::<f32>().expect("a float tensor reads as f32");
        let rows = similarities.chunks_exact(num_candidates).enumerate();
        ranks.extend(rows.map(|(row, similarities)| rank(similarities, &positives(start + row))));
    }
    ranks
}

/// How many wrong candidates are at least as similar as the best positive.
fn rank(similarities: &[f32], positives: &[usize]) -> usize {
    let best = positives.iter().map(|&p| similarities[p]).fold(f32::NEG_INFINITY, f32::max);
    // Every candidate as good as that, without the positives among them.
    let at_least = similarities.iter().filter(|similarity| **similarity >= best).count();
    at_least - positives.iter().filter(|&&p| similarities[p] >= best).count()
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn::tensor::Device;

    fn embeddings<const N: usize>(rows: [[f32; 2]; N]) -> Tensor<2> {
        Tensor::from_data(rows, &Device::default())
    }

    #[test]
    fn any_positive_is_a_hit_and_ties_are_none() {
        let images = embeddings([[1.0, 0.0], [0.0, 1.0]]);
        // Texts 0 and 1 belong to image 0, text 2 to image 1; text 1 points at the wrong image, text 2 is torn.
        let texts = embeddings([[3.0, 0.1], [0.1, 1.0], [1.0, 1.0]]);
        let metrics = RetrievalMetrics::new(images, texts, &[0, 0, 1]).unwrap();
        assert_eq!(metrics.text_ranks, [0, 1, 1]);
        assert_eq!(metrics.image_ranks, [0, 1]); // image 1: its text has 0.707, text 1 has 0.995
        assert_eq!(metrics.text_to_image, Recall { r1: 1.0 / 3.0, r5: 1.0, r10: 1.0 });
        assert_eq!(metrics.image_to_text.r1, 0.5);
    }

    #[test]
    fn equal_texts_are_one_when_asked_for() {
        // Texts 0 and 1 are equal, so they have one embedding; each is the only one of its image.
        let images = || embeddings([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0]]);
        let texts = || embeddings([[1.0, 0.1], [1.0, 0.1], [0.0, 1.0]]);
        let protocol = RetrievalMetrics::new(images(), texts(), &[0, 1, 2]).unwrap();
        assert_eq!((protocol.text_ranks, protocol.image_ranks), (vec![1, 0, 0], vec![1, 1, 0]));
        let equal = RetrievalMetrics::with_equal_texts(images(), texts(), &[0, 1, 2], &[0, 0, 2]).unwrap();
        assert_eq!((equal.text_ranks, equal.image_ranks), (vec![0, 0, 0], vec![0, 0, 0]));
        let error = RetrievalMetrics::with_equal_texts(images(), texts(), &[0, 1, 2], &[0]).unwrap_err().to_string();
        assert_eq!(error, "3 texts come with 1 positives");
    }

    #[test]
    fn what_cannot_be_compared_is_named() {
        let two = || embeddings([[1.0, 0.0], [0.0, 1.0]]);
        let error = |texts, own: &[usize]| RetrievalMetrics::new(two(), texts, own).unwrap_err().to_string();
        assert_eq!(error(two(), &[0]), "2 texts come with 1 positives");
        assert_eq!(error(two(), &[0, 2]), "text 1 names image 2 as its own, but there are 2 images");
        assert_eq!(error(two(), &[0, 0]), "image 1 has no text of its own");
        let nan = embeddings([[f32::NAN, 0.0], [0.0, 1.0]]);
        assert_eq!(error(nan, &[0, 1]), "`text embeddings` holds 1 values that are not finite, of 4");
    }
}
