//! Retrieval and zero-shot classification by LAION CLIP_benchmark's protocol, on data sets as they are published and on your own.
//!
//! ```sh
//! cargo run --release --example evaluate -- --model path/to/checkpoint captions --list dataset_coco.json --split test --images coco
//! cargo run --release --example evaluate -- --model path/to/checkpoint captions --list my_photos.csv
//! cargo run --release --example evaluate -- --model path/to/checkpoint classes --images imagenet/val --names names.txt
//! ```
//!
//! A list is of any kind that `CaptionedImages::read` knows: COCO's, Karpathy's, Flickr30k's, Flickr8k's, Kaggle's, and tables or JSON of your
//! own. Images are turned the way up that the camera wrote into them, as in the other examples; with `--as-stored` they are not, as in
//! open_clip, whose figures can then be compared.

mod support;

use std::{error::Error, path::PathBuf, process::ExitCode};

use burn_moe::clip::{
    ImageEmbedder, RetrievalMetrics, TextEmbedder, ZeroShotClassifier,
    checkpoint::ClipCheckpoint,
    lists::{ClassifiedImages, ListError, lines_in},
    tokenizer::ClipTokenizer,
};
use clap::{Parser, Subcommand};
use support::{ImageArgs, ListArgs, ModelArgs, equal_names, progress, report_passed_over, report_skipped};

#[derive(Parser)]
#[command(
    about = "Evaluates a CLIP checkpoint",
    after_help = "Example: evaluate --model clip-vit-base-patch16 --as-stored captions --list dataset_flickr30k.json --split test --images flickr30k-images"
)]
struct Args {
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    reading: ImageArgs,
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Retrieval on a list of images and captions
    #[command(visible_aliases = ["coco", "karpathy", "flickr30k", "flickr8k"])]
    Captions {
        /// The list
        #[arg(long)]
        list: PathBuf,
        #[command(flatten)]
        columns: ListArgs,
    },
    /// Zero-shot classification of a folder of class folders
    Classes {
        /// The folder
        #[arg(long)]
        images: PathBuf,
        /// A name for each class folder, one in every line, in the sorted order of the folders; the folders' names unless given
        #[arg(long)]
        names: Option<PathBuf>,
        /// Sentences around the name, for which {} or {c} stands; may be given several times
        #[arg(long = "template", default_value = "a photo of a {}.")]
        templates: Vec<String>,
    },
}

fn main() -> ExitCode {
    support::run(run)
}

fn run() -> Result<(), Box<dyn Error>> {
    let args = Args::parse();
    let device = args.model.device()?;
    let checkpoint = ClipCheckpoint::load_with(&args.model.model, &args.model.load_options()?, &device)?;
    let preprocessor = args.reading.preprocessor(&checkpoint.config.vision);
    let batch_size = args.model.batch_size;
    let images = ImageEmbedder::new(&checkpoint.model.vision, preprocessor, &device).with_batch_size(batch_size);
    let texts = TextEmbedder::new(&checkpoint.model.text, &device)?.with_batch_size(batch_size);
    match args.task {
        Task::Captions { list, columns } => retrieval(&images, &texts, &list, columns, args.reading.strict),
        Task::Classes { images: folder, names, templates } => {
            classes(&images, &texts, folder, names, &templates, args.reading.strict)
        }
    }
}

fn retrieval(
    images: &ImageEmbedder,
    texts: &TextEmbedder,
    file: &PathBuf,
    mut columns: ListArgs,
    strict: bool,
) -> Result<(), Box<dyn Error>> {
    let read = match columns.read(file) {
        Err(error) if matches!(error.downcast_ref(), Some(ListError::Splits { splits, .. }) if splits.iter().any(|s| s == "test")) =>
        {
            columns.split = Some("test".into());
            println!("the list holds several splits: `test` is taken");
            columns.read(file)
        }
        read => read,
    };
    let (mut list, folder) = read?;
    println!("{} images, {} captions", list.images.len(), list.captions.len());
    let is_published = ["coco", "flickr"].iter().any(|name| file.to_string_lossy().to_lowercase().contains(name));
    if is_published && ![1000, 5000].contains(&list.images.len()) {
        println!(
            "note: papers report on Karpathy's test splits, of 1,000 images of Flickr30k and 5,000 of COCO (`--split test` of his lists, or \
             `--only` with their names); figures of {} images are others",
            list.images.len()
        );
    }
    let paths: Vec<PathBuf> = list.images.iter().map(|image| folder.join(image)).collect();
    let bar = progress("images", paths.len());
    let found = images.images(paths, |done| bar.set_position(done as u64));
    bar.finish();
    report_skipped(&found.skipped, found.kept.len(), strict)?;
    list.keep(&found.kept);
    let captions: Vec<&String> = list.captions.iter().map(|(caption, _)| caption).collect();
    let bar = progress("captions", captions.len());
    let embedded = texts.texts(&captions, |done| bar.set_position(done as u64));
    bar.finish();
    println!("{} captions did not fit the context and were cut", embedded.truncated);

    let own = list.image_of_caption();
    let by_protocol = RetrievalMetrics::new(found.embeddings.clone(), embedded.embeddings.clone(), &own)?;
    let same_text = ClipTokenizer::new().same_text(&captions);
    let metrics = RetrievalMetrics::with_equal_texts(found.embeddings, embedded.embeddings, &own, &same_text)?;
    print_recall(&metrics);
    if metrics != by_protocol {
        println!("some captions are equal, and count as one above; by CLIP_benchmark's protocol, where each has one image:");
        print_recall(&by_protocol);
    }
    Ok(())
}

fn print_recall(metrics: &RetrievalMetrics) {
    for (name, recall) in [("text to image", metrics.text_to_image), ("image to text", metrics.image_to_text)] {
        println!("{name}: R@1 {:.2} %, R@5 {:.2} %, R@10 {:.2} %", 100.0 * recall.r1, 100.0 * recall.r5, 100.0 * recall.r10);
    }
}

fn classes(
    embedder: &ImageEmbedder,
    texts: &TextEmbedder,
    folder: PathBuf,
    names: Option<PathBuf>,
    templates: &[String],
    strict: bool,
) -> Result<(), Box<dyn Error>> {
    let ClassifiedImages { mut classes, images, class_of_image, others } = ClassifiedImages::folders(folder)?;
    report_passed_over(&others);
    if let Some(file) = names {
        let names = lines_in(&file)?;
        if names.len() != classes.len() {
            return Err(format!("{} has {} names for {} class folders", file.display(), names.len(), classes.len()).into());
        }
        classes = names;
    }
    if let Some(equal) = equal_names(&classes) {
        println!("note: classes {equal}: their images cannot be told apart, and count for the first");
    }
    println!("{} classes, {} images", classes.len(), images.len());
    let classifier = ZeroShotClassifier::new(&texts.prompts(&classes, templates)?)?;
    let bar = progress("images", images.len());
    let found = embedder.images(images, |done| bar.set_position(done as u64));
    bar.finish();
    report_skipped(&found.skipped, found.kept.len(), strict)?;
    let class_of_image: Vec<usize> = found.kept.iter().map(|&image| class_of_image[image]).collect();
    let metrics = classifier.evaluate(found.embeddings, &class_of_image)?;
    let [top_1, top_5, mean] = [metrics.top_1, metrics.top_5, metrics.mean_per_class_recall].map(|share| 100.0 * share);
    println!("top-1 {top_1:.2} %, top-5 {top_5:.2} %, mean per-class recall {mean:.2} %");
    Ok(())
}
