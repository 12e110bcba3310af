//! What CLIPs cost, dense and sparse: parameters, operations and memory, counted from their configurations.
//!
//! ```sh
//! cargo run --release --example cost                           # the presets
//! cargo run --release --example cost -- --model data/clip-emoji --experts 16 --batch-size 256
//! ```

mod support;

use std::{error::Error, path::PathBuf, process::ExitCode};

use burn_moe::{
    TokenChoiceConfig,
    clip::{ClipConfig, SparseClipConfig, checkpoint::ClipCheckpoint},
    transformer::{BlockSelection, RoutedLayerConfig, SparseEncoderConfig},
};
use clap::Parser;

#[derive(Parser)]
#[command(
    about = "Counts parameters, operations and memory of CLIPs",
    after_help = "Example: cost --presets vit-b-16 --experts 16 --batch-size 64"
)]
struct Args {
    /// Presets to count
    #[arg(long, value_delimiter = ',', default_value = "vit-b-32,vit-b-16,vit-l-14,vit-l-14-336")]
    presets: Vec<String>,
    /// Folder of a checkpoint to count instead
    #[arg(long)]
    model: Option<PathBuf>,
    /// Experts of each sparse block
    #[arg(long, default_value_t = 8)]
    experts: usize,
    /// Experts that each token passes
    #[arg(long, default_value_t = 2)]
    top_k: usize,
    /// Every N-th block is sparse
    #[arg(long, default_value_t = 2)]
    every: usize,
    /// Image-text pairs in a batch, for the memory of activations
    #[arg(long, default_value_t = 32)]
    batch_size: usize,
}

fn main() -> ExitCode {
    support::run(run)
}

fn run() -> Result<(), Box<dyn Error>> {
    let args = Args::parse();
    let configs: Vec<(String, ClipConfig)> = match &args.model {
        Some(folder) => vec![(folder.display().to_string(), ClipCheckpoint::read_config(folder)?)],
        None => args
            .presets
            .iter()
            .map(|name| {
                let config = ClipConfig::preset_by_name(name).ok_or_else(|| format!("`{name}` is no preset"))?;
                Ok((name.clone(), config))
            })
            .collect::<Result<_, String>>()?,
    };
    let tokens = TokenChoiceConfig::of_top_k(args.top_k);
    let sparse = SparseEncoderConfig::new()
        .with_blocks(BlockSelection::EveryNth(args.every))
        .with_num_experts(args.experts)
        .with_layer(RoutedLayerConfig::new().with_assignment(tokens.into()).into());
    println!(
        "{:<24} {:>10} {:>10} {:>12} {:>12} {:>10} {:>12} {:>12}",
        "", "parameters", "active", "GFLOPs", "GFLOPs", "weights", "inference", "training"
    );
    println!(
        "{:<24} {:>10} {:>10} {:>12} {:>12} {:>10} {:>12} {:>12}",
        "f32, batches of", "million", "million", "per image", "per text", "MB", "MB", "MB"
    );
    println!("{}", args.batch_size);
    for (name, config) in configs {
        row(&name, &config, args.batch_size);
        if config.is_sparse() {
            continue;
        }
        let config = config.sparse(SparseClipConfig::new().with_vision(Some(sparse.clone())).with_text(Some(sparse.clone())));
        config.validate()?;
        row(&format!("{name}, {} of {} experts", args.top_k, args.experts), &config, args.batch_size);
    }
    Ok(())
}

fn row(name: &str, config: &ClipConfig, batch: usize) {
    let (cost, memory) = (config.cost(), config.memory(batch));
    let (image, text) = (config.vision.cost(config.embed_dim), config.text.cost(config.embed_dim));
    let megabytes = |bytes: u64| bytes as f64 / 1e6;
    println!(
        "{name:<24} {:>10.1} {:>10.1} {:>12.2} {:>12.2} {:>10.0} {:>12.0} {:>12.0}",
        cost.params_total as f64 / 1e6,
        cost.params_active as f64 / 1e6,
        image.gflops(),
        text.gflops(),
        megabytes(memory.weights),
        megabytes(memory.inference()),
        megabytes(memory.training()),
    );
}
