//! Packs images and captions into tar shards, as `train` and webdataset read them: a list of your own, or this repository's emoji.
//!
//! ```sh
//! cargo run --release --example make_shards -- --out out/shards
//! ```

#[path = "support/mod.rs"]
mod support;

use std::{
    error::Error,
    fs,
    io::{BufWriter, Cursor, Write},
    path::PathBuf,
    process::ExitCode,
};

use burn_moe::clip::preprocess::ImagePreprocessor;
use burn_moe::train::{
    data::{EmojiPack, EmojiVendor, ImageTextSet},
    stream::SampleError,
};
use clap::Parser;
use support::{ListArgs, languages_by_code, progress, report_skipped, vendor_by_name};

#[derive(Parser)]
#[command(
    about = "Packs images and captions into tar shards",
    after_help = "Example: make_shards --list train.csv --images photos --per-shard 10000 --out shards"
)]
struct Args {
    /// Folder of the shards
    #[arg(long)]
    out: PathBuf,
    /// A list of images and captions, instead of the emoji
    #[arg(long)]
    list: Option<PathBuf>,
    #[command(flatten)]
    columns: ListArgs,
    /// Stop with an error when an image cannot be read, instead of skipping it
    #[arg(long, requires = "list")]
    strict: bool,
    /// Samples of a shard
    #[arg(long, default_value_t = 1000)]
    per_shard: usize,
    /// Vendors of the emoji: noto, noto-v1, …; all that the main job trains on unless given
    #[arg(long, value_delimiter = ',', conflicts_with = "list")]
    vendors: Vec<String>,
    /// Languages of the emoji's captions, such as en,de
    #[arg(long, value_delimiter = ',', default_value = "all", conflicts_with = "list")]
    languages: Vec<String>,
}

/// The bytes of an image file with its ending, and its captions.
type Sample = (Vec<u8>, String, Vec<String>);

fn main() -> ExitCode {
    support::run(run)
}

fn run() -> Result<(), Box<dyn Error>> {
    let args = Args::parse();
    if args.per_shard == 0 {
        return Err("--per-shard 0: a shard holds at least one sample".into());
    }
    if args.columns.images.is_some() && args.list.is_none() {
        return Err("--images is the folder of a list's images: name the list with --list".into());
    }
    let io = |error: std::io::Error| format!("{}: {error}", args.out.display());
    fs::create_dir_all(&args.out).map_err(io)?;
    let is_tar = |entry: &fs::DirEntry| entry.path().extension().is_some_and(|ending| ending == "tar");
    if fs::read_dir(&args.out).map_err(io)?.flatten().any(|entry| is_tar(&entry)) {
        return Err(format!("{} holds tar files already: take another --out, or remove them", args.out.display()).into());
    }
    match &args.list {
        Some(list) => {
            let (list, folder) = args.columns.read(list)?;
            let mut captions: Vec<Vec<String>> = vec![Vec::new(); list.images.len()];
            list.captions.into_iter().for_each(|(caption, image)| captions[image].push(caption));
            // What training could not read is not packed.
            let preprocessor = ImagePreprocessor::new(16);
            let sample = |(image, captions): (PathBuf, Vec<String>)| -> Result<Sample, SampleError> {
                let path = folder.join(&image);
                let bad = |error: &dyn Error| SampleError {
                    sample: path.display().to_string(),
                    reason: error.to_string().trim_start().into(),
                };
                let bytes = fs::read(&path).map_err(|error| bad(&error))?;
                // By its content, as the readers of shards go by names.
                let kind = image::guess_format(&bytes).map_err(|error| bad(&error))?;
                preprocessor.decode(&bytes).map_err(|error| bad(&error))?;
                let ending = kind.extensions_str().first().copied().unwrap_or("png");
                Ok((bytes, ending.to_string(), captions))
            };
            let count = list.images.len();
            write(&args, list.images.into_iter().zip(captions).map(sample), count)
        }
        None => {
            let set = emoji(&args)?;
            let side = set.image_size() as u32;
            let sample = |image: usize| -> Result<Sample, SampleError> {
                let mut png = Cursor::new(Vec::new());
                let pixels = image::RgbImage::from_raw(side, side, set.image(image).to_vec()).expect("as many bytes as pixels");
                pixels.write_to(&mut png, image::ImageFormat::Png).expect("pixels in memory are written as PNG");
                let captions = &set.concepts()[set.concept_of_image()[image]].captions;
                Ok((png.into_inner(), "png".into(), captions.iter().map(|caption| caption.text.clone()).collect()))
            };
            write(&args, (0..set.len()).map(sample), set.len())
        }
    }
}

