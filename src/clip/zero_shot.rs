//! Zero-shot classification by LAION CLIP_benchmark's protocol.

use burn::tensor::Tensor;

use super::{RetrievalError, model::normalize};

/// One direction per class, made from the embeddings of its prompts.
#[derive(Debug, Clone)]
pub struct ZeroShotClassifier {
    /// Unit columns, `[P, C]`.
    weights: Tensor<2>,
}

/// How well images were classified.
#[derive(Debug, Clone, Copy, PartialEq, serde::Serialize)]
pub struct ZeroShotMetrics {
    /// Images whose class is the first guess.
    pub top_1: f64,
    /// Images whose class is among the first five guesses (of fewer classes: among all).
    pub top_5: f64,
    /// Mean over classes of the share of their images whose class is the first guess.
    pub mean_per_class_recall: f64,
}

impl ZeroShotClassifier {
    /// Of each class the embeddings of all its prompts, `[T, P]`, need not be normalised: each is normalised, then their mean (CLIP, section
    /// 3.1.4).
    ///
    /// # Errors
    /// When there is no class, a class has no prompt, or an embedding is not finite.
    pub fn new(classes: &[Tensor<2>]) -> Result<Self, RetrievalError> {
        let mut directions = Vec::new();
        for (class, prompts) in classes.iter().enumerate() {
            if prompts.dims()[0] == 0 {
                return Err(RetrievalError::NoPrompt { class });
            }
            crate::support::finite::check_finite("prompt embeddings", prompts)?;
            directions.push(normalize(normalize(prompts.clone()).mean_dim(0)));
        }
        if directions.is_empty() {
            return Err(RetrievalError::Empty { images: 0, texts: 0 });
        }
        Ok(Self { weights: Tensor::cat(directions, 0).transpose() })
    }

    /// Unit directions, `[P, C]`.
    pub fn weights(&self) -> Tensor<2> {
        self.weights.clone()
    }

    /// Cosine similarities of images, `[B, P] -> [B, C]`; need not be normalised.
    ///
    /// # Panics
    /// When embeddings are not of width `P`.
    pub fn similarities(&self, images: Tensor<2>) -> Tensor<2> {
        normalize(images).matmul(self.weights.clone())
    }

    /// Metrics of images `[B, P]` with the index of their class.
    ///
    /// # Errors
    /// When there is no image, the lists differ in length, a class does not exist, or an embedding is not finite.
    pub fn evaluate(&self, images: Tensor<2>, classes: &[usize]) -> Result<ZeroShotMetrics, RetrievalError> {
        crate::support::finite::check_finite("image embeddings", &images)?;
        let [num_images, _] = images.dims();
        let [_, num_classes] = self.weights.dims();
        if num_images == 0 {
            return Err(RetrievalError::Empty { images: 0, texts: num_classes });
        }
        if num_images != classes.len() {
            return Err(RetrievalError::Classes { images: num_images, classes: classes.len() });
        }
        if let Some((image, &class)) = classes.iter().enumerate().find(|(_, class)| **class >= num_classes) {
            return Err(RetrievalError::NoSuchClass { image, class, classes: num_classes });
        }
        let similarities = self.similarities(images).try_into_vec_as::<f32>().expect("a float tensor reads as f32");
        let mut hits_of_class = vec![(0usize, 0usize); num_classes];
        let mut top_5 = 0;
        for (similarities, &class) in similarities.chunks_exact(num_classes).zip(classes) {
            // A tie goes to the lower index.
            let better = |other: usize| {
                let (own, other_value) = (similarities[class], similarities[other]);
                other_value > own || (other_value == own && other < class)
            };
            let rank = (0..num_classes).filter(|&other| other != class && better(other)).count();
            hits_of_class[class].0 += usize::from(rank == 0);
            hits_of_class[class].1 += 1;
            top_5 += usize::from(rank < 5);
        }
        let present: Vec<f64> =
            hits_of_class.iter().filter(|(_, count)| *count > 0).map(|(hits, count)| *hits as f64 / *count as f64).collect();
        Ok(ZeroShotMetrics {
            top_1: hits_of_class.iter().map(|(hits, _)| hits).sum::<usize>() as f64 / num_images as f64,
            top_5: top_5 as f64 / num_images as f64,
            mean_per_class_recall: present.iter().sum::<f64>() / present.len() as f64,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn::tensor::Device;

    fn rows<const N: usize>(rows: [[f32; 2]; N]) -> Tensor<2> {
        Tensor::from_data(rows, &Device::default())
    }

    #[test]
    fn prompts_count_the_same_whatever_their_length() {
        let classifier = ZeroShotClassifier::new(&[rows([[10.0, 0.0], [0.0, 0.1]]), rows([[-1.0, 0.0]])]).unwrap();
        let weights: Vec<f32> = classifier.weights().try_into_vec_as().unwrap();
        let half = 0.5f32.sqrt();
        for (found, expected) in weights.iter().zip([half, -1.0, half, 0.0]) {
            assert!((found - expected).abs() < 1e-6, "{weights:?}");
        }
        let metrics = classifier.evaluate(rows([[1.0, 1.0], [-1.0, 0.1], [1.0, 0.0]]), &[0, 1, 1]).unwrap();
        assert_eq!(metrics, ZeroShotMetrics { top_1: 2.0 / 3.0, top_5: 1.0, mean_per_class_recall: 0.75 });
    }

    #[test]
    fn what_cannot_be_classified_is_named() {
        let error = |classes: &[Tensor<2>]| ZeroShotClassifier::new(classes).unwrap_err().to_string();
        assert_eq!(error(&[rows([[1.0, 0.0]]), Tensor::zeros([0, 2], &Device::default())]), "class 1 has no prompt");
        let classifier = ZeroShotClassifier::new(&[rows([[1.0, 0.0]])]).unwrap();
        let error = classifier.evaluate(rows([[1.0, 0.0]]), &[3]).unwrap_err().to_string();
        assert_eq!(error, "image 0 is of class 3, but there are 1 classes");
    }
}
