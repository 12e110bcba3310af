//! What the page of `examples/browser` loads: two models in half precision, the emoji that they search, and what its test expects.
//!
//! ```sh
//! cargo run --release --example browser_data -- --models out/clip_up --out target/browser/page
//! ```
//!
//! `--models` is where the main job (`clip_up`) wrote its checkpoints `dense` and `sparse`. `examples/browser/build.sh` runs this for you.

mod support;

use std::{
    error::Error,
    fs,
    io::Cursor,
    path::{Path, PathBuf},
    process::ExitCode,
    time::Instant,
};

use burn::tensor::{Device, Tensor};
use burn_moe::{
    AssignmentConfig, Capacity,
    clip::{
        checkpoint::{ClipCheckpoint, Precision},
        normalize,
        preprocess::{ImagePreprocessor, Orientation},
        tokenizer::ClipTokenizer,
    },
    stats::RoutingStats,
    train::data::{EmojiPack, EmojiVendor, ImageTextSet, Language},
    transformer::SparseLayer,
};
use clap::Parser;
use image::{
    DynamicImage, ImageFormat, RgbImage,
    codecs::png::{CompressionType, FilterType as PngFilter, PngEncoder},
    imageops::FilterType,
};
use serde_json::{Value, json};
use support::{Stored, write_atomic};

const EMOJI: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/data/emoji");
/// Tiles in a row of the sheet.
const COLUMNS: usize = 64;
/// What the test types, in ten languages.
const QUERIES: [&str; 10] = [
    "umbrella",
    "regenschirm",
    "chat qui sourit",
    "perro",
    "guarda-chuva com gotas de chuva",
    "rødt hjerte",
    "kissa, jolla on sydämet silminä",
    "fietser",
    "pociąg",
    "face with tears of joy and a party hat, which is long enough to be cut before its end because it does not fit",
];
/// Sizes and kinds of the pictures that the test drops.
const PICTURES: [(u32, u32, Kind); 10] = [
    (32, 32, Kind::Png),
    (64, 64, Kind::Png),
    (100, 140, Kind::Transparent),
    (231, 57, Kind::Png),
    (48, 300, Kind::Grey),
    (33, 31, Kind::Transparent),
    (224, 224, Kind::Jpeg),
    (640, 480, Kind::Jpeg),
    (500, 500, Kind::WebP),
    (128, 96, Kind::Png),
];

#[derive(Clone, Copy)]
enum Kind {
    Png,
    Transparent,
    Grey,
    Jpeg,
    WebP,
}

#[derive(Parser)]
#[command(about = "Writes what the page of examples/browser loads", after_help = "Example: browser_data --models out/clip_up")]
struct Args {
    /// The folder of the checkpoints `dense` and `sparse`
    #[arg(long, default_value = "out/clip_up")]
    models: PathBuf,
    /// What the models' weights are written in
    #[arg(long, default_value = "f16")]
    precision: Stored,
    /// The page's folder
    #[arg(long, default_value = "target/browser/page")]
    out: PathBuf,
    /// Where the pictures of the test go, and what it expects
    #[arg(long, default_value = "target/browser/test")]
    test: PathBuf,
}

fn main() -> ExitCode {
    support::run(run)
}

