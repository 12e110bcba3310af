//! Any dense CLIP checkpoint in, a sparse one and a report out.
//!
//! ```sh
//! cargo run --release --example upcycle_checkpoint -- --dense path/to/clip-vit-base-patch16 --out out/sparse-b16
//! ```
//!
//! `--dense` is a folder of Hugging Face's `CLIPModel` (`config.json` with one or several safetensors files) or of open_clip
//! (`open_clip_config.json`). The sparse model equals the dense one until it is trained; the report says by how much it does, on random images
//! and texts. It prints what it took, with the largest memory of the process where the system tells (Linux).

mod support;

use std::{error::Error, fs, path::PathBuf, process::ExitCode, time::Instant};

use burn::tensor::{Device, Distribution, Int, Tensor, TensorData};
use burn_moe::{
    TokenChoiceConfig, UpcycleFromDense, UpcycleOptions,
    clip::{
        ClipConfig, SparseClipConfig,
        checkpoint::{ClipCheckpoint, Precision},
    },
    transformer::{BlockSelection, RoutedLayerConfig, SparseEncoderConfig},
    upcycle::Probe,
};
use clap::{Parser, ValueEnum};
use support::{device_by_name, write_atomic};

#[derive(Parser)]
#[command(about = "Upcycles a dense CLIP checkpoint")]
struct Args {
    /// Folder of the dense checkpoint
    #[arg(long, default_value = concat!(env!("CARGO_MANIFEST_DIR"), "/data/clip-tiny"))]
    dense: PathBuf,
    /// Folder of the sparse one
    #[arg(long, default_value = "out/upcycled")]
    out: PathBuf,
    /// Experts of each sparse block
    #[arg(long, default_value_t = 8)]
    experts: usize,
    /// Experts that each token passes
    #[arg(long, default_value_t = 2)]
    top_k: usize,
    /// Every N-th block becomes sparse
    #[arg(long, default_value_t = 2)]
    every: usize,
    /// Leave the text tower dense
    #[arg(long)]
    dense_text: bool,
    /// Leave the vision tower dense
    #[arg(long)]
    dense_vision: bool,
    #[arg(long, value_enum, default_value = "f32")]
    precision: Stored,
    /// Decides the routers
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// cpu, wgpu, vulkan, metal or cuda (each but cpu needs the cargo feature of its name)
    #[arg(long, default_value = "cpu")]
    device: String,
}

#[derive(Clone, Copy, ValueEnum)]
enum Stored {
    F32,
    F16,
    Bf16,
}

fn main() -> ExitCode {
    support::run(run)
}

fn run() -> Result<(), Box<dyn Error>> {
    let args = Args::parse();
    let device = device_by_name(&args.device)?;
    device.seed(args.seed);
    let mut clock = Clock::start();

    let dense = ClipCheckpoint::load(&args.dense, &device)?;
    clock.lap("load");
    let tokens = TokenChoiceConfig::of_top_k(args.top_k);
    let experts = SparseEncoderConfig::new()
        .with_blocks(BlockSelection::EveryNth(args.every))
        .with_num_experts(args.experts)
        .with_layer(RoutedLayerConfig::new().with_assignment(tokens.into()).into());
    let tower = |stays_dense: bool| (!stays_dense).then(|| experts.clone());
    let towers = SparseClipConfig::new().with_vision(tower(args.dense_vision)).with_text(tower(args.dense_text));
    let config = dense.config.clone().sparse(towers);
    config.validate()?;
    let options = UpcycleOptions::default().with_probe(probe(&config, &device));
    let upcycled = config.init(&device).upcycle_from_dense(&dense.model, &options)?;
    clock.lap("upcycle and compare");
    drop(dense);
    println!("{}", upcycled.report);

    let precision = match args.precision {
        Stored::F32 => Precision::F32,
        Stored::F16 => Precision::F16,
        Stored::Bf16 => Precision::BF16,
    };
    ClipCheckpoint { config, model: upcycled.model }.save_sparse(&args.out, precision)?;
    clock.lap("save");
    let back = ClipCheckpoint::load(&args.out, &device)?;
    clock.lap("load the sparse one");
    let embedding = back.model.encode_image(images(&back.config, 1, &device)).embedding;
    burn_moe::finite::check_finite("the embedding", &embedding)?;
    clock.lap("embed an image");
    write_atomic(args.out.join("report.json"), serde_json::to_string_pretty(&upcycled.report)?.as_bytes())?;

    println!("weights: {} MB sparse", back.config.memory(1).weights / 1_000_000);
    if let Some(peak) = peak_memory() {
        println!("largest memory of this process: {peak} MB");
    }
    println!("checkpoint and report.json are in {}", args.out.display());
    Ok(())
}

fn images(config: &ClipConfig, count: usize, device: &Device) -> Tensor<4> {
    let side = config.vision.image_size;
    Tensor::random([count, config.vision.channels, side, side], Distribution::Normal(0.0, 1.0), device)
}

/// A few random images, and texts of random lengths.
fn probe(config: &ClipConfig, device: &Device) -> Probe {
    let (count, context, vocabulary) = (4, config.text.context_length, config.text.vocab_size as i32);
    let mut tokens = vec![0; count * context];
    for (text, tokens) in tokens.chunks_exact_mut(context).enumerate() {
        let end = (2 + text * context / 5).min(context - 1);
        tokens
            .iter_mut()
            .take(end)
            .enumerate()
            .for_each(|(i, token)| *token = (1 + (text * 977 + i * 131) as i32) % (vocabulary - 1).max(1));
        tokens[end] = vocabulary - 1;
    }
    let tokens = Tensor::<2, Int>::from_data(TensorData::new(tokens, [count, context]), device);
    Probe::ImagesAndTexts { images: images(config, count, device), tokens }
}

struct Clock(Instant);

impl Clock {
    fn start() -> Self {
        Self(Instant::now())
    }

    fn lap(&mut self, what: &str) {
        println!("{what}: {:.2} s", self.0.elapsed().as_secs_f64());
        self.0 = Instant::now();
    }
}

/// In MB, where Linux tells.
fn peak_memory() -> Option<u64> {
    let status = fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find(|line| line.starts_with("VmHWM"))?;
    line.split_whitespace().nth(1)?.parse::<u64>().ok().map(|kilobytes| kilobytes * 1024 / 1_000_000)
}
