//! A folder of images and a query in, a page of the best hits out.
//!
//! ```sh
//! cargo run --release --example retrieve -- --model path/to/checkpoint --images photos "a dog on a beach"
//! ```
//!
//! Writes `--out`, an HTML page that shows the images where they are.

mod support;

use std::{error::Error, fs, path::PathBuf, process::ExitCode};

use burn_moe::clip::{ImageEmbedder, TextEmbedder, checkpoint::ClipCheckpoint, normalize};
use clap::Parser;
use support::{ImageArgs, ModelArgs, file_url, images_in, progress, report_skipped, write_atomic};

#[derive(Parser)]
#[command(about = "Finds images by a text", after_help = "Example: retrieve --images photos \"a dog on a beach\"")]
struct Args {
    /// What to look for
    query: String,
    /// A folder of images
    #[arg(long)]
    images: PathBuf,
    /// Read its subfolders, too
    #[arg(long)]
    recursive: bool,
    /// How many to show
    #[arg(long, default_value_t = 12)]
    top: usize,
    /// The page
    #[arg(long, default_value = "out/retrieve.html")]
    out: PathBuf,
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    reading: ImageArgs,
}

fn main() -> ExitCode {
    support::run(run)
}

fn run() -> Result<(), Box<dyn Error>> {
    let args = Args::parse();
    let device = args.model.device()?;
    let checkpoint = ClipCheckpoint::load_with_image_size(&args.model.model, args.model.image_size, &device)?;
    let query = TextEmbedder::new(&checkpoint.model.text, &device)?.texts(&[&args.query], |_| ()).embeddings;
    let preprocessor = args.reading.preprocessor(&checkpoint.config.vision);
    let embedder = ImageEmbedder::new(&checkpoint.model.vision, preprocessor, &device).with_batch_size(args.model.batch_size);

    let paths: Vec<PathBuf> =
        images_in(&args.images, args.recursive)?.iter().map(|path| path.canonicalize()).collect::<Result<_, _>>()?;
    let bar = progress("images", paths.len());
    let found = embedder.images(paths.clone(), |done| bar.set_position(done as u64));
    bar.finish();
    report_skipped(&found.skipped, found.kept.len(), args.reading.strict)?;
    let similarities = normalize(found.embeddings).matmul(normalize(query).transpose()).try_into_vec_as::<f32>()?;
    let mut order: Vec<usize> = (0..found.kept.len()).collect();
    order.sort_by(|&a, &b| similarities[b].total_cmp(&similarities[a]));
    order.truncate(args.top);

    let mut page = format!("<!doctype html>\n<meta charset=\"utf-8\">\n<title>{0}</title>\n<h1>{0}</h1>\n", escaped(&args.query));
    for &image in &order {
        let (path, similarity) = (&paths[found.kept[image]], similarities[image]);
        println!("{similarity:.3}  {}", path.display());
        let (url, name) = (escaped(&file_url(path)), escaped(&path.display().to_string()));
        page += &format!(
            "<figure><a href=\"{url}\"><img src=\"{url}\" height=\"200\"></a><figcaption>{similarity:.3} {name}</figcaption></figure>\n"
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
