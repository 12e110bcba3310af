//! Retrieval and zero-shot classification by LAION CLIP_benchmark's protocol, on data sets as they are published.
//!
//! ```sh
//! cargo run --release --example evaluate -- --model path/to/checkpoint coco --list captions_val2014.json --images val2014
//! cargo run --release --example evaluate -- --model path/to/checkpoint karpathy --list dataset_coco.json --split test --images coco
//! cargo run --release --example evaluate -- --model path/to/checkpoint flickr30k --list results_20130124.token --images flickr30k-images
//! cargo run --release --example evaluate -- --model path/to/checkpoint classes --images imagenet/val --names names.txt
//! ```
//!
//! Images are turned the way up that the camera wrote into them, as in the other examples; with `--as-stored` they are not, as in open_clip,
//! whose figures can then be compared.

mod support;

use std::{error::Error, path::PathBuf, process::ExitCode};

use burn_moe::clip::{
    Embedder, RetrievalMetrics, ZeroShotClassifier,
    checkpoint::ClipCheckpoint,
    lists::{CaptionedImages, ClassifiedImages, lines_in},
    preprocess::{ImagePreprocessor, Orientation},
};
use clap::{Parser, Subcommand};
use indicatif::{ProgressBar, ProgressStyle};
use support::{device_by_name, report_skipped};

#[derive(Parser)]
#[command(about = "Evaluates a CLIP checkpoint")]
struct Args {
    /// Folder of the checkpoint: Hugging Face, open_clip or sparse
    #[arg(long, default_value = concat!(env!("CARGO_MANIFEST_DIR"), "/data/clip-tiny"))]
    model: PathBuf,
    /// Leave images as the camera stored them, as open_clip and CLIP_benchmark do, instead of turning them the right way up
    #[arg(long)]
    as_stored: bool,
    /// Stop with an error when an image cannot be read, instead of skipping it
    #[arg(long)]
    strict: bool,
    #[arg(long, default_value_t = 64)]
    batch: usize,
    /// cpu, wgpu, vulkan, metal or cuda (each but cpu needs the cargo feature of its name)
    #[arg(long, default_value = "cpu")]
    device: String,
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Retrieval on COCO's captions
    Coco {
        #[arg(long)]
        list: PathBuf,
        #[arg(long)]
        images: PathBuf,
    },
    /// Retrieval on a split of Karpathy's lists
    Karpathy {
        #[arg(long)]
        list: PathBuf,
        #[arg(long, default_value = "test")]
        split: String,
        #[arg(long)]
        images: PathBuf,
    },
    /// Retrieval on Flickr30k's captions
    Flickr30k {
        #[arg(long)]
        list: PathBuf,
        #[arg(long)]
        images: PathBuf,
    },
    /// Zero-shot classification of a folder of class folders
    Classes {
        #[arg(long)]
        images: PathBuf,
        /// A name for each class folder, one in every line, in the sorted order of the folders; the folders' names unless given
        #[arg(long)]
        names: Option<PathBuf>,
        /// Sentences around the name; may be given several times
        #[arg(long = "template", default_value = "a photo of a {}.")]
        templates: Vec<String>,
    },
}

fn main() -> ExitCode {
    support::run(run)
}

fn run() -> Result<(), Box<dyn Error>> {
    let args = Args::parse();
    let device = device_by_name(&args.device)?;
    let checkpoint = ClipCheckpoint::load(&args.model, &device)?;
    let orientation = if args.as_stored { Orientation::AsStored } else { Orientation::Exif };
    let preprocessor = ImagePreprocessor::for_model(&checkpoint.config.vision).with_orientation(orientation);
    let embedder = Embedder::new(&checkpoint.model, preprocessor, &device).with_batch_size(args.batch);
    match args.task {
        Task::Coco { list, images } => retrieval(&embedder, as_in_papers(CaptionedImages::coco(list)?, 5000), images, args.strict),
        Task::Karpathy { list, split, images } => {
            retrieval(&embedder, CaptionedImages::karpathy(list, &split)?, images, args.strict)
        }
        Task::Flickr30k { list, images } => {
            retrieval(&embedder, as_in_papers(CaptionedImages::flickr30k(list)?, 1000), images, args.strict)
        }
        Task::Classes { images, names, templates } => classes(&embedder, images, names, &templates, args.strict),
    }
}

