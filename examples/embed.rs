//! Embeds your images and texts with a CLIP checkpoint, dense or sparse, into one safetensors file.
//!
//! ```sh
//! cargo run --release --example embed -- --model path/to/checkpoint --images photos --texts captions.txt --out out/embeddings.safetensors
//! ```
//!
//! `--images` is a folder of images, `--texts` a file with a text in every line; `--list` is a list of images and captions, of any kind that
//! `CaptionedImages::read` knows. The file has `image_embeds` and `text_embeds`, f32, a row each, of length 1. Beside it in `.json` are their
//! names in that order, the images that were skipped, and for a list the row of each text's image.

mod support;

use std::{error::Error, path::PathBuf, process::ExitCode, time::Instant};

use burn_moe::clip::{
    ImageEmbedder, TextEmbedder,
    checkpoint::{TextCheckpoint, VisionCheckpoint},
    lists::{CaptionedImages, lines_in},
    normalize,
};
use clap::Parser;
use safetensors::{Dtype, tensor::TensorView};
use serde_json::{Map, json};
use support::{ImageArgs, ListArgs, ModelArgs, images_in, prepare_file, progress, report_skipped, write_atomic};

#[derive(Parser)]
#[command(
    about = "Embeds images and texts",
    after_help = "Example: embed --model clip-vit-base-patch16 --images photos --texts captions.txt --out out/embeddings.safetensors"
)]
struct Args {
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    reading: ImageArgs,
    /// Read the subfolders of --images, too
    #[arg(long, conflicts_with = "list")]
    recursive: bool,
    /// A file of texts, one in every line
    #[arg(long, conflicts_with = "list")]
    texts: Option<PathBuf>,
    /// A list of images and captions
    #[arg(long)]
    list: Option<PathBuf>,
    #[command(flatten)]
    columns: ListArgs,
    /// Where the embeddings go
    #[arg(long, default_value = "out/embeddings.safetensors")]
    out: PathBuf,
    /// Also time preprocessing alone
    #[arg(long)]
    rates: bool,
}

/// What is embedded.
#[derive(Default)]
struct Input {
    images: Option<Vec<PathBuf>>,
    texts: Option<Vec<String>>,
    /// Where both are from, with the places of its images.
    list: Option<CaptionedImages>,
}

impl Input {
    fn of(args: &Args) -> Result<Self, Box<dyn Error>> {
        if let Some(file) = &args.list {
            let (list, folder) = args.columns.read(file)?;
            return Ok(Self {
                images: Some(list.images.iter().map(|image| folder.join(image)).collect()),
                texts: None,
                list: Some(list),
            });
        }
        if args.columns.images.is_none() && args.texts.is_none() {
            return Err(
                "name a folder of images with --images, a file of texts with --texts, or both; or a list with --list".into()
            );
        }
        let images = args.columns.images.as_ref().map(|folder| images_in(folder, args.recursive)).transpose()?;
        Ok(Self { images, texts: args.texts.as_ref().map(lines_in).transpose()?, list: None })
    }
}

fn main() -> ExitCode {
    support::run(run)
}

fn run() -> Result<(), Box<dyn Error>> {
    let args = Args::parse();
    let names_file = args.out.with_extension("json");
    if names_file == args.out {
        return Err("--out is for the embeddings, a safetensors file; their names go beside it, with the ending .json".into());
    }
    prepare_file(&args.out)?;
    let device = args.model.device()?;
    let Input { images, mut texts, list } = Input::of(&args)?;
    let mut tensors = Vec::new();
    let mut names = Map::new();
    if let Some(paths) = images {
        let checkpoint = VisionCheckpoint::load_with(&args.model.model, &args.model.load_options()?, &device)?;
        let preprocessor = args.reading.preprocessor(&checkpoint.config);
        let rate = |start: Instant| paths.len() as f64 / start.elapsed().as_secs_f64();
        if args.rates {
            let start = Instant::now();
            for batch in preprocessor.batches(paths.clone(), args.model.batch_size) {
                let batch: Vec<_> = batch.into_iter().flatten().collect();
                std::hint::black_box(preprocessor.tensor(&batch, &device));
            }
            println!("preprocess {:.1} images a second", rate(start));
        }
        let embedder = ImageEmbedder::new(&checkpoint.model, preprocessor, &device).with_batch_size(args.model.batch_size);
        let bar = progress("images", paths.len());
        let start = Instant::now();
        let found = embedder.images(paths.clone(), |done| bar.set_position(done as u64));
        bar.finish();
        let turned = if args.reading.as_stored { "as stored" } else { "turned the right way up" };
        println!("embed {:.1} images a second ({} images, {turned})", rate(start), paths.len());
        report_skipped(&found.skipped, found.kept.len(), args.reading.strict)?;
        if let Some(mut list) = list {
            list.keep(&found.kept);
            names.insert("image_of_text".into(), json!(list.image_of_caption()));
            texts = Some(list.captions.into_iter().map(|(caption, _)| caption).collect());
        }
        names.insert("images".into(), found.kept.iter().map(|&image| paths[image].display().to_string()).collect());
        names.insert("skipped_images".into(), found.skipped.iter().map(ToString::to_string).collect());
        tensors.push(("image_embeds", found.embeddings));
    }
    if let Some(texts) = texts {
        let checkpoint = TextCheckpoint::load_with(&args.model.model, &args.model.load_options()?, &device)?;
        let embedder = TextEmbedder::new(&checkpoint.model, &device)?.with_batch_size(args.model.batch_size);
        let bar = progress("texts", texts.len());
        let found = embedder.texts(&texts, |done| bar.set_position(done as u64));
        bar.finish();
        println!("{} texts, of which {} did not fit the context and were cut", texts.len(), found.truncated);
        names.insert("texts".into(), texts.into_iter().collect());
        tensors.push(("text_embeds", found.embeddings));
    }

    let bytes = tensors.into_iter().map(|(name, tensor)| {
        let shape = tensor.dims().to_vec();
        let values = normalize(tensor).try_into_vec_as::<f32>().expect("a float tensor reads as f32");
        (name, shape, values.iter().flat_map(|value| value.to_le_bytes()).collect::<Vec<u8>>())
    });
    let bytes: Vec<_> = bytes.collect();
    let views = bytes.iter().map(|(name, shape, bytes)| Ok((*name, TensorView::new(Dtype::F32, shape.clone(), bytes)?)));
    let views: Vec<_> = views.collect::<Result<_, safetensors::SafeTensorError>>()?;
    write_atomic(&args.out, &safetensors::serialize(views, None)?)?;
    write_atomic(names_file, serde_json::to_string_pretty(&names)?.as_bytes())?;
    println!("written to {}", args.out.display());
    Ok(())
}