fn run() -> Result<(), Box<dyn Error>> {
    let args = Args::parse();
    let device = Device::flex();
    let pack = EmojiPack::open(EMOJI)?;
    let gallery = pack.load(&[EmojiVendor::Twemoji], &[Language::En], false)?;
    fs::create_dir_all(&args.out)?;
    fs::create_dir_all(&args.test)?;
    let names: Vec<&str> =
        gallery.concept_of_image().iter().map(|&concept| &*gallery.concepts()[concept].captions[0].text).collect();
    write_atomic(args.out.join("emoji.png"), &sheet(&gallery)?)?;
    fs::copy(Path::new(EMOJI).join("NOTICE-twemoji.md"), args.out.join("NOTICE-twemoji.md"))?;
    let about = json!({ "side": gallery.image_size(), "columns": COLUMNS, "names": names });
    write_atomic(args.out.join("emoji.json"), about.to_string().as_bytes())?;

    let drawn = pack.load(&[EmojiVendor::Noto], &[Language::En], false)?;
    let mut files = Vec::new();
    for (place, (width, height, kind)) in PICTURES.into_iter().enumerate() {
        let (bytes, extension) = picture(&drawn, place * 163, [width, height], kind)?;
        let name = format!("{place}.{extension}");
        write_atomic(args.test.join(&name), &bytes)?;
        files.push((name, bytes));
    }
    let mut expected = json!({ "queries": QUERIES, "files": files.iter().map(|(name, _)| name).collect::<Vec<_>>() });
    for name in ["dense", "sparse"] {
        let folder = args.out.join(name);
        ClipCheckpoint::load(args.models.join(name), &device)?.save_sparse(&folder, args.precision.into())?;
        // What the page has is what was rounded.
        let checkpoint = ClipCheckpoint::load(&folder, &device)?;
        let native = Native::new(&checkpoint, &device)?;
        let pictures = native.gallery(&gallery)?;
        let bytes: Vec<u8> = pictures.iter().flatten().flat_map(|value| value.to_le_bytes()).collect();
        write_atomic(folder.join("emoji.f32"), &bytes)?;
        expected[name] = native.expected(&pictures, &files)?;
        if name == "sparse" {
            let limited = with_capacity(checkpoint.clone());
            // The text of the configuration is all that differs.
            let elsewhere = args.test.join("limited");
            limited.save_sparse(&elsewhere, Precision::F16)?;
            expected["limited"] = Native::new(&limited, &device)?.texts_and_routings()?;
            expected["limited"]["config"] = fs::read_to_string(elsewhere.join("burn_moe_config.json"))?.into();
        }
    }
    write_atomic(args.test.join("expected.json"), expected.to_string().as_bytes())?;
    println!("{} and {} hold the page's data and what its test expects", args.out.display(), args.test.display());
    Ok(())
}

/// All drawings in one PNG.
fn sheet(set: &ImageTextSet) -> Result<Vec<u8>, Box<dyn Error>> {
    let side = set.image_size();
    let mut sheet =
        RgbImage::from_pixel((COLUMNS * side) as u32, (set.len().div_ceil(COLUMNS) * side) as u32, image::Rgb([255; 3]));
    for index in 0..set.len() {
        let tile = tile(set, index)?;
        image::imageops::replace(&mut sheet, &tile, (index % COLUMNS * side) as i64, (index / COLUMNS * side) as i64);
    }
    let mut file = Vec::new();
    sheet.write_with_encoder(PngEncoder::new_with_quality(&mut file, CompressionType::Best, PngFilter::Adaptive))?;
    Ok(file)
}

fn tile(set: &ImageTextSet, index: usize) -> Result<RgbImage, Box<dyn Error>> {
    let side = set.image_size() as u32;
    Ok(RgbImage::from_raw(side, side, set.image(index).to_vec()).ok_or("the image has another size")?)
}

fn encoded(image: &DynamicImage, format: ImageFormat) -> Result<Vec<u8>, Box<dyn Error>> {
    let mut file = Cursor::new(Vec::new());
    image.write_to(&mut file, format)?;
    Ok(file.into_inner())
}

/// A picture as somebody may drop it, and what its name ends with.
fn picture(
    set: &ImageTextSet,
    index: usize,
    [width, height]: [u32; 2],
    kind: Kind,
) -> Result<(Vec<u8>, &'static str), Box<dyn Error>> {
    let image = DynamicImage::from(tile(set, index)?).resize_exact(width, height, FilterType::CatmullRom);
    let transparent = |image: DynamicImage| {
        let mut image = image.into_rgba8();
        image.enumerate_pixels_mut().for_each(|(x, y, pixel)| pixel.0[3] = ((x * 7 + y * 3) % 256) as u8);
        DynamicImage::from(image)
    };
    Ok(match kind {
        Kind::Png => (encoded(&image, ImageFormat::Png)?, "png"),
        Kind::Transparent => (encoded(&transparent(image), ImageFormat::Png)?, "png"),
        Kind::Grey => (encoded(&image.grayscale(), ImageFormat::Png)?, "png"),
        Kind::Jpeg => (encoded(&image, ImageFormat::Jpeg)?, "jpg"),
        Kind::WebP => (encoded(&image, ImageFormat::WebP)?, "webp"),
    })
}

