//! A CLIP checkpoint from one layout into another: pickled weights into safetensors, open_clip's into Hugging Face's and back, images of
//! another size, half precision.
//!
//! ```sh
//! cargo run --release --example convert -- --model clip-vit-base-patch32 --to open-clip --out out/b32
//! ```

mod support;

use std::{error::Error, path::PathBuf, process::ExitCode};

use burn_moe::clip::checkpoint::{ClipCheckpoint, LoadOptions};
use clap::{Parser, ValueEnum};
use support::{Stored, device_by_name, refuse_checkpoint, remove_layouts_before};

#[derive(Parser)]
#[command(
    about = "Converts a CLIP checkpoint from one layout into another",
    after_help = "Example: convert --model clip-vit-base-patch32 --to hugging-face --precision f16 --out out/b32-f16"
)]
struct Args {
    /// Folder of the checkpoint: Hugging Face, open_clip or sparse
    #[arg(long)]
    model: PathBuf,
    /// Side of the images in pixels, if it should be another than the checkpoint's: its position embeddings are then interpolated
    #[arg(long)]
    image_size: Option<usize>,
    /// The layout: Hugging Face's with CLIP's tokenizer, open_clip's, or that of this crate, which sparse models need
    #[arg(long, value_enum)]
    to: Layout,
    /// Where the checkpoint goes
    #[arg(long)]
    out: PathBuf,
    /// Write over a checkpoint that is in --out
    #[arg(long)]
    overwrite: bool,
    /// How numbers are stored
    #[arg(long, value_enum, default_value = "f32")]
    precision: Stored,
}

#[derive(Clone, Copy, ValueEnum)]
enum Layout {
    HuggingFace,
    OpenClip,
    BurnMoe,
}

fn main() -> ExitCode {
    support::run(run)
}

fn run() -> Result<(), Box<dyn Error>> {
    let args = Args::parse();
    refuse_checkpoint(&args.out, args.overwrite)?;
    if matches!((args.to, args.precision), (Layout::HuggingFace | Layout::OpenClip, Stored::Int8)) {
        return Err("--precision int8 is for --to burn-moe: the other layouts have no place for weights in 8 bits".into());
    }
    let options = LoadOptions::new().with_image_size(args.image_size);
    let checkpoint = ClipCheckpoint::load_with(&args.model, &options, &device_by_name("cpu")?)?;
    let precision = args.precision.into();
    let written = match args.to {
        Layout::HuggingFace => checkpoint.save_hugging_face(&args.out, precision).map(|()| "config.json")?,
        Layout::OpenClip => checkpoint.save_open_clip(&args.out, precision).map(|()| "open_clip_config.json")?,
        Layout::BurnMoe => checkpoint.save_sparse(&args.out, precision).map(|()| "burn_moe_config.json")?,
    };
    remove_layouts_before(&args.out, written)?;
    println!("written to {}", args.out.display());
    Ok(())
}
