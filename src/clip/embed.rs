//! Many images and texts through a model.

use std::path::PathBuf;

use burn::tensor::{Device, Tensor, TensorData};

use super::{
    Clip,
    preprocess::{ImageError, ImagePreprocessor},
    tokenizer::ClipTokenizer,
};

/// Runs a model over any number of images and texts, batch by batch, with one batch and the embeddings in memory.
#[derive(Debug)]
pub struct Embedder<'a> {
    model: &'a Clip,
    preprocessor: ImagePreprocessor,
    tokenizer: ClipTokenizer,
    context_length: usize,
    batch_size: usize,
    device: Device,
}

/// Embeddings of texts.
#[derive(Debug, Clone)]
pub struct TextEmbeddings {
    /// Not normalised, `[S, P]`.
    pub embeddings: Tensor<2>,
    /// How many texts were cut because they did not fit the context.
    pub truncated: usize,
}

impl<'a> Embedder<'a> {
    /// For a model on `device`.
    pub fn new(model: &'a Clip, preprocessor: ImagePreprocessor, device: &Device) -> Self {
        let [context_length, _] = model.text.position_embedding.lazy_shape().dims();
        Self { model, preprocessor, tokenizer: ClipTokenizer::new(), context_length, batch_size: 64, device: device.clone() }
    }

    /// Another number of samples in one forward pass than 64. Results do not depend on it while inference is dropless.
    pub fn with_batch_size(mut self, batch_size: usize) -> Self {
        self.batch_size = batch_size.max(1);
        self
    }

    /// Embeds image files, `[I, P]`, not normalised. The next batch is decoded while the last one is computed; `progress` hears how
    /// many images are done.
    ///
    /// # Errors
    /// The first image that cannot be read.
    pub fn images(&self, paths: Vec<PathBuf>, mut progress: impl FnMut(usize)) -> Result<Tensor<2>, ImageError> {
        let mut rows = Rows::default();
        for batch in self.preprocessor.batches(paths, self.batch_size) {
            let batch = batch.into_iter().collect::<Result<Vec<_>, _>>()?;
            rows.add(self.model.encode_image(self.preprocessor.tensor(&batch, &self.device)).embedding);
            progress(rows.count);
        }
        Ok(rows.into_tensor(&self.device))
    }

    /// Embeds texts; `progress` hears how many are done.
    pub fn texts<T: AsRef<str>>(&self, texts: &[T], mut progress: impl FnMut(usize)) -> TextEmbeddings {
        let mut rows = Rows::default();
        let mut truncated = 0;
        for batch in texts.chunks(self.batch_size) {
            let tokens = self.tokenizer.tokenize(batch, self.context_length);
            truncated += tokens.truncated;
            rows.add(self.model.encode_text(tokens.tensor(&self.device)).embedding);
            progress(rows.count);
        }
        TextEmbeddings { embeddings: rows.into_tensor(&self.device), truncated }
    }

    /// Embeds every prompt of every class: `{}` in a template stands for the class. One `[templates, P]` per class.
    pub fn prompts<C: AsRef<str>, T: AsRef<str>>(&self, classes: &[C], templates: &[T]) -> Vec<Tensor<2>> {
        let prompts_of = |class: &C| templates.iter().map(|t| t.as_ref().replace("{}", class.as_ref())).collect::<Vec<_>>();
        classes.iter().map(|class| self.texts(&prompts_of(class), |_| ()).embeddings).collect()
    }
}

/// Embeddings on the host, row by row.
#[derive(Default)]
struct Rows {
    values: Vec<f32>,
    count: usize,
}

impl Rows {
    fn add(&mut self, batch: Tensor<2>) {
        self.count += batch.dims()[0];
        self.values.extend(batch.detach().try_into_vec_as::<f32>().expect("a float tensor reads as f32"));
    }

    fn into_tensor(self, device: &Device) -> Tensor<2> {
        let width = self.values.len() / self.count.max(1);
        Tensor::from_data(TensorData::new(self.values, [self.count, width]), &device.clone().inner())
    }
}
