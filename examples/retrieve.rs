//! A query in, a page of the best hits out: from a folder of images, or from the emoji of this repository.
//!
//! ```sh
//! cargo run --release --example retrieve -- --model path/to/checkpoint --images photos "a dog on a beach"
//! cargo run --release --example retrieve -- --model out/clip_up/sparse --beside out/clip_up/dense "regenschirm"
//! ```
//!
//! The second one takes the two models that the main job (`clip_up`) trained, a query in any of their languages, and the drawings that
//! neither has seen. Writes `--out`, an HTML page; photos are shown where they are, emoji are in the page.

mod support;

use std::{error::Error, io::Cursor, path::PathBuf, process::ExitCode};

use burn::tensor::{Device, Tensor};
use burn_moe::{
    clip::{ImageEmbedder, TextEmbedder, VisionConfig, checkpoint::ClipCheckpoint, normalize},
    train::data::{EmojiPack, EmojiVendor, ImageTextSet, Language},
};
use clap::Parser;
use support::{ImageArgs, ModelArgs, file_url, images_in, prepare_file, progress, report_skipped, write_atomic};

#[derive(Parser)]
#[command(about = "Finds images by a text", after_help = "Example: retrieve --images photos \"a dog on a beach\"")]
struct Args {
    /// What to look for
    query: String,
    /// A folder of images; without it, the emoji of this repository that no model was trained on
    #[arg(long)]
    images: Option<PathBuf>,
    /// Read its subfolders, too
    #[arg(long, requires = "images")]
    recursive: bool,
    /// Another checkpoint, whose hits are shown beside those of --model
    #[arg(long)]
    beside: Option<PathBuf>,
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
    prepare_file(&args.out)?;
    let device = args.model.device()?;
    let gallery = Gallery::open(&args)?;
    let mut page = format!("<!doctype html>\n<meta charset=\"utf-8\">\n<title>{0}</title>\n<h1>{0}</h1>\n", escaped(&args.query));
    for folder in [Some(&args.model.model), args.beside.as_ref()].into_iter().flatten() {
        let checkpoint = ClipCheckpoint::load_with(folder, &args.model.load_options()?, &device)?;
        let query = TextEmbedder::new(&checkpoint.model.text, &device)?.texts(&[&args.query], |_| ()).embeddings;
        let (embeddings, kept) = gallery.embed(&checkpoint, &args, &device)?;
        let similarities = normalize(embeddings).matmul(normalize(query).transpose()).try_into_vec_as::<f32>()?;
        let mut order: Vec<usize> = (0..kept.len()).collect();
        order.sort_by(|&a, &b| similarities[b].total_cmp(&similarities[a]));
        println!("{}", folder.display());
        page += &format!("<section><h2>{}</h2>\n", escaped(&folder.display().to_string()));
        for &place in order.iter().take(args.top) {
            let (similarity, Shown { name, url, height }) = (similarities[place], gallery.show(kept[place])?);
            println!("{similarity:.3}  {name}");
            let (name, url) = (escaped(&name), escaped(&url));
            page += &format!(
                "<figure><a href=\"{url}\"><img src=\"{url}\" height=\"{height}\"></a><figcaption>{similarity:.3} {name}</figcaption></figure>\n"
            );
        }
        page += "</section>\n";
    }
    page += "<style>body { font-family: sans-serif } section { display: inline-block; width: 48%; min-width: 400px; vertical-align: top }\n\
             figure { display: inline-block; margin: 8px; max-width: 200px } figcaption { font-size: small }</style>\n";
    write_atomic(&args.out, page.as_bytes())?;
    println!("{} is the page", args.out.display());
    Ok(())
}

/// What is searched.
enum Gallery {
    Files(Vec<PathBuf>),
    Emoji(ImageTextSet),
}

/// How an image stands in the page.
struct Shown {
    name: String,
    url: String,
    height: usize,
}

impl Gallery {
    fn open(args: &Args) -> Result<Self, Box<dyn Error>> {
        match &args.images {
            Some(folder) => {
                let paths = images_in(folder, args.recursive)?;
                Ok(Self::Files(paths.iter().map(|path| path.canonicalize()).collect::<Result<_, _>>()?))
            }
            None => {
                let pack = EmojiPack::open(concat!(env!("CARGO_MANIFEST_DIR"), "/data/emoji"))?;
                let emoji = pack.load(&[EmojiVendor::Twemoji], &[Language::En], false)?;
                println!("no --images: among {} emoji drawn by Twemoji, named in English", emoji.len());
                Ok(Self::Emoji(emoji))
            }
        }
    }

    /// The embeddings of the images that can be read, and which they are.
    fn embed(&self, checkpoint: &ClipCheckpoint, args: &Args, device: &Device) -> Result<(Tensor<2>, Vec<usize>), Box<dyn Error>> {
        let (vision, batch_size) = (&checkpoint.model.vision, args.model.batch_size);
        match self {
            Self::Files(paths) => {
                let preprocessor = args.reading.preprocessor(&checkpoint.config.vision);
                let embedder = ImageEmbedder::new(vision, preprocessor, device).with_batch_size(batch_size);
                let bar = progress("images", paths.len());
                let found = embedder.images(paths.clone(), |done| bar.set_position(done as u64));
                bar.finish_and_clear();
                report_skipped(&found.skipped, found.kept.len(), args.reading.strict)?;
                Ok((found.embeddings, found.kept))
            }
            Self::Emoji(set) => {
                let VisionConfig { image_size, preprocessing, .. } = &checkpoint.config.vision;
                if *image_size != set.image_size() {
                    let side = set.image_size();
                    return Err(
                        format!("the emoji have {side} pixels a side, and this model takes {image_size}: name --images").into()
                    );
                }
                let set = set.clone().with_preprocessing(*preprocessing);
                let batches = (0..set.len()).step_by(batch_size).map(|start| {
                    let images = set.images(start..(start + batch_size).min(set.len()), device);
                    vision.embedding(images)
                });
                Ok((Tensor::cat(batches.collect(), 0), (0..set.len()).collect()))
            }
        }
    }

    fn show(&self, image: usize) -> Result<Shown, Box<dyn Error>> {
        match self {
            Self::Files(paths) => Ok(Shown { name: paths[image].display().to_string(), url: file_url(&paths[image]), height: 200 }),
            Self::Emoji(set) => {
                let side = set.image_size() as u32;
                let mut png = Cursor::new(Vec::new());
                let pixels =
                    image::RgbImage::from_raw(side, side, set.image(image).to_vec()).ok_or("the image has another size")?;
                pixels.write_to(&mut png, image::ImageFormat::Png)?;
                let name = set.concepts()[set.concept_of_image()[image]].captions[0].text.clone();
                Ok(Shown { name, url: format!("data:image/png;base64,{}", base64(png.get_ref())), height: 96 })
            }
        }
    }
}

fn base64(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = String::new();
    for group in bytes.chunks(3) {
        let bits = (0..3).fold(0, |bits, place| bits << 8 | u32::from(group.get(place).copied().unwrap_or(0)));
        for place in 0..4 {
            let digit = DIGITS[(bits >> (18 - 6 * place)) as usize & 63];
            text.push(if place <= group.len() { char::from(digit) } else { '=' });
        }
    }
    text
}

/// For HTML text and attributes.
fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}
