//! A folder of images and a query in, a page of the best hits out.
//!
//! ```sh
//! cargo run --release --example retrieve -- --model path/to/checkpoint --images photos "a dog on a beach"
//! ```
//!
//! Writes `--out`, an HTML page that shows the images where they are.

mod support;

use std::{error::Error, fs, path::PathBuf, process::ExitCode};

use burn_moe::clip::{
    Embedder,
    checkpoint::ClipCheckpoint,
    lists::{images_in, others_in},
    normalize,
    preprocess::{ImagePreprocessor, Orientation},
};
use clap::Parser;
use indicatif::{ProgressBar, ProgressStyle};
use support::{device_by_name, report_passed_over, report_skipped, write_atomic};

#[derive(Parser)]
#[command(about = "Finds images by a text")]
struct Args {
    /// What to look for
    query: String,
    /// A folder of images
    #[arg(long)]
    images: PathBuf,
    /// Folder of the checkpoint: Hugging Face, open_clip or sparse
    #[arg(long, default_value = concat!(env!("CARGO_MANIFEST_DIR"), "/data/clip-tiny"))]
    model: PathBuf,
    /// How many to show
    #[arg(long, default_value_t = 12)]
    top: usize,
    #[arg(long, default_value = "out/retrieve.html")]
    out: PathBuf,
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
    let preprocessor = ImagePreprocessor::for_model(&checkpoint.config.vision).with_orientation(Orientation::Exif);
    let embedder = Embedder::new(&checkpoint.model, preprocessor, &device);

    report_passed_over(&others_in(&args.images)?);
    let paths: Vec<PathBuf> = images_in(&args.images)?.iter().map(|path| path.canonicalize()).collect::<Result<_, _>>()?;
    if paths.is_empty() {
        return Err(format!("{} holds no PNG, JPEG or WebP file", args.images.display()).into());
    }
    let bar = ProgressBar::new(paths.len() as u64)
        .with_style(ProgressStyle::with_template("{wide_bar} {pos}/{len} {elapsed} of {duration}")?);
    let found = embedder.images(paths.clone(), |done| bar.set_position(done as u64));
    bar.finish();
    report_skipped(&found.skipped, found.kept.len(), args.strict)?;
    let query = embedder.texts(&[&args.query], |_| ())?.embeddings;
    let similarities = normalize(found.embeddings).matmul(normalize(query).transpose()).try_into_vec_as::<f32>()?;
    let mut order: Vec<usize> = (0..found.kept.len()).collect();
    order.sort_by(|&a, &b| similarities[b].total_cmp(&similarities[a]));
    order.truncate(args.top);

    let mut page = format!("<!doctype html>\n<meta charset=\"utf-8\">\n<title>{0}</title>\n<h1>{0}</h1>\n", escaped(&args.query));
    for &image in &order {
        let (path, similarity) = (paths[found.kept[image]].display().to_string(), similarities[image]);
        println!("{similarity:.3}  {path}");
        let path = escaped(&path);
        page += &format!(
            "<figure><img src=\"file://{path}\" height=\"200\"><figcaption>{similarity:.3} {path}</figcaption></figure>\n"
        );
    }
    page += "<style>body { font-family: sans-serif } figure { display: inline-block; margin: 8px } figcaption { font-size: small }</style>\n";
    if let Some(folder) = args.out.parent() {
        fs::create_dir_all(folder)?;
    }
    write_atomic(&args.out, page.as_bytes())?;
    println!("{} is the page", args.out.display());
    Ok(())
}

/// For HTML text and attributes.
fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}
