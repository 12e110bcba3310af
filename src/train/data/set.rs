//! Images and what they show.

use burn::tensor::{Device, Tensor, TensorData};

use crate::clip::ImagePreprocessing;

/// What an image can show. Two images of one concept are never in the same batch.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Concept {
    /// At least one. Evaluation uses all of them, training one at a time.
    pub captions: Vec<Caption>,
}

/// A text that says what an image shows.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Caption {
    /// The text.
    pub text: String,
    /// Words that training may add to it.
    pub tags: Vec<String>,
    /// The language, by which an evaluation can be divided; `None`: not known.
    pub language: Option<String>,
}

impl Caption {
    /// A text in a language that is not known, without tags.
    pub fn new(text: impl Into<String>) -> Self {
        Self { text: text.into(), tags: Vec::new(), language: None }
    }
}

/// Square RGB images of one size with their concepts.
#[derive(Debug, Clone, Hash)]
pub struct ImageTextSet {
    pub(super) image_size: usize,
    pub(super) preprocessing: ImagePreprocessing,
    /// `[images, image_size, image_size, 3]`
    pub(super) pixels: Vec<u8>,
    pub(super) concept_of_image: Vec<usize>,
    pub(super) concepts: Vec<Concept>,
}

impl ImageTextSet {
    /// A set from its parts, to be normalised as CLIP's own images are unless [`with_preprocessing`](Self::with_preprocessing) says
    /// otherwise. `pixels` is `[images, image_size, image_size, 3]`, RGB.
    ///
    /// # Panics
    /// When the sizes do not fit each other, a concept does not exist, or one has no caption.
    pub fn new(image_size: usize, pixels: Vec<u8>, concept_of_image: Vec<usize>, concepts: Vec<Concept>) -> Self {
        assert!(
            pixels.len() == concept_of_image.len() * image_size * image_size * 3,
            "{} bytes are not {} RGB images of {image_size} x {image_size} pixels",
            pixels.len(),
            concept_of_image.len(),
        );
        assert!(concept_of_image.iter().all(|&concept| concept < concepts.len()), "an image shows a concept that does not exist");
        assert!(concepts.iter().all(|concept| !concept.captions.is_empty()), "a concept has no caption");
        Self { image_size, preprocessing: ImagePreprocessing::new(), pixels, concept_of_image, concepts }
    }

    /// The same images for a model that expects them prepared in this way. Training refuses a set that was prepared in another way than its
    /// models expect. Pixels stay as they are: their resizing is up to whoever made them.
    pub fn with_preprocessing(mut self, preprocessing: ImagePreprocessing) -> Self {
        self.preprocessing = preprocessing;
        self
    }

    /// How the images are prepared.
    pub fn preprocessing(&self) -> &ImagePreprocessing {
        &self.preprocessing
    }

    /// Number of images.
    pub fn len(&self) -> usize {
        self.concept_of_image.len()
    }

    /// Whether there is no image.
    pub fn is_empty(&self) -> bool {
        self.concept_of_image.is_empty()
    }

    /// Side of the images, in pixels.
    pub fn image_size(&self) -> usize {
        self.image_size
    }

    /// The concepts; some may have no image.
    pub fn concepts(&self) -> &[Concept] {
        &self.concepts
    }

    /// The concept of each image.
    pub fn concept_of_image(&self) -> &[usize] {
        &self.concept_of_image
    }

    /// Every image with every caption of its concept, in this order: what an evaluation asks for.
    pub fn queries(&self) -> impl Iterator<Item = (usize, &Caption)> {
        let captions =
            |(image, &concept): (usize, &usize)| self.concepts[concept].captions.iter().map(move |caption| (image, caption));
        self.concept_of_image.iter().enumerate().flat_map(captions)
    }

    /// Only the chosen images, with all concepts.
    pub fn select(&self, keep: impl Fn(usize) -> bool) -> Self {
        let chosen: Vec<usize> = (0..self.len()).filter(|&image| keep(image)).collect();
        Self {
            image_size: self.image_size,
            preprocessing: self.preprocessing,
            pixels: chosen.iter().flat_map(|&image| self.image(image)).copied().collect(),
            concept_of_image: chosen.iter().map(|&image| self.concept_of_image[image]).collect(),
            concepts: self.concepts.clone(),
        }
    }

    /// Images of a range as a model takes them, `[B, 3, image_size, image_size]`.
    pub fn images(&self, range: std::ops::Range<usize>, device: &Device) -> Tensor<4> {
        let area = self.image_size * self.image_size;
        let mut values = vec![0.0; range.len() * 3 * area];
        for (planes, image) in values.chunks_exact_mut(3 * area).zip(range.clone()) {
            for (pixel, rgb) in self.image(image).chunks_exact(3).enumerate() {
                for channel in 0..3 {
                    planes[channel * area + pixel] = self.preprocessing.normalize(rgb[channel].into(), channel);
                }
            }
        }
        Tensor::from_data(TensorData::new(values, [range.len(), 3, self.image_size, self.image_size]), device)
    }

    /// RGB bytes of one image, row by row.
    pub fn image(&self, index: usize) -> &[u8] {
        let size = self.image_size * self.image_size * 3;
        &self.pixels[index * size..][..size]
    }
}
