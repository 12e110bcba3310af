//! MoE layers of published language models, as burn-moe layers; and layers of ours in Mixtral's layout.
//!
//! A folder has `config.json` and `model.safetensors`, or shards of it with `model.safetensors.index.json`, as transformers' `save_pretrained` writes
//! them. Of a model in shards, only those that hold the layer must be there. The rest of the model (attention, embeddings, norms) is not read.
//!
//! | `model_type` | scores | gates of the chosen experts | besides |
//! | --- | --- | --- | --- |
//! | `mixtral` | softmax | over their sum | jitter in training, here of the router's input alone |
//! | `qwen2_moe` | softmax | over their sum if `norm_topk_prob` | a shared expert with a gate |
//! | `qwen3_moe`, `olmoe` | softmax | over their sum if `norm_topk_prob` | – |
//! | `deepseek_v3`, `glm4_moe` | sigmoid; a bias in the choice | over their sum if `norm_topk_prob`, times `routed_scaling_factor` | groups of experts; shared experts, as one |
//! | `gpt_oss` | softmax; the router has a bias | over their sum | biases; the clamped gated form |
//! | `granitemoe` | softmax | over their sum | – |
//!
//! Weights may be f32, f16, bf16 or f64. Quantized ones are refused, such as DeepSeek-V3's in FP8 and gpt-oss's in MXFP4, as they were published: save them in
//! bf16 by transformers first.
//!
//! A softmax over the chosen logits, which `gpt_oss` and `granitemoe` compute, is what dividing by the sum of the chosen gives. Routers compute in f32.
//!
//! ```no_run
//! use burn::tensor::{Device, Distribution, Tensor};
//! use burn_moe::language_models::MoeCheckpoint;
//!
//! let device = Device::default();
//! let checkpoint = MoeCheckpoint::open("OLMoE-1B-7B-0924")?;
//! let moe = checkpoint.load_layer(checkpoint.moe_blocks()[0], &device)?;
//! let tokens = Tensor::<3>::random([1, 16, checkpoint.config().d_model], Distribution::Default, &device);
//! let output = moe.forward(tokens).output;
//! # Ok::<(), burn_moe::language_models::CheckpointError>(())
//! ```

mod family;
mod layout;
mod mixtral;
mod read;
mod settings;

use std::path::{Path, PathBuf};

use burn::tensor::Device;

pub use crate::checkpoint::CheckpointError;
use crate::{MoeFeedForward, MoeFeedForwardConfig, checkpoint::tensors::read_text};
pub use family::Family;
pub use mixtral::save_mixtral;
pub use read::LayerOptions;

/// Bytes of the longest configuration that is read; those of real models have a few thousand.
const LONGEST_CONFIG: u64 = 1 << 20;

const CONFIG: &str = "config.json";
const WEIGHTS: &str = "model.safetensors";

/// A language model's folder of which the configuration was read.
#[derive(Clone, Debug)]
pub struct MoeCheckpoint {
    folder: PathBuf,
    family: Family,
    config: MoeFeedForwardConfig,
    num_blocks: usize,
    moe_blocks: Vec<usize>,
}

impl MoeCheckpoint {
    /// Reads `config.json`, and no weights.
    ///
    /// # Errors
    /// When the file is missing, its `model_type` is none of the supported ones, or it has a setting that is missing, impossible or would change what a layer
    /// computes in a way that is not known here; each is named.
    pub fn open(folder: impl AsRef<Path>) -> Result<Self, CheckpointError> {
        let path = folder.as_ref().join(CONFIG);
        let bad = |reason| CheckpointError::ConfigFile { path: path.clone(), reason };
        let described = family::describe(&read_text(&path, LONGEST_CONFIG)?).map_err(bad)?;
        described.config.validate().map_err(|source| CheckpointError::Config { path: path.clone(), source })?;
        Ok(Self {
            folder: folder.as_ref().to_path_buf(),
            family: described.family,
            config: described.config,
            num_blocks: described.num_blocks,
            moe_blocks: described.moe_blocks,
        })
    }

    /// Whose layout and definitions it has.
    pub fn family(&self) -> Family {
        self.family
    }

    /// Transformer blocks in all.
    pub fn num_blocks(&self) -> usize {
        self.num_blocks
    }

    /// The blocks that have a MoE layer, by index from 0; the others have a dense network.
    pub fn moe_blocks(&self) -> &[usize] {
        &self.moe_blocks
    }

    /// What the MoE layers are; all are alike. Nothing is dropped, in training neither.
    pub fn config(&self) -> &MoeFeedForwardConfig {
        &self.config
    }

    /// The MoE layer of a block. Weights may be f32, f16, bf16 or f64; the layer has f32.
    ///
    /// # Errors
    /// When the block has no MoE layer, a file is missing, truncated or of another kind, or a tensor of the layer is missing, not expected, of another shape
    /// or not finite; each is named.
    pub fn load_layer(&self, block: usize, device: &Device) -> Result<MoeFeedForward, CheckpointError> {
        self.load_layer_with(block, &LayerOptions::new(), device)
    }

    /// The same with options.
    ///
    /// # Errors
    /// As [`load_layer`](Self::load_layer), and when a weight that is to be packed is beyond the precision.
    ///
    /// # Panics
    /// When weights are to be packed and `device` is not burn's CPU backend, or one has more than 65,536 rows and 8 bits.
    pub fn load_layer_with(
        &self,
        block: usize,
        options: &LayerOptions,
        device: &Device,
    ) -> Result<MoeFeedForward, CheckpointError> {
        if !self.moe_blocks.contains(&block) {
            let blocks = &self.moe_blocks;
            let reason = match blocks[..] {
                [] => "no block has a MoE layer".to_string(),
                _ => format!("block {block} has no MoE layer; blocks that have one: {}", ranges(blocks)),
            };
            return Err(CheckpointError::ConfigFile { path: self.folder.join(CONFIG), reason });
        }
        read::load(self, block, options, device)
    }
}

/// The MoE layer of a block of the language model in a folder: [`MoeCheckpoint::open`] and [`MoeCheckpoint::load_layer`].
///
/// # Errors
/// Those of both.
pub fn load_moe_layer(folder: impl AsRef<Path>, block: usize, device: &Device) -> Result<MoeFeedForward, CheckpointError> {
    MoeCheckpoint::open(folder)?.load_layer(block, device)
}

/// Ascending numbers in short: `0, 3 to 7`.
fn ranges(numbers: &[usize]) -> String {
    let mut text: Vec<String> = Vec::new();
    for run in numbers.chunk_by(|a, b| a + 1 == *b) {
        text.push(match run {
            [one] => one.to_string(),
            _ => format!("{} to {}", run[0], run[run.len() - 1]),
        });
    }
    text.join(", ")
}
