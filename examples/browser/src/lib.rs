//! A sparse CLIP in a browser: what the page's JavaScript calls.

use std::fmt::Display;

use burn::tensor::{Device, Tensor};
use burn_moe::{
    clip::{
        checkpoint::{ClipCheckpoint, LoadOptions},
        normalize,
        preprocess::{ImagePreprocessor, Orientation},
        tokenizer::ClipTokenizer,
    },
    stats::RoutingStats,
};
use serde_json::{Value, json};
use wasm_bindgen::prelude::*;

#[allow(unsafe_code)] // a declaration: there is no other way to name it
unsafe extern "C" {
    /// The linker's: runs what is to run once before everything else, such as CubeCL's registrations.
    safe fn __wasm_call_ctors();
}

/// Runs once, when the page loads the module, and lets the console show what a panic says.
#[wasm_bindgen(start)]
pub fn start() {
    // The linker lets every call from JavaScript begin with them, unless the program calls them itself.
    __wasm_call_ctors();
    console_error_panic_hook::set_once();
}

/// Where models compute.
#[wasm_bindgen]
pub struct Backend(Device);

#[wasm_bindgen]
impl Backend {
    /// The processor, by WebAssembly with SIMD.
    pub fn flex() -> Self {
        Self(Device::flex())
    }

    /// The browser's GPU.
    ///
    /// # Errors
    /// When the browser has none for this page.
    pub async fn webgpu() -> Result<Self, JsError> {
        Device::wgpu_options().init_async().await.map(Self).map_err(error)
    }
}

/// A CLIP, and the pictures that it searches.
#[wasm_bindgen]
pub struct Search {
    checkpoint: ClipCheckpoint,
    tokenizer: ClipTokenizer,
    preprocessor: ImagePreprocessor,
    device: Device,
    /// Normalised, a row for each picture.
    pictures: Vec<f32>,
}

#[wasm_bindgen]
impl Search {
    /// From the two files of a checkpoint in burn-moe's format.
    ///
    /// # Errors
    /// When they are damaged, do not fit each other, or the model's tokenizer is not CLIP's.
    #[wasm_bindgen(constructor)]
    pub fn new(backend: &Backend, config: &str, weights: Vec<u8>) -> Result<Self, JsError> {
        let device = backend.0.clone();
        let checkpoint = ClipCheckpoint::from_bytes(config, weights, &LoadOptions::new(), &device).map_err(error)?;
        Ok(Self {
            tokenizer: ClipTokenizer::for_model(&checkpoint.model.text).map_err(error)?,
            preprocessor: ImagePreprocessor::for_model(&checkpoint.config.vision).with_orientation(Orientation::Exif),
            checkpoint,
            device,
            pictures: Vec::new(),
        })
    }

    /// Embeddings of texts, of length 1, one after the other.
    ///
    /// # Errors
    /// When the device fails.
    pub async fn texts(&self, texts: Vec<String>) -> Result<Vec<f32>, JsError> {
        let tokens = self.tokenizer.tokenize(&texts, self.checkpoint.config.text.context_length).tensor(&self.device);
        read(normalize(self.checkpoint.model.text.embedding(tokens))).await
    }

    /// The embedding of an image file, of length 1.
    ///
    /// # Errors
    /// When the library cannot read it, or the device fails.
    pub async fn picture(&self, file: Vec<u8>) -> Result<Vec<f32>, JsError> {
        let image = self.preprocessor.decode(&file).map_err(error)?;
        let image = self.preprocessor.tensor(&[image], &self.device);
        read(normalize(self.checkpoint.model.vision.embedding(image))).await
    }

    /// Adds pictures by their embeddings, to be searched.
    ///
    /// # Errors
    /// When these are not whole embeddings.
    pub fn add(&mut self, embeddings: &[f32]) -> Result<(), JsError> {
        let width = self.checkpoint.config.embed_dim;
        if !embeddings.len().is_multiple_of(width) {
            return Err(JsError::new(&format!("{} numbers are no embeddings of {width} each", embeddings.len())));
        }
        self.pictures.extend_from_slice(embeddings);
        Ok(())
    }

    /// Keeps the first `count` pictures.
    pub fn keep(&mut self, count: usize) {
        self.pictures.truncate(count * self.checkpoint.config.embed_dim);
    }

    /// The `top` pictures that are nearest to an embedding of length 1, best first: place and cosine similarity of each, one after the other.
    pub fn nearest(&self, query: &[f32], top: usize) -> Vec<f64> {
        let similarity = |picture: &[f32]| picture.iter().zip(query).map(|(a, b)| a * b).sum::<f32>();
        let mut found: Vec<(usize, f32)> =
            self.pictures.chunks_exact(self.checkpoint.config.embed_dim).map(similarity).enumerate().collect();
        found.sort_by(|a, b| b.1.total_cmp(&a.1));
        found.into_iter().take(top).flat_map(|(place, similarity)| [place as f64, similarity.into()]).collect()
    }

    /// Which experts the words of a text went to, as JSON: `words` with, for each word (the start and end of the text among them), the experts of its
    /// tokens by block, `[{ word, experts: [block][expert, …] }]`, and `blocks`, the routing statistics of each. Nothing for a dense model.
    pub async fn routes(&self, text: String) -> String {
        let encoded = self.tokenizer.encode(&text);
        let tokens = self.tokenizer.pack(&[&encoded], self.checkpoint.config.text.context_length);
        let routings = self.checkpoint.model.text.forward(tokens.tensor(&self.device)).routings;
        let (mut experts, mut blocks) = (Vec::new(), Vec::new());
        for routing in &routings {
            let RoutingStats { load, dropped, confidence, entropy, .. } = RoutingStats::new_async(routing).await;
            blocks.push(json!({ "load": load, "dropped": dropped, "confidence": confidence, "entropy": entropy }));
            let row_expert = routing.plan.row_expert();
            let of_token = |rows: &[i32]| -> Vec<usize> {
                rows.iter().filter_map(|&row| usize::try_from(row).ok()).map(|row| row_expert[row]).collect()
            };
            experts.push(routing.plan.choice_row().chunks(routing.plan.num_choices()).map(of_token).collect::<Vec<_>>());
        }
        let words: Vec<Value> = self
            .words(&tokens.ids)
            .into_iter()
            .map(|(word, places)| {
                let of_block = |experts: &Vec<Vec<usize>>| {
                    let mut experts = experts[places.clone()].concat();
                    experts.sort_unstable();
                    experts.dedup();
                    experts
                };
                json!({ "word": word, "experts": experts.iter().map(of_block).collect::<Vec<_>>() })
            })
            .collect();
        json!({ "words": words, "blocks": blocks }).to_string()
    }
}

impl Search {
    /// The words of a text, and the places of their tokens.
    fn words(&self, ids: &[i32]) -> Vec<(String, std::ops::Range<usize>)> {
        let (mut words, mut start) = (Vec::new(), 0);
        for end in 1..=ids.len() {
            let is_mark = end == 1 || end == ids.len();
            let word = self.tokenizer.decode(&ids[start..end]);
            // The token that ends a word ends with a space.
            if is_mark || word.ends_with(' ') || end + 1 == ids.len() {
                words.push((word.trim().to_string(), start..end));
                start = end;
            }
        }
        words
    }
}

/// Numbers from a device that may be a GPU, for which a browser does not wait.
async fn read(embeddings: Tensor<2>) -> Result<Vec<f32>, JsError> {
    embeddings.into_data_async().await.map_err(error)?.try_into_vec_as::<f32>().map_err(error)
}

fn error(error: impl Display) -> JsError {
    JsError::new(&error.to_string())
}