fn emoji(args: &Args) -> Result<ImageTextSet, Box<dyn Error>> {
    let pack = EmojiPack::open(concat!(env!("CARGO_MANIFEST_DIR"), "/data/emoji"))?;
    let all: Vec<_> = EmojiVendor::TRAINING.into_iter().chain([EmojiVendor::Twemoji]).collect();
    let vendors = args.vendors.iter().map(|name| vendor_by_name(name, &all)).collect::<Result<Vec<_>, _>>()?;
    let vendors = if vendors.is_empty() { EmojiVendor::TRAINING.to_vec() } else { vendors };
    Ok(pack.load(&vendors, &languages_by_code(&args.languages)?, false)?)
}

fn write(args: &Args, samples: impl Iterator<Item = Result<Sample, SampleError>>, count: usize) -> Result<(), Box<dyn Error>> {
    if count == 0 {
        return Err("there is no image to pack".into());
    }
    let bar = progress("samples", count);
    let (mut shard, mut skipped, mut number) = (None, Vec::new(), 0);
    for sample in samples {
        bar.inc(1);
        let (image, ending, captions) = match sample {
            Ok(sample) => sample,
            Err(error) if args.strict => return Err(error.into()),
            Err(error) => {
                skipped.push(error);
                continue;
            }
        };
        if number % args.per_shard == 0 {
            finish(shard.take())?;
            shard = Some(Shard::begin(args.out.join(format!("{:05}.tar", number / args.per_shard)))?);
        }
        let builder = &mut shard.as_mut().expect("a shard is open").builder;
        // One caption is a text, several are a list.
        let (text, kind) = match &captions[..] {
            [one] => (one.clone(), "txt"),
            several => (serde_json::json!({ "caption": several }).to_string(), "json"),
        };
        for (bytes, ending) in [(&image[..], ending.as_str()), (text.as_bytes(), kind)] {
            let mut header = tar::Header::new_gnu();
            header.set_size(bytes.len() as u64);
            header.set_mode(0o644);
            builder.append_data(&mut header, format!("{number:08}.{ending}"), bytes)?;
        }
        number += 1;
    }
    finish(shard)?;
    bar.finish();
    report_skipped(&skipped, number, false)?;
    let name = match number.div_ceil(args.per_shard) {
        1 => "00000.tar".to_string(),
        shards => format!("{{00000..{:05}}}.tar", shards - 1),
    };
    println!("{number} samples are in {}", args.out.join(name).display());
    Ok(())
}

/// A shard that is being written, under a name that no reader takes for one.
struct Shard {
    builder: tar::Builder<BufWriter<fs::File>>,
    aside: PathBuf,
    path: PathBuf,
}

impl Shard {
    fn begin(path: PathBuf) -> Result<Self, Box<dyn Error>> {
        let aside = path.with_extension("tar.part");
        let file = fs::File::create(&aside).map_err(|error| format!("{}: {error}", aside.display()))?;
        Ok(Self { builder: tar::Builder::new(BufWriter::new(file)), aside, path })
    }
}

fn finish(shard: Option<Shard>) -> Result<(), Box<dyn Error>> {
    if let Some(Shard { builder, aside, path }) = shard {
        builder.into_inner()?.flush()?;
        fs::rename(aside, path)?;
    }
    Ok(())
}