/// Says so when a list is not as long as the split that papers report on.
fn as_in_papers(list: CaptionedImages, images: usize) -> CaptionedImages {
    if list.images.len() != images {
        println!(
            "note: papers report on Karpathy's test split of {images} images (`evaluate karpathy`); this list has {}, and its figures are others",
            list.images.len()
        );
    }
    list
}

fn retrieval(embedder: &Embedder, mut list: CaptionedImages, folder: PathBuf, strict: bool) -> Result<(), Box<dyn Error>> {
    let paths: Vec<PathBuf> = list.images.iter().map(|image| folder.join(image)).collect();
    println!("{} images, {} captions", paths.len(), list.captions.len());
    let bar = progress("images", paths.len())?;
    let images = embedder.images(paths, |done| bar.set_position(done as u64));
    bar.finish();
    report_skipped(&images.skipped, images.kept.len(), strict)?;
    list.keep(&images.kept);
    let captions: Vec<&String> = list.captions.iter().map(|(caption, _)| caption).collect();
    let bar = progress("captions", captions.len())?;
    let texts = embedder.texts(&captions, |done| bar.set_position(done as u64))?;
    bar.finish();
    let metrics = RetrievalMetrics::new(images.embeddings, texts.embeddings, &list.image_of_caption())?;
    for (name, recall) in [("text to image", metrics.text_to_image), ("image to text", metrics.image_to_text)] {
        println!("{name}: R@1 {:.2} %, R@5 {:.2} %, R@10 {:.2} %", 100.0 * recall.r1, 100.0 * recall.r5, 100.0 * recall.r10);
    }
    println!("{} captions did not fit the context and were cut", texts.truncated);
    Ok(())
}

fn classes(
    embedder: &Embedder,
    folder: PathBuf,
    names: Option<PathBuf>,
    templates: &[String],
    strict: bool,
) -> Result<(), Box<dyn Error>> {
    let ClassifiedImages { mut classes, images, class_of_image } = ClassifiedImages::folders(folder)?;
    if let Some(file) = names {
        let names = lines_in(&file)?;
        if names.len() != classes.len() {
            return Err(format!("{} has {} names for {} class folders", file.display(), names.len(), classes.len()).into());
        }
        classes = names;
    }
    println!("{} classes, {} images", classes.len(), images.len());
    let classifier = ZeroShotClassifier::new(&embedder.prompts(&classes, templates)?)?;
    let bar = progress("images", images.len())?;
    let found = embedder.images(images, |done| bar.set_position(done as u64));
    bar.finish();
    report_skipped(&found.skipped, found.kept.len(), strict)?;
    let class_of_image: Vec<usize> = found.kept.iter().map(|&image| class_of_image[image]).collect();
    let metrics = classifier.evaluate(found.embeddings, &class_of_image)?;
    let [top_1, top_5, mean] = [metrics.top_1, metrics.top_5, metrics.mean_per_class_recall].map(|share| 100.0 * share);
    println!("top-1 {top_1:.2} %, top-5 {top_5:.2} %, mean per-class recall {mean:.2} %");
    Ok(())
}

fn progress(what: &'static str, count: usize) -> Result<ProgressBar, Box<dyn Error>> {
    let style = ProgressStyle::with_template("{prefix} {wide_bar} {pos}/{len} {elapsed} of {duration}")?;
    Ok(ProgressBar::new(count as u64).with_style(style).with_prefix(what))
}
