//! An image and labels in, probabilities out.
//!
//! ```sh
//! cargo run --release --example zero_shot -- --model path/to/checkpoint --labels "cat,dog,train" photo.jpg
//! ```
//!
//! Each label goes into every template (`{}` is the label); embeddings are averaged as CLIP does.

mod support;

use std::{error::Error, path::PathBuf, process::ExitCode};

use burn::tensor::activation::softmax;
use burn_moe::clip::{
    Embedder, ZeroShotClassifier,
    checkpoint::ClipCheckpoint,
    preprocess::{ImagePreprocessor, Orientation},
};
use clap::Parser;
use support::{device_by_name, report_skipped};

#[derive(Parser)]
#[command(about = "Classifies images by labels")]
struct Args {
    /// The images
    #[arg(required = true)]
    images: Vec<PathBuf>,
    /// The labels
    #[arg(long, value_delimiter = ',', required = true)]
    labels: Vec<String>,
    /// Sentences around the label; may be given several times
    #[arg(long = "template", default_value = "a photo of a {}.")]
    templates: Vec<String>,
    /// Folder of the checkpoint: Hugging Face, open_clip or sparse
    #[arg(long, default_value = concat!(env!("CARGO_MANIFEST_DIR"), "/data/clip-tiny"))]
    model: PathBuf,
    /// Stop with an error when an image cannot be read, instead of skipping it
    #[arg(long)]
    strict: bool,
    /// cpu, wgpu, vulkan, metal or cuda (each but cpu needs the cargo feature of its name)
    #[arg(long, default_value = "cpu")]
    device: String,
}

fn main() -> ExitCode {
    support::run(run)
}

fn run() -> Result<(), Box<dyn Error>> {
    let args = Args::parse();
    let device = device_by_name(&args.device)?;
    let checkpoint = ClipCheckpoint::load(&args.model, &device)?;
    // Photos are turned the right way up, which open_clip does not do.
    let preprocessor = ImagePreprocessor::for_model(&checkpoint.config.vision).with_orientation(Orientation::Exif);
    let embedder = Embedder::new(&checkpoint.model, preprocessor, &device);
    let classifier = ZeroShotClassifier::new(&embedder.prompts(&args.labels, &args.templates)?)?;
    let found = embedder.images(args.images.clone(), |_| ());
    report_skipped(&found.skipped, found.kept.len(), args.strict)?;
    let scale = checkpoint.model.scale().into_scalar::<f32>();
    let probabilities = softmax(classifier.similarities(found.embeddings) * scale, 1).try_into_vec_as::<f32>()?;
    for (&image, probabilities) in found.kept.iter().zip(probabilities.chunks_exact(args.labels.len())) {
        println!("{}", args.images[image].display());
        let mut order: Vec<usize> = (0..args.labels.len()).collect();
        order.sort_by(|&a, &b| probabilities[b].total_cmp(&probabilities[a]));
        for label in order {
            println!("  {:6.2} %  {}", 100.0 * probabilities[label], args.labels[label]);
        }
    }
    Ok(())
}
