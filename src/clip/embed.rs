//! Many images and texts through a model.

use std::path::PathBuf;

use burn::module::Module;
use burn::nn::Linear;
use burn::tensor::{Device, Tensor, TensorData};

use super::{
    TextTower, VisionTower,
    preprocess::{ImageError, ImagePreprocessor},
    tokenizer::{ClipTokenizer, TokenizerMismatch},
};

/// Runs a vision tower over any number of images, batch by batch, with one batch and the embeddings in memory.
#[derive(Debug)]
pub struct ImageEmbedder {
    tower: VisionTower,
    preprocessor: ImagePreprocessor,
    batch_size: usize,
    device: Device,
}

/// Runs a text tower over any number of texts, batch by batch.
#[derive(Debug)]
pub struct TextEmbedder {
    tower: TextTower,
    tokenizer: ClipTokenizer,
    context_length: usize,
    batch_size: usize,
    device: Device,
}

/// Embeddings of images.
#[derive(Debug)]
pub struct ImageEmbeddings {
    /// Not normalised, `[I, P]`, of the images that could be read.
    pub embeddings: Tensor<2>,
    /// The place of each of them among the paths.
    pub kept: Vec<usize>,
    /// Why each of the others could not be read.
    pub skipped: Vec<ImageError>,
}

/// Embeddings of texts.
#[derive(Debug, Clone)]
pub struct TextEmbeddings {
    /// Not normalised, `[S, P]`.
    pub embeddings: Tensor<2>,
    /// How many texts were cut because they did not fit the context.
    pub truncated: usize,
}

/// Prompts that cannot be embedded.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum PromptError {
    /// Every class would have the same prompt.
    #[error("the template \"{template}\" has no place for the class: write {{}} or {{c}} where its name belongs")]
    Template {
        /// As it was given.
        template: String,
    },
    /// There is no prompt without a template.
    #[error("no template was given")]
    NoTemplate,
    /// A class without a name.
    #[error("class {place} has no name: every class needs one of its own")]
    NoName {
        /// Its place, from 1 on.
        place: usize,
    },
}

/// Samples in one forward pass, unless another number is asked for.
const BATCH: usize = 64;

impl ImageEmbedder {
    /// For a tower on `device`, as it is at inference.
    pub fn new(tower: &VisionTower, preprocessor: ImagePreprocessor, device: &Device) -> Self {
        Self { tower: tower.valid(), preprocessor, batch_size: BATCH, device: device.clone().inner() }
    }

    /// Another number of samples in one forward pass than 64. Results do not depend on it while inference is dropless and padding is kept
    /// out, which are the defaults.
    pub fn with_batch_size(mut self, batch_size: usize) -> Self {
        self.batch_size = batch_size.max(1);
        self
    }

    /// Embeds image files. The next batch is decoded while the last one is computed; `progress` is called with the number of images that are done.
    /// Images that cannot be read are skipped.
    ///
    /// # Panics
    /// When the preprocessor makes images of another size than the tower takes.
    pub fn images(&self, paths: Vec<PathBuf>, mut progress: impl FnMut(usize)) -> ImageEmbeddings {
        let mut rows = Rows::new(&self.tower.projection);
        let (count, mut done) = (paths.len(), 0);
        let (mut kept, mut skipped) = (Vec::new(), Vec::new());
        for batch in self.preprocessor.batches(paths, self.batch_size) {
            let mut images = Vec::new();
            for image in batch {
                match image {
                    Ok(image) => {
                        images.push(image);
                        kept.push(done);
                    }
                    Err(error) => skipped.push(error),
                }
                done += 1;
            }
            if !images.is_empty() {
                rows.add(self.tower.embedding(self.preprocessor.tensor(&images, &self.device)));
            }
            progress(done);
        }
        assert!(done == count, "{done} of {count} images came back");
        ImageEmbeddings { embeddings: rows.into_tensor(&self.device), kept, skipped }
    }
}

impl TextEmbedder {
    /// For a tower on `device`, as it is at inference.
    ///
    /// # Errors
    /// When the tower was trained with another tokenizer than CLIP's.
    pub fn new(tower: &TextTower, device: &Device) -> Result<Self, TokenizerMismatch> {
        let tokenizer = ClipTokenizer::for_model(tower)?;
        let [context_length, _] = tower.position_embedding.lazy_shape().dims();
        let tower = tower.valid();
        Ok(Self { tower, tokenizer, context_length, batch_size: BATCH, device: device.clone().inner() })
    }

    /// Another number of samples in one forward pass than 64; see [`ImageEmbedder::with_batch_size`].
    pub fn with_batch_size(mut self, batch_size: usize) -> Self {
        self.batch_size = batch_size.max(1);
        self
    }

    /// Embeds texts; `progress` is called with the number of texts that are done.
    pub fn texts<T: AsRef<str>>(&self, texts: &[T], mut progress: impl FnMut(usize)) -> TextEmbeddings {
        let mut rows = Rows::new(&self.tower.projection);
        let mut truncated = 0;
        for batch in texts.chunks(self.batch_size) {
            let tokens = self.tokenizer.tokenize(batch, self.context_length);
            truncated += tokens.truncated;
            rows.add(self.tower.embedding(tokens.tensor(&self.device)));
            progress(rows.count);
        }
        TextEmbeddings { embeddings: rows.into_tensor(&self.device), truncated }
    }

    /// Embeds every prompt of every class: `{}` or `{c}` in a template stands for the class. One `[templates, P]` per class.
    ///
    /// # Errors
    /// When there is no template, or one has no place for the class, or a class has no name. Equal names are let pass, as ImageNet's usual list has
    /// two pairs of them; [`ClipTokenizer::same_text`] finds them.
    pub fn prompts<C: AsRef<str>, T: AsRef<str>>(&self, classes: &[C], templates: &[T]) -> Result<Vec<Tensor<2>>, PromptError> {
        if templates.is_empty() {
            return Err(PromptError::NoTemplate);
        }
        if let Some(template) = templates.iter().map(AsRef::as_ref).find(|t| !t.contains("{}") && !t.contains("{c}")) {
            return Err(PromptError::Template { template: template.to_string() });
        }
        let names: Vec<&str> = classes.iter().map(|class| class.as_ref().trim()).collect();
        if let Some(place) = names.iter().position(|name| name.is_empty()) {
            return Err(PromptError::NoName { place: place + 1 });
        }
        let prompt = |class: &&str, template: &T| template.as_ref().replace("{}", class).replace("{c}", class);
        let prompts: Vec<String> = names.iter().flat_map(|class| templates.iter().map(move |t| prompt(class, t))).collect();
        let all = self.texts(&prompts, |_| ()).embeddings;
        Ok((0..classes.len()).map(|class| all.clone().narrow(0, class * templates.len(), templates.len())).collect())
    }
}

/// Embeddings on the host, row by row.
struct Rows {
    values: Vec<f32>,
    count: usize,
    width: usize,
}

impl Rows {
    /// For what a tower's projection returns.
    fn new(projection: &Linear) -> Self {
        let [_, width] = projection.weight.lazy_shape().dims();
        Self { values: Vec::new(), count: 0, width }
    }

    fn add(&mut self, batch: Tensor<2>) {
        self.count += batch.dims()[0];
        self.values.extend(batch.detach().try_into_vec_as::<f32>().expect("a float tensor reads as f32"));
    }

    fn into_tensor(self, device: &Device) -> Tensor<2> {
        Tensor::from_data(TensorData::new(self.values, [self.count, self.width]), device)
    }
}
