//! Cross-modal retrieval by LAION CLIP_benchmark's protocol.

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
    /// # Shapes
    /// - images: `[I, P]`, texts: `[S, P]`; need not be normalised
    /// - image_of_text: for each text the index of its image
    ///
    /// # Errors
    /// When sizes do not fit, an image has no text, or an embedding is not finite.
    pub fn new(images: Tensor<2>, texts: Tensor<2>, image_of_text: &[usize]) -> Result<Self, RetrievalError> {
        let ([num_images, _], [num_texts, _]) = (images.dims(), texts.dims());
        if num_images == 0 || num_texts == 0 {
            return Err(RetrievalError::Empty { images: num_images, texts: num_texts });
        }
        if num_texts != image_of_text.len() {
            return Err(RetrievalError::Positives { texts: num_texts, positives: image_of_text.len() });
        }
        let mut texts_of_image = vec![Vec::new(); num_images];
        for (text, &image) in image_of_text.iter().enumerate() {
            let Some(own) = texts_of_image.get_mut(image) else {
                return Err(RetrievalError::NoSuchImage { text, image, images: num_images });
            };
            own.push(text);
        }
        if let Some(image) = texts_of_image.iter().position(Vec::is_empty) {
            return Err(RetrievalError::NoText { image });
        }
        crate::support::finite::check_finite("image embeddings", &images)?;
        crate::support::finite::check_finite("text embeddings", &texts)?;

        let (images, texts) = (super::model::normalize(images), super::model::normalize(texts));
        let image_of_text: Vec<Vec<usize>> = image_of_text.iter().map(|&image| vec![image]).collect();
        Ok(Self::from_ranks(ranks(&texts, &images, &image_of_text), ranks(&images, &texts, &texts_of_image)))
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
fn ranks(queries: &Tensor<2>, candidates: &Tensor<2>, positives: &[Vec<usize>]) -> Vec<usize> {
    let ([num_queries, _], [num_candidates, _]) = (queries.dims(), candidates.dims());
    let candidates = candidates.clone().transpose();
    let block = (BLOCK / num_candidates).max(1);
    let mut ranks = Vec::with_capacity(num_queries);
    for start in (0..num_queries).step_by(block) {
        let count = block.min(num_queries - start);
        let similarities = queries.clone().narrow(0, start, count).matmul(candidates.clone());
        let similarities = similarities.try_into_vec_as::<f32>().expect("a float tensor reads as f32");
        ranks.extend(similarities.chunks_exact(num_candidates).zip(&positives[start..]).map(|(row, own)| rank(row, own)));
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
