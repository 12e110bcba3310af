//! An image and labels in, probabilities out.
//!
//! ```sh
//! cargo run --release --example zero_shot -- --model path/to/checkpoint --labels "cat,dog,train" photo.jpg
//! ```
//!
//! Each label goes into every template (`{}` or `{c}` is the label); embeddings are averaged as CLIP does.

mod support;

use std::{error::Error, path::PathBuf, process::ExitCode};

use burn::tensor::activation::softmax;
use burn_moe::clip::{ImageEmbedder, TextEmbedder, ZeroShotClassifier, checkpoint::ClipCheckpoint};
use clap::Parser;
use support::{ImageArgs, ModelArgs, equal_names, progress, report_skipped};

#[derive(Parser)]
#[command(about = "Classifies images by labels", after_help = "Example: zero_shot --labels \"cat,dog,train\" photo.jpg")]
struct Args {
    /// The images
    #[arg(required = true)]
    images: Vec<PathBuf>,
    /// The labels
    #[arg(long, value_delimiter = ',', required = true)]
    labels: Vec<String>,
    /// Sentences around the label, for which {} or {c} stands; may be given several times
    #[arg(long = "template", default_value = "a photo of a {}.")]
    templates: Vec<String>,
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    reading: ImageArgs,
}

fn main() -> ExitCode {
    support::run(run)
}

fn run() -> Result<(), Box<dyn Error>> {
    let mut args = Args::parse();
    args.labels.iter_mut().for_each(|label| *label = label.trim().to_string());
    if let Some(equal) = equal_names(&args.labels) {
        return Err(format!("--labels: {equal}: each label needs a name of its own").into());
    }
    let device = args.model.device()?;
    let checkpoint = ClipCheckpoint::load_with(&args.model.model, &args.model.load_options()?, &device)?;
    let texts = TextEmbedder::new(&checkpoint.model.text, &device)?;
    let classifier = ZeroShotClassifier::new(&texts.prompts(&args.labels, &args.templates)?)?;
    let preprocessor = args.reading.preprocessor(&checkpoint.config.vision);
    let embedder = ImageEmbedder::new(&checkpoint.model.vision, preprocessor, &device).with_batch_size(args.model.batch_size);
    let bar = progress("images", args.images.len());
    let found = embedder.images(args.images.clone(), |done| bar.set_position(done as u64));
    bar.finish_and_clear();
    report_skipped(&found.skipped, found.kept.len(), args.reading.strict)?;
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
