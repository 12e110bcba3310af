//! Embeds your images and texts with a CLIP checkpoint, dense or sparse, into one safetensors file.
//!
//! ```sh
//! cargo run --release --example embed -- --model path/to/checkpoint --images photos --texts captions.txt --out out/embeddings.safetensors
//! ```
//!
//! `--images` is a folder (its PNG, JPEG and WebP files, sorted) and `--texts` a file with a text in every line. The file has `image_embeds` and
//! `text_embeds`, f32, a row each in that order, of length 1; their names are beside it in `.json`.

mod support;

use std::{error::Error, fs, path::PathBuf, process::ExitCode, time::Instant};

use burn_moe::clip::{
    Embedder,
    checkpoint::ClipCheckpoint,
    lists::{images_in, lines_in, others_in},
    normalize,
    preprocess::{ImagePreprocessor, Orientation},
};
use clap::Parser;
use indicatif::{ProgressBar, ProgressStyle};
use safetensors::{Dtype, tensor::TensorView};
use support::{device_by_name, report_passed_over, report_skipped, write_atomic};

#[derive(Parser)]
#[command(about = "Embeds images and texts")]
struct Args {
    /// Folder of the checkpoint: Hugging Face, open_clip or sparse
    #[arg(long, default_value = concat!(env!("CARGO_MANIFEST_DIR"), "/data/clip-tiny"))]
    model: PathBuf,
    /// A folder of images
    #[arg(long)]
    images: Option<PathBuf>,
    /// A file of texts, one in every line
    #[arg(long)]
    texts: Option<PathBuf>,
    #[arg(long, default_value = "out/embeddings.safetensors")]
    out: PathBuf,
    /// Leave images as the camera stored them, as open_clip does, instead of turning them the right way up
    #[arg(long)]
    as_stored: bool,
    /// Stop with an error when an image cannot be read, instead of skipping it
    #[arg(long)]
    strict: bool,
    /// Also time preprocessing alone
    #[arg(long)]
    rates: bool,
    #[arg(long, default_value_t = 32)]
    batch: usize,
    /// cpu, wgpu, vulkan, metal or cuda (each but cpu needs the cargo feature of its name)
    #[arg(long, default_value = "cpu")]
    device: String,
}

fn main() -> ExitCode {
    support::run(run)
}

fn run() -> Result<(), Box<dyn Error>> {
    let args = Args::parse();
    if args.images.is_none() && args.texts.is_none() {
        return Err("name a folder of images with --images, a file of texts with --texts, or both".into());
    }
    let device = device_by_name(&args.device)?;
    let checkpoint = ClipCheckpoint::load(&args.model, &device)?;
    let orientation = if args.as_stored { Orientation::AsStored } else { Orientation::Exif };
    let preprocessor = ImagePreprocessor::for_model(&checkpoint.config.vision).with_orientation(orientation);
    let embedder = Embedder::new(&checkpoint.model, preprocessor.clone(), &device).with_batch_size(args.batch);

    let mut tensors = Vec::new();
    let mut names = serde_json::Map::new();
    if let Some(folder) = &args.images {
        let paths = images_in(folder)?;
        report_passed_over(&others_in(folder)?);
        if paths.is_empty() {
            return Err(format!("{} holds no PNG, JPEG or WebP file", folder.display()).into());
        }
        let rate = |start: Instant| paths.len() as f64 / start.elapsed().as_secs_f64();
        if args.rates {
            let start = Instant::now();
            for batch in preprocessor.batches(paths.clone(), args.batch) {
                let batch: Vec<_> = batch.into_iter().flatten().collect();
                std::hint::black_box(preprocessor.tensor(&batch, &device));
            }
            println!("preprocess {:.1} images a second", rate(start));
        }
        let bar = progress(paths.len())?;
        let start = Instant::now();
        let found = embedder.images(paths.clone(), |done| bar.set_position(done as u64));
        bar.finish();
        let turned = if args.as_stored { "as stored" } else { "turned the right way up" };
        println!("embed {:.1} images a second ({} images, {turned})", rate(start), paths.len());
        report_skipped(&found.skipped, found.kept.len(), args.strict)?;
        names.insert("images".into(), found.kept.iter().map(|&image| paths[image].display().to_string()).collect());
        tensors.push(("image_embeds", found.embeddings));
    }
    if let Some(file) = &args.texts {
        let texts = lines_in(file)?;
        let bar = progress(texts.len())?;
        let found = embedder.texts(&texts, |done| bar.set_position(done as u64))?;
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
    if let Some(folder) = args.out.parent() {
        fs::create_dir_all(folder)?;
    }
    write_atomic(&args.out, &safetensors::serialize(views, None)?)?;
    write_atomic(args.out.with_extension("json"), serde_json::to_string_pretty(&names)?.as_bytes())?;
    println!("written to {}", args.out.display());
    Ok(())
}

fn progress(count: usize) -> Result<ProgressBar, Box<dyn Error>> {
    let style = ProgressStyle::with_template("{wide_bar} {pos}/{len} {elapsed} of {duration}")?;
    Ok(ProgressBar::new(count as u64).with_style(style))
}