/// The same model with few slots, of which tokens compete for: what a text loses depends on the order in which they are filled.
fn with_capacity(mut checkpoint: ClipCheckpoint) -> ClipCheckpoint {
    let limit = |assignment: &mut AssignmentConfig| {
        if let AssignmentConfig::TokenChoice(config) = assignment {
            config.inference_capacity = Capacity::OfBalancedLoad(1.0);
        }
    };
    if let Some(SparseLayer::Routed(layer)) = checkpoint.config.text.encoder.sparse.as_mut().map(|sparse| &mut sparse.layer) {
        limit(&mut layer.assignment);
    }
    for block in &mut checkpoint.model.text.encoder.blocks {
        if let burn_moe::transformer::FeedForward::Moe(moe) = &mut block.feed_forward {
            limit(&mut moe.assignment);
        }
    }
    checkpoint
}

/// The page's work, natively.
struct Native<'a> {
    checkpoint: &'a ClipCheckpoint,
    tokenizer: ClipTokenizer,
    device: &'a Device,
}

impl<'a> Native<'a> {
    fn new(checkpoint: &'a ClipCheckpoint, device: &'a Device) -> Result<Self, Box<dyn Error>> {
        Ok(Self { checkpoint, tokenizer: ClipTokenizer::for_model(&checkpoint.model.text)?, device })
    }

    fn gallery(&self, set: &ImageTextSet) -> Result<Vec<Vec<f32>>, Box<dyn Error>> {
        let set = set.clone().with_preprocessing(self.checkpoint.config.vision.preprocessing);
        let mut rows = Vec::new();
        for start in (0..set.len()).step_by(64) {
            let images = set.images(start..(start + 64).min(set.len()), self.device);
            rows.extend(normalized(self.checkpoint.model.vision.embedding(images))?);
        }
        Ok(rows)
    }

    fn text(&self, text: &str) -> Result<Vec<f32>, Box<dyn Error>> {
        let tokens = self.tokenizer.tokenize(&[text], self.checkpoint.config.text.context_length);
        Ok(normalized(self.checkpoint.model.text.embedding(tokens.tensor(self.device)))?.remove(0))
    }

    fn texts_and_routings(&self) -> Result<Value, Box<dyn Error>> {
        let (mut texts, mut routings) = (Vec::new(), Vec::new());
        for query in QUERIES {
            texts.push(self.text(query)?);
            let tokens = self.tokenizer.tokenize(&[query], self.checkpoint.config.text.context_length);
            let output = self.checkpoint.model.text.forward(tokens.tensor(self.device));
            routings.push(output.routings.iter().map(RoutingStats::new).collect::<Vec<_>>());
        }
        Ok(json!({ "texts": texts, "routings": routings }))
    }

    fn expected(&self, pictures: &[Vec<f32>], files: &[(String, Vec<u8>)]) -> Result<Value, Box<dyn Error>> {
        let mut expected = self.texts_and_routings()?;
        let embeddings = QUERIES.iter().map(|query| self.text(query)).collect::<Result<Vec<_>, _>>()?;
        expected["nearest"] = embeddings.iter().map(|query| json!(nearest(query, pictures))).collect();
        let preprocessor = ImagePreprocessor::for_model(&self.checkpoint.config.vision).with_orientation(Orientation::Exif);
        let mut dropped = Vec::new();
        for (_, bytes) in files {
            let image = preprocessor.tensor(&[preprocessor.decode(bytes)?], self.device);
            dropped.push(normalized(self.checkpoint.model.vision.embedding(image))?.remove(0));
        }
        expected["pictures"] = json!(dropped);
        // One query at a time, as the page does it.
        let mut times = Vec::new();
        for _ in 0..20 {
            for query in QUERIES {
                let start = Instant::now();
                nearest(&self.text(query)?, pictures);
                times.push(start.elapsed().as_secs_f64() * 1e3);
            }
        }
        times.sort_by(f64::total_cmp);
        expected["milliseconds"] = times[times.len() / 2].into();
        Ok(expected)
    }
}

fn normalized(embeddings: Tensor<2>) -> Result<Vec<Vec<f32>>, Box<dyn Error>> {
    let [_, width] = embeddings.dims();
    Ok(normalize(embeddings).try_into_vec_as::<f32>()?.chunks(width).map(<[f32]>::to_vec).collect())
}

/// Places and similarities of the best, best first: some more than the page shows, to tell what is as near as the last of them.
fn nearest(query: &[f32], pictures: &[Vec<f32>]) -> Vec<(usize, f32)> {
    let similarity = |picture: &Vec<f32>| picture.iter().zip(query).map(|(a, b)| a * b).sum::<f32>();
    let mut found: Vec<(usize, f32)> = pictures.iter().map(similarity).enumerate().collect();
    found.sort_by(|a, b| b.1.total_cmp(&a.1));
    found.truncate(24);
    found
}
